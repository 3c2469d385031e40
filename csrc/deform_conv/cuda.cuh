// deform_conv2d on CUDA: the code that the forward and backward passes have in common.
//
// Each pass is a matrix product of which one operand does not exist in memory. A block computes a tile of the product.
// It brings the operands to shared memory in chunks, samples the input while doing so, and multiplies the chunks on
// tensor cores. There are two buffers for chunks: while some warps fill one buffer, the others multiply the chunk in
// the other buffer.
//
// A row of an operand in shared memory has 128 bytes of consecutive elements of the dimension that is summed: kDepth<T>
// elements, in kPieces pieces of 16 bytes. The pieces of a row are permuted, so that threads that read or write the
// same piece of neighboring rows use different banks.
#pragma once

#include "common/cuda/mma.cuh"
#include "deform_conv/problem.h"

namespace relops {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTilePixels = 64;  // output pixels of a tile
constexpr int kPieces = 8;

template <class T>
constexpr int kPieceSize = 16 / sizeof(T);
template <class T>
constexpr int kDepth = kPieces * kPieceSize<T>;

// Samples that would be rounded to 16 bits are split into two numbers of 16 bits, so that results are as accurate as
// sums in float32. The first half of a row then has the rounded samples, and the second half has what remains.
template <class T>
constexpr bool kSplitsSamples = sizeof(T) == 2;
template <class T>
constexpr int kSampleDepth = kSplitsSamples<T> ? kDepth<T> / 2 : kDepth<T>;
template <class T>
constexpr int kSamplePieces = kSampleDepth<T> / kPieceSize<T>;

// The permutation of the pieces of a row: piece p of row r is at p ^ row_bits(r) ^ block_bits(r / 8). Eight lanes that
// access the same piece of eight neighboring rows, the same four pieces of two neighboring rows, or (when channels_last
// pieces are transposed) the same piece of every fourth row do not conflict.
__device__ __forceinline__ unsigned row_bits(unsigned row) { return (row & 1) << 2 | (row >> 1 & 3); }
__device__ __forceinline__ constexpr unsigned block_bits(unsigned block) { return (block & 1) | (block & 2) << 1; }

// Returns the index of a piece in a tile.
template <int kRowPieces = kPieces>
__device__ __forceinline__ unsigned piece_at(unsigned row, unsigned piece) {
  return row * kRowPieces + (piece ^ row_bits(row) ^ block_bits(row >> 3));
}

// Copies 16 bytes from global to shared memory, or writes zeros if not `active`. The copy is complete after
// wait_for_copies() and a barrier.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool active) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(active ? 16 : 0)
      : "memory");
#else  // sm_75, and the emulation of tests/cuda_emulation
  store_pack<float, 4>(static_cast<float*>(to), load_pack<float, 4>(static_cast<const float*>(from), active));
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Returns the index of the thread in a form that hides its origin from the compiler. Addresses that depend on the index
// are then computed where they are used, instead of before the loops, where they would occupy registers.
__device__ __forceinline__ unsigned opaque_thread() {
  unsigned thread = threadIdx.x;
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(thread));
#endif
  return thread;
}

// Calls f(exact) with a std::bool_constant that is true unless float32 products may use TF32.
template <class T, class F>
void dispatch_exact(bool allow_tf32, F f) {
  if constexpr (std::is_same_v<T, float>)
    if (allow_tf32) return f(std::false_type{});
  f(std::true_type{});
}

// Returns x as an element of an operand. If float32 products use TF32, the element is rounded here, because several
// warps read it.
template <class T, bool kExact>
__device__ __forceinline__ T operand(ComputeType<T> x) {
  if constexpr (std::is_same_v<T, float> && !kExact) {
    float high, rest;
    MmaSplit<float, false>::sum(x, high, rest);
    return high;
  } else {
    return static_cast<T>(x);
  }
}

// How the warps of a block divide a tile of kRows x kColumns sums among themselves.
template <int kRows, int kColumns, int kRowWarps>
struct WarpGrid {
  static constexpr int kColumnWarps = kWarps / kRowWarps;
  static constexpr int kWarpRows = kRows / kRowWarps, kWarpColumns = kColumns / kColumnWarps;
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;

  static __device__ __forceinline__ unsigned first_row(unsigned thread) {
    return thread / 32 / kColumnWarps * kWarpRows;
  }
  static __device__ __forceinline__ unsigned first_column(unsigned thread) {
    return thread / 32 % kColumnWarps * kWarpColumns;
  }
};

