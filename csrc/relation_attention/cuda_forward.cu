// relation_attention on CUDA: the forward pass.
//
// A block has 16 or 32 queries and 8 heads. A warp has one head and 16 queries and keeps their running maxima and sums,
// as in flash attention. cuda.cuh explains the stages. Instruction issue limits the speed: a warp needs about 330
// instructions to compute b for 16 pairs and 8 heads, 24 of which are products on tensor cores.
//
// The running maximum is the maximum of s plus the exponent of b. The weights of the values are therefore at most 2,
// and the largest weight is at least 1, as the conversion of the weights to 16 bits requires. The exponent of b is
// available without computing a logarithm.

#include <algorithm>

#include "relation_attention/cuda.cuh"
#include "relation_attention/cuda_geometry.cuh"
#include "relation_attention/cuda_products.cuh"

namespace relops {

namespace {

// The number of keys in a tile. Shared memory holds b for two tiles.
template <class Compute>
constexpr int kForwardKeys = sizeof(Compute) == 8 ? 16 : 32;
constexpr int kForwardRing = 3;

template <class Compute>
struct ForwardShared {
  static constexpr int kKeys = kForwardKeys<Compute>;
  HeadWeights<Compute> weights;
  BoxTerms<Compute> keys[kForwardRing][kKeys];
  unsigned active[kForwardRing];
  // The data of 16 queries. A block with 32 queries has two elements in `rows`, which is therefore the last member.
  struct Rows {
    BoxTerms<Compute> queries[kOwnRows];
    Compute tile[kForwardRing - 1][TileLayout<kKeys>::kSize];
  };
  alignas(16) Rows rows[1];

  static constexpr int bytes(int row_tiles) {
    return static_cast<int>(sizeof(ForwardShared) + (row_tiles - 1) * sizeof(Rows));
  }
};

// Returns floor(log2(x)) for x > 0.
__device__ __forceinline__ float exponent(float x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) >> 23 | 0x4b000000u) - (8388608.0f + 127.0f);
}
__device__ __forceinline__ double exponent(double x) {
  return static_cast<double>(static_cast<int>(std::bit_cast<uint64_t>(x) >> 52) - 1023);
}

// The largest number of groups of kOwnRows queries in a block.
template <class T>
constexpr int kMaxRowTiles = sizeof(T) == 8 ? 1 : 2;

// With one group, ptxas spills unless a minimum number of blocks is given. With two groups, it spills if one is given.
template <class T>
constexpr int kMinBlocks = kMaxRowTiles<T> == 1;

// If kDelta, the kernel writes only delta. The gradient of geometry_bias is a sum of small differences from delta,
// which therefore needs all bits of the weights.
template <class T, bool kExact, bool kDelta>
__global__ __launch_bounds__(kMaxRowTiles<T>* kHeadThreads, kMinBlocks<T>) void relation_attention_kernel(
    const __grid_constant__ RelationParams<T> p) {
  using Compute = ComputeType<T>;
  constexpr int kKeys = kForwardKeys<Compute>;
  constexpr Compute kInfinity = std::numeric_limits<Compute>::infinity(), kLog2E = 1.44269504088896340736;
  using Layout = TileLayout<kKeys>;
  extern __shared__ __align__(16) char memory[];
  ForwardShared<Compute>& shared = *reinterpret_cast<ForwardShared<Compute>*>(memory);
  const RelationAttentionArgs<T>& a = p.a;
  const RelationBlock block(p, a.Q);
  auto& rows = shared.rows[threadIdx.x / kHeadThreads];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / 32, head = warp % kHeads;
  const int64_t m = block.head + head;
  const bool* mask = a.mask == nullptr ? nullptr : a.mask + block.n * a.K;

  load_head_weights(shared.weights, a, block.head, block.heads, false);
  __syncthreads();
  load_boxes(rows.queries, kOwnRows, a.query_boxes + 4 * block.n * a.Q, block.first, a.Q, nullptr, shared.weights.waves,
             threadIdx.x % kHeadThreads, kHeadThreads);

  const unsigned own_active = (1u << block.rows) - 1;
  const Compute scale = a.scale * kLog2E;
  const int channel = block.chunk * kColumns<T>;
  Compute sums[kColumns<T> / 8][4], maximum[2] = {-kInfinity, -kInfinity}, total[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kColumns<T> / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0;

  const unsigned tiles = static_cast<unsigned>(ceil_div(a.K, kKeys));
#pragma unroll 1
  for (unsigned step = 0; step < tiles + 2; ++step) {
    const unsigned slot = step % kForwardRing;
    if (step < tiles) {
      load_boxes(shared.keys[slot], kKeys, a.key_boxes + 4 * block.n * a.K, int64_t{step} * kKeys, a.K, mask,
                 shared.weights.waves, threadIdx.x, blockDim.x);
      if (warp == 0) {
        const unsigned active = active_bits(kKeys, int64_t{step} * kKeys, a.K, mask);
        if (lane == 0) shared.active[slot] = active;
      }
    }
    if (step > 0 && step <= tiles)
      compute_logits<kKeys>(shared.weights, rows.queries, shared.keys[(slot + kForwardRing - 1) % kForwardRing],
                            a.by_query, rows.tile[(step - 1) % 2]);
    const int64_t key = (int64_t{step} - 2) * kKeys;
    const unsigned active = step < 2 ? 0 : shared.active[(slot + 1) % kForwardRing];
    if (active != 0 && head < block.heads) {
      const Compute* tile = rows.tile[step % 2];
      Compute scores[kKeys / 8][4] = {};
      dot_rows<kKeys, kExact>(scores, TileRows<T>(a.query, block.n, block.first, m, own_active, a.D, p.vector),
                              TileRows<T>(a.key, block.n, key, m, active, a.D, p.vector));
      Compute highest[2] = {maximum[0], maximum[1]};
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = 8 * j + 2 * t + i % 2;
          const bool is_active = active >> k & 1;
          const Compute weight = floored(tile[Layout::at(head, g + i / 2 * 8, k)]);
          scores[j][i] = is_active ? scores[j][i] * scale : -kInfinity;
          highest[i / 2] = max(highest[i / 2], scores[j][i] + exponent(weight));
        }
      Compute shift[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Compute high = group_max(highest[row], 4);
        shift[row] = high == -kInfinity ? 0 : high;
        const Compute factor = exp2(maximum[row] - shift[row]);
        maximum[row] = high;
        total[row] *= factor;
#pragma unroll
        for (int i = 0; i < kColumns<T> / 8; ++i) {
          sums[i][2 * row] *= factor;
          sums[i][2 * row + 1] *= factor;
        }
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = 8 * j + 2 * t + i % 2;
          const Compute weight = floored(tile[Layout::at(head, g + i / 2 * 8, k)]);
          scores[j][i] = active >> k & 1 ? weight * exp2(scores[j][i] - shift[i / 2]) : 0;
          total[i / 2] += scores[j][i];
        }
      add_rows<kKeys, kExact, kDelta>(sums, scores, TileRows<T>(a.value, block.n, key, m, active, a.Dv, p.vector),
                                      channel);
    }
    __syncthreads();
  }

  if (head >= block.heads) return;
  const int64_t row = (block.n * a.Q + block.first) * a.M + m;
  Compute factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] = group_sum(total[i], 4);
    factor[i] =
        total[i] == 0
            ? 0
            : 1 / total[i];  // a total of 0 means that there are no keys, because the largest weight is at least 1
  }
  if constexpr (kDelta) {
    Compute dots[2];
    dot_sums<T>(sums, factor, a.grad_output.at(block.n, block.first, m), a.grad_output.i_stride, block.rows, channel,
                static_cast<int>(a.Dv), dots);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (t == 0 && g + 8 * i < block.rows) a.delta[block.chunk * a.N * a.Q * a.M + row + (g + 8 * i) * a.M] = dots[i];
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (t == 0 && block.chunk == 0 && g + 8 * i < block.rows)
        a.logsumexp[row + (g + 8 * i) * a.M] = total[i] == 0 ? kInfinity : (maximum[i] + log2(total[i])) / kLog2E;
    store_rows<T>(sums, factor, a.output + row * a.Dv, a.M * a.Dv, block.rows, own_active, channel,
                  static_cast<int>(a.Dv), p.vector);
  }
}

