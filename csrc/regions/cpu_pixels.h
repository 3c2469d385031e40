// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on the CPU: the forward pass on
// channels_last maps.
//
// A work item is a region. The pixels of a bin are combined one vector of channels at a time.
#ifndef RELOPS_REGIONS_PIXELS
#define RELOPS_REGIONS_PIXELS

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"
#include "regions/cpu_maps.h"

namespace relops::RELOPS_ISA {

namespace {

// A list of the pixels of a bin: their offsets in the map and their weights. If a bin has many pixels, a list holds
// only some of its rows.
template <class Compute>
struct PixelList {
  int64_t max_count;
  int64_t* offset;  // in elements
  Compute* weight;
  int64_t count = 0;

  PixelList(int64_t max_taps_y, int64_t max_taps_x, Scratch& scratch)
      : max_count(std::min(max_taps_y * max_taps_x, std::max<int64_t>(kListSize, max_taps_x))),
        offset(scratch.allocate<int64_t>(max_count)),
        weight(scratch.allocate<Compute>(max_count)) {}

  // Lists the pixels of a bin, which has the y taps [begin, end) and the x taps of bin column pw. Calls f(first, last)
  // after filling each list: `first` is true for the first list of the bin, and `last` is true for its last list. A bin
  // has at least one list. If it has only one list, `first` and `last` are compile-time constants. Pixel 0 of the map
  // has the offset `origin`, and pixels are `stride` elements apart.
  template <class F>
  void visit(const Region<Compute>& r, int32_t begin, int32_t end, int64_t pw, int64_t map_width, int64_t origin,
             int64_t stride, F f) {
    const int32_t x_begin = r.x.begin[pw], x_end = r.x.begin[pw + 1];
    const auto fill = [&](int32_t y, int32_t last) {
      count = 0;
      for (; y < last; ++y)
        for (int32_t x = x_begin; x < x_end; ++x) {
          offset[count] = origin + (r.y.pixel[y] * map_width + r.x.pixel[x]) * stride;
          weight[count++] = r.y.weight[y] * r.x.weight[x];
        }
    };
    if (int64_t{end - begin} * (x_end - x_begin) <= max_count) {
      fill(begin, end);
      f(std::true_type{}, std::true_type{});
      return;
    }
    const int64_t rows = max_count / (x_end - x_begin);
    for (int32_t y = begin, last; y < end; y = last) {
      last = static_cast<int32_t>(std::min<int64_t>(y + rows, end));
      fill(y, last);
      f(y == begin, last == end);
    }
  }

 private:
  static constexpr int64_t kListSize = 2048;
};

// Calls f(c, n) for each block of channels, where c is the first channel of the block and n is its number of vectors.
// The last block is moved back so that it ends at the last channel. If there are too few channels for one vector, the
// function does not call f and returns false.
template <class Compute, int kVectors, class F>
inline bool for_each_channel_block(int64_t channels, F f) {
  constexpr int64_t V = kLanes<Compute>;
  if (channels < V) return false;
  int64_t c = 0;
  for (; c + kVectors * V <= channels; c += kVectors * V) f(c, std::integral_constant<int, kVectors>{});
  for (; c + V <= channels; c += V) f(c, std::integral_constant<int, 1>{});
  if (c < channels) f(channels - V, std::integral_constant<int, 1>{});
  return true;
}

template <class T, bool kMaximum>
void forward_pixels(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t bins = a.PH * a.PW;
  for_each_item(a.K, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    PixelList<Compute> pixels(a.max_taps_y, a.max_taps_x, *scratch);
    // If a bin needs several lists, `previous` holds its results up to the previous list, and `current` holds its
    // results up to the current list.
    const int64_t partial_size = pixels.max_count < a.max_taps_y * a.max_taps_x ? a.out_channels : 0;
    Compute *previous = scratch->template allocate<Compute>(partial_size),
            *current = scratch->template allocate<Compute>(partial_size);
    return [&, scratch, pixels, previous, current](int64_t i) mutable {
      const Region<Compute>& r = a.regions[i];
      const Map<T> map(a, r.map);
      const T* image = map.input + map.image * map.H * map.W * a.channels;
      for (int64_t o = 0; o < bins; ++o) {
        const int64_t ph = o / a.PW;
        T* out = a.output + (r.k * bins + o) * a.out_channels;
        pixels.visit(r, r.y.begin[ph], r.y.begin[ph + 1], o % a.PW, map.W, 0, a.channels, [&](auto first, auto last) {
          const int64_t count = pixels.count;
          const int64_t* const offset = pixels.offset;
          const Compute* const weight = pixels.weight;
          const Compute start = kMaximum && count > 0 ? -std::numeric_limits<Compute>::infinity() : Compute(0);
          const auto one_channel = [&](int64_t c, int64_t channel_offset) {
            Compute result = first ? start : previous[c];
            for (int64_t i = 0; i < count; ++i) {
              const Compute read = static_cast<Compute>(image[offset[i] + channel_offset]);
              accumulate<kMaximum>(result, read, weight[i]);
            }
            if (last)
              out[c] = static_cast<T>(result);
            else
              current[c] = result;
          };
          const bool done =
              !a.position_sensitive && for_each_channel_block<Compute, 4>(a.channels, [&](int64_t c, auto vectors) {
                Vec<Compute> result[vectors.value];
                for (int v = 0; v < vectors.value; ++v)
                  result[v] = first ? broadcast(start) : load(previous + c + v * V);
                for (int64_t i = 0; i < count; ++i) {
                  const T* p = image + offset[i] + c;
                  for (int v = 0; v < vectors.value; ++v) {
                    const Vec<Compute> read = load(p + v * V);
                    accumulate<kMaximum>(result[v], read, weight[i]);
                  }
                }
                for (int v = 0; v < vectors.value; ++v)
                  last ? store(out + c + v * V, result[v]) : store(current + c + v * V, result[v]);
              });
          for (int64_t c = 0; c < a.out_channels && !done; ++c) one_channel(c, a.position_sensitive ? c * bins + o : c);
          if (!last) std::swap(previous, current);
        });
      }
    };
  });
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
