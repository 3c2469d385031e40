// roi_align, prroi_pool, ps_roi_align, multi_scale_roi_align on CUDA: the gradient of the boxes.
//
// A block processes one region, or some of its outputs. Its threads first convert the box to taps in shared memory,
// with the slopes of their weights, in double. Then each thread adds up the contributions of its outputs.

#include "common/cuda/partial_sums.cuh"
#include "regions/cuda.cuh"
#include "regions/cuda_taps.cuh"

namespace relops {

namespace {

// The gradient with respect to x1, y1, x2 and y2 of a box.
template <class Compute>
struct BoxSums {
  Compute x_first = 0, y_first = 0, x_last = 0, y_last = 0;
};

// Computes the partial sums of one block for the gradient of box k. Each output of the block contributes its gradient
// times the pixels that it reads, weighted by the slopes of the taps. `partials` is [blocks,K,5], where `blocks` is the
// number of blocks per region. The gradient of the batch index is 0. If kStaged, the taps are in shared memory;
// otherwise, every thread finds them itself.
template <class P, bool kStaged>
__global__ __launch_bounds__(kRegionThreads, 1) void region_boxes_kernel(const __grid_constant__ P p, MaxTaps max_taps,
                                                                         bool channels_last,
                                                                         typename P::Compute* partials) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  extern __shared__ __align__(16) char memory[];
  __shared__ Compute warp_sums[kRegionWarps][4];
  char* free_memory = memory;
  const int64_t k = blockIdx.x;
  const int level_index = region_level(p, k);
  const bool readable = level_index >= 0;
  const RegionLevel<T>& level = p.levels[max(level_index, 0)];
  const RegionAxis y_axis = region_axis(p, max(level_index, 0), k, false);
  const RegionAxis x_axis = region_axis(p, max(level_index, 0), k, true);
  SharedTaps<Compute> y{}, x{};
  if constexpr (kStaged) {
    y = SharedTaps<Compute>::allocate(free_memory, p.PH, max_taps.y, true);
    x = SharedTaps<Compute>::allocate(free_memory, p.PW, max_taps.x, true);
    const auto visit = [&](const RegionAxis& axis) {
      return [&, readable](int bin, auto tap) {
        if (readable) for_each_tap<Compute>(axis, bin, 0, axis.size - 1, tap);
      };
    };
    find_taps(p.PH, max_taps.y, y, visit(y_axis));
    find_taps(p.PW, max_taps.x, x, visit(x_axis));
  }
  const int64_t plane = int64_t{level.H} * level.W, stride = channels_last ? p.channels : 1;
  const int bins = p.PH * p.PW, outputs = bins * p.out_channels;
  const int64_t image = readable ? static_cast<int64_t>(region_image(p.coordinates[5 * k])) : 0;
  BoxSums<Compute> sums;
  for (int i = blockIdx.y * kRegionThreads + threadIdx.x; i < outputs && readable; i += gridDim.y * kRegionThreads) {
    const int out = channels_last ? i % p.out_channels : i / bins;
    const int bin = channels_last ? i / p.out_channels : i - out * bins;
    const int64_t c = p.spec.position_sensitive ? int64_t{out} * bins + bin : out;
    const T* origin = level.input + image * p.channels * plane + (channels_last ? c : c * plane);
    const int ph = bin / p.PW, pw = bin - ph * p.PW;
    const Compute grad = static_cast<Compute>(p.grad_output[k * outputs + i]);
    // `sum` is the sum of the pixels of a row times the weights of their columns. sum_first and sum_last use the slopes
    // of these weights instead.
    const auto add_row = [&](Compute weight, Compute first, Compute last, Compute sum, Compute sum_first,
                             Compute sum_last) {
      sums.x_first += grad * weight * sum_first;
      sums.x_last += grad * weight * sum_last;
      sums.y_first += grad * first * sum;
      sums.y_last += grad * last * sum;
    };
    if constexpr (kStaged) {
      for (int a = y.begin[ph]; a < y.begin[ph + 1]; ++a) {
        const T* row = origin + int64_t{y.pixel[a]} * level.W * stride;
        Compute sum = 0, sum_first = 0, sum_last = 0;
        for (int b = x.begin[pw]; b < x.begin[pw + 1]; ++b) {
          const Compute pixel = static_cast<Compute>(row[x.pixel[b] * stride]);
          sum += pixel * x.weight[b];
          sum_first += pixel * x.slope_first[b];
          sum_last += pixel * x.slope_last[b];
        }
        add_row(y.weight[a], y.slope_first[a], y.slope_last[a], sum, sum_first, sum_last);
      }
    } else {
      for_each_tap<Compute>(y_axis, ph, 0, level.H - 1, [&](int y, double weight, double first, double last) {
        const T* row = origin + int64_t{y} * level.W * stride;
        Compute sum = 0, sum_first = 0, sum_last = 0;
        for_each_tap<Compute>(x_axis, pw, 0, level.W - 1, [&](int x, double w, double slope_first, double slope_last) {
          const Compute pixel = static_cast<Compute>(row[x * stride]);
          sum += pixel * static_cast<Compute>(w);
          sum_first += pixel * static_cast<Compute>(slope_first);
          sum_last += pixel * static_cast<Compute>(slope_last);
        });
        add_row(static_cast<Compute>(weight), static_cast<Compute>(first), static_cast<Compute>(last), sum, sum_first,
                sum_last);
      });
    }
  }
  const Compute own[4] = {sums.x_first, sums.y_first, sums.x_last, sums.y_last};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Compute sum = group_sum(own[i], 32);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 5) return;
  Compute sum = 0;
  for (int warp = 0; warp < kRegionWarps && threadIdx.x > 0; ++warp) sum += warp_sums[warp][threadIdx.x - 1];
  partials[(blockIdx.y * p.K + k) * 5 + threadIdx.x] = sum;
}

template <class P>
void launch_boxes(const RegionProblem& problem, const P& p, typename P::Compute* grad_boxes, cudaStream_t stream) {
  using Compute = typename P::Compute;
  const char* op = problem.spec.op;
  const int64_t outputs = problem.PH * problem.PW * p.out_channels;
  const unsigned blocks = blocks_per_region(problem.K, ceil_div(outputs, 4 * kRegionThreads));
  // If a region has only one block, the partial sums of this block are the gradient.
  const Tensor memory = torch::stable::new_empty(problem.boxes, {blocks > 1 ? blocks : 0, problem.K, 5});
  Compute* partials = blocks > 1 ? static_cast<Compute*>(memory.mutable_data_ptr()) : grad_boxes;
  const MaxTaps taps = max_taps(problem);
  const size_t bytes = taps.bytes<Compute>(p.PH, p.PW, true);
  const dim3 grid(grid_size(op, problem.K), blocks);
  if (bytes <= kSharedBytes)
    region_boxes_kernel<P, true><<<grid, kRegionThreads, bytes, stream>>>(p, taps, problem.channels_last, partials);
  else
    region_boxes_kernel<P, false><<<grid, kRegionThreads, 0, stream>>>(p, taps, problem.channels_last, partials);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (blocks > 1) launch_sum_of_partials(op, partials, blocks, 5 * problem.K, 5 * problem.K, grad_boxes, stream);
}

}  // namespace

void region_backward_boxes(const RegionProblem& p, const Tensor& grad_output, const Tensor& grad_boxes,
                           cudaStream_t stream) {
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionParams<T> a = make_region_params<T>(p);
    a.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    launch_boxes(p, a, static_cast<ComputeType<T>*>(grad_boxes.mutable_data_ptr()), stream);
  });
}

}  // namespace relops
