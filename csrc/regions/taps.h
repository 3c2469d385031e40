// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align: the arithmetic that converts a box
// to weights of pixels. The CPU and CUDA kernels share it.
//
// Every region op except roi_pool computes a weighted mean of the pixels of each bin. The mean is taken over a grid of
// bilinear samples (roi_align, ps_roi_align, multi_scale_roi_align), over the bilinear surface in a rectangle
// (prroi_pool), or over the pixels of a rectangle (ps_roi_pool). In all cases, the weight of a pixel is the product of
// one factor for its row and one for its column, so the two axes of a box are described separately. On each axis, a bin
// has a few pixels with weights, which are called its taps. roi_pool computes the maximum over a rectangle, and its
// taps only tell which pixels are in the rectangle.
//
// Taps are computed in double for every type of features, because there are few of them and boxes may be huge. (On
// CUDA, only the position of each bin is computed in double, see cuda.cuh.) The exceptions are the number of samples
// and the edges that are rounded to pixels: they are computed in Compute, the type of the boxes. The computation of
// these values follows torchvision step by step, so the results are the same in torchvision, on the CPU and on CUDA.
#pragma once

#include "common/host_device.h"

namespace relops {

enum class RegionKind {
  kSampled,   // mean over a grid of bilinear samples
  kPrecise,   // integral of the bilinear surface
  kAveraged,  // mean over a rectangle of pixels
  kMaximum,   // maximum over a rectangle of pixels
};

// The differences between the region ops: how a box is converted to weights, and which channels and which level it
// reads.
struct RegionSpec {
  const char* op;  // in error messages
  RegionKind kind;
  bool aligned = false;    // kSampled: pixel centers are at half integers, and boxes are not widened to one pixel
  int sampling_ratio = 0;  // kSampled: samples per bin and axis; if <= 0, the number of pixels of the bin, rounded up
  bool position_sensitive = false;  // output channel c of bin b reads input channel c * bins + b
  double canonical_box_size = 1;    // in pyramids, a square box with sides of this length reads level canonical_level
  int canonical_level = 0;
};

// The largest sampling_ratio that is accepted; it bounds the loops over samples.
constexpr int kMaxSamplingRatio = 65536;

// Returns the number of the image to which a batch index refers. The caller must check that the number is in [0,N). An
// index within 2^-10 of an integer is rounded to that integer, so a numerical derivative may perturb the index. Other
// indices are truncated toward zero, as in torchvision. NaN and infinities are returned unchanged.
template <class Compute>
RELOPS_HOST_DEVICE Compute region_image(Compute index) {
  const Compute nearest = round(index), distance = index - nearest;
  return distance >= Compute(-1.0 / 1024) && distance <= Compute(1.0 / 1024) ? nearest : trunc(index);
}

// A box on one axis of a feature map. The axis has `size` pixels, and the box is divided into `bins` bins.
struct RegionAxis {
  RegionKind kind;
  int size, bins;
  double start, bin;     // the beginning of bin 0 and the length of a bin, in pixels
  double grid;           // kSampled: samples per bin
  double scale;          // pixels of the map per unit of box coordinates
  bool widened = false;  // kSampled: the box was widened to one pixel, so the derivative of its length is 0
};

// Returns the RegionAxis of a box that extends from `first` to `last`, which must be finite.
template <class Compute>
RELOPS_HOST_DEVICE RegionAxis region_axis(const RegionSpec& spec, Compute first, Compute last, double scale, int size,
                                          int bins) {
  RegionAxis axis{spec.kind, size, bins, 0, 0, 0, scale};
  const Compute begin = product(first, static_cast<Compute>(scale)), end = product(last, static_cast<Compute>(scale));
  if (spec.kind == RegionKind::kSampled) {
    const double offset = spec.aligned ? 0.5 : 0.0;
    Compute length = (end - static_cast<Compute>(offset)) - (begin - static_cast<Compute>(offset));
    axis.start = static_cast<double>(first) * scale - offset;
    double exact_length = static_cast<double>(last) * scale - offset - axis.start;
    if (!spec.aligned && exact_length < 1) {
      axis.widened = true;
      exact_length = 1;
    }
    if (!spec.aligned && length < 1) length = 1;
    axis.bin = exact_length / bins;
    axis.grid =
        spec.sampling_ratio > 0 ? spec.sampling_ratio : ceil(static_cast<double>(length / static_cast<Compute>(bins)));
    if (!isfinite(axis.grid)) axis.grid = ceil(axis.bin);  // the length overflowed Compute
  } else if (spec.kind == RegionKind::kPrecise) {
    axis.start = static_cast<double>(first) * scale;
    axis.bin = (static_cast<double>(last) * scale - axis.start) / bins;
  } else {
    const Compute from = round(begin), to = round(end);
    Compute length = to - from + (spec.kind == RegionKind::kMaximum ? 1 : 0);
    if (!(length >= 1)) length = 1;
    axis.start = from;
    axis.bin = length / static_cast<Compute>(bins);  // rounded to Compute, like the edges computed from it
  }
  return axis;
}

// Returns x limited to [low, high], or low if x is NaN.
RELOPS_HOST_DEVICE inline double clamped(double x, double low, double high) {
  return x > low ? (x < high ? x : high) : low;
}

// The pixels [begin, end) of a bin, for kAveraged and kMaximum.
struct PixelRange {
  int begin, end;
};

template <class Compute>
RELOPS_HOST_DEVICE PixelRange pixel_range(const RegionAxis& axis, int bin) {
  const Compute length = static_cast<Compute>(axis.bin), start = static_cast<Compute>(axis.start);
  // The mean (ps_roi_pool) omits the last row and the last column of the map, as torchvision's forward pass does.
  const double limit = axis.kind == RegionKind::kMaximum ? axis.size : axis.size - 1;
  const Compute begin = floor(product(static_cast<Compute>(bin), length)) + start;
  const Compute end = ceil(product(static_cast<Compute>(bin + 1), length)) + start;
  return {static_cast<int>(clamped(begin, 0, limit < 0 ? 0 : limit)),
          static_cast<int>(clamped(end, 0, limit < 0 ? 0 : limit))};
}

// Calls tap(pixel, weight, slope_first, slope_last) for the pixels in [low, high] that the bin reads. The samples or
// cells of the bin are visited in ascending order, and tap is called for up to two neighboring pixels of each sample or
// cell. If tap is called several times for a pixel, its weights and slopes must be added up. The slopes are the
// derivatives of the weight with respect to the first and the last coordinate of the box. low and high must be at least
// 0 and less than axis.size.
template <class Compute, class Tap>
RELOPS_HOST_DEVICE void for_each_tap(const RegionAxis& axis, int bin, int low, int high, Tap tap) {
  switch (axis.kind) {
    case RegionKind::kSampled: {
      if (!(axis.grid >= 1) || axis.size < 1) return;
      const double step = axis.bin / axis.grid, first = axis.start + bin * axis.bin;
      // Only samples that may read the pixels [low, high] are visited. A sample may be up to one pixel outside of the
      // map.
      const double nearest = low - 1, farthest = high + 1;
      double from = 0, count = axis.grid;
      if (step != 0) {
        // To allow for rounding, the range is one sample longer on either side than the division gives. The loop checks
        // each sample.
        const double a = (nearest - first) / step - 0.5, b = (farthest - first) / step - 0.5;
        from = clamped(floor(a < b ? a : b) - 1, 0, axis.grid);
        const double to = clamped(ceil(a < b ? b : a) + 1, -1, axis.grid - 1);
        // Above 2^53, neighboring positions round to the same number, so `count` needs another bound.
        const double max_count = ceil((farthest - nearest) / (step < 0 ? -step : step)) + 5;
        count = to - from + 1 < max_count ? to - from + 1 : max_count;
      }
      for (int j = 0; j < count; ++j) {
        const double i = step < 0 ? from + count - 1 - j : from + j;  // positions must ascend
        double position = first + (i + 0.5) * step;
        if (!(position >= -1 && position <= axis.size)) continue;
        // The bilinear surface is constant outside of the centers of the outermost pixels.
        const bool inside = position > 0 && position < axis.size - 1;
        position = clamped(position, 0, axis.size - 1);
        const int pixel = static_cast<int>(position);
        const double fraction = position - pixel, weight = 1 / axis.grid;
        const double relative = axis.widened ? 0 : (bin + (i + 0.5) / axis.grid) / axis.bins;  // position in the box
        const double slope = inside ? weight * axis.scale : 0;
        if (pixel >= low && pixel <= high)
          tap(pixel, (1 - fraction) * weight, -slope * (1 - relative), -slope * relative);
        if (pixel + 1 >= low && pixel + 1 <= high)
          tap(pixel + 1, fraction * weight, slope * (1 - relative), slope * relative);
      }
      return;
    }
    case RegionKind::kPrecise: {
      if (!(axis.bin > 0)) return;
      const double a = axis.start + bin * axis.bin, b = a + axis.bin, length = b - a;
      if (!(length > 0)) return;  // with a huge start, rounding made the length 0
      const int begin = static_cast<int>(clamped(floor(a), low - 1, high + 1));
      const int end = static_cast<int>(clamped(ceil(b), low - 1, high + 1));
      // The next values are the derivatives of the bin's ends a and b with respect to the first and last coordinate of
      // the box.
      const double a_last = axis.scale * bin / axis.bins, a_first = axis.scale - a_last;
      const double b_last = axis.scale * (bin + 1) / axis.bins, b_first = axis.scale - b_last;
      for (int cell = begin; cell < end; ++cell) {
        const double from = a > cell ? a : cell, to = b < cell + 1 ? b : cell + 1;
        const double part = (to - from) / length, middle = (from + to) / 2 - cell;
        for (int right = 0; right < 2; ++right) {
          const int pixel = cell + right;
          if (pixel < low || pixel > high) continue;
          const double weight = part * (right ? middle : 1 - middle);
          double slope_a = weight / length, slope_b = -weight / length;
          if (from == a) slope_a -= (right ? a - cell : 1 - (a - cell)) / length;
          if (to == b) slope_b += (right ? b - cell : 1 - (b - cell)) / length;
          tap(pixel, weight, slope_a * a_first + slope_b * b_first, slope_a * a_last + slope_b * b_last);
        }
      }
      return;
    }
    case RegionKind::kAveraged:
    case RegionKind::kMaximum: {
      const PixelRange range = pixel_range<Compute>(axis, bin);
      const double weight = axis.kind == RegionKind::kMaximum ? 1 : 1.0 / (range.end - range.begin);
      const int begin = range.begin > low ? range.begin : low, end = range.end <= high ? range.end : high + 1;
      for (int pixel = begin; pixel < end; ++pixel) tap(pixel, weight, 0.0, 0.0);
      return;
    }
  }
}

// Returns the index of the level that a box reads, according to eq. 1 of Feature Pyramid Networks
// (https://arxiv.org/abs/1612.03144), computed as in torchvision. There are `levels` levels, and the first has scale
// 2^-finest.
template <class Compute>
RELOPS_HOST_DEVICE int region_level(Compute x1, Compute y1, Compute x2, Compute y2, Compute canonical_box_size,
                                    int canonical_level, int finest, int levels) {
  const Compute area = product(x2 - x1, y2 - y1);
  const Compute side = sqrt(area > 0 ? area : 0);
  const Compute level =
      floor(static_cast<Compute>(canonical_level) + log2(side / canonical_box_size) + static_cast<Compute>(1e-6));
  return static_cast<int>(clamped(level - finest, 0, levels - 1));
}

}  // namespace relops
