// local_relation on the CPU: the positions of windows in lines of memory, and the division of the work. The kernels
// need both in addition to LocalRelationArgs (problem.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/cpu/work.h"
#include "local_relation/problem.h"

namespace relops {

// The positions, in lines of memory, of the columns that taps read. On the map, the taps of neighboring outputs are
// `stride` pixels apart. The phase of a column is the column modulo the stride. A line of memory holds the columns of a
// row of the map in parts, one for each phase. Within a part, the taps of neighboring outputs are therefore adjacent.
// All lines are padded with zeros on both sides, so that every tap can read whole vectors.
struct WindowColumns {
  // If phase is -1, no output has this tap on the map. Otherwise output w reads column w + shift of this phase.
  struct Tap {
    int64_t phase, part, shift;
  };
  struct Part {
    int64_t phase, columns;
  };

  WindowColumns(int64_t W, int64_t Wo, int64_t k, int64_t stride, int64_t dilation, int64_t lanes)
      : width(round_up(Wo, lanes)) {
    int64_t min_shift = 0, max_shift = 0;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t offset = dilation * (i - k / 2);
      const int64_t phase = (offset % stride + stride) % stride, shift = (offset - phase) / stride;
      const int64_t first = std::max<int64_t>(-shift, 0), last = std::min(Wo - 1, (W - 1 - phase) / stride - shift);
      if (phase >= W || first > last) {
        taps.push_back({-1, 0, 0});
        continue;
      }
      int64_t part = 0;
      while (part < static_cast<int64_t>(parts.size()) && parts[part].phase != phase) ++part;
      if (part == static_cast<int64_t>(parts.size())) parts.push_back({phase, (W - 1 - phase) / stride + 1});
      taps.push_back({phase, part, shift});
      min_shift = std::min(min_shift, shift);
      max_shift = std::max(max_shift, shift);
    }
    left = -min_shift;
    part_size = round_up(left + max_shift + width, lanes);
    line = part_size * parts.size();
    output_left = round_up(max_shift, lanes);
    output_line = round_up(output_left + width - min_shift, lanes);
    for (int64_t w = 0; w < width; w += lanes) {
      bool inside = true;
      for (const Tap& tap : taps)
        if (tap.phase >= 0) inside = inside && w + tap.shift >= 0 && w + lanes + tap.shift <= parts[tap.part].columns;
      inside_map.push_back(inside);
    }
  }

  // Returns the position in a line of inputs that output 0 reads with this tap.
  int64_t input_at(const Tap& tap) const { return tap.part * part_size + left + tap.shift; }
  // Returns the position, in a line of outputs, of the output that reads column 0 of the phase with this tap.
  int64_t output_at(const Tap& tap) const { return output_left - tap.shift; }

  int64_t width;  // length of a row of outputs, rounded up to whole vectors
  std::vector<Tap> taps;
  std::vector<Part> parts;
  std::vector<bool> inside_map;  // per vector of outputs: whether all taps are on the map
  int64_t left, part_size, line, output_left, output_line;
};

// The rows of the map that the windows of output row ho read, and the output rows that read a given row of the map.
struct WindowRows {
  int64_t H, Ho, k, stride, dilation;

  int64_t tap(int64_t ho, int64_t i) const { return stride * ho + dilation * (i - k / 2); }
  int64_t begin(int64_t ho) const { return std::max<int64_t>(tap(ho, 0), 0); }
  int64_t end(int64_t ho) const { return std::min(tap(ho, k - 1) + 1, H); }
  int64_t max_inputs() const { return std::min(dilation * (k - 1) + 1, H); }

  // Returns the output row that reads row y with tap i, or -1.
  int64_t output(int64_t y, int64_t i) const {
    const int64_t at = y - dilation * (i - k / 2);
    return at >= 0 && at % stride == 0 && at / stride < Ho ? at / stride : -1;
  }
  // The output rows that read row y are between first_output(y) and last_output(y). With a stride, it is possible that
  // no output row reads row y.
  int64_t first_output(int64_t y) const {
    return ceil_div(std::max<int64_t>(y - dilation * (k - 1 - k / 2), 0), stride);
  }
  int64_t last_output(int64_t y) const { return std::min((y + dilation * (k / 2)) / stride, Ho - 1); }
  int64_t max_outputs() const { return std::min(dilation * (k - 1) / stride + 1, Ho); }
};

// The division of the work into strips of output rows and bundles of groups. A strip also owns the input rows from
// `stride` times its first output row up to the first input row of the next strip. The division, and therefore the
// result of sums over strips, does not depend on the number of threads.
struct LocalRelationItems {
  template <class T>
  explicit LocalRelationItems(const LocalRelationArgs<T>& a, const WindowRows& rows)
      : Ho(a.Ho), H(a.H), stride(a.stride), G(a.G) {
    // If the channels of a pixel are adjacent, the groups of a cache line are processed together.
    constexpr int64_t kCacheLine = 64;
    const bool has_adjacent_channels = a.value.w_stride != 1;
    bundle =
        has_adjacent_channels ? std::clamp<int64_t>(kCacheLine / (a.m * static_cast<int64_t>(sizeof(T))), 1, G) : 1;
    bundles = ceil_div(G, bundle);
    // Strips have a minimum height, because each strip recomputes the values that it shares with its neighbors.
    constexpr int64_t kEnoughItems = 32, kMinRows = 8;
    const int64_t max_strips = std::max<int64_t>(Ho / std::max(kMinRows, 2 * rows.max_outputs()), 1);
    strips = std::clamp<int64_t>(ceil_div(kEnoughItems, a.N * bundles), 1, max_strips);
    strip_rows = ceil_div(Ho, strips);
    strips = ceil_div(Ho, strip_rows);
    count = a.N * strips * bundles;
  }

  struct Item {
    int64_t n, strip, g, g_end, begin, end;
  };
  // Neighboring groups have consecutive item numbers, because their channels may be adjacent in memory.
  Item at(int64_t i) const {
    Item item;
    item.g = i % bundles * bundle;
    item.g_end = std::min(item.g + bundle, G);
    item.strip = i / bundles % strips;
    item.n = i / bundles / strips;
    item.begin = item.strip * strip_rows;
    item.end = std::min(item.begin + strip_rows, Ho);
    return item;
  }
  int64_t input_begin(const Item& item) const { return item.begin * stride; }
  int64_t input_end(const Item& item) const { return item.end == Ho ? H : item.end * stride; }

  int64_t Ho, H, stride, G, bundle, bundles, strips, strip_rows, count;
};

}  // namespace relops
