// Region pooling on CUDA: what the kernels share. taps.h says how a box becomes taps.
#pragma once

#include <algorithm>

#include "common/cuda/device.cuh"
#include "regions/problem.h"

namespace relops {

constexpr int kRegionLevels = 16;  // what travels as kernel parameters
constexpr int kRegionThreads = 256;
constexpr int kRegionWarps = kRegionThreads / 32;

template <class T>
struct RegionLevelParams {
  int H, W;
  double scale;
  const T* input;
  T* grad_input;  // null: not wanted
};

template <class T_>
struct RegionParams {
  using T = T_;
  using Compute = ComputeType<T>;

  RegionRule rule;
  bool position_sensitive;
  int N, channels, out_channels, PH, PW, L;
  int64_t K;
  Compute canonical_box_size;
  int canonical_level, finest;
  int most_y, most_x;    // taps of a region at most, per axis
  const Compute* boxes;  // [K,5]
  RegionLevelParams<T> levels[kRegionLevels];

  T* output;             // [K,out_channels,PH,PW], here and below in the layout of the input; forward only
  const T* grad_output;  // likewise; from here on backward only
  const int* place;      // of the maximum: its pixel y * W + x, or -1, per output
};

// More taps than any region of the problem has on an axis of `size` pixels: neighboring bins share at most two.
inline int64_t most_taps(const RegionRule& rule, int64_t size, int64_t bins) {
  const int64_t any = size + 2 * bins;
  return rule.kind == RegionKind::kSampled && rule.sampling_ratio > 0
             ? std::min(any, bins * std::min<int64_t>(size, 2 * rule.sampling_ratio))
             : any;
}

template <class T>
RegionParams<T> make_region_params(const RegionProblem& p) {
  using Compute = ComputeType<T>;
  const int64_t L = p.levels.size(), limit = 2147483647;
  STD_TORCH_CHECK(L <= kRegionLevels, p.spec.op, ": at most ", kRegionLevels, " levels on CUDA, got ", L);
  STD_TORCH_CHECK(p.N <= limit && p.C <= limit, p.spec.op, ": too large");
  RegionParams<T> a{};
  a.rule = p.spec.rule;
  a.position_sensitive = p.spec.position_sensitive;
  a.N = static_cast<int>(p.N);
  a.channels = static_cast<int>(p.C);
  a.out_channels = static_cast<int>(p.out_channels());
  a.PH = static_cast<int>(p.PH);
  a.PW = static_cast<int>(p.PW);
  a.L = static_cast<int>(L);
  a.K = p.K;
  a.canonical_box_size = static_cast<Compute>(p.spec.canonical_box_size);
  a.canonical_level = static_cast<int>(p.spec.canonical_level);
  a.finest = p.finest();
  a.boxes = static_cast<const Compute*>(p.boxes.const_data_ptr());
  int64_t most_y = 0, most_x = 0;
  for (int64_t l = 0; l < L; ++l) {
    const RegionLevel& level = p.levels[l];
    a.levels[l] = {static_cast<int>(level.H), static_cast<int>(level.W), level.scale, nullptr, nullptr};
    if (!p.inputs.empty()) a.levels[l].input = static_cast<const T*>(p.inputs[l].const_data_ptr());
    most_y = std::max(most_y, most_taps(p.spec.rule, level.H, p.PH));
    most_x = std::max(most_x, most_taps(p.spec.rule, level.W, p.PW));
  }
  a.most_y = static_cast<int>(std::min(most_y, limit));
  a.most_x = static_cast<int>(std::min(most_x, limit));
  return a;
}

// Where a box reads: which level, which image, and whether it may at all.
struct RegionPlace {
  int level, image;
  bool finite;    // else the result is zero
  bool in_batch;  // else the result is NaN, for raising an error would need the host
};

template <class T>
__device__ inline RegionPlace region_place(const RegionParams<T>& p, int64_t k) {
  const auto* box = p.boxes + 5 * k;
  const auto image = region_image(box[0]);
  RegionPlace at{0, 0, true, image >= 0 && image < p.N};
  for (int i = 1; i < 5; ++i) at.finite = at.finite && isfinite(box[i]);
  if (at.in_batch) at.image = static_cast<int>(image);
  if (at.finite && p.L > 1)
    at.level = region_level(box[1], box[2], box[3], box[4], p.canonical_box_size, p.canonical_level, p.finest, p.L);
  return at;
}

// The axis x or y of box k.
template <class T>
__device__ inline RegionAxis region_axis(const RegionParams<T>& p, int level, int64_t k, bool is_x) {
  const auto* box = p.boxes + 5 * k + (is_x ? 1 : 2);
  const RegionLevelParams<T>& map = p.levels[level];
  return region_axis(p.rule, box[0], box[2], map.scale, is_x ? map.W : map.H, is_x ? p.PW : p.PH);
}

// The gradients of the maps; in cuda_backward.cu.
void region_backward_input(const RegionProblem& p, const Tensor& grad_output, const Tensor* output,
                           const RegionGrads& grads, cudaStream_t stream);

}  // namespace relops
