// roi_align, prroi_pool, multi_scale_roi_align, ps_roi_align on the CPU: the gradient of the boxes.
//
// NCHW: a work item is a block of channels of a map, for all or some of the regions that read the map. It stores
// partial sums for each region, which cpu.cpp adds up. For each vector of columns, two weighted sums are computed: one
// over the gradients of a row of bins and one over rows of pixels. Both sums use the weights of the taps and the slopes
// of these weights.
//
// channels_last: a work item is a region.
#ifndef RELOPS_REGIONS_BOX_GRADIENTS
#define RELOPS_REGIONS_BOX_GRADIENTS

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"
#include "regions/cpu_maps.h"
#include "regions/cpu_tiles.h"

namespace relops::RELOPS_ISA {

namespace {

// The transpose of a ColumnTable: for each column, the bins in a row of bins that read the column. Entry j of column i
// is at index j * width + i. `valid` is -1 if the entry exists, and 0 if it does not.
template <class Compute>
struct BinTable {
  int64_t width = 0, depth = 0;
  Int<Compute>*bin, *valid;
  Compute *weight, *slope_first, *slope_last;
  int32_t* count;

  BinTable(int64_t max_width, int64_t PW, Scratch& scratch)
      : bin(scratch.allocate<Int<Compute>>(max_width * PW)),
        valid(scratch.allocate<Int<Compute>>(max_width * PW)),
        weight(scratch.allocate<Compute>(max_width * PW)),
        slope_first(scratch.allocate<Compute>(max_width * PW)),
        slope_last(scratch.allocate<Compute>(max_width * PW)),
        count(scratch.allocate<int32_t>(max_width)) {}

  void fill(const AxisTaps<Compute>& x, int64_t PW, int64_t left, int64_t width_) {
    width = width_;
    depth = 0;
    std::fill_n(count, width, 0);
    for (int32_t tap = x.begin[0]; tap < x.begin[PW]; ++tap)
      depth = std::max<int64_t>(depth, ++count[x.pixel[tap] - left]);
    std::fill_n(bin, depth * width, 0);
    std::fill_n(valid, depth * width, 0);
    std::fill_n(weight, depth * width, Compute(0));
    std::fill_n(slope_first, depth * width, Compute(0));
    std::fill_n(slope_last, depth * width, Compute(0));
    std::fill_n(count, width, 0);
    for (int64_t pw = 0; pw < PW; ++pw)
      for (int32_t tap = x.begin[pw]; tap < x.begin[pw + 1]; ++tap) {
        const int64_t i = x.pixel[tap] - left, entry = count[i]++ * width + i;
        bin[entry] = pw;
        valid[entry] = -1;
        weight[entry] = x.weight[tap];
        slope_first[entry] = x.slope_first[tap];
        slope_last[entry] = x.slope_last[tap];
      }
  }
};

// The gradients of one row of bins, which are looked up by the number of the bin. If kInRegister, they all fit in one
// vector.
template <class Compute, bool kInRegister>
struct BinRow {
  const Compute* p;
  Vec<Compute> all;
  explicit BinRow(const Compute* p) : p(p), all{} {
    if constexpr (kInRegister) all = load(p);
  }
  // Returns the gradients of the bins to which a vector of table entries refers. The result is zero for entries that do
  // not exist, even if gradients are not finite.
  Vec<Compute> get(const BinTable<Compute>& table, int64_t entry) const {
    const VecInt<Compute> index = load_int<Compute>(table.bin + entry);
    Vec<Compute> v;
    if constexpr (kInRegister)
      v = __builtin_shuffle(all, index);
    else
      v = gather(p, index);
    return load_int<Compute>(table.valid + entry) ? v : Vec<Compute>{};
  }
};

// Adds the contribution of one tile and some channels to `partial`, the gradient of a box. `grads` has space for the
// bins of a tile plus one vector. The function is noinline, because if it is inlined into the caller's loops, GCC keeps
// the pointers of the innermost loop in memory instead of registers.
template <class T, bool kInRegister, class Compute>
[[gnu::noinline]] void add_tile(const RegionArgs<T>& a, int64_t k, const Map<T>& map, const BinTile<Compute>& tile,
                                const BinTable<Compute>& table, int64_t left, int64_t channel, int64_t channel_end,
                                Compute* grads, Compute* partial) {
  constexpr int64_t V = kLanes<Compute>;
  const int64_t plane = map.H * map.W, bins = a.PH * a.PW;
  const T* tensor_end = map.input + a.N * a.channels * plane;
  const AxisTaps<Compute>& y = tile.y;
  Vec<Compute> x_first = {}, y_first = {}, x_last = {}, y_last = {};
  for (int64_t c = channel; c < channel_end; ++c) {
    convert(a.grad_output + (k * a.channels + c) * bins + tile.first, grads, tile.PH * tile.PW);
    const T* first = map.input + (map.image * a.channels + c) * plane + left;
    for (int64_t ph = 0; ph < tile.PH; ++ph) {
      const BinRow<Compute, kInRegister> row(grads + ph * tile.PW);
      for (int64_t i = 0; i < table.width && table.depth > 0; i += V) {
        // g is the weighted sum of the gradients of bins, and f is the weighted sum of rows of pixels. The variants
        // with _first and _last use the slopes of the weights instead of the weights.
        Vec<Compute> g = {}, g_first = {}, g_last = {}, f = {}, f_first = {}, f_last = {};
        for (int64_t j = i; j < table.depth * table.width; j += table.width) {
          const Vec<Compute> bin = row.get(table, j);
          g += bin * load(table.weight + j);
          g_first += bin * load(table.slope_first + j);
          g_last += bin * load(table.slope_last + j);
        }
        const VecInt<Compute> valid = load_int<Compute>(table.valid + i);
        for (int32_t tap = y.begin[ph]; tap < y.begin[ph + 1]; ++tap) {
          const Vec<Compute> read = load_before(first + y.pixel[tap] * map.W + i, tensor_end);
          const Vec<Compute> pixels = valid ? read : Vec<Compute>{};
          f += pixels * y.weight[tap];
          f_first += pixels * y.slope_first[tap];
          f_last += pixels * y.slope_last[tap];
        }
        x_first += f * g_first;
        x_last += f * g_last;
        y_first += f_first * g;
        y_last += f_last * g;
      }
    }
  }
  partial[0] += sum<Compute>(x_first);
  partial[1] += sum<Compute>(y_first);
  partial[2] += sum<Compute>(x_last);
  partial[3] += sum<Compute>(y_last);
}

template <class T, bool kInRegister>
void mean_backward_boxes_planes(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t max_width = round_up(a.max_columns, V) + V;
  const TileSize size(a.PH, a.PW, 0, max_width);
  const PlaneItems<T> items(a, kChannelBlock, threads, true);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    BinTable<Compute> table(max_width, size.PW, *scratch);
    Compute* grads = scratch->template allocate<Compute>(size.bins() + V);
    return [&, scratch, table, grads](int64_t i) mutable {
      const auto item = items.at(i);
      for (const Region<Compute>& r : item.regions) {
        Compute* partial = a.box_partials + (item.block * a.K + r.k) * 4;
        std::fill_n(partial, 4, Compute(0));
        for_each_tile(r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const Columns columns(tile.x.low, tile.x.high, item.map.W, V);
          table.fill(tile.x, tile.PW, columns.left, columns.width);
          add_tile<T, kInRegister>(a, r.k, item.map, tile, table, columns.left, item.channel, item.channel_end, grads,
                                   partial);
        });
      }
    };
  });
}

