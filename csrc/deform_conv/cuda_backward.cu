// deform_conv2d on CUDA: the gradients of input, offset and mask.
//
// A block owns 64 pixels of one image, one tap and one offset group. It iterates over the channels of the offset group.
// For up to 128 channels at a time, it computes the gradient of the samples as a product of the gradient of the output
// and the weight, and passes it through shared memory to the threads that process the samples. These threads add the
// gradients of the four pixels of each sample to memory, and multiply them by the pixels. The sums of these products
// over the channels give the gradients of offset and mask. The block computes these sums in a fixed order.
//
// Instruction issue limits the speed. The additions to memory take about half as long: on Hopper, one instruction adds
// four channels of a channels_last gradient.

#include "deform_conv/cuda.cuh"

namespace relops {

namespace {

template <class T>
struct GradTile {
  using Compute = ComputeType<T>;
  static constexpr int kChannels = sizeof(T) == 8 ? 64 : 128;
  static constexpr int kSumPiece = kPieceSize<Compute>, kSumPieces = kChannels / kSumPiece;
  static constexpr int kSlices = kThreads / kTilePixels;  // threads per pixel if neighboring lanes have other pixels
  using Grid = WarpGrid<kTilePixels, kChannels, 2>;

  struct Chunks {
    T grad[2][kTilePixels * kDepth<T>], weights[2][kChannels * kDepth<T>];
  };
  alignas(16) char memory[sizeof(Chunks)];  // holds the chunks, then the gradients of the samples
  TapSample<Compute> samples[kTilePixels];
  int64_t grad_offsets[kTilePixels];
  OutputPixel pixels[kTilePixels];
  int n, g, t;  // image, offset group and tap of the block, which are kept here because registers are scarce
  // The sums over channels of the gradients of samples times pixels. Each thread has its own. In registers, they would
  // cause spills.
  static constexpr int kSamples = kTilePixels * kPieces / kThreads, kDots = 4 * kSamples;
  Compute dots[kDots][kThreads];

  __device__ Chunks& chunks() { return *reinterpret_cast<Chunks*>(memory); }
  __device__ Compute* grads() { return reinterpret_cast<Compute*>(memory); }  // [kTilePixels][kChannels] in pieces

