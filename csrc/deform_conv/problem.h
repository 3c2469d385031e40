// deform_conv2d, deformable convolution (v1 and v2): the code that CPU and CUDA have in common.
//
//   output[o, p] = bias[o] + sum over input channels c of the group of o and taps t of
//                  weight[o, c, t] mask[t, p] sample(input[c], position of tap t of output p)
//
// Tap t = (i, j) of output p = (ho, wo) is at (stride ho - padding + dilation (i, j)) + offset[t, p]. A sample is
// bilinear, and pixels outside of the map are zero. Each offset group, which is a range of input channels, has its own
// offsets and masks.
//
// Let s[c, t, p] be the masked sample and S the matrix of all samples, with one row per (c, t) and one column per p.
// The output is the product W S, where W is the weight as a matrix. Kernels compute a tile of S at a time and never
// store the whole matrix. Let G be the gradient of the output. The gradient of W is G S^T, and the gradient of S is W^T
// G, from which the gradients of input, offset and mask follow:
//
//   input[c, pixel]  += mask  weight of the pixel in the sample  grad_s   (for each of the four corners)
//   offset[t, p]      = mask  sum over c of grad_s  (derivative of the sample with respect to the position)
//   mask[t, p]        =       sum over c of grad_s  (sample without mask)
//
// The sums over c extend over the channels of the offset group.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/host_device.h"
#include "common/tensors.h"

namespace relops {

// The largest height, width, stride, padding and dilation. Below this size, float32 represents all positions on the
// map exactly. See MAX_SIZE in relops/ops/deform_conv2d.py.
constexpr int64_t kMaxDeformSize = 1 << 24;

// A sample on one axis: the pixels `first` and first + 1 with their weights, and the derivatives of the weights with
// respect to the position, which are -1 and 1. The weight and derivative of a pixel outside of the axis are 0. If both
// pixels are outside, or the position is not finite, first is 0 and all weights and derivatives are 0.
template <class Compute>
struct AxisSample {
  int first;
  Compute weights[2], derivatives[2];

  RELOPS_HOST_DEVICE AxisSample(Compute position, int size) {
    const bool inside = position > -1 && position < static_cast<Compute>(size);  // false for NaN
    const Compute low = inside ? floor(position) : 0, fraction = inside ? position - low : 0;
    first = static_cast<int>(low);
    const bool valid[2] = {inside && first >= 0, inside && first + 1 < size};
    weights[0] = valid[0] ? 1 - fraction : 0;
    weights[1] = valid[1] ? fraction : 0;
    derivatives[0] = valid[0] ? -1 : 0;
    derivatives[1] = valid[1] ? 1 : 0;
  }

