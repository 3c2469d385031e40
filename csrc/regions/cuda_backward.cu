// roi_align, roi_pool, ps_roi_align, ps_roi_pool, prroi_pool, multi_scale_roi_align on CUDA: the gradient of the
// feature maps.
//
// The gradient of each pixel is summed by one thread, so the result is bitwise identical in every run. No atomic
// additions are needed, the result need not be set to zero first, and the sums stay in registers, so 16-bit gradients
// are rounded only once.
//
// A block computes a tile of 8 x 8 pixels for 32 V channels: a warp computes a row of the tile, and each lane V
// neighboring channels of all its pixels. The block lists the boxes that reach the tile. For some boxes at a time, its
// threads compute the weights of the tile's rows and columns in the bins, and store them in shared memory. Then every
// warp adds the gradients of the bins that read its row, times the weights. All lanes of a warp read the same bins, so
// branches do not diverge. The gradients of neighboring channels must be neighbors in memory, so those of NCHW maps are
// transposed first.
//
// The kernel is bound by the traffic from L2 and, nearly as much, by its instructions.
//
// roi_pool: the gradient of a maximum goes to one pixel. A first kernel finds this pixel by scanning the bins again and
// stores its index, one integer per output. The gather kernel compares the stored index with the indices of its pixels.

#include "regions/cuda_tiles.cuh"

