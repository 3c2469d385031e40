// The gradient of the feature maps, gathered: bit-identical from run to run, without atomic additions, without zeroing
// and without sums in memory, so that 16-bit gradients are rounded once.
//
// A block owns a tile of pixels and some channels. It looks through all boxes, 256 at a time, for those that reach its
// tile, and takes them in their order. For each it computes the weights of the tile's rows and columns in the bins, in
// shared memory; then every thread adds weight * gradient of the output to its pixels. A pixel takes part in few bins,
// so their numbers are kept as bits.
//
// - channels_last: a warp has four neighboring pixels of a row, its lanes four neighboring channels each.
// - NCHW: lanes are neighboring columns; a thread has four rows of two channels. The sum over a row's bins is shared by
//   the rows that take part in them.
//
// Bound by the latency of one box after the other, which many blocks per multiprocessor hide.
//
// A maximum's gradient goes to one pixel: which one is found first, by scanning the bins again, and kept as one integer
// per output; then the same kernel picks it up.

#include "regions/cuda.cuh"

namespace relops {

namespace {

constexpr int kTileRows = 4;
constexpr int kTileBins = 32;       // bins of an axis whose weights are there at a time; the bits of a mask
constexpr int kThreadPixels = 4;    // of a thread, in both layouts; NCHW: a column of the tile
constexpr int kThreadChannels = 2;  // NCHW: of a thread
constexpr int kBlockChannels = kThreadChannels * kRegionWarps;  // NCHW

static_assert(kTileRows == kThreadPixels && kRegionWarps == 2 * kTileRows);

template <bool kChannelsLast>
constexpr int kTileColumns = kChannelsLast ? 8 : 32;

template <class T, bool kChannelsLast>
int64_t tiles_of(const RegionLevelParams<T>& level, int64_t N) {
  if (level.grad_input == nullptr) return 0;
  return N * ceil_div(level.H, kTileRows) * ceil_div(level.W, kTileColumns<kChannelsLast>);
}

// Whether a region may read the pixels [low, high]; true too often rather than too rarely.
__device__ inline bool may_reach(const RegionAxis& axis, int low, int high) {
  const double end = axis.start + axis.bins * axis.bin;
  const double least = end < axis.start ? end : axis.start, most = end < axis.start ? axis.start : end;
  return most >= low - 1 && least <= high + 1;
}

template <class P, bool kChannelsLast, bool kMaximum, int V>
__global__ __launch_bounds__(256, sizeof(typename P::Compute) == 8
                                      ? 1
                                      : 2) void region_gather_kernel(const __grid_constant__ P p) {
  using T = typename P::T;
  using Compute = typename P::Compute;
  constexpr int kColumns = kTileColumns<kChannelsLast>;
  __shared__ Compute weight_y[kTileRows][kTileBins];
  __shared__ Compute weight_x[kTileBins][kColumns];
  __shared__ unsigned mask_y[kTileRows], mask_x[kColumns];
  __shared__ int found[kRegionWarps];
  __shared__ int offsets[kRegionThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  int64_t tile = blockIdx.x;
  int l = 0, rows = 0, columns = 0;  // of tiles
  for (;; ++l) {
    rows = (p.levels[l].H + kTileRows - 1) / kTileRows;
    columns = (p.levels[l].W + kColumns - 1) / kColumns;
    const int64_t count = p.levels[l].grad_input == nullptr ? 0 : int64_t{p.N} * rows * columns;
    if (tile < count) break;
    tile -= count;
  }
  const RegionLevelParams<T>& level = p.levels[l];
  const int image = static_cast<int>(tile / (int64_t{rows} * columns));
  const int within = static_cast<int>(tile - int64_t{image} * rows * columns);
  const int top = within / columns * kTileRows, left = within % columns * kColumns;
  const int bottom = min(top + kTileRows, level.H) - 1, right = min(left + kColumns, level.W) - 1;
  const int bins = p.PH * p.PW;

  // channels_last: pixels (top + row, left + column + i), channels channel + v. NCHW: pixels (top + i, left + lane),
  // channels channel + v * kRegionWarps.
  const int row = warp / 2, column = warp % 2 * kThreadPixels;
  const int channel = kChannelsLast ? (blockIdx.y * 32 + lane) * V : blockIdx.y * kBlockChannels + warp;
  Compute sums[kThreadPixels][V];
#pragma unroll
  for (int i = 0; i < kThreadPixels; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) sums[i][v] = 0;

  for (int64_t first = 0; first < p.K; first += kRegionThreads) {
    bool reaches = false;
    if (first + threadIdx.x < p.K) {
      const RegionPlace at = region_place(p, first + threadIdx.x);
      reaches = at.in_batch && at.finite && at.level == l && at.image == image &&
                may_reach(region_axis(p, l, first + threadIdx.x, false), top, bottom) &&
                may_reach(region_axis(p, l, first + threadIdx.x, true), left, right);
    }
    const unsigned ballot = __ballot_sync(kAll, reaches);
    if (lane == 0) found[warp] = __popc(ballot);
    __syncthreads();
    int total = 0, mine = __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kRegionWarps; ++w) {
      if (w < warp) mine += found[w];
      total += found[w];
    }
    if (reaches) offsets[mine] = threadIdx.x;
    __syncthreads();

    for (int hit = 0; hit < total; ++hit) {
      const int64_t k = first + offsets[hit];
      for (int ph0 = 0; ph0 < p.PH; ph0 += kTileBins)
        for (int pw0 = 0; pw0 < p.PW; pw0 += kTileBins) {
          const int some_h = min(kTileBins, p.PH - ph0), some_w = min(kTileBins, p.PW - pw0);
          if (threadIdx.x < kTileRows) mask_y[threadIdx.x] = 0;
          if (threadIdx.x < kColumns) mask_x[threadIdx.x] = 0;
          __syncthreads();
          for (int i = threadIdx.x; i < some_h * kTileRows + some_w * kColumns; i += kRegionThreads) {
            const bool is_x = i >= some_h * kTileRows;
            const int j = is_x ? i - some_h * kTileRows : i, places = is_x ? kColumns : kTileRows;
            const int bin = j / places, place = j - bin * places, pixel = (is_x ? left : top) + place;
            double weight = 0;
            bool reads = false;
            if (pixel <= (is_x ? right : bottom))
              for_each_tap<Compute>(region_axis(p, l, k, is_x), (is_x ? pw0 : ph0) + bin, pixel, pixel,
                                    [&](int, double part, double, double) {
                                      weight += part;
                                      reads = true;
                                    });
            *(is_x ? &weight_x[bin][place] : &weight_y[place][bin]) = static_cast<Compute>(weight);
            if (reads) atomicOr(is_x ? &mask_x[place] : &mask_y[place], 1u << bin);
          }
          __syncthreads();

          if (p.position_sensitive) {
          // A channel belongs to one bin.
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const int c = kChannelsLast ? channel + v : channel + v * kRegionWarps;
              const int bin = c % bins, ph = bin / p.PW - ph0, pw = bin % p.PW - pw0;
              if (c >= p.channels || ph < 0 || ph >= some_h || pw < 0 || pw >= some_w) continue;
              const int64_t from = kChannelsLast ? (k * bins + bin) * p.out_channels + c / bins : k * p.channels + c;
              const Compute grad = static_cast<Compute>(p.grad_output[from]);
#pragma unroll
              for (int i = 0; i < kThreadPixels; ++i) {
                const int r = kChannelsLast ? row : i, x = kChannelsLast ? column + i : lane;
                if (mask_y[r] >> ph & mask_x[x] >> pw & 1) sums[i][v] += weight_y[r][ph] * weight_x[pw][x] * grad;
              }
            }
          } else if constexpr (kChannelsLast) {
            unsigned any_x = 0;
#pragma unroll
            for (int i = 0; i < kThreadPixels; ++i) any_x |= mask_x[column + i];
            for (unsigned h = channel < p.channels ? mask_y[row] : 0; h != 0; h &= h - 1) {
              const int ph = __ffs(h) - 1;
              for (unsigned w = any_x; w != 0; w &= w - 1) {
                const int pw = __ffs(w) - 1;
                const int64_t from = (k * bins + (ph0 + ph) * p.PW + pw0 + pw) * p.channels + channel;
                const Pack<T, V> grad = load_pack<T, V>(p.grad_output + from);
                if constexpr (kMaximum) {
                  const Pack<int, V> place = load_pack<int, V>(p.place + from);
#pragma unroll
                  for (int i = 0; i < kThreadPixels; ++i)
#pragma unroll
                    for (int v = 0; v < V; ++v)
                      if (place.x[v] == (top + row) * level.W + left + column + i)
                        sums[i][v] += static_cast<Compute>(grad.x[v]);
                } else {
#pragma unroll
                  for (int i = 0; i < kThreadPixels; ++i) {
                    const Compute weight = weight_y[row][ph] * weight_x[pw][column + i];
                    if (!(mask_x[column + i] >> pw & 1)) continue;
#pragma unroll
                    for (int v = 0; v < V; ++v) sums[i][v] += weight * static_cast<Compute>(grad.x[v]);
                  }
                }
              }
            }
          } else {
            unsigned any_y = 0;
#pragma unroll
            for (int i = 0; i < kThreadPixels; ++i) any_y |= mask_y[i];
            for (unsigned h = any_y; h != 0; h &= h - 1) {
              const int ph = __ffs(h) - 1;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const int c = channel + v * kRegionWarps;
                if (c >= p.channels) continue;
                const int64_t from = (k * p.channels + c) * bins + (ph0 + ph) * p.PW + pw0;
                if constexpr (kMaximum) {
                  for (unsigned w = mask_x[lane]; w != 0; w &= w - 1) {
                    const int pw = __ffs(w) - 1, place = p.place[from + pw];
#pragma unroll
                    for (int i = 0; i < kThreadPixels; ++i)
                      if (place == (top + i) * level.W + left + lane)
                        sums[i][v] += static_cast<Compute>(p.grad_output[from + pw]);
                  }
                } else {
                  Compute sum = 0;
                  for (unsigned w = mask_x[lane]; w != 0; w &= w - 1) {
                    const int pw = __ffs(w) - 1;
                    sum += weight_x[pw][lane] * static_cast<Compute>(p.grad_output[from + pw]);
                  }
#pragma unroll
                  for (int i = 0; i < kThreadPixels; ++i)
                    if (mask_y[i] >> ph & 1) sums[i][v] += weight_y[i][ph] * sum;
                }
              }
            }
          }
          __syncthreads();
        }
    }
  }

