// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on the CPU: code that the kernels
// share. It contains the map of a work item, the work items for NCHW maps, and loops over pixels.
#ifndef RELOPS_REGIONS_MAPS
#define RELOPS_REGIONS_MAPS

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"

namespace relops::RELOPS_ISA {

namespace {

// The map that a work item reads or writes, and the regions that read the map.
template <class T>
struct Map {
  Map(const RegionArgs<T>& a, int64_t m)
      : H(a.levels[m / a.N].H),
        W(a.levels[m / a.N].W),
        image(m % a.N),
        input(a.levels[m / a.N].input),
        grad_input(a.levels[m / a.N].grad_input),
        regions(a.regions + a.map_begin[m], a.regions + a.map_begin[m + 1]) {}
  int64_t H, W, image;
  const T* input;
  T* grad_input;
  std::span<const Region<ComputeType<T>>> regions;
};

template <class T>
int64_t largest_plane(const RegionArgs<T>& a) {
  int64_t largest = 0;
  for (int64_t l = 0; l < a.L; ++l) largest = std::max(largest, int64_t{a.levels[l].H} * a.levels[l].W);
  return largest;
}

// Returns the rows [low, high) that the regions of a map read.
template <class T>
std::pair<int64_t, int64_t> rows_read(const Map<T>& map) {
  int64_t low = map.H, high = 0;
  for (const auto& r : map.regions)
    if (r.y.low < r.y.high) {
      low = std::min<int64_t>(low, r.y.low);
      high = std::max<int64_t>(high, r.y.high);
    }
  return {std::min(low, high), high};
}

// Work items for NCHW maps. Each item is a block of channels of a map. If there are few such blocks, the regions that
// read a map are also divided into parts.
template <class T>
struct PlaneItems {
  struct Item {
    Map<T> map;
    int64_t block, channel, channel_end;  // the block has the channels [channel, channel_end)
    std::span<const Region<ComputeType<T>>> regions;
  };

  PlaneItems(const RegionArgs<T>& a, int64_t block_size, int64_t threads, bool may_split)
      : a(a), block_size(block_size), blocks(ceil_div(a.channels, block_size)), parts(1) {
    const int64_t whole = a.L * a.N * blocks;
    if (may_split && whole > 0) parts = std::max<int64_t>(1, 4 * threads / whole);
    count = whole * parts;
  }

  Item at(int64_t item) const {
    const int64_t part = item % parts, block = item / parts % blocks, channel = block * block_size;
    const Map<T> map(a, item / parts / blocks);
    const int64_t regions = map.regions.size(), begin = regions * part / parts, end = regions * (part + 1) / parts;
    return {map, block, channel, std::min(channel + block_size, a.channels), map.regions.subspan(begin, end - begin)};
  }

  const RegionArgs<T>& a;
  int64_t block_size, blocks, parts, count;
};

// Loads a vector at p from an array that ends at `end`. Lanes past the end are zero.
template <class T>
inline Vec<ComputeType<T>> load_before(const T* p, const T* end) {
  constexpr int64_t V = kLanes<ComputeType<T>>;
  if (p + V <= end) [[likely]]
    return load(p);
  return load_first(p, std::max<int64_t>(end - p, 0));
}

// Accumulates a pixel into a weighted sum or a maximum. The maximum ignores NaN, as in torchvision. Value is a number
// or a vector of numbers.
template <bool kMaximum, class Value, class Compute>
inline void accumulate(Value& result, Value pixel, Compute weight) {
  if constexpr (kMaximum)
    result = pixel > result ? pixel : result;
  else
    result += pixel * weight;
}

// Calls f(pixel, y tap, x tap) for each pixel of bin (ph, pw) of a region.
template <class Compute, class F>
inline void for_each_pixel(const Region<Compute>& r, int64_t ph, int64_t pw, int64_t map_width, F f) {
  for (int32_t y = r.y.begin[ph]; y < r.y.begin[ph + 1]; ++y)
    for (int32_t x = r.x.begin[pw]; x < r.x.begin[pw + 1]; ++x) f(r.y.pixel[y] * map_width + r.x.pixel[x], y, x);
}

// Transposes pixels[n,width] to planes[c][n], c < count. Planes are `plane` elements apart.
template <class T, class Compute>
inline void transpose_pixels(const Compute* pixels, int64_t n, int64_t width, int64_t count, int64_t plane, T* planes) {
  constexpr int64_t V = kLanes<Compute>;
  for (int64_t c = 0; c < count; c += V)
    for (int64_t pixel = 0; pixel < n; pixel += V) {
      Vec<Compute> v[V];
      for (int64_t i = 0; i < V; ++i) v[i] = pixel + i < n ? load(pixels + (pixel + i) * width + c) : Vec<Compute>{};
      transpose<Compute>(v);
      for (int64_t i = 0; i < std::min(V, count - c); ++i) {
        T* to = planes + (c + i) * plane + pixel;
        if (pixel + V <= n)
          store(to, v[i]);
        else
          store_first(to, v[i], n - pixel);
      }
    }
}

// The gradient of a plane. It is summed in place, or in separate memory if sums have a wider type than the gradient.
template <class T>
class GradPlane {
 public:
  using Compute = ComputeType<T>;
  GradPlane(int64_t max_size, Scratch& scratch)
      : own_(std::is_same_v<T, Compute> ? nullptr : scratch.allocate<Compute>(max_size)) {}

  // Returns the memory for `size` sums, which are set to zero.
  Compute* begin(T* target, int64_t size) {
    target_ = target;
    size_ = size;
    if constexpr (std::is_same_v<T, Compute>)
      sums_ = target;
    else
      sums_ = own_;
    std::fill_n(sums_, size, Compute(0));
    return sums_;
  }
  // Stores the sums in `target`.
  void finish() {
    if constexpr (!std::is_same_v<T, Compute>) convert(sums_, target_, size_);
  }

 private:
  Compute *own_, *sums_ = nullptr;
  T* target_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
