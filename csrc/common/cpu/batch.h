// Several vectors that go through the same operations side by side. In a chain of dependent operations, each operation
// waits for the previous one. If several chains advance together, step by step, the processor need not look far ahead
// to find an operation that is ready.
//
// Vector is a vector of any instruction set (Vec<Compute> of common/cpu/simd.h), so every function here must be
// inlined.
#pragma once

#include "common/host_device.h"

namespace relops {

template <class Vector, int N>
struct VectorBatch {
  Vector v[N];
};

#define RELOPS_BATCH_OPERATOR(op)                                                                                    \
  template <class Vector, int N>                                                                                     \
  RELOPS_HOST_DEVICE_INLINE VectorBatch<Vector, N> operator op(VectorBatch<Vector, N> a, VectorBatch<Vector, N> b) { \
    _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i) a.v[i] = a.v[i] op b.v[i];                                   \
    return a;                                                                                                        \
  }                                                                                                                  \
  template <class Vector, int N, class Scalar>                                                                       \
  RELOPS_HOST_DEVICE_INLINE VectorBatch<Vector, N> operator op(VectorBatch<Vector, N> a, Scalar b) {                 \
    _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i) a.v[i] = a.v[i] op b;                                        \
    return a;                                                                                                        \
  }
RELOPS_BATCH_OPERATOR(+)
RELOPS_BATCH_OPERATOR(-)
RELOPS_BATCH_OPERATOR(*)
#undef RELOPS_BATCH_OPERATOR

}  // namespace relops
