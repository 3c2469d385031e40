// Macros and functions for code that compiles for both host and device and gives bitwise identical results on both.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define RELOPS_HOST_DEVICE __host__ __device__
#define RELOPS_HOST_DEVICE_INLINE __host__ __device__ __forceinline__
#else
#define RELOPS_HOST_DEVICE
// Inlining is forced, because a template that takes vectors of common/cpu/simd.h is instantiated for the instruction
// set of its own file, not for that of the caller. Without inlining, the caller and the function would disagree on how
// vectors are passed.
#define RELOPS_HOST_DEVICE_INLINE inline __attribute__((always_inline))
#endif

namespace relops {

RELOPS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns a * b, rounded. The product is never fused with an addition, because the fused result would differ between
// devices. On the CPU, a file that is compiled for a target with fused operations must disable them with
// fp-contract=off.
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