  if constexpr (kChannelsLast) {
    if (channel >= p.channels || top + row > bottom) return;
    T* out =
        level.grad_input + ((int64_t{image} * level.H + top + row) * level.W + left + column) * p.channels + channel;
#pragma unroll
    for (int i = 0; i < kThreadPixels; ++i) {
      if (left + column + i > right) return;
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.x[v] = static_cast<T>(sums[i][v]);
      store_pack(out + int64_t{i} * p.channels, pack);
    }
  } else {
    if (left + lane > right) return;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = channel + v * kRegionWarps;
      if (c >= p.channels) return;
      T* out = level.grad_input + ((int64_t{image} * p.channels + c) * level.H + top) * level.W + left + lane;
#pragma unroll
      for (int i = 0; i < kThreadPixels; ++i)
        if (top + i <= bottom) out[int64_t{i} * level.W] = static_cast<T>(sums[i][v]);
    }
  }
}

// The pixel of each maximum: the first of its bin, row by row, that has its value; -infinity is none. A thread per
// output.
template <class P>
__global__ __launch_bounds__(256, 1) void region_place_kernel(const __grid_constant__ P p, bool channels_last,
                                                              const typename P::T* pooled, int* place) {
  using Compute = typename P::Compute;
  const int64_t k = blockIdx.x;
  const RegionPlace at = region_place(p, k);
  const bool wanted = at.in_batch && at.finite;
  const RegionAxis y_axis = region_axis(p, at.level, k, false), x_axis = region_axis(p, at.level, k, true);
  const auto& level = p.levels[at.level];
  const int64_t bins = int64_t{p.PH} * p.PW, outputs = bins * p.channels;
  const int64_t plane = int64_t{level.H} * level.W, stride = channels_last ? p.channels : 1;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < outputs; i += int64_t{gridDim.y} * blockDim.x) {
    const int64_t bin = channels_last ? i / p.channels : i % bins, c = channels_last ? i % p.channels : i / bins;
    int pixel = -1;
    if (wanted) {
      const PixelRange y = pixel_range<Compute>(y_axis, static_cast<int>(bin / p.PW));
      const PixelRange x = pixel_range<Compute>(x_axis, static_cast<int>(bin % p.PW));
      const Compute most = static_cast<Compute>(pooled[k * outputs + i]);
      const auto* origin = level.input + int64_t{at.image} * p.channels * plane + (channels_last ? c : c * plane);
      for (int h = y.begin; h < y.end && pixel < 0 && most > -static_cast<Compute>(INFINITY); ++h)
        for (int w = x.begin; w < x.end && pixel < 0; ++w) {
          const int here = h * level.W + w;
          if (static_cast<Compute>(origin[here * stride]) == most) pixel = here;
        }
    }
    place[k * outputs + i] = pixel;
  }
}

