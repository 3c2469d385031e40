// roi_pool on the CPU: the backward pass, and the forward pass on NCHW maps if the regions read little of a map.
// (Otherwise, the forward pass is in cpu_slices.h.)
//
// The forward pass saves no indices. The backward pass finds the first maximum of a bin again by comparing pixels with
// the output.
#ifndef RELOPS_REGIONS_MAXIMUM
#define RELOPS_REGIONS_MAXIMUM

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"
#include "regions/cpu_maps.h"
#include "regions/cpu_tiles.h"

namespace relops::RELOPS_ISA {

namespace {

// Returns the largest s with 2^s <= n, for n > 0.
inline int64_t floor_log2(int64_t n) { return 63 - __builtin_clzll(static_cast<uint64_t>(n)); }

// Two runs of 2^s columns, which may overlap, cover all columns of a bin, so the maximum of the bin is the larger of
// the maxima of these runs. The kernel first computes, for each s and each column, the maximum of the run of 2^s
// columns that begins at this column. The maximum of a longer run is computed from the maxima of its two halves. Then
// each bin gathers two maxima.
template <class T>
void maximum_forward_planes(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const PlaneItems<T> items(a, kChannelBlock, threads, true);
  const int64_t doublings = a.max_taps_x > 0 ? floor_log2(a.max_taps_x) : 0;
  const int64_t row_values = (doublings + 1) * (round_up(a.max_columns, V) + V);
  const TileSize size(a.PH, a.PW, row_values, 0);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* runs =
        scratch->template allocate<Compute>(size.PH * row_values + round_up<int64_t>(1 << doublings, V) + V);
    auto* first_index = scratch->template allocate<Int<Compute>>(round_up(size.bins(), V));
    auto* second_index = scratch->template allocate<Int<Compute>>(round_up(size.bins(), V));
    int64_t* offsets = scratch->template allocate<int64_t>(size.PH * a.max_taps_y);
    return [&, scratch, runs, first_index, second_index, offsets](int64_t i) {
      const auto item = items.at(i);
      const Map<T>& map = item.map;
      const int64_t plane = map.H * map.W;
      const T* tensor_end = map.input + a.N * a.channels * plane;
      for (const Region<Compute>& r : item.regions)
        for_each_tile(r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const auto& [y, x, PH, PW, first_bin] = tile;
          const Columns columns(x.low, x.high, map.W, V);
          const int64_t levels = x.max_taps > 0 ? floor_log2(x.max_taps) : 0, run = PH * columns.width;
          const int64_t bins = PH * PW, zero = (levels + 1) * run;
          row_offsets(y, PH, map.W, offsets);
          for (int64_t o = 0; o < round_up(bins, V); ++o) {
            const int64_t ph = o / PW, pw = o % PW;
            first_index[o] = second_index[o] = zero;
            if (o >= bins || y.begin[ph] == y.begin[ph + 1] || x.begin[pw] == x.begin[pw + 1]) continue;
            const int64_t n = x.begin[pw + 1] - x.begin[pw], level = floor_log2(n);
            const int64_t begin = level * run + ph * columns.width + x.pixel[x.begin[pw]] - columns.left;
            first_index[o] = begin;
            second_index[o] = begin + n - (1 << level);
          }
          for (int64_t c = item.channel; c < item.channel_end; ++c) {
            const T* first = map.input + (map.image * a.channels + c) * plane + columns.left;
            for (int64_t ph = 0; ph < PH; ++ph) {
              const int32_t tap = y.begin[ph];
              combine_rows<true>(first, tensor_end, offsets + (tap - y.begin[0]), y.weight + tap, y.begin[ph + 1] - tap,
                                 columns.width, runs + ph * columns.width);
            }
            for (int64_t level = 0; level < levels; ++level) {
              // Runs that reach past the last column have wrong maxima. No bin gathers these maxima, and computing them
              // reads only memory of this thread.
              for (int64_t i = 0; i < run; i += V) {
                const Vec<Compute> left = load(runs + level * run + i);
                const Vec<Compute> right = load(runs + level * run + i + (1 << level));
                store(runs + (level + 1) * run + i, left > right ? left : right);
              }
            }
            store(runs + zero, Vec<Compute>{});
            T* out = a.output + (r.k * a.channels + c) * a.PH * a.PW + first_bin;
            for (int64_t o = 0; o < bins; o += V) {
              const Vec<Compute> first_run = gather(runs, load_int<Compute>(first_index + o));
              const Vec<Compute> second_run = gather(runs, load_int<Compute>(second_index + o));
              const Vec<Compute> maximum = first_run > second_run ? first_run : second_run;
              if (o + V <= bins)
                store(out + o, maximum);
              else
                store_first(out + o, maximum, bins - o);
            }
          }
        });
    };
  });
}

