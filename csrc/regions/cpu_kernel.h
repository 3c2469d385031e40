// Region pooling on the CPU; compiled once per instruction set by foreach_isa.h.
//
// The weight of a pixel in a bin is the product of a factor for its row and one for its column, given as taps
// (taps.h). What a bin reads is thus a small grid of rows and columns.
//
// Forward, NCHW, where regions read a map more than once over: an item of work is a vector of channels of a map, which
// is transposed to rows of channels, in registers, once for all regions. For each row of bins the rows of pixels are
// first combined, at the columns that are read; then each bin combines its few columns.
//
// Forward, NCHW, where they read less: an item is a block of channels of a map. Rows are combined as they lie, a vector
// of columns at a time; then bins gather their columns, a vector of bins at a time. Gradients of boxes are found in the
// same way.
//
// Forward, channels_last: an item is a region; a bin adds up its pixels, a vector of channels at a time.
//
// Backward, either layout: an item is a band of rows of one map, for some channels, which stays in cache as rows of
// channels while all regions that reach into it add their part; NCHW gradients are transposed on the way in and out,
// in registers. A thread owns its band, so sums have one order.

#include "common/cpu/simd.h"

namespace relops::RELOPS_ISA {

namespace {

// The vector at p of an array that ends at `end`: lanes past it are zero.
template <class T>
inline Vec<ComputeType<T>> load_before(const T* p, const T* end) {
  constexpr int64_t V = kLanes<ComputeType<T>>;
  if (p + V <= end) [[likely]]
    return load(p);
  return load_first(p, std::max<int64_t>(end - p, 0));
}

// What becomes of a pixel: a weighted sum, or a maximum, which passes NaN over as torchvision does. Vector: one or a
// vector.
template <bool kMaximum, class Vector, class Compute>
inline void take(Vector& result, Vector pixel, Compute weight) {
  if constexpr (kMaximum)
    result = pixel > result ? pixel : result;
  else
    result += pixel * weight;
}

// The map an item works on.
template <class T>
struct Map {
  Map(const RegionArgs<T>& a, int64_t m)
      : H(a.levels[m / a.N].H),
        W(a.levels[m / a.N].W),
        image(m % a.N),
        input(a.levels[m / a.N].input),
        grad_input(a.levels[m / a.N].grad_input),
        begin(a.regions + a.map_begin[m]),
        end(a.regions + a.map_begin[m + 1]) {}
  int64_t H, W, image;
  const T* input;
  T* grad_input;
  const Region<ComputeType<T>>*begin, *end;
};

// ---- Tiles of bins ----

// What is kept of a region's bins is kept of a tile of them, so that it does not grow with the output. A tile is some
// whole rows of bins, or a part of one row: it lies together in a plane of the output.
template <class Compute>
struct BinTile {
  AxisTaps<Compute> y, x;
  int64_t PH, PW;
  int64_t first;  // bin
};

// The size of a tile, which bounds what is kept: `row_values` for each row of bins, `column_values` for each column.
// Outputs of up to 32 x 32 bins usually are one tile.
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

// Those of `count` of the bins, from `first` on.
template <class Compute>
inline AxisTaps<Compute> taps_of_bins(AxisTaps<Compute> taps, int64_t bins, int64_t first, int64_t count) {
  if (count == bins) return taps;
  taps.begin += first;
  taps.low = taps.high = taps.most = 0;
  for (int64_t bin = 0; bin < count; ++bin) taps.most = std::max(taps.most, taps.begin[bin + 1] - taps.begin[bin]);
  if (taps.begin[0] == taps.begin[count]) return taps;
  const auto [low, high] = std::minmax_element(taps.pixel + taps.begin[0], taps.pixel + taps.begin[count]);
  taps.low = *low;
  taps.high = *high + 1;
  return taps;
}

// Calls f(tile) for the tiles of a region.
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

// ---- NCHW ----

// The columns that a region reads, in whole vectors that begin at `left`. They stay inside the row where it is wide
// enough; else they run on into the next.
struct Columns {
  int64_t left, width;
  Columns(int64_t low, int64_t high, int64_t map_width, int64_t lanes)
      : left(low), width(round_up(std::max<int64_t>(high - low, 1), lanes)) {
    left = std::max<int64_t>(0, std::min(left, map_width - width));
    width = round_up(std::max<int64_t>(high - left, 1), lanes);
  }
};

// For each bin of a tile the columns it gathers, and their weights: entry j of bin o is at [j * padded + o].
template <class Compute>
struct ColumnTable {
  int64_t padded = 0, depth = 0;
  Int<Compute>* at;
  Compute* weight;

  ColumnTable(int64_t bins, int64_t most, Scratch& scratch)
      : at(scratch.take<Int<Compute>>(round_up(bins, kLanes<Compute>) * most)),
        weight(scratch.take<Compute>(round_up(bins, kLanes<Compute>) * most)) {}

