// deform_conv2d on the CPU: the positions of the samples of a tile, and the pixels that they read.
//
// The pixels that the samples of a tile read are first copied to rows of memory. A row holds some channels of a pixel,
// converted to the compute type. The rows fit into the cache, and a sample reads whole vectors of channels from them,
// whatever the memory format and the dtype of the map. Usually, the rows hold the box that contains all these pixels.
// If offsets are so large that the box does not fit, the rows hold the four corners of every sample of one tap instead.
// Row 0 is zero, and corners outside of the map read this row.
#ifndef RELOPS_DEFORM_CONV_SAMPLES
#define RELOPS_DEFORM_CONV_SAMPLES

#include "common/cpu/simd.h"
#include "deform_conv/cpu_args.h"

namespace relops::RELOPS_ISA {

namespace {

// The length of a line, which holds a number for every pixel of a tile. It is not a power of two, because otherwise a
// column of a matrix of lines would occupy only a few sets of the L1 cache.
template <class Compute>
constexpr int64_t kTileLine = kTilePixels + 2 * kLanes<Compute>;

// Calls f(p, row, column, count) for the pixels of a tile, which are divided into parts of a row of at most V pixels. p
// is the number of the first pixel in the tile.
template <class F>
inline void for_row_parts(const DeformTile& tile, int64_t V, F f) {
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t c = 0; c < tile.columns; c += V)
      f(r * tile.columns + c, tile.row + r, tile.column + c, std::min(V, tile.columns - c));
}

// Copies n <= 2 kSize elements in two blocks, which may overlap. Unlike a memcpy of variable size, this takes no call.
template <int64_t kSize, class T>
inline void copy_few(const T* from, T* to, int64_t n) {
  if (n >= kSize) {
    std::memcpy(to, from, kSize * sizeof(T));
    std::memcpy(to + n - kSize, from + n - kSize, kSize * sizeof(T));
  } else if constexpr (kSize > 1) {
    copy_few<kSize / 2>(from, to, n);
  }
}

// Converts n elements. Neither array needs to have more of them, so the last vector overlaps with the one before it.
template <class To, class From>
inline void copy_row(const From* from, To* to, int64_t n) {
  using Compute = ComputeType<To>;
  constexpr int64_t V = kLanes<Compute>;
  if (n >= V) {
    for (int64_t i = 0; i < n; i += V) store(to + std::min(i, n - V), load(from + std::min(i, n - V)));
  } else if constexpr (std::is_same_v<To, From>) {
    copy_few<V / 2>(from, to, n);
  } else {
    store_first(to, load_first(from, n), n);
  }
}

// Copies some channels of a tile of a map to lines [channels,kTileLine], and fills up the lines with zeros.
template <class T, class Compute = ComputeType<T>>
inline void load_tile(const Map<const T>& map, const DeformTile& tile, int64_t channel, int64_t channels,
                      Compute* lines) {
  constexpr int64_t V = kLanes<Compute>, L = kTileLine<Compute>;
  for (int64_t c = 0; c < channels; ++c) std::fill_n(lines + c * L + tile.pixels(), L - tile.pixels(), Compute(0));
  if (map.w_stride == 1) {
    const T* const first = map.at(tile.n, channel, tile.row, tile.column);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < tile.rows; ++r)
        copy_row(first + c * map.c_stride + r * map.h_stride, lines + c * L + r * tile.columns, tile.columns);
    return;
  }
  for_row_parts(tile, V, [&](int64_t p, int64_t y, int64_t x, int64_t count) {
    for (int64_t c = 0; c < channels; c += V) {
      Vec<Compute> block[V];
      for (int64_t i = 0; i < V; ++i)
        block[i] = i < count ? load_first(map.at(tile.n, channel + c, y, x + i), channels - c) : Vec<Compute>{};
      transpose<Compute>(block);
      for (int64_t i = 0; i < std::min(V, channels - c); ++i) store_first(lines + (c + i) * L + p, block[i], count);
    }
  });
}

