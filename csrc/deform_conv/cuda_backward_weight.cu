// deform_conv2d on CUDA: the gradient of the weight.
//
// A block computes the gradient of one tap for up to 128 output and 64 input channels of one group: the product of the
// gradient of the output and the transposed samples, summed over a range of output pixels of all images. Chunks are
// filled and multiplied as in the forward pass. Here, a row of a chunk has consecutive pixels of one channel, so what
// is loaded channel by channel is transposed on the way to shared memory. The samples of kTablePixels pixels are
// computed ahead. A second kernel adds the sums of the ranges in a fixed order. Products on tensor cores limit the
// speed.

#include "deform_conv/cuda.cuh"

namespace relops {

namespace {

constexpr int kTablePixels = 128;
// The pixels are divided into ranges so that there are about kTargetBlocks blocks. There are at most kMaxRanges ranges,
// because each needs memory of the size of the weight.
constexpr int kTargetBlocks = 256;
constexpr int kMaxRanges = 8;
// The channels of a tile.
template <class T>
constexpr int kTileOutputs = sizeof(T) == 8 ? 64 : 128;
constexpr int kTileInputs = 64;

template <class T>
struct WeightGradParams : DeformConvParams<T> {
  ComputeType<T>* partials;                     // [ranges,taps,C,group_outputs]
  unsigned ranges, input_tiles;                 // ranges of pixels, and tiles of input channels per group
  unsigned image_chunks, chunks, range_chunks;  // chunks of kSampleDepth pixels per image, in all images and per range
  bool grad_rows;  // whether V pixels of a channel of the gradient of the output are adjacent and aligned
};

// What a block computes. It is kept in shared memory, because registers are scarce.
struct WeightBlock {
  int t;
  int first_output, outputs, first_input, inputs;
  unsigned begin, end;  // chunks of pixels
  int64_t partials;     // the index of the partial sum of the first output of the tile and input channel 0

  template <class T>
  __device__ explicit WeightBlock(const WeightGradParams<T>& p) {
    const int group_outputs = static_cast<int>(p.a.group_outputs), group_inputs = static_cast<int>(p.a.group_inputs);
    unsigned block = blockIdx.x;
    const int output = block % p.output_tiles * kTileOutputs<T>;
    block /= p.output_tiles;
    t = block % static_cast<unsigned>(p.a.taps);
    block /= static_cast<unsigned>(p.a.taps);
    const int input = block % p.input_tiles * kTileInputs;
    block /= p.input_tiles;
    const int group = block % static_cast<unsigned>(p.a.groups);
    const unsigned range = block / static_cast<unsigned>(p.a.groups);
    first_output = group * group_outputs + output;
    outputs = min(group_outputs - output, kTileOutputs<T>);
    first_input = group * group_inputs + input;
    inputs = min(group_inputs - input, kTileInputs);
    begin = range * p.range_chunks;
    end = min(begin + p.range_chunks, p.chunks);
    partials = (range * p.a.taps + t) * p.a.C * group_outputs + output;
  }
};

template <class T>
struct WeightTile {
  static constexpr int kOutputs = kTileOutputs<T>, kInputs = kTileInputs;
  using Grid = WarpGrid<kInputs, kOutputs, 2>;

  alignas(16) T grad[2][kOutputs * kDepth<T>];
  T samples[2][kInputs * kDepth<T>];
  TapSample<ComputeType<T>> table[2][kTablePixels];
  int64_t grad_offsets[2][kTablePixels];  // of the pixels of the table in grad_output
  WeightBlock block;
};

// Iterates over the chunks of pixels of a block. The chunks of a table belong to the same image.
template <class T>
struct PixelCursor {
  static constexpr unsigned kTableChunks = kTablePixels / kSampleDepth<T>;
  unsigned chunk;                   // number among those of all images
  unsigned n, in_image;             // image of the table, and its first chunk within the image
  unsigned in_table, table_chunks;  // chunk within the table, and number of chunks of the table, 0 after the end

