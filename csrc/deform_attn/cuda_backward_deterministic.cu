// ms_deform_attn and ms_deform_attn_fused on CUDA: the deterministic gradient of value, which is identical from run to
// run because it gathers in a fixed order instead of adding atomically.
//
//   1. The sort key of a sample identifies the head, the level, and the cell of the level in which the sample lies.
//      Cell (x, y) holds the samples whose top left corner is (x, y). Coordinates begin at -1, so a level has (H + 1)(W
//      + 1) cells.
//   2. A stable radix sort groups the samples by cell and keeps the samples of each cell in the order of their numbers.
//   3. For each row of value, a warp finds the samples of the four surrounding cells by binary search (in two ranges,
//      because horizontal neighbors are adjacent) and sums weight * output gradient over these samples in sorted order.
//
// Sums are accumulated in registers, so no memory needs zeroing, and 16-bit gradients are rounded only once. One sort
// handles as many heads of an image as 32-bit keys and sample numbers allow. A sort needs about 16 bytes of memory per
// sample.

#include "common/cuda/sort.cuh"
#include "deform_attn/cuda.cuh"

namespace relops {

namespace {

// The part of the work that one sort handles: heads [first_head, first_head + heads) of image n.
struct Slice {
  int64_t n, first_head, heads;
  int64_t cells;    // upper bound on the cells per head; the key of a sample outside its level is heads * cells
  int64_t samples;  // heads * Q * L * P samples, numbered in the order (q, head, sample)
};

// Returns an upper bound on the number of cells per head without reading the levels: (H + 1)(W + 1) <= 2 H W + 2 for H,
// W >= 1.
int64_t cells_bound(const MsDeformAttnSizes& z) { return 2 * z.S + 2 * z.L; }

__device__ __forceinline__ int64_t cells_of(const DeviceLevel& level) {
  return level.height > 0 && level.width > 0 ? int64_t(level.height + 1) * (level.width + 1) : 0;
}

template <class Params, class Compute>
__device__ __forceinline__ SoftmaxStats<Compute> stats_of(const SoftmaxStats<Compute>* stats, int64_t q, int64_t m,
                                                          const Params& p) {
  return stats != nullptr ? stats[q * p.M + m] : SoftmaxStats<Compute>{};
}

// Computes the softmax statistics of all items of image n for the fused op, with 8 lanes per item.
template <class Params>
__global__ __launch_bounds__(256, 1) void stats_kernel(const __grid_constant__ Params p, int64_t n,
                                                       SoftmaxStats<typename Params::Compute>* stats) {
  using Compute = typename Params::Compute;
  const int64_t item = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 8;
  const bool active = item < p.Q * p.M;
  const int count = static_cast<int>(p.L * p.P);
  const auto result =
      softmax_stats<Compute>(p.weights + (n * p.Q * p.M + (active ? item : 0)) * count, count, threadIdx.x % 8, 8);
  if (active && threadIdx.x % 8 == 0) stats[item] = result;
}

template <class Params, bool kFused>
__global__ __launch_bounds__(256, 1) void keys_kernel(const __grid_constant__ Params p, Slice slice,
                                                      const SoftmaxStats<typename Params::Compute>* stats,
                                                      uint32_t* keys, uint32_t* numbers) {
  using Compute = typename Params::Compute;
  extern __shared__ __align__(16) char memory[];
  DeviceLevel* levels = reinterpret_cast<DeviceLevel*>(memory);
  load_levels(p, p.levels, levels);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= slice.samples) return;
  const unsigned count = p.L * p.P, heads = slice.heads, head = i / count % heads;
  const int s = static_cast<int>(i % count);
  const int64_t q = i / count / heads, m = slice.first_head + head;
  const int64_t nq = slice.n * p.Q + q;
  const Sample<Compute> sample =
      read_sample<kFused>(p, levels, nq, nq * p.M + m, s, kFused ? stats_of(stats, q, m, p) : SoftmaxStats<Compute>{});
  int64_t key = slice.heads * slice.cells;
  if (is_inside(sample)) {
    key = head * slice.cells;
    for (int l = 0; l < level_of(p, s); ++l) key += cells_of(levels[l]);
    key += static_cast<int64_t>(floor(sample.y) + 1) * (sample.level.width + 1) +
           static_cast<int64_t>(floor(sample.x) + 1);
  }
  keys[i] = static_cast<uint32_t>(key);
  numbers[i] = static_cast<uint32_t>(i);
}

// Returns the index of the first sorted key that is not less than `key`.
__device__ inline int64_t lower_bound(const uint32_t* keys, int64_t size, int64_t key) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (static_cast<int64_t>(keys[middle]) < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// One warp computes one row of the gradient of value. A lane owns channels lane, lane + 32, ... Samples are looked up
// 32 at a time, one per lane.
template <class Params, bool kFused>
__global__ __launch_bounds__(256, 1) void gather_kernel(const __grid_constant__ Params p, Slice slice,
                                                        const SoftmaxStats<typename Params::Compute>* stats,
                                                        const uint32_t* keys, const uint32_t* numbers,
                                                        typename Params::T* grad_value) {
  using T = typename Params::T;
  using Compute = typename Params::Compute;
  extern __shared__ __align__(16) char memory[];
  DeviceLevel* levels = reinterpret_cast<DeviceLevel*>(memory);
  load_levels(p, p.levels, levels);
  const int lane = threadIdx.x % 32;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (row >= p.S) return;  // all lanes of a warp have the same row
  const int64_t head = blockIdx.y, m = slice.first_head + head;
  const unsigned count = p.L * p.P, heads = slice.heads;
  T* out = grad_value + ((slice.n * p.S + row) * p.M + m) * p.D;
  const bool masked = p.mask != nullptr && p.mask[slice.n * p.S + row];

  for (int64_t first_channel = 0; first_channel < p.D; first_channel += 32) {
    const int64_t channel = first_channel + lane;
    Compute sum = 0;
    // With level_start_index, levels may overlap or leave gaps. Every level that contains a row contributes to the
    // gradient of the row.
    int64_t base = head * slice.cells;
    for (int l = 0; l < p.L && !masked; base += cells_of(levels[l]), ++l) {
      const DeviceLevel level = levels[l];
      const int64_t local = row - level.start;
      if (local < 0 || local >= int64_t(level.height) * level.width) continue;
      const int y = static_cast<int>(local) / level.width, x = static_cast<int>(local) - y * level.width;
      for (int below = 0; below < 2; ++below) {
        // The samples whose top left corner is (x - 1, y - 1 + below) or (x, y - 1 + below).
        const int64_t cell = base + int64_t{y + below} * (level.width + 1) + x;
        const int64_t bound = lane < 2 ? lower_bound(keys, slice.samples, cell + 2 * lane) : 0;
        const int64_t begin = __shfl_sync(kAll, bound, 0), end = __shfl_sync(kAll, bound, 1);
        for (int64_t i = begin; i < end; i += 32) {
          Compute weight = 0;
          int64_t q = 0;
          if (i + lane < end) {
            const unsigned number = numbers[i + lane];
            const int s = static_cast<int>(number % count);
            q = number / count / heads;
            const int64_t nq = slice.n * p.Q + q;
            const Sample<Compute> sample = read_sample<kFused>(
                p, levels, nq, nq * p.M + m, s, kFused ? stats_of(stats, q, m, p) : SoftmaxStats<Compute>{});
            const Compute left = floor(sample.x), top = floor(sample.y);
            const Compute fx = sample.x - left, fy = sample.y - top;
            weight = (left < x ? fx : 1 - fx) * (top < y ? fy : 1 - fy) * sample.weight;
          }
          const int found = static_cast<int>(min(end - i, int64_t{32}));
#pragma unroll 4
          for (int j = 0; j < found; ++j) {
            const Compute w = __shfl_sync(kAll, weight, j);
            const int64_t from = __shfl_sync(kAll, q, j);
            if (channel < p.D)
              sum += w * static_cast<Compute>(p.grad_output[((slice.n * p.Q + from) * p.M + m) * p.D + channel]);
          }
        }
      }
    }
    if (channel < p.D) out[channel] = static_cast<T>(sum);
  }
}

template <class Params, bool kFused>
void launch_slice(const MsDeformAttnInputs& in, const Params& p, const Slice& slice,
                  const SoftmaxStats<typename Params::Compute>* stats, typename Params::T* grad_value,
                  cudaStream_t stream) {
  const auto numbers_of = [&](int64_t n) { return torch::stable::new_empty(in.value, {n}, ScalarType::Int); };
  const auto pointer = [](const Tensor& t) { return static_cast<uint32_t*>(t.mutable_data_ptr()); };
  const Tensor keys = numbers_of(slice.samples), numbers = numbers_of(slice.samples);
  const Tensor sorted_keys = numbers_of(slice.samples), sorted_numbers = numbers_of(slice.samples);
  const size_t shared = p.L * sizeof(DeviceLevel);
  keys_kernel<Params, kFused><<<grid_size(in.op, ceil_div(slice.samples, 256)), 256, shared, stream>>>(
      p, slice, stats, pointer(keys), pointer(numbers));
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const int bits = bits_of(slice.heads * slice.cells + 1);
  size_t bytes = 0;
  const auto sort = [&](void* workspace) {
    sort_pairs(workspace, bytes, pointer(keys), pointer(sorted_keys),
               static_cast<const int32_t*>(numbers.const_data_ptr()),
               static_cast<int32_t*>(sorted_numbers.mutable_data_ptr()), slice.samples, bits, stream);
  };
  sort(nullptr);
  const Tensor workspace = torch::stable::new_empty(in.value, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  sort(workspace.mutable_data_ptr());

  const dim3 rows(grid_size(in.op, ceil_div(p.S, 8)), static_cast<unsigned>(slice.heads));
  gather_kernel<Params, kFused>
      <<<rows, 256, shared, stream>>>(p, slice, stats, pointer(sorted_keys), pointer(sorted_numbers), grad_value);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void ms_deform_attn_grad_value_deterministic(const MsDeformAttnInputs& in, const Tensor& grad_output,
                                             const Tensor& grad_value) {
  const auto& z = in.sizes;
  const cudaStream_t stream = current_stream(in.value.get_device_index());
  dispatch_features_and_coordinates(in.op, in.value.scalar_type(), in.locations.scalar_type(), [&](auto t, auto u) {
    using T = typename decltype(t)::type;
    using Compute = ComputeType<T>;
    std::vector<Tensor> keep_alive;
    auto p = make_params<T, typename decltype(u)::type>(in, keep_alive);
    using Params = decltype(p);
    p.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    T* out = static_cast<T*>(grad_value.mutable_data_ptr());

    const int64_t per_head = z.Q * z.L * z.P, cells = cells_bound(z), limit = 2147483647;
    STD_TORCH_CHECK(per_head <= limit && cells < limit, in.op,
                    ": inputs are too large for the deterministic backward: ", per_head, " samples and ", z.S,
                    " rows per head");
    const int64_t heads = std::max<int64_t>(1, std::min({z.M, limit / per_head, (limit - 1) / cells, int64_t{65535}}));
    SoftmaxStats<Compute>* stats = nullptr;
    if (in.reference_points) {
      keep_alive.push_back(torch::stable::new_empty(in.value, {z.Q * z.M * 2}, compute_dtype(in.value.scalar_type())));
      stats = static_cast<SoftmaxStats<Compute>*>(keep_alive.back().mutable_data_ptr());
    }
    for (int64_t n = 0; n < z.N; ++n) {
      if (stats != nullptr) {
        stats_kernel<Params><<<grid_size(in.op, ceil_div(z.Q * z.M * 8, 256)), 256, 0, stream>>>(p, n, stats);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      for (int64_t first = 0; first < z.M; first += heads) {
        const int64_t slice_heads = std::min(heads, z.M - first);
        const Slice slice{n, first, slice_heads, cells, slice_heads * per_head};
        if (stats != nullptr)
          launch_slice<Params, true>(in, p, slice, stats, out, stream);
        else
          launch_slice<Params, false>(in, p, slice, stats, out, stream);
      }
    }
  });
}

}  // namespace relops
