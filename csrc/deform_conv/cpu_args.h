// deform_conv2d on the CPU: the tiles of output pixels into which the work is divided, and the sizes of the arrays that
// a thread uses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/cpu/work.h"
#include "deform_conv/problem.h"

namespace relops {

constexpr int64_t kTilePixels = 128;        // the largest number of output pixels in a tile
constexpr int64_t kTileTaps = 32;           // the largest number of taps that are processed together
constexpr int64_t kTileDepth = 288;         // channels x taps that are processed together, if the kernel is not larger
constexpr int64_t kMaxChannels = 128;       // the largest number of channels that are processed together
constexpr int64_t kBoxBytes = 512 << 10;    // the largest copy of the pixels that a tile reads
constexpr int64_t kPartialBytes = 2 << 20;  // the size of the partial gradients of offsets and masks

// A rectangle of output pixels of image n. Its pixels are numbered row by row.
struct DeformTile {
  int64_t n, row, column, rows, columns;
  int64_t pixels() const { return rows * columns; }
};

// The division of the output maps into tiles of similar size.
struct DeformTiles {
  DeformTiles(const DeformConvSizes& z, int64_t lanes, int64_t max_pixels) : N(z.N), Ho(z.Ho), Wo(z.Wo) {
    // The cost of a tile is its number of whole vectors, plus a fraction of the pixels that its samples read. Narrow
    // tiles read many pixels that belong to their neighbors.
    double best = 0;
    const int64_t min_across = ceil_div(Wo, max_pixels);
    for (int64_t across = min_across; across < min_across + 64 && across <= Wo; ++across) {
      const int64_t width = ceil_div(Wo, across), max_height = std::min(Ho, max_pixels / width);
      const int64_t height = ceil_div(Ho, ceil_div(Ho, max_height));
      const int64_t count = ceil_div(Ho, height) * ceil_div(Wo, width);
      const double read = static_cast<double>(height * z.stride_h + z.kh * z.dilation_h + 2) *
                          static_cast<double>(width * z.stride_w + z.kw * z.dilation_w + 2);
      const double cost = count * (round_up(height * width, lanes) + 0.02 * read);
      if (best == 0 || cost < best) best = cost, rows = height, columns = width;
    }
    down = ceil_div(Ho, rows), across = ceil_div(Wo, columns);
    count = N * down * across;
  }

  DeformTile at(int64_t i) const {
    const int64_t row = i / across % down * rows, column = i % across * columns;
    return {i / (down * across), row, column, std::min(rows, Ho - row), std::min(columns, Wo - column)};
  }

  int64_t N, Ho, Wo, rows, columns, down, across, count;
};

// Tiles [first, first + count), which the backward pass processes together.
struct DeformBand {
  int64_t first, count;
};

// Taps [first, first + count) of the kernel. Large kernels are processed in several ranges of taps.
struct TapRange {
  int64_t first, count;
};

inline std::vector<TapRange> tap_ranges(int64_t taps) {
  std::vector<TapRange> ranges;
  const int64_t parts = ceil_div(taps, kTileTaps);
  for (int64_t first = 0; first < taps; first += ceil_div(taps, parts))
    ranges.push_back({first, std::min(ceil_div(taps, parts), taps - first)});
  return ranges;
}

// Returns the number of channels that are processed together with `taps` taps.
inline int64_t tile_channels(int64_t taps, int64_t lanes) {
  return std::clamp<int64_t>(kTileDepth / taps / lanes * lanes, lanes, kMaxChannels);
}

// Returns the largest number of channels x taps that are processed together.
inline int64_t max_depth(const std::vector<TapRange>& ranges, int64_t lanes) {
  int64_t depth = 0;
  for (const TapRange& taps : ranges) depth = std::max(depth, tile_channels(taps.count, lanes) * taps.count);
  return depth;
}

// Returns the largest number of channels of a part of the backward pass. Smaller parts keep more threads busy, but
// every part copies the gradient of the output. Parts must not depend on the number of threads, because sums over parts
// do.
inline int64_t part_channels(int64_t taps, int64_t lanes) {
  return std::clamp<int64_t>(kTileDepth / 2 / taps / lanes * lanes, lanes, 32);
}

// Channels [first, first + count) of a group of the weight. Their samples begin at channel `sampled` of those that are
// processed together.
struct GroupChannels {
  int64_t group, first, count, sampled;
};

// A range of channels that belong to the same group of the weight and to the same offset group.
struct DeformPart {
  int64_t first, channels, group, offset_group;
};

// Divides the channels into parts, and the parts into lists of at most max_parts parts that are processed together.
inline std::vector<std::vector<DeformPart>> deform_parts(const DeformConvSizes& z, int64_t max_channels,
                                                         int64_t max_parts) {
  std::vector<std::vector<DeformPart>> lists;
  for (int64_t c = 0; c < z.C;) {
    const int64_t group = c / z.group_inputs, offset_group = c / z.offset_channels;
    const int64_t end = std::min((group + 1) * z.group_inputs, (offset_group + 1) * z.offset_channels);
    const int64_t channels = ceil_div(end - c, ceil_div(end - c, max_channels));
    if (lists.empty() || static_cast<int64_t>(lists.back().size()) == max_parts) lists.emplace_back();
    lists.back().push_back({c, channels, group, offset_group});
    c += channels;
  }
  return lists;
}

}  // namespace relops