  // Returns whether pixel first + i is on the axis. Pixels that are not must not be read.
  RELOPS_HOST_DEVICE bool valid(int i) const { return derivatives[i] != 0; }
};

// Returns the position of tap i of output o on one axis without its offset.
RELOPS_HOST_DEVICE inline int64_t tap_origin(int64_t o, int64_t i, int64_t stride, int64_t padding, int64_t dilation) {
  return o * stride - padding + i * dilation;
}

// The sizes and options of a problem. Kernels receive them by value.
struct DeformConvSizes {
  int64_t N, C, H, W, Co, Ho, Wo;               // Co is the number of output channels
  int64_t kh, kw, taps;                         // taps = kh kw
  int64_t groups, group_inputs, group_outputs;  // groups of the weight, and input and output channels per group
  int64_t G, offset_channels;                   // offset groups, and input channels per offset group
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  // Return the position of tap row i of output row ho, or of tap column j of output column wo, without its offset.
  RELOPS_HOST_DEVICE int64_t tap_row(int64_t ho, int64_t i) const { return ho * stride_h - padding_h + i * dilation_h; }
  RELOPS_HOST_DEVICE int64_t tap_column(int64_t wo, int64_t j) const {
    return wo * stride_w - padding_w + j * dilation_w;
  }
};

// The checked arguments of the forward pass.
struct DeformConv : DeformConvSizes {
  DeformConv(const Tensor& input_, const Tensor& offset_, const Tensor& weight_, const std::optional<Tensor>& mask_,
             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
             const std::vector<int64_t>& dilation)
      : offset(offset_), mask(mask_) {
    STD_TORCH_CHECK(input_.dim() == 4 && offset_.dim() == 4 && weight_.dim() == 4 && (!mask_ || mask_->dim() == 4), op,
                    ": input, offset, weight and mask must have 4 dimensions");
    N = input_.size(0), C = input_.size(1), H = input_.size(2), W = input_.size(3);
    Co = weight_.size(0), kh = weight_.size(2), kw = weight_.size(3), group_inputs = weight_.size(1);
    const auto read = [](const std::vector<int64_t>& pair, int64_t min, int64_t& h, int64_t& w) {
      const auto in_range = [min](int64_t x) { return x >= min && x <= kMaxDeformSize; };
      STD_TORCH_CHECK(pair.size() == 2 && in_range(pair[0]) && in_range(pair[1]), op,
                      ": stride, padding or dilation is out of range");
      h = pair[0], w = pair[1];
    };
    read(stride, 1, stride_h, stride_w);
    read(padding, 0, padding_h, padding_w);
    read(dilation, 1, dilation_h, dilation_w);
    STD_TORCH_CHECK(H <= kMaxDeformSize && W <= kMaxDeformSize && kh <= kMaxDeformSize && kw <= kMaxDeformSize, op,
                    ": the map and the kernel must have at most ", kMaxDeformSize, " rows and columns");
    STD_TORCH_CHECK(kh >= 1 && kw >= 1, op, ": the kernel must have at least one tap");
    taps = kh * kw;
    const int64_t rows = H + 2 * padding_h - dilation_h * (kh - 1), columns = W + 2 * padding_w - dilation_w * (kw - 1);
    STD_TORCH_CHECK(rows >= 1 && columns >= 1, op, ": the kernel must not be larger than the padded map");
    Ho = (rows - 1) / stride_h + 1, Wo = (columns - 1) / stride_w + 1;
    STD_TORCH_CHECK(group_inputs == 0 || C == 0 ? C == group_inputs : C % group_inputs == 0, op,
                    ": the channels of input must be a multiple of those of weight");
    groups = C == 0 ? 1 : C / group_inputs;
    STD_TORCH_CHECK(Co % groups == 0, op, ": the output channels must be divisible by the groups");
    group_outputs = Co / groups;
    STD_TORCH_CHECK(offset_.size(1) >= 2 * taps && offset_.size(1) % (2 * taps) == 0, op,
                    ": the channels of offset must be a multiple of 2 kh kw");
    G = offset_.size(1) / (2 * taps);
    STD_TORCH_CHECK(C % G == 0, op, ": the channels of input must be divisible by the offset groups");
    offset_channels = C / G;
    check_shape(op, "offset", offset_, {N, 2 * G * taps, Ho, Wo});
    if (mask_) check_shape(op, "mask", *mask_, {N, G * taps, Ho, Wo});
    const ScalarType dtype = input_.scalar_type(), wide = compute_dtype(dtype);
    const auto check = [&](const char* name, const Tensor& tensor, ScalarType expected) {
      STD_TORCH_CHECK(tensor.scalar_type() == expected && tensor.device() == input_.device(), op, ": ", name,
                      " has the wrong dtype or device");
    };
    check("weight", weight_, dtype);
    check("offset", offset_, wide);
    if (mask_) check("mask", *mask_, wide);
    input = as_map(input_);
    weight = dense(weight_);
    channels_last = is_channels_last(input_);
  }

  Tensor new_output() const {
    return torch::stable::empty({N, Co, Ho, Wo}, input.scalar_type(), std::nullopt, input.device(), std::nullopt,
                                memory_format(channels_last));
  }

  static constexpr const char* op = "relops.deform_conv2d";
  bool channels_last;
  Tensor input, offset, weight;  // weight is contiguous; offset and mask may have any strides
  std::optional<Tensor> mask;
};

// The arguments of the kernels. A gradient that is not requested is a null pointer.
template <class T>
struct DeformConvArgs : DeformConvSizes {
  using Compute = ComputeType<T>;

  Map<const T> input;
  Map<const Compute> offset, mask;  // [N,2 G taps,Ho,Wo] as (dy,dx) and [N,G taps,Ho,Wo]; mask.data may be null
  const T* weight;                  // [Co,group_inputs,kh,kw]
  const T* bias = nullptr;          // [Co], or null
  Map<T> output;                    // only for the forward pass

  Map<const T> grad_output;  // this and the following are only for the backward pass
  Map<Compute> grad_input, grad_offset, grad_mask;
  Compute* grad_weight = nullptr;  // [Co,group_inputs,kh,kw]

  explicit DeformConvArgs(const DeformConv& d)
      : DeformConvSizes(d),
        input(map_of<const T>(d.input)),
        offset(map_of<const Compute>(d.offset)),
        weight(static_cast<const T*>(d.weight.const_data_ptr())) {
    if (d.mask) mask = map_of<const Compute>(*d.mask);
  }