  __device__ PixelCursor(const WeightBlock& block, unsigned image_chunks)
      : chunk(block.begin), n(chunk / image_chunks), in_image(chunk % image_chunks) {
    start_table(block, image_chunks);
  }
  __device__ void start_table(const WeightBlock& block, unsigned image_chunks) {
    in_table = 0;
    table_chunks = min(min(kTableChunks, image_chunks - in_image), chunk < block.end ? block.end - chunk : 0);
  }
  __device__ bool done() const { return table_chunks == 0; }
  __device__ void next_table(const WeightBlock& block, unsigned image_chunks) {
    chunk += table_chunks - in_table;
    in_image += table_chunks;
    if (in_image >= image_chunks) {
      in_image = 0;
      ++n;
    }
    start_table(block, image_chunks);
  }
  __device__ void next_chunk(const WeightBlock& block, unsigned image_chunks) {
    if (in_table + 1 == table_chunks) return next_table(block, image_chunks);
    ++in_table;
    ++chunk;
  }
};

// Computes the samples of channel c and tap t at the pixels of the table at the cursor, one per thread.
template <class T>
__device__ __forceinline__ void fill_table(const DeformConvArgs<T>& a, const PixelCursor<T>& cursor, int c, int t,
                                           TapSample<ComputeType<T>>* samples, int64_t* grad_offsets) {
  if (threadIdx.x >= cursor.table_chunks * kSampleDepth<T>) return;  // at most kTablePixels
  const int g = c / static_cast<int>(a.offset_channels);
  const TilePixels<kSampleDepth<T>> pixels(a, cursor.in_image);
  const bool exists = threadIdx.x < pixels.count;
  const OutputPixel pixel = pixels.at(threadIdx.x);
  samples[threadIdx.x] = exists ? tap_sample(a, cursor.n, g, t, pixel) : TapSample<ComputeType<T>>{};
  grad_offsets[threadIdx.x] =
      exists ? cursor.n * a.grad_output.n_stride + pixel.h * a.grad_output.h_stride + pixel.w * a.grad_output.w_stride
             : -1;
}

// Where a thread works when it fills kRows rows (channels) of a chunk: piece i of V channels of one pixel. Neighboring
// lanes have neighboring pixels or, if `packs`, neighboring channels.
template <class T, bool kExact, int kRows>
struct TransposedPiece {
  static constexpr int V = kPieceSize<T>, kPerPixel = kRows / V, kPerThread = kPerPixel * kSampleDepth<T> / kThreads;
  int pixel, channel;

  __device__ __forceinline__ TransposedPiece(int i, bool packs) {
    const int index = opaque_thread() + kThreads * i;
    pixel = packs ? index / kPerPixel : index % kSampleDepth<T>;
    channel = (packs ? index % kPerPixel : index / kSampleDepth<T>)*V;
  }
  template <class Value>
  __device__ __forceinline__ void store(const Value (&x)[V], T* chunk) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T value = operand<T, kExact>(x[v]);
      chunk[piece_at(channel + v, pixel / V) * V + pixel % V] = value;
      if constexpr (kSplitsSamples<T> && std::is_same_v<Value, ComputeType<T>>)
        chunk[piece_at(channel + v, pixel / V + kSamplePieces<T>) * V + pixel % V] =
            static_cast<T>(x[v] - static_cast<Value>(value));
    }
  }
};

// Fills rows of output channels with the gradient of the output at the pixels of the chunk at the cursor. The gradient
// is not rounded to TF32 here, because copies cannot do that.
template <int kRows, class T>
__device__ __forceinline__ void fill_grad(const WeightGradParams<T>& p, const int64_t* offsets, int first, int count,
                                          T* chunk) {
  using Piece = TransposedPiece<T, true, kRows>;
  constexpr int V = kPieceSize<T>;
  const Map<const T>& grad = p.a.grad_output;
  if (p.grad_rows) {
    constexpr unsigned kRowPieces = kSamplePieces<T>, kStep = kThreads / kRowPieces;
    const unsigned thread = opaque_thread(), row = thread / kRowPieces, piece = thread % kRowPieces;
    const bool exists = offsets[piece * V] >= 0;
    const T* from = grad.data + offsets[piece * V] + static_cast<int>(first + row) * grad.c_stride;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const unsigned other = row + kStep * i;
      copy_async(chunk + piece_at(other, piece) * V, from + kStep * i * grad.c_stride,
                 exists && static_cast<int>(other) < count);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < Piece::kPerThread; ++i) {
    const Piece piece(i, p.grad_packs);
    const int64_t offset = offsets[piece.pixel];
    const T* from = grad.data + offset + (first + piece.channel) * grad.c_stride;
    Pack<T, V> x;
    if (p.grad_packs) {
      x = load_pack<T, V>(from, offset >= 0 && piece.channel < count);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v, from += grad.c_stride)
        x.x[v] = load_pack<T, 1>(from, offset >= 0 && piece.channel + v < count).x[0];
    }
    piece.store(x.x, chunk);
  }
}

