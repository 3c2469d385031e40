// ms_deform_attn and ms_deform_attn_fused on CUDA: the code that the forward, backward and deterministic backward
// passes have in common.
//
// An item is one (image, query, head). A group of 2 to 32 neighboring lanes works on an item. Each lane owns V
// neighboring channels: 16 bytes if D allows it, so that 8 lanes read a row of 32 floats in one 128-byte request. The
// lanes of a group first divide kChunk samples among themselves, convert them to row indices and weights, and write
// these to shared memory. Then every lane iterates over the chunk and gathers its own channels of the rows. No data
// leaves the warp, so __syncwarp is the only synchronization.
//
// A block processes queries of one head of one image. Blocks are ordered by image, then by head, so at any time the
// whole device gathers from one or two heads (2.8 MB of float32 at 800x1333), which fit in L2. If the queries are the
// pixels of the pyramid themselves (Q = S, an encoder), a block processes a patch that is 8 pixels high instead of
// consecutive pixels of one line. Queries that are neighbors in either direction sample the same rows of value, so L1
// can reuse these rows.
#pragma once

#include <algorithm>
#include <iterator>
#include <vector>

#include "common/cuda/device.cuh"
#include "deform_attn/problem.h"

namespace relops {

constexpr int kChunk = 8;            // number of samples that are staged at a time
constexpr int kStride = kChunk + 1;  // staging slots per item; odd, so that the items of a warp use different banks
constexpr int kPatchRows = 8;        // height of a thread block's patch of queries if the queries are pixels
constexpr int kLevelsInParams = 16;  // if there are more levels, they are read from device memory

struct DeviceLevel {
  int height, width;
  int start;   // first row of the level in value
  int offset;  // sum of the sizes of the preceding levels: the first query of the level in an encoder
};

// The levels, either as values that the host knows or as pointers to device memory that only the kernel reads.
struct LevelSource {
  DeviceLevel host_levels[kLevelsInParams];
  const int64_t* shapes;  // [L,2]; null: use host_levels
  const int64_t* starts;  // [L] or null
};

// T is the type of the features. U is the type of the locations and weights or, if fused, of the offsets and logits.
template <class T_, class U_>
struct MsDeformAttnParams : MsDeformAttnSizes {
  using T = T_;
  using U = U_;
  using Compute = ComputeType<T>;

  LevelSource levels;
  const T* value;            // [N,S,M,D]
  const U* locations;        // [N,Q,M,L,P,2]
  const U* weights;          // [N,Q,M,L,P]
  const Compute* reference;  // [N,Q,L,R]
  const bool* mask;          // [N,S] or null

  int group_log2;           // log2 of the number of lanes per item
  unsigned channel_blocks;  // number of blocks among which the channels of an item are divided
  unsigned tiles;           // number of blocks per (image, head, block of channels)
  uint64_t row_bytes;       // distance between the rows of value
  uint64_t grad_row_bytes;  // distance between the rows of grad_value
  Compute half_per_point;   // 0.5 / P