  // Rows of bins are `stride` apart in what is gathered from; what has no weight reads the zero at `zero`.
  void fill(const AxisTaps<Compute>& x, int64_t PH, int64_t PW, int64_t left, int64_t stride, int64_t zero) {
    const int64_t bins = PH * PW;
    padded = round_up(bins, kLanes<Compute>);
    depth = x.most;
    for (int64_t j = 0; j < depth; ++j)
      for (int64_t pw = 0; pw < PW; ++pw) {
        const int64_t tap = x.begin[pw] + j;
        const bool there = tap < x.begin[pw + 1];
        for (int64_t ph = 0; ph < PH; ++ph) {
          at[j * padded + ph * PW + pw] = there ? ph * stride + x.pixel[tap] - left : zero;
          weight[j * padded + ph * PW + pw] = there ? x.weight[tap] : 0;
        }
      }
    for (int64_t j = 0; j < depth; ++j)
      for (int64_t o = bins; o < padded; ++o) {
        at[j * padded + o] = zero;
        weight[j * padded + o] = 0;
      }
  }
};

// Items are blocks of channels of the maps, and, where those are few, parts of a map's regions.
struct PlaneItems {
  int64_t blocks, parts, count;
  PlaneItems(int64_t maps, int64_t channels, int64_t block, int64_t threads, bool may_split)
      : blocks(ceil_div(channels, block)), parts(1) {
    if (may_split && maps * blocks > 0) parts = std::max<int64_t>(1, 4 * threads / (maps * blocks));
    count = maps * blocks * parts;
  }
};

// Where the rows of a tile's taps begin, in elements from the first column read.
template <class Compute>
inline void row_offsets(const AxisTaps<Compute>& y, int64_t PH, int64_t map_width, int64_t* offset) {
  for (int32_t tap = y.begin[0]; tap < y.begin[PH]; ++tap) *offset++ = y.pixel[tap] * map_width;
}

// Of kRows rows the weighted sum or the maximum, together with what is in `out` where there is `more`.
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
      take<kMaximum>(result, read, weight[t]);
    }
    store(out + i, result);
  }
}

// out[0..width), whole vectors, from the rows of a bin's taps.
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
  // At the end of the tensor, past which nothing may be read.
  for (int64_t i = 0; i < width; i += kLanes<Compute>) {
    Vec<Compute> result = broadcast(kMaximum ? -std::numeric_limits<Compute>::infinity() : Compute(0));
    for (t = 0; t < count; ++t) {
      const Vec<Compute> read = load_before(first + offset[t] + i, end);
      take<kMaximum>(result, read, weight[t]);
    }
    store(out + i, result);
  }
}

// Asks for the rows of a plane that a region reads. always_inline, because GCC drops calls of a function that does
// nothing but prefetch: it sees no effect in them.
template <class T, class Compute>
[[gnu::always_inline]] inline void prefetch_rows(const Region<Compute>& r, const T* plane, int64_t map_width,
                                                 int64_t PH) {
  const int64_t bytes = (r.x.high - r.x.low) * sizeof(T);
  for (int32_t tap = 0; tap < r.y.begin[PH]; ++tap) {
    const auto* row = reinterpret_cast<const char*>(plane + r.y.pixel[tap] * map_width + r.x.low);
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

template <class T>
void mean_forward_planes(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t most_width = round_up(a.most_columns, V) + V;
  const TileSize size(a.PH, a.PW, most_width, 0);
  const PlaneItems items(a.L * a.N, a.channels, kChannelBlock, threads, true);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    ColumnTable<Compute> table(size.bins(), a.most_taps_x, *scratch);
    Compute* rows = scratch->template take<Compute>(size.PH * most_width + V);
    int64_t* offsets = scratch->template take<int64_t>(size.PH * a.most_taps_y);
    return [&, scratch, table, rows, offsets](int64_t item) mutable {
      const int64_t part = item % items.parts, block = item / items.parts % items.blocks;
      const Map<T> map(a, item / items.parts / items.blocks);
      const int64_t plane = map.H * map.W, channel = block * kChannelBlock;
      const int64_t channel_end = std::min(channel + kChannelBlock, a.channels);
      const T* tensor_end = map.input + a.N * a.channels * plane;
      const int64_t regions = map.end - map.begin;
      const auto* end = map.begin + regions * (part + 1) / items.parts;
      for (auto* r = map.begin + regions * part / items.parts; r < end; ++r)
        for_each_tile(*r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const Columns columns(tile.x.low, tile.x.high, map.W, V);
          const int64_t bins = tile.PH * tile.PW, zero = tile.PH * columns.width;
          store(rows + zero, Vec<Compute>{});
          table.fill(tile.x, tile.PH, tile.PW, columns.left, columns.width, zero);
          row_offsets(tile.y, tile.PH, map.W, offsets);
          for (int64_t c = channel; c < channel_end; ++c) {
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
                sum += gather(rows, load_int<Compute>(table.at + j)) * load(table.weight + j);
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
int64_t largest_plane(const RegionArgs<T>& a) {
  int64_t most = 0;
  for (int64_t l = 0; l < a.L; ++l) most = std::max(most, a.levels[l].H * a.levels[l].W);
  return most;
}

// The rows [low, high) that the regions of a map read.
template <class T>
std::pair<int64_t, int64_t> rows_read(const Map<T>& map) {
  int64_t low = map.H, high = 0;
  for (auto* r = map.begin; r < map.end; ++r)
    if (r->y.low < r->y.high) {
      low = std::min<int64_t>(low, r->y.low);
      high = std::max<int64_t>(high, r->y.high);
    }
  return {std::min(low, high), high};
}

// pixels[n,width] to planes[c][n], c < count: planes lie `plane` apart.
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

// ---- NCHW by slices ----

// Whether the regions of the maps read so much that transposing those rows pays: measured, a pixel for each that is
// transposed. There must be work for all threads, as a slice is one thread's.
template <class T>
bool by_slices(const RegionArgs<T>& a, int64_t threads) {
  if (a.position_sensitive || a.L * a.N * (a.channels / kLanes<ComputeType<T>>) < threads) return false;
  int64_t read = 0, pixels = 0;
  for (int64_t m = 0; m < a.L * a.N; ++m) {
    const Map<T> map(a, m);
    const auto [low, high] = rows_read(map);
    pixels += (high - low) * map.W;
    for (auto* r = map.begin; r < map.end; ++r) read += int64_t{r->y.begin[a.PH]} * r->x.begin[a.PW];
  }
  return read > pixels;
}

// planes[c][n], c < count, to pixels[n,V]: planes lie `plane` apart. Missing channels are zero.
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

// For each tap of the columns the weighted sum, or the maximum, of the pixels of kRows rows; together with what is in
// `out` where there is `more`. A pixel is a vector.
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
      take<kMaximum>(result, read, weight[t]);
    }
    store(out + i * V, result);
  }
}

// An item is a vector of channels of a map, transposed to rows of channels once for all regions.
template <class T, bool kMaximum>
void forward_slices(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t most_plane = largest_plane(a);
  const TileSize size(a.PH, a.PW, 0, 0);
  const PlaneItems items(a.L * a.N, a.channels, V, threads, false);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* slice = scratch->template take<Compute>(most_plane * V);
    use_huge_pages(slice, most_plane * V * sizeof(Compute));
    Compute* combined = scratch->template take<Compute>(size.PW * a.most_taps_x * V);
    Compute* results = scratch->template take<Compute>(size.bins() * V);
    int64_t* rows = scratch->template take<int64_t>(size.PH * a.most_taps_y);
    int64_t* columns = scratch->template take<int64_t>(size.PW * a.most_taps_x);
    return [&, scratch, slice, combined, results, rows, columns](int64_t item) {
      const Map<T> map(a, item / items.blocks);
      const int64_t channel = item % items.blocks * V, count = std::min(V, a.channels - channel);
      const int64_t plane = map.H * map.W;
      const auto [low, high] = rows_read(map);
      transpose_planes(map.input + (map.image * a.channels + channel) * plane + low * map.W, (high - low) * map.W,
                       count, plane, slice);
      const Compute* top = slice - low * map.W * V;  // where the first row of the map would be
      for (auto* r = map.begin; r < map.end; ++r)
        for_each_tile(*r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
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
                take<kMaximum>(result, read, tile.x.weight[x]);
              }
              store(results + (ph * tile.PW + pw) * V, result);
            }
          }
          const int64_t bins = a.PH * a.PW;
          transpose_pixels(results, tile.PH * tile.PW, V, count, bins,
                           a.output + (r->k * a.channels + channel) * bins + tile.first);
        });
    };
  });
}

