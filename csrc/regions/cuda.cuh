// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: the parameters of the
// kernels, and the description of the pixels that each bin of a box reads. taps.h explains how a box becomes taps.
//
// A first kernel describes the bins of every box once, in double. The kernels that read or write features compute
// weights from these descriptions in Compute, so that they contain no double arithmetic if the features are not
// float64. The positions in a description are relative to a pixel of the bin, so that their rounding errors grow with
// the width of the bin but not with the map.
#pragma once

#include <algorithm>
#include <limits>

#include "common/cuda/device.cuh"
#include "regions/problem.h"

namespace relops {

constexpr int kMaxRegionLevels = 16;  // limited, because the levels are passed as kernel parameters
constexpr int kRegionThreads = 256;
constexpr int kRegionWarps = kRegionThreads / 32;

// The pixels that a bin reads on one axis.
template <class Compute>
struct alignas(16) RegionBin {
  int first;      // kSampled: the pixel of the lowest sample; otherwise the first cell or pixel
  int count;      // number of samples (kSampled), cells (kPrecise) or pixels (kAveraged, kMaximum)
  Compute begin;  // position of the lowest sample (kSampled) or of the start of the bin (kPrecise), relative to `first`
  Compute step;   // distance between samples (kSampled), or the end of the bin relative to `first` (kPrecise)
};

// The part of a box that does not depend on the bin.
template <class Compute>
struct alignas(16) RegionBox {
  int map;                       // image * L + level, kReadsNothing or kNotInBatch
  int extent;                    // an upper bound for the rows and for the columns that a bin spans
  int top, bottom, left, right;  // the bounds, inclusive, of the pixels that the box reads
  Compute weight_y, weight_x;    // kSampled: the weight of a sample on each axis
};

constexpr int kReadsNothing = -1;  // the output is zero
constexpr int kNotInBatch = -2;    // the output is NaN, because a kernel cannot raise an error

template <class T_>
struct RegionParams {
  using T = T_;
  using Compute = ComputeType<T>;

  RegionSpec spec;
  int N, channels, out_channels, PH, PW, L;
  int64_t K;
  Compute canonical_box_size;  // spec.canonical_box_size, converted to the type of the boxes
  int finest;                  // number of the finest level
  const Compute* coordinates;  // [K,5], the argument `boxes` of the op
  RegionBox<Compute>* boxes;   // [K]
  RegionBin<Compute>* bins;    // [K,PH + PW], the rows of bins first
  RegionLevel<T> levels[kMaxRegionLevels];