  T* output;                  // [N,Q,M,D]
  const T* grad_output;       // [N,Q,M,D]
  Compute* grad_value;        // [N,S,M,D], summed by reductions to memory; null if this kernel does not compute it
  U* grad_locations;          // [N,Q,M,L,P,2]; null if no sampling gradient is needed
  U* grad_weights;            // [N,Q,M,L,P]
  Compute* raw_grad_weights;  // fused: [N,Q,M,L,P], gradient of the softmax's output; may be grad_weights itself
  Compute* grad_pixels;       // fused: [N,Q,M,L,P,2] or null; gradient of the location in pixels
};

// Copies the levels into shared memory. If the levels do not match S, returns false and makes all of them empty. The
// host cannot check this for levels in device memory. All threads of the block must call this function, which ends with
// a barrier.
__device__ inline bool load_levels(const MsDeformAttnSizes& z, const LevelSource& source, DeviceLevel* levels) {
  __shared__ bool fit;
  const int L = static_cast<int>(z.L);
  if (source.shapes == nullptr) {
    for (int l = threadIdx.x; l < L; l += blockDim.x) levels[l] = source.host_levels[l];
    if (threadIdx.x == 0) fit = true;
    __syncthreads();
    return fit;
  }
  for (int l = threadIdx.x; l < L; l += blockDim.x) {
    const int64_t h = source.shapes[2 * l], w = source.shapes[2 * l + 1];
    const int64_t start = source.starts != nullptr ? source.starts[l] : 0;
    const bool bad = h < 0 || w < 0 || h > z.S || w > z.S || h * w > z.S || start < 0 || start > z.S - h * w;
    levels[l] = bad ? DeviceLevel{-1, 0, 0, 0} : DeviceLevel{int(h), int(w), int(start), 0};
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t sum = 0;
    bool good = true;
    for (int l = 0; l < L; ++l) {
      good = good && levels[l].height >= 0;
      levels[l].offset = static_cast<int>(sum);
      if (source.starts == nullptr) levels[l].start = static_cast<int>(sum);
      sum += good ? int64_t(levels[l].height) * levels[l].width : 0;
      good = good && sum <= z.S;  // this also keeps offset within an int
    }
    fit = good && sum == z.S;
  }
  __syncthreads();
  if (!fit)
    for (int l = threadIdx.x; l < L; l += blockDim.x) levels[l] = {0, 0, 0, 0};
  __syncthreads();
  return fit;
}

// Returns the q-th query in processing order. The order is patch by patch if the queries are the pixels of the pyramid.
__device__ inline int64_t query_in_patch_order(int64_t q, const MsDeformAttnSizes& z, const DeviceLevel* levels,
                                               bool levels_fit) {
  if (z.Q != z.S || !levels_fit) return q;
  int l = 0;
  while (l + 1 < z.L && q >= levels[l + 1].offset) ++l;
  const DeviceLevel level = levels[l];
  const unsigned local = static_cast<unsigned>(q) - level.offset;  // unsigned division takes fewer instructions
  const int band = local / (kPatchRows * level.width);
  const unsigned within = local - band * kPatchRows * level.width;
  const int rows = min(kPatchRows, level.height - band * kPatchRows);
  const int column = rows == kPatchRows ? within / kPatchRows : within / rows;
  const int row = within - column * rows;
  return level.offset + (band * kPatchRows + row) * level.width + column;
}

// One sample, in pixels of its level.
template <class Compute>
struct Sample {
  Compute x, y;
  Compute weight;  // attention weight, after the softmax
  DeviceLevel level;
};

// The statistics that convert a logit to a weight: exp(logit - max_logit) * scale.
template <class Compute>
struct SoftmaxStats {
  Compute max_logit, scale;
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Computes the softmax statistics of `count` = L * P logits with a group of lanes. `lane` is the index of this lane in
// the group. Every lane of the warp must call this function.
template <class Compute, class U>
__device__ inline SoftmaxStats<Compute> softmax_stats(const U* logits, int count, int lane, int group) {
  Compute top = -INFINITY;
  for (int s = lane; s < count; s += group) {
    const Compute x = static_cast<Compute>(logits[s]);
    top = x > top ? x : top;
  }
  top = group_max(top, group);
  Compute sum = 0;
  for (int s = lane; s < count; s += group) sum += exponential(static_cast<Compute>(logits[s]) - top);
  sum = group_sum(sum, group);
  return {top, 1 / sum};
}

// Returns the level of sample s, which is s / P. Rounding cannot change the result, because (s + 0.5) / P is at least
// 0.5 / P away from the next integer, and L * P is at most 2^20. An integer division would take 20 instructions.
template <class Params>
__device__ __forceinline__ int level_of(const Params& p, int s) {
  return static_cast<int>(static_cast<typename Params::Compute>(2 * s + 1) * p.half_per_point);
}

// Reads sample s of an item and converts its location to pixels. nq is n * Q + q, and item is nq * M + m.
template <bool kFused, class Params, class Compute>
__device__ inline Sample<Compute> read_sample(const Params& p, const DeviceLevel* levels, int64_t nq, int64_t item,
                                              int s, SoftmaxStats<Compute> stats) {
  using U = typename Params::U;
  const int count = static_cast<int>(p.L * p.P), l = level_of(p, s);
  Sample<Compute> sample;
  sample.level = levels[l];
  const Pack<U, 2> xy = load_pack<U, 2>(p.locations + (item * count + s) * 2);
  const Compute x = static_cast<Compute>(xy.x[0]), y = static_cast<Compute>(xy.x[1]);
  const Compute weight = static_cast<Compute>(p.weights[item * count + s]);
  const Compute width = sample.level.width, height = sample.level.height;
  if constexpr (kFused) {
    const Compute* ref = p.reference + (nq * p.L + l) * p.R;
    Compute unit_x = 1, unit_y = 1;
    if (p.R == 4) {
      unit_x = ref[2] * width * p.half_per_point;
      unit_y = ref[3] * height * p.half_per_point;
    }
    sample.x = ref[0] * width - Compute(0.5) + x * unit_x;
    sample.y = ref[1] * height - Compute(0.5) + y * unit_y;
    sample.weight = exponential(weight - stats.max_logit) * stats.scale;
  } else {
    sample.x = x * width - Compute(0.5);
    sample.y = y * height - Compute(0.5);
    sample.weight = weight;
  }
  return sample;
}

// Returns whether any corner of the sample is inside the level. Returns false for NaN. Coordinates inside the level fit
// in an int.
template <class Compute>
__device__ __forceinline__ bool is_inside(const Sample<Compute>& s) {
  return s.x > Compute(-1) && s.y > Compute(-1) && s.x < Compute(s.level.width) && s.y < Compute(s.level.height) &&
         s.level.width > 0 && s.level.height > 0;
}

// The two pixels of a row or column of a level between which a sample lies. If one of them is outside the level, both
// are the pixel inside, and each has half of its weight.
template <class Compute>
struct Neighbors {
  int pixel[2];
  Compute weight[2];
  Compute fraction;  // distance of the sample from the first pixel
  bool inside[2];
};

template <class Compute>
__device__ __forceinline__ Neighbors<Compute> find_neighbors(Compute x, int size) {
  const int left = static_cast<int>(floor(x)), first = max(left, 0), second = min(left + 1, size - 1);
  const Compute fraction = x - static_cast<Compute>(left);
  const Compute half = Compute(0.5) * (left < 0 ? fraction : 1 - fraction);
  return {{first, second},
          {first == second ? half : 1 - fraction, first == second ? half : fraction},
          fraction,
          {first == left, second == left + 1}};
}

// The corners of a sample: top left, top right, bottom left, bottom right. A corner that is masked or outside the level
// is replaced by another corner, which then has half of its weight twice. Hence the loops over corners need neither
// predicates nor zeros instead of the rows that must not be read. If there is no other corner, all rows are -1.
template <class Compute>
struct Corners {
  int row[4];
  Compute weight[4];  // attention weight * bilinear weight
  Compute fx, fy;     // distance of the sample from its top left corner, to the right and downwards
  bool inside[4];     // whether the corner is neither masked nor outside the level
};

template <class Compute>
__device__ inline Corners<Compute> find_corners(const Sample<Compute>& s, const bool* mask) {
  Corners<Compute> c{{-1, -1, -1, -1}, {}, 0, 0, {}};
  if (!is_inside(s)) return c;
  const Neighbors<Compute> x = find_neighbors(s.x, s.level.width), y = find_neighbors(s.y, s.level.height);
  c.fx = x.fraction;
  c.fy = y.fraction;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c.row[i] = s.level.start + y.pixel[i / 2] * s.level.width + x.pixel[i % 2];
    c.weight[i] = y.weight[i / 2] * s.weight * x.weight[i % 2];
    c.inside[i] = x.inside[i % 2] && y.inside[i / 2];
  }
  if (mask == nullptr) return c;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (mask[c.row[i]]) {
      c.row[i] = -1;
      c.inside[i] = false;
    }
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance)  // to the horizontal, then to the vertical neighbor
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c.row[i] < 0) {
        const int other = i ^ distance;
        c.row[i] = c.row[other];
        c.weight[i] = c.weight[other] *= Compute(0.5);
      }
  return c;
}