  static_assert(sizeof(Chunks) >= sizeof(Compute) * kTilePixels * kChannels);
};

// Writes where the pixels of a block are in the gradient of the output, or -1 for pixels that do not exist.
template <class T>
__device__ __forceinline__ void locate_grad(const DeformConvArgs<T>& a, int64_t n, const TilePixels<kTilePixels>& tile,
                                            int64_t (&offsets)[kTilePixels]) {
  if (threadIdx.x >= kTilePixels) return;
  const OutputPixel pixel = tile.at(threadIdx.x);
  const Map<const T>& grad = a.grad_output;
  offsets[threadIdx.x] =
      threadIdx.x < tile.count ? n * grad.n_stride + pixel.h * grad.h_stride + pixel.w * grad.w_stride : -1;
}

// Begins to fill a chunk with `count` channels of the gradient of the output. If channels are adjacent in memory, the
// pieces are copied asynchronously.
template <class T>
__device__ __forceinline__ void fill_grad(const DeformConvParams<T>& p, const int64_t (&offsets)[kTilePixels],
                                          int64_t channel, int count, T* chunk) {
  constexpr int V = kPieceSize<T>;
  const unsigned thread = opaque_thread();
  const Map<const T>& grad = p.a.grad_output;
#pragma unroll
  for (int i = 0; i < kTilePixels * kPieces / kThreads; ++i) {
    const int pixel = p.grad_packs ? thread / kPieces + kThreads / kPieces * i : thread % kTilePixels;
    const int piece = p.grad_packs ? thread % kPieces : thread / kTilePixels + kThreads / kTilePixels * i;
    const int64_t offset = offsets[pixel];
    const T* from = grad.data + offset + (channel + piece * V) * grad.c_stride;
    T* to = chunk + piece_at(pixel, piece) * V;
    if (p.grad_packs) {
      copy_async(to, from, offset >= 0 && piece * V < count);
      continue;
    }
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v, from += grad.c_stride)
      pack.x[v] = load_pack<T, 1>(from, offset >= 0 && piece * V + v < count).x[0];
    store_pack<T, V>(to, pack);
  }
}

// Computes the gradients of the samples of tap t in `count` channels, beginning with channel c. All these channels
// belong to one group.
template <bool kExact, class T>
__device__ __forceinline__ void multiply_by_weight(const DeformConvParams<T>& p, int t, int c, int count,
                                                   GradTile<T>& shared, Sums<T, typename GradTile<T>::Grid>& sums) {
  const int outputs = static_cast<int>(p.a.group_outputs), group = c / static_cast<int>(p.a.group_inputs);
  const int64_t first_output = int64_t{group} * outputs;
  typename GradTile<T>::Chunks& chunks = shared.chunks();
  sums.set_zero();
#pragma unroll 1
  for (int o = 0, slot = 0;; o += kDepth<T>, slot ^= 1) {
    const bool fills = o < outputs;
    if (fills) copy_weights<GradTile<T>::kChannels, kPieces>(p, t, o / kDepth<T>, c, count, chunks.weights[slot]);
    const bool fills_first = threadIdx.x < kThreads / 2;
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if ((phase == 0) == fills_first) {
        if (fills) fill_grad(p, shared.grad_offsets, first_output + o, outputs - o, chunks.grad[slot]);
      } else if (o > 0) {
        sums.template add_products<kExact, false, false, true>(chunks.grad[slot ^ 1], chunks.weights[slot ^ 1],
                                                               kTilePixels, count, outputs - o + kDepth<T>);
      }
    }
    if (!fills) break;
    wait_for_copies();
    __syncthreads();
  }
}

// Returns the number of channels, beginning with c and ending before `end`, that belong to one group and fit in a tile.
template <class T>
__device__ __forceinline__ int tile_channels(const DeformConvArgs<T>& a, int c, int end) {
  const int inputs = static_cast<int>(a.group_inputs);
  return min(min(end, c - c % inputs + inputs) - c, GradTile<T>::kChannels);
}

template <class T, bool kExact>
__global__ __launch_bounds__(kThreads, 2) void store_grad_samples_kernel(
    const __grid_constant__ DeformConvParams<T> p, const __grid_constant__ GradSamples<ComputeType<T>> part) {
  using Compute = ComputeType<T>;
  extern __shared__ __align__(16) char memory[];
  GradTile<T>& shared = *reinterpret_cast<GradTile<T>*>(memory);
  const unsigned taps = static_cast<unsigned>(p.a.taps), t = blockIdx.x % taps, tile = blockIdx.x / taps;
  locate_grad(p.a, part.n, TilePixels<kTilePixels>(p.a, part.first_tile + tile), shared.grad_offsets);
  __syncthreads();
  const int64_t first_row = (int64_t{t} * part.tiles + tile) * kTilePixels;
  Sums<T, typename GradTile<T>::Grid> sums;
#pragma unroll 1
  for (int c = part.first, count; c < part.end; c += count) {
    count = tile_channels(p.a, c, part.end);
    multiply_by_weight<kExact>(p, t, c, count, shared, sums);
    sums.for_pairs([&](int row, int column, Pack<Compute, 2> x) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (column + i < count) part.data[(first_row + row) * part.width + c - part.first + column + i] = x.x[i];
    });
    __syncthreads();  // before the next channels overwrite the chunks
  }
}