  // Returns whether the gradients of the positions or of the masks of samples are requested.
  bool needs_positions() const { return grad_offset.data != nullptr || grad_mask.data != nullptr; }
};

// The gradients of input, offset, weight, bias and mask.
using DeformConvGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The ops with the signatures of library.cpp, built from two static functions of a device's Kernels:
//   template <class T> void forward(const DeformConv&, const DeformConvArgs<T>&, bool allow_tf32)
//   template <class T> void backward(const DeformConv&, const DeformConvArgs<T>&, bool allow_tf32, bool deterministic)
// forward is called only if the output has elements, and backward only if input, weight and output have elements. All
// gradients are zero before backward is called, and they are sums in the compute type.
template <class Kernels>
struct DeformConvOps {
  static Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& weight,
                        const std::optional<Tensor>& bias_, std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, const std::optional<Tensor>& mask, bool allow_tf32) {
    const DeformConv d(input, offset, weight, mask, stride, padding, dilation);
    if (bias_) {
      check_shape(d.op, "bias", *bias_, {d.Co});
      STD_TORCH_CHECK(bias_->scalar_type() == input.scalar_type() && bias_->device() == input.device(), d.op,
                      ": bias has the wrong dtype or device");
    }
    const std::optional<Tensor> bias = dense(bias_);
    const Tensor output = d.new_output();
    if (output.numel() == 0) return output;
    dispatch_features(d.op, input.scalar_type(), [&](auto t) {
      using T = typename decltype(t)::type;
      DeformConvArgs<T> a(d);
      if (bias) a.bias = static_cast<const T*>(bias->const_data_ptr());
      a.output = map_of<T>(output);
      Kernels::forward(d, a, allow_tf32);
    });
    return output;
  }

  static DeformConvGrads backward(const Tensor& grad_output_, const Tensor& input, const Tensor& offset,
                                  const Tensor& weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, const std::optional<Tensor>& mask, bool allow_tf32,
                                  bool deterministic, std::vector<bool> needs_grad) {
    const DeformConv d(input, offset, weight, mask, stride, padding, dilation);
    check_shape(d.op, "grad_output", grad_output_, {d.N, d.Co, d.Ho, d.Wo});
    STD_TORCH_CHECK(grad_output_.scalar_type() == input.scalar_type() && grad_output_.device() == input.device(), d.op,
                    ": grad_output has the wrong dtype or device");
    check_needs_grad(d.op, needs_grad, 5);
    const bool needs_mask = needs_grad[4] && mask;
    const Tensor grad_output = as_map(grad_output_);
    const ScalarType dtype = input.scalar_type();
    const auto zeros = [&](bool needed, const Tensor& x) {
      if (!needed) return none_like(x);
      const Tensor grad = torch::stable::empty(x.sizes(), compute_dtype(dtype), std::nullopt, x.device(), std::nullopt,
                                               memory_format(is_channels_last(x)));
      return torch::stable::fill_(grad, 0);
    };
    const Tensor grad_input = zeros(needs_grad[0], input), grad_offset = zeros(needs_grad[1], offset);
    const Tensor grad_weight = zeros(needs_grad[2], d.weight), grad_mask = zeros(needs_mask, mask ? *mask : offset);
    const bool needs_kernel = needs_grad[0] || needs_grad[1] || needs_grad[2] || needs_mask;
    if (needs_kernel && grad_output.numel() != 0 && input.numel() != 0) {
      dispatch_features(d.op, dtype, [&](auto t) {
        using T = typename decltype(t)::type;
        using Compute = ComputeType<T>;
        DeformConvArgs<T> a(d);
        a.grad_output = map_of<const T>(grad_output);
        if (needs_grad[0]) a.grad_input = map_of<Compute>(grad_input);
        if (needs_grad[1]) a.grad_offset = map_of<Compute>(grad_offset);
        if (needs_grad[2]) a.grad_weight = static_cast<Compute*>(grad_weight.mutable_data_ptr());
        if (needs_mask) a.grad_mask = map_of<Compute>(grad_mask);
        Kernels::backward(d, a, allow_tf32, deterministic);
      });
    }
    const auto rounded = [&](const Tensor& grad) { return torch::stable::to(grad, dtype); };
    // torch divides a sum of all elements among threads. Sums of rows that are summed again do not depend on their
    // number, even if there is only one output channel.
    constexpr int64_t kColumn[] = {3}, kOthers[] = {0, 2};
    const auto sum_pixels = [&] {
      return torch::stable::sum(torch::stable::sum(grad_output_, kColumn, false, compute_dtype(dtype)), kOthers, false,
                                dtype);
    };
    return {needs_grad[0] ? rounded(grad_input) : grad_input, grad_offset,
            needs_grad[2] ? rounded(grad_weight) : grad_weight, needs_grad[3] ? sum_pixels() : none_like(d.weight),
            grad_mask};
  }
};

template <class Kernels>
void register_deform_conv2d(auto& library) {
  using Ops = DeformConvOps<Kernels>;
  library.impl("deform_conv2d", TORCH_BOX(&Ops::forward));
  library.impl("_deform_conv2d_backward", TORCH_BOX(&Ops::backward));
}

}  // namespace relops
