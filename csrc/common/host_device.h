// Macros and functions with which the same source compiles as host and device code and gives the same bits on both.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define RELOPS_HOST_DEVICE __host__ __device__
#define RELOPS_HOST_DEVICE_INLINE __host__ __device__ __forceinline__
#else
#define RELOPS_HOST_DEVICE
// Inlining is forced, because templates that take vectors of common/cpu/simd.h are instantiated for the instruction set
// of the file and not of the caller. A call that was not inlined would pass the vectors in a way that the function does
// not expect.
#define RELOPS_HOST_DEVICE_INLINE inline __attribute__((always_inline))
#endif

namespace relops {

RELOPS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns a * b, rounded. The product is never fused with an addition, because the fused result would differ between
// devices. On the CPU, a file whose target has fused operations must turn them off itself
// (`#pragma GCC optimize("fp-contract=off")`).
template <class F>
RELOPS_HOST_DEVICE_INLINE F product(F a, F b) {
  return a * b;
}
#ifdef __CUDA_ARCH__
template <>
RELOPS_HOST_DEVICE_INLINE float product(float a, float b) {
  return __fmul_rn(a, b);
}
template <>
RELOPS_HOST_DEVICE_INLINE double product(double a, double b) {
  return __dmul_rn(a, b);
}
#endif

}  // namespace relops
