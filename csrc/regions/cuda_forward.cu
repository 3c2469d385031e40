// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: the forward pass, and the
// registration of both passes.
//
// - NCHW: a block copies a tile of the map with the surrounding pixels to shared memory, for the channels that fill 16
//   bytes, so that each pixel is loaded from L2 about once or twice, whatever number of boxes reads it. Then the block
//   computes the bins that begin in the tile. Each thread computes a bin of all these channels, so it looks up the taps
//   of the bin once for all of them. The kernel is bound by shared memory and by the copies.
// - channels_last: a block processes one region, and a warp computes one bin at a time. Each lane processes 16 bytes of
//   neighboring channels, so every access is coalesced. The kernel is bound by the traffic from L2, because regions
//   overlap and read the map many times.
// - Bins that are larger than what surrounds a tile, position-sensitive ops, and maps with thousands of rows or
// columns:
//   each thread computes one output.

#include "regions/cuda_taps.cuh"
#include "regions/cuda_tiles.cuh"
#include "regions/ops.h"

namespace relops {

namespace {

// Accumulates a pixel into a weighted sum or a maximum. The maximum ignores NaN, as in torchvision.
template <bool kMaximum, class Compute>
__device__ __forceinline__ void accumulate(Compute& result, Compute pixel, Compute weight) {
  if constexpr (kMaximum)
    result = pixel > result ? pixel : result;
  else
    result += pixel * weight;
}

template <bool kMaximum, class Compute>
__device__ __forceinline__ Compute initial_value(bool empty) {
  return kMaximum && !empty ? -static_cast<Compute>(INFINITY) : Compute(0);
}

// ---- Tiles of NCHW maps ----

constexpr int kTileSide = 32;
constexpr int kMaxExtent = 15;  // a bin that spans more rows or columns is not computed from tiles
constexpr int kMaxPairs = 8;    // pairs of taps of a bin that spans kMaxExtent rows or columns
constexpr int kWindowSide = kTileSide + kMaxExtent - 1;
constexpr int kTapBytes = 9 << 10;                  // shared memory for taps
constexpr int kBatchBoxes = 64, kBatchLines = 896;  // limits for what a block computes at a time

// A tap of a bin. `at` is a pixel of the axis or, in shared memory, the offset of its row or column in the window.
template <class Compute>
struct alignas(2 * sizeof(Compute)) RegionTap {
  Compute weight;
  int at;
};

template <class Compute>
using TapPair = Pack<RegionTap<Compute>, 2>;

// The taps of all bins that are computed from tiles, in pairs. If a bin has an odd number of taps, the last tap is
// divided into two taps of half the weight, so that the loops over taps need not handle odd numbers.
template <class Compute>
struct RegionTaps {
  int max_pairs;
  TapPair<Compute>* pairs;     // [K,PH + PW,max_pairs]
  unsigned char* pair_counts;  // [K,PH + PW]
};

// Finds the taps of all boxes that are computed from tiles, with one warp per box.
template <class P>
__global__ __launch_bounds__(kRegionThreads) void region_taps_kernel(
    const __grid_constant__ P p, const __grid_constant__ RegionTaps<typename P::Compute> out) {
  using Compute = typename P::Compute;
  const int lines = p.PH + p.PW;
  const int64_t k = int64_t{blockIdx.x} * kRegionWarps + threadIdx.x / 32;
  if (k >= p.K || p.boxes[k].map < 0 || p.boxes[k].extent > kMaxExtent) return;
  const RegionBox<Compute> box = p.boxes[k];
  const RegionLevel<typename P::T>& level = p.levels[box.map % p.L];
  for (int line = threadIdx.x % 32; line < lines; line += 32) {
    RegionTap<Compute>* taps = out.pairs[(k * lines + line) * out.max_pairs].x;
    int count = 0;
    // Positions ascend, so only the last two pixels may be visited again.
    RegionTap<Compute> second_last{0, -1}, last{0, -1};
    const auto finish = [&](const RegionTap<Compute>& tap) {
      if (tap.at >= 0 && count < 2 * out.max_pairs) taps[count++] = tap;
    };
    const bool is_x = line >= p.PH;
    const int size = is_x ? level.W : level.H;
    for_each_tap(p.spec.kind, p.bins[k * lines + line], is_x ? box.weight_x : box.weight_y, size, 0, size,
                 [&](int pixel, Compute weight) {
                   if (pixel == second_last.at) {
                     second_last.weight += weight;
                   } else if (pixel == last.at) {
                     last.weight += weight;
                   } else {
                     finish(second_last);
                     second_last = last;
                     last = {weight, pixel};
                   }
                 });
    finish(second_last);
    finish(last);
    if (count % 2 != 0) {
      taps[count - 1].weight /= 2;
      taps[count] = taps[count - 1];
    }
    out.pair_counts[k * lines + line] = static_cast<unsigned char>((count + 1) / 2);
  }
}

// The bins of a box that begin in the tile of a block.
struct OwnBins {
  unsigned rows, columns;  // as bits
  int pairs;               // number of pairs of taps of these rows and columns
};

// The outputs of a box that a block computes: rows of `columns` bins from bin (row, column) on. Their numbers begin
// with `begin`.
struct BoxOutputs {
  int begin;
  unsigned char row, column, columns;
};

// Computes the bins that begin in a tile, for groups_per_block groups of V channels.
template <class P, bool kMaximum>
__global__ __launch_bounds__(kRegionThreads, 4) void region_tiles_kernel(
    const __grid_constant__ P p, const __grid_constant__ RegionTiles tiles,
    const __grid_constant__ RegionTaps<typename P::Compute> all_taps, int groups_per_block) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  constexpr int V = 16 / sizeof(T), kPairs = kTapBytes / sizeof(TapPair<Compute>);
  // The taps of the bins of a box must fit.
  constexpr int kBins = sizeof(Compute) == 8 ? 16 : 32;
  static_assert(2 * kBins <= kBatchLines && 2 * kBins * kMaxPairs <= kPairs);
  __shared__ Pack<T, V> window[kWindowSide * kWindowSide];
  __shared__ TapPair<Compute> pairs[kPairs];
  __shared__ unsigned short line_pairs[kBatchLines];  // for each line, 16 * first pair + number of pairs
  __shared__ OwnBins own_bins[kBatchBoxes];
  __shared__ int next_pair[kBatchBoxes];
  __shared__ BoxOutputs outputs[kBatchBoxes];
  __shared__ int box_count, output_count, max_extent;
  __shared__ Tile tile;  // in shared memory, because registers are short
  if (threadIdx.x == 0) tile = tile_of_block<kTileSide>(p, tiles);
  __syncthreads();
  const RegionLevel<T>& level = p.levels[tile.level];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, bins = p.PH * p.PW, lines = p.PH + p.PW;