  // These tensors are [K,out_channels,PH,PW] in the layout of the input.
  T* output;             // forward pass only
  const T* grad_output;  // backward pass only; region_gather_kernel may read another layout
};

// Returns the level that box k reads if its coordinates are finite. Returns kReadsNothing or kNotInBatch if the box
// reads nothing.
template <class T>
__device__ inline int region_level(const RegionParams<T>& p, int64_t k) {
  const auto* box = p.coordinates + 5 * k;
  const auto image = region_image(box[0]);
  if (!(image >= 0 && image < p.N)) return kNotInBatch;
  for (int i = 1; i < 5; ++i)
    if (!isfinite(box[i])) return kReadsNothing;
  if (p.L == 1) return 0;
  return region_level(box[1], box[2], box[3], box[4], p.canonical_box_size, p.spec.canonical_level, p.finest, p.L);
}

// Returns the x or y axis of box k.
template <class T>
__device__ inline RegionAxis region_axis(const RegionParams<T>& p, int level, int64_t k, bool is_x) {
  const auto* box = p.coordinates + 5 * k + (is_x ? 1 : 2);
  const RegionLevel<T>& map = p.levels[level];
  return region_axis(p.spec, box[0], box[2], map.scale, is_x ? map.W : map.H, is_x ? p.PW : p.PH);
}

// Describes a bin. If the bin is empty, `first` is the pixel that is nearest to it.
template <class Compute>
__device__ inline RegionBin<Compute> describe_bin(const RegionAxis& axis, int bin) {
  const auto nearest_pixel = [&](double x) {
    return x > 0 ? static_cast<int>(x < axis.size - 1 ? x : axis.size - 1) : 0;
  };
  const double start = axis.start + bin * axis.bin;
  switch (axis.kind) {
    case RegionKind::kSampled: {
      const RegionBin<Compute> empty{nearest_pixel(start), 0, 0, 0};
      if (!(axis.grid >= 1)) return empty;
      // Samples that are more than one pixel outside of the map are left out.
      const double step = axis.bin / axis.grid;
      const auto position = [&](double i) { return start + (i + 0.5) * step; };
      const auto outside = [&](double i) { return !(position(i) >= -1 && position(i) <= axis.size); };
      double from = 0, to = axis.grid - 1;
      if (step != 0) {
        // To allow for rounding, the range is first one sample longer on either side than the division gives.
        const double a = (-1 - start) / step - 0.5, b = (axis.size - start) / step - 0.5;
        from = clamped(floor(a < b ? a : b) - 1, 0, axis.grid);
        to = clamped(ceil(a < b ? b : a) + 1, -1, axis.grid - 1);
        // Above 2^53, neighboring positions round to the same number, so `to` needs another bound.
        const double max_count = ceil((axis.size + 1) / (step < 0 ? -step : step)) + 5;
        to = to < from + max_count ? to : from + max_count;
      }
      for (int i = 0; i < 3 && from <= to && outside(from); ++i) ++from;
      for (int i = 0; i < 3 && from <= to && outside(to); ++i) --to;
      if (!(from <= to) || outside(from)) return empty;
      const double lowest = position(step < 0 ? to : from);
      const int pixel = nearest_pixel(lowest), count = static_cast<int>(clamped(to - from + 1, 1, 1 << 30));
      return {pixel, count, static_cast<Compute>(lowest - pixel), static_cast<Compute>(step < 0 ? -step : step)};
    }
    case RegionKind::kPrecise: {
      const double end = start + axis.bin;
      if (!(axis.bin > 0 && end > start)) return {nearest_pixel(start), 0, 0, 0};
      const int first = static_cast<int>(clamped(floor(start), -1, axis.size));
      const int last = static_cast<int>(clamped(ceil(end), -1, axis.size));
      // A shorter bin is made longer, because its ends might be equal in Compute.
      constexpr double kShortest = 2 * std::numeric_limits<Compute>::epsilon();
      double from = start - first, to = end - first;
      if (to - from < kShortest) {
        from = clamped(from, 0, last - first - kShortest);
        to = from + kShortest;
      }
      return {first, last - first, static_cast<Compute>(from), static_cast<Compute>(to)};
    }
    case RegionKind::kAveraged:
    case RegionKind::kMaximum:
      break;
  }
  const PixelRange range = pixel_range<Compute>(axis, bin);
  return {range.begin, range.end > range.begin ? range.end - range.begin : 0, 0, 0};
}

// Returns the position of a sample relative to the first pixel of the bin. All code computes it in this way, so that
// all agree on the pixels that the bin reads.
template <class Compute>
__device__ __forceinline__ Compute sample_position(const RegionBin<Compute>& bin, int sample, int size) {
  const Compute x = fma(static_cast<Compute>(sample), bin.step, bin.begin);
  const Compute last = static_cast<Compute>(size - 1 - bin.first);
  // The bilinear surface is constant outside of the centers of the outermost pixels.
  return x > 0 ? (x < last ? x : last) : 0;
}

// Returns the pixel that decides to which tile a bin belongs. It ascends or descends with the index of the bin.
template <class Compute>
__device__ __forceinline__ int own_pixel(const RegionBin<Compute>& bin, int size) {
  return max(min(bin.first, size - 1), 0);
}

// Returns the last pixel that a bin reads, or its own pixel if it is empty.
template <class Compute>
__device__ __forceinline__ int last_pixel(RegionKind kind, const RegionBin<Compute>& bin, int size) {
  if (bin.count == 0) return own_pixel(bin, size);
  int last = bin.first + bin.count - 1;
  if (kind == RegionKind::kSampled) last = bin.first + static_cast<int>(sample_position(bin, bin.count - 1, size)) + 1;
  if (kind == RegionKind::kPrecise) ++last;
  return min(last, size - 1);
}

// Returns a / b. The quotient of floats is accurate to 2 units in the last place, and takes no branch.
__device__ __forceinline__ float approximate_quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double approximate_quotient(double a, double b) { return a / b; }

// Calls tap(pixel - low, weight) for the pixels in [low, low + count) that the bin reads, as for_each_tap in taps.h
// does. sample_weight is RegionBox::weight_y or weight_x.
template <class Compute, class Tap>
__device__ __forceinline__ void for_each_weight(RegionKind kind, const RegionBin<Compute>& bin, Compute sample_weight,
                                                int size, int low, int count, Tap tap) {
  const int first = bin.first - low;
  const auto visit = [&](int offset, Compute weight) {
    if (static_cast<unsigned>(offset) < static_cast<unsigned>(count)) tap(offset, weight);
  };
  switch (kind) {
    case RegionKind::kSampled: {
      int sample = 0, end = bin.count;
      if (bin.step > 0) {
        // Only samples that may read the pixels are visited. To allow for rounding, the range is one sample longer on
        // either side than the division gives.
        const Compute nearest = approximate_quotient(static_cast<Compute>(-1 - first) - bin.begin, bin.step) - 1;
        const Compute farthest = approximate_quotient(static_cast<Compute>(count - first) - bin.begin, bin.step) + 2;
        if (nearest > 0) sample = nearest < end ? static_cast<int>(nearest) : end;
        if (farthest < end) end = farthest > 0 ? static_cast<int>(farthest) : 0;
      }
#pragma unroll 1
      for (; sample < end; ++sample) {
        const Compute position = sample_position(bin, sample, size);
        const int pixel = static_cast<int>(position);
        const Compute right = (position - pixel) * sample_weight;
        visit(first + pixel, sample_weight - right);
        visit(first + pixel + 1, right);
      }
      return;
    }
    case RegionKind::kPrecise: {
      const Compute scale = approximate_quotient(Compute(1), bin.step - bin.begin);
#pragma unroll 1
      for (int cell = max(0, -1 - first); cell < min(bin.count, count - first); ++cell) {
        const Compute from = bin.begin > cell ? bin.begin : static_cast<Compute>(cell);
        const Compute to = bin.step < cell + 1 ? bin.step : static_cast<Compute>(cell + 1);
        const Compute part = (to - from) * scale, right = part * ((from + to) / 2 - cell);
        visit(first + cell, part - right);
        visit(first + cell + 1, right);
      }
      return;
    }
    case RegionKind::kAveraged:
    case RegionKind::kMaximum: {
      const Compute weight =
          kind == RegionKind::kMaximum ? Compute(1) : approximate_quotient(Compute(1), static_cast<Compute>(bin.count));
#pragma unroll 1
      for (int i = max(0, -first); i < min(bin.count, count - first); ++i) tap(first + i, weight);
      return;
    }
  }
}

// Describes all boxes, with one warp per box.
template <class P>
__global__ __launch_bounds__(kRegionThreads) void region_bins_kernel(const __grid_constant__ P p) {
  using Compute = typename P::Compute;
  const int lane = threadIdx.x % 32, lines = p.PH + p.PW;
  const int64_t k = int64_t{blockIdx.x} * kRegionWarps + threadIdx.x / 32;
  if (k >= p.K) return;
  const int level = region_level(p, k), H = p.levels[max(level, 0)].H, W = p.levels[max(level, 0)].W;
  RegionBox<Compute> box{level, 0, H, -1, W, -1, 0, 0};
  for (int i = lane; i < lines && level >= 0; i += 32) {
    const bool is_x = i >= p.PH;
    const RegionAxis axis = region_axis(p, level, k, is_x);
    const RegionBin<Compute> bin = describe_bin<Compute>(axis, is_x ? i - p.PH : i);
    const int own = own_pixel(bin, axis.size), last = last_pixel(axis.kind, bin, axis.size);
    p.bins[k * lines + i] = bin;
    box.extent = max(box.extent, last - own + 1);
    (is_x ? box.left : box.top) = min(is_x ? box.left : box.top, own);
    (is_x ? box.right : box.bottom) = max(is_x ? box.right : box.bottom, last);
  }
  box.extent = group_max(box.extent, 32);
  box.top = -group_max(-box.top, 32);
  box.bottom = group_max(box.bottom, 32);
  box.left = -group_max(-box.left, 32);
  box.right = group_max(box.right, 32);
  if (lane != 0) return;
  if (level >= 0) {
    box.map = H > 0 && W > 0 ? static_cast<int>(region_image(p.coordinates[5 * k])) * p.L + level : kReadsNothing;
    box.weight_y = static_cast<Compute>(1 / region_axis(p, level, k, false).grid);
    box.weight_x = static_cast<Compute>(1 / region_axis(p, level, k, true).grid);
  }
  p.boxes[k] = box;
}

template <class T>
RegionParams<T> make_region_params(const RegionProblem& p) {
  const int64_t L = p.levels.size(), limit = 2147483647;
  STD_TORCH_CHECK(L <= kMaxRegionLevels, p.spec.op, ": there must be at most ", kMaxRegionLevels,
                  " levels on CUDA, got ", L);
  STD_TORCH_CHECK(p.N * L <= limit && p.C <= limit && p.K <= limit, p.spec.op,
                  ": N times the number of levels, C and K must be at most 2^31 - 1");
  const int64_t outputs = p.out_channels() * p.PH * p.PW;
  STD_TORCH_CHECK(outputs < 1 << 30, p.spec.op, ": a box must have fewer than 2^30 outputs, got ", outputs);
  RegionParams<T> a{};
  a.spec = p.spec;
  a.N = static_cast<int>(p.N);
  a.channels = static_cast<int>(p.C);
  a.out_channels = static_cast<int>(p.out_channels());
  a.PH = static_cast<int>(p.PH);
  a.PW = static_cast<int>(p.PW);
  a.L = static_cast<int>(L);
  a.K = p.K;
  a.canonical_box_size = static_cast<ComputeType<T>>(p.spec.canonical_box_size);
  a.finest = p.finest();
  a.coordinates = static_cast<const ComputeType<T>*>(p.boxes.const_data_ptr());
  for (int64_t l = 0; l < L; ++l) a.levels[l] = p.level<T>(l);
  return a;
}

// Describes the boxes, and sets the pointers to the descriptions. The caller must keep the returned memory.
template <class T>
Tensor describe_boxes(const RegionProblem& problem, RegionParams<T>& p, cudaStream_t stream) {
  using Compute = ComputeType<T>;
  const int64_t boxes = p.K * sizeof(RegionBox<Compute>), lines = int64_t{p.PH} + p.PW;
  const Tensor memory = torch::stable::new_empty(
      problem.boxes, {boxes + p.K * lines * static_cast<int64_t>(sizeof(RegionBin<Compute>))}, ScalarType::Byte);
  p.boxes = static_cast<RegionBox<Compute>*>(memory.mutable_data_ptr());
  p.bins = reinterpret_cast<RegionBin<Compute>*>(p.boxes + p.K);
  if (p.K == 0) return memory;
  const unsigned blocks = grid_size(problem.spec.op, ceil_div(p.K, kRegionWarps));
  region_bins_kernel<RegionParams<T>><<<blocks, kRegionThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return memory;
}

// Accumulates a pixel into a weighted sum or a maximum. The maximum ignores NaN, as in torchvision.
template <bool kMaximum, class Compute>
__device__ __forceinline__ void accumulate(Compute& result, Compute pixel, Compute weight) {
  if constexpr (kMaximum)
    result = pixel > result ? pixel : result;
  else
    result += pixel * weight;
}

template <bool kMaximum, class Compute>
__device__ __forceinline__ Compute initial_value(bool empty) {
  return kMaximum && !empty ? -static_cast<Compute>(INFINITY) : Compute(0);
}

constexpr int kMaxExtent = 15;  // a bin that spans more rows or columns is not computed from tiles

// Computes the outputs of the boxes whose bins span at most kMaxExtent rows and columns, on NCHW maps.
template <class T>
void region_forward_tiles(const RegionProblem& problem, const RegionParams<T>& p, cudaStream_t stream);

// Fills the gradients of the levels that need one.
void region_backward_input(const RegionProblem& p, const Tensor& grad_output, const Tensor* output,
                           cudaStream_t stream);

// Computes the gradient of the boxes.
void region_backward_boxes(const RegionProblem& p, const Tensor& grad_output, const Tensor& grad_boxes,
                           cudaStream_t stream);

}  // namespace relops