template <bool kExact, bool kPacks, int kRows, class T>
__device__ __forceinline__ void fill_samples(const DeformConvArgs<T>& a, int64_t n,
                                             const TapSample<ComputeType<T>>* table, int first, int count, T* chunk) {
  using Piece = TransposedPiece<T, kExact, kRows>;
  const T* input = a.input.at(n, first, 0);
#pragma unroll 1  // with two pieces at a time, the exact kernels for float32 would lack registers
  for (int i = 0; i < Piece::kPerThread; ++i) {
    const Piece piece(i, kPacks);
    const TapSample<ComputeType<T>> s = table[piece.pixel];
    const Corners<const T> corners(a.input, input + piece.channel * (kPacks ? 1 : a.input.c_stride), s);
    ComputeType<T> x[kPieceSize<T>];
    sample_channels<kPacks, T>(corners, s, a.input.c_stride, count - piece.channel, x);
    piece.store(x, chunk);
  }
}

// Returns the end of the channels, beginning with c, that belong to the same offset group as c.
template <class T>
__device__ __forceinline__ int offset_group_end(const DeformConvArgs<T>& a, int c) {
  const int channels = static_cast<int>(a.offset_channels);
  return c - c % channels + channels;
}

template <class T, bool kExact, bool kPacks>
__global__ __launch_bounds__(kThreads,
                             2) void deform_conv_weight_kernel(const __grid_constant__ WeightGradParams<T> p) {
  using Compute = ComputeType<T>;
  using Tile = WeightTile<T>;
  using Cursor = PixelCursor<T>;
  extern __shared__ __align__(16) char memory[];
  Tile& shared = *reinterpret_cast<Tile*>(memory);
  const DeformConvArgs<T>& a = p.a;
  const WeightBlock& block = shared.block;
  if (threadIdx.x == 0) shared.block = WeightBlock(p);
  __syncthreads();

  // The input channels of the tile are divided into segments, which belong to one offset group each.
#pragma unroll 1
  for (int first = block.first_input, count; first < block.first_input + block.inputs; first += count) {
    count = min(offset_group_end(a, first), block.first_input + block.inputs) - first;
    Sums<T, typename Tile::Grid> sums;
    sums.set_zero();
    Cursor cursor(block, p.image_chunks);
    int table = 0;
    fill_table(a, cursor, first, block.t, shared.table[0], shared.grad_offsets[0]);
    __syncthreads();
#pragma unroll 1
    for (unsigned step = 0;; ++step) {
      const bool fills = !cursor.done();
      if (fills && cursor.in_table == 0) {
        Cursor next = cursor;
        next.next_table(block, p.image_chunks);
        fill_table(a, next, first, block.t, shared.table[table ^ 1], shared.grad_offsets[table ^ 1]);
      }
      const bool fills_first = threadIdx.x < kThreads / 2;
#pragma unroll 1
      for (int phase = 0; phase < 2; ++phase) {
        if ((phase == 0) == fills_first) {
          if (fills) {
            const int pixel = cursor.in_table * kSampleDepth<T>;
            fill_grad<Tile::kOutputs>(p, shared.grad_offsets[table] + pixel, block.first_output, block.outputs,
                                      shared.grad[step % 2]);
            fill_samples<kExact, kPacks, Tile::kInputs>(a, cursor.n, shared.table[table] + pixel, first, count,
                                                        shared.samples[step % 2]);
          }
        } else if (step > 0) {
          sums.template add_products<kExact, true, true, false>(
              shared.samples[(step + 1) % 2], shared.grad[(step + 1) % 2], count, block.outputs, kDepth<T>);
        }
      }
      if (!fills) break;
      wait_for_copies();
      __syncthreads();
      cursor.next_chunk(block, p.image_chunks);
      if (cursor.in_table == 0) table ^= 1;
    }
    sums.for_pairs([&](int row, int column, Pack<Compute, 2> x) {
      Compute* to = p.partials + block.partials + (first + row) * a.group_outputs + column;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (row < count && column + i < block.outputs) to[i] = x.x[i];
    });
    __syncthreads();  // before the next segment overwrites the chunks
  }
}

