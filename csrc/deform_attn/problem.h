// ms_deform_attn and ms_deform_attn_fused: the sizes, the checks of the inputs, and the op signatures of library.cpp,
// for both CPU and CUDA.
//
// These checks keep the kernels from accessing memory outside of their tensors if torch.ops is called directly.
// relops/ops/ms_deform_attn.py raises the errors that are meant for users.
#pragma once

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "common/tensors.h"

namespace relops {

struct MsDeformAttnSizes {
  int64_t N;  // batch
  int64_t S;  // sum of the level sizes
  int64_t M;  // heads
  int64_t D;  // head width
  int64_t Q;  // queries
  int64_t L;  // levels
  int64_t P;  // points per level
  int64_t R;  // coordinates per reference point: 2 or 4, or 0 if locations are given (not fused)
};

// `locations` are sampling_locations or, if reference_points is given, sampling_offsets. Likewise, `weights` are
// attention weights or attention logits.
inline MsDeformAttnSizes ms_deform_attn_sizes(const char* op, const Tensor& value, const Tensor& spatial_shapes,
                                              const std::optional<Tensor>& level_start_index, const Tensor& locations,
                                              const Tensor& weights, const std::optional<Tensor>& reference_points,
                                              const std::optional<Tensor>& value_mask) {
  STD_TORCH_CHECK(value.dim() == 4, op, ": value must be [N,S,M,D]");
  STD_TORCH_CHECK(locations.dim() == 6, op, ": locations or offsets must be [N,Q,M,L,P,2]");
  MsDeformAttnSizes z{value.size(0),     value.size(1),     value.size(2),     value.size(3),
                      locations.size(1), locations.size(3), locations.size(4), 0};
  STD_TORCH_CHECK(z.L > 0 && z.P > 0, op, ": at least one level and one point are required, got L = ", z.L,
                  ", P = ", z.P);
  STD_TORCH_CHECK(z.S < std::numeric_limits<int32_t>::max(), op,
                  ": value must have fewer than 2^31 - 1 rows, got S = ", z.S);
  check_shape(op, "spatial_shapes", spatial_shapes, {z.L, 2});
  STD_TORCH_CHECK(spatial_shapes.scalar_type() == ScalarType::Long, op, ": spatial_shapes must be int64");
  if (level_start_index) {
    check_shape(op, "level_start_index", *level_start_index, {z.L});
    STD_TORCH_CHECK(level_start_index->scalar_type() == ScalarType::Long, op, ": level_start_index must be int64");
  }
  check_shape(op, "locations or offsets", locations, {z.N, z.Q, z.M, z.L, z.P, 2});
  check_shape(op, "weights or logits", weights, {z.N, z.Q, z.M, z.L, z.P});
  STD_TORCH_CHECK(locations.scalar_type() == weights.scalar_type(), op,
                  ": locations and weights must have the same dtype");
  if (reference_points) {
    STD_TORCH_CHECK(reference_points->dim() == 4, op, ": reference_points must be [N,Q,L,2] or [N,Q,L,4]");
    z.R = reference_points->size(3);
    STD_TORCH_CHECK(z.R == 2 || z.R == 4, op, ": reference_points must have 2 or 4 coordinates, got ", z.R);
    check_shape(op, "reference_points", *reference_points, {z.N, z.Q, z.L, z.R});
    STD_TORCH_CHECK(reference_points->scalar_type() == compute_dtype(value.scalar_type()), op,
                    ": reference_points must be float32, or float64 if value is float64");
  }
  if (value_mask) {
    check_shape(op, "value_mask", *value_mask, {z.N, z.S});
    STD_TORCH_CHECK(value_mask->scalar_type() == ScalarType::Bool, op, ": value_mask must be bool");
  }
  return z;
}

// One pyramid level, as read on the host.
struct Level {
  int64_t height, width, start;
};

// spatial_shapes and level_start_index must be dense CPU tensors.
inline std::vector<Level> read_levels(const char* op, const MsDeformAttnSizes& z, const Tensor& spatial_shapes,
                                      const std::optional<Tensor>& level_start_index) {
  const int64_t* hw = spatial_shapes.const_data_ptr<int64_t>();
  const int64_t* starts = level_start_index ? level_start_index->const_data_ptr<int64_t>() : nullptr;
  std::vector<Level> levels(z.L);
  int64_t sum = 0;
  for (int64_t l = 0; l < z.L; ++l) {
    const int64_t h = hw[2 * l], w = hw[2 * l + 1];
    // Comparing each factor with S first keeps the product within 64 bits.
    STD_TORCH_CHECK(h >= 0 && w >= 0 && (h == 0 || w == 0 || (h <= z.S && w <= z.S && h * w <= z.S - sum)), op,
                    ": spatial_shapes must add up to S = ", z.S, ", got level ", l, " of ", h, " x ", w);
    const int64_t start = starts ? starts[l] : sum;
    STD_TORCH_CHECK(start >= 0 && start <= z.S - h * w, op, ": level ", l, " of ", h, " x ", w, " at row ", start,
                    " does not fit in S = ", z.S);
    levels[l] = {h, w, start};
    sum += h * w;
  }
  STD_TORCH_CHECK(sum == z.S, op, ": spatial_shapes must add up to S = ", z.S, ", got ", sum);
  return levels;
}

// The inputs of all four ops, checked and dense. `locations` and `weights` are offsets and logits if reference_points
// is given.
struct MsDeformAttnInputs {
  MsDeformAttnInputs(const char* op, const Tensor& value, const Tensor& spatial_shapes,
                     const std::optional<Tensor>& level_start_index, const std::optional<Tensor>& reference_points,
                     const Tensor& locations, const Tensor& weights, const std::optional<Tensor>& value_mask)
      : op(op),
        sizes(ms_deform_attn_sizes(op, value, spatial_shapes, level_start_index, locations, weights, reference_points,
                                   value_mask)),
        spatial_shapes(dense(spatial_shapes)),
        level_start_index(dense(level_start_index)),
        value(dense(value)),
        reference_points(dense(reference_points)),
        locations(dense(locations)),
        weights(dense(weights)),
        value_mask(dense(value_mask)) {
    const auto check_device = [&](const char* name, const Tensor& tensor) {
      STD_TORCH_CHECK(tensor.device() == value.device(), op, ": ", name, " must be on the device of value");
    };
    check_device("locations or offsets", locations);
    check_device("weights or logits", weights);
    if (reference_points) check_device("reference_points", *reference_points);
    if (value_mask) check_device("value_mask", *value_mask);
    if (!spatial_shapes.is_cpu()) check_device("spatial_shapes", spatial_shapes);
    if (level_start_index && !level_start_index->is_cpu()) check_device("level_start_index", *level_start_index);
  }