namespace relops {

namespace {

constexpr int kGatherSide = 8;  // rows and columns of a tile
constexpr int kBatchBoxes = 8;  // boxes whose weights are in shared memory at a time
constexpr int kBatchBins = 32;  // rows and columns of bins whose weights are in shared memory, one per bit of a mask

static_assert(kGatherSide == kRegionWarps);

enum class Gather {
  kMean,
  kMaximum,
  kSensitive,  // position-sensitive: only one bin reads a given channel
};

// The bits of bins and lines are set if the bin reads the line, even if its weight is 0.
template <class Compute>
struct TileWeights {
  Compute y[kBatchBoxes][kBatchBins][kGatherSide], x[kBatchBoxes][kBatchBins][kGatherSide];
  unsigned row_bins[kBatchBoxes][kGatherSide];         // the rows of bins that read a row
  unsigned column_bins[kBatchBoxes];                   // the columns of bins that read any column
  unsigned char bin_columns[kBatchBoxes][kBatchBins];  // the columns that a column of bins reads
};

template <class T>
constexpr int kGatherChannels = sizeof(T) == 8 ? 2 : 4;  // channels per lane

// Computes the weights of a tile in bins [ph, ph + kBatchBins) x [pw, pw + kBatchBins) of some boxes, with one thread
// per row or column of bins. All threads of the block must call this function, which ends with a barrier.
template <class P, class Compute>
__device__ __forceinline__ void find_weights(const P& p, RegionKind kind, const Tile& tile, const int* list, int boxes,
                                             int ph, int pw, TileWeights<Compute>& weights) {
  if (threadIdx.x < kBatchBoxes * kGatherSide)
    weights.row_bins[threadIdx.x / kGatherSide][threadIdx.x % kGatherSide] = 0;
  if (threadIdx.x < kBatchBoxes) weights.column_bins[threadIdx.x] = 0;
  __syncthreads();
  const int rows = min(kBatchBins, p.PH - ph), lines = rows + min(kBatchBins, p.PW - pw);
#pragma unroll 1
  for (int i = threadIdx.x; i < boxes * lines; i += kRegionThreads) {
    const int b = i / lines, line = i - b * lines, k = list[b];
    const bool is_x = line >= rows;
    const int bin = is_x ? line - rows : line;
    const RegionBin<Compute> region_bin = p.bins[int64_t{k} * (p.PH + p.PW) + (is_x ? p.PH + pw : ph) + bin];
    const Compute sample_weight = is_x ? p.boxes[k].weight_x : p.boxes[k].weight_y;
    const int size = is_x ? p.levels[tile.level].W : p.levels[tile.level].H, low = is_x ? tile.left : tile.top;
    Compute* const of_bin = is_x ? weights.x[b][bin] : weights.y[b][bin];
    unsigned read = 0;  // the lines of the tile that the bin reads, as bits
    for_each_weight(kind, region_bin, sample_weight, size, low, min(kGatherSide, size - low),
                    [&](int at, Compute weight) {
                      of_bin[at] = weight + (read >> at & 1 ? of_bin[at] : Compute(0));
                      read |= 1u << at;
                    });
    if (read == 0) continue;
    if (is_x) {
      weights.bin_columns[b][bin] = static_cast<unsigned char>(read);
      atomicOr(&weights.column_bins[b], 1u << bin);
    } else {
      for (; read != 0; read &= read - 1) atomicOr(&weights.row_bins[b][__ffs(read) - 1], 1u << bin);
    }
  }
  __syncthreads();
}

// Stores the first `count` values, up to 16 bytes at a time if all are stored.
template <class T, class Compute, int kSize>
__device__ __forceinline__ void store_values(T* out, const Compute (&values)[kSize], int count) {
  constexpr int V = std::min<int>(kSize, 16 / sizeof(T));
  if (count >= kSize && reinterpret_cast<uintptr_t>(out) % (V * sizeof(T)) == 0) {
#pragma unroll
    for (int i = 0; i < kSize; i += V) {
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.x[v] = static_cast<T>(values[i + v]);
      store_pack(out + i, pack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i < count) out[i] = static_cast<T>(values[i]);
  }
}

// The number of blocks that must fit on a multiprocessor. It limits the number of registers per thread, and with one
// more block, some kernels would spill registers.
template <class Compute, Gather kGather>
constexpr int kGatherBlocks = sizeof(Compute) == 8       ? 2
                              : kGather == Gather::kMean ? 4
                                                         : 3;

// Computes the gradient of a tile. The gradients of the outputs and argmax are [K,PH,PW,grad_channels], where
// grad_channels is a multiple of V; if the op is position-sensitive, the gradients are in the layout of the input.
template <class P, Gather kGather, bool kChannelsLast>
__global__ __launch_bounds__(kRegionThreads, (kGatherBlocks<typename P::Compute, kGather>)) void region_gather_kernel(
    const __grid_constant__ P p, const __grid_constant__ RegionTiles tiles, int grad_channels, const int* argmax) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  constexpr int V = kGatherChannels<T>;
  __shared__ TileWeights<Compute> weights;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = (blockIdx.y * 32 + lane) * V;
  const unsigned bins = p.PH * p.PW;
  __shared__ Tile tile;  // in shared memory, because registers are short
  if (threadIdx.x == 0) tile = tile_of_block<kGatherSide>(p, tiles);
  __syncthreads();
  Compute sums[kGatherSide][V];
#pragma unroll
  for (int i = 0; i < kGatherSide; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) sums[i][v] = 0;

  for_each_list(tiles, [&](const int* list, int count) {
    for (int first = 0; first < count; first += kBatchBoxes)
      for (int ph = 0; ph < p.PH; ph += kBatchBins)
        for (int pw = 0; pw < p.PW; pw += kBatchBins) {
          const int boxes = min(kBatchBoxes, count - first);
          find_weights(p, kGather == Gather::kMaximum ? RegionKind::kMaximum : p.spec.kind, tile, list + first, boxes,
                       ph, pw, weights);
          for (int b = 0; b < boxes && channel < p.channels; ++b) {
            const int64_t k = list[first + b];
            if constexpr (kGather == Gather::kSensitive) {
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const unsigned c = channel + v, bin = c % bins, y = bin / p.PW - ph, x = bin % p.PW - pw;
                if (c >= p.channels || y >= kBatchBins || x >= kBatchBins) continue;
                if ((weights.row_bins[b][warp] >> y & weights.column_bins[b] >> x & 1) == 0) continue;
                const unsigned columns = weights.bin_columns[b][x];
                const T* grads = p.grad_output + k * p.channels;
                const Compute grad = weights.y[b][y][warp] *
                                     static_cast<Compute>(grads[kChannelsLast ? bin * p.out_channels + c / bins : c]);
#pragma unroll
                for (int i = 0; i < kGatherSide; ++i)
                  if (columns >> i & 1) sums[i][v] += weights.x[b][x][i] * grad;
              }
              continue;
            }
            const T* grads = p.grad_output + (k * bins + ph * p.PW + pw) * grad_channels + channel;
            for (unsigned y_rest = weights.row_bins[b][warp]; y_rest != 0; y_rest &= y_rest - 1) {
              const int y = __ffs(y_rest) - 1;
              const Compute y_weight = weights.y[b][y][warp];
              for (unsigned x_rest = weights.column_bins[b]; x_rest != 0; x_rest &= x_rest - 1) {
                const int x = __ffs(x_rest) - 1;
                const unsigned from = (y * p.PW + x) * grad_channels;
                const Pack<T, V> grad = load_pack<T, V>(grads + from);
                const unsigned columns = weights.bin_columns[b][x];
                if constexpr (kGather == Gather::kMaximum) {
                  const Pack<int, V> maximum = load_pack<int, V>(argmax + (grads - p.grad_output) + from);
                  const int pixel = (tile.top + warp) * p.levels[tile.level].W + tile.left;
#pragma unroll
                  for (int v = 0; v < V; ++v) {
                    const int column = maximum.x[v] - pixel;
#pragma unroll
                    for (int i = 0; i < kGatherSide; ++i)
                      if (column == i) sums[i][v] += static_cast<Compute>(grad.x[v]);
                  }
                } else {
                  Compute weighted[V];
#pragma unroll
                  for (int v = 0; v < V; ++v) weighted[v] = y_weight * static_cast<Compute>(grad.x[v]);
#pragma unroll
                  for (int i = 0; i < kGatherSide; ++i)
                    if (columns >> i & 1) {
#pragma unroll
                      for (int v = 0; v < V; ++v) sums[i][v] += weights.x[b][x][i] * weighted[v];
                    }
                }
              }
            }
          }
          __syncthreads();
        }
  });

