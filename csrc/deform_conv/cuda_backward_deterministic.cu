// deform_conv2d on CUDA: the deterministic gradient of the input, which is identical from run to run because it gathers
// in a fixed order instead of adding atomically.
//
// A part is a range of output pixels of one image, and a range of channels of one offset group. For each part, the
// gradient of its samples is stored. The samples are sorted by the cell of the map in which they lie: cell (x, y) holds
// the samples whose top left pixel is (x - 1, y - 1), and the sort is stable. For each pixel of the map, a warp then
// finds the samples of the four surrounding cells by binary search and adds their gradients in sorted order.
//
// The pixels of a part have at most kMaxSamples samples (or those of one tile of pixels), and the channels are limited
// so that the gradients of the samples take at most kMaxBytes, or those of kMinChannels channels. A sort needs about 16
// bytes of memory per sample.

#include "common/cuda/sort.cuh"
#include "deform_conv/cuda.cuh"

namespace relops {

namespace {

constexpr int64_t kMaxSamples = 1 << 18;
constexpr int64_t kMaxBytes = 32 << 20;
constexpr int64_t kMinChannels = 32;
constexpr int kLaneChannels = 4;  // channels that a lane adds up at the same time

// The samples of an offset group in a range of output pixels of an image. Their numbers are the rows of GradSamples.
struct PartSamples {
  int64_t n;
  int g;
  unsigned first_tile, pixels;  // first tile, and kTilePixels times the number of tiles
  unsigned count;               // samples: taps * pixels
};

struct SampleNumber {
  int t;
  unsigned pixel;
  __device__ SampleNumber(const PartSamples& part, unsigned number)
      : t(static_cast<int>(number / part.pixels)), pixel(number % part.pixels) {}
};

template <class T>
__device__ __forceinline__ OutputPixel pixel_of(const DeformConvArgs<T>& a, const PartSamples& part, unsigned pixel) {
  return TilePixels<kTilePixels>(a, part.first_tile + pixel / kTilePixels).at(pixel % kTilePixels);
}

template <class T>
__global__ __launch_bounds__(kThreads) void deform_conv_keys_kernel(const __grid_constant__ DeformConvArgs<T> a,
                                                                    PartSamples part, uint32_t* keys,
                                                                    uint32_t* numbers) {
  using Compute = ComputeType<T>;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= part.count) return;
  const SampleNumber number(part, i);
  const TilePixels<kTilePixels> tile(a, part.first_tile + number.pixel / kTilePixels);
  const unsigned columns = static_cast<unsigned>(a.W) + 1;
  unsigned key = columns * (static_cast<unsigned>(a.H) + 1);  // of samples that are not on the map
  if (static_cast<int>(number.pixel % kTilePixels) < tile.count) {
    const TapPosition<Compute> position(a, part.n, part.g, number.t, tile.at(number.pixel % kTilePixels));
    const AxisSample<Compute> y(position.y, static_cast<int>(a.H)), x(position.x, static_cast<int>(a.W));
    if ((y.valid(0) || y.valid(1)) && (x.valid(0) || x.valid(1))) key = (y.first + 1) * columns + x.first + 1;
  }
  keys[i] = key;
  numbers[i] = i;
}

// Returns the index of the first sorted key that is not less than `key`.
__device__ inline unsigned lower_bound(const uint32_t* keys, unsigned size, unsigned key) {
  unsigned low = 0, high = size;
  while (low < high) {
    const unsigned middle = low + (high - low) / 2;
    if (keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A warp computes the gradient of one pixel of the map. Lane l owns channels l, l + 32, ... Samples are looked up 32 at
// a time, one per lane.
template <class T>
__global__ __launch_bounds__(kThreads, 2) void deform_conv_gather_kernel(
    const __grid_constant__ DeformConvArgs<T> a, const __grid_constant__ GradSamples<ComputeType<T>> grads,
    PartSamples part, const uint32_t* keys, const uint32_t* numbers) {
  using Compute = ComputeType<T>;
  const int lane = threadIdx.x % 32;
  const unsigned row = blockIdx.x * kWarps + threadIdx.x / 32, width = static_cast<unsigned>(a.W);
  if (row >= a.H * a.W) return;  // all lanes of a warp have the same row
  const int h = row / width, w = row % width;
  const int channels = grads.end - grads.first;
#pragma unroll 1
  for (int first = lane; first - lane < channels; first += 32 * kLaneChannels) {
    Compute sums[kLaneChannels] = {};
#pragma unroll 1
    for (int below = 0; below < 2; ++below) {
      const unsigned cell = (h + below) * (width + 1) + w;
      const unsigned bound = lane < 2 ? lower_bound(keys, part.count, cell + 2 * lane) : 0;
      const unsigned begin = __shfl_sync(kAll, bound, 0), end = __shfl_sync(kAll, bound, 1);
#pragma unroll 1
      for (unsigned i = begin; i < end; i += 32) {
        Compute weight = 0;
        unsigned number = 0;
        if (i + lane < end) {
          number = numbers[i + lane];
          const SampleNumber sample(part, number);
          const OutputPixel pixel = pixel_of(a, part, sample.pixel);
          const TapPosition<Compute> position(a, part.n, part.g, sample.t, pixel);
          const AxisSample<Compute> y(position.y, static_cast<int>(a.H)), x(position.x, static_cast<int>(a.W));
          weight = mask_of(a, part.n, part.g, sample.t, pixel) *
                   ((below ? y.weights[0] : y.weights[1]) * (x.first == w ? x.weights[0] : x.weights[1]));
        }
        const int found = static_cast<int>(min(end - i, 32u));
#pragma unroll 2
        for (int j = 0; j < found; ++j) {
          const Compute factor = __shfl_sync(kAll, weight, j);
          const Compute* grad = grads.data + __shfl_sync(kAll, number, j) * grads.width + first;
#pragma unroll
          for (int k = 0; k < kLaneChannels; ++k)
            sums[k] += factor * load_pack<Compute, 1>(grad + 32 * k, first + 32 * k < channels).x[0];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k)
      if (first + 32 * k < channels) *a.grad_input.at(part.n, grads.first + first + 32 * k, h, w) += sums[k];
  }
}

}  // namespace

template <class T>
void deform_conv_grad_input_deterministic(const DeformConv& d, const DeformConvArgs<T>& a, bool allow_tf32,
                                          cudaStream_t stream) {
  using Compute = ComputeType<T>;
  const int64_t cells = (a.H + 1) * (a.W + 1);
  STD_TORCH_CHECK(cells < 2147483647, d.op, ": the map is too large for the deterministic backward: [", a.H, ",", a.W,
                  "]");
  DeformConvParams<T> p{a};
  const Tensor weight = arrange_weight(d, p, true, allow_tf32, stream);
  p.grad_packs = has_packs<T>(a.grad_output, a.group_outputs);

  const int64_t tiles = ceil_div(a.Ho * a.Wo, kTilePixels);
  const int64_t part_tiles = std::clamp<int64_t>(kMaxSamples / (a.taps * kTilePixels), 1, tiles);
  const int64_t samples = part_tiles * kTilePixels * a.taps;
  const int64_t width =
      std::min(a.offset_channels, std::max<int64_t>(kMaxBytes / sizeof(Compute) / samples, kMinChannels));
  const auto numbers_of = [&](int64_t n) { return torch::stable::new_empty(d.weight, {n}, ScalarType::Int); };
  const auto pointer = [](const Tensor& t) { return static_cast<uint32_t*>(t.mutable_data_ptr()); };
  const Tensor keys = numbers_of(samples), numbers = numbers_of(samples);
  const Tensor sorted_keys = numbers_of(samples), sorted_numbers = numbers_of(samples);
  const Tensor grads = torch::stable::new_empty(d.weight, {samples * width}, compute_dtype(d.weight.scalar_type()));
  const int bits = bits_of(cells + 1);
  size_t bytes = 0;
  const auto sort = [&](void* workspace, int64_t count) {
    sort_pairs(workspace, bytes, pointer(keys), pointer(sorted_keys),
               static_cast<const int32_t*>(numbers.const_data_ptr()),
               static_cast<int32_t*>(sorted_numbers.mutable_data_ptr()), count, bits, stream);
  };
  sort(nullptr, samples);
  const Tensor workspace = torch::stable::new_empty(d.weight, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  const unsigned rows = grid_size(d.op, ceil_div(a.H * a.W, kWarps));

  for (int64_t n = 0; n < a.N; ++n)
    for (int64_t g = 0; g < a.G; ++g)
      for (int64_t first_tile = 0; first_tile < tiles; first_tile += part_tiles) {
        const unsigned count = static_cast<unsigned>(std::min(part_tiles, tiles - first_tile));
        PartSamples part{n, static_cast<int>(g), static_cast<unsigned>(first_tile), count * kTilePixels, 0};
        part.count = static_cast<unsigned>(part.pixels * a.taps);
        deform_conv_keys_kernel<T><<<static_cast<unsigned>(ceil_div(part.count, kThreads)), kThreads, 0, stream>>>(
            a, part, pointer(keys), pointer(numbers));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        sort(workspace.mutable_data_ptr(), part.count);
        const int64_t group_end = (g + 1) * a.offset_channels;
        for (int64_t first = group_end - a.offset_channels; first < group_end; first += width) {
          const GradSamples<Compute> slice{static_cast<Compute*>(grads.mutable_data_ptr()),
                                           n,
                                           width,
                                           static_cast<int>(first),
                                           static_cast<int>(std::min(first + width, group_end)),
                                           part.first_tile,
                                           count};
          store_grad_samples(p, slice, allow_tf32, stream);
          deform_conv_gather_kernel<T>
              <<<rows, kThreads, 0, stream>>>(a, slice, part, pointer(sorted_keys), pointer(sorted_numbers));
          STD_CUDA_KERNEL_LAUNCH_CHECK();
        }
      }
}

#define RELOPS_INSTANTIATE(T) \
  template void deform_conv_grad_input_deterministic(const DeformConv&, const DeformConvArgs<T>&, bool, cudaStream_t);
RELOPS_INSTANTIATE(double)
RELOPS_INSTANTIATE(float)
RELOPS_INSTANTIATE(Half)
RELOPS_INSTANTIATE(BFloat16)
#undef RELOPS_INSTANTIATE

}  // namespace relops
