// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: the forward pass, and the
// gradient of the boxes.
//
// A block processes one region. First, its threads convert the box to taps in shared memory, with one thread per bin
// and axis. The conversion is done once per region, not once per channel. Then:
//
// - channels_last: a warp computes one bin at a time. Each lane processes 16 bytes of neighboring channels, so every
//   access is coalesced.
// - NCHW: a warp computes one channel at a time. First, for each row of bins, it combines the rows of pixels into one
//   row in shared memory, with one lane per column. Then each lane adds up the few columns of a bin. Each pixel is
//   loaded about once per row of bins, in full sectors. With one thread per output instead, each thread would load 16
//   scattered pixels.
//
// Both kernels are bound by L1 and L2 traffic, because regions overlap and read the map from L2 many times.

#include "common/cuda/partial_sums.cuh"
#include "regions/cuda.cuh"
#include "regions/ops.h"

namespace relops {

namespace {

// The taps of a region on one axis, in shared memory. Bin b has the taps [begin[b], begin[b + 1]).
template <class Compute>
struct SharedTaps {
  int* begin;
  int* pixel;
  Compute *weight, *slope_first, *slope_last;

  RELOPS_HOST_DEVICE static size_t bytes(int64_t bins, int64_t max_taps, bool slopes) {
    return max_taps * sizeof(Compute) * (slopes ? 3 : 1) + (max_taps + bins + 1) * sizeof(int) + sizeof(Compute);
  }
  // Allocates the taps at `memory` and advances `memory` past them.
  __device__ static SharedTaps allocate(char*& memory, int bins, int max_taps, bool slopes) {
    SharedTaps taps{};
    taps.weight = reinterpret_cast<Compute*>(memory);
    taps.slope_first = slopes ? taps.weight + max_taps : nullptr;
    taps.slope_last = slopes ? taps.weight + 2 * max_taps : nullptr;
    taps.pixel = reinterpret_cast<int*>(taps.weight + (slopes ? 3 : 1) * max_taps);
    taps.begin = taps.pixel + max_taps;
    memory += (bytes(bins, max_taps, slopes) / sizeof(Compute)) * sizeof(Compute);
    return taps;
  }
};

// Finds the taps of all bins of an axis, with one thread per bin. If `readable` is false, there are no taps. All
// threads of the block must call this function.
template <class Compute>
__device__ void find_taps(const RegionAxis& axis, bool readable, int max_taps, const SharedTaps<Compute>& taps) {
  for (int bin = threadIdx.x; bin < axis.bins; bin += blockDim.x) {
    // Positions ascend, so a pixel that the bin has already read is one of the last two distinct pixels.
    int count = 0, last = -1, second_last = -1;
    if (readable)
      for_each_tap<Compute>(axis, bin, 0, axis.size - 1, [&](int pixel, double, double, double) {
        if (pixel == last || pixel == second_last) return;
        second_last = last;
        last = pixel;
        ++count;
      });
    taps.begin[bin + 1] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    taps.begin[0] = 0;
    for (int bin = 0; bin < axis.bins; ++bin)
      taps.begin[bin + 1] = min(taps.begin[bin] + taps.begin[bin + 1], max_taps);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < axis.bins && readable; bin += blockDim.x) {
    int next = taps.begin[bin];
    const int begin = next, end = taps.begin[bin + 1];
    for_each_tap<Compute>(axis, bin, 0, axis.size - 1, [&](int pixel, double weight, double first, double last) {
      int tap = next;
      for (int i = next - 1; i >= begin && i >= next - 2; --i)
        if (taps.pixel[i] == pixel) tap = i;
      if (tap == end) return;
      const bool is_new = tap == next;
      next += is_new;
      taps.pixel[tap] = pixel;
      taps.weight[tap] = static_cast<Compute>(weight) + (is_new ? 0 : taps.weight[tap]);
      if (taps.slope_first == nullptr) return;
      taps.slope_first[tap] = static_cast<Compute>(first) + (is_new ? 0 : taps.slope_first[tap]);
      taps.slope_last[tap] = static_cast<Compute>(last) + (is_new ? 0 : taps.slope_last[tap]);
    });
  }
  __syncthreads();
}

// Accumulates a pixel into a weighted sum or a maximum. The maximum ignores NaN, as in torchvision.
template <bool kMaximum, class Compute>
__device__ __forceinline__ void accumulate(Compute& result, Compute pixel, Compute weight) {
  if constexpr (kMaximum)
    result = pixel > result ? pixel : result;
  else
    result += pixel * weight;
}

template <bool kMaximum, class Compute>
__device__ __forceinline__ Compute initial_value(bool empty) {
  return kMaximum && !empty ? -static_cast<Compute>(INFINITY) : Compute(0);
}

template <class P>
__device__ void fill_region(const P& p, int64_t k, typename P::Compute value) {
  const int64_t size = int64_t{p.out_channels} * p.PH * p.PW;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < size; i += int64_t{gridDim.y} * blockDim.x)
    p.output[k * size + i] = static_cast<typename P::T>(value);
}

// Computes one output in one thread, pixel by pixel. The strides are in elements.
template <bool kMaximum, class Compute, class T>
__device__ Compute pool_pixels(const SharedTaps<Compute>& y, const SharedTaps<Compute>& x, int ph, int pw,
                               const T* origin, int64_t row_stride, int64_t column_stride) {
  const int y_end = y.begin[ph + 1], x_begin = x.begin[pw], x_end = x.begin[pw + 1];
  Compute result = initial_value<kMaximum, Compute>(y.begin[ph] == y_end || x_begin == x_end);
  for (int i = y.begin[ph]; i < y_end; ++i) {
    const T* row = origin + y.pixel[i] * row_stride;
    for (int j = x_begin; j < x_end; ++j)
      accumulate<kMaximum>(result, static_cast<Compute>(row[x.pixel[j] * column_stride]), y.weight[i] * x.weight[j]);
  }
  return result;
}

// Computes the forward pass on channels_last maps. Each lane computes V neighboring channels.
template <class P, bool kMaximum, int V>
__global__ __launch_bounds__(kRegionThreads, 2) void region_pixels_kernel(const __grid_constant__ P p) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  extern __shared__ __align__(16) char memory[];
  char* free_memory = memory;
  const int64_t k = blockIdx.x;
  const RegionSource from = region_source(p, k);
  if (!from.in_batch) return fill_region(p, k, static_cast<Compute>(NAN));
  const SharedTaps<Compute> y = SharedTaps<Compute>::allocate(free_memory, p.PH, p.max_taps_y, false);
  const SharedTaps<Compute> x = SharedTaps<Compute>::allocate(free_memory, p.PW, p.max_taps_x, false);
  find_taps(region_axis(p, from.level, k, false), from.finite, p.max_taps_y, y);
  find_taps(region_axis(p, from.level, k, true), from.finite, p.max_taps_x, x);
  const RegionLevel<T>& level = p.levels[from.level];
  const int64_t column = p.channels, row = column * level.W;
  const T* image = level.input + from.image * row * level.H;
  const int lane = threadIdx.x % 32, bins = p.PH * p.PW;
  for (int bin = blockIdx.y * kRegionWarps + threadIdx.x / 32; bin < bins; bin += gridDim.y * kRegionWarps) {
    const int ph = bin / p.PW, pw = bin - ph * p.PW;
    T* out = p.output + (k * bins + bin) * p.out_channels;
    if (p.spec.position_sensitive) {
      for (int c = lane; c < p.out_channels; c += 32)
        out[c] = static_cast<T>(pool_pixels<kMaximum>(y, x, ph, pw, image + int64_t{c} * bins + bin, row, column));
      continue;
    }
    const int y_begin = y.begin[ph], y_end = y.begin[ph + 1], x_begin = x.begin[pw], x_end = x.begin[pw + 1];
    for (int c = lane * V; c < p.channels; c += 32 * V) {
      Compute result[V];
#pragma unroll
      for (int v = 0; v < V; ++v) result[v] = initial_value<kMaximum, Compute>(y_begin == y_end || x_begin == x_end);
      for (int i = y_begin; i < y_end; ++i) {
        const T* pixels = image + y.pixel[i] * row + c;
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

constexpr int kRowBytes = 2048;  // shared memory for the combined rows of a warp

// Computes the forward pass on NCHW maps.
template <class P, bool kMaximum>
__global__ __launch_bounds__(kRegionThreads, 2) void region_planes_kernel(const __grid_constant__ P p) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  constexpr int kCapacity = kRowBytes / sizeof(Compute);
  extern __shared__ __align__(16) char memory[];
  char* free_memory = memory + kRegionWarps * kRowBytes;
  const int64_t k = blockIdx.x;
  const RegionSource from = region_source(p, k);
  if (!from.in_batch) return fill_region(p, k, static_cast<Compute>(NAN));
  const SharedTaps<Compute> y = SharedTaps<Compute>::allocate(free_memory, p.PH, p.max_taps_y, false);
  const SharedTaps<Compute> x = SharedTaps<Compute>::allocate(free_memory, p.PW, p.max_taps_x, false);
  find_taps(region_axis(p, from.level, k, false), from.finite, p.max_taps_y, y);
  find_taps(region_axis(p, from.level, k, true), from.finite, p.max_taps_x, x);
  const RegionLevel<T>& level = p.levels[from.level];
  const int64_t plane = int64_t{level.H} * level.W;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, bins = p.PH * p.PW;
  Compute* rows = reinterpret_cast<Compute*>(memory + warp * kRowBytes);

  // Columns ascend within a bin, and bins ascend or descend. The lowest and the highest column are therefore the first
  // or last column of a bin.
  int low = level.W, high = 0;
  for (int pw = 0; pw < p.PW; ++pw)
    if (x.begin[pw] < x.begin[pw + 1]) {
      low = min(low, x.pixel[x.begin[pw]]);
      high = max(high, x.pixel[x.begin[pw + 1] - 1] + 1);
    }
  const int width = max(high - low, 0);
  const bool lane_per_output = p.spec.position_sensitive || width > kCapacity;

  if (lane_per_output) {
    const int64_t outputs = int64_t{p.out_channels} * bins;
    for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < outputs;
         i += int64_t{gridDim.y} * blockDim.x) {
      const int bin = static_cast<int>(i % bins), ph = bin / p.PW;
      const int64_t c = p.spec.position_sensitive ? i : i / bins;
      const T* origin = level.input + (int64_t{from.image} * p.channels + c) * plane;
      p.output[k * outputs + i] = static_cast<T>(pool_pixels<kMaximum>(y, x, ph, bin - ph * p.PW, origin, level.W, 1));
    }
    return;
  }
  const int max_rows = min(p.PH, kCapacity / max(width, 1));  // rows of bins that fit in shared memory
  for (int c = blockIdx.y * kRegionWarps + warp; c < p.channels; c += gridDim.y * kRegionWarps) {
    const T* origin = level.input + (int64_t{from.image} * p.channels + c) * plane + low;
    T* out = p.output + (k * p.channels + c) * bins;
    for (int first = 0; first < p.PH; first += max_rows) {
      const int row_count = min(max_rows, p.PH - first);
      for (int ph = 0; ph < row_count; ++ph) {
        const int begin = y.begin[first + ph], end = y.begin[first + ph + 1];
        for (int column = lane; column < width; column += 32) {
          Compute result = initial_value<kMaximum, Compute>(begin == end);
#pragma unroll 4
          for (int i = begin; i < end; ++i)
            accumulate<kMaximum>(result, static_cast<Compute>(origin[int64_t{y.pixel[i]} * level.W + column]),
                                 y.weight[i]);
          rows[ph * width + column] = result;
        }
      }
      __syncwarp();
      for (int o = lane; o < row_count * p.PW; o += 32) {
        const int ph = o / p.PW, pw = o - ph * p.PW;
        const int begin = x.begin[pw], end = x.begin[pw + 1];
        const bool empty = begin == end || y.begin[first + ph] == y.begin[first + ph + 1];
        Compute result = initial_value<kMaximum, Compute>(empty);
        for (int j = begin; j < end && !empty; ++j)
          accumulate<kMaximum>(result, rows[ph * width + x.pixel[j] - low], x.weight[j]);
        out[first * p.PW + o] = static_cast<T>(result);
      }
      __syncwarp();
    }
  }
}

// Computes the forward pass on maps with thousands of rows or columns, for both layouts. On such maps, the taps of a
// region do not fit in shared memory, so every thread finds the taps of its outputs itself.
template <class P, bool kMaximum>
__global__ __launch_bounds__(kRegionThreads, 1) void region_outputs_kernel(const __grid_constant__ P p,
                                                                           bool channels_last) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  const int64_t k = blockIdx.x;
  const RegionSource from = region_source(p, k);
  if (!from.in_batch) return fill_region(p, k, static_cast<Compute>(NAN));
  if (!from.finite) return fill_region(p, k, Compute(0));
  const RegionAxis y_axis = region_axis(p, from.level, k, false), x_axis = region_axis(p, from.level, k, true);
  const RegionLevel<T>& level = p.levels[from.level];
  const int64_t plane = int64_t{level.H} * level.W, bins = int64_t{p.PH} * p.PW, outputs = bins * p.out_channels;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < outputs; i += int64_t{gridDim.y} * blockDim.x) {
    const int64_t bin = channels_last ? i / p.out_channels : i % bins,
                  out = channels_last ? i % p.out_channels : i / bins;
    const int64_t c = p.spec.position_sensitive ? out * bins + bin : out;
    const T* origin = level.input + int64_t{from.image} * p.channels * plane + (channels_last ? c : c * plane);
    const int64_t stride = channels_last ? p.channels : 1;
    const int ph = static_cast<int>(bin / p.PW), pw = static_cast<int>(bin % p.PW);
    Compute result = initial_value<kMaximum, Compute>(false);
    for_each_tap<Compute>(y_axis, ph, 0, level.H - 1, [&](int y, double y_weight, double, double) {
      for_each_tap<Compute>(x_axis, pw, 0, level.W - 1, [&](int x, double x_weight, double, double) {
        accumulate<kMaximum>(result, static_cast<Compute>(origin[(int64_t{y} * level.W + x) * stride]),
                             static_cast<Compute>(y_weight * x_weight));
      });
    });
    if (kMaximum) {
      const PixelRange y = pixel_range<Compute>(y_axis, ph), x = pixel_range<Compute>(x_axis, pw);
      if (y.begin >= y.end || x.begin >= x.end) result = 0;
    }
    p.output[k * outputs + i] = static_cast<T>(result);
  }
}

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
__global__ __launch_bounds__(kRegionThreads, 1) void region_boxes_kernel(const __grid_constant__ P p,
                                                                         bool channels_last,
                                                                         typename P::Compute* partials) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  extern __shared__ __align__(16) char memory[];
  __shared__ Compute warp_sums[kRegionWarps][4];
  char* free_memory = memory;
  const int64_t k = blockIdx.x;
  const RegionSource from = region_source(p, k);
  const bool readable = from.readable();
  const RegionAxis y_axis = region_axis(p, from.level, k, false), x_axis = region_axis(p, from.level, k, true);
  SharedTaps<Compute> y{}, x{};
  if constexpr (kStaged) {
    y = SharedTaps<Compute>::allocate(free_memory, p.PH, p.max_taps_y, true);
    x = SharedTaps<Compute>::allocate(free_memory, p.PW, p.max_taps_x, true);
    find_taps(y_axis, readable, p.max_taps_y, y);
    find_taps(x_axis, readable, p.max_taps_x, x);
  }
  const RegionLevel<T>& level = p.levels[from.level];
  const int64_t plane = int64_t{level.H} * level.W, bins = int64_t{p.PH} * p.PW, outputs = bins * p.out_channels;
  BoxSums<Compute> sums;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < outputs && readable;
       i += int64_t{gridDim.y} * blockDim.x) {
    const int64_t bin = channels_last ? i / p.out_channels : i % bins,
                  out = channels_last ? i % p.out_channels : i / bins;
    const int64_t c = p.spec.position_sensitive ? out * bins + bin : out;
    const T* origin = level.input + int64_t{from.image} * p.channels * plane + (channels_last ? c : c * plane);
    const int64_t stride = channels_last ? p.channels : 1;
    const int ph = static_cast<int>(bin / p.PW), pw = static_cast<int>(bin % p.PW);
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

// The limit for dynamic shared memory per block. A higher limit would have to be enabled for each kernel.
constexpr size_t kSharedBytes = 46 << 10;

// Returns the number of blocks per region: enough to occupy every multiprocessor, but at most `work`.
unsigned blocks_of(int64_t K, int64_t work) {
  constexpr int64_t kBlocks = 1024;
  return static_cast<unsigned>(std::clamp<int64_t>(std::min(ceil_div(kBlocks, K), work), 1, 65535));
}

template <class P, bool kMaximum>
void launch_forward(const RegionProblem& problem, const P& p, cudaStream_t stream) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  constexpr int V = 16 / sizeof(T);
  const int64_t bins = problem.PH * problem.PW;
  const size_t taps =
      SharedTaps<Compute>::bytes(p.PH, p.max_taps_y, false) + SharedTaps<Compute>::bytes(p.PW, p.max_taps_x, false);
  const unsigned K = grid_size(problem.spec.op, problem.K);
  if (taps + kRegionWarps * kRowBytes > kSharedBytes) {
    const dim3 grid(K, blocks_of(problem.K, ceil_div(bins * p.out_channels, kRegionThreads)));
    region_outputs_kernel<P, kMaximum><<<grid, kRegionThreads, 0, stream>>>(p, problem.channels_last);
  } else if (!problem.channels_last) {
    const dim3 grid(K, blocks_of(problem.K, ceil_div(p.channels, 2 * kRegionWarps)));
    region_planes_kernel<P, kMaximum><<<grid, kRegionThreads, taps + kRegionWarps * kRowBytes, stream>>>(p);
  } else {
    const dim3 grid(K, blocks_of(problem.K, ceil_div(bins, kRegionWarps)));
    bool aligned = p.channels % V == 0 && reinterpret_cast<uintptr_t>(p.output) % 16 == 0;
    for (int l = 0; l < p.L; ++l) aligned = aligned && reinterpret_cast<uintptr_t>(p.levels[l].input) % 16 == 0;
    if (aligned)
      region_pixels_kernel<P, kMaximum, V><<<grid, kRegionThreads, taps, stream>>>(p);
    else
      region_pixels_kernel<P, kMaximum, 1><<<grid, kRegionThreads, taps, stream>>>(p);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class P>
void launch_boxes(const RegionProblem& problem, const P& p, typename P::Compute* grad_boxes, cudaStream_t stream) {
  using Compute = typename P::Compute;
  const char* op = problem.spec.op;
  const int64_t outputs = problem.PH * problem.PW * p.out_channels;
  const unsigned blocks = blocks_of(problem.K, ceil_div(outputs, 4 * kRegionThreads));
  // If a region has only one block, the partial sums of this block are the gradient.
  const Tensor memory = torch::stable::new_empty(problem.boxes, {blocks > 1 ? blocks : 0, problem.K, 5});
  Compute* partials = blocks > 1 ? static_cast<Compute*>(memory.mutable_data_ptr()) : grad_boxes;
  const size_t taps =
      SharedTaps<Compute>::bytes(p.PH, p.max_taps_y, true) + SharedTaps<Compute>::bytes(p.PW, p.max_taps_x, true);
  const dim3 grid(grid_size(op, problem.K), blocks);
  if (taps <= kSharedBytes)
    region_boxes_kernel<P, true><<<grid, kRegionThreads, taps, stream>>>(p, problem.channels_last, partials);
  else
    region_boxes_kernel<P, false><<<grid, kRegionThreads, 0, stream>>>(p, problem.channels_last, partials);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (blocks > 1) launch_sum_of_partials(op, partials, blocks, 5 * problem.K, 5 * problem.K, grad_boxes, stream);
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
  if (grad_boxes == nullptr || p.K == 0) return;
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionParams<T> a = make_region_params<T>(p);
    a.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    launch_boxes(p, a, static_cast<ComputeType<T>*>(grad_boxes->mutable_data_ptr()), stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_regions<&forward, &backward>(m); }

}  // namespace relops
