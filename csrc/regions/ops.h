// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align and their backward ops: the
// functions that implement the schemas of library.cpp. Each function describes its call with a RegionProblem and passes
// the RegionProblem to the forward or backward function of a device.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "regions/problem.h"

namespace relops {

// Every device defines two functions:
//   kForward: Tensor (const RegionProblem&), and
//   kBackward: void (const RegionProblem&, const Tensor& grad_output, const Tensor* output, const Tensor* grad_boxes).
// kBackward computes the gradients of the levels and grad_boxes, whose memory is uninitialized before the call.
// grad_boxes is null if it is not needed. output is null except for RegionKind::kMaximum. grad_output and output have
// the memory format of the problem.
template <auto kForward, auto kBackward>
struct RegionOps {
  using OptionalTensor = std::optional<Tensor>;
  using Ints = std::vector<int64_t>;
  using Floats = std::vector<double>;
  using Flags = std::vector<bool>;
  using Tensors = std::vector<Tensor>;

  static Tensor roi_align(const Tensor& input, const Tensor& boxes, Ints output_size, double spatial_scale,
                          int64_t sampling_ratio, bool aligned) {
    return forward(sampled("relops.roi_align", sampling_ratio, aligned), {spatial_scale}, {input}, boxes, output_size);
  }
  static std::tuple<Tensor, Tensor> roi_align_backward(const Tensor& grad_output, const OptionalTensor& input,
                                                       const Tensor& boxes, Ints input_shape, double spatial_scale,
                                                       int64_t sampling_ratio, bool aligned, bool channels_last,
                                                       Flags needs_grad) {
    return backward_of_one(sampled("relops.roi_align", sampling_ratio, aligned), spatial_scale, grad_output, input,
                           boxes, input_shape, channels_last, needs_grad);
  }

  static Tensor ps_roi_align(const Tensor& input, const Tensor& boxes, Ints output_size, double spatial_scale,
                             int64_t sampling_ratio) {
    return forward(ps_roi_align_spec(sampling_ratio), {spatial_scale}, {input}, boxes, output_size);
  }
  static std::tuple<Tensor, Tensor> ps_roi_align_backward(const Tensor& grad_output, const OptionalTensor& input,
                                                          const Tensor& boxes, Ints input_shape, double spatial_scale,
                                                          int64_t sampling_ratio, bool channels_last,
                                                          Flags needs_grad) {
    return backward_of_one(ps_roi_align_spec(sampling_ratio), spatial_scale, grad_output, input, boxes, input_shape,
                           channels_last, needs_grad);
  }

  static Tensor prroi_pool(const Tensor& input, const Tensor& boxes, Ints output_size, double spatial_scale) {
    return forward(kPrRoiPool, {spatial_scale}, {input}, boxes, output_size);
  }
  static std::tuple<Tensor, Tensor> prroi_pool_backward(const Tensor& grad_output, const OptionalTensor& input,
                                                        const Tensor& boxes, Ints input_shape, double spatial_scale,
                                                        bool channels_last, Flags needs_grad) {
    return backward_of_one(kPrRoiPool, spatial_scale, grad_output, input, boxes, input_shape, channels_last,
                           needs_grad);
  }

  static Tensor ps_roi_pool(const Tensor& input, const Tensor& boxes, Ints output_size, double spatial_scale) {
    return forward(kPsRoiPool, {spatial_scale}, {input}, boxes, output_size);
  }
  static Tensor ps_roi_pool_backward(const Tensor& grad_output, const Tensor& boxes, Ints input_shape,
                                     double spatial_scale, bool channels_last) {
    return std::get<0>(backward_of_one(kPsRoiPool, spatial_scale, grad_output, std::nullopt, boxes, input_shape,
                                       channels_last, {true, false}));
  }