// ---- NCHW, gradients of boxes ----

// The transpose of a ColumnTable: for each column the bins of a row of a tile that read it. Entry j of column i is at
// [j * width + i]; where there is none, `used` is 0.
template <class Compute>
struct BinTable {
  int64_t width = 0, depth = 0;
  Int<Compute>*at, *used;
  Compute *weight, *slope_first, *slope_last;
  int32_t* count;

  BinTable(int64_t most_width, int64_t PW, Scratch& scratch)
      : at(scratch.take<Int<Compute>>(most_width * PW)),
        used(scratch.take<Int<Compute>>(most_width * PW)),
        weight(scratch.take<Compute>(most_width * PW)),
        slope_first(scratch.take<Compute>(most_width * PW)),
        slope_last(scratch.take<Compute>(most_width * PW)),
        count(scratch.take<int32_t>(most_width)) {}

  void fill(const AxisTaps<Compute>& x, int64_t PW, int64_t left, int64_t width_) {
    width = width_;
    depth = 0;
    std::fill_n(count, width, 0);
    for (int32_t tap = x.begin[0]; tap < x.begin[PW]; ++tap)
      depth = std::max<int64_t>(depth, ++count[x.pixel[tap] - left]);
    std::fill_n(at, depth * width, 0);
    std::fill_n(used, depth * width, 0);
    std::fill_n(weight, depth * width, Compute(0));
    std::fill_n(slope_first, depth * width, Compute(0));
    std::fill_n(slope_last, depth * width, Compute(0));
    std::fill_n(count, width, 0);
    for (int64_t pw = 0; pw < PW; ++pw)
      for (int32_t tap = x.begin[pw]; tap < x.begin[pw + 1]; ++tap) {
        const int64_t i = x.pixel[tap] - left, entry = count[i]++ * width + i;
        at[entry] = pw;
        used[entry] = -1;
        weight[entry] = x.weight[tap];
        slope_first[entry] = x.slope_first[tap];
        slope_last[entry] = x.slope_last[tap];
      }
  }
};

// The gradients of the bins of one row, looked up by number. kInRegister: there are no more than a vector holds.
template <class Compute, bool kInRegister>
struct BinRow {
  const Compute* p;
  Vec<Compute> all;
  explicit BinRow(const Compute* p) : p(p), all{} {
    if constexpr (kInRegister) all = load(p);
  }
  // Zero where not used, also where gradients are not finite.
  Vec<Compute> get(const BinTable<Compute>& table, int64_t entry) const {
    const VecInt<Compute> at = load_int<Compute>(table.at + entry);
    Vec<Compute> v;
    if constexpr (kInRegister)
      v = __builtin_shuffle(all, at);
    else
      v = gather(p, at);
    return load_int<Compute>(table.used + entry) ? v : Vec<Compute>{};
  }
};

// A plane's gradient: summed in place, or in memory of its own where sums are wider than what is stored.
template <class T>
class GradPlane {
 public:
  using Compute = ComputeType<T>;
  GradPlane(int64_t most, Scratch& scratch)
      : own_(std::is_same_v<T, Compute> ? nullptr : scratch.take<Compute>(most)) {}

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
  void finish() {
    if constexpr (!std::is_same_v<T, Compute>) convert(sums_, target_, size_);
  }

 private:
  Compute *own_, *sums_ = nullptr;
  T* target_ = nullptr;
  int64_t size_ = 0;
};

