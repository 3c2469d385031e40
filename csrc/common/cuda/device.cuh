// What every CUDA op needs: device guard and stream, wide loads, reductions to memory, launch arithmetic.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dispatch.h"
#include "common/host_device.h"

namespace relops {

// torch's current stream on the device. (stable::accelerator's own accessor of the native handle needs torch 2.13.)
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Dense, and aligned to 16 bytes, which a view with an offset need not be.
inline torch::stable::Tensor aligned(const torch::stable::Tensor& tensor) {
  const torch::stable::Tensor dense = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp

// Blocks of a one-dimensional grid.
inline unsigned grid_size(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 2147483647, op, ": too large for one launch (", blocks, " blocks)");
  return static_cast<unsigned>(blocks);
}

// V values that are loaded and stored with one instruction; sizeof is 2, 4, 8 or 16.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T x[V];
};

// Pack<T, V> from p where `wanted`, else zeros. p is read through the read-only path, so nothing may write there during
// the launch. A predicate and not a branch, which would keep the compiler from having several loads in flight.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p, bool wanted = true) {
  constexpr int kBytes = sizeof(T) * V;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDA_ARCH__
  Pack<T, V> pack;
  const int predicate = wanted;
  if constexpr (kBytes == 16) {
    uint32_t x, y, z, w;
    asm("{.reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        " @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(x), "=&r"(y), "=&r"(z), "=&r"(w)
        : "l"(p), "r"(predicate));
    const uint4 raw{x, y, z, w};
    memcpy(&pack, &raw, kBytes);
  } else if constexpr (kBytes == 8) {
    uint32_t x, y;
    asm("{.reg .pred p; setp.ne.s32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.nc.v2.b32 {%0, %1}, [%2];}"
        : "=&r"(x), "=&r"(y)
        : "l"(p), "r"(predicate));
    const uint2 raw{x, y};
    memcpy(&pack, &raw, kBytes);
  } else if constexpr (kBytes == 4) {
    uint32_t raw;
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%1];}"
        : "=&r"(raw)
        : "l"(p), "r"(predicate));
    memcpy(&pack, &raw, kBytes);
  } else {
    uint16_t raw;
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b16 %0, 0; @p ld.global.nc.b16 %0, [%1];}"
        : "=&h"(raw)
        : "l"(p), "r"(predicate));
    memcpy(&pack, &raw, kBytes);
  }
  return pack;
#else  // the emulation of tests/cuda_emulation
  return wanted ? *reinterpret_cast<const Pack<T, V>*>(p) : Pack<T, V>{};
#endif
}

template <class T, int V>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Where `wanted`: p[0..V) += x[0..V), each element atomically, without reading back. Hopper does four floats in one
// instruction, for which p must be aligned to 16 bytes.
template <int V>
__device__ __forceinline__ void reduce_add(float* p, const float (&x)[V], bool wanted) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (V % 4 == 0) {
    const int predicate = wanted;
#pragma unroll
    for (int i = 0; i < V; i += 4)
      asm volatile(
          "{.reg .pred p; setp.ne.s32 p, %5, 0;"
          " @p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};}" ::"l"(p + i),
          "f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3]), "r"(predicate)
          : "memory");
    return;
  }
#endif
  if (!wanted) return;
#pragma unroll
  for (int i = 0; i < V; ++i) atomicAdd(p + i, x[i]);
}

template <int V>
__device__ __forceinline__ void reduce_add(double* p, const double (&x)[V], bool wanted) {
  if (!wanted) return;
#pragma unroll
  for (int i = 0; i < V; ++i) atomicAdd(p + i, x[i]);
}

// p + row * stride in bytes: one multiply-add, where 64-bit factors would cost half a dozen instructions.
template <class T>
__device__ __forceinline__ T* row_at(T* p, int row, unsigned stride) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + uint64_t{static_cast<unsigned>(row)} * stride);
}

// Sum over a group of 2^k neighboring lanes; every lane of the warp must call it.
template <class Compute>
__device__ __forceinline__ Compute group_sum(Compute x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

template <class Compute>
__device__ __forceinline__ Compute group_max(Compute x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) {
    const Compute other = __shfl_xor_sync(kAll, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace relops
