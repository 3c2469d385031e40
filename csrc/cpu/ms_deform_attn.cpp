#include "ms_deform_attn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

namespace relops {

// What the kernels are called with. T: features. U: sampling locations and attention weights, or offsets and logits where reference is set.
template <class T, class U>
struct MsDeformAttnArgs : MsDeformAttnSizes {
  using C = ComputeType<T>;

  const Level* levels;   // [L]
  const T* value;        // [N,S,M,D]
  const U* locations;    // [N,Q,M,L,P,2]
  const U* weights;      // [N,Q,M,L,P]
  const C* reference;    // [N,Q,L,R], null when not fused
  const bool* mask;      // [N,S], null: nothing is masked

  T* output;             // [N,Q,M,D]; forward only

  const T* grad_output;  // [N,Q,M,D]; from here on backward only
  T* grad_value;         // [N,S,M,D], null where not wanted, like the rest; zeroed by the caller
  U* grad_locations;     // [N,Q,M,L,P,2]
  U* grad_weights;       // [N,Q,M,L,P]
  C* grad_reference;     // [N,M,Q,L,R]: a share per head
};

}  // namespace relops

#define RELOPS_KERNEL "cpu/ms_deform_attn_kernel.h"
#include "cpu/foreach_isa.h"

namespace relops {

namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

Tensor none_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, {0}); }

// The inputs of all four ops, dense and checked.
struct Inputs {
  Inputs(const char* op, const Tensor& value, const Tensor& spatial_shapes, const OptionalTensor& level_start_index,
         const OptionalTensor& reference_points, const Tensor& locations, const Tensor& weights,
         const OptionalTensor& value_mask)
      : sizes(ms_deform_attn_sizes(op, value, spatial_shapes, level_start_index, locations, weights, reference_points,
                                   value_mask)),
        levels(read_levels(op, sizes, spatial_shapes, level_start_index)),
        value(dense(value)),
        reference_points(dense(reference_points)),
        locations(dense(locations)),
        weights(dense(weights)),
        value_mask(dense(value_mask)) {}

  template <class T, class U>
  MsDeformAttnArgs<T, U> args() const {
    MsDeformAttnArgs<T, U> a{};
    static_cast<MsDeformAttnSizes&>(a) = sizes;
    a.levels = levels.data();
    a.value = static_cast<const T*>(value.const_data_ptr());
    a.locations = static_cast<const U*>(locations.const_data_ptr());
    a.weights = static_cast<const U*>(weights.const_data_ptr());
    if (reference_points) a.reference = static_cast<const ComputeType<T>*>(reference_points->const_data_ptr());
    if (value_mask) a.mask = static_cast<const bool*>(value_mask->const_data_ptr());
    return a;
  }

  MsDeformAttnSizes sizes;
  std::vector<Level> levels;
  Tensor value;
  OptionalTensor reference_points;
  Tensor locations, weights;
  OptionalTensor value_mask;
};

Tensor forward(const char* op, const Inputs& in) {
  const auto& z = in.sizes;
  Tensor output = torch::stable::new_empty(in.value, {z.N, z.Q, z.M * z.D});
  if (output.numel() == 0) return output;
  dispatch_features_and_coordinates(op, in.value.scalar_type(), in.locations.scalar_type(), [&](auto t, auto u) {
    auto a = in.args<typename decltype(t)::type, typename decltype(u)::type>();
    a.output = static_cast<typename decltype(t)::type*>(output.mutable_data_ptr());
    RELOPS_CALL_ISA(ms_deform_attn_forward, a);
  });
  return output;
}

