// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: the gradient of the
// feature maps.
//
// The gradient of each pixel is summed by one thread, so the result is bitwise identical in every run. No atomic
// additions are needed, the result need not be set to zero first, and the sums stay in registers, so 16-bit gradients
// are rounded only once.
//
// A block computes a tile of pixels for some channels. It searches all boxes, 256 at a time, for those that reach the
// tile, and processes them in order. For each of these boxes, the block computes the weights of the tile's rows and
// columns in the bins and stores them in shared memory. Then every thread adds the gradients of the outputs, times the
// weights, to its pixels. Only a few bins read a given row or column, so a bit mask stores which bins these are.
//
// - channels_last: a warp computes four neighboring pixels of a row, and each lane computes four neighboring channels.
// - NCHW: neighboring lanes compute neighboring columns, and each thread computes four rows of two channels. The sum
//   over a row of bins is computed once for all rows of pixels that these bins read.
//
// The kernel is bound by latency, because it processes boxes one after another. Running many blocks per multiprocessor
// hides this latency.
//
// roi_pool: the gradient of a maximum goes to one pixel. A first kernel finds this pixel by scanning the bins again and
// stores its index, one integer per output. The gather kernel compares the stored index with the indices of its pixels.

#include "regions/cuda.cuh"

namespace relops {

namespace {

constexpr int kTileRows = 4;
constexpr int kTileBins = 32;       // bins per axis whose weights are in shared memory, one per bit of a mask
constexpr int kThreadPixels = 4;    // pixels per thread; for NCHW, they are a column of the tile
constexpr int kThreadChannels = 2;  // channels per thread; NCHW only
constexpr int kBlockChannels = kThreadChannels * kRegionWarps;  // channels per block; NCHW only

static_assert(kTileRows == kThreadPixels && kRegionWarps == 2 * kTileRows);

template <bool kChannelsLast>
constexpr int kTileColumns = kChannelsLast ? 8 : 32;

// The pixels [top, bottom] x [left, right] of an image on a level.
struct Tile {
  int level, image, top, left, bottom, right;
};

// The part of a tile that a thread sums. For channels_last, it consists of pixels (row, column + i) and channels
// `channel + v`. For NCHW, it consists of pixels (i, column) and channels `channel + v * kRegionWarps`. Rows and
// columns are relative to the top left corner of the tile.
struct ThreadPixels {
  int row, column, channel;
};

// The bins [ph, ph + rows) x [pw, pw + columns) of region k. There are at most kTileBins on each axis.
struct BinBlock {
  int64_t k;
  int ph, pw, rows, columns;
};

// The weights of the rows and columns of a tile in the bins of a BinBlock. They are in shared memory.
template <class Compute, int kColumns>
struct TileWeights {
  Compute y[kTileRows][kTileBins];
  Compute x[kTileBins][kColumns];
  unsigned mask_y[kTileRows], mask_x[kColumns];  // bit b is set if bin b reads this row or column
};

template <class T, bool kChannelsLast>
int64_t tiles_of(const RegionLevel<T>& level, int64_t N) {
  if (level.grad_input == nullptr) return 0;
  return N * ceil_div(level.H, kTileRows) * ceil_div(level.W, kTileColumns<kChannelsLast>);
}

// Returns the tile of this block. Tiles are numbered level by level. A level that needs no gradient has no tiles.
template <int kColumns, class P>
__device__ __forceinline__ Tile tile_of_block(const P& p) {
  int64_t tile = blockIdx.x;
  int l = 0, rows = 0, columns = 0;  // level l has rows x columns tiles per image
  for (;; ++l) {
    rows = (p.levels[l].H + kTileRows - 1) / kTileRows;
    columns = (p.levels[l].W + kColumns - 1) / kColumns;
    const int64_t count = p.levels[l].grad_input == nullptr ? 0 : int64_t{p.N} * rows * columns;
    if (tile < count) break;
    tile -= count;
  }
  const int image = static_cast<int>(tile / (int64_t{rows} * columns));
  const int within = static_cast<int>(tile - int64_t{image} * rows * columns);
  const int top = within / columns * kTileRows, left = within % columns * kColumns;
  return {l, image, top, left, min(top + kTileRows, p.levels[l].H) - 1, min(left + kColumns, p.levels[l].W) - 1};
}

// Returns whether a region may read any of the pixels [low, high] of an axis. The result may be true although the
// region reads none of these pixels.
__device__ inline bool may_reach(const RegionAxis& axis, int low, int high) {
  const double end = axis.start + axis.bins * axis.bin;
  const double region_low = end < axis.start ? end : axis.start, region_high = end < axis.start ? axis.start : end;
  return region_high >= low - 1 && region_low <= high + 1;
}

// Finds the regions in [first, first + kRegionThreads) that may reach a tile. Lists their indices relative to `first`,
// in ascending order, and returns the length of the list. All threads of the block must call this function.
template <class P>
__device__ __forceinline__ int list_regions(const P& p, const Tile& tile, int64_t first, int* list) {
  __shared__ int counts[kRegionWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k = first + threadIdx.x;
  bool reaches = false;
  if (k < p.K) {
    const RegionSource from = region_source(p, k);
    reaches = from.readable() && from.level == tile.level && from.image == tile.image &&
              may_reach(region_axis(p, tile.level, k, false), tile.top, tile.bottom) &&
              may_reach(region_axis(p, tile.level, k, true), tile.left, tile.right);
  }
  const unsigned ballot = __ballot_sync(kAll, reaches);
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  int total = 0, index = __popc(ballot & ((1u << lane) - 1));
  for (int w = 0; w < kRegionWarps; ++w) {
    if (w < warp) index += counts[w];
    total += counts[w];
  }
  if (reaches) list[index] = threadIdx.x;
  __syncthreads();
  return total;
}

// Computes the weights of a tile in a BinBlock. All threads of the CUDA block must call this function. One loop handles
// both axes: with one loop per axis, both axes occupied registers at the same time, and every gather kernel spilled
// registers.
template <class P, class Compute, int kColumns>
__device__ __forceinline__ void find_weights(const P& p, const Tile& tile, const BinBlock& bins,
                                             TileWeights<Compute, kColumns>& weights) {
  if (threadIdx.x < kTileRows) weights.mask_y[threadIdx.x] = 0;
  if (threadIdx.x < kColumns) weights.mask_x[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < bins.rows * kTileRows + bins.columns * kColumns; i += kRegionThreads) {
    const bool is_x = i >= bins.rows * kTileRows;
    const int j = is_x ? i - bins.rows * kTileRows : i, lines = is_x ? kColumns : kTileRows;
    const int bin = j / lines, line = j - bin * lines, pixel = (is_x ? tile.left : tile.top) + line;
    double weight = 0;
    bool reads = false;
    if (pixel <= (is_x ? tile.right : tile.bottom))
      for_each_tap<Compute>(region_axis(p, tile.level, bins.k, is_x), (is_x ? bins.pw : bins.ph) + bin, pixel, pixel,
                            [&](int, double part, double, double) {
                              weight += part;
                              reads = true;
                            });
    *(is_x ? &weights.x[bin][line] : &weights.y[line][bin]) = static_cast<Compute>(weight);
    if (reads) atomicOr(is_x ? &weights.mask_x[line] : &weights.mask_y[line], 1u << bin);
  }
  __syncthreads();
}

// Accumulates the gradient of position-sensitive ops for both layouts. In these ops, only one bin reads a given
// channel.
template <bool kChannelsLast, class P, class Weights, class Compute, int V>
__device__ __forceinline__ void accumulate_sensitive(const P& p, const ThreadPixels& own, const BinBlock& block,
                                                     const Weights& weights, Compute (&sums)[kThreadPixels][V]) {
  const int bins = p.PH * p.PW;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int c = own.channel + (kChannelsLast ? v : v * kRegionWarps);
    const int bin = c % bins, ph = bin / p.PW - block.ph, pw = bin % p.PW - block.pw;
    if (c >= p.channels || ph < 0 || ph >= block.rows || pw < 0 || pw >= block.columns) continue;
    const int64_t from = kChannelsLast ? (block.k * bins + bin) * p.out_channels + c / bins : block.k * p.channels + c;
    const Compute grad = static_cast<Compute>(p.grad_output[from]);
#pragma unroll
    for (int i = 0; i < kThreadPixels; ++i) {
      const int y = kChannelsLast ? own.row : i, x = own.column + (kChannelsLast ? i : 0);
      if (weights.mask_y[y] >> ph & weights.mask_x[x] >> pw & 1)
        sums[i][v] += weights.y[y][ph] * weights.x[pw][x] * grad;
    }
  }
}

// Accumulates the gradient of the other ops on channels_last maps.
template <bool kMaximum, class P, class Weights, class Compute, int V>
__device__ __forceinline__ void accumulate_channels_last(const P& p, const Tile& tile, const ThreadPixels& own,
                                                         const BinBlock& block, const Weights& weights,
                                                         Compute (&sums)[kThreadPixels][V]) {
  using T = typename P::T;
  const int bins = p.PH * p.PW;
  unsigned any_x = 0;
#pragma unroll
  for (int i = 0; i < kThreadPixels; ++i) any_x |= weights.mask_x[own.column + i];
  for (unsigned h = own.channel < p.channels ? weights.mask_y[own.row] : 0; h != 0; h &= h - 1) {
    const int ph = __ffs(h) - 1;
    for (unsigned w = any_x; w != 0; w &= w - 1) {
      const int pw = __ffs(w) - 1;
      const int64_t bin = block.k * bins + (block.ph + ph) * p.PW + block.pw + pw;
      const int64_t from = bin * p.channels + own.channel;
      const Pack<T, V> grad = load_pack<T, V>(p.grad_output + from);
      if constexpr (kMaximum) {
        const Pack<int, V> argmax = load_pack<int, V>(p.argmax + from);
        const int first = (tile.top + own.row) * p.levels[tile.level].W + tile.left + own.column;
#pragma unroll
        for (int i = 0; i < kThreadPixels; ++i)
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (argmax.x[v] == first + i) sums[i][v] += static_cast<Compute>(grad.x[v]);
      } else {
#pragma unroll
        for (int i = 0; i < kThreadPixels; ++i) {
          const Compute weight = weights.y[own.row][ph] * weights.x[pw][own.column + i];
          if (!(weights.mask_x[own.column + i] >> pw & 1)) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) sums[i][v] += weight * static_cast<Compute>(grad.x[v]);
        }
      }
    }
  }
}

// Accumulates the gradient of the other ops on NCHW maps.
template <bool kMaximum, class P, class Weights, class Compute, int V>
__device__ __forceinline__ void accumulate_planes(const P& p, const Tile& tile, const ThreadPixels& own,
                                                  const BinBlock& block, const Weights& weights,
                                                  Compute (&sums)[kThreadPixels][V]) {
  const int bins = p.PH * p.PW;
  unsigned any_y = 0;
#pragma unroll
  for (int i = 0; i < kThreadPixels; ++i) any_y |= weights.mask_y[i];
  for (unsigned h = any_y; h != 0; h &= h - 1) {
    const int ph = __ffs(h) - 1;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = own.channel + v * kRegionWarps;
      if (c >= p.channels) continue;
      const int64_t from = (block.k * p.channels + c) * bins + (block.ph + ph) * p.PW + block.pw;
      if constexpr (kMaximum) {
        for (unsigned w = weights.mask_x[own.column]; w != 0; w &= w - 1) {
          const int pw = __ffs(w) - 1, argmax = p.argmax[from + pw];
#pragma unroll
          for (int i = 0; i < kThreadPixels; ++i)
            if (argmax == (tile.top + i) * p.levels[tile.level].W + tile.left + own.column)
              sums[i][v] += static_cast<Compute>(p.grad_output[from + pw]);
        }
      } else {
        Compute sum = 0;
        for (unsigned w = weights.mask_x[own.column]; w != 0; w &= w - 1) {
          const int pw = __ffs(w) - 1;
          sum += weights.x[pw][own.column] * static_cast<Compute>(p.grad_output[from + pw]);
        }
#pragma unroll
        for (int i = 0; i < kThreadPixels; ++i)
          if (weights.mask_y[i] >> ph & 1) sums[i][v] += weights.y[i][ph] * sum;
      }
    }
  }
}

