// ms_deform_attn and ms_deform_attn_fused on the CPU. This file allocates the results, collects the arguments and
// registers the ops. The kernels are in cpu_kernel.h, which explains how the work is divided and what limits the speed.

#include "deform_attn/cpu_args.h"

#define RELOPS_KERNEL "deform_attn/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

template <class T, class U>
MsDeformAttnArgs<T, U> make_args(const MsDeformAttnInputs& in, const std::vector<Level>& levels) {
  MsDeformAttnArgs<T, U> a{};
  static_cast<MsDeformAttnSizes&>(a) = in.sizes;
  a.levels = levels.data();
  a.value = static_cast<const T*>(in.value.const_data_ptr());
  a.locations = static_cast<const U*>(in.locations.const_data_ptr());
  a.weights = static_cast<const U*>(in.weights.const_data_ptr());
  if (in.reference_points) a.reference = static_cast<const ComputeType<T>*>(in.reference_points->const_data_ptr());
  if (in.value_mask) a.mask = static_cast<const bool*>(in.value_mask->const_data_ptr());
  return a;
}

Tensor forward(const MsDeformAttnInputs& in) {
  const auto& z = in.sizes;
  const std::vector<Level> levels = read_levels(in.op, z, in.spatial_shapes, in.level_start_index);
  Tensor output = torch::stable::new_empty(in.value, {z.N, z.Q, z.M * z.D});
  if (output.numel() == 0) return output;
  dispatch_features_and_coordinates(in.op, in.value.scalar_type(), in.locations.scalar_type(), [&](auto t, auto u) {
    using T = typename decltype(t)::type;
    auto a = make_args<T, typename decltype(u)::type>(in, levels);
    a.output = static_cast<T*>(output.mutable_data_ptr());
    RELOPS_CALL_ISA(ms_deform_attn_forward, a);
  });
  return output;
}

// The order of additions does not depend on thread scheduling, so the backward pass is always deterministic.
MsDeformAttnGrads backward(const MsDeformAttnInputs& in, const Tensor& grad_output, MsDeformAttnNeeds needs) {
  const auto& z = in.sizes;
  const std::vector<Level> levels = read_levels(in.op, z, in.spatial_shapes, in.level_start_index);
  check_grad_output(in, grad_output);
  if (grad_output.numel() == 0) return zero_grads(in, needs);
  const Tensor grad = dense(grad_output);
  MsDeformAttnGrads grads = no_grads(in);
  Tensor head_partials = grads.reference;
  const auto grad_like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  if (needs.value) grads.value = grad_like(in.value);
  if (needs.sampling) {
    grads.locations = grad_like(in.locations);
    grads.weights = grad_like(in.weights);
  }
  if (needs.reference) {
    grads.reference = torch::stable::new_zeros(*in.reference_points, in.reference_points->sizes());
    head_partials = torch::stable::new_empty(*in.reference_points, {z.N, z.M, z.Q, z.L, z.R});
  }
  dispatch_features_and_coordinates(in.op, in.value.scalar_type(), in.locations.scalar_type(), [&](auto t, auto u) {
    using T = typename decltype(t)::type;
    using U = typename decltype(u)::type;
    using Compute = ComputeType<T>;
    auto a = make_args<T, U>(in, levels);
    a.grad_output = static_cast<const T*>(grad.const_data_ptr());
    if (needs.value) a.grad_value = static_cast<T*>(grads.value.mutable_data_ptr());
    if (needs.sampling) {
      a.grad_locations = static_cast<U*>(grads.locations.mutable_data_ptr());
      a.grad_weights = static_cast<U*>(grads.weights.mutable_data_ptr());
    }
    if (needs.reference) a.grad_reference = static_cast<Compute*>(head_partials.mutable_data_ptr());
    RELOPS_CALL_ISA(ms_deform_attn_backward, a);
    if (!needs.reference) return;
    Compute* sum = static_cast<Compute*>(grads.reference.mutable_data_ptr());
    const int64_t size = z.Q * z.L * z.R;
    for_each_range(z.N * size, threads_for(static_cast<double>(z.N) * z.M * size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t m = 0; m < z.M; ++m) sum[i] += a.grad_reference[(i / size * z.M + m) * size + i % size];
    });
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_ms_deform_attn<&forward, &backward>(m); }

}  // namespace relops
