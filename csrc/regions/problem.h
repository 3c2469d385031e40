// What the CPU and the CUDA half of the region ops share: the signatures of library.cpp, all led to one description of
// the work, and its checks.
//
// These checks only keep the kernels inside their tensors when torch.ops is called directly; the errors meant for
// people are raised by relops/ops/_regions.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/tensors.h"
#include "regions/taps.h"

namespace relops {

// Which op: how boxes become weights, and which feature map and channel they read.
struct RegionSpec {
  const char* op;
  RegionRule rule;
  std::vector<double> spatial_scales;  // per level
  bool position_sensitive = false;     // output channel c of bin b reads input channel c * bins + b
  double canonical_box_size = 1;       // multi-level from here on
  int64_t canonical_level = 0;
};

struct RegionLevel {
  int64_t H, W;
  double scale;
};

struct RegionProblem {
  // inputs: one per level, or none where only shapes matter (a backward that does not read features). shape: N, C, then
  // H, W per level.
  RegionProblem(RegionSpec spec_, const std::vector<Tensor>& inputs_, const Tensor& boxes_, std::vector<int64_t> shape,
                int64_t PH, int64_t PW, ScalarType dtype, bool channels_last)
      : spec(std::move(spec_)), dtype(dtype), channels_last(channels_last), PH(PH), PW(PW) {
    const char* op = spec.op;
    const size_t L = spec.spatial_scales.size();
    STD_TORCH_CHECK(L > 0 && shape.size() == 2 + 2 * L, op, ": needs one spatial_scale per level");
    N = shape[0];
    C = shape[1];
    const auto fits = [](int64_t size) { return size >= 0 && size < std::numeric_limits<int32_t>::max() / 4; };
    STD_TORCH_CHECK(N >= 0 && C >= 0, op, ": negative size");
    for (size_t l = 0; l < L; ++l) {
      levels.push_back({shape[2 + 2 * l], shape[3 + 2 * l], spec.spatial_scales[l]});
      STD_TORCH_CHECK(fits(levels[l].H) && fits(levels[l].W), op, ": a map of more than 2^29 rows or columns");
      STD_TORCH_CHECK(std::isfinite(levels[l].scale) && levels[l].scale > 0, op, ": spatial_scale must be positive");
    }
    STD_TORCH_CHECK(PH > 0 && PW > 0 && fits(PH) && fits(PW) && fits(PH * PW), op, ": output_size must be positive");
    STD_TORCH_CHECK(spec.rule.sampling_ratio <= kMaxSamplingRatio, op, ": sampling_ratio is more than ",
                    kMaxSamplingRatio);
    if (spec.position_sensitive)
      STD_TORCH_CHECK(C % (PH * PW) == 0, op, ": C must be a multiple of the number of bins");
    STD_TORCH_CHECK(boxes_.dim() == 2 && boxes_.size(1) == 5, op, ": boxes must be [K,5]");
    STD_TORCH_CHECK(boxes_.scalar_type() == compute_dtype(dtype), op,
                    ": boxes must be float32 (float64 beside a float64 input)");
    STD_TORCH_CHECK(inputs_.empty() || inputs_.size() == L, op, ": needs one spatial_scale per level");
    for (size_t l = 0; l < inputs_.size(); ++l) {
      const Tensor& input = inputs_[l];
      check_shape(op, "input", input, {N, C, levels[l].H, levels[l].W});
      STD_TORCH_CHECK(input.scalar_type() == dtype, op, ": levels differ in dtype");
      STD_TORCH_CHECK(input.device() == boxes_.device(), op, ": boxes are not on the device of input");
      inputs.push_back(in_format(input));
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

  // The finest level's number: its scale is 2^-finest.
  int finest() const { return static_cast<int>(std::lround(-std::log2(levels[0].scale))); }

  RegionSpec spec;
  ScalarType dtype;
  bool channels_last;
  int64_t N = 0, C = 0, K = 0, PH, PW;
  std::vector<RegionLevel> levels;
  std::vector<Tensor> inputs;
  Tensor boxes;  // [K,5]
};

// What the backward of a maximum needs, which remembers pixels.
inline void check_pixels_fit_int(const RegionProblem& p) {
  for (const RegionLevel& level : p.levels)
    STD_TORCH_CHECK(level.H * level.W <= std::numeric_limits<int32_t>::max(), p.spec.op,
                    ": more than 2^31 - 1 pixels in a map");
}

struct RegionGrads {
  std::vector<Tensor> inputs;  // per level; one not wanted has one dimension
  Tensor boxes;                // [K,5]; likewise
  bool wanted(size_t level) const { return inputs[level].dim() == 4; }
  bool wanted_boxes() const { return boxes.dim() == 2; }
};

// The ops with the signatures of library.cpp, from a device's
//   Tensor forward(const RegionProblem&) and
//   void backward(const RegionProblem&, const Tensor& grad_output, const Tensor* output, const RegionGrads&),
// which gets uninitialized gradients to fill, grad_output in the format of the problem, and for kMaximum the output.
template <auto kForward, auto kBackward>
struct RegionOps {
  using OptionalTensor = std::optional<Tensor>;
  using Ints = std::vector<int64_t>;
  using Floats = std::vector<double>;
  using Tensors = std::vector<Tensor>;

  static Tensor forward(RegionSpec spec, const Tensors& inputs, const Tensor& boxes, const Ints& output_size) {
    const char* op = spec.op;
    STD_TORCH_CHECK(!inputs.empty(), op, ": needs at least one level");
    STD_TORCH_CHECK(output_size.size() == 2, op, ": output_size must be two numbers");
    Ints shape;
    bool channels_last = false;
    for (const Tensor& input : inputs) {
      STD_TORCH_CHECK(input.dim() == 4, op, ": input must be [N,C,H,W]");
      if (shape.empty()) shape = {input.size(0), input.size(1)};
      shape.push_back(input.size(2));
      shape.push_back(input.size(3));
      channels_last = channels_last || is_channels_last(input);
    }
    return kForward(RegionProblem(std::move(spec), inputs, boxes, shape, output_size[0], output_size[1],
                                  inputs[0].scalar_type(), channels_last));
  }

  static RegionGrads backward(RegionSpec spec, const Tensor& grad_output, const Tensors& inputs, const Tensor& boxes,
                              const Ints& shape, const Tensor* output, bool channels_last,
                              const std::vector<bool>& input_grads, bool boxes_grad) {
    const char* op = spec.op;
    STD_TORCH_CHECK(grad_output.dim() == 4, op, ": grad_output must be [K,C,PH,PW]");
    STD_TORCH_CHECK(grad_output.device() == boxes.device(), op, ": grad_output is not on the device of boxes");
    const RegionProblem p(std::move(spec), inputs, boxes, shape, grad_output.size(2), grad_output.size(3),
                          grad_output.scalar_type(), channels_last);
    check_shape(op, "grad_output", grad_output, {p.K, p.out_channels(), p.PH, p.PW});
    STD_TORCH_CHECK(input_grads.size() == p.levels.size(), op, ": needs one flag per level");
    STD_TORCH_CHECK(!boxes_grad || !inputs.empty(), op, ": the gradient of boxes needs the input");
    RegionGrads grads{{}, none_like(boxes)};
    for (size_t l = 0; l < p.levels.size(); ++l)
      grads.inputs.push_back(input_grads[l] ? p.new_empty({p.N, p.C, p.levels[l].H, p.levels[l].W})
                                            : none_like(grad_output));
    if (boxes_grad) grads.boxes = torch::stable::new_empty(boxes, {p.K, 5});
    kBackward(p, p.in_format(grad_output), output, grads);
    return grads;
  }

  static Tensors if_given(const OptionalTensor& input) { return input ? Tensors{*input} : Tensors{}; }

  // The sampling_ratio as an int: the check of its bound follows.
  static int samples(int64_t sampling_ratio) {
    return static_cast<int>(sampling_ratio > kMaxSamplingRatio ? kMaxSamplingRatio + 1
                            : sampling_ratio < 0               ? 0
                                                               : sampling_ratio);
  }

  static RegionSpec roi_align_spec(double scale, int64_t sampling_ratio, bool aligned) {
    return {"relops.roi_align", {RegionKind::kSampled, aligned, samples(sampling_ratio)}, {scale}};
  }
  static Tensor roi_align(const Tensor& input, const Tensor& boxes, Ints output_size, double scale,
                          int64_t sampling_ratio, bool aligned) {
    return forward(roi_align_spec(scale, sampling_ratio, aligned), {input}, boxes, output_size);
  }
  static std::tuple<Tensor, Tensor> roi_align_backward(const Tensor& grad_output, const OptionalTensor& input,
                                                       const Tensor& boxes, Ints shape, double scale,
                                                       int64_t sampling_ratio, bool aligned, bool channels_last,
                                                       bool input_grad, bool boxes_grad) {
    const RegionGrads grads = backward(roi_align_spec(scale, sampling_ratio, aligned), grad_output, if_given(input),
                                       boxes, shape, nullptr, channels_last, {input_grad}, boxes_grad);
    return {grads.inputs[0], grads.boxes};
  }

  static RegionSpec ps_roi_align_spec(double scale, int64_t sampling_ratio) {
    return {"relops.ps_roi_align", {RegionKind::kSampled, true, samples(sampling_ratio)}, {scale}, true};
  }
  static Tensor ps_roi_align(const Tensor& input, const Tensor& boxes, Ints output_size, double scale,
                             int64_t sampling_ratio) {
    return forward(ps_roi_align_spec(scale, sampling_ratio), {input}, boxes, output_size);
  }
  static std::tuple<Tensor, Tensor> ps_roi_align_backward(const Tensor& grad_output, const OptionalTensor& input,
                                                          const Tensor& boxes, Ints shape, double scale,
                                                          int64_t sampling_ratio, bool channels_last, bool input_grad,
                                                          bool boxes_grad) {
    const RegionGrads grads = backward(ps_roi_align_spec(scale, sampling_ratio), grad_output, if_given(input), boxes,
                                       shape, nullptr, channels_last, {input_grad}, boxes_grad);
    return {grads.inputs[0], grads.boxes};
  }

  static Tensor prroi_pool(const Tensor& input, const Tensor& boxes, Ints output_size, double scale) {
    return forward({"relops.prroi_pool", {RegionKind::kPrecise}, {scale}}, {input}, boxes, output_size);
  }
  static std::tuple<Tensor, Tensor> prroi_pool_backward(const Tensor& grad_output, const OptionalTensor& input,
                                                        const Tensor& boxes, Ints shape, double scale,
                                                        bool channels_last, bool input_grad, bool boxes_grad) {
    const RegionGrads grads = backward({"relops.prroi_pool", {RegionKind::kPrecise}, {scale}}, grad_output,
                                       if_given(input), boxes, shape, nullptr, channels_last, {input_grad}, boxes_grad);
    return {grads.inputs[0], grads.boxes};
  }

  static Tensor ps_roi_pool(const Tensor& input, const Tensor& boxes, Ints output_size, double scale) {
    return forward({"relops.ps_roi_pool", {RegionKind::kAveraged}, {scale}, true}, {input}, boxes, output_size);
  }
  static Tensor ps_roi_pool_backward(const Tensor& grad_output, const Tensor& boxes, Ints shape, double scale,
                                     bool channels_last) {
    return backward({"relops.ps_roi_pool", {RegionKind::kAveraged}, {scale}, true}, grad_output, {}, boxes, shape,
                    nullptr, channels_last, {true}, false)
        .inputs[0];
  }

  static Tensor roi_pool(const Tensor& input, const Tensor& boxes, Ints output_size, double scale) {
    return forward({"relops.roi_pool", {RegionKind::kMaximum}, {scale}}, {input}, boxes, output_size);
  }
  static Tensor roi_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& boxes,
                                  const Tensor& output, double scale) {
    const char* op = "relops.roi_pool";
    STD_TORCH_CHECK(input.dim() == 4, op, ": input must be [N,C,H,W]");
    STD_TORCH_CHECK(grad_output.dim() == 4, op, ": grad_output must be [K,C,PH,PW]");
    check_shape(op, "output", output,
                {grad_output.size(0), grad_output.size(1), grad_output.size(2), grad_output.size(3)});
    STD_TORCH_CHECK(output.scalar_type() == grad_output.scalar_type() && output.device() == grad_output.device(), op,
                    ": output differs from grad_output in dtype or device");
    const bool channels_last = is_channels_last(input);
    const Tensor in_format = torch::stable::contiguous(output, memory_format(channels_last));
    return backward({op, {RegionKind::kMaximum}, {scale}}, grad_output, {input}, boxes,
                    {input.size(0), input.size(1), input.size(2), input.size(3)}, &in_format, channels_last, {true},
                    false)
        .inputs[0];
  }

  static RegionSpec multi_scale_spec(const Floats& scales, int64_t sampling_ratio, bool aligned,
                                     double canonical_box_size, int64_t canonical_level) {
    return {"relops.multi_scale_roi_align",
            {RegionKind::kSampled, aligned, samples(sampling_ratio)},
            scales,
            false,
            canonical_box_size,
            canonical_level};
  }
  static Tensor multi_scale_roi_align(Tensors inputs, const Tensor& boxes, Ints output_size, Floats scales,
                                      int64_t sampling_ratio, bool aligned, double canonical_box_size,
                                      int64_t canonical_level) {
    return forward(multi_scale_spec(scales, sampling_ratio, aligned, canonical_box_size, canonical_level), inputs,
                   boxes, output_size);
  }
  static std::tuple<Tensors, Tensor> multi_scale_roi_align_backward(const Tensor& grad_output, Tensors inputs,
                                                                    const Tensor& boxes, Ints shape, Floats scales,
                                                                    int64_t sampling_ratio, bool aligned,
                                                                    double canonical_box_size, int64_t canonical_level,
                                                                    bool channels_last, std::vector<bool> input_grads,
                                                                    bool boxes_grad) {
    RegionGrads grads = backward(multi_scale_spec(scales, sampling_ratio, aligned, canonical_box_size, canonical_level),
                                 grad_output, inputs, boxes, shape, nullptr, channels_last, input_grads, boxes_grad);
    return {std::move(grads.inputs), grads.boxes};
  }
};

// Registers them: RELOPS_REGIONS_IMPL(m, RegionOps<&forward, &backward>).
#define RELOPS_REGIONS_IMPL(m, ...)                                               \
  using RelopsOps = __VA_ARGS__;                                                  \
  m.impl("roi_align", TORCH_BOX(&RelopsOps::roi_align));                          \
  m.impl("_roi_align_backward", TORCH_BOX(&RelopsOps::roi_align_backward));       \
  m.impl("roi_pool", TORCH_BOX(&RelopsOps::roi_pool));                            \
  m.impl("_roi_pool_backward", TORCH_BOX(&RelopsOps::roi_pool_backward));         \
  m.impl("ps_roi_align", TORCH_BOX(&RelopsOps::ps_roi_align));                    \
  m.impl("_ps_roi_align_backward", TORCH_BOX(&RelopsOps::ps_roi_align_backward)); \
  m.impl("ps_roi_pool", TORCH_BOX(&RelopsOps::ps_roi_pool));                      \
  m.impl("_ps_roi_pool_backward", TORCH_BOX(&RelopsOps::ps_roi_pool_backward));   \
  m.impl("prroi_pool", TORCH_BOX(&RelopsOps::prroi_pool));                        \
  m.impl("_prroi_pool_backward", TORCH_BOX(&RelopsOps::prroi_pool_backward));     \
  m.impl("multi_scale_roi_align", TORCH_BOX(&RelopsOps::multi_scale_roi_align));  \
  m.impl("_multi_scale_roi_align_backward", TORCH_BOX(&RelopsOps::multi_scale_roi_align_backward))

}  // namespace relops