template <class P, bool kMaximum>
void launch_gather(const RegionProblem& problem, const P& p, cudaStream_t stream) {
  using T = typename P::T;
  const char* op = problem.spec.op;
  // Eight 16-bit channels would take more registers than there are.
  constexpr int V = std::min<int>(4, 16 / sizeof(T));
  int64_t tiles = 0;
  bool aligned = p.channels % V == 0 && !p.position_sensitive && reinterpret_cast<uintptr_t>(p.grad_output) % 16 == 0;
  for (int l = 0; l < p.L; ++l) {
    tiles += problem.channels_last ? tiles_of<T, true>(p.levels[l], p.N) : tiles_of<T, false>(p.levels[l], p.N);
    aligned = aligned && reinterpret_cast<uintptr_t>(p.levels[l].grad_input) % 16 == 0;
  }
  if (tiles == 0 || p.channels == 0) return;
  const auto grid = [&](int64_t channels) {
    const int64_t blocks = ceil_div(p.channels, channels);
    STD_TORCH_CHECK(blocks <= 65535, op, ": too many channels for one launch (", p.channels, ")");
    return dim3(grid_size(op, tiles), static_cast<unsigned>(blocks));
  };
  if (!problem.channels_last)
    region_gather_kernel<P, false, kMaximum, kThreadChannels><<<grid(kBlockChannels), kRegionThreads, 0, stream>>>(p);
  else if (aligned)
    region_gather_kernel<P, true, kMaximum, V><<<grid(32 * V), kRegionThreads, 0, stream>>>(p);
  else
    region_gather_kernel<P, true, kMaximum, 1><<<grid(32), kRegionThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void region_backward_input(const RegionProblem& p, const Tensor& grad_output, const Tensor* output,
                           const RegionGrads& grads, cudaStream_t stream) {
  dispatch_features(p.spec.op, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    RegionParams<T> a = make_region_params<T>(p);
    a.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    for (int l = 0; l < a.L; ++l)
      if (grads.wanted(l)) a.levels[l].grad_input = static_cast<T*>(grads.inputs[l].mutable_data_ptr());
    if (p.spec.rule.kind != RegionKind::kMaximum) {
      launch_gather<RegionParams<T>, false>(p, a, stream);
      return;
    }
    check_pixels_fit_int(p);
    const Tensor place =
        torch::stable::new_empty(grad_output, {std::max<int64_t>(grad_output.numel(), 4)}, ScalarType::Int);
    a.place = static_cast<const int*>(place.const_data_ptr());
    if (grad_output.numel() > 0) {
      const unsigned parts =
          static_cast<unsigned>(std::clamp<int64_t>(ceil_div(p.C * p.PH * p.PW, 4 * kRegionThreads), 1, 65535));
      region_place_kernel<RegionParams<T>><<<dim3(grid_size(p.spec.op, p.K), parts), kRegionThreads, 0, stream>>>(
          a, p.channels_last, static_cast<const T*>(output->const_data_ptr()),
          static_cast<int*>(place.mutable_data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    launch_gather<RegionParams<T>, true>(p, a, stream);
  });
}

}  // namespace relops