// Adds the gradients of V channels of a sample, which begin at channel `first` of the tile, to the gradient of the
// input. `lane` is the index of this thread among the kPieces threads that call this function for the same sample, each
// with its own V channels. Before Hopper, they exchange channels so that neighboring lanes add to neighboring
// addresses.
template <class T>
__device__ __forceinline__ void add_packs(const ComputeType<T>* grads, int pixel, int first, int count,
                                          const TapSample<ComputeType<T>>& s, const Corners<ComputeType<T>>& to) {
  using Compute = ComputeType<T>;
  using Tile = GradTile<T>;
  constexpr int V = kPieceSize<T>, W = reduction_width<Compute, V>(), P = Tile::kSumPiece;
  const int lane = threadIdx.x % kPieces;
#pragma unroll(W == 4 ? V / W : 1)
  for (int v = 0; v < V; v += W) {
    const int channel = W == 4 ? first + v : first + (V - 1) * -lane + v * kPieces;
    if (channel >= count) break;
    const Compute* from = grads + piece_at<Tile::kSumPieces>(pixel, channel / P) * P + channel % P;
    const Pack<Compute, W> grad = *reinterpret_cast<const Pack<Compute, W>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Compute x[W];
#pragma unroll
      for (int k = 0; k < W; ++k) x[k] = s.weights[i] * grad.x[k];
      reduce_add(to.p[i] + channel, x);
    }
  }
}

// Processes the gradients of the samples in the channels of a tile: adds to the gradient of the input, and to the sums
// of products with the pixels.
template <bool kPacks, class T>
__device__ __forceinline__ void process_grads(const DeformConvArgs<T>& a, int n, int c, int count,
                                              GradTile<T>& shared) {
  using Compute = ComputeType<T>;
  using Tile = GradTile<T>;
  constexpr int V = kPieceSize<T>, P = Tile::kSumPiece;
  const bool adds = a.grad_input.data != nullptr,
             needs_dots = a.grad_offset.data != nullptr || a.grad_mask.data != nullptr;
  const Compute* grads = shared.grads();
  const unsigned thread = opaque_thread();
  const T* input = a.input.at(n, c, 0);
  Compute* grad_input = a.grad_input.at(n, c, 0);
#pragma unroll
  for (int k = 0; k < (kPacks ? Tile::kSamples : 1); ++k) {
    const int pixel = kPacks ? thread / kPieces + kThreads / kPieces * k : thread % kTilePixels;
    const TapSample<Compute> s = shared.samples[pixel];
    if (!(s.row & TapSample<Compute>::kActive)) continue;
    Compute dots[4] = {};
    if constexpr (kPacks) {
      const Corners<const T> from(a.input, input, s);
      const Corners<Compute> to(a.grad_input, grad_input, s);
#pragma unroll 1
      for (int channel = thread % kPieces * V; channel < Tile::kChannels; channel += kPieces * V) {
        if (needs_dots && channel < count) {
          Pack<T, V> packs[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) packs[i] = load_pack<T, V>(from.p[i] + channel);
          Compute grad[V];
#pragma unroll
          for (int v = 0; v < V; v += P) {
            const auto pack = *reinterpret_cast<const Pack<Compute, P>*>(
                grads + piece_at<Tile::kSumPieces>(pixel, (channel + v) / P) * P);
#pragma unroll
            for (int u = 0; u < P; ++u) grad[v + u] = pack.x[u];
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Compute x[V];
            to_compute(packs[i], x);
#pragma unroll
            for (int v = 0; v < V; ++v) dots[i] += grad[v] * x[v];
          }
        }
        if (adds) add_packs<T>(grads, pixel, channel, count, s, to);
      }
    } else {
#pragma unroll 1
      for (int channel = thread / kTilePixels * P; channel < count; channel += Tile::kSlices * P) {
        const auto pack =
            *reinterpret_cast<const Pack<Compute, P>*>(grads + piece_at<Tile::kSumPieces>(pixel, channel / P) * P);
        Corners<const T> from(a.input, input + channel * a.input.c_stride, s);
        Corners<Compute> to(a.grad_input, grad_input + channel * a.grad_input.c_stride, s);
        T x[P][4] = {};
        if (needs_dots) {
#pragma unroll
          for (int u = 0; u < P; ++u, from.advance(a.input.c_stride))
#pragma unroll
            for (int i = 0; i < 4; ++i) x[u][i] = load_pack<T, 1>(from.p[i], channel + u < count).x[0];
        }
#pragma unroll
        for (int u = 0; u < P; ++u, to.advance(a.grad_input.c_stride))
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (adds && channel + u < count) atomicAdd(to.p[i], s.weights[i] * pack.x[u]);
            dots[i] += pack.x[u] * static_cast<Compute>(x[u][i]);
          }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.dots[4 * k + i][thread] += dots[i];
  }
}

// Writes the gradients of offset and mask of one sample. dot[i] is the sum over channels of the gradient of the sample
// times its pixel i.
template <class T>
__device__ __forceinline__ void write_sample_grads(const DeformConvArgs<T>& a, int64_t n, int g, int t,
                                                   OutputPixel pixel, const ComputeType<T> (&dot)[4]) {
  using Compute = ComputeType<T>;
  const TapPosition<Compute> position(a, n, g, t, pixel);
  const AxisSample<Compute> y(position.y, static_cast<int>(a.H)), x(position.x, static_cast<int>(a.W));
  Compute by_mask = 0, by_y = 0, by_x = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Compute value = y.valid(i) && x.valid(j) ? dot[2 * i + j] : 0;
      by_mask += y.weights[i] * x.weights[j] * value;
      by_y += y.derivatives[i] * x.weights[j] * value;
      by_x += y.weights[i] * x.derivatives[j] * value;
    }
  const int64_t channel = g * a.taps + t;
  if (a.grad_mask.data != nullptr) *a.grad_mask.at(n, channel, pixel.h, pixel.w) = by_mask;
  if (a.grad_offset.data != nullptr) {
    const Compute mask = mask_of(a, n, g, t, pixel);
    Compute* grad = a.grad_offset.at(n, 2 * channel, pixel.h, pixel.w);
    grad[0] = mask * by_y;
    grad[a.grad_offset.c_stride] = mask * by_x;
  }
}