// The sums of a warp. The products of mma.cuh define which lane has which sum.
template <class T, class Grid>
struct Sums {
  using Compute = ComputeType<T>;
  Compute x[Grid::kRowTiles][Grid::kColumnTiles][4];

  __device__ __forceinline__ void set_zero() {
#pragma unroll
    for (auto& row : x)
#pragma unroll
      for (auto& tile : row)
#pragma unroll
        for (Compute& sum : tile) sum = 0;
  }

  // Adds the products of the rows of two chunks: `row_count` rows and `column_count` columns of the product exist, and
  // `depth` elements of the rows are not zero. Warps that have no sums to compute skip the products. kSamples tells
  // whether the rows are samples. kRoundedRows and kRoundedColumns tell whether operand() has rounded the elements.
  template <bool kExact, bool kSamples, bool kRoundedRows, bool kRoundedColumns>
  __device__ __forceinline__ void add_products(const T* rows, const T* columns, int row_count, int column_count,
                                               int depth) {
    constexpr int V = kPieceSize<T>, kLane = kLaneDepth<T>, kSteps = V / kLane;
    constexpr bool kRounds = std::is_same_v<T, float> && !kExact, kSplit = kSamples && kSplitsSamples<T>;
    const unsigned thread = opaque_thread(), g = thread % 32 / 4, t = thread % 4;
    const unsigned row = Grid::first_row(thread), column = Grid::first_column(thread);
    if (static_cast<int>(row) >= row_count || static_cast<int>(column) >= column_count) return;
    // The first row of a warp is a multiple of the number of its rows, which is a power of two. The bits of blocks are
    // therefore those of the first block and constants.
    const unsigned row_piece = t ^ row_bits(g) ^ block_bits(row / 8),
                   column_piece = t ^ row_bits(g) ^ block_bits(column / 8);
    rows += (row + g) * kDepth<T>;
    columns += (column + g) * kDepth<T>;
#pragma unroll
    for (int half = 0; half < (kSplit ? 1 : 2); ++half) {
      if (half * kDepth<T> / 2 >= depth) break;
      OperandA<T, kExact> a[kSteps][Grid::kRowTiles];
#pragma unroll
      for (int i = 0; i < 2 * Grid::kRowTiles; ++i) {
        const Pack<T, V> pack =
            *reinterpret_cast<const Pack<T, V>*>(rows + 8 * i * kDepth<T> + (row_piece ^ block_bits(i) ^ 4 * half) * V);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          OperandA<T, kExact>& operand = a[v / kLane][i / 2];
          if constexpr (kRounds && kRoundedRows)
            operand.high[i % 2][v % kLane] = pack.x[v];
          else
            operand.set_stored(i % 2, v % kLane, pack.x[v]);
        }
        if constexpr (kSplit) {
          const Pack<T, V> rest =
              *reinterpret_cast<const Pack<T, V>*>(rows + 8 * i * kDepth<T> + (row_piece ^ block_bits(i) ^ 4) * V);
#pragma unroll
          for (int v = 0; v < V; ++v) a[v / kLane][i / 2].rest[i % 2][v % kLane] = rest.x[v];
        }
      }
#pragma unroll
      for (int j = 0; j < Grid::kColumnTiles; ++j) {
        const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(columns + 8 * j * kDepth<T> +
                                                                     (column_piece ^ block_bits(j) ^ 4 * half) * V);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          OperandB<T, kExact> b;
#pragma unroll
          for (int e = 0; e < kLane; ++e) {
            if constexpr (kRounds && kRoundedColumns)
              b.high[e] = pack.x[step * kLane + e];
            else
              b.set_stored(e, pack.x[step * kLane + e]);
          }
#pragma unroll
          for (int i = 0; i < Grid::kRowTiles; ++i) multiply<kSplit>(x[i][j], a[step][i], b);
        }
      }
    }
  }

  // Calls f(row, column, sums), where sums are those of columns `column` and column + 1.
  template <class F>
  __device__ __forceinline__ void for_pairs(F f) const {
    const unsigned thread = opaque_thread(), g = thread % 32 / 4, t = thread % 4;
    const int first_row = Grid::first_row(thread) + g, first_column = Grid::first_column(thread) + 2 * t;
#pragma unroll
    for (int i = 0; i < Grid::kRowTiles; ++i)
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int j = 0; j < Grid::kColumnTiles; ++j)
          f(first_row + 16 * i + 8 * k, first_column + 8 * j, Pack<Compute, 2>{x[i][j][2 * k], x[i][j][2 * k + 1]});
  }
};

