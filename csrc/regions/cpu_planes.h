// roi_align, prroi_pool, multi_scale_roi_align, ps_roi_align, ps_roi_pool on the CPU: the forward pass on NCHW maps
// and, for ps_roi_align and ps_roi_pool, the gradient of the input.
//
// roi_align, prroi_pool, multi_scale_roi_align: these kernels are used if the regions read little of a map. (Otherwise,
// the kernels of cpu_slices.h are used.) A work item is a block of channels of a map, for all or some of the regions
// that read the map. For each row of bins, the rows of pixels are combined into one row, a vector of columns at a time
// and without a transposition. Then the bins gather their columns from the combined rows, a vector of bins at a time.
//
// ps_roi_align, ps_roi_pool: a plane is read by only one bin of each region, so each output is computed from a few
// pixels, one by one.
#ifndef RELOPS_REGIONS_PLANES
#define RELOPS_REGIONS_PLANES

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"
#include "regions/cpu_maps.h"
#include "regions/cpu_tiles.h"

namespace relops::RELOPS_ISA {

namespace {

template <class T>
void mean_forward_planes(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t max_width = round_up(a.max_columns, V) + V;
  const TileSize size(a.PH, a.PW, max_width, 0);
  const PlaneItems<T> items(a, kChannelBlock, threads, true);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    ColumnTable<Compute> table(size.bins(), a.max_taps_x, *scratch);
    Compute* rows = scratch->template allocate<Compute>(size.PH * max_width + V);
    int64_t* offsets = scratch->template allocate<int64_t>(size.PH * a.max_taps_y);
    return [&, scratch, table, rows, offsets](int64_t i) mutable {
      const auto item = items.at(i);
      const Map<T>& map = item.map;
      const int64_t plane = map.H * map.W;
      const T* tensor_end = map.input + a.N * a.channels * plane;
      const auto* end = item.regions.data() + item.regions.size();
      for (auto* r = item.regions.data(); r < end; ++r)
        for_each_tile(*r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const Columns columns(tile.x.low, tile.x.high, map.W, V);
          const int64_t bins = tile.PH * tile.PW, zero = tile.PH * columns.width;
          store(rows + zero, Vec<Compute>{});
          table.fill(tile.x, tile.PH, tile.PW, columns.left, columns.width, zero);
          row_offsets(tile.y, tile.PH, map.W, offsets);
          for (int64_t c = item.channel; c < item.channel_end; ++c) {
            if (r + 1 < end && tile.first == 0)
              prefetch_rows(r[1], map.input + (map.image * a.channels + c) * plane, map.W, a.PH);
            const T* first = map.input + (map.image * a.channels + c) * plane + columns.left;
            for (int64_t ph = 0; ph < tile.PH; ++ph) {
              const int32_t tap = tile.y.begin[ph];
              combine_rows<false>(first, tensor_end, offsets + (tap - tile.y.begin[0]), tile.y.weight + tap,
                                  tile.y.begin[ph + 1] - tap, columns.width, rows + ph * columns.width);
            }
            T* out = a.output + (r->k * a.channels + c) * a.PH * a.PW + tile.first;
            for (int64_t o = 0; o < bins; o += V) {
              Vec<Compute> sum = {};
              for (int64_t j = o; j < table.depth * table.padded; j += table.padded)
                sum += gather(rows, load_int<Compute>(table.index + j)) * load(table.weight + j);
              if (o + V <= bins)
                store(out + o, sum);
              else
                store_first(out + o, sum, bins - o);
            }
          }
        });
    };
  });
}

template <class T>
void mean_forward_planes_sensitive(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  const int64_t bins = a.PH * a.PW;
  const PlaneItems<T> items(a, kChannelBlock, threads, true);
  for_each_item(items.count, threads, [&] {
    return [&](int64_t i) {
      const auto item = items.at(i);
      const Map<T>& map = item.map;
      for (int64_t c = item.channel; c < item.channel_end; ++c) {
        const int64_t ph = c % bins / a.PW, pw = c % a.PW;
        const T* plane = map.input + (map.image * a.channels + c) * map.H * map.W;
        for (const Region<Compute>& r : item.regions) {
          Compute sum = 0;
          for_each_pixel(r, ph, pw, map.W, [&](int64_t pixel, int32_t y, int32_t x) {
            sum += static_cast<Compute>(plane[pixel]) * (r.y.weight[y] * r.x.weight[x]);
          });
          a.output[r.k * a.channels + c] = static_cast<T>(sum);
        }
      }
    };
  });
}

template <class T>
void mean_backward_planes_sensitive(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  const int64_t bins = a.PH * a.PW;
  const PlaneItems<T> items(a, 1, threads, false);
  const int64_t max_plane = largest_plane(a);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    GradPlane<T> plane(max_plane, *scratch);
    return [&, scratch, plane](int64_t i) mutable {
      const auto item = items.at(i);
      const Map<T>& map = item.map;
      const int64_t c = item.channel, ph = c % bins / a.PW, pw = c % a.PW;
      if (map.grad_input == nullptr) return;
      const int64_t size = map.H * map.W;
      Compute* sum = plane.begin(map.grad_input + (map.image * a.channels + c) * size, size);
      for (const Region<Compute>& r : map.regions) {
        const Compute grad = static_cast<Compute>(a.grad_output[r.k * a.channels + c]);
        for_each_pixel(r, ph, pw, map.W, [&](int64_t pixel, int32_t y, int32_t x) {
          sum[pixel] += grad * (r.y.weight[y] * r.x.weight[x]);
        });
      }
      plane.finish();
    };
  });
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
