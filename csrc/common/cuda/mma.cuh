// Small matrix products that a warp computes on tensor cores, for every dtype.
//
// A product is c += a b^T, where a has 16 rows and b has 8 rows. With g = lane / 4 and t = lane % 4, each lane holds
//   of a: rows g and g + 8, kLaneDepth elements each;
//   of b: row g, kLaneDepth elements;
//   of c: rows g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2t and 2t + 1.
// Each row of a and b is divided among four lanes. The elements of a row may be divided in any way, as long as a and b
// are divided in the same way.
//
// A tensor core reads only 11 significant bits of a float32 operand (TF32). An operand that must keep the precision of
// float32 is split into two TF32 numbers. The product of two split operands takes three tensor core products and is
// accurate to about 21 bits. Sums that would be rounded to 16 bits before the next multiplication are split in the same
// way. sm_75 has tensor cores only for float16. There, other products are computed without tensor cores, and float32 is
// not rounded.
#pragma once

#include <bit>

#include "common/cuda/device.cuh"

namespace relops {

template <class T>
constexpr int kLaneDepth = sizeof(T) == 2 ? 4 : 2;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kRoundsFloat = false;
#else
constexpr bool kRoundsFloat = true;  // whether products of float32 are computed from TF32 numbers
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
template <class T>
__device__ inline ComputeType<T> mma_input(T x) {
  return static_cast<ComputeType<T>>(x);
}
#ifndef __CUDACC__
// The emulation reads a float32 operand of at most 12 significant bits, as MmaSplit promises. How a tensor core rounds
// the last of these bits is not specified, so the emulation rounds some operands up and others down. An operand with
// more bits becomes NaN, unless it is so small that its rounding error does not matter.
inline float mma_input(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0xfffu) != 0 && (x >= 0x1p-100f || x <= -0x1p-100f)) bits = 0x7fffffffu;
  if (x - x == 0 && __popc(bits) % 2 == 1) bits += 0x1000u;
  return std::bit_cast<float>(bits & 0xffffe000u);
}
#endif

// Sets `result` to the part of a row that lane `lane` holds in x.
template <class T, int kSize>
__device__ __forceinline__ void shuffle_row(const T (&x)[kSize], int lane, ComputeType<T> (&result)[kSize]) {
  unsigned long long words[sizeof(x) / 8];
  memcpy(words, x, sizeof(x));
#pragma unroll
  for (auto& word : words) word = __shfl_sync(kAll, word, lane);
  T got[kSize];
  memcpy(got, words, sizeof(x));
#pragma unroll
  for (int e = 0; e < kSize; ++e) result[e] = mma_input(got[e]);
}
#endif

template <class T>
__device__ __forceinline__ void mma(ComputeType<T> (&c)[4], const T (&a)[2][kLaneDepth<T>],
                                    const T (&b)[kLaneDepth<T>]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, double>) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+d"(c[2 * row]), "+d"(c[2 * row + 1])
                     : "d"(a[row][e]), "d"(b[e]));
  } else {
    uint32_t x[4], y[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      constexpr int kOfRegister = kLaneDepth<T> / 2;
      memcpy(&x[2 * e], &a[0][kOfRegister * e], 4);
      memcpy(&x[2 * e + 1], &a[1][kOfRegister * e], 4);
      memcpy(&y[e], &b[kOfRegister * e], 4);
    }
#define RELOPS_MMA(shape_and_types)                             \
  asm volatile("mma.sync.aligned." shape_and_types              \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}," \
               " {%0, %1, %2, %3};"                             \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]))
    if constexpr (std::is_same_v<T, float>)
      RELOPS_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
    else if constexpr (std::is_same_v<T, Half>)
      RELOPS_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    else
      RELOPS_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#undef RELOPS_MMA
  }
#else  // sm_75, and the emulation of tests/cuda_emulation
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, Half>) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      uint32_t x[2], y;
      memcpy(&x[0], &a[0][e], 4);
      memcpy(&x[1], &a[1][e], 4);
      memcpy(&y, &b[e], 4);
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(x[0]), "r"(x[1]), "r"(y));
    }
    return;
  }
#endif
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int t = 0; t < 4; ++t) {
    ComputeType<T> x[2][kLaneDepth<T>], y[2][kLaneDepth<T>];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shuffle_row(a[i], lane / 4 * 4 + t, x[i]);
      shuffle_row(b, (lane % 4 * 2 + i) * 4 + t, y[i]);
    }
#pragma unroll
    for (int e = 0; e < kLaneDepth<T>; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += x[i / 2][e] * y[i % 2][e];
  }
#endif
}

// Splits an element of an operand into its rounded value and the rest.
template <class T, bool kExact>
struct MmaSplit {
  using Compute = ComputeType<T>;

  static __device__ __forceinline__ void stored(T x, T& high, T& rest) {
    if constexpr (std::is_same_v<T, float>)
      sum(x, high, rest);
    else
      high = x;
  }

  static __device__ __forceinline__ void sum(Compute x, T& high, T& rest) {
    if constexpr (!std::is_same_v<T, float>) {
      high = static_cast<T>(x);
      rest = static_cast<T>(x - static_cast<Compute>(high));
    } else if constexpr (!kRoundsFloat) {
      high = x;
    } else if constexpr (kExact) {
      // The next line rounds to 11 bits, like cvt.rna.tf32, which ptxas translates to the same addition and mask and a
      // test for numbers that are not finite. If the line turns NaN into zero, `rest` is NaN.
      high = std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u);
      // `rest` is at most half a unit in the last of these 11 bits of x, and therefore has at most 24 - 11 - 1 = 12
      // significant bits. It is not rounded to 11 bits, because any rounding of the last bit, by cvt.rna or by the
      // tensor core, has the same error: one unit in the last place of x if the bit is set.
      rest = x - high;
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
      uint32_t bits;
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
      high = __uint_as_float(bits);
#else
      const uint32_t bits = std::bit_cast<uint32_t>(x);
      high = x - x == 0 ? std::bit_cast<float>((bits + 0x1000u) & 0xffffe000u) : x;
#endif
    }
  }
};

template <class T, bool kExact>
struct OperandA {
  T high[2][kLaneDepth<T>], rest[2][kLaneDepth<T>];

  __device__ __forceinline__ void set_stored(int row, int e, T x) {
    MmaSplit<T, kExact>::stored(x, high[row][e], rest[row][e]);
  }
  __device__ __forceinline__ void set_sum(int row, int e, ComputeType<T> x) {
    MmaSplit<T, kExact>::sum(x, high[row][e], rest[row][e]);
  }
};

template <class T, bool kExact>
struct OperandB {
  T high[kLaneDepth<T>], rest[kLaneDepth<T>];

  __device__ __forceinline__ void set_stored(int e, T x) { MmaSplit<T, kExact>::stored(x, high[e], rest[e]); }
};

// Computes c += a b^T. If kSums, a was filled with set_sum(); otherwise, both operands were filled with set_stored().
template <bool kSums, class T, bool kExact>
__device__ __forceinline__ void multiply(ComputeType<T> (&c)[4], const OperandA<T, kExact>& a,
                                         const OperandB<T, kExact>& b) {
  constexpr bool kFloat = kRoundsFloat && std::is_same_v<T, float>;
  if constexpr (kExact && (kFloat || (kSums && sizeof(T) == 2))) mma(c, a.rest, b.high);
  if constexpr (kExact && kFloat) mma(c, a.high, b.rest);
  mma(c, a.high, b.high);
}

}  // namespace relops
