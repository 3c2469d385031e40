// local_relation, the aggregation layer of LR-Net: the code that CPU and CUDA have in common.
//
//   output[c, o] = sum over taps t of p_t value[c, x_t],
//   p = softmax over taps of similarity(query[g,o], key[g,x_t]) + prior[g,t]
//
// for the channels c of group g. Output o = (ho, wo) has k x k taps. Along each axis, tap i of output o is pixel
// stride * o + dilation * (i - k / 2). Taps outside the map are excluded from the softmax (border "mask"), or have key
// 0 and value 0 (border "zero").
//
// Let p~ be the gradient of p: p~_t is the sum over c of grad_output[c] value[c, x_t]. The gradient of the logit is
//   l_t = p_t (p~_t - delta),  delta = sum over t of p_t p~_t
// and all other gradients are linear in p and l. For each tap, at most one output reads a given pixel. The gradients of
// keys and values are therefore sums over taps, like the gradients of queries, and no two threads need to add to the
// same gradient.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "common/host_device.h"
#include "common/tensors.h"

namespace relops {

constexpr int kMaxKernelSize = 63;  // limits the work per pixel; see MAX_KERNEL_SIZE in relops/ops/local_relation.py

enum class Similarity { kSquaredDifference, kAbsoluteDifference, kProduct };

// Returns the similarity of a query and a key. F is float, double or a vector of either.
template <Similarity kSimilarity, class F>
RELOPS_HOST_DEVICE_INLINE F similarity(F q, F k) {
  if constexpr (kSimilarity == Similarity::kProduct) {
    return q * k;
  } else {
    const F d = q - k;
    if constexpr (kSimilarity == Similarity::kSquaredDifference)
      return -(d * d);
    else
      return d < 0 ? d : -d;
  }
}

// Returns the derivative of the similarity with respect to k, given d = q - k. The derivative with respect to q has the
// opposite sign. For squared differences the result lacks the factor 2 (kSlopeScale), by which sums are multiplied at
// the end. The product similarity does not use this function, because its derivative is the other factor.
template <Similarity kSimilarity, class F>
RELOPS_HOST_DEVICE_INLINE F slope(F d) {
  if constexpr (kSimilarity == Similarity::kSquaredDifference)
    return d;
  else
    return d > 0 ? F{} + 1 : d < 0 ? F{} - 1 : d;  // d is 0 or NaN
}
template <Similarity kSimilarity>
constexpr int kSlopeScale = kSimilarity == Similarity::kSquaredDifference ? 2 : 1;

// The checked arguments of the forward pass. The sizes have the same letters as in relops/ops/local_relation.py.
struct LocalRelation {
  LocalRelation(const Tensor& query_, const Tensor& key_, const Tensor& value_, const std::optional<Tensor>& prior_,
                int64_t k, int64_t stride, int64_t dilation, const std::string& similarity_, const std::string& border)
      : k(k),
        stride(stride),
        dilation(dilation),
        similarity(checked_similarity(similarity_)),
        zero_border(is_zero_border(border)) {
    STD_TORCH_CHECK(query_.dim() == 4 && key_.dim() == 4 && value_.dim() == 4, op,
                    ": query, key and value must have 4 dimensions");
    N = value_.size(0), C = value_.size(1), H = value_.size(2), W = value_.size(3), G = key_.size(1);
    constexpr int64_t kMaxStep = 1 << 24;
    const auto in_range = [](int64_t x, int64_t max) { return x >= 1 && x <= max; };
    STD_TORCH_CHECK(in_range(k, kMaxKernelSize) && in_range(stride, kMaxStep) && in_range(dilation, kMaxStep), op,
                    ": kernel_size, stride or dilation is out of range");
    STD_TORCH_CHECK(H <= kMaxStep && W <= kMaxStep, op, ": the map must have at most ", kMaxStep, " rows and columns");
    STD_TORCH_CHECK(G > 0 || C == 0, op, ": key must have at least one group if value has channels");
    Ho = ceil_div(H, stride), Wo = ceil_div(W, stride);
    m = G > 0 ? ceil_div(C, G) : 0;
    check_shape(op, "query", query_, {N, G, Ho, Wo});
    check_shape(op, "key", key_, {N, G, H, W});
    if (prior_) check_shape(op, "prior", *prior_, {G, k, k});
    const auto check = [&](const char* name, const Tensor& tensor, ScalarType dtype) {
      STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.device() == value_.device(), op, ": ", name,
                      " has the wrong dtype or device");
    };
    check("query", query_, value_.scalar_type());
    check("key", key_, value_.scalar_type());
    if (prior_) check("prior", *prior_, compute_dtype(value_.scalar_type()));
    query = as_map(query_);
    key = as_map(key_);
    value = as_map(value_);
    prior = dense(prior_);
    channels_last = is_channels_last(value_);
  }