// Adds what some channels of a tile give to the gradient of its box. grads: room for a tile's bins and a vector more.
// noinline, because within the loops of its caller GCC keeps the pointers of the innermost one in memory.
template <class T, bool kInRegister, class Compute>
[[gnu::noinline]] void add_shares_of_tile(const RegionArgs<T>& a, int64_t k, const Map<T>& map,
                                          const BinTile<Compute>& tile, const BinTable<Compute>& table, int64_t left,
                                          int64_t channel, int64_t channel_end, Compute* grads, Compute* share) {
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
        // The gradient spread to columns, by weight and by its slopes; the rows combined, likewise.
        Vec<Compute> g = {}, g_first = {}, g_last = {}, f = {}, f_first = {}, f_last = {};
        for (int64_t j = i; j < table.depth * table.width; j += table.width) {
          const Vec<Compute> bin = row.get(table, j);
          g += bin * load(table.weight + j);
          g_first += bin * load(table.slope_first + j);
          g_last += bin * load(table.slope_last + j);
        }
        const VecInt<Compute> used = load_int<Compute>(table.used + i);
        for (int32_t tap = y.begin[ph]; tap < y.begin[ph + 1]; ++tap) {
          const Vec<Compute> read = load_before(first + y.pixel[tap] * map.W + i, tensor_end);
          const Vec<Compute> pixels = used ? read : Vec<Compute>{};
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
  share[0] += sum<Compute>(x_first);
  share[1] += sum<Compute>(y_first);
  share[2] += sum<Compute>(x_last);
  share[3] += sum<Compute>(y_last);
}

template <class T, bool kInRegister>
void mean_backward_boxes_planes(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t most_width = round_up(a.most_columns, V) + V;
  const TileSize size(a.PH, a.PW, 0, most_width);
  const PlaneItems items(a.L * a.N, a.channels, kChannelBlock, threads, true);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    BinTable<Compute> table(most_width, size.PW, *scratch);
    Compute* grads = scratch->template take<Compute>(size.bins() + V);
    return [&, scratch, table, grads](int64_t item) mutable {
      const int64_t part = item % items.parts, block = item / items.parts % items.blocks;
      const Map<T> map(a, item / items.parts / items.blocks);
      const int64_t channel = block * kChannelBlock, channel_end = std::min(channel + kChannelBlock, a.channels);
      const int64_t regions = map.end - map.begin;
      for (auto* r = map.begin + regions * part / items.parts; r < map.begin + regions * (part + 1) / items.parts;
           ++r) {
        Compute* share = a.box_shares + (block * a.K + r->k) * 4;
        std::fill_n(share, 4, Compute(0));
        for_each_tile(*r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const Columns columns(tile.x.low, tile.x.high, map.W, V);
          table.fill(tile.x, tile.PW, columns.left, columns.width);
          add_shares_of_tile<T, kInRegister>(a, r->k, map, tile, table, columns.left, channel, channel_end, grads,
                                             share);
        });
      }
    };
  });
}

// The taps of bin (ph, pw) of a region: f(pixel, y tap, x tap).
template <class Compute, class F>
inline void for_each_pixel(const Region<Compute>& r, int64_t ph, int64_t pw, int64_t map_width, F f) {
  for (int32_t y = r.y.begin[ph]; y < r.y.begin[ph + 1]; ++y)
    for (int32_t x = r.x.begin[pw]; x < r.x.begin[pw + 1]; ++x) f(r.y.pixel[y] * map_width + r.x.pixel[x], y, x);
}

// What a pixel, times the gradient of its bin, gives to the gradient of its box.
template <class Compute>
inline void add_share(const Region<Compute>& r, int32_t y, int32_t x, Compute value, Compute* share) {
  share[0] += value * (r.y.weight[y] * r.x.slope_first[x]);
  share[1] += value * (r.y.slope_first[y] * r.x.weight[x]);
  share[2] += value * (r.y.weight[y] * r.x.slope_last[x]);
  share[3] += value * (r.y.slope_last[y] * r.x.weight[x]);
}

// Position-sensitive, NCHW: a plane serves one bin of every region, so that a few single pixels are all there is to a
// result.
template <class T>
void mean_forward_planes_sensitive(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  const int64_t bins = a.PH * a.PW;
  const PlaneItems items(a.L * a.N, a.channels, kChannelBlock, threads, true);
  for_each_item(items.count, threads, [&] {
    return [&](int64_t item) {
      const int64_t part = item % items.parts, channel = item / items.parts % items.blocks * kChannelBlock;
      const Map<T> map(a, item / items.parts / items.blocks);
      const int64_t regions = map.end - map.begin;
      for (int64_t c = channel; c < std::min(channel + kChannelBlock, a.channels); ++c) {
        const int64_t ph = c % bins / a.PW, pw = c % a.PW;
        const T* plane = map.input + (map.image * a.channels + c) * map.H * map.W;
        for (auto* r = map.begin + regions * part / items.parts; r < map.begin + regions * (part + 1) / items.parts;
             ++r) {
          Compute sum = 0;
          for_each_pixel(*r, ph, pw, map.W, [&](int64_t pixel, int32_t y, int32_t x) {
            sum += static_cast<Compute>(plane[pixel]) * (r->y.weight[y] * r->x.weight[x]);
          });
          a.output[r->k * a.channels + c] = static_cast<T>(sum);
        }
      }
    };
  });
}

template <class T>
void mean_backward_planes_sensitive(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  const int64_t bins = a.PH * a.PW;
  const PlaneItems items(a.L * a.N, a.channels, 1, threads, false);
  const int64_t most_plane = largest_plane(a);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    GradPlane<T> plane(most_plane, *scratch);
    return [&, scratch, plane](int64_t item) mutable {
      const int64_t c = item % items.blocks, ph = c % bins / a.PW, pw = c % a.PW;
      const Map<T> map(a, item / items.blocks);
      if (map.grad_input == nullptr) return;
      const int64_t size = map.H * map.W;
      Compute* sum = plane.begin(map.grad_input + (map.image * a.channels + c) * size, size);
      for (auto* r = map.begin; r < map.end; ++r) {
        const Compute grad = static_cast<Compute>(a.grad_output[r->k * a.channels + c]);
        for_each_pixel(*r, ph, pw, map.W, [&](int64_t pixel, int32_t y, int32_t x) {
          sum[pixel] += grad * (r->y.weight[y] * r->x.weight[x]);
        });
      }
      plane.finish();
    };
  });
}