// Adds up the partial sums [ranges,taps,C,outputs of a group] in a fixed order and writes them as [Co,inputs,taps]. A
// block has one tap and input channel.
template <class T>
__global__ __launch_bounds__(kThreads) void deform_conv_weight_sum_kernel(
    const __grid_constant__ WeightGradParams<T> p) {
  using Compute = ComputeType<T>;
  const unsigned channels = static_cast<unsigned>(p.a.C), c = blockIdx.x % channels, t = blockIdx.x / channels;
  const unsigned inputs = static_cast<unsigned>(p.a.group_inputs), group = c / inputs;
  const int64_t outputs = p.a.group_outputs, size = p.a.taps * p.a.C * outputs;
  const Compute* from = p.partials + blockIdx.x * outputs;
  for (int64_t o = threadIdx.x; o < outputs; o += kThreads) {
    Compute sum = 0;
    for (unsigned range = 0; range < p.ranges; ++range) sum += from[range * size + o];
    p.a.grad_weight[((group * outputs + o) * inputs + c % inputs) * p.a.taps + t] = sum;
  }
}

template <class T, bool kExact, bool kPacks>
void launch_weight(const WeightGradParams<T>& p, unsigned blocks, cudaStream_t stream) {
  using Tile = WeightTile<T>;
  static_assert(sizeof(Tile) <= kSmallestSharedLimit);
  allow_shared_memory<deform_conv_weight_kernel<T, kExact, kPacks>>(sizeof(Tile));
  deform_conv_weight_kernel<T, kExact, kPacks><<<blocks, kThreads, sizeof(Tile), stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

template <class T>
void deform_conv_grad_weight(const DeformConv& d, const DeformConvArgs<T>& a, bool allow_tf32, cudaStream_t stream) {
  using Compute = ComputeType<T>;
  using Tile = WeightTile<T>;
  WeightGradParams<T> p{{a}};
  const Tensor input = sampled_input(d, p.a);
  p.grad_packs = has_packs<T>(a.grad_output, a.group_outputs);
  const Map<const T>& grad = a.grad_output;
  constexpr int V = kPieceSize<T>;
  p.grad_rows = grad.w_stride == 1 && (grad.h_stride == a.Wo || a.Ho == 1) && a.Ho * a.Wo % V == 0 &&
                grad.c_stride % V == 0 && grad.n_stride % V == 0 && reinterpret_cast<uintptr_t>(grad.data) % 16 == 0;
  p.output_tiles = static_cast<unsigned>(ceil_div(a.group_outputs, Tile::kOutputs));
  p.input_tiles = static_cast<unsigned>(ceil_div(a.group_inputs, Tile::kInputs));
  p.image_chunks = grid_size(d.op, ceil_div(a.Ho * a.Wo, kSampleDepth<T>));
  p.chunks = grid_size(d.op, a.N * p.image_chunks);
  const int64_t tiles = a.groups * a.taps * p.output_tiles * p.input_tiles;
  const int64_t ranges = std::clamp<int64_t>(kTargetBlocks / tiles, 1, std::min<int64_t>(kMaxRanges, p.chunks));
  p.range_chunks = static_cast<unsigned>(ceil_div(p.chunks, ranges));
  p.ranges = static_cast<unsigned>(ceil_div(p.chunks, p.range_chunks));
  const unsigned blocks = grid_size(d.op, tiles * p.ranges), rows = grid_size(d.op, a.taps * a.C);
  const Tensor partials = torch::stable::empty({p.ranges * a.taps * a.C * a.group_outputs},
                                               compute_dtype(d.input.scalar_type()), std::nullopt, d.input.device());
  p.partials = static_cast<Compute*>(partials.mutable_data_ptr());
  const bool packs = has_packs<T>(p.a.input, a.C) && has_whole_segments<T>(a);
  dispatch_exact<T>(allow_tf32, [&](auto exact) {
    packs ? launch_weight<T, exact, true>(p, blocks, stream) : launch_weight<T, exact, false>(p, blocks, stream);
  });
  deform_conv_weight_sum_kernel<T><<<rows, kThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

#define RELOPS_INSTANTIATE(T) \
  template void deform_conv_grad_weight(const DeformConv&, const DeformConvArgs<T>&, bool, cudaStream_t);
RELOPS_INSTANTIATE(double)
RELOPS_INSTANTIATE(float)
RELOPS_INSTANTIATE(Half)
RELOPS_INSTANTIATE(BFloat16)
#undef RELOPS_INSTANTIATE

}  // namespace relops
