// Functions that all CUDA ops use: the current stream, grid sizes, limits of shared memory, wide loads, conversions,
// reductions to memory, and sums over lanes.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dispatch.h"
#include "common/host_device.h"

namespace relops {

// Returns torch's current stream on the device. (stable::accelerator provides the native handle only in torch 2.13 and
// later.)
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Returns the tensor if it is contiguous and aligned to 16 bytes, otherwise a contiguous and aligned copy. A view with
// a storage offset may be unaligned.
inline torch::stable::Tensor aligned(const torch::stable::Tensor& tensor) {
  const torch::stable::Tensor dense = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

constexpr unsigned kAll = 0xffffffffu;  // the mask of all lanes of a warp

// Returns `blocks` as the size of a one-dimensional grid, or raises an error if it is too large.
inline unsigned grid_size(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 2147483647, op, ": the input is too large for one launch (", blocks, " blocks)");
  return static_cast<unsigned>(blocks);
}

inline int current_device() {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

// The number of bytes of shared memory that a block can use on every supported device (that of sm_75).
constexpr int kSmallestSharedLimit = 64 << 10;

// Returns the number of bytes of shared memory that a block can use on the current device, but at most `bytes`.
inline int shared_memory_limit(int bytes) {
  int limit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()));
  return std::min(bytes, limit);
}

// Allows `kernel` to use shared_memory_limit(bytes) bytes of dynamic shared memory on the current device. `bytes` must
// be the same in all calls for a kernel, because the threads of the host share this setting.
template <auto kernel>
void allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> done;  // bit mask of devices
  const int device = current_device();
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done & bit) return;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit(bytes)));
  done |= bit;
}

// V values that are loaded and stored with one instruction. Their total size must be 2, 4, 8 or 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T x[V];
};

// Loads a Pack<T, V> from p if `active`; otherwise returns zeros. The load is non-coherent (ld.global.nc), so nothing
// may write to the memory at p while the kernel runs. The load is predicated, because with a branch, the compiler would
// not issue several loads before it waits for the first.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p, bool active = true) {
  constexpr int kBytes = sizeof(T) * V;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDA_ARCH__
  Pack<T, V> pack;
  const int predicate = active;
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
  return active ? *reinterpret_cast<const Pack<T, V>*>(p) : Pack<T, V>{};
#endif
}

template <class T, int V>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Converts V values to the compute type. Two values of 16 bits share a register; converting them one by one would take
// another instruction per value to separate them.
template <class T, int V>
__device__ __forceinline__ void to_compute(const Pack<T, V>& pack, ComputeType<T> (&x)[V]) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16> && V % 2 == 0) {
    uint32_t words[V / 2];
    memcpy(words, &pack, sizeof(words));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const uint32_t bits = v % 2 == 0 ? words[v / 2] << 16 : words[v / 2] & 0xffff0000u;
      memcpy(&x[v], &bits, 4);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = static_cast<ComputeType<T>>(pack.x[v]);
  }
}

// The number of neighboring values that one reduction to memory adds. Hopper adds four floats.
template <class Compute, int V>
__device__ constexpr int reduction_width() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (std::is_same_v<Compute, float> && V % 4 == 0) return 4;
#endif
  return 1;
}

// Adds x[0..W) to p[0..W). Each addition is atomic and does not return the sum.
template <int W, class Compute>
__device__ __forceinline__ void reduce_add(Compute* p, const Compute (&x)[W]) {
#ifdef __CUDA_ARCH__
  if constexpr (W == 4)
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                 "f"(x[3])
                 : "memory");
  else
#endif
#pragma unroll
    for (int k = 0; k < W; ++k) atomicAdd(p + k, x[k]);
}

// Divides a warp into groups of `group` neighboring lanes, where `group` is a power of two, and returns the sum of x
// over the lane's group. Every lane of the warp must call this function.
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

// Returns the sum of x over the lanes up to this one. Every lane of the warp must call this function.
__device__ __forceinline__ int inclusive_sum(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_sync(kAll, x, max(lane - distance, 0));
    if (lane >= distance) x += other;
  }
  return x;
}

}  // namespace relops