  const char* op;
  MsDeformAttnSizes sizes;
  Tensor spatial_shapes;
  std::optional<Tensor> level_start_index;
  Tensor value;
  std::optional<Tensor> reference_points;
  Tensor locations, weights;
  std::optional<Tensor> value_mask;
};

// The gradients that a backward pass computes. `sampling` stands for the gradients of locations and weights, which one
// kernel computes together.
struct MsDeformAttnNeeds {
  bool value, sampling, reference, deterministic;
};

struct MsDeformAttnGrads {
  Tensor value, locations, weights, reference;
};

inline MsDeformAttnGrads no_grads(const MsDeformAttnInputs& in) {
  return {none_like(in.value), none_like(in.locations), none_like(in.weights), none_like(in.value)};
}

// Returns zeros for the requested gradients, for use with an empty output.
inline MsDeformAttnGrads zero_grads(const MsDeformAttnInputs& in, MsDeformAttnNeeds needs) {
  const auto zeros = [](const Tensor& tensor) { return torch::stable::new_zeros(tensor, tensor.sizes()); };
  MsDeformAttnGrads grads = no_grads(in);
  if (needs.value) grads.value = zeros(in.value);
  if (needs.sampling) grads.locations = zeros(in.locations);
  if (needs.sampling) grads.weights = zeros(in.weights);
  if (needs.reference) grads.reference = zeros(*in.reference_points);
  return grads;
}

inline void check_grad_output(const MsDeformAttnInputs& in, const Tensor& grad_output) {
  const auto& z = in.sizes;
  check_shape(in.op, "grad_output", grad_output, {z.N, z.Q, z.M * z.D});
  STD_TORCH_CHECK(grad_output.scalar_type() == in.value.scalar_type(), in.op,
                  ": grad_output must have the dtype of value");
  STD_TORCH_CHECK(grad_output.device() == in.value.device(), in.op, ": grad_output must be on the device of value");
}

// The ops with the signatures of library.cpp, built from two functions of a device:
//   Tensor forward(const MsDeformAttnInputs&) and
//   MsDeformAttnGrads backward(const MsDeformAttnInputs&, const Tensor& grad_output, MsDeformAttnNeeds).
template <auto kForward, auto kBackward>
struct MsDeformAttnOps {
  using OptionalTensor = std::optional<Tensor>;

