#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cpu/work.h"
#include "deform_attn/problem.h"

namespace relops {

// What the kernels are called with. T: features. U: sampling locations and attention weights, or offsets and logits
// where reference is set.
template <class T, class U>
struct MsDeformAttnArgs : MsDeformAttnSizes {
  using C = ComputeType<T>;

  const Level* levels;  // [L]
  const T* value;       // [N,S,M,D]
  const U* locations;   // [N,Q,M,L,P,2]
  const U* weights;     // [N,Q,M,L,P]
  const C* reference;   // [N,Q,L,R], null when not fused
  const bool* mask;     // [N,S], null: nothing is masked

  T* output;  // [N,Q,M,D]; forward only

  const T* grad_output;  // [N,Q,M,D]; from here on backward only
  T* grad_value;         // [N,S,M,D], null where not wanted, like the rest
  U* grad_locations;     // [N,Q,M,L,P,2]
  U* grad_weights;       // [N,Q,M,L,P]
  C* grad_reference;     // [N,M,Q,L,R]: a share per head
};

}  // namespace relops

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

// Sums do not depend on the order of threads: always deterministic.
MsDeformAttnGrads backward(const MsDeformAttnInputs& in, const Tensor& grad_output, MsDeformAttnWanted wanted) {
  const auto& z = in.sizes;
  const std::vector<Level> levels = read_levels(in.op, z, in.spatial_shapes, in.level_start_index);
  check_grad_output(in, grad_output);
  if (grad_output.numel() == 0) return zero_grads(in, wanted);
  const Tensor grad = dense(grad_output);
  MsDeformAttnGrads grads = no_grads(in);
  Tensor head_shares = grads.reference;
  const auto grad_like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  if (wanted.value) grads.value = grad_like(in.value);
  if (wanted.sampling) {
    grads.locations = grad_like(in.locations);
    grads.weights = grad_like(in.weights);
  }
  if (wanted.reference) {
    grads.reference = torch::stable::new_zeros(*in.reference_points, in.reference_points->sizes());
    head_shares = torch::stable::new_empty(*in.reference_points, {z.N, z.M, z.Q, z.L, z.R});
  }
  dispatch_features_and_coordinates(in.op, in.value.scalar_type(), in.locations.scalar_type(), [&](auto t, auto u) {
    using T = typename decltype(t)::type;
    using U = typename decltype(u)::type;
    using C = ComputeType<T>;
    auto a = make_args<T, U>(in, levels);
    a.grad_output = static_cast<const T*>(grad.const_data_ptr());
    if (wanted.value) a.grad_value = static_cast<T*>(grads.value.mutable_data_ptr());
    if (wanted.sampling) {
      a.grad_locations = static_cast<U*>(grads.locations.mutable_data_ptr());
      a.grad_weights = static_cast<U*>(grads.weights.mutable_data_ptr());
    }
    if (wanted.reference) a.grad_reference = static_cast<C*>(head_shares.mutable_data_ptr());
    RELOPS_CALL_ISA(ms_deform_attn_backward, a);
    if (!wanted.reference) return;
    C* sum = static_cast<C*>(grads.reference.mutable_data_ptr());
    const int64_t size = z.Q * z.L * z.R;
    for_each_range(z.N * size, threads_for(static_cast<double>(z.N) * z.M * size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t m = 0; m < z.M; ++m) sum[i] += a.grad_reference[(i / size * z.M + m) * size + i % size];
    });
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { RELOPS_MS_DEFORM_ATTN_IMPL(m, MsDeformAttnOps<&forward, &backward>); }

}  // namespace relops
