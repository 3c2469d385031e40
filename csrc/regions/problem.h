// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align: RegionProblem describes a call of
// one of these ops and checks its arguments. ops.h passes the RegionProblem to the CPU and CUDA code.
//
// The checks keep the kernels from accessing memory outside of their tensors if torch.ops is called directly.
// relops/ops/_regions.py raises the errors that are meant for users.
//
//   RegionSpec                the differences between the ops; RegionKind: how they weight pixels (taps.h)
//   RegionProblem             the checked sizes, levels and boxes of a call
//   RegionLevel               one level of the pyramid: size, scale, features, gradient
//   RegionAxis                one axis of a box on a level; determines the taps of the bins (taps.h)
//   RegionOps                 the ops with the signatures of library.cpp (ops.h)
//   RegionArgs, RegionParams  the arguments of CPU kernels (cpu_args.h) and of CUDA kernels (cuda.cuh)
//   Region, RegionWork        CPU: one box as taps (cpu_args.h); all boxes in order, with their memory (cpu.cpp)
//   RegionBox, RegionBin      CUDA: what a box and its bins read (cuda.cuh)
#pragma once

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/tensors.h"
#include "regions/taps.h"

namespace relops {

// A level of a feature pyramid. All ops except multi_scale_roi_align have a single level. T is the type of the
// features, or void if the type is only known at run time.
template <class T>
struct RegionLevel {
  int H, W;
  double scale;    // pixels of the level per unit of box coordinates
  const T* input;  // [N,C,H,W], or [N,H,W,C] if channels_last; null if the call does not read features
  T* grad_input;   // has the layout of input; null if the gradient is not needed
};

struct RegionProblem {
  // inputs has one tensor per level, or is empty if the call needs only shapes, as a backward pass that reads no
  // features does. input_shape is N, C, then H, W of each level.
  RegionProblem(const RegionSpec& spec, const std::vector<double>& spatial_scales, const std::vector<Tensor>& inputs_,
                const Tensor& boxes_, const std::vector<int64_t>& input_shape, int64_t PH, int64_t PW, ScalarType dtype,
                bool channels_last)
      : spec(spec), dtype(dtype), channels_last(channels_last), PH(PH), PW(PW) {
    const char* op = spec.op;
    const size_t L = spatial_scales.size();
    STD_TORCH_CHECK(L > 0 && input_shape.size() == 2 + 2 * L, op, ": there must be one spatial_scale per level");
    N = input_shape[0];
    C = input_shape[1];
    const auto fits = [](int64_t size) { return size >= 0 && size < std::numeric_limits<int32_t>::max() / 4; };
    STD_TORCH_CHECK(N >= 0 && C >= 0, op, ": N and C must not be negative");
    for (size_t l = 0; l < L; ++l) {
      const int64_t H = input_shape[2 + 2 * l], W = input_shape[3 + 2 * l];
      const double scale = spatial_scales[l];
      STD_TORCH_CHECK(fits(H) && fits(W), op, ": H and W must be in [0, 2^29 - 1)");
      STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, op, ": spatial_scale must be positive");
      levels.push_back({static_cast<int>(H), static_cast<int>(W), scale, nullptr, nullptr});
    }
    STD_TORCH_CHECK(PH > 0 && PW > 0 && fits(PH) && fits(PW) && fits(PH * PW), op, ": output_size must be positive");
    STD_TORCH_CHECK(spec.sampling_ratio <= kMaxSamplingRatio, op, ": sampling_ratio must be at most ",
                    kMaxSamplingRatio);
    if (spec.position_sensitive)
      STD_TORCH_CHECK(C % (PH * PW) == 0, op, ": C must be a multiple of the number of bins");
    STD_TORCH_CHECK(boxes_.dim() == 2 && boxes_.size(1) == 5, op, ": boxes must be [K,5]");
    STD_TORCH_CHECK(boxes_.scalar_type() == compute_dtype(dtype), op,
                    ": boxes must be float32, or float64 if the input is float64");
    STD_TORCH_CHECK(inputs_.empty() || inputs_.size() == L, op, ": there must be one spatial_scale per level");
    for (size_t l = 0; l < inputs_.size(); ++l) {
      const Tensor& input = inputs_[l];
      check_shape(op, "input", input, {N, C, levels[l].H, levels[l].W});
      STD_TORCH_CHECK(input.scalar_type() == dtype, op, ": all levels must have the same dtype");
      STD_TORCH_CHECK(input.device() == boxes_.device(), op, ": boxes must be on the device of input");
      inputs.push_back(in_format(input));
      levels[l].input = inputs[l].const_data_ptr();
    }
    boxes = dense(boxes_);
    K = boxes.size(0);
  }

  int64_t out_channels() const { return spec.position_sensitive ? C / (PH * PW) : C; }

  Tensor in_format(const Tensor& tensor) const {
    return torch::stable::contiguous(tensor, memory_format(channels_last));
  }

  Tensor new_empty(std::initializer_list<int64_t> shape) const {
    return torch::stable::empty(shape, dtype, std::nullopt, boxes.device(), std::nullopt, memory_format(channels_last));
  }

  // Returns the number of the finest level, whose scale is 2^-finest.
  int finest() const { return static_cast<int>(std::lround(-std::log2(levels[0].scale))); }

  // Returns level l with features of type T.
  template <class T>
  RegionLevel<T> level(size_t l) const {
    const RegionLevel<void>& level = levels[l];
    return {level.H, level.W, level.scale, static_cast<const T*>(level.input), static_cast<T*>(level.grad_input)};
  }

  RegionSpec spec;
  ScalarType dtype;
  bool channels_last;
  int64_t N = 0, C = 0, K = 0, PH, PW;
  std::vector<RegionLevel<void>> levels;
  std::vector<Tensor> inputs;  // hold the memory to which `input` of each level points
  Tensor boxes;                // [K,5]
};

// Checks that the index of every pixel of a map fits in an int, because the backward pass of roi_pool stores indices as
// int.
inline void check_pixels_fit_int(const RegionProblem& p) {
  for (const RegionLevel<void>& level : p.levels)
    STD_TORCH_CHECK(int64_t{level.H} * level.W <= std::numeric_limits<int32_t>::max(), p.spec.op,
                    ": a map must have at most 2^31 - 1 pixels");
}

}  // namespace relops
