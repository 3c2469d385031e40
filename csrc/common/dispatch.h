// From a tensor's dtype at run time to a C++ type at compile time.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace relops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// The type in which sums, coordinates and weights are computed: float32 or better, whatever is stored.
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
      STD_TORCH_CHECK(false, op, ": expected float64, float32, float16 or bfloat16");
  }
}

// Calls f(Type<T>{}, Type<U>{}) for features of type T and coordinates of type U, where U is T, or float beside a
// 16-bit T.
template <class F>
void dispatch_features_and_coordinates(const char* op, ScalarType features, ScalarType coordinates, F f) {
  const bool same = features == coordinates;
  STD_TORCH_CHECK(same || coordinates == ScalarType::Float, op,
                  ": coordinates must have the dtype of the features, or be float32 beside 16-bit features");
  switch (features) {
    case ScalarType::Double:
      STD_TORCH_CHECK(same, op, ": float64 features need float64 coordinates");
      return f(Type<double>{}, Type<double>{});
    case ScalarType::Float:
      return f(Type<float>{}, Type<float>{});
    case ScalarType::Half:
      return same ? f(Type<Half>{}, Type<Half>{}) : f(Type<Half>{}, Type<float>{});
    case ScalarType::BFloat16:
      return same ? f(Type<BFloat16>{}, Type<BFloat16>{}) : f(Type<BFloat16>{}, Type<float>{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float64, float32, float16 or bfloat16");
  }
}

}  // namespace relops
