// Sums of shares that blocks have left in memory: the second of two stages, in an order that does not vary.
#pragma once

#include "common/cuda/device.cuh"

namespace relops {

constexpr int kShareThreads = 256;
constexpr int kShareWarps = kShareThreads / 32;

// result[i] = sum over shares of shares[share * stride + i], in their order: a block has 32 of them, its warps take
// shares in turn. result may be the first share.
template <class C>
__global__ __launch_bounds__(kShareThreads) void sum_of_shares_kernel(const C* shares, int64_t count, int64_t stride,
                                                                      int64_t size, C* result) {
  __shared__ C of_warps[kShareWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = int64_t{blockIdx.x} * 32 + lane;
  C sum = 0;
  if (i < size)
    for (int64_t share = warp; share < count; share += kShareWarps) sum += shares[share * stride + i];
  of_warps[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= size) return;
  for (int of = 1; of < kShareWarps; ++of) sum += of_warps[of][lane];
  result[i] = sum;
}

template <class C>
void launch_sum_of_shares(const char* op, const C* shares, int64_t count, int64_t stride, int64_t size, C* result,
                          cudaStream_t stream) {
  const unsigned blocks = grid_size(op, ceil_div(size, 32));
  sum_of_shares_kernel<C><<<blocks, kShareThreads, 0, stream>>>(shares, count, stride, size, result);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace relops
