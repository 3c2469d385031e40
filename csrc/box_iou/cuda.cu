// box_iou and generalized_box_iou on CUDA.
//
// Forward: a thread keeps one box of `b` in registers and loops over boxes of `a`, so a warp writes neighboring
// outputs. Writing the output limits the speed, and the arithmetic takes nearly as long as the writes. If `b` has few
// boxes, a warp computes several rows of the output.
//
// Backward: a launch computes the gradient of one input. The boxes of this input are called "own" boxes, and those of
// the other input "other" boxes. grad_output has a smaller stride along one of the two inputs, and the lanes of a warp
// process neighboring boxes of that input. If the lanes process own boxes, each lane sums the gradient of one own box,
// and the warps of a block divide the other boxes among themselves. If the lanes process other boxes, each warp sums
// the gradient of one own box and adds up the sums of its lanes at the end. A second launch adds up the sums of the
// blocks in a fixed order. The kernel is bound by arithmetic.

#include <algorithm>

#include "box_iou/problem.h"
#include "common/cuda/device.cuh"

namespace relops {

namespace {

constexpr int kBoxThreads = 256;
constexpr int kBoxWarps = kBoxThreads / 32;
// Each block loops over several tiles, so launching more blocks than can run at the same time has no benefit.
constexpr int64_t kMaxBlocks = 2048;
// If a launch would have fewer blocks than this, each block gets less work and the number of blocks increases.
constexpr int64_t kRequestedBlocks = 1024;

// Loads box i of `boxes` [..,4], which must be aligned to 16 bytes.
__device__ __forceinline__ Box<float> load_box(const float* boxes, int64_t i) {
  const Pack<float, 4> p = load_pack<float, 4>(boxes + 4 * i);
  return {p.x[0], p.x[1], p.x[2], p.x[3]};
}
__device__ __forceinline__ Box<double> load_box(const double* boxes, int64_t i) {
  const Pack<double, 2> p = load_pack<double, 2>(boxes + 4 * i), q = load_pack<double, 2>(boxes + 4 * i + 2);
  return {p.x[0], p.x[1], q.x[0], q.x[1]};
}

template <class Compute>
struct ForwardParams {
  int64_t N, A, B;
  const Compute *a, *b;
  Compute* output;
  int64_t row_tiles, column_tiles;
  int width;  // columns of a tile: a power of two
  int rows;   // rows that each thread computes
};

template <class Compute, bool kGeneralized>
__global__ __launch_bounds__(256, 2) void box_iou_kernel(const __grid_constant__ ForwardParams<Compute> p) {
  const int height = blockDim.x / p.width;
  for (int64_t tile = blockIdx.x; tile < p.N * p.row_tiles * p.column_tiles; tile += gridDim.x) {
    const int64_t column = tile % p.column_tiles * p.width + threadIdx.x % p.width;
    const int64_t row_tile = tile / p.column_tiles % p.row_tiles, n = tile / p.column_tiles / p.row_tiles;
    if (column >= p.B) continue;
    const Box<Compute> b = load_box(p.b, n * p.B + column);
    const Compute area_b = area(b);
    const int64_t first = row_tile * height * p.rows + threadIdx.x / p.width;
    for (int i = 0; i < p.rows; ++i) {
      const int64_t row = first + i * height;
      if (row >= p.A) break;
      const Box<Compute> a = load_box(p.a, n * p.A + row);
      p.output[(n * p.A + row) * p.B + column] = overlap<kGeneralized>(a, b, area(a), area_b);
    }
  }
}

template <class Compute>
struct BackwardParams {
  BoxIouGradient<Compute> gradient;
  int64_t own_tiles;
  int64_t slices, slice_size;  // the other boxes are divided into `slices` slices of `slice_size`
  Compute* partials;           // [slices,N,own_count,4]
};

// If kAlongOwn, a tile has 32 own boxes, one per lane. Otherwise, a tile has one own box per warp, and the lanes of the
// warp process different other boxes.
template <class Compute, bool kGeneralized, bool kAlongOwn>
__global__ __launch_bounds__(256, 2) void box_iou_backward_kernel(const __grid_constant__ BackwardParams<Compute> p) {
  __shared__ Compute warp_gradients[kBoxWarps][32][4];
  const BoxIouGradient<Compute>& g = p.gradient;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t tile = blockIdx.x; tile < g.N * p.slices * p.own_tiles; tile += gridDim.x) {
    const int64_t slice = tile / p.own_tiles % p.slices, n = tile / p.own_tiles / p.slices;
    const int64_t own_index = tile % p.own_tiles * (kAlongOwn ? 32 : kBoxWarps) + (kAlongOwn ? lane : warp);
    const bool active = own_index < g.own_count;
    const int64_t end = active ? min((slice + 1) * p.slice_size, g.other_count) : 0;
    const Box<Compute> own = load_box(g.own, n * g.own_count + (active ? own_index : 0));
    const Compute own_area = area(own);
    const Compute* grad_output = g.grad_output + n * g.stride_n + own_index * g.stride_own;
    BoxGradient<Compute> sums{};
    for (int64_t i = slice * p.slice_size + (kAlongOwn ? warp : lane); i < end; i += kAlongOwn ? kBoxWarps : 32) {
      const Box<Compute> other = load_box(g.other, n * g.other_count + i);
      add_gradient<kGeneralized>(sums, own, other, own_area, area(other), grad_output[i * g.stride_other]);
    }
    const Box<Compute> gradient = sums.coordinates(own);
    const Compute parts[4] = {gradient.x1, gradient.y1, gradient.x2, gradient.y2};
    Compute* partial = p.partials + (slice * g.N + n) * g.own_count * 4;
    if constexpr (kAlongOwn) {
#pragma unroll
      for (int i = 0; i < 4; ++i) warp_gradients[warp][lane][i] = parts[i];
      __syncthreads();
      const int64_t element = tile % p.own_tiles * 128 + threadIdx.x;
      if (threadIdx.x < 128 && element < 4 * g.own_count) {
        Compute sum = 0;
        for (int w = 0; w < kBoxWarps; ++w) sum += warp_gradients[w][threadIdx.x / 4][threadIdx.x % 4];
        partial[element] = sum;
      }
      __syncthreads();  // before the next tile overwrites warp_gradients
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Compute sum = group_sum(parts[i], 32);
        if (lane == i && active) partial[4 * own_index + i] = sum;
      }
    }
  }
}