template <class P, class Compute, int V>
__device__ __forceinline__ void store_channels_last(const P& p, const Tile& tile, const ThreadPixels& own,
                                                    const Compute (&sums)[kThreadPixels][V]) {
  using T = typename P::T;
  const RegionLevel<T>& level = p.levels[tile.level];
  const int row = tile.top + own.row, column = tile.left + own.column;
  if (own.channel >= p.channels || row > tile.bottom) return;
  T* out = level.grad_input + ((int64_t{tile.image} * level.H + row) * level.W + column) * p.channels + own.channel;
#pragma unroll
  for (int i = 0; i < kThreadPixels; ++i) {
    if (column + i > tile.right) return;
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.x[v] = static_cast<T>(sums[i][v]);
    store_pack(out + int64_t{i} * p.channels, pack);
  }
}

template <class P, class Compute, int V>
__device__ __forceinline__ void store_planes(const P& p, const Tile& tile, const ThreadPixels& own,
                                             const Compute (&sums)[kThreadPixels][V]) {
  using T = typename P::T;
  const RegionLevel<T>& level = p.levels[tile.level];
  const int column = tile.left + own.column;
  if (column > tile.right) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int c = own.channel + v * kRegionWarps;
    if (c >= p.channels) return;
    T* out = level.grad_input + ((int64_t{tile.image} * p.channels + c) * level.H + tile.top) * level.W + column;
#pragma unroll
    for (int i = 0; i < kThreadPixels; ++i)
      if (tile.top + i <= tile.bottom) out[int64_t{i} * level.W] = static_cast<T>(sums[i][v]);
  }
}