// Finds the maximum of each column over the rows, and the first row with this maximum. The row is -1 if all values of
// the column are -infinity or NaN.
template <class T, class Compute>
inline void first_maxima(const T* first, const T* end, const int64_t* offset, int64_t count, int64_t width,
                         Compute* maxima, Int<Compute>* first_row) {
  const bool safe = count == 0 || first + offset[count - 1] + width <= end;
  for (int64_t i = 0; i < width; i += kLanes<Compute>) {
    Vec<Compute> best = broadcast(-std::numeric_limits<Compute>::infinity());
    VecInt<Compute> best_row = broadcast_int<Compute>(-1);
    for (int64_t t = 0; t < count; ++t) {
      const T* p = first + offset[t] + i;
      const Vec<Compute> read = safe ? load(p) : load_before(p, end);
      const VecInt<Compute> better = read > best;
      best = better ? read : best;
      best_row = better ? broadcast_int<Compute>(t) : best_row;
    }
    store(maxima + i, best);
    store_int<Compute>(first_row + i, best_row);
  }
}

// The gradient of a maximum goes to the first pixel, in row-major order, that is equal to the maximum. This pixel is in
// the column that has the maximum in the earliest row.
template <class T>
void maximum_backward_planes(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t bins = a.PH * a.PW, max_plane = largest_plane(a);
  const TileSize size(a.PH, a.PW, 0, 0);
  const PlaneItems<T> items(a, 1, threads, false);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    GradPlane<T> grad_plane(max_plane, *scratch);
    const int64_t max_width = round_up(a.max_columns, V) + V;
    Compute* maxima = scratch->template allocate<Compute>(max_width + V);
    auto* first_row = scratch->template allocate<Int<Compute>>(max_width + V);
    Compute* pooled = scratch->template allocate<Compute>(size.bins());
    Compute* grads = scratch->template allocate<Compute>(size.bins());
    int64_t* offsets = scratch->template allocate<int64_t>(size.PH * a.max_taps_y);
    return [&, scratch, grad_plane, maxima, first_row, pooled, grads, offsets](int64_t i) mutable {
      const auto item = items.at(i);
      const Map<T>& map = item.map;
      const int64_t c = item.channel;
      if (map.grad_input == nullptr) return;
      const int64_t plane = map.H * map.W;
      const T *origin = map.input + (map.image * a.channels + c) * plane, *end = origin + plane;
      Compute* sum = grad_plane.begin(map.grad_input + (map.image * a.channels + c) * plane, plane);
      for (const Region<Compute>& r : map.regions)
        for_each_tile(r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const auto& [y, x, PH, PW, first_bin] = tile;
          const Columns columns(x.low, x.high, map.W, V);
          row_offsets(y, PH, map.W, offsets);
          convert(a.pooled + (r.k * a.channels + c) * bins + first_bin, pooled, PH * PW);
          convert(a.grad_output + (r.k * a.channels + c) * bins + first_bin, grads, PH * PW);
          for (int64_t ph = 0; ph < PH; ++ph) {
            const int64_t* rows = offsets + (y.begin[ph] - y.begin[0]);
            first_maxima(origin + columns.left, end, rows, y.begin[ph + 1] - y.begin[ph], columns.width, maxima,
                         first_row);
            for (int64_t pw = 0; pw < PW; ++pw) {
              const int64_t count = x.begin[pw + 1] - x.begin[pw], o = ph * PW + pw;
              if (count == 0) continue;
              const int64_t left = x.pixel[x.begin[pw]] - columns.left;
              int64_t row = -1, column = 0;
              for (int64_t i = left; i < left + count; i += V) {
                // Lanes past the end of the bin are ignored.
                unsigned equal = mask_bits<Compute>(load(maxima + i) == pooled[o]);
                if (left + count - i < V) equal &= (1u << (left + count - i)) - 1;
                for (; equal != 0; equal &= equal - 1) {
                  const int64_t index = i + __builtin_ctz(equal);
                  if (first_row[index] >= 0 && (row < 0 || first_row[index] < row)) {
                    row = first_row[index];
                    column = index;
                  }
                }
              }
              if (row >= 0) sum[rows[row] + columns.left + column] += grads[o];
            }
          }
        });
      grad_plane.finish();
    };
  });
}

