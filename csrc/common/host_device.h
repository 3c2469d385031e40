// What lets the same source be host and device code, and give the same bits on both.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define RELOPS_HOST_DEVICE __host__ __device__
#define RELOPS_HOST_DEVICE_INLINE __host__ __device__ __forceinline__
#else
#define RELOPS_HOST_DEVICE
// Always: templates that take vectors of common/cpu/simd.h are instantiated for the instruction set of the file, not of
// the caller, so that a call which is left over would pass these vectors where they are not expected.
#define RELOPS_HOST_DEVICE_INLINE inline __attribute__((always_inline))
#endif

namespace relops {

RELOPS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a * b, rounded: never fused with an addition, which would round differently from device to device. On the CPU it is
// the file that must not be compiled to fuse (`#pragma GCC optimize("fp-contract=off")`) where its target can.
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