  static Tensor forward(const Tensor& value, const Tensor& spatial_shapes, const OptionalTensor& level_start_index,
                        const Tensor& sampling_locations, const Tensor& attention_weights) {
    return kForward(MsDeformAttnInputs("ms_deform_attn", value, spatial_shapes, level_start_index, std::nullopt,
                                       sampling_locations, attention_weights, std::nullopt));
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                                     const Tensor& spatial_shapes,
                                                     const OptionalTensor& level_start_index,
                                                     const Tensor& sampling_locations, const Tensor& attention_weights,
                                                     bool deterministic, const std::vector<bool>& needs_grad) {
    const MsDeformAttnInputs in("_ms_deform_attn_backward", value, spatial_shapes, level_start_index, std::nullopt,
                                sampling_locations, attention_weights, std::nullopt);
    check_needs_grad(in.op, needs_grad, 3);
    const MsDeformAttnGrads grads =
        kBackward(in, grad_output, {needs_grad[0], needs_grad[1] || needs_grad[2], false, deterministic});
    return {grads.value, only_if(needs_grad[1], grads.locations), only_if(needs_grad[2], grads.weights)};
  }

  static Tensor fused_forward(const Tensor& value, const Tensor& spatial_shapes,
                              const OptionalTensor& level_start_index, const Tensor& reference_points,
                              const Tensor& sampling_offsets, const Tensor& attention_logits,
                              const OptionalTensor& value_mask) {
    return kForward(MsDeformAttnInputs("ms_deform_attn_fused", value, spatial_shapes, level_start_index,
                                       reference_points, sampling_offsets, attention_logits, value_mask));
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
      const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
      const OptionalTensor& level_start_index, const Tensor& reference_points, const Tensor& sampling_offsets,
      const Tensor& attention_logits, const OptionalTensor& value_mask, bool deterministic,
      const std::vector<bool>& needs_grad) {
    const MsDeformAttnInputs in("_ms_deform_attn_fused_backward", value, spatial_shapes, level_start_index,
                                reference_points, sampling_offsets, attention_logits, value_mask);
    check_needs_grad(in.op, needs_grad, 4);
    // The gradient of a reference point is a sum over gradients of offsets, so it requires the sampling gradients.
    const bool sampling = needs_grad[1] || needs_grad[2] || needs_grad[3];
    const MsDeformAttnGrads grads = kBackward(in, grad_output, {needs_grad[0], sampling, needs_grad[1], deterministic});
    return {grads.value, grads.reference, only_if(needs_grad[2], grads.locations),
            only_if(needs_grad[3], grads.weights)};
  }
};

template <auto kForward, auto kBackward>
void register_ms_deform_attn(auto& m) {
  using Ops = MsDeformAttnOps<kForward, kBackward>;
  m.impl("ms_deform_attn", TORCH_BOX(&Ops::forward));
  m.impl("_ms_deform_attn_backward", TORCH_BOX(&Ops::backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&Ops::fused_forward));
  m.impl("_ms_deform_attn_fused_backward", TORCH_BOX(&Ops::fused_backward));
}

}  // namespace relops