  const RegionLevel<T>& level = p.levels[tile.level];
  const int row = tile.top + warp, columns = tile.right - tile.left + 1;
  if (row > tile.bottom) return;
  if constexpr (kChannelsLast) {
    T* out = level.grad_input + ((int64_t{tile.image} * level.H + row) * level.W + tile.left) * p.channels + channel;
#pragma unroll
    for (int i = 0; i < kGatherSide; ++i)
      if (i < columns) store_values(out + int64_t{i} * p.channels, sums[i], p.channels - channel);
  } else {
    const int64_t plane = int64_t{level.H} * level.W;
    T* out =
        level.grad_input + (int64_t{tile.image} * p.channels + channel) * plane + int64_t{row} * level.W + tile.left;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      Compute line[kGatherSide];
#pragma unroll
      for (int i = 0; i < kGatherSide; ++i) line[i] = sums[i][v];
      if (channel + v < p.channels) store_values(out + v * plane, line, columns);
    }
  }
}

constexpr int kPackThreads = 256;
constexpr int kPackBins = 64, kPackChannels = 32;  // a block transposes so many values at a time

// Copies values of outputs to [K,bins,packed_channels] and fills the additional channels with zeros. The strides of the
// input are in elements.
template <class T>
__global__ __launch_bounds__(kPackThreads) void region_pack_kernel(const T* in, int channels, int bins,
                                                                   int channel_stride, int bin_stride,
                                                                   int packed_channels, T* out) {
  __shared__ T values[kPackChannels][kPackBins + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = blockIdx.y * kPackChannels;
  in += int64_t{blockIdx.x} * channels * bins;
  out += int64_t{blockIdx.x} * packed_channels * bins;
  for (int first = 0; first < bins; first += kPackBins) {
    const int count = min(kPackBins, bins - first);
    for (int c = warp; c < kPackChannels; c += kRegionWarps) {
      const T* line = in + ((channel + c) * channel_stride + first * bin_stride);
#pragma unroll
      for (int bin = lane; bin < kPackBins; bin += 32)
        if (bin < count) values[c][bin] = channel + c < channels ? line[bin * bin_stride] : static_cast<T>(0);
    }
    __syncthreads();
    T* column = out + (first * packed_channels + channel + lane);
    for (int bin = warp; bin < count && channel + lane < packed_channels; bin += kRegionWarps)
      column[bin * packed_channels] = values[lane][bin];
    __syncthreads();
  }
}

// Finds the pixel of each maximum: the first pixel of the bin, in row-major order, that is equal to the maximum. The
// result is y * W + x, or -1 if the maximum is -infinity. Each thread processes one output at a time.
template <class P>
__global__ __launch_bounds__(kRegionThreads, 2) void region_argmax_kernel(const __grid_constant__ P p,
                                                                          bool channels_last,
                                                                          const typename P::T* pooled, int* argmax) {
  using Compute = typename P::Compute;
  const int64_t k = blockIdx.x;
  const RegionBox<Compute> box = p.boxes[k];
  const int image = max(box.map, 0) / p.L, bins = p.PH * p.PW, outputs = bins * p.channels;
  const auto& level = p.levels[max(box.map, 0) - image * p.L];
  const int64_t plane = int64_t{level.H} * level.W, stride = channels_last ? p.channels : 1;
  for (int i = blockIdx.y * kRegionThreads + threadIdx.x; i < outputs; i += gridDim.y * kRegionThreads) {
    const int c = channels_last ? i % p.channels : i / bins, bin = channels_last ? i / p.channels : i - c * bins;
    int pixel = -1;
    if (box.map >= 0) {
      const RegionBin<Compute> y = p.bins[k * (p.PH + p.PW) + bin / p.PW];
      const RegionBin<Compute> x = p.bins[k * (p.PH + p.PW) + p.PH + bin % p.PW];
      const Compute maximum = static_cast<Compute>(pooled[k * outputs + i]);
      const auto* origin = level.input + int64_t{image} * p.channels * plane + (channels_last ? c : c * plane);
      for (int h = y.first; h < y.first + y.count && pixel < 0 && maximum > -static_cast<Compute>(INFINITY); ++h)
        for (int w = x.first; w < x.first + x.count && pixel < 0; ++w) {
          const int candidate = h * level.W + w;
          if (static_cast<Compute>(origin[candidate * stride]) == maximum) pixel = candidate;
        }
    }
    argmax[k * outputs + i] = pixel;
  }
}

// The gradients of the outputs or argmax, in the layout [K,bins,channels] that the gather kernel reads. T is the type
// of the values.
template <class T>
Tensor packed(const RegionProblem& p, const Tensor& values, int channels, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0;
  if (p.channels_last && channels == p.C && aligned) return values;
  const int bins = static_cast<int>(p.PH * p.PW);
  const Tensor result = torch::stable::new_empty(values, {p.K * bins, channels});
  if (p.K == 0) return result;
  const int channel_stride = p.channels_last ? 1 : bins, bin_stride = p.channels_last ? static_cast<int>(p.C) : 1;
  const dim3 grid(grid_size(p.spec.op, p.K), static_cast<unsigned>(ceil_div(channels, kPackChannels)));
  region_pack_kernel<T><<<grid, kPackThreads, 0, stream>>>(static_cast<const T*>(values.const_data_ptr()),
                                                           static_cast<int>(p.C), bins, channel_stride, bin_stride,
                                                           channels, static_cast<T*>(result.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

template <Gather kGather, class P>
void launch_gather(const RegionProblem& problem, const P& p, const RegionTiles& tiles, int grad_channels,
                   const int* argmax, cudaStream_t stream) {
  const dim3 grid(tiles.total, static_cast<unsigned>(ceil_div(p.channels, 32 * kGatherChannels<typename P::T>)));
  if (problem.channels_last)
    region_gather_kernel<P, kGather, true><<<grid, kRegionThreads, 0, stream>>>(p, tiles, grad_channels, argmax);
  else
    region_gather_kernel<P, kGather, false><<<grid, kRegionThreads, 0, stream>>>(p, tiles, grad_channels, argmax);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Returns the pixels of all maxima, in the layout of the output.
template <class P>
Tensor find_argmax(const RegionProblem& problem, const P& p, const Tensor& output, cudaStream_t stream) {
  check_pixels_fit_int(problem);
  const Tensor argmax =
      torch::stable::new_empty(output, {problem.K * problem.C * problem.PH * problem.PW}, ScalarType::Int);
  if (p.K == 0) return argmax;
  const unsigned blocks = static_cast<unsigned>(
      std::clamp<int64_t>(ceil_div(problem.C * problem.PH * problem.PW, 4 * kRegionThreads), 1, 65535));
  region_argmax_kernel<P><<<dim3(grid_size(problem.spec.op, p.K), blocks), kRegionThreads, 0, stream>>>(
      p, problem.channels_last, static_cast<const typename P::T*>(output.const_data_ptr()),
      static_cast<int*>(argmax.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return argmax;
}

}  // namespace

void region_backward_input(const RegionProblem& problem, const Tensor& grad_output, const Tensor* output,
                           cudaStream_t stream) {
  const char* op = problem.spec.op;
  const auto needs_grad = [](const auto& level) { return level.grad_input != nullptr; };
  if (std::none_of(problem.levels.begin(), problem.levels.end(), needs_grad)) return;
  STD_TORCH_CHECK(ceil_div(problem.C, kPackChannels) <= 65535, op, ": too many channels for one launch (", problem.C,
                  ")");
  dispatch_features(op, problem.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionParams<T> p = make_region_params<T>(problem);
    const Tensor description = describe_boxes(problem, p, stream);
    RegionTiles tiles{};
    const Tensor reached =
        find_tiles<kGatherSide>(problem, p, std::numeric_limits<int>::max(), needs_grad, tiles, stream);
    if (tiles.total == 0 || p.channels == 0) return;
    p.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    if (p.spec.position_sensitive) {
      launch_gather<Gather::kSensitive>(problem, p, tiles, 0, nullptr, stream);
      return;
    }
    constexpr int V = kGatherChannels<T>;
    const int grad_channels = static_cast<int>(ceil_div(p.channels, V) * V);
    const Tensor grads = packed<T>(problem, grad_output, grad_channels, stream);
    p.grad_output = static_cast<const T*>(grads.const_data_ptr());
    if (p.spec.kind != RegionKind::kMaximum) {
      launch_gather<Gather::kMean>(problem, p, tiles, grad_channels, nullptr, stream);
      return;
    }
    const Tensor argmax = packed<int>(problem, find_argmax(problem, p, *output, stream), grad_channels, stream);
    launch_gather<Gather::kMaximum>(problem, p, tiles, grad_channels, static_cast<const int*>(argmax.const_data_ptr()),
                                    stream);
  });
}

}  // namespace relops