// ---- Pixels and samples ----

struct OutputPixel {
  int h, w;
};

// Pixels `kCount * tile` and following of an output map, in row-major order. No 64-bit division is needed, because a
// map has at most 3 * 2^24 columns: kCount tile = kCount (tile / Wo) Wo + kCount (tile % Wo).
template <int kCount>
struct TilePixels {
  static_assert(kCount <= 64);
  unsigned columns, row, rest;
  int64_t count;  // of the pixels from the first one to the end of the map

  __device__ TilePixels(const DeformConvSizes& z, unsigned tile)
      : columns(static_cast<unsigned>(z.Wo)),
        row(tile / columns * kCount),
        rest(tile % columns * kCount),
        count(z.Ho * z.Wo - int64_t{tile} * kCount) {}

  __device__ __forceinline__ OutputPixel at(int i) const {
    const unsigned down = (rest + i) / columns;
    return {static_cast<int>(row + down), static_cast<int>(rest + i - down * columns)};
  }
};

// The position of a sample on the input map.
template <class Compute>
struct TapPosition {
  Compute y, x;

  template <class T>
  __device__ TapPosition(const DeformConvArgs<T>& a, int64_t n, int g, int t, OutputPixel pixel) {
    const int kw = static_cast<int>(a.kw), i = t / kw, j = t - i * kw;
    const Compute* offset = a.offset.at(n, 2 * (g * a.taps + t), pixel.h, pixel.w);
    // These fit in 32 bits, see kMaxDeformSize.
    const int row = pixel.h * int(a.stride_h) - int(a.padding_h) + i * int(a.dilation_h);
    const int column = pixel.w * int(a.stride_w) - int(a.padding_w) + j * int(a.dilation_w);
    y = static_cast<Compute>(row) + offset[0];
    x = static_cast<Compute>(column) + offset[a.offset.c_stride];
  }
};

// Returns the mask of a sample, or 1 if there is no mask.
template <class T>
__device__ __forceinline__ ComputeType<T> mask_of(const DeformConvArgs<T>& a, int64_t n, int g, int t,
                                                  OutputPixel pixel) {
  return a.mask.data != nullptr ? *a.mask.at(n, g * a.taps + t, pixel.h, pixel.w) : ComputeType<T>(1);
}

// The pixels of a sample on one axis. A pixel outside of the axis is replaced by the other pixel, and both have half of
// the weight. Hence all pixels of a sample can be read without predicates. If both are outside, the sample is not
// active and its weights are 0.
template <class Compute>
struct ClampedAxis {
  int first, step;  // the pixels are `first` and first + step
  bool active;
  Compute weights[2];

  __device__ explicit ClampedAxis(const AxisSample<Compute>& s) {
    const bool both = s.valid(0) && s.valid(1);
    const Compute half = (s.weights[0] + s.weights[1]) / 2;
    active = s.valid(0) || s.valid(1);
    first = active && !s.valid(0) ? s.first + 1 : s.first;
    step = both;
    weights[0] = both ? s.weights[0] : half;
    weights[1] = both ? s.weights[1] : half;
  }
};

// A sample as it is kept in shared memory. `row` and `column` are those of the top left pixel, which are less than
// kMaxDeformSize = 2^24, and flags in the upper bits.
template <class Compute>
struct alignas(8) TapSample {
  static constexpr int kStep = 1 << 24;    // the other row or column differs from the first
  static constexpr int kActive = 1 << 25;  // in `row` only

  int row, column;
  Compute weights[4];  // times the mask
};