// The number of blocks of the gather kernel that must fit on a multiprocessor. It limits the number of registers per
// thread.
template <class Compute>
constexpr int kGatherBlocks = sizeof(Compute) == 8 ? 1 : 2;

template <class P, bool kChannelsLast, bool kMaximum, int V>
__global__ __launch_bounds__(kRegionThreads, kGatherBlocks<typename P::Compute>) void region_gather_kernel(
    const __grid_constant__ P p) {
  using Compute = typename P::Compute;
  constexpr int kColumns = kTileColumns<kChannelsLast>;
  __shared__ TileWeights<Compute, kColumns> weights;
  __shared__ int list[kRegionThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Tile tile = tile_of_block<kColumns>(p);
  const ThreadPixels own =
      kChannelsLast ? ThreadPixels{warp / 2, warp % 2 * kThreadPixels, static_cast<int>((blockIdx.y * 32 + lane) * V)}
                    : ThreadPixels{0, lane, static_cast<int>(blockIdx.y * kBlockChannels + warp)};
  Compute sums[kThreadPixels][V];
#pragma unroll
  for (int i = 0; i < kThreadPixels; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) sums[i][v] = 0;

  for (int64_t first = 0; first < p.K; first += kRegionThreads) {
    const int count = list_regions(p, tile, first, list);
    for (int i = 0; i < count; ++i)
      for (int ph = 0; ph < p.PH; ph += kTileBins)
        for (int pw = 0; pw < p.PW; pw += kTileBins) {
          const BinBlock block{first + list[i], ph, pw, min(kTileBins, p.PH - ph), min(kTileBins, p.PW - pw)};
          find_weights(p, tile, block, weights);
          if (p.spec.position_sensitive)
            accumulate_sensitive<kChannelsLast>(p, own, block, weights, sums);
          else if constexpr (kChannelsLast)
            accumulate_channels_last<kMaximum>(p, tile, own, block, weights, sums);
          else
            accumulate_planes<kMaximum>(p, tile, own, block, weights, sums);
          __syncthreads();
        }
  }
  if constexpr (kChannelsLast)
    store_channels_last(p, tile, own, sums);
  else
    store_planes(p, tile, own, sums);
}

// Finds the pixel of each maximum: the first pixel of the bin, in row-major order, that is equal to the maximum. The
// result is -1 if the maximum is -infinity. Each thread processes one output at a time.
template <class P>
__global__ __launch_bounds__(kRegionThreads, 1) void region_argmax_kernel(const __grid_constant__ P p,
                                                                          bool channels_last,
                                                                          const typename P::T* pooled, int* argmax) {
  using Compute = typename P::Compute;
  const int64_t k = blockIdx.x;
  const RegionSource from = region_source(p, k);
  const bool readable = from.readable();
  const RegionAxis y_axis = region_axis(p, from.level, k, false), x_axis = region_axis(p, from.level, k, true);
  const auto& level = p.levels[from.level];
  const int64_t bins = int64_t{p.PH} * p.PW, outputs = bins * p.channels;
  const int64_t plane = int64_t{level.H} * level.W, stride = channels_last ? p.channels : 1;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < outputs; i += int64_t{gridDim.y} * blockDim.x) {
    const int64_t bin = channels_last ? i / p.channels : i % bins, c = channels_last ? i % p.channels : i / bins;
    int pixel = -1;
    if (readable) {
      const PixelRange y = pixel_range<Compute>(y_axis, static_cast<int>(bin / p.PW));
      const PixelRange x = pixel_range<Compute>(x_axis, static_cast<int>(bin % p.PW));
      const Compute maximum = static_cast<Compute>(pooled[k * outputs + i]);
      const auto* origin = level.input + int64_t{from.image} * p.channels * plane + (channels_last ? c : c * plane);
      for (int h = y.begin; h < y.end && pixel < 0 && maximum > -static_cast<Compute>(INFINITY); ++h)
        for (int w = x.begin; w < x.end && pixel < 0; ++w) {
          const int candidate = h * level.W + w;
          if (static_cast<Compute>(origin[candidate * stride]) == maximum) pixel = candidate;
        }
    }
    argmax[k * outputs + i] = pixel;
  }
}

