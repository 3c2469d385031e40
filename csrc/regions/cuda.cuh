// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: code that the kernels of
// the forward and the backward pass share. taps.h explains how a box becomes taps.
#pragma once

#include <algorithm>

#include "common/cuda/device.cuh"
#include "regions/problem.h"

namespace relops {

constexpr int kMaxRegionLevels = 16;  // limited, because the levels are passed as kernel parameters
constexpr int kRegionThreads = 256;
constexpr int kRegionWarps = kRegionThreads / 32;

template <class T_>
struct RegionParams {
  using T = T_;
  using Compute = ComputeType<T>;

  RegionSpec spec;
  int N, channels, out_channels, PH, PW, L;
  int64_t K;
  Compute canonical_box_size;  // spec.canonical_box_size, converted to the type of the boxes
  int finest;                  // number of the finest level
  int max_taps_y, max_taps_x;  // upper bounds for the number of taps of a region on each axis
  const Compute* boxes;        // [K,5]
  RegionLevel<T> levels[kMaxRegionLevels];

  // These tensors are [K,out_channels,PH,PW] in the layout of the input.
  T* output;             // forward pass only
  const T* grad_output;  // backward pass only
  const int* argmax;     // backward pass of roi_pool only: the pixel y * W + x of each maximum, or -1
};

// Returns an upper bound for the number of taps of a region on an axis of `size` pixels. Neighboring bins have at most
// two pixels in common.
inline int64_t max_taps(const RegionSpec& spec, int64_t size, int64_t bins) {
  const int64_t any = size + 2 * bins;
  return spec.kind == RegionKind::kSampled && spec.sampling_ratio > 0
             ? std::min(any, bins * std::min<int64_t>(size, 2 * spec.sampling_ratio))
             : any;
}

template <class T>
RegionParams<T> make_region_params(const RegionProblem& p) {
  using Compute = ComputeType<T>;
  const int64_t L = p.levels.size(), limit = 2147483647;
  STD_TORCH_CHECK(L <= kMaxRegionLevels, p.spec.op, ": there must be at most ", kMaxRegionLevels,
                  " levels on CUDA, got ", L);
  STD_TORCH_CHECK(p.N <= limit && p.C <= limit, p.spec.op, ": N and C must be at most 2^31 - 1");
  RegionParams<T> a{};
  a.spec = p.spec;
  a.N = static_cast<int>(p.N);
  a.channels = static_cast<int>(p.C);
  a.out_channels = static_cast<int>(p.out_channels());
  a.PH = static_cast<int>(p.PH);
  a.PW = static_cast<int>(p.PW);
  a.L = static_cast<int>(L);
  a.K = p.K;
  a.canonical_box_size = static_cast<Compute>(p.spec.canonical_box_size);
  a.finest = p.finest();
  a.boxes = static_cast<const Compute*>(p.boxes.const_data_ptr());
  int64_t taps_y = 0, taps_x = 0;
  for (int64_t l = 0; l < L; ++l) {
    a.levels[l] = p.level<T>(l);
    taps_y = std::max(taps_y, max_taps(p.spec, a.levels[l].H, p.PH));
    taps_x = std::max(taps_x, max_taps(p.spec, a.levels[l].W, p.PW));
  }
  a.max_taps_y = static_cast<int>(std::min(taps_y, limit));
  a.max_taps_x = static_cast<int>(std::min(taps_x, limit));
  return a;
}

// The level and the image that a box reads, and whether the box is valid.
struct RegionSource {
  int level, image;
  bool finite;    // if false, the result is zero
  bool in_batch;  // if false, the result is NaN, because a kernel cannot raise an error

  __device__ bool readable() const { return in_batch && finite; }
};

template <class T>
__device__ inline RegionSource region_source(const RegionParams<T>& p, int64_t k) {
  const auto* box = p.boxes + 5 * k;
  const auto image = region_image(box[0]);
  RegionSource from{0, 0, true, image >= 0 && image < p.N};
  for (int i = 1; i < 5; ++i) from.finite = from.finite && isfinite(box[i]);
  if (from.in_batch) from.image = static_cast<int>(image);
  if (from.finite && p.L > 1)
    from.level =
        region_level(box[1], box[2], box[3], box[4], p.canonical_box_size, p.spec.canonical_level, p.finest, p.L);
  return from;
}

// Returns the x or y axis of box k.
template <class T>
__device__ inline RegionAxis region_axis(const RegionParams<T>& p, int level, int64_t k, bool is_x) {
  const auto* box = p.boxes + 5 * k + (is_x ? 1 : 2);
  const RegionLevel<T>& map = p.levels[level];
  return region_axis(p.spec, box[0], box[2], map.scale, is_x ? map.W : map.H, is_x ? p.PW : p.PH);
}

// Fills the gradients of the levels that need one. The definition is in cuda_backward.cu.
void region_backward_input(const RegionProblem& p, const Tensor& grad_output, const Tensor* output,
                           cudaStream_t stream);

}  // namespace relops