// Adds the contribution of a pixel to `partial`, the gradient of the box of region r. `value` is the pixel times the
// gradient of the bin that reads it.
template <class Compute>
inline void add_pixel(const Region<Compute>& r, int32_t y, int32_t x, Compute value, Compute* partial) {
  partial[0] += value * (r.y.weight[y] * r.x.slope_first[x]);
  partial[1] += value * (r.y.slope_first[y] * r.x.weight[x]);
  partial[2] += value * (r.y.weight[y] * r.x.slope_last[x]);
  partial[3] += value * (r.y.slope_last[y] * r.x.weight[x]);
}

template <class T>
void mean_backward_boxes_planes_sensitive(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  const int64_t bins = a.PH * a.PW;
  const PlaneItems<T> items(a, kChannelBlock, threads, true);
  for_each_item(items.count, threads, [&] {
    return [&](int64_t i) {
      const auto item = items.at(i);
      const Map<T>& map = item.map;
      for (const Region<Compute>& r : item.regions) {
        Compute* partial = a.box_partials + (item.block * a.K + r.k) * 4;
        std::fill_n(partial, 4, Compute(0));
        for (int64_t c = item.channel; c < item.channel_end; ++c) {
          const int64_t ph = c % bins / a.PW, pw = c % a.PW;
          const T* plane = map.input + (map.image * a.channels + c) * map.H * map.W;
          const Compute grad = static_cast<Compute>(a.grad_output[r.k * a.channels + c]);
          for_each_pixel(r, ph, pw, map.W, [&](int64_t pixel, int32_t y, int32_t x) {
            const Compute value = grad * static_cast<Compute>(plane[pixel]);
            add_pixel(r, y, x, value, partial);
          });
        }
      }
    };
  });
}

template <class T>
void mean_backward_boxes_pixels(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t bins = a.PH * a.PW;
  for_each_item(a.K, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* grads = scratch->template allocate<Compute>(a.out_channels);
    return [&, scratch, grads](int64_t i) {
      const Region<Compute>& r = a.regions[i];
      const Map<T> map(a, r.map);
      const T* image = map.input + map.image * map.H * map.W * a.channels;
      Compute* partial = a.box_partials + r.k * 4;
      std::fill_n(partial, 4, Compute(0));
      for (int64_t o = 0; o < bins; ++o) {
        convert(a.grad_output + (r.k * bins + o) * a.out_channels, grads, a.out_channels);
        for_each_pixel(r, o / a.PW, o % a.PW, map.W, [&](int64_t pixel, int32_t y, int32_t x) {
          const T* p = image + pixel * a.channels;
          Compute value = 0;
          int64_t c = 0;
          if (a.position_sensitive) {
            for (; c < a.out_channels; ++c) value += grads[c] * static_cast<Compute>(p[c * bins + o]);
          } else {
            Vec<Compute> total = {};
            for (; c + V <= a.channels; c += V) total += load(grads + c) * load(p + c);
            value = sum<Compute>(total);
            for (; c < a.channels; ++c) value += grads[c] * static_cast<Compute>(p[c]);
          }
          add_pixel(r, y, x, value, partial);
        });
      }
    };
  });
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
