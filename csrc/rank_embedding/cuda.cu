// rank_embedding on CUDA.
//
// In the forward pass, a thread computes one frequency once and uses it for several ranks. Neighboring threads have
// neighboring frequencies, so a warp writes neighboring outputs. If there are few frequencies, a warp covers several
// ranks. Writing the output limits the speed or, on devices with slow double precision, the arithmetic, which is about
// 30 double-precision operations per angle.
//
// In the backward pass, a warp processes a rank and sums over its frequencies.

#include <algorithm>

#include "common/cuda/device.cuh"
#include "rank_embedding/problem.h"

namespace relops {

namespace {

constexpr int kRankThreads = 256;
constexpr int kRankWarps = kRankThreads / 32;
constexpr int64_t kRequestedBlocks = 1024;

__device__ __forceinline__ void sin_cos_of_any(double angle, double& s, double& c) {
  if (fabs(angle) < kLargeAngle) {
    sin_cos(angle, s, c);
  } else {  // large or NaN
    s = sin(angle);
    c = cos(angle);
  }
}

// A block processes `ranks` ranks with `width` frequencies each, `height` ranks at a time. width * height is the number
// of threads.
template <class T, class O>
__global__ __launch_bounds__(256, 2) void rank_embedding_kernel(const __grid_constant__ RankEmbeddingArgs<T, O> p,
                                                                unsigned tiles, int width, int64_t ranks) {
  const int64_t j = int64_t{blockIdx.x % tiles} * width + threadIdx.x % width;
  if (j >= p.half) return;
  const double w = frequency(p.wavelength, j, p.half);
  const int height = blockDim.x / width;
  const int64_t first = blockIdx.x / tiles * ranks, end = min(first + ranks, p.count);
  for (int64_t i = first + threadIdx.x / width; i < end; i += height) {
    double s, c;
    sin_cos_of_any(static_cast<double>(p.ranks[i]) * w, s, c);
    O* const out = p.output + i * 2 * p.half + j;
    out[0] = static_cast<O>(static_cast<ComputeType<O>>(s));
    out[p.half] = static_cast<O>(static_cast<ComputeType<O>>(c));
  }
}

template <class T>
__global__ __launch_bounds__(256,
                             2) void rank_embedding_backward_kernel(const __grid_constant__ RankEmbeddingArgs<T, T> p) {
  using Compute = ComputeType<T>;
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t{blockIdx.x} * kRankWarps + threadIdx.x / 32;
  double total = 0;
  if (i < p.count) {
    const double rank = static_cast<double>(static_cast<Compute>(p.ranks[i]));
    const T* const grad = p.grad_output + i * 2 * p.half;
    for (int64_t j = lane; j < p.half; j += 32) {
      const double w = frequency(p.wavelength, j, p.half);
      double s, c;
      sin_cos_of_any(rank * w, s, c);
      total += w * (c * static_cast<Compute>(grad[j]) - s * static_cast<Compute>(grad[p.half + j]));
    }
  }
  total = group_sum(total, 32);
  if (i < p.count && lane == 0) p.grad_ranks[i] = static_cast<T>(static_cast<Compute>(total));
}

template <class T, class O>
void launch_forward(const char* op, const RankEmbeddingArgs<T, O>& args, cudaStream_t stream) {
  int width = 1;
  while (width < kRankThreads && width < args.half) width *= 2;
  const int64_t tiles = ceil_div(args.half, width);
  // Computing a frequency costs as much as several sines, so a thread processes several ranks if enough blocks remain.
  const int64_t ranks_per_thread =
      std::clamp<int64_t>(args.count * tiles * width / (kRankThreads * kRequestedBlocks), 1, 16);
  const int64_t ranks = ranks_per_thread * (kRankThreads / width);
  const unsigned blocks = grid_size(op, tiles * ceil_div(args.count, ranks));
  rank_embedding_kernel<T, O><<<blocks, kRankThreads, 0, stream>>>(args, static_cast<unsigned>(tiles), width, ranks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_backward(const char* op, const RankEmbeddingArgs<T, T>& args, cudaStream_t stream) {
  const unsigned blocks = grid_size(op, ceil_div(args.count, kRankWarps));
  rank_embedding_backward_kernel<T><<<blocks, kRankThreads, 0, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Kernels {
  template <class T, class O>
  static void forward(const char* op, const Tensor& ranks, const RankEmbeddingArgs<T, O>& args) {
    const torch::stable::accelerator::DeviceGuard guard(ranks.get_device_index());
    launch_forward(op, args, current_stream(ranks.get_device_index()));
  }

  template <class T>
  static void backward(const char* op, const Tensor& ranks, const RankEmbeddingArgs<T, T>& args) {
    const torch::stable::accelerator::DeviceGuard guard(ranks.get_device_index());
    launch_backward(op, args, current_stream(ranks.get_device_index()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_rank_embedding<Kernels>(m); }

}  // namespace relops
