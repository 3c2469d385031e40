// roi_align, roi_pool, prroi_pool, multi_scale_roi_align on CUDA: the forward pass on NCHW maps.
//
// A block copies a tile of the map with the surrounding pixels to shared memory, for the channels that fill 16 bytes,
// so that each pixel is loaded from L2 about twice, whatever number of boxes reads it. Then the block computes the bins
// that begin in the tile. A thread computes a bin of all these channels, so it looks up each tap once for all of them.
//
// The kernel is bound by shared memory, where the pixels of different bins are often in the same banks. Its
// instructions take about half as long.

#include "regions/cuda_tiles.cuh"

namespace relops {

namespace {

constexpr int kTileSide = 32;
constexpr int kMaxPairs = (kMaxExtent + 1) / 2;
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
    for_each_weight(p.spec.kind, p.bins[k * lines + line], is_x ? box.weight_x : box.weight_y, size, 0, size,
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
        // Calls g(b, line, is_x, from, begin, pair_count) for the lines of some boxes that begin in the tile. Line
        // `line` of box b is line `from` of all boxes, and `begin` is the first pixel of the tile on its axis.
        const auto for_each_own_line = [&](const int* batch, int boxes, auto g) {
          for (int i = threadIdx.x; i < boxes << line_bits; i += kRegionThreads) {
            const int b = i >> line_bits, line = i & ((1 << line_bits) - 1);
            if (line >= batch_lines) continue;
            const bool is_x = line >= bin_rows;
            const int bin = is_x ? p.PH + pw + line - bin_rows : ph + line, begin = is_x ? tile.left : tile.top;
            const int64_t from = int64_t{batch[b]} * lines + bin;
            const unsigned own = own_pixel(p.bins[from], is_x ? level.W : level.H) - begin;
            if (own < kTileSide) g(b, line, is_x, from, begin, all_taps.pair_counts[from]);
          }
        };
        for (int first = 0; first < count; first += box_count) {
          const int* batch = list + first;
          const int max_boxes = min(min(kBatchLines / batch_lines, kBatchBoxes), count - first);
          if (threadIdx.x < max_boxes) own_bins[threadIdx.x] = {0, 0, 0};
          __syncthreads();
          for_each_own_line(batch, max_boxes, [&](int b, int line, bool is_x, int64_t, int, int pair_count) {
            atomicOr(is_x ? &own_bins[b].columns : &own_bins[b].rows, 1u << (is_x ? line - bin_rows : line));
            atomicAdd(&own_bins[b].pairs, pair_count);
          });
          __syncthreads();
          // The first warp numbers the outputs of as many boxes as have room for their taps.
          if (warp == 0) {
            int pair_end = 0, output_end = 0, extent = 1, fitting = 0;
            for (int half = 0; half < kBatchBoxes; half += 32) {
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
          for_each_own_line(batch, box_count, [&](int b, int line, bool is_x, int64_t from, int begin, int pair_count) {
            const int first_pair = atomicAdd(&next_pair[b], pair_count), stride = is_x ? 1 : kWindowSide;
            line_pairs[b * batch_lines + line] = static_cast<unsigned short>(16 * first_pair + pair_count);
            const RegionTap<Compute>* in = all_taps.pairs[from * all_taps.max_pairs].x;
            RegionTap<Compute>* const copies = pairs->x + 2 * first_pair;
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
                if (outputs[b + step].begin <= output) b += step;
              const BoxOutputs own = outputs[b];
              const unsigned within = output - own.begin, row_within = within / own.columns;
              const int row = own.row + row_within, column = own.column + within - row_within * own.columns;
              const int y_line = line_pairs[b * batch_lines + row];
              const int x_line = line_pairs[b * batch_lines + bin_rows + column];
              const int y_count = y_line % 16, x_count = x_line % 16;
              const RegionTap<Compute>* y_taps = pairs->x + 2 * (y_line / 16);
              const TapPair<Compute>* x_pairs = pairs + x_line / 16;
              Compute result[V];
#pragma unroll
              for (int v = 0; v < V; ++v) result[v] = initial_value<kMaximum, Compute>(y_count == 0 || x_count == 0);
#pragma unroll 1
              for (int j = 0; j < x_count; ++j) {
                const TapPair<Compute> x = x_pairs[j];
#pragma unroll 1
                for (int i = 0; i < 2 * y_count; ++i) {
                  const RegionTap<Compute> y = y_taps[i];
#pragma unroll
                  for (int t = 0; t < 2; ++t) {
                    const Pack<T, V> pack = window[y.at + x.x[t].at];
                    const Compute weight = y.weight * x.x[t].weight;
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
    constexpr int64_t kBlocks = 1024, kMaxGroups = 4;
    const int64_t groups_per_block = std::clamp<int64_t>(tiles.total * groups / kBlocks, 1, kMaxGroups);
    const dim3 grid(tiles.total, static_cast<unsigned>(ceil_div(groups, groups_per_block)));
    region_tiles_kernel<P, kMaximum>
        <<<grid, kRegionThreads, 0, stream>>>(p, tiles, taps, static_cast<int>(groups_per_block));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

template <class T>
void region_forward_tiles(const RegionProblem& problem, const RegionParams<T>& p, cudaStream_t stream) {
  if (p.spec.kind == RegionKind::kMaximum)
    launch_tiles<RegionParams<T>, true>(problem, p, stream);
  else
    launch_tiles<RegionParams<T>, false>(problem, p, stream);
}

template void region_forward_tiles(const RegionProblem&, const RegionParams<double>&, cudaStream_t);
template void region_forward_tiles(const RegionProblem&, const RegionParams<float>&, cudaStream_t);
template void region_forward_tiles(const RegionProblem&, const RegionParams<Half>&, cudaStream_t);
template void region_forward_tiles(const RegionProblem&, const RegionParams<BFloat16>&, cudaStream_t);

}  // namespace relops