// Returns sample (n, g, t, pixel). A sample that is not active has weights of 0, or NaN if its mask is not finite.
template <class T>
__device__ inline TapSample<ComputeType<T>> tap_sample(const DeformConvArgs<T>& a, int64_t n, int g, int t,
                                                       OutputPixel pixel) {
  using Compute = ComputeType<T>;
  using Sample = TapSample<Compute>;
  const TapPosition<Compute> position(a, n, g, t, pixel);
  const Compute mask = mask_of(a, n, g, t, pixel);
  const ClampedAxis<Compute> y(AxisSample<Compute>(position.y, static_cast<int>(a.H)));
  const ClampedAxis<Compute> x(AxisSample<Compute>(position.x, static_cast<int>(a.W)));
  const bool active = y.active && x.active;
  Sample s;
  s.row = active ? y.first | y.step * Sample::kStep | Sample::kActive : 0;
  s.column = active ? x.first | x.step * Sample::kStep : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) s.weights[i] = mask * (active ? y.weights[i / 2] * x.weights[i % 2] : 0);
  return s;
}

// The addresses of the four pixels of a sample in one channel of a map.
template <class Element>
struct Corners {
  Element* p[4];

  template <class Compute>
  __device__ __forceinline__ Corners(const Map<Element>& map, Element* channel, const TapSample<Compute>& s) {
    using Sample = TapSample<Compute>;
    const int row = s.row & (Sample::kStep - 1), column = s.column & (Sample::kStep - 1);
    const int64_t down = s.row & Sample::kStep ? map.h_stride : 0, right = s.column & Sample::kStep ? map.w_stride : 0;
    p[0] = channel + row * map.h_stride + column * map.w_stride;
    p[1] = p[0] + right;
    p[2] = p[0] + down;
    p[3] = p[2] + right;
  }

  __device__ __forceinline__ void advance(int64_t elements) {
#pragma unroll
    for (auto& corner : p) corner += elements;
  }
};

// Sets x to the values of a sample in the first `count` of V channels, and to zeros in the others. If kPacks, a channel
// is adjacent to the next, and count is V or at most 0.
template <bool kPacks, class T>
__device__ __forceinline__ void sample_channels(Corners<const T> corners, const TapSample<ComputeType<T>>& s,
                                                int64_t c_stride, int count, ComputeType<T> (&x)[kPieceSize<T>]) {
  constexpr int V = kPieceSize<T>;
  using Compute = ComputeType<T>;
  const bool active = s.row & TapSample<Compute>::kActive;
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = v < count ? s.weights[0] : Compute(0);
  if constexpr (kPacks) {
    if (!active || count <= 0) return;
    Pack<T, V> packs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) packs[i] = load_pack<T, V>(corners.p[i]);
    Compute y[4][V];
#pragma unroll
    for (int i = 0; i < 4; ++i) to_compute(packs[i], y[i]);
#pragma unroll
    for (int v = 0; v < V; ++v)
      x[v] = s.weights[0] * y[0][v] + s.weights[1] * y[1][v] + s.weights[2] * y[2][v] + s.weights[3] * y[3][v];
  } else {
    if (!active) return;
    const auto sum = [&] {
      Compute result = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) result += s.weights[i] * static_cast<Compute>(load_pack<T, 1>(corners.p[i]).x[0]);
      corners.advance(c_stride);
      return result;
    };
    if (count >= V) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = sum();
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (v < count) x[v] = sum();
    }
  }
}

// ---- Weights ----

template <class T>
struct DeformConvParams {
  DeformConvArgs<T> a;
  const T* weight;                  // the output of arrange_weight(): [taps,weight_chunks,weight_rows,weight_width]
  int64_t weight_stride;            // distance between chunks: weight_rows weight_width < 2^32
  int weight_chunks, weight_width;  // chunks per tap, and elements of a row, at most the depth
  unsigned pixel_tiles;             // tiles of output pixels per image
  unsigned output_tiles;            // tiles of output channels per group
  bool grad_packs;                  // whether the gradient of the output is channels_last with whole pieces
};

// Begins to copy kRowPieces pieces of rows of a chunk of weights: those beginning with `first`, of which `count` exist.
// Sets the other rows, and elements that do not exist, to zero.
template <int kRows, int kRowPieces, class T>
__device__ __forceinline__ void copy_weights(const DeformConvParams<T>& p, int t, int chunk, int first, int count,
                                             T* to) {
  constexpr int V = kPieceSize<T>;
  const unsigned thread = opaque_thread(), piece = thread % kRowPieces, row = thread / kRowPieces;
  const bool has_piece = static_cast<int>(piece) * V < p.weight_width;
  const T* from = p.weight + (t * p.weight_chunks + chunk) * p.weight_stride +
                  static_cast<unsigned>((first + row) * p.weight_width + piece * V);
#pragma unroll
  for (int i = 0; i < ceil_div(kRows * kRowPieces, kThreads); ++i) {
    const int other = row + kThreads / kRowPieces * i;
    if (kRows * kRowPieces < kThreads && other >= kRows) break;
    copy_async(to + piece_at(other, piece) * V, from + kThreads / kRowPieces * i * p.weight_width,
               other < count && has_piece);
  }
}