  Tensor new_output() const {
    return torch::stable::empty({N, C, Ho, Wo}, value.scalar_type(), std::nullopt, value.device(), std::nullopt,
                                memory_format(channels_last));
  }

  static Similarity checked_similarity(const std::string& name) {
    if (name == "squared_difference") return Similarity::kSquaredDifference;
    if (name == "absolute_difference") return Similarity::kAbsoluteDifference;
    STD_TORCH_CHECK(name == "product", op,
                    ": similarity must be squared_difference, absolute_difference or product, got ", name);
    return Similarity::kProduct;
  }

  static bool is_zero_border(const std::string& border) {
    STD_TORCH_CHECK(border == "mask" || border == "zero", op, ": border must be mask or zero, got ", border);
    return border == "zero";
  }

  static constexpr const char* op = "relops.local_relation";
  int64_t N, C, G, H, W, Ho, Wo;
  int64_t m;  // channels per group; the last groups may have fewer channels or none
  int64_t k, stride, dilation;
  Similarity similarity;
  bool zero_border;  // border "zero": taps outside the map have key 0 and value 0 and remain in the softmax
  bool channels_last;
  Tensor query, key, value;
  std::optional<Tensor> prior;
};

// The arguments of the kernels. A gradient that is not requested is a null pointer.
template <class T>
struct LocalRelationArgs {
  using Compute = ComputeType<T>;

  int64_t N, C, G, H, W, Ho, Wo, m;
  int64_t k, stride, dilation;
  bool zero_border;
  Map<const T> query, key, value;  // [N,G,Ho,Wo], [N,G,H,W], [N,C,H,W]
  const Compute* prior;            // [G,k,k]; null for zeros
  Map<T> output;                   // [N,C,Ho,Wo]; only for the forward pass

  Map<const T> grad_output;  // this and the following are only for the backward pass
  Map<T> grad_query, grad_key, grad_value;
  Compute* grad_prior;

  explicit LocalRelationArgs(const LocalRelation& r)
      : N(r.N),
        C(r.C),
        G(r.G),
        H(r.H),
        W(r.W),
        Ho(r.Ho),
        Wo(r.Wo),
        m(r.m),
        k(r.k),
        stride(r.stride),
        dilation(r.dilation),
        zero_border(r.zero_border),
        query(map_of<const T>(r.query)),
        key(map_of<const T>(r.key)),
        value(map_of<const T>(r.value)),
        prior(r.prior ? static_cast<const Compute*>(r.prior->const_data_ptr()) : nullptr),
        grad_prior(nullptr) {}

  // Returns the first channel of group g, or C if no channels remain for this group.
  RELOPS_HOST_DEVICE int64_t first_channel(int64_t g) const { return g * m < C ? g * m : C; }
};