// Gradients of value, locations, weights and reference points.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const char* op, const Inputs& in, const Tensor& grad_output,
                                                    bool value_grad, bool sampling_grad, bool reference_grad) {
  const auto& z = in.sizes;
  check_shape(op, "grad_output", grad_output, {z.N, z.Q, z.M * z.D});
  STD_TORCH_CHECK(grad_output.scalar_type() == in.value.scalar_type(), op, ": grad_output differs from value in dtype");
  const Tensor grad = dense(grad_output);
  Tensor grad_value = value_grad ? torch::stable::new_zeros(in.value, {z.N, z.S, z.M, z.D}) : none_like(in.value);
  Tensor grad_locations = none_like(in.locations), grad_weights = none_like(in.weights);
  Tensor grad_reference = none_like(in.reference_points ? *in.reference_points : in.weights);
  Tensor head_shares = grad_reference;
  if (sampling_grad || reference_grad) {
    // Zeroed, because with D = 0 no item is visited.
    grad_locations = torch::stable::new_zeros(in.locations, in.locations.sizes());
    grad_weights = torch::stable::new_zeros(in.weights, in.weights.sizes());
  }
  if (reference_grad) {
    grad_reference = torch::stable::new_zeros(*in.reference_points, in.reference_points->sizes());
    head_shares = torch::stable::new_empty(*in.reference_points, {z.N, z.M, z.Q, z.L, z.R});
  }
  if (grad.numel() > 0) {
    dispatch_features_and_coordinates(op, in.value.scalar_type(), in.locations.scalar_type(), [&](auto t, auto u) {
      using T = typename decltype(t)::type;
      using U = typename decltype(u)::type;
      using C = ComputeType<T>;
      auto a = in.args<T, U>();
      a.grad_output = static_cast<const T*>(grad.const_data_ptr());
      if (value_grad) a.grad_value = static_cast<T*>(grad_value.mutable_data_ptr());
      if (sampling_grad || reference_grad) {
        a.grad_locations = static_cast<U*>(grad_locations.mutable_data_ptr());
        a.grad_weights = static_cast<U*>(grad_weights.mutable_data_ptr());
      }
      if (reference_grad) a.grad_reference = static_cast<C*>(head_shares.mutable_data_ptr());
      RELOPS_CALL_ISA(ms_deform_attn_backward, a, torch::stable::get_num_threads());
      if (!reference_grad) return;
      C* sum = static_cast<C*>(grad_reference.mutable_data_ptr());
      const int64_t size = z.Q * z.L * z.R;
      torch::stable::parallel_for(0, z.N * size, 4096, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t m = 0; m < z.M; ++m) sum[i] += a.grad_reference[(i / size * z.M + m) * size + i % size];
      });
    });
  }
  return {grad_value, grad_locations, grad_weights, grad_reference};
}

Tensor ms_deform_attn(const Tensor& value, const Tensor& spatial_shapes, const OptionalTensor& level_start_index,
                      const Tensor& sampling_locations, const Tensor& attention_weights) {
  constexpr const char* op = "ms_deform_attn";
  return forward(op, Inputs(op, value, spatial_shapes, level_start_index, std::nullopt, sampling_locations,
                            attention_weights, std::nullopt));
}

// The sums of the CPU kernel do not depend on the order of threads: it is always deterministic.
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           const Tensor& spatial_shapes,
                                                           const OptionalTensor& level_start_index,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights, bool value_grad,
                                                           bool sampling_grad, bool /*deterministic*/) {
  constexpr const char* op = "_ms_deform_attn_backward";
  const auto [grad_value, grad_locations, grad_weights, none] =
      backward(op,
               Inputs(op, value, spatial_shapes, level_start_index, std::nullopt, sampling_locations, attention_weights,
                      std::nullopt),
               grad_output, value_grad, sampling_grad, false);
  return {grad_value, grad_locations, grad_weights};
}

Tensor ms_deform_attn_fused(const Tensor& value, const Tensor& spatial_shapes, const OptionalTensor& level_start_index,
                            const Tensor& reference_points, const Tensor& sampling_offsets,
                            const Tensor& attention_logits, const OptionalTensor& value_mask) {
  constexpr const char* op = "ms_deform_attn_fused";
  return forward(op, Inputs(op, value, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                            attention_logits, value_mask));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const OptionalTensor& level_start_index, const Tensor& reference_points, const Tensor& sampling_offsets,
    const Tensor& attention_logits, const OptionalTensor& value_mask, bool value_grad, bool sampling_grad,
    bool reference_grad, bool /*deterministic*/) {
  constexpr const char* op = "_ms_deform_attn_fused_backward";
  const auto [grad_value, grad_offsets, grad_logits, grad_reference] =
      backward(op,
               Inputs(op, value, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                      attention_logits, value_mask),
               grad_output, value_grad, sampling_grad, reference_grad);
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("_ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused));
  m.impl("_ms_deform_attn_fused_backward", TORCH_BOX(&ms_deform_attn_fused_backward));
}

}  // namespace relops
