// roi_align, roi_pool, prroi_pool, multi_scale_roi_align on the CPU: tiles of bins, and the rows and columns of pixels
// that they read. Kernels for NCHW maps combine these rows, a vector of columns at a time.
#ifndef RELOPS_REGIONS_TILES
#define RELOPS_REGIONS_TILES

#include "common/cpu/simd.h"
#include "regions/cpu_args.h"
#include "regions/cpu_maps.h"

namespace relops::RELOPS_ISA {

namespace {

// A tile of the bins of a region. Kernels store intermediate results for one tile at a time, so their memory does not
// grow with the output. A tile consists of one or more complete rows of bins, or of a part of one row, so it is
// contiguous in a plane of the output.
template <class Compute>
struct BinTile {
  AxisTaps<Compute> y, x;
  int64_t PH, PW;
  int64_t first;  // index of the first bin of the tile
};

// The size of a tile. It is chosen to bound the memory of a kernel that stores `row_values` numbers for each row of
// bins and `column_values` numbers for each column of bins. An output of up to 32 x 32 bins is usually one tile.
struct TileSize {
  int64_t PH, PW;
  TileSize(int64_t all_PH, int64_t all_PW, int64_t row_values, int64_t column_values) {
    constexpr int64_t kBins = 1024, kValues = 1 << 16;
    PW = std::min(all_PW, std::clamp<int64_t>(kValues / std::max<int64_t>(column_values, 1), 1, kBins));
    const int64_t rows = std::min(kBins / PW, kValues / std::max<int64_t>(row_values, 1));
    PH = PW < all_PW ? 1 : std::clamp<int64_t>(rows, 1, all_PH);
  }
  int64_t bins() const { return PH * PW; }
};

// Returns the taps of `count` bins, starting with bin `first`.
template <class Compute>
inline AxisTaps<Compute> taps_of_bins(AxisTaps<Compute> taps, int64_t bins, int64_t first, int64_t count) {
  if (count == bins) return taps;
  taps.begin += first;
  taps.low = taps.high = taps.max_taps = 0;
  for (int64_t bin = 0; bin < count; ++bin)
    taps.max_taps = std::max(taps.max_taps, taps.begin[bin + 1] - taps.begin[bin]);
  if (taps.begin[0] == taps.begin[count]) return taps;
  const auto [low, high] = std::minmax_element(taps.pixel + taps.begin[0], taps.pixel + taps.begin[count]);
  taps.low = *low;
  taps.high = *high + 1;
  return taps;
}

// Calls f(tile) for each tile of a region.
template <class Compute, class F>
inline void for_each_tile(const Region<Compute>& r, int64_t PH, int64_t PW, const TileSize& size, F f) {
  for (int64_t pw = 0; pw < PW; pw += size.PW) {
    const int64_t columns = std::min(size.PW, PW - pw);
    const AxisTaps<Compute> x = taps_of_bins(r.x, PW, pw, columns);
    for (int64_t ph = 0; ph < PH; ph += size.PH) {
      const int64_t rows = std::min(size.PH, PH - ph);
      f(BinTile<Compute>{taps_of_bins(r.y, PH, ph, rows), x, rows, columns, ph * PW + pw});
    }
  }
}

// The columns that a region reads, extended to full vectors that begin at column `left`. The vectors stay inside the
// row if it is wide enough. Otherwise, they continue into the next row.
struct Columns {
  int64_t left, width;
  Columns(int64_t low, int64_t high, int64_t map_width, int64_t lanes)
      : left(low), width(round_up(std::max<int64_t>(high - low, 1), lanes)) {
    left = std::max<int64_t>(0, std::min(left, map_width - width));
    width = round_up(std::max<int64_t>(high - left, 1), lanes);
  }
};

// The columns that each bin of a tile gathers, and their weights. Entry j of bin o is at index j * padded + o.
template <class Compute>
struct ColumnTable {
  int64_t padded = 0, depth = 0;
  Int<Compute>* index;
  Compute* weight;

  ColumnTable(int64_t bins, int64_t max_taps, Scratch& scratch)
      : index(scratch.allocate<Int<Compute>>(round_up(bins, kLanes<Compute>) * max_taps)),
        weight(scratch.allocate<Compute>(round_up(bins, kLanes<Compute>) * max_taps)) {}

