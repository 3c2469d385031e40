// relation_attention, the object relation module of Relation Networks: the code that CPU and CUDA have in common.
//
//   output[q,m] = sum over keys of p * value,  p = softmax over keys of log(max(b, 1e-6)) + s
//   s = scale * query . key,  b = W[m] . e + bias[m]
//   e = sines and cosines of f_j times each of (log max(|dx|/w, 1e-3), log max(|dy|/h, 1e-3), log wq/wk, log hq/hk)
//
// Since exp(log b + s) = b exp(s), no kernel computes log b: p is max(b, 1e-6) exp(s), normalized.
//
// Angles reach 1000 radians, so they are kept in two parts until whole turns have been removed. A base-2 logarithm is
// stored as n + l, where n is the integer exponent and l is the logarithm of the mantissa. In half turns, an angle is
// (n + l) times the number of half turns per octave of the wave. The product of n and the leading bits of this number
// is exact. Each center is stored as a sum of two numbers, so the difference between close centers is as exact as the
// boxes are. The remaining error of e is about 1e-5 for float32 boxes. Most of this error is the rounding error of dx,
// multiplied by 100.
//
// The half of e that depends on widths and heights is separable. With u and v the angles of the query and the key,
//   W_s sin(u - v) + W_c cos(u - v) = sin v (W_c sin u - W_s cos u) + cos v (W_s sin u + W_c cos u).
// Therefore pairs need sines only for dx and dy. The contribution of the separable half to b is a dot product of 32
// terms of the query and head (the `rotated` weights) with 32 terms of the key.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/host_device.h"
#include "common/series.h"
#include "common/tensors.h"