  static Tensor roi_pool(const Tensor& input, const Tensor& boxes, Ints output_size, double spatial_scale) {
    return forward(kRoiPool, {spatial_scale}, {input}, boxes, output_size);
  }
  static Tensor roi_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& boxes,
                                  const Tensor& output, double spatial_scale) {
    const char* op = kRoiPool.op;
    STD_TORCH_CHECK(input.dim() == 4, op, ": input must be [N,C,H,W]");
    STD_TORCH_CHECK(grad_output.dim() == 4, op, ": grad_output must be [K,C,PH,PW]");
    check_shape(op, "output", output,
                {grad_output.size(0), grad_output.size(1), grad_output.size(2), grad_output.size(3)});
    STD_TORCH_CHECK(output.scalar_type() == grad_output.scalar_type() && output.device() == grad_output.device(), op,
                    ": output must have the dtype and device of grad_output");
    const bool channels_last = is_channels_last(input);
    const Tensor in_format = torch::stable::contiguous(output, memory_format(channels_last));
    const Ints input_shape{input.size(0), input.size(1), input.size(2), input.size(3)};
    return std::get<0>(backward_of_one(kRoiPool, spatial_scale, grad_output, input, boxes, input_shape, channels_last,
                                       {true, false}, &in_format));
  }

  static Tensor multi_scale_roi_align(Tensors inputs, const Tensor& boxes, Ints output_size, Floats spatial_scales,
                                      int64_t sampling_ratio, bool aligned, double canonical_box_size,
                                      int64_t canonical_level) {
    return forward(multi_scale_spec(sampling_ratio, aligned, canonical_box_size, canonical_level), spatial_scales,
                   inputs, boxes, output_size);
  }
  static std::tuple<Tensors, Tensor> multi_scale_roi_align_backward(const Tensor& grad_output, Tensors inputs,
                                                                    const Tensor& boxes, Ints input_shape,
                                                                    Floats spatial_scales, int64_t sampling_ratio,
                                                                    bool aligned, double canonical_box_size,
                                                                    int64_t canonical_level, bool channels_last,
                                                                    Flags needs_grad) {
    return backward(multi_scale_spec(sampling_ratio, aligned, canonical_box_size, canonical_level), spatial_scales,
                    grad_output, inputs, boxes, input_shape, channels_last, needs_grad);
  }

 private:
  static constexpr RegionSpec kPrRoiPool{"relops.prroi_pool", RegionKind::kPrecise};
  static constexpr RegionSpec kPsRoiPool{
      .op = "relops.ps_roi_pool", .kind = RegionKind::kAveraged, .position_sensitive = true};
  static constexpr RegionSpec kRoiPool{"relops.roi_pool", RegionKind::kMaximum};

  // Returns the spec of an op that averages bilinear samples. RegionProblem checks that sampling_ratio is not too
  // large.
  static RegionSpec sampled(const char* op, int64_t sampling_ratio, bool aligned) {
    return {op, RegionKind::kSampled, aligned,
            static_cast<int>(std::clamp<int64_t>(sampling_ratio, 0, kMaxSamplingRatio + 1))};
  }
  static RegionSpec ps_roi_align_spec(int64_t sampling_ratio) {
    RegionSpec spec = sampled("relops.ps_roi_align", sampling_ratio, true);
    spec.position_sensitive = true;
    return spec;
  }
  static RegionSpec multi_scale_spec(int64_t sampling_ratio, bool aligned, double canonical_box_size,
                                     int64_t canonical_level) {
    RegionSpec spec = sampled("relops.multi_scale_roi_align", sampling_ratio, aligned);
    spec.canonical_box_size = canonical_box_size;
    spec.canonical_level = static_cast<int>(canonical_level);
    return spec;
  }

  static Tensor forward(const RegionSpec& spec, const Floats& spatial_scales, const Tensors& inputs,
                        const Tensor& boxes, const Ints& output_size) {
    const char* op = spec.op;
    STD_TORCH_CHECK(!inputs.empty(), op, ": there must be at least one level");
    STD_TORCH_CHECK(output_size.size() == 2, op, ": output_size must be two numbers");
    Ints input_shape;
    bool channels_last = false;
    for (const Tensor& input : inputs) {
      STD_TORCH_CHECK(input.dim() == 4, op, ": input must be [N,C,H,W]");
      if (input_shape.empty()) input_shape = {input.size(0), input.size(1)};
      input_shape.push_back(input.size(2));
      input_shape.push_back(input.size(3));
      channels_last = channels_last || is_channels_last(input);
    }
    return kForward(RegionProblem(spec, spatial_scales, inputs, boxes, input_shape, output_size[0], output_size[1],
                                  inputs[0].scalar_type(), channels_last));
  }