template <class T, bool kExact, bool kDelta = false>
void launch_forward(const RelationAttentionArgs<T>& a, cudaStream_t stream) {
  using Shared = ForwardShared<ComputeType<T>>;
  RelationParams<T> p{a};
  p.vector = are_packs(a.query, a.D) && are_packs(a.key, a.D) && are_packs(a.value, a.Dv);
  p.groups = static_cast<unsigned>(ceil_div(a.M, kHeads));
  p.chunks = static_cast<unsigned>(ceil_div(a.Dv, kColumns<T>));
  // If enough blocks remain, and if the shared memory suffices, a block gets twice the queries, so that keys and values
  // are read half as often from L2.
  constexpr int64_t kManyBlocks = 256;
  constexpr int kMaxBytes = Shared::bytes(kMaxRowTiles<T>);
  static_assert(Shared::bytes(1) <= kSmallestSharedLimit);
  const int64_t others = a.N * p.groups * p.chunks, tiles = ceil_div(a.Q, kOwnRows);
  const bool fits = shared_memory_limit(kMaxBytes) == kMaxBytes;
  p.row_tiles = fits && others * tiles >= kManyBlocks && tiles > 1 ? kMaxRowTiles<T> : 1;
  p.row_blocks = static_cast<unsigned>(ceil_div(tiles, p.row_tiles));
  const unsigned blocks = grid_size("relops.relation_attention", others * p.row_blocks);
  const int threads = p.row_tiles * kHeadThreads, bytes = Shared::bytes(p.row_tiles);
  allow_shared_memory<relation_attention_kernel<T, kExact, kDelta>>(kMaxBytes);
  relation_attention_kernel<T, kExact, kDelta><<<blocks, threads, bytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

template <class T>
void launch_delta(RelationAttentionArgs<T> a, float* partials, cudaStream_t stream) {
  a.delta = partials;
  launch_forward<T, true, true>(a, stream);
}

template void launch_delta(RelationAttentionArgs<Half>, float*, cudaStream_t);
template void launch_delta(RelationAttentionArgs<BFloat16>, float*, cudaStream_t);

namespace {

struct Kernels {
  template <class T>
  static void forward(const RelationAttention& r, const RelationAttentionArgs<T>& a) {
    const torch::stable::accelerator::DeviceGuard guard(r.query.get_device_index());
    const cudaStream_t stream = current_stream(r.query.get_device_index());
    dispatch_exact<T>(r.allow_tf32, [&](auto exact) { launch_forward<T, exact>(a, stream); });
  }

  template <class T>
  static void backward(const RelationAttention& r, const RelationAttentionArgs<T>& a) {
    relation_attention_backward(r, a);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_relation_attention<Kernels>(m); }

}  // namespace relops