// Returns the address of `row`, which is stride * row bytes after p. The stride is a parameter of the kernel, so this
// takes two instructions: a multiply-add of 32 x 32 to 64 bits, and one for the upper half of the stride.
template <class T>
__device__ __forceinline__ T* row_at(T* p, int row, uint64_t stride) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + static_cast<unsigned>(row) * stride);
}

// Loads V channels at p, which belong to row `row`. If row is negative, nothing is loaded and the result is undefined.
// Unlike load_pack, this function spends no instructions on zeros.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_row(const T* p, int row) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) * V == 16) {
    uint4 raw;
    asm("{.reg .pred p; setp.ge.s32 p, %5, 0; @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];}"
        : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
        : "l"(p), "r"(row));
    Pack<T, V> pack;
    memcpy(&pack, &raw, sizeof(pack));
    return pack;
  }
#endif
  return load_pack<T, V>(p, row >= 0);
}

// A sample as it is staged in shared memory.
template <class Compute>
struct alignas(16) StagedSample {
  int row[4];
  Compute weight[4];
};

// The item on which this lane works. Lanes beyond the last query keep running with their warp but access no memory.
struct WorkItem {
  int lane;   // index within the group
  int group;  // number of lanes per item
  int slot;   // number of the first staged sample of the item
  int64_t n, m, q;
  int64_t channel_block;
  bool active;
};