  // Copies the tile and the pixels below and to the right of it that its bins read.
  const auto load_window = [&](int channel) {
    const int rows = min(kTileSide + max_extent - 1, level.H - tile.top);
    const int columns = min(kTileSide + max_extent - 1, level.W - tile.left);
    const int64_t plane = int64_t{level.H} * level.W;
    const T* pixels[V];  // of this lane, one per channel
#pragma unroll
    for (int v = 0; v < V; ++v)  // beyond the last channel, that channel is copied again
      pixels[v] = level.input + (int64_t{tile.image} * p.channels + min(channel + v, p.channels - 1)) * plane +
                  int64_t{tile.top + warp} * level.W + tile.left + lane;
#pragma unroll 1
    for (int row = warp; row < rows; row += kRegionWarps) {
#pragma unroll
      for (int first = 0; first < kWindowSide; first += 32) {
        if (first + lane >= columns) continue;
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < V; ++v) pack.x[v] = load_pack<T, 1>(pixels[v] + first).x[0];
        window[row * kWindowSide + first + lane] = pack;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) pixels[v] += int64_t{kRegionWarps} * level.W;
    }
  };

  for_each_list(tiles, [&](const int* list, int count) {
    for (int ph = 0; ph < p.PH; ph += kBins)
      for (int pw = 0; pw < p.PW; pw += kBins) {
        // A line is a row or a column of bins.
        const int bin_rows = min(kBins, p.PH - ph), batch_lines = bin_rows + min(kBins, p.PW - pw);
        const int line_bits = 32 - __clz(batch_lines - 1);
        // Calls g(b, line, from, begin, pair_count) for the lines of some boxes that begin in the tile. Line `line` of
        // box b is line `from` of all boxes, and `begin` is the first pixel of the tile on its axis.
        const auto for_each_own_line = [&](const int* batch, int boxes, auto g) {
          for (int i = threadIdx.x; i < boxes << line_bits; i += kRegionThreads) {
            const int b = i >> line_bits, line = i & ((1 << line_bits) - 1);
            if (line >= batch_lines) continue;
            const bool is_x = line >= bin_rows;
            const int bin = is_x ? p.PH + pw + line - bin_rows : ph + line, begin = is_x ? tile.left : tile.top;
            const int64_t from = int64_t{batch[b]} * lines + bin;
            const unsigned own = own_pixel(p.bins[from], is_x ? level.W : level.H) - begin;
            if (own < kTileSide) g(b, line, from, begin, all_taps.pair_counts[from]);
          }
        };
        for (int first = 0; first < count; first += box_count) {
          const int* batch = list + first;
          const int max_boxes = min(min(kBatchLines / batch_lines, kBatchBoxes), count - first);
          if (threadIdx.x < max_boxes) own_bins[threadIdx.x] = {0, 0, 0};
          __syncthreads();
          for_each_own_line(batch, max_boxes, [&](int b, int line, int64_t, int, int pair_count) {
            const bool is_x = line >= bin_rows;
            atomicOr(is_x ? &own_bins[b].columns : &own_bins[b].rows, 1u << (is_x ? line - bin_rows : line));
            atomicAdd(&own_bins[b].pairs, pair_count);
          });
          __syncthreads();
          // The first warp numbers the outputs of as many boxes as have room for their taps.
          if (warp == 0) {
            int pair_end = 0, output_end = 0, extent = 1, fitting = 0;
            for (int half = 0; half < max_boxes; half += 32) {
              const int b = half + lane;
              const OwnBins own = b < max_boxes ? own_bins[b] : OwnBins{0, 0, kPairs + 1};
              const int box_pairs = min(own.pairs, kPairs + 1), last_pair = pair_end + inclusive_sum(box_pairs);
              const bool fits = last_pair <= kPairs;
              const int box_outputs = fits ? __popc(own.rows) * __popc(own.columns) : 0;
              const int last_output = output_end + inclusive_sum(box_outputs);
              fitting += __popc(__ballot_sync(kAll, fits));
              extent = max(extent, group_max(fits ? p.boxes[batch[b]].extent : 1, 32));
              pair_end = __shfl_sync(kAll, last_pair, 31);
              output_end = __shfl_sync(kAll, last_output, 31);
              next_pair[b] = last_pair - box_pairs;
              outputs[b] = {last_output - box_outputs, static_cast<unsigned char>(__ffs(own.rows) - 1),
                            static_cast<unsigned char>(__ffs(own.columns) - 1),
                            static_cast<unsigned char>(__popc(own.columns))};
            }
            if (lane == 0) {
              box_count = fitting;
              output_count = output_end;
              max_extent = extent;
            }
          }
          __syncthreads();
          for_each_own_line(batch, box_count, [&](int b, int line, int64_t from, int begin, int pair_count) {
            const int first_pair = atomicAdd(&next_pair[b], pair_count), stride = line >= bin_rows ? 1 : kWindowSide;
            line_pairs[b * batch_lines + line] = static_cast<unsigned short>(16 * first_pair + pair_count);
            const RegionTap<Compute>* in = all_taps.pairs[from * all_taps.max_pairs].x;
            RegionTap<Compute>* const copies = pairs[first_pair].x;
#pragma unroll 2
            for (int i = 0; i < 2 * pair_count; ++i) {
              const RegionTap<Compute> tap = load_pack<RegionTap<Compute>, 1>(in + i).x[0];
              copies[i] = {tap.weight, (tap.at - begin) * stride};
            }
          });
          __syncthreads();
          for (int group = 0; group < groups_per_block; ++group) {
            const int channel = (blockIdx.y * groups_per_block + group) * V;
            if (channel >= p.channels || output_count == 0) break;
            load_window(channel);
            __syncthreads();
            for (int output = threadIdx.x; output < output_count; output += kRegionThreads) {
              int b = 0;  // the last box whose outputs begin at or before this one
#pragma unroll
              for (int step = kBatchBoxes / 2; step > 0; step /= 2)
                if (b + step < box_count && outputs[b + step].begin <= output) b += step;
              const BoxOutputs own = outputs[b];
              const unsigned within = output - own.begin, row_within = within / own.columns;
              const int row = own.row + row_within, column = own.column + within - row_within * own.columns;
              const int y_line = line_pairs[b * batch_lines + row];
              const int x_line = line_pairs[b * batch_lines + bin_rows + column];
              const int y_count = y_line % 16, x_count = x_line % 16;
              const RegionTap<Compute>* y_taps = pairs[y_line / 16].x;
              const TapPair<Compute>* x_pairs = pairs + x_line / 16;
              Compute result[V];
#pragma unroll
              for (int v = 0; v < V; ++v) result[v] = initial_value<kMaximum, Compute>(y_count == 0 || x_count == 0);
#pragma unroll 1
              for (int i = 0; i < 2 * y_count; ++i) {
                const Compute y_weight = y_taps[i].weight;
                const Pack<T, V>* pixels = window + y_taps[i].at;
#pragma unroll 1
                for (int j = 0; j < x_count; ++j) {
                  const TapPair<Compute> x = x_pairs[j];
#pragma unroll
                  for (int t = 0; t < 2; ++t) {
                    const Pack<T, V> pack = pixels[x.x[t].at];
                    const Compute weight = y_weight * x.x[t].weight;
#pragma unroll
                    for (int v = 0; v < V; ++v)
                      accumulate<kMaximum>(result[v], static_cast<Compute>(pack.x[v]), weight);
                  }
                }
              }
              T* out =
                  p.output + (int64_t{list[first + b]} * p.channels + channel) * bins + (ph + row) * p.PW + pw + column;
#pragma unroll
              for (int v = 0; v < V; ++v)
                if (channel + v < p.channels) out[int64_t{v} * bins] = static_cast<T>(result[v]);
            }
            __syncthreads();
          }
        }
      }
  });
}