// Converts n elements of a line. The line has at least V elements.
template <class T, class Compute = ComputeType<T>>
inline void store_row(const Compute* from, T* to, int64_t n) {
  constexpr int64_t V = kLanes<Compute>;
  if (std::is_same_v<T, Compute> || n >= V) {
    copy_row(from, to, n);
  } else {
    alignas(RELOPS_VECTOR_BYTES) T few[V];
    store(few, load(from));
    copy_few<V / 2>(few, to, n);
  }
}

// Copies lines [channels,kTileLine] to all channels of a tile of a map.
template <class T, class Compute = ComputeType<T>>
inline void store_tile(const Map<T>& map, const DeformTile& tile, int64_t channels, const Compute* lines) {
  constexpr int64_t V = kLanes<Compute>, L = kTileLine<Compute>;
  if (map.w_stride == 1) {
    T* const first = map.at(tile.n, 0, tile.row, tile.column);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < tile.rows; ++r)
        store_row(lines + c * L + r * tile.columns, first + c * map.c_stride + r * map.h_stride, tile.columns);
    return;
  }
  for_row_parts(tile, V, [&](int64_t p, int64_t y, int64_t x, int64_t count) {
    for (int64_t c = 0; c < channels; c += V) {
      Vec<Compute> block[V];
      for (int64_t i = 0; i < V; ++i) block[i] = c + i < channels ? load(lines + (c + i) * L + p) : Vec<Compute>{};
      transpose<Compute>(block);
      for (int64_t i = 0; i < count; ++i) store_first(map.at(tile.n, c, y, x + i), block[i], std::min(V, channels - c));
    }
  });
}

// Copies or adds numbers of the map to or from a row of memory, vector by vector.
template <class T, class Compute = ComputeType<T>>
inline void load_channels(const T* p, int64_t c_stride, int64_t channels, int64_t padded, Compute* row) {
  constexpr int64_t V = kLanes<Compute>;
  if (c_stride == 1) {
    for (int64_t c = 0; c < padded; c += V) store(row + c, load_first(p + c, channels - c));
  } else {
    for (int64_t c = 0; c < channels; ++c) row[c] = static_cast<Compute>(p[c * c_stride]);
    std::fill(row + channels, row + padded, Compute(0));
  }
}
template <class Compute>
inline void add_channels(Compute* p, int64_t c_stride, int64_t channels, const Compute* row) {
  for (int64_t c = 0; c < channels; ++c) p[c * c_stride] += row[c];
}

// The samples of some taps, for the pixels of a tile and the channels of an offset group. All arrays have a line per
// tap. The padding at the end of a line consists of samples that read row 0.
template <class T>
class DeformSamples {
 public:
  using Compute = ComputeType<T>;
  using Index = Int<Compute>;
  static constexpr int64_t V = kLanes<Compute>, L = kTileLine<Compute>;
  static constexpr int64_t kMaxRowElements = kBoxBytes / sizeof(Compute);

  // Channels are processed in multiples of channel_step, which must be a multiple of V.
  DeformSamples(const DeformConvArgs<T>& a, int64_t channel_step, Scratch& scratch)
      : a_(a), channel_step_(channel_step) {
    const int64_t size = std::min(a.taps, kTileTaps) * L;
    for (Index** line : {&top_, &left_}) *line = scratch.allocate<Index>(size);
    for (Compute** line : {&fraction_y, &fraction_x, &mask}) *line = scratch.allocate<Compute>(size);
    for (Index** line : {&origin_y_, &origin_x_}) *line = scratch.allocate<Index>(L);
    for (Compute** line : {&offset_y_, &offset_x_}) *line = scratch.allocate<Compute>(L);
    corners_ = scratch.allocate<Index>(4 * size);
    weights_ = scratch.allocate<Compute>(4 * size);
  }

