// A batch of vectors to which the same operations are applied. In a chain of dependent operations, each operation waits
// for the previous one. If the operations of several vectors are interleaved, the processor does not have to look far
// ahead to find an operation that is ready.
//
// Vector is the type Vec<Compute> (common/cpu/simd.h) of any instruction set, so every function of this file must be
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