  // needs_grad has one flag per level, then one for the boxes.
  static std::tuple<Tensors, Tensor> backward(const RegionSpec& spec, const Floats& spatial_scales,
                                              const Tensor& grad_output, const Tensors& inputs, const Tensor& boxes,
                                              const Ints& input_shape, bool channels_last, const Flags& needs_grad,
                                              const Tensor* output = nullptr) {
    const char* op = spec.op;
    STD_TORCH_CHECK(grad_output.dim() == 4, op, ": grad_output must be [K,C,PH,PW]");
    STD_TORCH_CHECK(grad_output.device() == boxes.device(), op, ": grad_output must be on the device of boxes");
    RegionProblem p(spec, spatial_scales, inputs, boxes, input_shape, grad_output.size(2), grad_output.size(3),
                    grad_output.scalar_type(), channels_last);
    check_shape(op, "grad_output", grad_output, {p.K, p.out_channels(), p.PH, p.PW});
    STD_TORCH_CHECK(needs_grad.size() == p.levels.size() + 1, op, ": needs_grad must have one flag per gradient");
    const bool needs_boxes = needs_grad.back();
    STD_TORCH_CHECK(!needs_boxes || !inputs.empty(), op, ": the gradient of boxes requires the input");
    Tensors grads;
    for (size_t l = 0; l < p.levels.size(); ++l) {
      grads.push_back(needs_grad[l] ? p.new_empty({p.N, p.C, p.levels[l].H, p.levels[l].W}) : none_like(grad_output));
      p.levels[l].grad_input = needs_grad[l] ? grads[l].mutable_data_ptr() : nullptr;
    }
    const Tensor grad_boxes = needs_boxes ? torch::stable::new_empty(boxes, {p.K, 5}) : none_like(boxes);
    kBackward(p, p.in_format(grad_output), output, needs_boxes ? &grad_boxes : nullptr);
    return {std::move(grads), grad_boxes};
  }

  // Calls backward() for an op with one level. input is nullopt if the op does not read it.
  static std::tuple<Tensor, Tensor> backward_of_one(const RegionSpec& spec, double spatial_scale,
                                                    const Tensor& grad_output, const OptionalTensor& input,
                                                    const Tensor& boxes, const Ints& input_shape, bool channels_last,
                                                    const Flags& needs_grad, const Tensor* output = nullptr) {
    const Tensors inputs = input ? Tensors{*input} : Tensors{};
    const auto [grads, grad_boxes] =
        backward(spec, {spatial_scale}, grad_output, inputs, boxes, input_shape, channels_last, needs_grad, output);
    return {grads[0], grad_boxes};
  }
};

template <auto kForward, auto kBackward>
void register_regions(auto& m) {
  using Ops = RegionOps<kForward, kBackward>;
  m.impl("roi_align", TORCH_BOX(&Ops::roi_align));
  m.impl("_roi_align_backward", TORCH_BOX(&Ops::roi_align_backward));
  m.impl("roi_pool", TORCH_BOX(&Ops::roi_pool));
  m.impl("_roi_pool_backward", TORCH_BOX(&Ops::roi_pool_backward));
  m.impl("ps_roi_align", TORCH_BOX(&Ops::ps_roi_align));
  m.impl("_ps_roi_align_backward", TORCH_BOX(&Ops::ps_roi_align_backward));
  m.impl("ps_roi_pool", TORCH_BOX(&Ops::ps_roi_pool));
  m.impl("_ps_roi_pool_backward", TORCH_BOX(&Ops::ps_roi_pool_backward));
  m.impl("prroi_pool", TORCH_BOX(&Ops::prroi_pool));
  m.impl("_prroi_pool_backward", TORCH_BOX(&Ops::prroi_pool_backward));
  m.impl("multi_scale_roi_align", TORCH_BOX(&Ops::multi_scale_roi_align));
  m.impl("_multi_scale_roi_align_backward", TORCH_BOX(&Ops::multi_scale_roi_align_backward));
}

}  // namespace relops