template <class Params>
__device__ inline WorkItem find_work_item(const Params& p, const DeviceLevel* levels, bool levels_fit) {
  WorkItem work;
  work.group = 1 << p.group_log2;
  work.lane = threadIdx.x & (work.group - 1);
  const int in_block = threadIdx.x >> p.group_log2;
  work.slot = in_block * kStride;
  // A 64-bit division is a function call, so block numbers have 32 bits.
  const unsigned tile = blockIdx.x % p.tiles, rest = blockIdx.x / p.tiles, pair = rest / p.channel_blocks;
  work.channel_block = rest % p.channel_blocks;
  work.m = pair % static_cast<unsigned>(p.M);
  work.n = pair / static_cast<unsigned>(p.M);
  const int64_t q = int64_t{tile} * (blockDim.x >> p.group_log2) + in_block;
  work.active = q < p.Q;
  work.q = work.active ? query_in_patch_order(q, p, levels, levels_fit) : 0;
  return work;
}

// The layout of dynamic shared memory: the levels, then kStride staged samples per item.
template <class StagedSample>
struct Staging {
  DeviceLevel* levels;
  StagedSample* samples;

  __device__ Staging(char* memory, int64_t L)
      : levels(reinterpret_cast<DeviceLevel*>(memory)), samples(reinterpret_cast<StagedSample*>(levels + L)) {}
};

// Host side -----------------------------------------------------------------------------------------------------------

struct Launch {
  unsigned blocks, threads;
  size_t shared;
};

// Chooses the number of lanes per item so that V channels per lane cover D, and the number of blocks. If
// `split_channels` is set and D exceeds the channels of 32 lanes, the channels are divided among several blocks.
template <class StagedSample, class Params>
Launch plan_launch(const char* op, Params& p, int V, bool split_channels) {
  p.group_log2 = 1;
  while (p.group_log2 < 5 && (int64_t{V} << p.group_log2) < p.D) ++p.group_log2;
  p.channel_blocks = split_channels ? grid_size(op, ceil_div(p.D, int64_t{V} << p.group_log2)) : 1;
  const int64_t rows = p.N * p.M * p.channel_blocks;
  // A small amount of work is divided into small blocks so that it reaches all multiprocessors.
  unsigned threads = (rows * p.Q) << p.group_log2 < (1 << 18) ? 64 : 256;
  // Every launch may use 48 KB of shared memory. 512 levels take 8 KB.
  const auto staged = [&] { return (threads >> p.group_log2) * kStride * sizeof(StagedSample); };
  while (staged() > 40 << 10) threads /= 2;
  p.tiles = grid_size(op, ceil_div(p.Q, threads >> p.group_log2));
  return {grid_size(op, rows * p.tiles), threads, p.L * sizeof(DeviceLevel) + staged()};
}

struct HostNumbers {
  int64_t x[256];
};

static __global__ void write_kernel(const __grid_constant__ HostNumbers numbers, int count, int64_t* out) {
  if (threadIdx.x < count) out[threadIdx.x] = numbers.x[threadIdx.x];
}

