// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: the forward pass, and the
// registration of both passes.
//
// - NCHW: see cuda_forward_tiles.cu.
// - channels_last: a block processes one region, and a warp computes one bin at a time. Each lane processes 16 bytes of
//   neighboring channels, so every access is coalesced. The kernel is bound by the traffic from L2, because regions
//   overlap and read the map many times.
// - Position-sensitive ops, bins that are too large for a tile, and maps with thousands of rows or columns: each thread
//   computes one output.

#include "regions/cuda_taps.cuh"
#include "regions/ops.h"

namespace relops {

namespace {

// Fills the outputs of a region that this block would compute.
template <class P>
__device__ void fill_region(const P& p, int64_t k, typename P::Compute value) {
  const int64_t size = int64_t{p.out_channels} * p.PH * p.PW;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < size; i += int64_t{gridDim.y} * blockDim.x)
    p.output[k * size + i] = static_cast<typename P::T>(value);
}

// Finds the taps of box k on both axes.
template <class P, class Compute>
__device__ __forceinline__ void find_box_taps(const P& p, int64_t k, const RegionBox<Compute>& box, int H, int W,
                                              MaxTaps max_taps, const SharedTaps<Compute>& y,
                                              const SharedTaps<Compute>& x) {
  const RegionBin<Compute>* bins = p.bins + k * (p.PH + p.PW);
  find_taps(p.PH, max_taps.y, y,
            [&](int bin, auto tap) { for_each_weight(p.spec.kind, bins[bin], box.weight_y, H, 0, H, tap); });
  find_taps(p.PW, max_taps.x, x,
            [&](int bin, auto tap) { for_each_weight(p.spec.kind, bins[p.PH + bin], box.weight_x, W, 0, W, tap); });
}

// Computes the forward pass on channels_last maps. Each lane computes V neighboring channels.
template <class P, bool kMaximum, int V>
__global__ __launch_bounds__(kRegionThreads, 2) void region_pixels_kernel(const __grid_constant__ P p,
                                                                          MaxTaps max_taps) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  extern __shared__ __align__(16) char memory[];
  char* free_memory = memory;
  const int64_t k = blockIdx.x;
  const RegionBox<Compute> box = p.boxes[k];
  if (box.map < 0) return fill_region(p, k, box.map == kNotInBatch ? static_cast<Compute>(NAN) : Compute(0));
  const int image = box.map / p.L;
  const RegionLevel<T>& level = p.levels[box.map - image * p.L];
  const SharedTaps<Compute> y = SharedTaps<Compute>::allocate(free_memory, p.PH, max_taps.y, false);
  const SharedTaps<Compute> x = SharedTaps<Compute>::allocate(free_memory, p.PW, max_taps.x, false);
  find_box_taps(p, k, box, level.H, level.W, max_taps, y, x);
  const int64_t column = p.channels, row = column * level.W;
  const T* origin = level.input + image * row * level.H;
  const int lane = threadIdx.x % 32, bins = p.PH * p.PW;
  for (int bin = blockIdx.y * kRegionWarps + threadIdx.x / 32; bin < bins; bin += gridDim.y * kRegionWarps) {
    const int ph = bin / p.PW, pw = bin - ph * p.PW;
    T* out = p.output + (k * bins + bin) * p.channels;
    const int y_begin = y.begin[ph], y_end = y.begin[ph + 1], x_begin = x.begin[pw], x_end = x.begin[pw + 1];
    for (int c = lane * V; c < p.channels; c += 32 * V) {
      Compute result[V];
#pragma unroll
      for (int v = 0; v < V; ++v) result[v] = initial_value<kMaximum, Compute>(y_begin == y_end || x_begin == x_end);
      for (int i = y_begin; i < y_end; ++i) {
        const T* pixels = origin + y.pixel[i] * row + c;
        const Compute weight = y.weight[i];
#pragma unroll 2
        for (int j = x_begin; j < x_end; ++j) {
          const Pack<T, V> pack = load_pack<T, V>(pixels + x.pixel[j] * column);
          const Compute w = weight * x.weight[j];
#pragma unroll
          for (int v = 0; v < V; ++v) accumulate<kMaximum>(result[v], static_cast<Compute>(pack.x[v]), w);
        }
      }
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.x[v] = static_cast<T>(result[v]);
      store_pack(out + c, pack);
    }
  }
}