template <class T>
void mean_backward_boxes_planes_sensitive(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  const int64_t bins = a.PH * a.PW;
  const PlaneItems items(a.L * a.N, a.channels, kChannelBlock, threads, true);
  for_each_item(items.count, threads, [&] {
    return [&](int64_t item) {
      const int64_t part = item % items.parts, block = item / items.parts % items.blocks;
      const Map<T> map(a, item / items.parts / items.blocks);
      const int64_t regions = map.end - map.begin;
      for (auto* r = map.begin + regions * part / items.parts; r < map.begin + regions * (part + 1) / items.parts;
           ++r) {
        Compute* share = a.box_shares + (block * a.K + r->k) * 4;
        std::fill_n(share, 4, Compute(0));
        for (int64_t c = block * kChannelBlock; c < std::min((block + 1) * kChannelBlock, a.channels); ++c) {
          const int64_t ph = c % bins / a.PW, pw = c % a.PW;
          const T* plane = map.input + (map.image * a.channels + c) * map.H * map.W;
          const Compute grad = static_cast<Compute>(a.grad_output[r->k * a.channels + c]);
          for_each_pixel(*r, ph, pw, map.W, [&](int64_t pixel, int32_t y, int32_t x) {
            const Compute value = grad * static_cast<Compute>(plane[pixel]);
            add_share(*r, y, x, value, share);
          });
        }
      }
    };
  });
}

// The largest s with 2^s <= n, n > 0.
inline int64_t floor_log2(int64_t n) { return 63 - __builtin_clzll(static_cast<uint64_t>(n)); }

// The maximum over a bin's columns is that over two runs of 2^s columns that together cover them: runs of every such
// length are computed for all columns at once, by doubling, and a bin gathers two.
template <class T>
void maximum_forward_planes(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const PlaneItems items(a.L * a.N, a.channels, kChannelBlock, threads, true);
  const int64_t doublings = a.most_taps_x > 0 ? floor_log2(a.most_taps_x) : 0;
  const int64_t row_values = (doublings + 1) * (round_up(a.most_columns, V) + V);
  const TileSize size(a.PH, a.PW, row_values, 0);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* runs = scratch->template take<Compute>(size.PH * row_values + round_up<int64_t>(1 << doublings, V) + V);
    auto* first_at = scratch->template take<Int<Compute>>(round_up(size.bins(), V));
    auto* second_at = scratch->template take<Int<Compute>>(round_up(size.bins(), V));
    int64_t* offsets = scratch->template take<int64_t>(size.PH * a.most_taps_y);
    return [&, scratch, runs, first_at, second_at, offsets](int64_t item) {
      const int64_t part = item % items.parts, channel = item / items.parts % items.blocks * kChannelBlock;
      const Map<T> map(a, item / items.parts / items.blocks);
      const int64_t plane = map.H * map.W, channel_end = std::min(channel + kChannelBlock, a.channels);
      const T* tensor_end = map.input + a.N * a.channels * plane;
      const int64_t regions = map.end - map.begin;
      for (auto* r = map.begin + regions * part / items.parts; r < map.begin + regions * (part + 1) / items.parts; ++r)
        for_each_tile(*r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const auto& [y, x, PH, PW, first_bin] = tile;
          const Columns columns(x.low, x.high, map.W, V);
          const int64_t levels = x.most > 0 ? floor_log2(x.most) : 0, run = PH * columns.width;
          const int64_t bins = PH * PW, zero = (levels + 1) * run;
          row_offsets(y, PH, map.W, offsets);
          for (int64_t o = 0; o < round_up(bins, V); ++o) {
            const int64_t ph = o / PW, pw = o % PW;
            first_at[o] = second_at[o] = zero;
            if (o >= bins || y.begin[ph] == y.begin[ph + 1] || x.begin[pw] == x.begin[pw + 1]) continue;
            const int64_t n = x.begin[pw + 1] - x.begin[pw], level = floor_log2(n);
            const int64_t begin = level * run + ph * columns.width + x.pixel[x.begin[pw]] - columns.left;
            first_at[o] = begin;
            second_at[o] = begin + n - (1 << level);
          }
          for (int64_t c = channel; c < channel_end; ++c) {
            const T* first = map.input + (map.image * a.channels + c) * plane + columns.left;
            for (int64_t ph = 0; ph < PH; ++ph) {
              const int32_t tap = y.begin[ph];
              combine_rows<true>(first, tensor_end, offsets + (tap - y.begin[0]), y.weight + tap, y.begin[ph + 1] - tap,
                                 columns.width, runs + ph * columns.width);
            }
            for (int64_t level = 0; level < levels; ++level) {
              // Past the end a run is of no use, and nobody gathers it; but it must not be another thread's memory.
              for (int64_t i = 0; i < run; i += V) {
                const Vec<Compute> here = load(runs + level * run + i),
                                   there = load(runs + level * run + i + (1 << level));
                store(runs + (level + 1) * run + i, here > there ? here : there);
              }
            }
            store(runs + zero, Vec<Compute>{});
            T* out = a.output + (r->k * a.channels + c) * a.PH * a.PW + first_bin;
            for (int64_t o = 0; o < bins; o += V) {
              const Vec<Compute> one = gather(runs, load_int<Compute>(first_at + o));
              const Vec<Compute> two = gather(runs, load_int<Compute>(second_at + o));
              const Vec<Compute> most = one > two ? one : two;
              if (o + V <= bins)
                store(out + o, most);
              else
                store_first(out + o, most, bins - o);
            }
          }
        });
    };
  });
}

