// roi_align, prroi_pool, multi_scale_roi_align, ps_roi_align, ps_roi_pool on the CPU: the gradient of the input,
// computed in bands of rows.
//
// A work item is a band of rows of one map, for some channels. The sums for the band stay in the cache, with one row of
// channels per pixel, while all regions that overlap the band add their gradients. On NCHW maps, gradients are
// transposed in registers when they are read and written. One thread sums an entire band, so the order of summation is
// fixed. (For ps_roi_align and ps_roi_pool on NCHW maps, see cpu_planes.h.)
#ifndef RELOPS_REGIONS_BANDS
#define RELOPS_REGIONS_BANDS

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"
#include "regions/cpu_maps.h"
#include "regions/cpu_pixels.h"

namespace relops::RELOPS_ISA {

namespace {

// Rows [begin, end) of a map.
struct Band {
  int64_t map, begin, end;
};

// Divides the maps that need a gradient into bands that fit in the cache if a pixel has `pixel_bytes` bytes.
template <class T>
std::vector<Band> bands_of(const RegionArgs<T>& a, int64_t pixel_bytes) {
  constexpr int64_t kBandBytes = 512 << 10;
  std::vector<Band> bands;
  for (int64_t m = 0; m < a.L * a.N; ++m) {
    const Map<T> map(a, m);
    if (map.grad_input == nullptr || map.W * pixel_bytes == 0) continue;
    const int64_t rows = std::max<int64_t>(1, kBandBytes / (map.W * pixel_bytes));
    for (int64_t begin = 0; begin < map.H; begin += rows) bands.push_back({m, begin, std::min(begin + rows, map.H)});
  }
  return bands;
}

template <class T>
int64_t max_pixels(const RegionArgs<T>& a, const std::vector<Band>& bands) {
  int64_t largest = 0;
  for (const Band& band : bands) largest = std::max(largest, (band.end - band.begin) * Map<T>(a, band.map).W);
  return largest;
}

// Returns the range [begin, end) of the taps that bin row `ph` has in the pixel rows [low, high).
template <class Compute>
inline std::pair<int32_t, int32_t> taps_within(const AxisTaps<Compute>& y, int64_t ph, int64_t low, int64_t high) {
  int32_t begin = y.begin[ph], end = y.begin[ph + 1];
  while (begin < end && y.pixel[begin] < low) ++begin;
  while (begin < end && y.pixel[end - 1] >= high) --end;
  return {begin, end};
}

// Computes the gradient of position-sensitive means on channels_last maps. In each bin, the gradient of an output
// channel goes to a different input channel.
template <class T>
void mean_backward_bands_sensitive(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  const int64_t bins = a.PH * a.PW;
  const std::vector<Band> bands = bands_of(a, a.channels * sizeof(Compute));
  const int64_t max_size = max_pixels(a, bands) * a.channels;
  for_each_item(bands.size(), threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    GradPlane<T> plane(max_size, *scratch);
    Compute* grads = scratch->template allocate<Compute>(a.out_channels);
    return [&, scratch, plane, grads](int64_t i) mutable {
      const auto [m, low, high] = bands[i];
      const Map<T> map(a, m);
      const int64_t row = map.W * a.channels;
      Compute* sum = plane.begin(map.grad_input + (map.image * map.H + low) * row, (high - low) * row) - low * row;
      for (const Region<Compute>& r : map.regions)
        for (int64_t o = 0; o < bins; ++o) {
          const int64_t ph = o / a.PW, pw = o % a.PW;
          const auto [begin, end] = taps_within(r.y, ph, low, high);
          if (begin == end) continue;
          convert(a.grad_output + (r.k * bins + o) * a.out_channels, grads, a.out_channels);
          for (int32_t y = begin; y < end; ++y)
            for (int32_t x = r.x.begin[pw]; x < r.x.begin[pw + 1]; ++x) {
              Compute* p = sum + (r.y.pixel[y] * map.W + r.x.pixel[x]) * a.channels + o;
              for (int64_t c = 0; c < a.out_channels; ++c) p[c * bins] += r.y.weight[y] * r.x.weight[x] * grads[c];
            }
        }
      plane.finish();
    };
  });
}

// Transposes the gradients of n bins, starting with bin `first`, for `count` channels. The source is the planes of
// grad_output, and the result is grads[n,width], one row of channels per bin.
template <class T, class Compute>
inline void transpose_bins(const RegionArgs<T>& a, int64_t k, int64_t first, int64_t n, int64_t channel, int64_t count,
                           int64_t width, Compute* grads) {
  constexpr int64_t V = kLanes<Compute>;
  const int64_t bins = a.PH * a.PW;
  const T* end = a.grad_output + a.K * a.channels * bins;
  for (int64_t c = 0; c < width; c += V)
    for (int64_t bin = 0; bin < n; bin += V) {
      const T* from = a.grad_output + (k * a.channels + channel + c) * bins + first + bin;
      Vec<Compute> v[V];
      for (int64_t i = 0; i < V; ++i) v[i] = c + i < count ? load_before(from + i * bins, end) : Vec<Compute>{};
      transpose<Compute>(v);
      for (int64_t i = 0; i < std::min(V, n - bin); ++i) store(grads + (bin + i) * width + c, v[i]);
    }
}

// Adds grad[0..width), multiplied by the weight of the pixel, to the sums of each pixel of a list. width must be a
// multiple of the number of lanes.
template <class Compute>
inline void add_to_pixels(const PixelList<Compute>& pixels, const Compute* grad, int64_t width, Compute* sums) {
  constexpr int64_t V = kLanes<Compute>;
  int64_t c = 0;
  for (; c + 4 * V <= width; c += 4 * V) {
    const Vec<Compute> g0 = load(grad + c), g1 = load(grad + c + V), g2 = load(grad + c + 2 * V),
                       g3 = load(grad + c + 3 * V);
    for (int64_t i = 0; i < pixels.count; ++i) {
      Compute* p = sums + pixels.offset[i] + c;
      const Compute weight = pixels.weight[i];
      store(p, load(p) + g0 * weight);
      store(p + V, load(p + V) + g1 * weight);
      store(p + 2 * V, load(p + 2 * V) + g2 * weight);
      store(p + 3 * V, load(p + 3 * V) + g3 * weight);
    }
  }
  for (; c < width; c += V) {
    const Vec<Compute> g = load(grad + c);
    for (int64_t i = 0; i < pixels.count; ++i) {
      Compute* p = sums + pixels.offset[i] + c;
      store(p, load(p) + g * pixels.weight[i]);
    }
  }
}

// Computes the gradient of means. For both layouts, the thread's own memory holds the sums, with one row of channels
// per pixel.
template <class T, bool kChannelsLast>
void mean_backward_bands(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>, kChannels = 64, kBins = 64;
  const int64_t bins = a.PH * a.PW, width = std::min(kChannels, round_up(a.channels, V));
  const int64_t blocks = ceil_div(a.channels, width);
  const std::vector<Band> bands = bands_of(a, width * sizeof(Compute));
  const int64_t max_size = max_pixels(a, bands);
  for_each_item(bands.size() * blocks, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* sums = scratch->template allocate<Compute>(max_size * width);
    Compute* grads = scratch->template allocate<Compute>(std::min(a.PW, kBins) * width);
    PixelList<Compute> pixels(a.max_taps_y, a.max_taps_x, *scratch);
    return [&, scratch, sums, grads, pixels](int64_t i) mutable {
      const auto [m, low, high] = bands[i / blocks];
      const Map<T> map(a, m);
      const int64_t channel = i % blocks * width, count = std::min(width, a.channels - channel);
      const int64_t first = low * map.W, n = (high - low) * map.W;
      std::fill_n(sums, n * width, Compute(0));
      for (const Region<Compute>& r : map.regions) {
        if (r.y.low >= high || r.y.high <= low) continue;
        for (int64_t ph = 0; ph < a.PH; ++ph) {
          const auto [begin, end] = taps_within(r.y, ph, low, high);
          if (begin == end) continue;
          for (int64_t left = 0; left < a.PW; left += kBins) {
            const int64_t bin_count = std::min(a.PW - left, kBins), first_bin = ph * a.PW + left;
            if constexpr (kChannelsLast) {
              for (int64_t bin = 0; bin < bin_count; ++bin) {
                convert(a.grad_output + (r.k * bins + first_bin + bin) * a.channels + channel, grads + bin * width,
                        count);
                std::fill_n(grads + bin * width + count, width - count, Compute(0));
              }
            } else {
              transpose_bins(a, r.k, first_bin, bin_count, channel, count, width, grads);
            }
            for (int64_t bin = 0; bin < bin_count; ++bin)
              pixels.visit(r, begin, end, left + bin, map.W, -first * width, width,
                           [&](auto, auto) { add_to_pixels(pixels, grads + bin * width, width, sums); });
          }
        }
      }
      if constexpr (kChannelsLast) {
        T* target = map.grad_input + (map.image * map.H * map.W + first) * a.channels + channel;
        for (int64_t pixel = 0; pixel < n; ++pixel) convert(sums + pixel * width, target + pixel * a.channels, count);
      } else {
        const int64_t plane = map.H * map.W;
        transpose_pixels(sums, n, width, count, plane,
                         map.grad_input + (map.image * a.channels + channel) * plane + first);
      }
    };
  });
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
