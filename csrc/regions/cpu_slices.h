// roi_align, roi_pool, prroi_pool, multi_scale_roi_align on the CPU: the forward pass on NCHW maps, if the regions read
// a map more than once.
//
// A work item is a slice: as many channels of a map as a vector has lanes. A slice is transposed in registers, once for
// all regions, so every pixel becomes one vector of channels. For each row of bins, the rows of pixels are combined,
// but only in the columns that the bins read. Then each bin combines its few columns.
#ifndef RELOPS_REGIONS_SLICES
#define RELOPS_REGIONS_SLICES

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"
#include "regions/cpu_maps.h"
#include "regions/cpu_tiles.h"

namespace relops::RELOPS_ISA {

namespace {

// Returns whether the forward pass should use slices. Measurements show that the transposition pays off if the regions
// read more pixels than it transposes. There must also be a slice for every thread, because threads cannot divide a
// slice.
template <class T>
bool by_slices(const RegionArgs<T>& a, int64_t threads) {
  if (a.position_sensitive || a.L * a.N * (a.channels / kLanes<ComputeType<T>>) < threads) return false;
  int64_t read = 0, pixels = 0;
  for (int64_t m = 0; m < a.L * a.N; ++m) {
    const Map<T> map(a, m);
    const auto [low, high] = rows_read(map);
    pixels += (high - low) * map.W;
    for (const auto& r : map.regions) read += int64_t{r.y.begin[a.PH]} * r.x.begin[a.PW];
  }
  return read > pixels;
}

// Transposes planes[c][n], c < count, to pixels[n,V]. Planes are `plane` elements apart. Missing channels become zero.
template <class T, class Compute>
inline void transpose_planes(const T* planes, int64_t n, int64_t count, int64_t plane, Compute* pixels) {
  constexpr int64_t V = kLanes<Compute>;
  for (int64_t pixel = 0; pixel < n; pixel += V) {
    Vec<Compute> v[V];
    for (int64_t i = 0; i < V; ++i)
      v[i] = i < count ? load_first(planes + i * plane + pixel, n - pixel) : Vec<Compute>{};
    transpose<Compute>(v);
    for (int64_t i = 0; i < std::min(V, n - pixel); ++i) store(pixels + (pixel + i) * V, v[i]);
  }
}

// Computes the weighted sum or the maximum of kRows rows of pixels, in each of the listed columns. A pixel is a vector
// of channels. If `more`, the result includes the values that are already in `out`.
template <bool kMaximum, int kRows, class Compute>
inline void combine_some_pixel_rows(const Compute* pixels, const int64_t* offset, const Compute* weight,
                                    const int64_t* column, int64_t columns, bool more, Compute* out) {
  constexpr int64_t V = kLanes<Compute>;
  const Compute* row[kRows];
  for (int t = 0; t < kRows; ++t) row[t] = pixels + offset[t];
  for (int64_t i = 0; i < columns; ++i) {
    Vec<Compute> result =
        more ? load(out + i * V) : broadcast(kMaximum ? -std::numeric_limits<Compute>::infinity() : Compute(0));
    for (int t = 0; t < kRows; ++t) {
      const Vec<Compute> read = load(row[t] + column[i]);
      accumulate<kMaximum>(result, read, weight[t]);
    }
    store(out + i * V, result);
  }
}

template <class T, bool kMaximum>
void forward_slices(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t max_plane = largest_plane(a);
  const TileSize size(a.PH, a.PW, 0, 0);
  const PlaneItems<T> items(a, V, threads, false);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* slice = scratch->template allocate<Compute>(max_plane * V);
    use_huge_pages(slice, max_plane * V * sizeof(Compute));
    Compute* combined = scratch->template allocate<Compute>(size.PW * a.max_taps_x * V);
    Compute* results = scratch->template allocate<Compute>(size.bins() * V);
    int64_t* rows = scratch->template allocate<int64_t>(size.PH * a.max_taps_y);
    int64_t* columns = scratch->template allocate<int64_t>(size.PW * a.max_taps_x);
    return [&, scratch, slice, combined, results, rows, columns](int64_t i) {
      const auto item = items.at(i);
      const Map<T>& map = item.map;
      const int64_t channel = item.channel, count = item.channel_end - channel;
      const int64_t plane = map.H * map.W;
      const auto [low, high] = rows_read(map);
      transpose_planes(map.input + (map.image * a.channels + channel) * plane + low * map.W, (high - low) * map.W,
                       count, plane, slice);
      const Compute* top = slice - low * map.W * V;  // the address that row 0 of the map would have
      for (const Region<Compute>& r : map.regions)
        for_each_tile(r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const int32_t first_y = tile.y.begin[0], first_x = tile.x.begin[0];
          row_offsets(tile.y, tile.PH, map.W * V, rows);
          const int64_t taps = tile.x.begin[tile.PW] - first_x;
          for (int64_t tap = 0; tap < taps; ++tap) columns[tap] = tile.x.pixel[first_x + tap] * V;
          for (int64_t ph = 0; ph < tile.PH; ++ph) {
            const int64_t end = tile.y.begin[ph + 1] - first_y;
            const Compute* weight = tile.y.weight + first_y;
            int64_t y = tile.y.begin[ph] - first_y;
            const bool none = y == end;
            bool more = false;
            for (; y + 4 <= end; y += 4, more = true)
              combine_some_pixel_rows<kMaximum, 4>(top, rows + y, weight + y, columns, taps, more, combined);
            for (; y < end; ++y, more = true)
              combine_some_pixel_rows<kMaximum, 1>(top, rows + y, weight + y, columns, taps, more, combined);
            for (int64_t pw = 0; pw < tile.PW; ++pw) {
              const int32_t begin = tile.x.begin[pw], last = none ? begin : tile.x.begin[pw + 1];
              Vec<Compute> result =
                  broadcast(kMaximum && begin < last ? -std::numeric_limits<Compute>::infinity() : Compute(0));
              for (int32_t x = begin; x < last; ++x) {
                const Vec<Compute> read = load(combined + (x - first_x) * V);
                accumulate<kMaximum>(result, read, tile.x.weight[x]);
              }
              store(results + (ph * tile.PW + pw) * V, result);
            }
          }
          const int64_t bins = a.PH * a.PW;
          transpose_pixels(results, tile.PH * tile.PW, V, count, bins,
                           a.output + (r.k * a.channels + channel) * bins + tile.first);
        });
    };
  });
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