namespace relops {

constexpr int kWaves = 8;           // number of wavelengths per coordinate
constexpr int kTerms = 2 * kWaves;  // number of terms per coordinate: sines, then cosines
constexpr int kHalf = 2 * kTerms;   // terms of two coordinates: (dx, dy) of the pair, or the separable (w, h)
constexpr int kEmbedding = 2 * kHalf;

constexpr double kWeightFloor = 1e-6;
// log2(1e-3), the lower limit of log2(|dx|/w), in two parts.
constexpr double kRatioFloorExponent = -10, kRatioFloorMantissa = 0.034215715337912984;

// One wavelength. Angles are in half turns and logarithms to base 2 unless stated otherwise.
template <class Compute>
struct Wave {
  Compute per_octave;  // half turns per octave
  Compute high, low;   // the same number in two parts: high times an exponent is exact
  Compute radians;     // radians per unit of the natural logarithm
};

template <class Compute>
struct Waves {
  Wave<Compute> wave[kWaves];
};

template <class Compute>
Waves<Compute> make_waves(double wavelength) {
  Waves<Compute> waves;
  for (int j = 0; j < kWaves; ++j) {
    const double radians = 100 / std::pow(wavelength, j / double{kWaves});
    const double per_octave = radians * 0.69314718055994530942 / 3.14159265358979323846;
    // Exponents and their differences have 9 bits (12 for double), so `high` is limited to the remaining bits of the
    // significand.
    const double unit = std::ldexp(1.0, std::ilogb(per_octave) - (sizeof(Compute) == 4 ? 13 : 39));
    const double high = std::round(per_octave / unit) * unit;
    waves.wave[j] = {static_cast<Compute>(per_octave), static_cast<Compute>(high),
                     static_cast<Compute>(per_octave - high), static_cast<Compute>(radians)};
  }
  return waves;
}

// The base-2 logarithm n + l of a positive number.
template <class F>
struct Log2 {
  F n, l;
};

template <class F>
RELOPS_HOST_DEVICE_INLINE Log2<F> operator-(Log2<F> a, Log2<F> b) {
  return {a.n - b.n, a.l - b.l};
}

// A number that is stored as the sum of two parts.
template <class F>
struct TwoPart {
  F high, low;
};

// Returns exactly (a + b) / 2.
template <class F>
RELOPS_HOST_DEVICE_INLINE TwoPart<F> middle(F a, F b) {
  a = a * 0.5f;
  b = b * 0.5f;
  const F high = a + b, of_b = high - a;
  return {high, (a - (high - of_b)) + (b - of_b)};
}

template <class F>
RELOPS_HOST_DEVICE_INLINE F difference(TwoPart<F> a, TwoPart<F> b) {
  return (a.high - b.high) + (a.low - b.low);
}

// Feature rows with indices [N,I,M]. Each row is dense. Strides are in elements.
template <class T>
struct FeatureRows {
  T* data;
  int64_t n_stride, i_stride, m_stride;
  RELOPS_HOST_DEVICE T* at(int64_t n, int64_t i, int64_t m) const {
    return data + n * n_stride + i * i_stride + m * m_stride;
  }
};

template <class T>
FeatureRows<T> rows_of(const Tensor& tensor) {
  return {static_cast<T*>(const_cast<void*>(tensor.const_data_ptr())), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

// Returns `tensor` [N,I,M,D], or a copy of it if its rows are not dense.
inline Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : dense(tensor);
}

// The checked arguments of the forward pass. The sizes have the same letters as in relops/ops/relation_attention.py.
struct RelationAttention {
  RelationAttention(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& query_boxes_,
                    const Tensor& key_boxes_, const Tensor& geometry_weight_,
                    const std::optional<Tensor>& geometry_bias_, const std::optional<Tensor>& key_mask_,
                    const std::string& geometry, double wavelength, std::optional<double> scale_, bool allow_tf32)
      : by_query(is_by_query(geometry)), wavelength(wavelength), allow_tf32(allow_tf32) {
    STD_TORCH_CHECK(query_.dim() == 4 && key_.dim() == 4 && value_.dim() == 4, op,
                    ": query, key and value must have 4 dimensions");
    N = query_.size(0), Q = query_.size(1), M = query_.size(2), D = query_.size(3);
    K = key_.size(1), Dv = value_.size(3);
    scale = scale_ ? *scale_ : D > 0 ? 1 / std::sqrt(static_cast<double>(D)) : 1;
    check_shape(op, "key", key_, {N, K, M, D});
    check_shape(op, "value", value_, {N, K, M, Dv});
    check_shape(op, "query_boxes", query_boxes_, {N, Q, 4});
    check_shape(op, "key_boxes", key_boxes_, {N, K, 4});
    check_shape(op, "geometry_weight", geometry_weight_, {M, kEmbedding});
    if (geometry_bias_) check_shape(op, "geometry_bias", *geometry_bias_, {M});
    if (key_mask_) check_shape(op, "key_mask", *key_mask_, {N, K});
    STD_TORCH_CHECK(std::isfinite(wavelength) && wavelength > 0 && std::isfinite(scale), op,
                    ": wavelength must be positive and finite, and scale must be finite");
    const auto check = [&](const char* name, const Tensor& tensor, ScalarType dtype) {
      STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.device() == query_.device(), op, ": ", name,
                      " has the wrong dtype or device");
    };
    const ScalarType features = query_.scalar_type(), coordinates = compute_dtype(features);
    check("key", key_, features);
    check("value", value_, features);
    check("query_boxes", query_boxes_, coordinates);
    check("key_boxes", key_boxes_, coordinates);
    check("geometry_weight", geometry_weight_, coordinates);
    if (geometry_bias_) check("geometry_bias", *geometry_bias_, coordinates);
    if (key_mask_) check("key_mask", *key_mask_, ScalarType::Bool);
    query = with_dense_rows(query_);
    key = with_dense_rows(key_);
    value = with_dense_rows(value_);
    query_boxes = dense(query_boxes_);
    key_boxes = dense(key_boxes_);
    geometry_weight = dense(geometry_weight_);
    geometry_bias = dense(geometry_bias_);
    key_mask = dense(key_mask_);
  }

  static bool is_by_query(const std::string& geometry) {
    STD_TORCH_CHECK(geometry == "paper" || geometry == "official", op, ": geometry must be paper or official, got ",
                    geometry);
    return geometry == "official";
  }

  static constexpr const char* op = "relops.relation_attention";
  int64_t N, Q, K, M, D, Dv;
  Tensor query, key, value;  // with dense rows
  Tensor query_boxes, key_boxes, geometry_weight;
  std::optional<Tensor> geometry_bias, key_mask;
  bool by_query;  // geometry "official": dx and dy are divided by the size of the query's box instead of the key's
  double wavelength, scale;
  bool allow_tf32;
};

// The arguments of the kernels. Outputs and gradients are dense; a gradient that is not requested is null.
template <class T>
struct RelationAttentionArgs {
  using Compute = ComputeType<T>;