// ---- Other kernels ----

// Fills the outputs of a region that this block would compute.
template <class P>
__device__ void fill_region(const P& p, int64_t k, typename P::Compute value) {
  const int64_t size = int64_t{p.out_channels} * p.PH * p.PW;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < size; i += int64_t{gridDim.y} * blockDim.x)
    p.output[k * size + i] = static_cast<typename P::T>(value);
}

// Finds the taps of box k on both axes.
template <class P, class Compute>
__device__ __forceinline__ void find_box_taps(const P& p, int64_t k, const RegionBox<Compute>& box, int H, int W,
                                              MaxTaps max_taps, const SharedTaps<Compute>& y,
                                              const SharedTaps<Compute>& x) {
  const RegionBin<Compute>* bins = p.bins + k * (p.PH + p.PW);
  find_taps(p.PH, max_taps.y, y,
            [&](int bin, auto tap) { for_each_tap(p.spec.kind, bins[bin], box.weight_y, H, 0, H, tap); });
  find_taps(p.PW, max_taps.x, x,
            [&](int bin, auto tap) { for_each_tap(p.spec.kind, bins[p.PH + bin], box.weight_x, W, 0, W, tap); });
}

// Computes the forward pass on channels_last maps. Each lane computes V neighboring channels.
template <class P, bool kMaximum, int V>
__global__ __launch_bounds__(kRegionThreads, 2) void region_pixels_kernel(const __grid_constant__ P p,
                                                                          MaxTaps max_taps) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  extern __shared__ __align__(16) char memory[];
  char* free_memory = memory;
  const int64_t k = blockIdx.x;
  const RegionBox<Compute> box = p.boxes[k];
  if (box.map < 0) return fill_region(p, k, box.map == kNotInBatch ? static_cast<Compute>(NAN) : Compute(0));
  const int image = box.map / p.L;
  const RegionLevel<T>& level = p.levels[box.map - image * p.L];
  const SharedTaps<Compute> y = SharedTaps<Compute>::allocate(free_memory, p.PH, max_taps.y, false);
  const SharedTaps<Compute> x = SharedTaps<Compute>::allocate(free_memory, p.PW, max_taps.x, false);
  find_box_taps(p, k, box, level.H, level.W, max_taps, y, x);
  const int64_t column = p.channels, row = column * level.W;
  const T* origin = level.input + image * row * level.H;
  const int lane = threadIdx.x % 32, bins = p.PH * p.PW;
  for (int bin = blockIdx.y * kRegionWarps + threadIdx.x / 32; bin < bins; bin += gridDim.y * kRegionWarps) {
    const int ph = bin / p.PW, pw = bin - ph * p.PW;
    T* out = p.output + (k * bins + bin) * p.channels;
    const int y_begin = y.begin[ph], y_end = y.begin[ph + 1], x_begin = x.begin[pw], x_end = x.begin[pw + 1];
    for (int c = lane * V; c < p.channels; c += 32 * V) {
      Compute result[V];
#pragma unroll
      for (int v = 0; v < V; ++v) result[v] = initial_value<kMaximum, Compute>(y_begin == y_end || x_begin == x_end);
      for (int i = y_begin; i < y_end; ++i) {
        const T* pixels = origin + y.pixel[i] * row + c;
        const Compute weight = y.weight[i];
#pragma unroll 2
        for (int j = x_begin; j < x_end; ++j) {
          const Pack<T, V> pack = load_pack<T, V>(pixels + x.pixel[j] * column);
          const Compute w = weight * x.weight[j];
#pragma unroll
          for (int v = 0; v < V; ++v) accumulate<kMaximum>(result[v], static_cast<Compute>(pack.x[v]), w);
        }
      }
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.x[v] = static_cast<T>(result[v]);
      store_pack(out + c, pack);
    }
  }
}

