// Adds up the partial sums that blocks have stored in memory. This is the second stage of a deterministic sum.
#pragma once

#include "common/cuda/device.cuh"

namespace relops {

constexpr int kPartialThreads = 256;
constexpr int kPartialWarps = kPartialThreads / 32;

// Computes result[i] = sum over k of partials[k * stride + i] in a fixed order. A block computes 32 results, and its
// warps divide the partial sums of each result among themselves. `result` may be equal to `partials`.
template <class Compute>
__global__ __launch_bounds__(kPartialThreads) void sum_of_partials_kernel(const Compute* partials, int64_t count,
                                                                          int64_t stride, int64_t size,
                                                                          Compute* result) {
  __shared__ Compute warp_sums[kPartialWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = int64_t{blockIdx.x} * 32 + lane;
  Compute sum = 0;
  if (i < size)
    for (int64_t k = warp; k < count; k += kPartialWarps) sum += partials[k * stride + i];
  warp_sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= size) return;
  for (int other = 1; other < kPartialWarps; ++other) sum += warp_sums[other][lane];
  result[i] = sum;
}

template <class Compute>
void launch_sum_of_partials(const char* op, const Compute* partials, int64_t count, int64_t stride, int64_t size,
                            Compute* result, cudaStream_t stream) {
  const unsigned blocks = grid_size(op, ceil_div(size, 32));
  sum_of_partials_kernel<Compute><<<blocks, kPartialThreads, 0, stream>>>(partials, count, stride, size, result);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace relops
