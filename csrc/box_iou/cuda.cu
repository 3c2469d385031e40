// box_iou and generalized_box_iou on CUDA.
//
// Forward: a thread keeps four boxes of `b`, or one if `b` has few boxes, in registers and loops over boxes of `a` in
// shared memory. A warp writes neighboring outputs, or several rows if `b` has few boxes. Writing the output limits the
// speed as long as a float32 output takes at most 29 instructions (docs/internals/box_iou.md). The division of IEEE 754
// alone takes more, mostly to handle special cases. Before a block begins its loop, it therefore checks that none of
// its boxes can lead to such a case.
//
// Backward: a launch computes the gradient of one input. The boxes of this input are called "own" boxes, and those of
// the other input "other" boxes. grad_output has a smaller stride along one of the two inputs, and the lanes of a warp
// process neighboring boxes of that input. If the lanes process own boxes, each lane sums the gradient of one own box,
// and the warps of a block divide the other boxes among themselves. If the lanes process other boxes, each warp sums
// the gradient of one own box and adds up the sums of its lanes at the end. A second launch adds up the sums of the
// blocks in a fixed order. The kernel is bound by arithmetic.

#include <algorithm>
#include <bit>

#include "box_iou/problem.h"
#include "common/cuda/device.cuh"

namespace relops {

namespace {

constexpr int kBoxThreads = 256;
constexpr int kBoxWarps = kBoxThreads / 32;
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

// Returns 1 / x with an error of at most one unit in the last place. x and 1 / x must be normal numbers.
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float result;
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
#else  // the emulation of tests/cuda_emulation, which is wrong in the last place for two of three numbers
  result = std::bit_cast<float>(std::bit_cast<uint32_t>(1 / x) + std::bit_cast<uint32_t>(x) % 3 - 1);
#endif
  return result;
}

// Returns x / y, correctly rounded, with the instructions of the compiler for divisions that are not special cases. The
// caller must make sure that y, 1 / y and x / y are normal numbers, that x is normal or 0, and that the remainder below
// is exact.
__device__ __forceinline__ float quotient(float x, float y) {
  float reciprocal = approximate_reciprocal(y);
  reciprocal = fmaf(reciprocal, fmaf(-y, reciprocal, 1), reciprocal);
  const float rounded = product(x, reciprocal), remainder = fmaf(-y, rounded, x);
  return fmaf(reciprocal, remainder, rounded);
}

// Returns whether regular_overlap() may be used for the box together with any other regular box, if at least one of the
// two has an area. The coordinates are multiples of 2^-36 and at most 2^18. Widths and heights are then 0 or between
// 2^-36 and 2^19, and areas are 0 or between 2^-72 and 2^38. An intersection is at most as large as each of the two
// boxes, and the union and the hull are at least as large, except for rounding errors. No quotient of areas is
// therefore closer to 0 than 2^-111, and no remainder has a bit below 2^-143.
__device__ __forceinline__ bool is_regular(const Box<float>& box) {
  const auto regular = [](float x) { return (fabsf(x) <= 0x1p18f) & (x * 0x1p36f == rintf(x * 0x1p36f)); };
  return regular(box.x1) & regular(box.y1) & regular(box.x2) & regular(box.y2) & (box.x1 <= box.x2) &
         (box.y1 <= box.y2);
}
__device__ __forceinline__ bool is_regular(const Box<double>&) { return false; }

// Returns the same number as overlap(). min and max differ from smaller() and larger() only if an argument is NaN, and
// in the sign of a zero, which changes no width, height or area except for its sign if it is 0.
template <bool kGeneralized, class F>
__device__ __forceinline__ F regular_overlap(const Box<F>& a, const Box<F>& b, F area_a, F area_b) {
  const F width = min(a.x2, b.x2) - max(a.x1, b.x1), height = min(a.y2, b.y2) - max(a.y1, b.y1);
  const F common_area = product(max(width, F(0)), max(height, F(0))), union_area = area_a + area_b - common_area;
  const F value = quotient(common_area, union_area);
  if constexpr (!kGeneralized) return value;
  const F hull_area = product(max(a.x2, b.x2) - min(a.x1, b.x1), max(a.y2, b.y2) - min(a.y1, b.y1));
  return value - quotient(hull_area - union_area, hull_area);
}

template <class Compute>
struct ForwardParams {
  int64_t A, B;
  const Compute *a, *b;
  Compute* output;
  unsigned row_tiles, column_tiles;
  unsigned tile_rows;  // at most kBoxThreads
  int width_bits;      // log2 of the number of threads along a row of the output
};

template <class Compute>
struct alignas(16) MeasuredBox {
  Box<Compute> box;
  Compute area;
};

template <class Compute, bool kGeneralized, int kColumns>
__global__ __launch_bounds__(kBoxThreads, 2) void box_iou_kernel(const __grid_constant__ ForwardParams<Compute> p) {
  __shared__ MeasuredBox<Compute> tile[kBoxThreads];
  const int height = kBoxThreads >> p.width_bits, x = threadIdx.x & ((1 << p.width_bits) - 1),
            y = threadIdx.x >> p.width_bits;
  const unsigned column_tile = blockIdx.x % p.column_tiles, row_tiles = blockIdx.x / p.column_tiles;
  const unsigned row_tile = row_tiles % p.row_tiles, n = row_tiles / p.row_tiles;
  const int64_t first_row = uint64_t{row_tile} * p.tile_rows;
  const int rows = static_cast<int>(min(p.A - first_row, int64_t{p.tile_rows}));
  // Lane l of a warp has columns l, l + 32, ... of 32 kColumns neighboring columns.
  const int64_t column = (uint64_t{column_tile} << p.width_bits) * kColumns + x / 32 * 32 * kColumns + x % 32;

  bool regular = true, has_area_a = true, has_area_b = true;
  if (static_cast<int>(threadIdx.x) < rows) {
    const Box<Compute> a = load_box(p.a, n * p.A + first_row + threadIdx.x);
    tile[threadIdx.x] = {a, area(a)};
    regular = is_regular(a);
    has_area_a = area(a) > 0;
  }
  const int last = static_cast<int>(min(p.B - 1 - column, int64_t{32 * kColumns}));
  Box<Compute> b[kColumns];
  Compute area_b[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    b[k] = load_box(p.b + 4 * (n * p.B + column), min(32 * k, last));
    area_b[k] = area(b[k]);
    regular &= is_regular(b[k]);
    has_area_b &= area_b[k] > 0;
  }
  const bool all_a = __syncthreads_and(regular & has_area_a), all_b = __syncthreads_and(regular & has_area_b);
  if (column >= p.B) return;

  const auto write = [&](auto all_regular) {
    Compute* to = p.output + (n * p.A + first_row + y) * p.B + column;
    const int64_t step = height * p.B;
    for (int row = y; row < rows; row += height, to += step) {
      const MeasuredBox<Compute> a = tile[row];
      Compute values[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if constexpr (all_regular())
          values[k] = regular_overlap<kGeneralized>(a.box, b[k], a.area, area_b[k]);
        else
          values[k] = overlap<kGeneralized>(a.box, b[k], a.area, area_b[k]);
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        if (32 * k <= last) to[32 * k] = values[k];
    }
  };
  if constexpr (sizeof(Compute) == 4)
    if (all_a || all_b) return write(std::true_type{});
  write(std::false_type{});
}

template <class Compute>
struct BackwardParams {
  BoxIouGradient<Compute> gradient;
  unsigned own_tiles, slices;
  int64_t slice_size;  // the other boxes are divided into `slices` slices of `slice_size`
  Compute* partials;   // [slices,N,own_count,4]
};

// If kAlongOwn, a tile has 32 own boxes, one per lane. Otherwise, a tile has one own box per warp, and the lanes of the
// warp process different other boxes.
template <class Compute, bool kGeneralized, bool kAlongOwn>
__global__ __launch_bounds__(256, 2) void box_iou_backward_kernel(const __grid_constant__ BackwardParams<Compute> p) {
  __shared__ Compute warp_gradients[kBoxWarps][32][4];
  const BoxIouGradient<Compute>& g = p.gradient;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned tile = blockIdx.x % p.own_tiles, slices = blockIdx.x / p.own_tiles;
  const int64_t slice = slices % p.slices, n = slices / p.slices;
  const int64_t own_index = int64_t{tile} * (kAlongOwn ? 32 : kBoxWarps) + (kAlongOwn ? lane : warp);
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
    const int64_t element = int64_t{tile} * 128 + threadIdx.x;
    if (threadIdx.x < 128 && element < 4 * g.own_count) {
      Compute sum = 0;
      for (int w = 0; w < kBoxWarps; ++w) sum += warp_gradients[w][threadIdx.x / 4][threadIdx.x % 4];
      partial[element] = sum;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Compute sum = group_sum(parts[i], 32);
      if (lane == i && active) partial[4 * own_index + i] = sum;
    }
  }
}

// Adds up the partial gradients in the order of the slices, with one thread per element.
template <class Compute>
__global__ __launch_bounds__(256, 1) void box_iou_sum_kernel(const Compute* partials, int64_t slices, int64_t size,
                                                             Compute* result) {
  const int64_t i = int64_t{blockIdx.x} * kBoxThreads + threadIdx.x;
  if (i >= size) return;
  Compute sum = 0;
  for (int64_t slice = 0; slice < slices; ++slice) sum += partials[slice * size + i];
  result[i] = sum;
}

template <class Compute, bool kGeneralized, int kColumns>
void launch_forward(const BoxPairs& pairs, ForwardParams<Compute> p, cudaStream_t stream) {
  p.width_bits = 0;
  while (1 << p.width_bits < kBoxThreads && kColumns << p.width_bits < p.B) ++p.width_bits;
  const int64_t width = 1 << p.width_bits, height = kBoxThreads / width;
  const int64_t rows_for_requested_blocks = pairs.N * p.A * p.B / (kBoxThreads * kColumns * kRequestedBlocks);
  const int64_t rows = std::clamp<int64_t>(rows_for_requested_blocks, 1, std::min<int64_t>(width, 64));  // per thread
  const int64_t row_tiles = ceil_div(p.A, height * rows), column_tiles = ceil_div(p.B, width * kColumns);
  const unsigned blocks = grid_size(pairs.op, pairs.N * row_tiles * column_tiles);
  p.tile_rows = static_cast<unsigned>(height * rows);
  p.row_tiles = static_cast<unsigned>(row_tiles);
  p.column_tiles = static_cast<unsigned>(column_tiles);
  box_iou_kernel<Compute, kGeneralized, kColumns><<<blocks, kBoxThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Compute, bool kGeneralized, bool kAlongOwn>
void launch_backward(const BoxPairs& pairs, const BoxIouGradient<Compute>& gradient, cudaStream_t stream) {
  BackwardParams<Compute> p{gradient};
  const int64_t own_tiles = ceil_div(gradient.own_count, kAlongOwn ? 32 : kBoxWarps);
  // Uses enough slices to launch the requested number of blocks, but leaves at least 8 pairs for each thread. The
  // number of slices depends only on tensor sizes, so every device sums in the same order.
  const int64_t max_slices = ceil_div(gradient.other_count, 8 * (kAlongOwn ? kBoxWarps : 32));
  const int64_t slices =
      std::clamp<int64_t>(ceil_div(kRequestedBlocks, gradient.N * own_tiles), 1, std::max<int64_t>(max_slices, 1));
  p.slice_size = ceil_div(gradient.other_count, slices);
  const int64_t size = gradient.N * gradient.own_count * 4;
  const Tensor partials = torch::stable::new_empty(pairs.a, {slices > 1 ? slices : 0, size});
  p.partials = slices > 1 ? static_cast<Compute*>(partials.mutable_data_ptr()) : gradient.result;
  const unsigned blocks = grid_size(pairs.op, gradient.N * slices * own_tiles);
  p.own_tiles = static_cast<unsigned>(own_tiles);
  p.slices = static_cast<unsigned>(slices);
  box_iou_backward_kernel<Compute, kGeneralized, kAlongOwn><<<blocks, kBoxThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (slices == 1) return;
  const unsigned sum_blocks = grid_size(pairs.op, ceil_div(size, kBoxThreads));
  box_iou_sum_kernel<Compute><<<sum_blocks, kBoxThreads, 0, stream>>>(p.partials, slices, size, gradient.result);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Kernels {
  static void forward(const BoxPairs& p, const Tensor& output) {
    const torch::stable::accelerator::DeviceGuard guard(p.a.get_device_index());
    const cudaStream_t stream = current_stream(p.a.get_device_index());
    const Tensor a = aligned(p.a), b = aligned(p.b);
    p.dispatch([&](auto c) {
      using Compute = typename decltype(c)::type;
      const ForwardParams<Compute> params{p.A, p.B, static_cast<const Compute*>(a.const_data_ptr()),
                                          static_cast<const Compute*>(b.const_data_ptr()),
                                          static_cast<Compute*>(output.mutable_data_ptr())};
      const auto launch = [&](auto columns) {
        p.generalized ? launch_forward<Compute, true, columns()>(p, params, stream)
                      : launch_forward<Compute, false, columns()>(p, params, stream);
      };
      p.B > 64 ? launch(std::integral_constant<int, 4>{}) : launch(std::integral_constant<int, 1>{});
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