  // Computes the samples, and chooses the number of channels that are processed together. If kMasked, the weights of
  // the corners include the mask.
  template <bool kMasked>
  void describe(const DeformTile& tile, int64_t offset_group, TapRange taps) {
    tile_ = tile;
    padded = round_up(tile.pixels(), V);
    for_row_parts(tile, 1, [&](int64_t p, int64_t row, int64_t column, int64_t) {
      origin_y_[p] = static_cast<Index>(a_.tap_row(row, 0));
      origin_x_[p] = static_cast<Index>(a_.tap_column(column, 0));
    });
    Range y_range, x_range;
    for (int64_t t = 0; t < taps.count; ++t) {
      const int64_t tap = taps.first + t, channel = offset_group * a_.taps + tap;
      read_line(a_.offset, 2 * channel, offset_y_);
      read_line(a_.offset, 2 * channel + 1, offset_x_);
      if (a_.mask.data != nullptr)
        read_line(a_.mask, channel, mask + t * L);
      else
        std::fill_n(mask + t * L, tile.pixels(), Compute(1));
      for (int64_t p = tile.pixels(); p < padded; ++p) {
        offset_y_[p] = -std::numeric_limits<Compute>::infinity();  // not on the map
        origin_y_[p] = origin_x_[p] = 0;
        offset_x_[p] = mask[t * L + p] = 0;
      }
      // These are integers, because float does not represent all steps: they may be larger than the map.
      const Index step_y = static_cast<Index>(tap / a_.kw * a_.dilation_h);
      const Index step_x = static_cast<Index>(tap % a_.kw * a_.dilation_w);
      for (int64_t p = 0; p < padded; p += V) {
        const int64_t i = t * L + p;
        const VecInt<Compute> row = load_int<Compute>(origin_y_ + p) + step_y;
        const VecInt<Compute> column = load_int<Compute>(origin_x_ + p) + step_x;
        const Vec<Compute> y = __builtin_convertvector(row, Vec<Compute>) + load(offset_y_ + p);
        const Vec<Compute> x = __builtin_convertvector(column, Vec<Compute>) + load(offset_x_ + p);
        const VecInt<Compute> inside =
            (y > -1) & (y < static_cast<Compute>(a_.H)) & (x > -1) & (x < static_cast<Compute>(a_.W));  // false for NaN
        const VecInt<Compute> top = floor_inside(y, inside, fraction_y + i, top_ + i);
        const VecInt<Compute> left = floor_inside(x, inside, fraction_x + i, left_ + i);
        y_range.add(inside, top);
        x_range.add(inside, left);
      }
    }
    place_box(y_range, x_range, tile_channels(taps.count, channel_step_));
    for (int64_t t = 0; t < taps.count; ++t)
      for (int64_t p = 0; p < padded; p += V) set_corners<kMasked>(t, p);
  }

