// deform_conv2d on CUDA: the forward pass.
//
// A block computes the outputs of 64 pixels of one image and of up to 128 channels of one group. In each step, it fills
// a chunk of samples and weights, which belong to one tap and up to kSampleDepth input channels, and multiplies the
// chunk of the previous step. The first half of the warps fill before they multiply, and the other half multiply first,
// so tensor cores work while samples are loaded. The pixels and weights of all samples of kTableTaps taps are computed
// ahead and kept in shared memory.
//
// Instruction issue limits the speed: a warp takes about 680 instructions per step for float32, of which 96 are
// products on tensor cores, and 555 with TF32. docs/internals/deform_conv.md has the model.

#include "deform_conv/cuda.cuh"

namespace relops {

namespace {

constexpr int kTableTaps = kThreads / kTilePixels;

// What a block computes. It is kept in shared memory, because registers are scarce.
struct ForwardBlock {
  int n, group;
  int first_output, outputs;  // output channels
  int count;                  // pixels
};

// kSmall is a tile for groups with few output channels.
template <class T, bool kSmall>
struct ForwardTile {
  static constexpr int kOutputs = kSmall ? 32 : sizeof(T) == 8 ? 64 : 128;
  using Grid = WarpGrid<kTilePixels, kOutputs, kSmall ? 4 : 2>;

  alignas(16) T samples[2][kTilePixels * kDepth<T>];
  T weights[2][kOutputs * kDepth<T>];
  TapSample<ComputeType<T>> table[2][kTableTaps][kTilePixels];
  OutputPixel pixels[kTilePixels];
  ForwardBlock block;
  int depths[2];  // the number of channels of each chunk
};

// Iterates over the sampled rows of a block: over the segments of its group, which are the ranges of input channels
// that belong to one offset group, over tables of taps, over the channels of the segment in chunks, and over the taps
// of the table. The taps vary fastest, because neighboring taps sample the same pixels, which are then still in L1.
template <int kChannels>
struct ChunkCursor {
  int g, first, end;  // offset group, and channels of the segment
  int t, c;           // tap, and first channel of the chunk
  int first_chunk;    // number of the first chunk of the segment among those of the group and a tap
  int table_t;        // the first tap of the table
  int group_end;      // the end of the channels of the group

  __device__ ChunkCursor(const DeformConvSizes& z, int group)
      : g(group * static_cast<int>(z.group_inputs) / max(static_cast<int>(z.offset_channels), 1)),
        first(group * static_cast<int>(z.group_inputs)),
        t(0),
        c(first),
        first_chunk(0),
        table_t(0),
        group_end(first + static_cast<int>(z.group_inputs)) {
    set_end(z);
  }

  __device__ void set_end(const DeformConvSizes& z) {
    end = min(group_end, (g + 1) * static_cast<int>(z.offset_channels));
  }
  __device__ int chunk() const { return first_chunk + static_cast<int>(static_cast<unsigned>(c - first) / kChannels); }
  __device__ bool done() const { return first >= group_end; }
  __device__ bool at_table_start() const { return t == table_t && c == first; }

  // Continues with the taps of the next table.
  __device__ void next_table(const DeformConvSizes& z) {
    t = table_t += kTableTaps;
    if (t >= static_cast<int>(z.taps)) {
      t = table_t = 0;
      first_chunk += (end - first + kChannels - 1) / kChannels;
      first = end;
      ++g;
      set_end(z);
    }
    c = first;
  }