// ---- Host side ----

// Returns whether the channels of each pixel are whole and aligned pieces of T.
template <class T, class Element>
bool has_packs(const Map<Element>& map, int64_t channels) {
  constexpr int V = kPieceSize<T>;
  return map.c_stride == 1 && channels % V == 0 && reinterpret_cast<uintptr_t>(map.data) % 16 == 0 &&
         map.n_stride % V == 0 && map.h_stride % V == 0 && map.w_stride % V == 0;
}

// Returns whether every range of channels that belong to one group and one offset group consists of whole pieces.
template <class T>
bool has_whole_segments(const DeformConvSizes& z) {
  return z.group_inputs % kPieceSize<T> == 0 && z.offset_channels % kPieceSize<T> == 0;
}

// Makes the channels of each pixel of a.input whole pieces, if the sizes allow it, and returns the tensor to which it
// then refers: the input, or a channels_last copy. Kernels that sample an input whose pixels are adjacent instead read
// up to 32 lines of the cache per load, and they sample each channel several times.
template <class T>
Tensor sampled_input(const DeformConv& d, DeformConvArgs<T>& a) {
  if (has_packs<T>(a.input, d.C) || d.C % kPieceSize<T> != 0 || !has_whole_segments<T>(d)) return d.input;
  Tensor copy = torch::stable::empty(d.input.sizes(), d.input.scalar_type(), std::nullopt, d.input.device(),
                                     std::nullopt, memory_format(true));
  torch::stable::copy_(copy, d.input);
  a.input = map_of<const T>(copy);
  return copy;
}

// Copies the weight into chunks of kSampleDepth<T> elements, or kDepth<T> if by_input. The rows are the output
// channels, or the input channels if by_input, and the elements of a row are the other channels of its group. If the
// rows are output channels, every offset group begins a new chunk. Rounds float32 to TF32 if allow_tf32. Sets the
// members of p that describe the copy. This function is defined in cuda_weight.cu.
template <class T>
Tensor arrange_weight(const DeformConv& d, DeformConvParams<T>& p, bool by_input, bool allow_tf32, cudaStream_t stream);

// Raises an error if the kernels, which count channels and taps in 32 bits, do not support the sizes.
inline void check_sizes(const DeformConvSizes& z) {
  constexpr int64_t kLimit = 1 << 30;
  STD_TORCH_CHECK(z.C < kLimit && z.Co < kLimit && z.G * z.taps < kLimit, DeformConv::op,
                  ": the input has too many channels or the kernel has too many taps");
}

// A part of the gradient of the samples of one image: all taps, some tiles of pixels, and some channels. The channels
// belong to one offset group. Sample (tap, pixel) has row tap * kTilePixels * tiles + pixel of `data`, where pixels are
// counted from the first tile.
template <class Compute>
struct GradSamples {
  Compute* data;
  int64_t n, width;  // image, and length of a row
  int first, end;    // channels
  unsigned first_tile, tiles;
};

// The parts of the backward pass. These functions are defined in the files cuda_backward*.cu.

// Adds to the gradients of input, offset and mask that are needed. The order in which it adds to the gradient of the
// input differs from run to run.
template <class T>
void deform_conv_grad_samples(const DeformConv& d, const DeformConvArgs<T>& a, bool allow_tf32, cudaStream_t stream);

// Writes a part of the gradient of the samples, before masks are applied. p has a weight that is arranged by input.
template <class T>
void store_grad_samples(const DeformConvParams<T>& p, const GradSamples<ComputeType<T>>& part, bool allow_tf32,
                        cudaStream_t stream);

// Adds to the gradient of the input in a fixed order.
template <class T>
void deform_conv_grad_input_deterministic(const DeformConv& d, const DeformConvArgs<T>& a, bool allow_tf32,
                                          cudaStream_t stream);

template <class T>
void deform_conv_grad_weight(const DeformConv& d, const DeformConvArgs<T>& a, bool allow_tf32, cudaStream_t stream);

}  // namespace relops