// Adds up the partial gradients in the order of the slices, with one thread per element.
template <class Compute>
__global__ __launch_bounds__(256, 1) void box_iou_sum_kernel(const Compute* partials, int64_t slices, int64_t size,
                                                             Compute* result) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    Compute sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partials[slice * size + i];
    result[i] = sum;
  }
}

unsigned blocks_for(int64_t tiles) { return static_cast<unsigned>(std::min(tiles, kMaxBlocks)); }

template <class Compute, bool kGeneralized>
void launch_forward(ForwardParams<Compute> p, cudaStream_t stream) {
  p.width = 1;
  while (p.width < kBoxThreads && p.width < p.B) p.width *= 2;
  p.rows = static_cast<int>(std::clamp<int64_t>(p.N * p.A * p.B / (kBoxThreads * kRequestedBlocks), 1, 16));
  p.row_tiles = ceil_div(p.A, kBoxThreads / p.width * p.rows);
  p.column_tiles = ceil_div(p.B, p.width);
  const unsigned blocks = blocks_for(p.N * p.row_tiles * p.column_tiles);
  box_iou_kernel<Compute, kGeneralized><<<blocks, kBoxThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Compute, bool kGeneralized, bool kAlongOwn>
void launch_backward(const BoxPairs& pairs, const BoxIouGradient<Compute>& gradient, cudaStream_t stream) {
  BackwardParams<Compute> p{gradient};
  p.own_tiles = ceil_div(gradient.own_count, kAlongOwn ? 32 : kBoxWarps);
  // Uses enough slices to launch the requested number of blocks, but leaves at least 8 pairs for each thread. The
  // number of slices depends only on tensor sizes, so every device sums in the same order.
  const int64_t max_slices = ceil_div(gradient.other_count, 8 * (kAlongOwn ? kBoxWarps : 32));
  p.slices =
      std::clamp<int64_t>(ceil_div(kRequestedBlocks, gradient.N * p.own_tiles), 1, std::max<int64_t>(max_slices, 1));
  p.slice_size = ceil_div(gradient.other_count, p.slices);
  const int64_t size = gradient.N * gradient.own_count * 4;
  const Tensor partials = torch::stable::new_empty(pairs.a, {p.slices > 1 ? p.slices : 0, size});
  p.partials = p.slices > 1 ? static_cast<Compute*>(partials.mutable_data_ptr()) : gradient.result;
  const unsigned blocks = blocks_for(gradient.N * p.slices * p.own_tiles);
  box_iou_backward_kernel<Compute, kGeneralized, kAlongOwn><<<blocks, kBoxThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (p.slices == 1) return;
  const unsigned sum_blocks = blocks_for(ceil_div(size, kBoxThreads));
  box_iou_sum_kernel<Compute><<<sum_blocks, kBoxThreads, 0, stream>>>(p.partials, p.slices, size, gradient.result);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Kernels {
  static void forward(const BoxPairs& p, const Tensor& output) {
    const torch::stable::accelerator::DeviceGuard guard(p.a.get_device_index());
    const cudaStream_t stream = current_stream(p.a.get_device_index());
    const Tensor a = aligned(p.a), b = aligned(p.b);
    p.dispatch([&](auto c) {
      using Compute = typename decltype(c)::type;
      ForwardParams<Compute> params{p.N,
                                    p.A,
                                    p.B,
                                    static_cast<const Compute*>(a.const_data_ptr()),
                                    static_cast<const Compute*>(b.const_data_ptr()),
                                    static_cast<Compute*>(output.mutable_data_ptr())};
      p.generalized ? launch_forward<Compute, true>(params, stream) : launch_forward<Compute, false>(params, stream);
    });
  }

  template <class Compute>
  static void backward(const BoxPairs& p, BoxIouGradient<Compute> gradient) {
    const torch::stable::accelerator::DeviceGuard guard(p.a.get_device_index());
    const cudaStream_t stream = current_stream(p.a.get_device_index());
    const Tensor a = aligned(p.a), b = aligned(p.b);
    gradient.own = static_cast<const Compute*>((gradient.of_a ? a : b).const_data_ptr());
    gradient.other = static_cast<const Compute*>((gradient.of_a ? b : a).const_data_ptr());
    const bool along_own = gradient.stride_own < gradient.stride_other;
    if (p.generalized)
      along_own ? launch_backward<Compute, true, true>(p, gradient, stream)
                : launch_backward<Compute, true, false>(p, gradient, stream);
    else
      along_own ? launch_backward<Compute, false, true>(p, gradient, stream)
                : launch_backward<Compute, false, false>(p, gradient, stream);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_box_iou<Kernels>(m); }

}  // namespace relops