// Computes one output per thread and step, for both layouts. If kStaged, the taps of the box are in shared memory;
// otherwise, every thread finds the taps of its outputs. The outputs of boxes that region_tiles_kernel computes are
// left out if `without_tiled` is true.
template <class P, bool kMaximum, bool kStaged>
__global__ __launch_bounds__(kRegionThreads, 2) void region_outputs_kernel(const __grid_constant__ P p,
                                                                           MaxTaps max_taps, bool channels_last,
                                                                           bool without_tiled) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  extern __shared__ __align__(16) char memory[];
  char* free_memory = memory;
  const int64_t k = blockIdx.x;
  const RegionBox<Compute> box = p.boxes[k];
  if (box.map < 0) return fill_region(p, k, box.map == kNotInBatch ? static_cast<Compute>(NAN) : Compute(0));
  if (without_tiled && box.extent <= kMaxExtent) return;
  const int image = box.map / p.L;
  const RegionLevel<T>& level = p.levels[box.map - image * p.L];
  SharedTaps<Compute> y{}, x{};
  if constexpr (kStaged) {
    y = SharedTaps<Compute>::allocate(free_memory, p.PH, max_taps.y, false);
    x = SharedTaps<Compute>::allocate(free_memory, p.PW, max_taps.x, false);
    find_box_taps(p, k, box, level.H, level.W, max_taps, y, x);
  }
  const int64_t plane = int64_t{level.H} * level.W, row_stride = int64_t{level.W} * (channels_last ? p.channels : 1);
  const int64_t column_stride = channels_last ? p.channels : 1, channel_stride = channels_last ? 1 : plane;
  const int bins = p.PH * p.PW, outputs = bins * p.out_channels;
  const T* origin = level.input + image * p.channels * plane;
  for (int i = blockIdx.y * kRegionThreads + threadIdx.x; i < outputs; i += gridDim.y * kRegionThreads) {
    const int out_channel = channels_last ? i % p.out_channels : i / bins;
    const int bin = channels_last ? i / p.out_channels : i - out_channel * bins;
    const int ph = bin / p.PW, pw = bin - ph * p.PW;
    const int64_t channel = p.spec.position_sensitive ? int64_t{out_channel} * bins + bin : out_channel;
    const T* pixels = origin + channel * channel_stride;
    Compute result;
    const auto add = [&](int row, int column, Compute weight) {
      accumulate<kMaximum>(result, static_cast<Compute>(pixels[row * row_stride + column * column_stride]), weight);
    };
    if constexpr (kStaged) {
      const int y_end = y.begin[ph + 1], x_begin = x.begin[pw], x_end = x.begin[pw + 1];
      result = initial_value<kMaximum, Compute>(y.begin[ph] == y_end || x_begin == x_end);
      for (int a = y.begin[ph]; a < y_end; ++a)
        for (int b = x_begin; b < x_end; ++b) add(y.pixel[a], x.pixel[b], y.weight[a] * x.weight[b]);
    } else {
      const RegionBin<Compute> y_bin = p.bins[k * (p.PH + p.PW) + ph], x_bin = p.bins[k * (p.PH + p.PW) + p.PH + pw];
      result = initial_value<kMaximum, Compute>(y_bin.count == 0 || x_bin.count == 0);
      for_each_tap(p.spec.kind, y_bin, box.weight_y, level.H, 0, level.H, [&](int row, Compute y_weight) {
        for_each_tap(p.spec.kind, x_bin, box.weight_x, level.W, 0, level.W,
                     [&](int column, Compute x_weight) { add(row, column, y_weight * x_weight); });
      });
    }
    p.output[k * outputs + i] = static_cast<T>(result);
  }
}