  // In the array from which the bins gather, the rows are `stride` elements apart, and index `zero` holds 0. Table
  // entries that do not exist refer to index `zero`.
  void fill(const AxisTaps<Compute>& x, int64_t PH, int64_t PW, int64_t left, int64_t stride, int64_t zero) {
    const int64_t bins = PH * PW;
    padded = round_up(bins, kLanes<Compute>);
    depth = x.max_taps;
    for (int64_t j = 0; j < depth; ++j)
      for (int64_t pw = 0; pw < PW; ++pw) {
        const int64_t tap = x.begin[pw] + j;
        const bool exists = tap < x.begin[pw + 1];
        for (int64_t ph = 0; ph < PH; ++ph) {
          index[j * padded + ph * PW + pw] = exists ? ph * stride + x.pixel[tap] - left : zero;
          weight[j * padded + ph * PW + pw] = exists ? x.weight[tap] : 0;
        }
      }
    for (int64_t j = 0; j < depth; ++j)
      for (int64_t o = bins; o < padded; ++o) {
        index[j * padded + o] = zero;
        weight[j * padded + o] = 0;
      }
  }
};

// Computes the offset of the row of each tap of a tile, in elements.
template <class Compute>
inline void row_offsets(const AxisTaps<Compute>& y, int64_t PH, int64_t map_width, int64_t* offset) {
  for (int32_t tap = y.begin[0]; tap < y.begin[PH]; ++tap) *offset++ = y.pixel[tap] * map_width;
}

// Computes the weighted sum or the maximum of kRows rows. If `more`, the result includes the values already in `out`.
template <bool kMaximum, int kRows, class T, class Compute>
inline void combine_some_rows(const T* first, const int64_t* offset, const Compute* weight, int64_t width, bool more,
                              Compute* out) {
  const T* row[kRows];
  for (int t = 0; t < kRows; ++t) row[t] = first + offset[t];
  for (int64_t i = 0; i < width; i += kLanes<Compute>) {
    Vec<Compute> result =
        more ? load(out + i) : broadcast(kMaximum ? -std::numeric_limits<Compute>::infinity() : Compute(0));
    for (int t = 0; t < kRows; ++t) {
      const Vec<Compute> read = load(row[t] + i);
      accumulate<kMaximum>(result, read, weight[t]);
    }
    store(out + i, result);
  }
}

// Combines the rows of pixels that a bin reads into out[0..width). width must be a multiple of the number of lanes.
template <bool kMaximum, class T, class Compute>
inline void combine_rows(const T* first, const T* end, const int64_t* offset, const Compute* weight, int64_t count,
                         int64_t width, Compute* out) {
  bool more = false;
  int64_t t = 0;
  if (count == 0 || first + offset[count - 1] + width <= end) [[likely]] {
    for (; t + 4 <= count; t += 4, more = true)
      combine_some_rows<kMaximum, 4>(first, offset + t, weight + t, width, more, out);
    if (t + 2 <= count) {
      combine_some_rows<kMaximum, 2>(first, offset + t, weight + t, width, more, out);
      t += 2;
      more = true;
    }
    if (t < count || !more)
      t < count ? combine_some_rows<kMaximum, 1>(first, offset + t, weight + t, width, more, out)
                : combine_some_rows<kMaximum, 0>(first, offset, weight, width, more, out);
    return;
  }
  // Close to the end of the tensor, a vector may reach past the end, so every load checks for the end.
  for (int64_t i = 0; i < width; i += kLanes<Compute>) {
    Vec<Compute> result = broadcast(kMaximum ? -std::numeric_limits<Compute>::infinity() : Compute(0));
    for (t = 0; t < count; ++t) {
      const Vec<Compute> read = load_before(first + offset[t] + i, end);
      accumulate<kMaximum>(result, read, weight[t]);
    }
    store(out + i, result);
  }
}

// Prefetches the rows of a plane that a region reads. The function is always_inline, because GCC removes calls of a
// function that only prefetches.
template <class T, class Compute>
[[gnu::always_inline]] inline void prefetch_rows(const Region<Compute>& r, const T* plane, int64_t map_width,
                                                 int64_t PH) {
  const int64_t bytes = (r.x.high - r.x.low) * sizeof(T);
  for (int32_t tap = 0; tap < r.y.begin[PH]; ++tap) {
    const auto* row = reinterpret_cast<const char*>(plane + r.y.pixel[tap] * map_width + r.x.low);
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