  int64_t N, Q, K, M, D, Dv;
  FeatureRows<const T> query, key, value;
  const Compute *query_boxes, *key_boxes;  // [N,Q,4], [N,K,4]
  const Compute* weight;                   // [M,64]
  const Compute* bias;                     // [M]; null for zeros
  const bool* mask;                        // [N,K]; null if no key is masked
  bool by_query;
  Compute scale;
  Waves<Compute> waves;

  T* output;           // [N,Q,M,Dv]
  Compute* logsumexp;  // [N,Q,M]; infinite for a query without keys

  FeatureRows<const T> grad_output;  // this and the following are only for the backward pass
  // [N,Q,M]: grad_output . output. Large terms cancel in the gradients of the geometry, so the rounding of a 16-bit
  // output would be noticeable. For 16-bit types, delta is therefore computed from a second, unrounded output.
  Compute* delta;
  T *grad_query, *grad_key, *grad_value;
  Compute *grad_query_boxes, *grad_key_boxes, *grad_weight, *grad_bias;

  explicit RelationAttentionArgs(const RelationAttention& r)
      : N(r.N),
        Q(r.Q),
        K(r.K),
        M(r.M),
        D(r.D),
        Dv(r.Dv),
        query(rows_of<const T>(r.query)),
        key(rows_of<const T>(r.key)),
        value(rows_of<const T>(r.value)),
        query_boxes(static_cast<const Compute*>(r.query_boxes.const_data_ptr())),
        key_boxes(static_cast<const Compute*>(r.key_boxes.const_data_ptr())),
        weight(static_cast<const Compute*>(r.geometry_weight.const_data_ptr())),
        bias(r.geometry_bias ? static_cast<const Compute*>(r.geometry_bias->const_data_ptr()) : nullptr),
        mask(r.key_mask ? static_cast<const bool*>(r.key_mask->const_data_ptr()) : nullptr),
        by_query(r.by_query),
        scale(static_cast<Compute>(r.scale)),
        waves(make_waves<Compute>(r.wavelength)),
        output(nullptr),
        logsumexp(nullptr),
        grad_output{},
        delta(nullptr),
        grad_query(nullptr),
        grad_key(nullptr),
        grad_value(nullptr),
        grad_query_boxes(nullptr),
        grad_key_boxes(nullptr),
        grad_weight(nullptr),
        grad_bias(nullptr) {}
};

using RelationAttentionGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The ops with the signatures of library.cpp, built from two static functions of a device's Kernels. Neither function
// is called if there is no pair of a query and a key, or if the output is empty:
//   template <class T> void forward(const RelationAttention&, const RelationAttentionArgs<T>&)
//   template <class T> void backward(const RelationAttention&, const RelationAttentionArgs<T>&)
template <class Kernels>
struct RelationAttentionOps {
  static std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& query_boxes, const Tensor& key_boxes,
                                            const Tensor& geometry_weight, const std::optional<Tensor>& geometry_bias,
                                            const std::optional<Tensor>& key_mask, std::string geometry,
                                            double wavelength, std::optional<double> scale, bool allow_tf32) {
    const RelationAttention r(query, key, value, query_boxes, key_boxes, geometry_weight, geometry_bias, key_mask,
                              geometry, wavelength, scale, allow_tf32);
    const Tensor output = torch::stable::new_empty(r.query, {r.N, r.Q, r.M, r.Dv});
    const Tensor logsumexp = torch::stable::new_empty(r.query_boxes, {r.N, r.Q, r.M});
    if (r.K == 0 || output.numel() == 0) {
      torch::stable::fill_(output, 0);
      torch::stable::fill_(logsumexp, std::numeric_limits<double>::infinity());
      return {output, logsumexp};
    }
    dispatch_features(r.op, r.query.scalar_type(), [&](auto t) {
      using T = typename decltype(t)::type;
      RelationAttentionArgs<T> a(r);
      a.output = static_cast<T*>(output.mutable_data_ptr());
      a.logsumexp = static_cast<ComputeType<T>*>(logsumexp.mutable_data_ptr());
      Kernels::forward(r, a);
    });
    return {output, logsumexp};
  }