  // Copies the pixels that the samples read to `rows`. If the rows hold the corners of samples, only those of tap t.
  void load_rows(int64_t t, int64_t channel, int64_t channels, Compute* rows) const {
    const int64_t width = max_channels;
    std::fill_n(rows, width, Compute(0));
    if (!has_box) {
      for_corners(t, [&](int64_t y, int64_t x, int64_t corner) {
        load_channels(a_.input.at(tile_.n, channel, y, x), a_.input.c_stride, channels, width, rows + corner);
      });
    } else if (a_.input.w_stride == 1) {
      for_blocks<true>(channels, [&](int64_t y, int64_t x, int64_t count, int64_t c, int64_t row) {
        const T* const p = a_.input.at(tile_.n, channel + c, y, x);
        Vec<Compute> block[V];
        if (count == V && channels - c >= V) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < V; ++i) block[i] = load(p + i * a_.input.c_stride);
        } else {
          for (int64_t i = 0; i < V; ++i)
            block[i] = c + i < channels ? load_first(p + i * a_.input.c_stride, count) : Vec<Compute>{};
        }
        transpose<Compute>(block);
        for (int64_t i = 0; i < count; ++i) store(rows + (row + i) * width + c, block[i]);
      });
    } else {
      for_pixels([&](int64_t y, int64_t x, int64_t row) {
        load_channels(a_.input.at(tile_.n, channel, y, x), a_.input.c_stride, channels, width, rows + row * width);
      });
    }
  }

  // Adds the rows to the gradient of the input. This is the inverse of load_rows.
  void add_rows(int64_t t, int64_t channel, int64_t channels, const Compute* rows) const {
    const int64_t width = max_channels;
    const Map<Compute>& grad = a_.grad_input;
    if (!has_box) {
      for_corners(t, [&](int64_t y, int64_t x, int64_t corner) {
        add_channels(grad.at(tile_.n, channel, y, x), grad.c_stride, channels, rows + corner);
      });
    } else if (grad.w_stride == 1) {
      for_blocks<false>(channels, [&](int64_t y, int64_t x, int64_t count, int64_t c, int64_t row) {
        Vec<Compute> block[V];
        for (int64_t i = 0; i < V; ++i) block[i] = i < count ? load(rows + (row + i) * width + c) : Vec<Compute>{};
        transpose<Compute>(block);
        for (int64_t i = 0; i < std::min(V, channels - c); ++i) {
          Compute* const p = grad.at(tile_.n, channel + c + i, y, x);
          if (count == V)
            store(p, load(p) + block[i]);
          else
            for (int64_t j = 0; j < count; ++j) p[j] += block[i][j];
        }
      });
    } else {
      for_pixels([&](int64_t y, int64_t x, int64_t row) {
        add_channels(grad.at(tile_.n, channel, y, x), grad.c_stride, channels, rows + row * width);
      });
    }
  }

  // Return lines [4,L] of tap t: the elements in `rows` at which the corners (top left, top right, bottom left, bottom
  // right) begin, and the weights of the corners.
  const Index* corners(int64_t t) const { return corners_ + 4 * t * L; }
  const Compute* weights(int64_t t) const { return weights_ + 4 * t * L; }

  int64_t padded;        // pixels of the tile, rounded up to whole vectors
  bool has_box;          // whether the rows hold a box, or the corners of the samples of one tap
  int64_t row_count;     // number of rows
  int64_t max_channels;  // number of channels per row, a multiple of V
  Compute *fraction_y, *fraction_x, *mask;

 private:
  // The range of the first pixels of samples on one axis.
  struct Range {
    VecInt<Compute> low = broadcast_int<Compute>(kMaxDeformSize), high = broadcast_int<Compute>(-2);
    void add(VecInt<Compute> inside, VecInt<Compute> first) {
      low = inside & (first < low) ? first : low;
      high = inside & (first > high) ? first : high;
    }
    // Sets the first pixel on the axis that samples read and the number of pixels. Without samples, the latter is 0.
    void read(int64_t size, int64_t& begin, int64_t& count) const {
      Index first = low[0], last = high[0];
      for (int64_t j = 1; j < V; ++j) first = std::min(first, low[j]), last = std::max(last, high[j]);
      begin = std::max<int64_t>(first, 0);
      count = std::max<int64_t>(std::min<int64_t>(last + 1, size - 1) - begin + 1, 0);
    }
  };

  void read_line(const Map<const Compute>& map, int64_t channel, Compute* line) const {
    for (int64_t r = 0; r < tile_.rows; ++r) {
      const Compute* const from = map.at(tile_.n, channel, tile_.row + r, tile_.column);
      for (int64_t c = 0; c < tile_.columns; ++c) line[r * tile_.columns + c] = from[c * map.w_stride];
    }
  }

  // Stores and returns the integer part of a position, and stores its fraction. Positions that are not inside get the
  // integer part -2, so no corner of the sample is on the map.
  static VecInt<Compute> floor_inside(Vec<Compute> position, VecInt<Compute> inside, Compute* fraction, Index* low) {
    position = inside ? position : broadcast(Compute(0));
    VecInt<Compute> floor = __builtin_convertvector(position, VecInt<Compute>);
    floor += __builtin_convertvector(floor, Vec<Compute>) > position;  // true is -1
    store(fraction, position - __builtin_convertvector(floor, Vec<Compute>));
    floor = inside ? floor : broadcast_int<Compute>(-2);
    store_int<Compute>(low, floor);
    return floor;
  }

  void place_box(const Range& y_range, const Range& x_range, int64_t channels) {
    y_range.read(a_.H, y_, height_);
    x_range.read(a_.W, x_, width_);
    if (height_ == 0 || width_ == 0) height_ = width_ = 0;
    row_count = 1 + height_ * width_;
    has_box = row_count <= kMaxRowElements / channel_step_;
    if (!has_box) row_count = 1 + 4 * padded;
    max_channels = std::min(channels, kMaxRowElements / row_count / channel_step_ * channel_step_);
  }

  template <bool kMasked>
  void set_corners(int64_t t, int64_t p) {
    const int64_t i = t * L + p;
    const VecInt<Compute> top = load_int<Compute>(top_ + i), left = load_int<Compute>(left_ + i);
    const Index H = static_cast<Index>(a_.H), W = static_cast<Index>(a_.W), width = static_cast<Index>(width_);
    const VecInt<Compute> on_map_y[2] = {top >= 0, (top + 1 >= 0) & (top + 1 < H)};
    const VecInt<Compute> on_map_x[2] = {left >= 0, (left + 1 >= 0) & (left + 1 < W)};
    const VecInt<Compute> inside = top >= -1;  // the row of a position that is not may overflow
    const VecInt<Compute> first =
        has_box ? (inside & (top - static_cast<Index>(y_))) * width + (inside & (left - static_cast<Index>(x_)))
                : lanes<Compute>([](Index j) { return 4 * j; }) + static_cast<Index>(4 * p);
    const Index step_y = has_box ? width : 2;
    const Vec<Compute> y = load(fraction_y + i), x = load(fraction_x + i), scale = load(mask + i);
    for (int k = 0; k < 4; ++k) {
      const VecInt<Compute> row = first + (1 + (k / 2) * step_y + k % 2);
      store_int<Compute>(corners_ + (4 * t + k) * L + p, on_map_y[k / 2] & on_map_x[k % 2]
                                                             ? row * static_cast<Index>(max_channels)
                                                             : VecInt<Compute>{});
      const Vec<Compute> weight = (k / 2 == 0 ? 1 - y : y) * (k % 2 == 0 ? 1 - x : x);
      store(weights_ + (4 * t + k) * L + p, kMasked ? weight * scale : weight);
    }
  }

  // Calls f(y, x, index) for the corners of the samples of tap t that are on the map.
  template <class F>
  void for_corners(int64_t t, F f) const {
    for (int64_t p = 0; p < tile_.pixels(); ++p)
      for (int k = 0; k < 4; ++k) {
        const Index corner = corners(t)[k * L + p];
        if (corner != 0) f(top_[t * L + p] + k / 2, left_[t * L + p] + k % 2, corner);
      }
  }

  // Calls f(y, x, row) for the pixels of the box.
  template <class F>
  void for_pixels(F f) const {
    for (int64_t y = 0, row = 1; y < height_; ++y)
      for (int64_t x = 0; x < width_; ++x, ++row) f(y_ + y, x_ + x, row);
  }

  // Calls f(y, x, count, c, row) for blocks of up to V pixels of the box and of V channels, beginning with channel c.
  // If kOverlap, the last block of a row may overlap with the one before it, so that both are whole vectors.
  template <bool kOverlap, class F>
  void for_blocks(int64_t channels, F f) const {
    for (int64_t c = 0; c < channels; c += V)
      for (int64_t y = 0; y < height_; ++y)
        for (int64_t begin = 0; begin < width_; begin += V) {
          const int64_t x = kOverlap && width_ >= V ? std::min(begin, width_ - V) : begin;
          f(y_ + y, x_ + x, std::min(V, width_ - x), c, 1 + y * width_ + x);
        }
  }

  const DeformConvArgs<T>& a_;
  int64_t channel_step_;
  DeformTile tile_;
  int64_t y_, x_, height_, width_;  // the box
  Index *top_, *left_, *corners_, *origin_y_, *origin_x_;
  Compute *weights_, *offset_y_, *offset_x_;
};

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