// Computes one output per thread and step, for both layouts. If kStaged, the taps of the box are in shared memory;
// otherwise, every thread finds the taps of its outputs. The outputs of boxes that region_tiles_kernel computes are
// left out if `without_tiled` is true.
template <class P, bool kMaximum, bool kStaged>
__global__ __launch_bounds__(kRegionThreads, 2) void region_outputs_kernel(const __grid_constant__ P p,
                                                                           MaxTaps max_taps, bool channels_last,
                                                                           bool without_tiled) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  extern __shared__ __align__(16) char memory[];
  char* free_memory = memory;
  const int64_t k = blockIdx.x;
  const RegionBox<Compute> box = p.boxes[k];
  if (box.map < 0) return fill_region(p, k, box.map == kNotInBatch ? static_cast<Compute>(NAN) : Compute(0));
  if (without_tiled && box.extent <= kMaxExtent) return;
  const int image = box.map / p.L;
  const RegionLevel<T>& level = p.levels[box.map - image * p.L];
  SharedTaps<Compute> y{}, x{};
  if constexpr (kStaged) {
    y = SharedTaps<Compute>::allocate(free_memory, p.PH, max_taps.y, false);
    x = SharedTaps<Compute>::allocate(free_memory, p.PW, max_taps.x, false);
    find_box_taps(p, k, box, level.H, level.W, max_taps, y, x);
  }
  const int64_t plane = int64_t{level.H} * level.W, row_stride = int64_t{level.W} * (channels_last ? p.channels : 1);
  const int64_t column_stride = channels_last ? p.channels : 1, channel_stride = channels_last ? 1 : plane;
  const int bins = p.PH * p.PW, outputs = bins * p.out_channels;
  const T* origin = level.input + image * p.channels * plane;
  for (int i = blockIdx.y * kRegionThreads + threadIdx.x; i < outputs; i += gridDim.y * kRegionThreads) {
    const int out_channel = channels_last ? i % p.out_channels : i / bins;
    const int bin = channels_last ? i / p.out_channels : i - out_channel * bins;
    const int ph = bin / p.PW, pw = bin - ph * p.PW;
    const int64_t channel = p.spec.position_sensitive ? int64_t{out_channel} * bins + bin : out_channel;
    const T* pixels = origin + channel * channel_stride;
    Compute result;
    const auto add = [&](int row, int column, Compute weight) {
      accumulate<kMaximum>(result, static_cast<Compute>(pixels[row * row_stride + column * column_stride]), weight);
    };
    if constexpr (kStaged) {
      const int y_end = y.begin[ph + 1], x_begin = x.begin[pw], x_end = x.begin[pw + 1];
      result = initial_value<kMaximum, Compute>(y.begin[ph] == y_end || x_begin == x_end);
      for (int a = y.begin[ph]; a < y_end; ++a)
        for (int b = x_begin; b < x_end; ++b) add(y.pixel[a], x.pixel[b], y.weight[a] * x.weight[b]);
    } else {
      const RegionBin<Compute> y_bin = p.bins[k * (p.PH + p.PW) + ph], x_bin = p.bins[k * (p.PH + p.PW) + p.PH + pw];
      result = initial_value<kMaximum, Compute>(y_bin.count == 0 || x_bin.count == 0);
      for_each_weight(p.spec.kind, y_bin, box.weight_y, level.H, 0, level.H, [&](int row, Compute y_weight) {
        for_each_weight(p.spec.kind, x_bin, box.weight_x, level.W, 0, level.W,
                        [&](int column, Compute x_weight) { add(row, column, y_weight * x_weight); });
      });
    }
    p.output[k * outputs + i] = static_cast<T>(result);
  }
}