  static RelationAttentionGrads backward(const Tensor& grad_output_, const Tensor& query, const Tensor& key,
                                         const Tensor& value, const Tensor& query_boxes, const Tensor& key_boxes,
                                         const Tensor& geometry_weight, const std::optional<Tensor>& geometry_bias,
                                         const std::optional<Tensor>& key_mask, const Tensor& output_,
                                         const Tensor& logsumexp_, std::string geometry, double wavelength,
                                         std::optional<double> scale, bool allow_tf32, std::vector<bool> needs_grad) {
    const RelationAttention r(query, key, value, query_boxes, key_boxes, geometry_weight, geometry_bias, key_mask,
                              geometry, wavelength, scale, allow_tf32);
    for (const Tensor* tensor : {&grad_output_, &output_}) {
      const char* name = tensor == &output_ ? "output" : "grad_output";
      check_shape(r.op, name, *tensor, {r.N, r.Q, r.M, r.Dv});
      STD_TORCH_CHECK(tensor->scalar_type() == r.query.scalar_type() && tensor->device() == r.query.device(), r.op,
                      ": ", name, " has the wrong dtype or device");
    }
    check_shape(r.op, "logsumexp", logsumexp_, {r.N, r.Q, r.M});
    STD_TORCH_CHECK(logsumexp_.scalar_type() == r.query_boxes.scalar_type() && logsumexp_.device() == r.query.device(),
                    r.op, ": logsumexp has the wrong dtype or device");
    STD_TORCH_CHECK(needs_grad.size() == 7, r.op, ": needs_grad must have 7 flags");
    needs_grad[6] = needs_grad[6] && r.geometry_bias;
    const Tensor grad_output = with_dense_rows(grad_output_), output = dense(output_), logsumexp = dense(logsumexp_);
    const Tensor inputs[] = {r.query,
                             r.key,
                             r.value,
                             r.query_boxes,
                             r.key_boxes,
                             r.geometry_weight,
                             needs_grad[6] ? *r.geometry_bias : r.geometry_weight};
    std::vector<Tensor> grads;
    for (int i = 0; i < 7; ++i)
      grads.push_back(needs_grad[i] ? torch::stable::new_empty(inputs[i], inputs[i].sizes()) : none_like(inputs[i]));
    if (r.K == 0 || output.numel() == 0) {
      for (const Tensor& grad : grads) torch::stable::fill_(grad, 0);
    } else {
      dispatch_features(r.op, r.query.scalar_type(), [&](auto t) {
        using T = typename decltype(t)::type;
        using Compute = ComputeType<T>;
        RelationAttentionArgs<T> a(r);
        a.grad_output = rows_of<const T>(grad_output);
        a.output = static_cast<T*>(output.mutable_data_ptr());
        a.logsumexp = static_cast<Compute*>(logsumexp.mutable_data_ptr());
        const auto set = [&](auto*& pointer, int i) {
          if (needs_grad[i])
            pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(grads[i].mutable_data_ptr());
        };
        set(a.grad_query, 0);
        set(a.grad_key, 1);
        set(a.grad_value, 2);
        set(a.grad_query_boxes, 3);
        set(a.grad_key_boxes, 4);
        set(a.grad_weight, 5);
        set(a.grad_bias, 6);
        Kernels::backward(r, a);
      });
    }
    return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6]};
  }
};

template <class Kernels>
void register_relation_attention(auto& library) {
  using Ops = RelationAttentionOps<Kernels>;
  library.impl("relation_attention", TORCH_BOX(&Ops::forward));
  library.impl("_relation_attention_backward", TORCH_BOX(&Ops::backward));
}

}  // namespace relops