// Computes the gradient on channels_last maps. A work item is some channels of an entire map. Bands of rows would be
// too slow, because the search for a maximum must begin in the first row of the bin.
template <class T>
void maximum_backward_pixels(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>, kVectors = 4, kBlock = kVectors * V;
  constexpr bool kInPlace = std::is_same_v<T, Compute>;
  const int64_t bins = a.PH * a.PW, blocks = ceil_div(a.channels, kBlock), max_plane = largest_plane(a);
  for_each_item(a.L * a.N * blocks, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* own_sums = scratch->template allocate<Compute>(kInPlace ? 0 : max_plane * std::min(kBlock, a.channels));
    return [&, scratch, own_sums](int64_t item) {
      const Map<T> map(a, item / blocks);
      if (map.grad_input == nullptr) return;
      const int64_t plane = map.H * map.W, channel = item % blocks * kBlock;
      const int64_t n = std::min(kBlock, a.channels - channel), image = map.image * plane * a.channels + channel;
      const T *pixels = map.input + image, *end = map.input + a.N * plane * a.channels;
      T* target = map.grad_input + image;
      Compute* sums = own_sums;
      if constexpr (kInPlace) sums = target;
      const int64_t stride = kInPlace ? a.channels : std::min(kBlock, a.channels);
      for (int64_t pixel = 0; pixel < plane; ++pixel) std::fill_n(sums + pixel * stride, n, Compute(0));
      for (const Region<Compute>& r : map.regions)
        for (int64_t o = 0; o < bins; ++o) {
          const int64_t output = (r.k * bins + o) * a.channels + channel, ph = o / a.PW, pw = o % a.PW;
          for (int64_t c = 0; c < n; c += V) {
            const int64_t count = std::min(V, n - c);
            const Vec<Compute> pooled = load_first(a.pooled + output + c, count);
            // The loops run backward, so `argmax` ends up as the first of several equal pixels.
            VecInt<Compute> argmax = broadcast_int<Compute>(-1);
            for (int32_t y = r.y.begin[ph + 1] - 1; y >= r.y.begin[ph]; --y)
              for (int32_t x = r.x.begin[pw + 1] - 1; x >= r.x.begin[pw]; --x) {
                const int64_t pixel = r.y.pixel[y] * map.W + r.x.pixel[x];
                argmax = load_before(pixels + pixel * a.channels + c, end) == pooled ? broadcast_int<Compute>(pixel)
                                                                                     : argmax;
              }
            argmax = pooled > -std::numeric_limits<Compute>::infinity() ? argmax : broadcast_int<Compute>(-1);
            for (int64_t j = 0; j < count; ++j)
              if (argmax[j] >= 0)
                sums[argmax[j] * stride + c + j] += static_cast<Compute>(a.grad_output[output + c + j]);
          }
        }
      if constexpr (!kInPlace)
        for (int64_t pixel = 0; pixel < plane; ++pixel) convert(sums + pixel * stride, target + pixel * a.channels, n);
    };
  });
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
