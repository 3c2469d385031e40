// Dispatch from the dtype of a tensor, known at run time, to a C++ type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace relops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// The type in which sums, coordinates and weights are computed: double for float64 tensors, float for all others.
template <class T>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <class T>
using ComputeType = typename ComputeTypeOf<T>::type;

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for features of type T.
template <class F>
void dispatch_features(const char* op, ScalarType features, F f) {
  switch (features) {
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    default:
      STD_TORCH_CHECK(false, op, ": features must be float64, float32, float16 or bfloat16");
  }
}

// Calls f(Type<T>{}, Type<U>{}) for features of type T and coordinates of type U. U is the same type as T. If T has 16
// bits, U may also be float.
template <class F>
void dispatch_features_and_coordinates(const char* op, ScalarType features, ScalarType coordinates, F f) {
  const bool same = features == coordinates;
  STD_TORCH_CHECK(same || coordinates == ScalarType::Float, op,
                  ": coordinates must have the dtype of the features, or be float32 if the features have 16 bits");
  switch (features) {
    case ScalarType::Double:
      STD_TORCH_CHECK(same, op, ": coordinates must be float64 if the features are float64");
      return f(Type<double>{}, Type<double>{});
    case ScalarType::Float:
      return f(Type<float>{}, Type<float>{});
    case ScalarType::Half:
      return same ? f(Type<Half>{}, Type<Half>{}) : f(Type<Half>{}, Type<float>{});
    case ScalarType::BFloat16:
      return same ? f(Type<BFloat16>{}, Type<BFloat16>{}) : f(Type<BFloat16>{}, Type<float>{});
    default:
      STD_TORCH_CHECK(false, op, ": features must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace relops