template <class T, bool kExact, bool kPacks>
__global__ __launch_bounds__(kThreads,
                             2) void deform_conv_backward_kernel(const __grid_constant__ DeformConvParams<T> p) {
  using Compute = ComputeType<T>;
  using Tile = GradTile<T>;
  extern __shared__ __align__(16) char memory[];
  Tile& shared = *reinterpret_cast<Tile*>(memory);
  const DeformConvArgs<T>& a = p.a;
  // The tap varies fastest, because blocks of other taps read the same gradients of the output.
  if (threadIdx.x < kTilePixels) {
    unsigned rest = blockIdx.x;
    const int t = rest % static_cast<unsigned>(a.taps);
    rest /= static_cast<unsigned>(a.taps);
    const int g = rest % static_cast<unsigned>(a.G);
    rest /= static_cast<unsigned>(a.G);
    const int n = rest / p.pixel_tiles;
    const TilePixels<kTilePixels> tile(a, rest % p.pixel_tiles);
    const OutputPixel pixel = tile.at(threadIdx.x);
    shared.pixels[threadIdx.x] = pixel;
    shared.samples[threadIdx.x] = threadIdx.x < tile.count ? tap_sample(a, n, g, t, pixel) : TapSample<Compute>{};
    locate_grad(a, n, tile, shared.grad_offsets);
    if (threadIdx.x == 0) shared.n = n, shared.g = g, shared.t = t;
  }
#pragma unroll
  for (int i = 0; i < Tile::kDots; ++i) shared.dots[i][threadIdx.x] = 0;
  __syncthreads();
  const int end = (shared.g + 1) * static_cast<int>(a.offset_channels);
#pragma unroll 1
  for (int c = end - static_cast<int>(a.offset_channels), count; c < end; c += count) {
    count = tile_channels(a, c, end);
    Sums<T, typename Tile::Grid> sums;
    multiply_by_weight<kExact>(p, shared.t, c, count, shared, sums);
    __syncthreads();  // before the gradients overwrite the chunks
    sums.for_pairs([&](int row, int column, Pack<Compute, 2> x) {
      constexpr int P = Tile::kSumPiece;
      store_pack<Compute, 2>(shared.grads() + piece_at<Tile::kSumPieces>(row, column / P) * P + column % P, x);
    });
    __syncthreads();
    process_grads<kPacks>(a, shared.n, c, count, shared);
    __syncthreads();  // before the next chunks overwrite the gradients
  }

  if (a.grad_offset.data == nullptr && a.grad_mask.data == nullptr) return;
  if (threadIdx.x >= kTilePixels || shared.grad_offsets[threadIdx.x] < 0) return;
  // The threads that processed this sample, and which of their samples it is.
  constexpr int kSharing = kPacks ? kPieces : Tile::kSlices, kStep = kPacks ? 1 : kTilePixels;
  const int first = kPacks ? threadIdx.x * kPieces % kThreads : threadIdx.x;
  const int k = kPacks ? threadIdx.x * kPieces / kThreads : 0;
  Compute dot[4] = {};
  for (int thread = 0; thread < kSharing; ++thread)
#pragma unroll
    for (int i = 0; i < 4; ++i) dot[i] += shared.dots[4 * k + i][first + thread * kStep];
  write_sample_grads(a, shared.n, shared.g, shared.t, shared.pixels[threadIdx.x], dot);
}