template <class P, bool kMaximum>
void launch_gather(const RegionProblem& problem, const P& p, cudaStream_t stream) {
  using T = typename P::T;
  const char* op = problem.spec.op;
  // Eight 16-bit channels per lane would need more registers than a thread has.
  constexpr int V = std::min<int>(4, 16 / sizeof(T));
  int64_t tiles = 0;
  bool aligned =
      p.channels % V == 0 && !p.spec.position_sensitive && reinterpret_cast<uintptr_t>(p.grad_output) % 16 == 0;
  for (int l = 0; l < p.L; ++l) {
    tiles += problem.channels_last ? tiles_of<T, true>(p.levels[l], p.N) : tiles_of<T, false>(p.levels[l], p.N);
    aligned = aligned && reinterpret_cast<uintptr_t>(p.levels[l].grad_input) % 16 == 0;
  }
  if (tiles == 0 || p.channels == 0) return;
  const auto grid = [&](int64_t channels) {
    const int64_t blocks = ceil_div(p.channels, channels);
    STD_TORCH_CHECK(blocks <= 65535, op, ": too many channels for one launch (", p.channels, ")");
    return dim3(grid_size(op, tiles), static_cast<unsigned>(blocks));
  };
  if (!problem.channels_last)
    region_gather_kernel<P, false, kMaximum, kThreadChannels><<<grid(kBlockChannels), kRegionThreads, 0, stream>>>(p);
  else if (aligned)
    region_gather_kernel<P, true, kMaximum, V><<<grid(32 * V), kRegionThreads, 0, stream>>>(p);
  else
    region_gather_kernel<P, true, kMaximum, 1><<<grid(32), kRegionThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void region_backward_input(const RegionProblem& p, const Tensor& grad_output, const Tensor* output,
                           cudaStream_t stream) {
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionParams<T> a = make_region_params<T>(p);
    a.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    if (p.spec.kind != RegionKind::kMaximum) {
      launch_gather<RegionParams<T>, false>(p, a, stream);
      return;
    }
    check_pixels_fit_int(p);
    const Tensor argmax =
        torch::stable::new_empty(grad_output, {std::max<int64_t>(grad_output.numel(), 4)}, ScalarType::Int);
    a.argmax = static_cast<const int*>(argmax.const_data_ptr());
    if (grad_output.numel() > 0) {
      const unsigned blocks =
          static_cast<unsigned>(std::clamp<int64_t>(ceil_div(p.C * p.PH * p.PW, 4 * kRegionThreads), 1, 65535));
      region_argmax_kernel<RegionParams<T>><<<dim3(grid_size(p.spec.op, p.K), blocks), kRegionThreads, 0, stream>>>(
          a, p.channels_last, static_cast<const T*>(output->const_data_ptr()),
          static_cast<int*>(argmax.mutable_data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    launch_gather<RegionParams<T>, true>(p, a, stream);
  });
}

}  // namespace relops