template <class F>
void dispatch_similarity(Similarity similarity, F f) {
  switch (similarity) {
    case Similarity::kSquaredDifference:
      return f(std::integral_constant<Similarity, Similarity::kSquaredDifference>{});
    case Similarity::kAbsoluteDifference:
      return f(std::integral_constant<Similarity, Similarity::kAbsoluteDifference>{});
    case Similarity::kProduct:
      return f(std::integral_constant<Similarity, Similarity::kProduct>{});
  }
}

using LocalRelationGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The ops with the signatures of library.cpp, built from two static functions of a device's Kernels. Neither function
// is called if there are no channels or no pixels:
//   template <class T> void forward(const LocalRelation&, const LocalRelationArgs<T>&)
//   template <class T> void backward(const LocalRelation&, const LocalRelationArgs<T>&, const LocalRelationGrads&)
template <class Kernels>
struct LocalRelationOps {
  static Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& prior,
                        int64_t k, int64_t stride, int64_t dilation, std::string similarity, std::string border) {
    const LocalRelation r(query, key, value, prior, k, stride, dilation, similarity, border);
    const Tensor output = r.new_output();
    if (output.numel() == 0) return output;
    dispatch_features(r.op, r.value.scalar_type(), [&](auto t) {
      using T = typename decltype(t)::type;
      LocalRelationArgs<T> a(r);
      a.output = map_of<T>(output);
      Kernels::forward(r, a);
    });
    return output;
  }

  static LocalRelationGrads backward(const Tensor& grad_output_, const Tensor& query, const Tensor& key,
                                     const Tensor& value, const std::optional<Tensor>& prior, int64_t k, int64_t stride,
                                     int64_t dilation, std::string similarity, std::string border,
                                     std::vector<bool> needs_grad) {
    const LocalRelation r(query, key, value, prior, k, stride, dilation, similarity, border);
    check_shape(r.op, "grad_output", grad_output_, {r.N, r.C, r.Ho, r.Wo});
    STD_TORCH_CHECK(grad_output_.scalar_type() == r.value.scalar_type() && grad_output_.device() == r.value.device(),
                    r.op, ": grad_output has the wrong dtype or device");
    STD_TORCH_CHECK(needs_grad.size() == 4, r.op, ": needs_grad must have 4 flags");
    needs_grad[3] = needs_grad[3] && r.prior;
    const Tensor grad_output = as_map(grad_output_);
    const Tensor* const inputs[] = {&query, &key, &value};
    const auto new_grad = [&](int i) {
      const Tensor& x = *inputs[i];
      return !needs_grad[i] ? none_like(x)
                            : torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                                   memory_format(is_channels_last(x)));
    };
    const LocalRelationGrads grads{
        new_grad(0), new_grad(1), new_grad(2),
        needs_grad[3] ? torch::stable::new_empty(*r.prior, r.prior->sizes()) : none_like(r.value)};
    const auto& [grad_query, grad_key, grad_value, grad_prior] = grads;
    if (grad_output.numel() == 0) {
      for (const Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_prior}) torch::stable::fill_(*grad, 0);
    } else {
      dispatch_features(r.op, r.value.scalar_type(), [&](auto t) {
        using T = typename decltype(t)::type;
        LocalRelationArgs<T> a(r);
        a.grad_output = map_of<const T>(grad_output);
        if (needs_grad[0]) a.grad_query = map_of<T>(std::get<0>(grads));
        if (needs_grad[1]) a.grad_key = map_of<T>(std::get<1>(grads));
        if (needs_grad[2]) a.grad_value = map_of<T>(std::get<2>(grads));
        if (needs_grad[3]) a.grad_prior = static_cast<ComputeType<T>*>(std::get<3>(grads).mutable_data_ptr());
        Kernels::backward(r, a, grads);
      });
    }
    return grads;
  }
};

template <class Kernels>
void register_local_relation(auto& library) {
  using Ops = LocalRelationOps<Kernels>;
  library.impl("local_relation", TORCH_BOX(&Ops::forward));
  library.impl("_local_relation_backward", TORCH_BOX(&Ops::backward));
}

}  // namespace relops