// Returns the numbers of a CPU tensor in a tensor on the device of value. Unlike a copy from the host, launches with
// the numbers as parameters can be captured in a CUDA graph, and the host does not wait for them.
inline Tensor on_device(const MsDeformAttnInputs& in, const Tensor& host) {
  constexpr int kMaxCount = std::size(HostNumbers{}.x);
  const Tensor result = torch::stable::new_empty(in.value, host.sizes(), ScalarType::Long);
  int64_t* out = result.mutable_data_ptr<int64_t>();
  for (int64_t first = 0; first < host.numel(); first += kMaxCount) {
    const int count = static_cast<int>(std::min<int64_t>(host.numel() - first, kMaxCount));
    HostNumbers numbers;
    std::copy_n(host.const_data_ptr<int64_t>() + first, count, numbers.x);
    write_kernel<<<1, kMaxCount, 0, current_stream(in.value.get_device_index())>>>(numbers, count, out + first);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return result;
}

// Sets the parameters that the forward and backward passes have in common. `keep_alive` holds the tensors to which the
// pointers refer.
template <class T, class U>
MsDeformAttnParams<T, U> make_params(const MsDeformAttnInputs& in, std::vector<Tensor>& keep_alive) {
  using Compute = ComputeType<T>;
  MsDeformAttnParams<T, U> p{};
  static_cast<MsDeformAttnSizes&>(p) = in.sizes;
  p.row_bytes = p.M * p.D * sizeof(T);
  p.grad_row_bytes = p.M * p.D * sizeof(Compute);
  p.half_per_point = Compute(0.5) / p.P;
  STD_TORCH_CHECK(in.value.is_cuda(), in.op, ": value must be a CUDA tensor like the other inputs");
  // The levels and the staged samples must fit in 48 KB of shared memory.
  STD_TORCH_CHECK(p.L <= 512, in.op, ": at most 512 levels are supported, got L = ", p.L);
  // Channel numbers have 32 bits.
  STD_TORCH_CHECK(p.M * p.D < 1 << 28, in.op, ": value must have fewer than 2^28 channels, got ", p.M * p.D);
  STD_TORCH_CHECK(p.L * p.P <= 1 << 20, in.op, ": at most 2^20 samples per query and head are supported, got ",
                  p.L * p.P);
  Tensor shapes = in.spatial_shapes;
  std::optional<Tensor> starts = in.level_start_index;
  if (shapes.is_cpu() && (!starts || starts->is_cpu()) && p.L <= kLevelsInParams) {
    int offset = 0, l = 0;
    for (const Level& level : read_levels(in.op, in.sizes, shapes, starts)) {
      p.levels.host_levels[l++] = {int(level.height), int(level.width), int(level.start), offset};
      offset += static_cast<int>(level.height * level.width);
    }
  } else {
    const auto pointer = [&](const Tensor& tensor) {
      keep_alive.push_back(tensor.is_cpu() ? on_device(in, tensor) : tensor);
      return keep_alive.back().const_data_ptr<int64_t>();
    };
    p.levels.shapes = pointer(shapes);
    if (starts) p.levels.starts = pointer(*starts);
  }
  const auto pointer = [&](const Tensor& tensor) {
    keep_alive.push_back(aligned(tensor));
    return keep_alive.back().const_data_ptr();
  };
  p.value = static_cast<const T*>(pointer(in.value));
  p.locations = static_cast<const U*>(pointer(in.locations));
  p.weights = static_cast<const U*>(pointer(in.weights));
  if (in.reference_points) p.reference = static_cast<const Compute*>(pointer(*in.reference_points));
  if (in.value_mask) p.mask = static_cast<const bool*>(pointer(*in.value_mask));
  return p;
}

// Calls f(V, fused) with constants. V is the number of channels per lane: the number that fills 16 bytes if D is a
// multiple of it, otherwise 1.
template <class T, class F>
void dispatch_launch(int64_t D, bool fused, F f) {
  constexpr int V = 16 / sizeof(T);
  const auto with_width = [&](auto v) { fused ? f(v, std::true_type{}) : f(v, std::false_type{}); };
  D % V == 0 ? with_width(std::integral_constant<int, V>{}) : with_width(std::integral_constant<int, 1>{});
}

Tensor ms_deform_attn_forward_cuda(const MsDeformAttnInputs& in);
MsDeformAttnGrads ms_deform_attn_backward_cuda(const MsDeformAttnInputs& in, const Tensor& grad_output,
                                               MsDeformAttnNeeds needs);

// Computes the gradient of value by gathering in a fixed order; see cuda_backward_deterministic.cu. grad_value has the
// dtype of value and need not be zeroed.
void ms_deform_attn_grad_value_deterministic(const MsDeformAttnInputs& in, const Tensor& grad_output,
                                             const Tensor& grad_value);

}  // namespace relops