template <class T, bool kExact, bool kPacks>
void launch_backward(const DeformConvParams<T>& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(GradTile<T>);
  static_assert(kBytes <= kSmallestSharedLimit);
  const DeformConvArgs<T>& a = p.a;
  const unsigned blocks = grid_size(DeformConv::op, a.N * a.G * a.taps * p.pixel_tiles);
  allow_shared_memory<deform_conv_backward_kernel<T, kExact, kPacks>>(kBytes);
  deform_conv_backward_kernel<T, kExact, kPacks><<<blocks, kThreads, kBytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, bool kExact>
void launch_store(const DeformConvParams<T>& p, const GradSamples<ComputeType<T>>& part, cudaStream_t stream) {
  constexpr int kBytes = sizeof(GradTile<T>);
  const unsigned blocks = grid_size(DeformConv::op, p.a.taps * part.tiles);
  allow_shared_memory<store_grad_samples_kernel<T, kExact>>(kBytes);
  store_grad_samples_kernel<T, kExact><<<blocks, kThreads, kBytes, stream>>>(p, part);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

template <class T>
void deform_conv_grad_samples(const DeformConv& d, const DeformConvArgs<T>& a, bool allow_tf32, cudaStream_t stream) {
  DeformConvParams<T> p{a};
  const Tensor weight = arrange_weight(d, p, true, allow_tf32, stream);
  p.pixel_tiles = grid_size(d.op, ceil_div(a.Ho * a.Wo, kTilePixels));
  p.grad_packs = has_packs<T>(a.grad_output, a.group_outputs);
  const bool packs = has_packs<T>(a.input, a.C) && has_whole_segments<T>(a) &&
                     (a.grad_input.data == nullptr || has_packs<ComputeType<T>>(a.grad_input, a.C));
  dispatch_exact<T>(allow_tf32, [&](auto exact) {
    packs ? launch_backward<T, exact, true>(p, stream) : launch_backward<T, exact, false>(p, stream);
  });
}

template <class T>
void store_grad_samples(const DeformConvParams<T>& p, const GradSamples<ComputeType<T>>& part, bool allow_tf32,
                        cudaStream_t stream) {
  dispatch_exact<T>(allow_tf32, [&](auto exact) { launch_store<T, exact>(p, part, stream); });
}

#define RELOPS_INSTANTIATE(T)                                                                              \
  template void deform_conv_grad_samples(const DeformConv&, const DeformConvArgs<T>&, bool, cudaStream_t); \
  template void store_grad_samples(const DeformConvParams<T>&, const GradSamples<ComputeType<T>>&, bool, cudaStream_t);
RELOPS_INSTANTIATE(double)
RELOPS_INSTANTIATE(float)
RELOPS_INSTANTIATE(Half)
RELOPS_INSTANTIATE(BFloat16)
#undef RELOPS_INSTANTIATE

}  // namespace relops