  __device__ void next_chunk(const DeformConvSizes& z) {
    if (++t < min(table_t + kTableTaps, static_cast<int>(z.taps))) return;
    t = table_t;
    c += kChannels;
    if (c >= end) next_table(z);
  }
};

// Computes the samples of the table at the cursor, one per thread.
template <class T, class Table>
__device__ __forceinline__ void fill_table(const DeformConvArgs<T>& a, int n, const OutputPixel* pixels, int count,
                                           const ChunkCursor<kSampleDepth<T>>& cursor, Table& table) {
  const int i = threadIdx.x % kTilePixels, j = threadIdx.x / kTilePixels;
  if (cursor.done() || cursor.table_t + j >= static_cast<int>(a.taps)) return;
  table[j][i] = i < count ? tap_sample(a, n, cursor.g, cursor.table_t + j, pixels[i]) : TapSample<ComputeType<T>>{};
}

// Fills rows of pixels with the samples of the chunk at the cursor.
template <bool kExact, bool kPacks, class T>
__device__ __forceinline__ void fill_samples(const DeformConvArgs<T>& a, int n,
                                             const ChunkCursor<kSampleDepth<T>>& cursor,
                                             const TapSample<ComputeType<T>>* table, T* samples) {
  using Compute = ComputeType<T>;
  constexpr int V = kPieceSize<T>, kPerThread = kTilePixels * kSamplePieces<T> / kThreads;
  const unsigned thread = opaque_thread();
  const int count = cursor.end - cursor.c;
  const T* input = a.input.at(n, cursor.c, 0);
  const auto fill = [&](unsigned pixel, unsigned piece, const Corners<const T>& corners, const TapSample<Compute>& s) {
    Compute x[V];
    sample_channels<kPacks, T>(corners, s, a.input.c_stride, count - static_cast<int>(piece) * V, x);
    Pack<T, V> pack, rest;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      pack.x[v] = operand<T, kExact>(x[v]);
      if constexpr (kSplitsSamples<T>) rest.x[v] = static_cast<T>(x[v] - static_cast<Compute>(pack.x[v]));
    }
    store_pack<T, V>(samples + piece_at(pixel, piece) * V, pack);
    if constexpr (kSplitsSamples<T>) store_pack<T, V>(samples + piece_at(pixel, piece + kSamplePieces<T>) * V, rest);
  };
  if constexpr (kPacks) {
    const unsigned piece = thread % kSamplePieces<T>;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const unsigned pixel = thread / kSamplePieces<T> + kThreads / kSamplePieces<T> * i;
      const TapSample<Compute> s = table[pixel];
      fill(pixel, piece, Corners<const T>(a.input, input + piece * V, s), s);
    }
  } else {
    constexpr unsigned kStep = kThreads / kTilePixels;
    const unsigned pixel = thread % kTilePixels, piece = thread / kTilePixels;
    const TapSample<Compute> s = table[pixel];
    Corners<const T> corners(a.input, input + static_cast<int>(piece) * V * a.input.c_stride, s);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      fill(pixel, piece + kStep * i, corners, s);
      corners.advance(kStep * V * a.input.c_stride);
    }
  }
}

template <class T, bool kExact, bool kPacks, bool kSmall>
__global__ __launch_bounds__(kThreads,
                             2) void deform_conv_forward_kernel(const __grid_constant__ DeformConvParams<T> p) {
  using Compute = ComputeType<T>;
  using Tile = ForwardTile<T, kSmall>;
  using Cursor = ChunkCursor<kSampleDepth<T>>;
  extern __shared__ __align__(16) char memory[];
  Tile& shared = *reinterpret_cast<Tile*>(memory);
  const DeformConvArgs<T>& a = p.a;
  const ForwardBlock& block = shared.block;
  if (threadIdx.x < kTilePixels) {
    unsigned rest = blockIdx.x;
    const int output = rest % p.output_tiles * Tile::kOutputs;  // varies fastest, to sample the same pixels
    rest /= p.output_tiles;
    const int group = rest % static_cast<unsigned>(a.groups);
    rest /= static_cast<unsigned>(a.groups);
    const TilePixels<kTilePixels> tile(a, rest % p.pixel_tiles);
    shared.pixels[threadIdx.x] = tile.at(threadIdx.x);
    if (threadIdx.x == 0)
      shared.block = {static_cast<int>(rest / p.pixel_tiles), group, group * static_cast<int>(a.group_outputs) + output,
                      min(static_cast<int>(a.group_outputs) - output, Tile::kOutputs),
                      static_cast<int>(min(tile.count, int64_t{kTilePixels}))};
  }
  __syncthreads();

  Sums<T, typename Tile::Grid> sums;
  sums.set_zero();
  Cursor cursor(a, block.group);
  int table = 0;
  fill_table(a, block.n, shared.pixels, block.count, cursor, shared.table[0]);
  __syncthreads();
#pragma unroll 1
  for (unsigned step = 0;; ++step) {
    const bool fills = !cursor.done();
    if (fills) {
      if (cursor.at_table_start()) {
        Cursor next = cursor;
        next.next_table(a);
        fill_table(a, block.n, shared.pixels, block.count, next, shared.table[table ^ 1]);
      }
      if (threadIdx.x == 0) shared.depths[step % 2] = cursor.end - cursor.c;
      copy_weights<Tile::kOutputs, kSamplePieces<T>>(p, cursor.t, cursor.chunk(), block.first_output, block.outputs,
                                                     shared.weights[step % 2]);
    }
    const bool fills_first = threadIdx.x < kThreads / 2;
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if ((phase == 0) == fills_first) {
        if (fills)
          fill_samples<kExact, kPacks>(a, block.n, cursor, shared.table[table][cursor.t - cursor.table_t],
                                       shared.samples[step % 2]);
      } else if (step > 0) {
        sums.template add_products<kExact, true, true, true>(shared.samples[(step + 1) % 2],
                                                             shared.weights[(step + 1) % 2], block.count, block.outputs,
                                                             shared.depths[(step + 1) % 2]);
      }
    }
    if (!fills) break;
    wait_for_copies();
    __syncthreads();
    cursor.next_chunk(a);
    if (cursor.at_table_start()) table ^= 1;
  }

  sums.for_pairs([&](int row, int column, Pack<Compute, 2> x) {
    if (row >= block.count) return;
    const OutputPixel pixel = shared.pixels[row];
    T* output = a.output.at(block.n, block.first_output + column, pixel.h, pixel.w);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (column + i >= block.outputs) break;
      const Compute bias = a.bias != nullptr ? static_cast<Compute>(a.bias[block.first_output + column + i]) : 0;
      output[i * a.output.c_stride] = static_cast<T>(x.x[i] + bias);
    }
  });
}