template <class P, bool kMaximum>
void launch_outputs(const RegionProblem& problem, const P& p, bool without_tiled, cudaStream_t stream) {
  const int64_t outputs = problem.PH * problem.PW * p.out_channels;
  const MaxTaps taps = max_taps(problem);
  const size_t bytes = taps.bytes<typename P::Compute>(p.PH, p.PW, false);
  const dim3 grid(grid_size(problem.spec.op, problem.K),
                  blocks_per_region(problem.K, ceil_div(outputs, kRegionThreads)));
  if (bytes <= kSharedBytes)
    region_outputs_kernel<P, kMaximum, true>
        <<<grid, kRegionThreads, bytes, stream>>>(p, taps, problem.channels_last, without_tiled);
  else
    region_outputs_kernel<P, kMaximum, false>
        <<<grid, kRegionThreads, 0, stream>>>(p, taps, problem.channels_last, without_tiled);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class P, bool kMaximum>
void launch_forward(const RegionProblem& problem, const P& p, cudaStream_t stream) {
  using T = typename P::T;
  constexpr int V = 16 / sizeof(T);
  const MaxTaps taps = max_taps(problem);
  const size_t bytes = taps.bytes<typename P::Compute>(p.PH, p.PW, false);
  if (p.spec.position_sensitive || (problem.channels_last && bytes > kSharedBytes))
    return launch_outputs<P, kMaximum>(problem, p, false, stream);
  if (!problem.channels_last) {
    region_forward_tiles(problem, p, stream);
    return launch_outputs<P, kMaximum>(problem, p, true, stream);
  }
  const dim3 grid(grid_size(problem.spec.op, problem.K),
                  blocks_per_region(problem.K, ceil_div(problem.PH * problem.PW, kRegionWarps)));
  bool aligned = p.channels % V == 0 && reinterpret_cast<uintptr_t>(p.output) % 16 == 0;
  for (int l = 0; l < p.L; ++l) aligned = aligned && reinterpret_cast<uintptr_t>(p.levels[l].input) % 16 == 0;
  if (aligned)
    region_pixels_kernel<P, kMaximum, V><<<grid, kRegionThreads, bytes, stream>>>(p, taps);
  else
    region_pixels_kernel<P, kMaximum, 1><<<grid, kRegionThreads, bytes, stream>>>(p, taps);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor forward(const RegionProblem& p) {
  const torch::stable::accelerator::DeviceGuard guard(p.boxes.get_device_index());
  Tensor output = p.new_empty({p.K, p.out_channels(), p.PH, p.PW});
  if (output.numel() == 0) return output;
  const cudaStream_t stream = current_stream(p.boxes.get_device_index());
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionParams<T> a = make_region_params<T>(p);
    a.output = static_cast<T*>(output.mutable_data_ptr());
    const Tensor description = describe_boxes(p, a, stream);
    if (p.spec.kind == RegionKind::kMaximum)
      launch_forward<RegionParams<T>, true>(p, a, stream);
    else
      launch_forward<RegionParams<T>, false>(p, a, stream);
  });
  return output;
}

void backward(const RegionProblem& p, const Tensor& grad_output, const Tensor* output, const Tensor* grad_boxes) {
  const torch::stable::accelerator::DeviceGuard guard(p.boxes.get_device_index());
  const cudaStream_t stream = current_stream(p.boxes.get_device_index());
  region_backward_input(p, grad_output, output, stream);
  if (grad_boxes != nullptr && p.K > 0) region_backward_boxes(p, grad_output, *grad_boxes, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_regions<&forward, &backward>(m); }

}  // namespace relops