// Per column the maximum of rows and which of them has it first: -1 where none is more than -infinity, which no NaN is.
template <class T, class Compute>
inline void first_maxima(const T* first, const T* end, const int64_t* offset, int64_t count, int64_t width,
                         Compute* most, Int<Compute>* which) {
  const bool safe = count == 0 || first + offset[count - 1] + width <= end;
  for (int64_t i = 0; i < width; i += kLanes<Compute>) {
    Vec<Compute> best = broadcast(-std::numeric_limits<Compute>::infinity());
    VecInt<Compute> at = broadcast_int<Compute>(-1);
    for (int64_t t = 0; t < count; ++t) {
      const T* p = first + offset[t] + i;
      const Vec<Compute> read = safe ? load(p) : load_before(p, end);
      const VecInt<Compute> better = read > best;
      best = better ? read : best;
      at = better ? broadcast_int<Compute>(t) : at;
    }
    store(most + i, best);
    store_int<Compute>(which + i, at);
  }
}

// The gradient of a maximum goes to the first pixel, row by row, that has its value: of the columns of its bin that
// have it, the one that has it first.
template <class T>
void maximum_backward_planes(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>;
  const int64_t bins = a.PH * a.PW, most_plane = largest_plane(a);
  const TileSize size(a.PH, a.PW, 0, 0);
  const PlaneItems items(a.L * a.N, a.channels, 1, threads, false);
  for_each_item(items.count, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    GradPlane<T> grad_plane(most_plane, *scratch);
    const int64_t most_width = round_up(a.most_columns, V) + V;
    Compute* most = scratch->template take<Compute>(most_width + V);
    auto* which = scratch->template take<Int<Compute>>(most_width + V);
    Compute* pooled = scratch->template take<Compute>(size.bins());
    Compute* grads = scratch->template take<Compute>(size.bins());
    int64_t* offsets = scratch->template take<int64_t>(size.PH * a.most_taps_y);
    return [&, scratch, grad_plane, most, which, pooled, grads, offsets](int64_t item) mutable {
      const int64_t c = item % items.blocks;
      const Map<T> map(a, item / items.blocks);
      if (map.grad_input == nullptr) return;
      const int64_t plane = map.H * map.W;
      const T *origin = map.input + (map.image * a.channels + c) * plane, *end = origin + plane;
      Compute* sum = grad_plane.begin(map.grad_input + (map.image * a.channels + c) * plane, plane);
      for (auto* r = map.begin; r < map.end; ++r)
        for_each_tile(*r, a.PH, a.PW, size, [&](const BinTile<Compute>& tile) {
          const auto& [y, x, PH, PW, first_bin] = tile;
          const Columns columns(x.low, x.high, map.W, V);
          row_offsets(y, PH, map.W, offsets);
          convert(a.pooled + (r->k * a.channels + c) * bins + first_bin, pooled, PH * PW);
          convert(a.grad_output + (r->k * a.channels + c) * bins + first_bin, grads, PH * PW);
          for (int64_t ph = 0; ph < PH; ++ph) {
            const int64_t* rows = offsets + (y.begin[ph] - y.begin[0]);
            first_maxima(origin + columns.left, end, rows, y.begin[ph + 1] - y.begin[ph], columns.width, most, which);
            for (int64_t pw = 0; pw < PW; ++pw) {
              const int64_t count = x.begin[pw + 1] - x.begin[pw], o = ph * PW + pw;
              if (count == 0) continue;
              const int64_t left = x.pixel[x.begin[pw]] - columns.left;
              int64_t row = -1, column = 0;
              for (int64_t i = left; i < left + count; i += V) {
                // Of the lanes that are of the bin.
                unsigned equal = mask_bits<Compute>(load(most + i) == pooled[o]);
                if (left + count - i < V) equal &= (1u << (left + count - i)) - 1;
                for (; equal != 0; equal &= equal - 1) {
                  const int64_t at = i + __builtin_ctz(equal);
                  if (which[at] >= 0 && (row < 0 || which[at] < row)) {
                    row = which[at];
                    column = at;
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

// ---- channels_last ----

// Where pixels of a bin lie in a map, and their weights: all of them, or those of some rows where they are many.
template <class Compute>
struct PixelList {
  int64_t most;
  int64_t* offset;  // in elements
  Compute* weight;
  int64_t count = 0;

  PixelList(int64_t most_taps_y, int64_t most_taps_x, Scratch& scratch)
      : most(std::min(most_taps_y * most_taps_x, std::max<int64_t>(kMany, most_taps_x))),
        offset(scratch.take<int64_t>(most)),
        weight(scratch.take<Compute>(most)) {}

  // Calls f(first, last) with each list of the rows of taps [begin, end) of column pw of bins, of which there is one at
  // least; where it is the only one, these are constants. Pixel 0 of the map is at `origin`, a pixel takes `stride`
  // elements.
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
    if (int64_t{end - begin} * (x_end - x_begin) <= most) {
      fill(begin, end);
      f(std::true_type{}, std::true_type{});
      return;
    }
    const int64_t rows = most / (x_end - x_begin);
    for (int32_t y = begin, last; y < end; y = last) {
      last = static_cast<int32_t>(std::min<int64_t>(y + rows, end));
      fill(y, last);
      f(y == begin, last == end);
    }
  }

 private:
  static constexpr int64_t kMany = 2048;
};

// Calls f(c, n) for the channels in blocks: n vectors at c, the last of them moved back to end with the channels.
// Fewer channels than one vector are left to the caller: returns false.
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
    PixelList<Compute> pixels(a.most_taps_y, a.most_taps_x, *scratch);
    // Results of a bin so far, where its pixels are more than one list: those of the list before, and of this one.
    const int64_t kept = pixels.most < a.most_taps_y * a.most_taps_x ? a.out_channels : 0;
    Compute *before = scratch->template take<Compute>(kept), *after = scratch->template take<Compute>(kept);
    return [&, scratch, pixels, before, after](int64_t item) mutable {
      const Region<Compute>& r = a.regions[item];
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
          const auto one_channel = [&](int64_t c, int64_t of_pixel) {
            Compute result = first ? start : before[c];
            for (int64_t i = 0; i < count; ++i) {
              const Compute read = static_cast<Compute>(image[offset[i] + of_pixel]);
              take<kMaximum>(result, read, weight[i]);
            }
            if (last)
              out[c] = static_cast<T>(result);
            else
              after[c] = result;
          };
          const bool done =
              !a.position_sensitive && for_each_channel_block<Compute, 4>(a.channels, [&](int64_t c, auto vectors) {
                Vec<Compute> result[vectors.value];
                for (int v = 0; v < vectors.value; ++v) result[v] = first ? broadcast(start) : load(before + c + v * V);
                for (int64_t i = 0; i < count; ++i) {
                  const T* p = image + offset[i] + c;
                  for (int v = 0; v < vectors.value; ++v) {
                    const Vec<Compute> read = load(p + v * V);
                    take<kMaximum>(result[v], read, weight[i]);
                  }
                }
                for (int v = 0; v < vectors.value; ++v)
                  last ? store(out + c + v * V, result[v]) : store(after + c + v * V, result[v]);
              });
          for (int64_t c = 0; c < a.out_channels && !done; ++c) one_channel(c, a.position_sensitive ? c * bins + o : c);
          if (!last) std::swap(before, after);
        });
      }
    };
  });
}

// Rows [begin, end) of a map.
struct Band {
  int64_t map, begin, end;
};

// Of the maps that want a gradient, as many rows at a time as fit in cache where a pixel takes so many bytes.
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
int64_t most_pixels(const RegionArgs<T>& a, const std::vector<Band>& bands) {
  int64_t most = 0;
  for (const Band& band : bands) most = std::max(most, (band.end - band.begin) * Map<T>(a, band.map).W);
  return most;
}

// The taps [begin, end) of a bin that lie in the rows [low, high).
template <class Compute>
inline std::pair<int32_t, int32_t> taps_within(const AxisTaps<Compute>& y, int64_t ph, int64_t low, int64_t high) {
  int32_t begin = y.begin[ph], end = y.begin[ph + 1];
  while (begin < end && y.pixel[begin] < low) ++begin;
  while (begin < end && y.pixel[end - 1] >= high) --end;
  return {begin, end};
}

// Position-sensitive, channels_last: an output channel goes to one of the channels of a pixel for each bin.
template <class T>
void mean_backward_pixels_sensitive(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  const int64_t bins = a.PH * a.PW;
  const std::vector<Band> bands = bands_of(a, a.channels * sizeof(Compute));
  const int64_t most = most_pixels(a, bands) * a.channels;
  for_each_item(bands.size(), threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    GradPlane<T> plane(most, *scratch);
    Compute* grads = scratch->template take<Compute>(a.out_channels);
    return [&, scratch, plane, grads](int64_t item) mutable {
      const auto [m, low, high] = bands[item];
      const Map<T> map(a, m);
      const int64_t row = map.W * a.channels;
      Compute* sum = plane.begin(map.grad_input + (map.image * map.H + low) * row, (high - low) * row) - low * row;
      for (auto* r = map.begin; r < map.end; ++r)
        for (int64_t o = 0; o < bins; ++o) {
          const int64_t ph = o / a.PW, pw = o % a.PW;
          const auto [begin, end] = taps_within(r->y, ph, low, high);
          if (begin == end) continue;
          convert(a.grad_output + (r->k * bins + o) * a.out_channels, grads, a.out_channels);
          for (int32_t y = begin; y < end; ++y)
            for (int32_t x = r->x.begin[pw]; x < r->x.begin[pw + 1]; ++x) {
              Compute* p = sum + (r->y.pixel[y] * map.W + r->x.pixel[x]) * a.channels + o;
              for (int64_t c = 0; c < a.out_channels; ++c) p[c * bins] += r->y.weight[y] * r->x.weight[x] * grads[c];
            }
        }
      plane.finish();
    };
  });
}

// The gradients of n bins, from `first` on, for some channels, as rows of channels: transposed from the planes of
// grad_output. grads: [n,width].
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

// p[0..width) += grad[0..width) * weight for each pixel of a list, whole vectors.
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

// Either layout: an item is a band of rows of a map and some channels, summed as rows of channels in memory of its own.
template <class T, bool kChannelsLast>
void mean_backward(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>, kChannels = 64, kBins = 64;
  const int64_t bins = a.PH * a.PW, width = std::min(kChannels, round_up(a.channels, V));
  const int64_t blocks = ceil_div(a.channels, width);
  const std::vector<Band> bands = bands_of(a, width * sizeof(Compute));
  const int64_t most = most_pixels(a, bands);
  for_each_item(bands.size() * blocks, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* sums = scratch->template take<Compute>(most * width);
    Compute* grads = scratch->template take<Compute>(std::min(a.PW, kBins) * width);
    PixelList<Compute> pixels(a.most_taps_y, a.most_taps_x, *scratch);
    return [&, scratch, sums, grads, pixels](int64_t item) mutable {
      const auto [m, low, high] = bands[item / blocks];
      const Map<T> map(a, m);
      const int64_t channel = item % blocks * width, count = std::min(width, a.channels - channel);
      const int64_t first = low * map.W, n = (high - low) * map.W;
      std::fill_n(sums, n * width, Compute(0));
      for (auto* r = map.begin; r < map.end; ++r) {
        if (r->y.low >= high || r->y.high <= low) continue;
        for (int64_t ph = 0; ph < a.PH; ++ph) {
          const auto [begin, end] = taps_within(r->y, ph, low, high);
          if (begin == end) continue;
          for (int64_t left = 0; left < a.PW; left += kBins) {
            const int64_t some = std::min(a.PW - left, kBins), first_bin = ph * a.PW + left;
            if constexpr (kChannelsLast) {
              for (int64_t bin = 0; bin < some; ++bin) {
                convert(a.grad_output + (r->k * bins + first_bin + bin) * a.channels + channel, grads + bin * width,
                        count);
                std::fill_n(grads + bin * width + count, width - count, Compute(0));
              }
            } else {
              transpose_bins(a, r->k, first_bin, some, channel, count, width, grads);
            }
            for (int64_t bin = 0; bin < some; ++bin)
              pixels.visit(*r, begin, end, left + bin, map.W, -first * width, width,
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

// An item is some channels of a map: a maximum must be looked for from the first row of its bin on, which makes bands
// cost too much.
template <class T>
void maximum_backward_pixels(const RegionArgs<T>& a, int64_t threads) {
  using Compute = ComputeType<T>;
  constexpr int64_t V = kLanes<Compute>, kVectors = 4, kBlock = kVectors * V;
  constexpr bool kInPlace = std::is_same_v<T, Compute>;
  const int64_t bins = a.PH * a.PW, blocks = ceil_div(a.channels, kBlock), most_plane = largest_plane(a);
  for_each_item(a.L * a.N * blocks, threads, [&] {
    auto scratch = std::make_shared<Scratch>();
    Compute* own = scratch->template take<Compute>(kInPlace ? 0 : most_plane * std::min(kBlock, a.channels));
    return [&, scratch, own](int64_t item) {
      const Map<T> map(a, item / blocks);
      if (map.grad_input == nullptr) return;
      const int64_t plane = map.H * map.W, channel = item % blocks * kBlock;
      const int64_t n = std::min(kBlock, a.channels - channel), image = map.image * plane * a.channels + channel;
      const T *pixels = map.input + image, *end = map.input + a.N * plane * a.channels;
      T* target = map.grad_input + image;
      Compute* sums = own;
      if constexpr (kInPlace) sums = target;
      const int64_t stride = kInPlace ? a.channels : std::min(kBlock, a.channels);
      for (int64_t pixel = 0; pixel < plane; ++pixel) std::fill_n(sums + pixel * stride, n, Compute(0));
      for (auto* r = map.begin; r < map.end; ++r)
        for (int64_t o = 0; o < bins; ++o) {
          const int64_t output = (r->k * bins + o) * a.channels + channel, ph = o / a.PW, pw = o % a.PW;
          for (int64_t c = 0; c < n; c += V) {
            const int64_t some = std::min(V, n - c);
            const Vec<Compute> pooled = load_first(a.pooled + output + c, some);
            // Backwards, so that the first pixel is the last word.
            VecInt<Compute> found = broadcast_int<Compute>(-1);
            for (int32_t y = r->y.begin[ph + 1] - 1; y >= r->y.begin[ph]; --y)
              for (int32_t x = r->x.begin[pw + 1] - 1; x >= r->x.begin[pw]; --x) {
                const int64_t pixel = r->y.pixel[y] * map.W + r->x.pixel[x];
                found =
                    load_before(pixels + pixel * a.channels + c, end) == pooled ? broadcast_int<Compute>(pixel) : found;
              }
            found = pooled > -std::numeric_limits<Compute>::infinity() ? found : broadcast_int<Compute>(-1);
            for (int64_t j = 0; j < some; ++j)
              if (found[j] >= 0) sums[found[j] * stride + c + j] += static_cast<Compute>(a.grad_output[output + c + j]);
          }
        }
      if constexpr (!kInPlace)
        for (int64_t pixel = 0; pixel < plane; ++pixel) convert(sums + pixel * stride, target + pixel * a.channels, n);
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
    Compute* grads = scratch->template take<Compute>(a.out_channels);
    return [&, scratch, grads](int64_t item) {
      const Region<Compute>& r = a.regions[item];
      const Map<T> map(a, r.map);
      const T* image = map.input + map.image * map.H * map.W * a.channels;
      Compute* share = a.box_shares + r.k * 4;
      std::fill_n(share, 4, Compute(0));
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
          add_share(r, y, x, value, share);
        });
      }
    };
  });
}

}  // namespace

template <class T>
void region_mean_forward(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (channels_last)
    forward_pixels<T, false>(a, threads);
  else if (by_slices(a, threads))
    forward_slices<T, false>(a, threads);
  else if (a.position_sensitive)
    mean_forward_planes_sensitive(a, threads);
  else
    mean_forward_planes(a, threads);
}

template <class T>
void region_mean_backward(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (a.position_sensitive)
    channels_last ? mean_backward_pixels_sensitive(a, threads) : mean_backward_planes_sensitive(a, threads);
  else
    channels_last ? mean_backward<T, true>(a, threads) : mean_backward<T, false>(a, threads);
}

template <class T>
void region_mean_backward_boxes(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (channels_last)
    mean_backward_boxes_pixels(a, threads);
  else if (a.position_sensitive)
    mean_backward_boxes_planes_sensitive(a, threads);
  else if (a.PW <= kLanes<ComputeType<T>>)
    mean_backward_boxes_planes<T, true>(a, threads);
  else
    mean_backward_boxes_planes<T, false>(a, threads);
}

template <class T>
void region_maximum_forward(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (channels_last)
    forward_pixels<T, true>(a, threads);
  else if (by_slices(a, threads))
    forward_slices<T, true>(a, threads);
  else
    maximum_forward_planes(a, threads);
}

template <class T>
void region_maximum_backward(const RegionArgs<T>& a, bool channels_last, int64_t threads) {
  if (channels_last)
    maximum_backward_pixels(a, threads);
  else
    maximum_backward_planes(a, threads);
}

}  // namespace relops::RELOPS_ISA