template <class T, bool kExact, bool kPacks, bool kSmall>
void launch_forward(DeformConvParams<T> p, cudaStream_t stream) {
  using Tile = ForwardTile<T, kSmall>;
  static_assert(sizeof(Tile) <= kSmallestSharedLimit);
  const DeformConvArgs<T>& a = p.a;
  const int64_t pixel_tiles = ceil_div(a.Ho * a.Wo, kTilePixels),
                output_tiles = ceil_div(a.group_outputs, Tile::kOutputs);
  const unsigned blocks = grid_size(DeformConv::op, a.N * a.groups * pixel_tiles * output_tiles);
  p.pixel_tiles = static_cast<unsigned>(pixel_tiles);
  p.output_tiles = static_cast<unsigned>(output_tiles);
  allow_shared_memory<deform_conv_forward_kernel<T, kExact, kPacks, kSmall>>(sizeof(Tile));
  deform_conv_forward_kernel<T, kExact, kPacks, kSmall><<<blocks, kThreads, sizeof(Tile), stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Kernels {
  template <class T>
  static void forward(const DeformConv& d, const DeformConvArgs<T>& a, bool allow_tf32) {
    check_sizes(d);
    const torch::stable::accelerator::DeviceGuard guard(d.input.get_device_index());
    const cudaStream_t stream = current_stream(d.input.get_device_index());
    DeformConvParams<T> p{a};
    const Tensor input = sampled_input(d, p.a);
    std::optional<Tensor> weight;
    if (d.C > 0) weight = arrange_weight(d, p, false, allow_tf32, stream);  // otherwise, the output is the bias
    const bool packs = has_packs<T>(p.a.input, a.C) && has_whole_segments<T>(a);
    dispatch_exact<T>(allow_tf32, [&](auto exact) {
      const auto launch = [&](auto is_small) {
        packs ? launch_forward<T, exact, true, is_small>(p, stream)
              : launch_forward<T, exact, false, is_small>(p, stream);
      };
      a.group_outputs <= ForwardTile<T, true>::kOutputs ? launch(std::true_type{}) : launch(std::false_type{});
    });
  }

  template <class T>
  static void backward(const DeformConv& d, const DeformConvArgs<T>& a, bool allow_tf32, bool deterministic) {
    check_sizes(d);
    const torch::stable::accelerator::DeviceGuard guard(d.input.get_device_index());
    const cudaStream_t stream = current_stream(d.input.get_device_index());
    DeformConvArgs<T> samples = a;
    if (deterministic) samples.grad_input.data = nullptr;
    if (samples.grad_input.data != nullptr || a.grad_offset.data != nullptr || a.grad_mask.data != nullptr)
      deform_conv_grad_samples(d, samples, allow_tf32, stream);
    if (deterministic && a.grad_input.data != nullptr) deform_conv_grad_input_deterministic(d, a, allow_tf32, stream);
    if (a.grad_weight != nullptr) deform_conv_grad_weight(d, a, allow_tf32, stream);
  }
};

}  // namespace

}  // namespace relops

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { relops::register_deform_conv2d<relops::Kernels>(m); }