// ---- Host side ----

template <class P, bool kMaximum>
void launch_outputs(const RegionProblem& problem, const P& p, bool without_tiled, cudaStream_t stream) {
  const int64_t outputs = problem.PH * problem.PW * p.out_channels;
  STD_TORCH_CHECK(outputs < 1 << 30, problem.spec.op, ": a box must have fewer than 2^30 outputs, got ", outputs);
  const MaxTaps taps = max_taps(problem);
  const size_t bytes = taps.bytes<typename P::Compute>(p.PH, p.PW, false);
  const dim3 grid(grid_size(problem.spec.op, problem.K),
                  blocks_per_region(problem.K, ceil_div(outputs, kRegionThreads)));
  if (bytes <= kSharedBytes)
    region_outputs_kernel<P, kMaximum, true>
        <<<grid, kRegionThreads, bytes, stream>>>(p, taps, problem.channels_last, without_tiled);
  else
    region_outputs_kernel<P, kMaximum, false>
        <<<grid, kRegionThreads, 0, stream>>>(p, taps, problem.channels_last, without_tiled);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class P, bool kMaximum>
void launch_tiles(const RegionProblem& problem, const P& p, cudaStream_t stream) {
  using Compute = typename P::Compute;
  constexpr int V = 16 / sizeof(typename P::T);
  RegionTiles tiles{};
  const Tensor tile_memory =
      find_tiles<kTileSide>(problem, p, kMaxExtent, [](const auto&) { return true; }, tiles, stream);
  const int64_t groups = ceil_div(p.channels, V);
  STD_TORCH_CHECK(groups <= 65535, problem.spec.op, ": too many channels for one launch (", p.channels, ")");
  if (tiles.total > 0) {
    RegionTaps<Compute> taps{};
    const bool few_samples = p.spec.kind == RegionKind::kSampled && p.spec.sampling_ratio > 0;
    taps.max_pairs = few_samples ? std::min(p.spec.sampling_ratio, kMaxPairs) : kMaxPairs;
    const int64_t lines = p.K * (int64_t{p.PH} + p.PW), pairs = lines * taps.max_pairs;
    const Tensor tap_memory = torch::stable::new_empty(
        problem.boxes, {pairs * static_cast<int64_t>(sizeof(TapPair<Compute>)) + lines}, ScalarType::Byte);
    taps.pairs = static_cast<TapPair<Compute>*>(tap_memory.mutable_data_ptr());
    taps.pair_counts = reinterpret_cast<unsigned char*>(taps.pairs + pairs);
    const unsigned blocks = grid_size(problem.spec.op, ceil_div(p.K, kRegionWarps));
    region_taps_kernel<P><<<blocks, kRegionThreads, 0, stream>>>(p, taps);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    // More groups per block share the taps, but a launch must have enough blocks for all multiprocessors.
    constexpr int64_t kBlocks = 2048, kMaxGroups = 4;
    const int64_t groups_per_block = std::clamp<int64_t>(tiles.total * groups / kBlocks, 1, kMaxGroups);
    const dim3 grid(tiles.total, static_cast<unsigned>(ceil_div(groups, groups_per_block)));
    region_tiles_kernel<P, kMaximum>
        <<<grid, kRegionThreads, 0, stream>>>(p, tiles, taps, static_cast<int>(groups_per_block));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  launch_outputs<P, kMaximum>(problem, p, true, stream);
}

template <class P, bool kMaximum>
void launch_forward(const RegionProblem& problem, const P& p, cudaStream_t stream) {
  using T = typename P::T;
  constexpr int V = 16 / sizeof(T);
  const MaxTaps taps = max_taps(problem);
  const size_t bytes = taps.bytes<typename P::Compute>(p.PH, p.PW, false);
  if (p.spec.position_sensitive || (problem.channels_last && bytes > kSharedBytes))
    return launch_outputs<P, kMaximum>(problem, p, false, stream);
  if (!problem.channels_last) return launch_tiles<P, kMaximum>(problem, p, stream);
  const dim3 grid(grid_size(problem.spec.op, problem.K),
                  blocks_per_region(problem.K, ceil_div(problem.PH * problem.PW, kRegionWarps)));
  bool aligned = p.channels % V == 0 && reinterpret_cast<uintptr_t>(p.output) % 16 == 0;
  for (int l = 0; l < p.L; ++l) aligned = aligned && reinterpret_cast<uintptr_t>(p.levels[l].input) % 16 == 0;
  if (aligned)
    region_pixels_kernel<P, kMaximum, V><<<grid, kRegionThreads, bytes, stream>>>(p, taps);
  else
    region_pixels_kernel<P, kMaximum, 1><<<grid, kRegionThreads, bytes, stream>>>(p, taps);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor forward(const RegionProblem& p) {
  const torch::stable::accelerator::DeviceGuard guard(p.boxes.get_device_index());
  Tensor output = p.new_empty({p.K, p.out_channels(), p.PH, p.PW});
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(p.boxes.get_device_index());
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionParams<T> a = make_region_params<T>(p);
    a.output = static_cast<T*>(output.mutable_data_ptr());
    const Tensor description = describe_boxes(p, a, stream);
    if (p.spec.kind == RegionKind::kMaximum)
      launch_forward<RegionParams<T>, true>(p, a, stream);
    else
      launch_forward<RegionParams<T>, false>(p, a, stream);
  });
  return output;
}

void backward(const RegionProblem& p, const Tensor& grad_output, const Tensor* output, const Tensor* grad_boxes) {
  const torch::stable::accelerator::DeviceGuard guard(p.boxes.get_device_index());
  const cudaStream_t stream = current_stream(p.boxes.get_device_index());
  region_backward_input(p, grad_output, output, stream);
  if (grad_boxes != nullptr && p.K > 0) region_backward_boxes(p, grad_output, *grad_boxes, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_regions<&forward, &backward>(m); }

}  // namespace relops
