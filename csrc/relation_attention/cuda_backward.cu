// relation_attention on CUDA: the backward pass. The results are bit-identical from run to run, because the kernels
// have no atomic additions.
//
// The same kernel runs twice: with queries as own rows for the gradients of queries, weights, biases and query boxes,
// and with keys as own rows for the gradients of keys, values and key boxes. With e = exp(s - logsumexp),
// p = e max(b, 1e-6), and delta the sum over channels of output times its gradient,
//   ds = p (grad_output . value - delta),  db = b > 1e-6 ? e (grad_output . value - delta) : 0.
// The gradients of own rows are products of ds (or p, for values) with the other rows. db replaces b in shared memory.
// From db, the warps compute the gradients that flow through the features. Each warp processes one other box at a time:
//
// - Weights: the gradient of a weight is the sum over pairs of its feature times db. For the features of sizes, the sum
//   uses the sines and cosines of the own box and is then rotated by the angle of the other box.
// - Boxes: the gradient of a feature is the sum over heads of its weight times db.
//
// Each lane handles one wave in this computation, so the gradients of a logarithm are summed over lanes and over warps
// once at the end. A second kernel adds the partial sums of the blocks in a fixed order.

#include <algorithm>

#include "common/cuda/partial_sums.cuh"
#include "relation_attention/cuda.cuh"
#include "relation_attention/cuda_geometry.cuh"
#include "relation_attention/cuda_products.cuh"

namespace relops {

namespace {

// The number of other rows in a tile. Shared memory holds b for three tiles.
template <class Compute>
constexpr int kBackwardOthers = sizeof(Compute) == 8 ? 8 : 16;
constexpr int kBackwardRing = 4;
constexpr int kDeltaThreads = 256;
constexpr int kDeltaWarps = kDeltaThreads / 32;

template <class Compute>
struct BackwardShared {
  static constexpr int kOthers = kBackwardOthers<Compute>;
  HeadWeights<Compute> weights;
  BoxTerms<Compute> own[kOwnRows];
  BoxTerms<Compute> others[kBackwardRing][kOthers];
  unsigned active[kBackwardRing];
  union {
    Compute tile[kBackwardRing - 1][TileLayout<kOthers>::kSize];
    struct {  // used at the end
      Compute weights_of_warps[kHeads][4][4][32], biases_of_warps[kHeads][kHeads];
    };
    Compute boxes_of_warps[kHeads][kOwnRows][4];
  };
};

// The sums of a warp that one lane holds, with g = lane / 4 and t = lane % 4.
template <class Compute>
struct GeometryGrads {
  Compute weights[4][4];   // [coordinate][sine of wave g for heads 2t and 2t + 1, then its cosine]
  Compute bias;            // for head g
  Compute boxes[2][2][4];  // [i][j] is own row 8 i + 2t + j; gradients of x, y, log w, log h from wave g
};

template <int kSize, class Compute>
__device__ __forceinline__ void set_zero(Compute (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = 0;
}
template <int kRows, int kSize, class Compute>
__device__ __forceinline__ void set_zero(Compute (&x)[kRows][kSize]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) set_zero(x[i]);
}

template <bool kWeights, bool kBoxes, class Compute>
__device__ __forceinline__ void add_geometry_grads(const HeadWeights<Compute>& w, const BoxTerms<Compute>* own,
                                                   const BoxTerms<Compute>* others, bool by_own, const Compute* tile,
                                                   GeometryGrads<Compute>& grads) {
  constexpr int kOthers = kBackwardOthers<Compute>;
  using Layout = TileLayout<kOthers>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Wave<Compute> wave = w.waves[g];
#pragma unroll 1
  for (int o = warp; o < kOthers; o += kHeads) {
    const BoxTerms<Compute>& other = others[o];
    // The lanes divide the logarithms among themselves: lane i computes own row i % 16 and coordinate i / 16.
    const BoxTerms<Compute>& own_box = own[lane % kOwnRows];
    const int coordinate = lane / kOwnRows;
    const Compute distance = difference(own_box.center[coordinate], other.center[coordinate]);
    bool at_floor;
    const Log2<Compute> lane_ratio =
        log2_ratio(distance, by_own ? own_box.size[coordinate] : other.size[coordinate], at_floor);
    const Compute inverse = at_floor ? 0 : 1 / distance;
    Compute rotated[2][4];
    set_zero(rotated);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = 8 * half;
      OperandB<Compute, true> by_row, by_head;  // db; by_row: rows are heads, depth is own rows; by_head: the reverse
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Compute db = tile[Layout::at(g, first + 2 * t + e, o)];
        by_row.set_stored(e, db);
        by_head.set_stored(e, tile[Layout::at(t + 4 * e, first + g, o)]);
        grads.bias += db;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        // Each __syncwarp() of this loop keeps the compiler from moving loads before it, which would need too many
        // registers.
        __syncwarp();
        Compute sine[2], cosine[2];
        OperandA<Compute, true> features;  // rows: sine and cosine of wave g; depth: own rows
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = first + 2 * t + e;
          if (c < 2) {
            sine_cosine(shuffle(lane_ratio, c * kOwnRows + row), wave, sine[e], cosine[e]);
          } else {
            sine[e] = own[row].sine[c - 2][g];
            cosine[e] = own[row].cosine[c - 2][g];
          }
          features.set_stored(0, e, sine[e]);
          features.set_stored(1, e, cosine[e]);
        }
        if constexpr (kWeights) multiply<false>(c < 2 ? grads.weights[c] : rotated[c - 2], features, by_row);
        if constexpr (!kBoxes) continue;
        __syncwarp();
        OperandA<Compute, true> weights;  // rows: weights of the sine and cosine of wave g; depth: heads
        const Compute s = c < 2 ? 0 : other.sine[c - 2][g], k = c < 2 ? 1 : other.cosine[c - 2][g];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Compute of_sine = w.weight[t + 4 * e][w.feature(c, false, g)],
                        of_cosine = w.weight[t + 4 * e][w.feature(c, true, g)];
          weights.set_stored(0, e, c < 2 ? of_sine : of_sine * k + of_cosine * s);
          weights.set_stored(1, e, c < 2 ? of_cosine : of_cosine * k - of_sine * s);
        }
        Compute grad_features[4];
        set_zero(grad_features);
        multiply<false>(grad_features, weights, by_head);
        __syncwarp();
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Compute grad_log = wave.radians * (cosine[e] * grad_features[e] - sine[e] * grad_features[2 + e]);
          Compute(&sums)[4] = grads.boxes[half][e];
          if (c < 2) {
            const Compute slope = __shfl_sync(kAll, inverse, c * kOwnRows + first + 2 * t + e);
            sums[c] += grad_log * slope;
            if (by_own && slope != 0) sums[2 + c] -= grad_log;
          } else {
            sums[c] += grad_log;
          }
        }
      }
    }
    if constexpr (kWeights)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Compute s = other.sine[c][g], k = other.cosine[c][g];
          grads.weights[2 + c][i] += rotated[c][i] * k - rotated[c][2 + i] * s;
          grads.weights[2 + c][2 + i] += rotated[c][2 + i] * k + rotated[c][i] * s;
        }
  }
}

// In float64, the gradients of boxes and all other gradients together do not fit in 255 registers.
template <class T, bool kBoxGrads>
constexpr bool kOtherGrads = !(kBoxGrads && sizeof(T) == 8);
template <class T, bool kOwnKeys, bool kBoxGrads>
constexpr bool kWeightGrads = !kOwnKeys && kOtherGrads<T, kBoxGrads>;

// True if 128 registers per thread suffice, so that two blocks fit on a multiprocessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <class T, bool kOwnKeys, bool kBoxGrads>
constexpr bool kTwoBlocks = !kBoxGrads && (sizeof(T) == 4 || (sizeof(T) == 2 && !kOwnKeys));
#else
template <class T, bool kOwnKeys, bool kBoxGrads>
constexpr bool kTwoBlocks = false;
#endif

template <class T, bool kExact, bool kOwnKeys, bool kBoxGrads>
__global__ __launch_bounds__(
    kHeadThreads, kTwoBlocks<T, kOwnKeys, kBoxGrads>
                      ? 2
                      : 1) void relation_attention_backward_kernel(const __grid_constant__ RelationParams<T> p) {
  using Compute = ComputeType<T>;
  constexpr Compute kLog2E = 1.44269504088896340736;
  constexpr int kOthers = kBackwardOthers<Compute>;
  using Layout = TileLayout<kOthers>;
  extern __shared__ __align__(16) char memory[];
  BackwardShared<Compute>& shared = *reinterpret_cast<BackwardShared<Compute>*>(memory);
  const RelationAttentionArgs<T>& a = p.a;
  const int64_t own_rows = kOwnKeys ? a.K : a.Q, other_rows = kOwnKeys ? a.Q : a.K;
  const RelationBlock block(p, own_rows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t m = block.head + warp;
  const bool has_head = warp < block.heads;
  const bool* mask = a.mask == nullptr ? nullptr : a.mask + block.n * a.K;
  const bool *own_mask = kOwnKeys ? mask : nullptr, *other_mask = kOwnKeys ? nullptr : mask;
  const Compute* own_boxes = (kOwnKeys ? a.key_boxes : a.query_boxes) + 4 * block.n * own_rows;
  const Compute* other_boxes = (kOwnKeys ? a.query_boxes : a.key_boxes) + 4 * block.n * other_rows;
  const bool by_own = kOwnKeys ? !a.by_query : a.by_query;
  const bool needs_weights = kWeightGrads<T, kOwnKeys, kBoxGrads> && p.weight_partials != nullptr && block.chunk == 0;
  const bool needs_boxes = kBoxGrads && block.chunk == 0;

  load_head_weights(shared.weights, a, block.head, block.heads, kOwnKeys);
  __syncthreads();
  load_boxes(shared.own, kOwnRows, own_boxes, block.first, own_rows, own_mask, shared.weights.waves, threadIdx.x,
             kHeadThreads);

  // The product of own_a and other_a is s; the product of own_b and other_b is the gradient of p.
  const FeatureRows<const T>&own_a = kOwnKeys ? a.key : a.query, &own_b = kOwnKeys ? a.value : a.grad_output;
  const FeatureRows<const T>&other_a = kOwnKeys ? a.query : a.key, &other_b = kOwnKeys ? a.grad_output : a.value;
  T* grad_a = !kOtherGrads<T, kBoxGrads> ? nullptr : kOwnKeys ? a.grad_key : a.grad_query;
  T* grad_b = !kOtherGrads<T, kBoxGrads> || !kOwnKeys ? nullptr : a.grad_value;
  const unsigned own_active = active_bits(kOwnRows, block.first, own_rows, own_mask);
  const int channel = block.chunk * kColumns<T>;
  const Compute scale = a.scale * kLog2E;
  const int64_t statistics = block.n * a.Q * a.M + m;  // offset in tensors [N,Q,M]
  Compute sums_a[kColumns<T> / 8][4], sums_b[kOwnKeys ? kColumns<T> / 8 : 1][4];
  set_zero(sums_a);
  set_zero(sums_b);
  GeometryGrads<Compute> grads;
  set_zero(grads.weights);
  set_zero(grads.boxes[0]);
  set_zero(grads.boxes[1]);
  grads.bias = 0;

  const unsigned tiles = static_cast<unsigned>(ceil_div(other_rows, kOthers));
#pragma unroll 1
  for (unsigned step = 0; step < tiles + 3; ++step) {
    const unsigned slot = step % kBackwardRing;
    if (step < tiles) {
      load_boxes(shared.others[slot], kOthers, other_boxes, int64_t{step} * kOthers, other_rows, other_mask,
                 shared.weights.waves, threadIdx.x, kHeadThreads);
      if (warp == 0) {
        const unsigned active = active_bits(kOthers, int64_t{step} * kOthers, other_rows, other_mask);
        if (lane == 0) shared.active[slot] = active;
      }
    }
    if (step > 0 && step <= tiles)
      compute_logits<kOthers>(shared.weights, shared.own, shared.others[(slot + 3) % kBackwardRing], by_own,
                              shared.tile[(step - 1) % 3]);
    unsigned active = step < 2 || step >= tiles + 2 ? 0 : shared.active[(slot + 2) % kBackwardRing];
    if (active != 0 && has_head) {
      const int64_t first = (int64_t{step} - 2) * kOthers;
      Compute* tile = shared.tile[(step - 2) % 3];
      Compute scores[kOthers / 8][4], products[kOthers / 8][4];
      set_zero(scores);
      set_zero(products);
      const auto others = [&](const FeatureRows<const T>& rows, int64_t width) {
        return TileRows<T>(rows, block.n, first, m, active, width, p.vector);
      };
      const auto own = [&](const FeatureRows<const T>& rows, int64_t width) {
        return TileRows<T>(rows, block.n, block.first, m, own_active, width, p.vector);
      };
      dot_rows<kOthers, kExact>(scores, own(own_a, a.D), others(other_a, a.D));
      __syncwarp();
      dot_rows<kOthers, kExact>(products, own(own_b, a.Dv), others(other_b, a.Dv));
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kOthers / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = g + i / 2 * 8, o = 8 * j + 2 * t + i % 2;
          const bool is_active = own_active >> row & active >> o & 1;
          const int64_t q = kOwnKeys ? first + o : block.first + row;
          const Compute logsumexp = is_active ? a.logsumexp[statistics + q * a.M] : 0;
          const Compute delta = is_active ? p.delta[statistics + q * a.M] : 0;
          Compute& b = tile[Layout::at(warp, row, o)];
          const Compute e = exp2(scores[j][i] * scale - logsumexp * kLog2E), weight = e * floored(b);
          const Compute grad_p = products[j][i] - delta;
          scores[j][i] = is_active ? weight * grad_p : 0;
          products[j][i] = is_active ? weight : 0;
          b = is_active && !(b <= static_cast<Compute>(kWeightFloor)) ? e * grad_p : 0;
        }
      if (grad_a != nullptr) add_rows<kOthers, kExact>(sums_a, scores, others(other_a, a.D), channel);
      __syncwarp();
      if constexpr (kOwnKeys)
        if (grad_b != nullptr) add_rows<kOthers, kExact>(sums_b, products, others(other_b, a.Dv), channel);
    }
    active = step < 3 ? 0 : shared.active[(slot + 1) % kBackwardRing];
    if (active != 0 && (needs_weights || needs_boxes))
      add_geometry_grads<kWeightGrads<T, kOwnKeys, kBoxGrads>, kBoxGrads>(
          shared.weights, shared.own, shared.others[(slot + 1) % kBackwardRing], by_own, shared.tile[step % 3], grads);
    __syncthreads();
  }

  if (has_head) {
    const int64_t row = (block.n * own_rows + block.first) * a.M + m;
    const Compute by_scale[2] = {a.scale, a.scale}, by_one[2] = {1, 1};
    if (grad_a != nullptr)
      store_rows<T>(sums_a, by_scale, grad_a + row * a.D, a.M * a.D, block.rows, own_active, channel,
                    static_cast<int>(a.D), p.vector);
    if constexpr (kOwnKeys)
      if (grad_b != nullptr)
        store_rows<T>(sums_b, by_one, grad_b + row * a.Dv, a.M * a.Dv, block.rows, own_active, channel,
                      static_cast<int>(a.Dv), p.vector);
  }

  if (needs_weights) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) shared.weights_of_warps[warp][c][i][lane] = grads.weights[c][i];
    const Compute bias = group_sum(grads.bias, 4);
    if (t == 0) shared.biases_of_warps[warp][g] = bias;
    __syncthreads();
    Compute* partial = p.weight_partials + (block.n * p.row_blocks + block.row_block) * a.M * (kEmbedding + 1);
    for (int i = threadIdx.x; i < kHeads * (kEmbedding + 1); i += kHeadThreads) {
      const int h = i % kHeads, feature = i / kHeads;
      if (h >= block.heads) continue;
      Compute sum = 0;
      for (int from = 0; from < kHeads; ++from)
        sum += feature == kEmbedding
                   ? shared.biases_of_warps[from][h]
                   : shared.weights_of_warps[from][feature / kTerms][feature % kTerms / kWaves * 2 + h % 2]
                                            [feature % kWaves * 4 + h / 2];
      partial[feature == kEmbedding ? kEmbedding * a.M + block.head + h : (block.head + h) * kEmbedding + feature] =
          sum;
    }
    __syncthreads();
  }

  if (needs_boxes) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Compute sum = grads.boxes[half][e][i];
#pragma unroll
          for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(kAll, sum, distance);
          if (g == 0) shared.boxes_of_warps[warp][8 * half + 2 * t + e][i] = sum;
        }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < 2 * block.rows) {
      const int row = threadIdx.x / 2, c = threadIdx.x % 2;
      Compute center = 0, size = 0;
      for (int from = 0; from < kHeads; ++from) {
        center += shared.boxes_of_warps[from][row][c];
        size += shared.boxes_of_warps[from][row][2 + c];
      }
      const Compute* box = own_boxes + 4 * (block.first + row);
      if (size != 0) size /= box[2 + c] - box[c] + 1;  // a query without keys may have an invalid box
      const bool is_active = own_active >> row & 1;
      Compute* grad = p.box_partials + 4 * ((block.group * a.N + block.n) * own_rows + block.first + row);
      grad[c] = is_active ? center / 2 - size : 0;
      grad[2 + c] = is_active ? center / 2 + size : 0;
    }
  }
}

// Writes delta for the rows [N,Q,M], with one warp per row.
template <class T>
__global__ __launch_bounds__(kDeltaThreads) void relation_delta_kernel(
    const __grid_constant__ RelationAttentionArgs<T> a, ComputeType<T>* delta) {
  using Compute = ComputeType<T>;
  const unsigned M = static_cast<unsigned>(a.M), Q = static_cast<unsigned>(a.Q);
  const unsigned row = blockIdx.x * kDeltaWarps + threadIdx.x / 32, q = row / M, n = q / Q;
  if (n >= a.N) return;
  const T *grad = a.grad_output.at(n, q % Q, row % M), *output = a.output + row * a.Dv;
  Compute sum = 0;
  for (int64_t i = threadIdx.x % 32; i < a.Dv; i += 32)
    sum += static_cast<Compute>(grad[i]) * static_cast<Compute>(output[i]);
  sum = group_sum(sum, 32);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

template <class T, bool kExact, bool kOwnKeys, bool kBoxGrads>
void launch_side(RelationParams<T> p, const Tensor& like, ComputeType<T>* grad_boxes, cudaStream_t stream) {
  using Compute = ComputeType<T>;
  const RelationAttentionArgs<T>& a = p.a;
  const int64_t own_rows = kOwnKeys ? a.K : a.Q;
  p.row_tiles = 1;
  p.row_blocks = static_cast<unsigned>(ceil_div(own_rows, kOwnRows));
  p.groups = static_cast<unsigned>(ceil_div(a.M, kHeads));
  int64_t width = 0;  // of the gradients of features
  if (kOtherGrads<T, kBoxGrads> && (kOwnKeys ? a.grad_key : a.grad_query) != nullptr) width = a.D;
  if (kOtherGrads<T, kBoxGrads> && kOwnKeys && a.grad_value != nullptr) width = std::max(width, a.Dv);
  p.chunks = static_cast<unsigned>(std::max<int64_t>(ceil_div(width, kColumns<T>), 1));
  const int64_t count = a.N * p.row_blocks, size = a.M * (kEmbedding + 1);
  const bool needs_weights =
      kWeightGrads<T, kOwnKeys, kBoxGrads> && (a.grad_weight != nullptr || a.grad_bias != nullptr);
  const Tensor weights = torch::stable::new_empty(like, {needs_weights ? count * size : 0});
  p.weight_partials = needs_weights ? static_cast<Compute*>(weights.mutable_data_ptr()) : nullptr;
  const int64_t boxes = a.N * own_rows * 4;
  const bool split = grad_boxes != nullptr && p.groups > 1;
  const Tensor group_partials = torch::stable::new_empty(like, {split ? p.groups * boxes : 0});
  p.box_partials = split ? static_cast<Compute*>(group_partials.mutable_data_ptr()) : grad_boxes;

  const unsigned blocks = grid_size("relops.relation_attention", a.N * p.row_blocks * p.groups * p.chunks);
  constexpr int kBytes = sizeof(BackwardShared<Compute>);
  static_assert(kBytes <= kSmallestSharedLimit);
  allow_shared_memory<relation_attention_backward_kernel<T, kExact, kOwnKeys, kBoxGrads>>(kBytes);
  relation_attention_backward_kernel<T, kExact, kOwnKeys, kBoxGrads><<<blocks, kHeadThreads, kBytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (split)
    launch_sum_of_partials<Compute>(RelationAttention::op, p.box_partials, p.groups, boxes, boxes, grad_boxes, stream);
  if (needs_weights && a.grad_weight != nullptr)
    launch_sum_of_partials<Compute>(RelationAttention::op, p.weight_partials, count, size, a.M * kEmbedding,
                                    a.grad_weight, stream);
  if (needs_weights && a.grad_bias != nullptr)
    launch_sum_of_partials<Compute>(RelationAttention::op, p.weight_partials + a.M * kEmbedding, count, size, a.M,
                                    a.grad_bias, stream);
}

// The gradients of boxes have a separate kernel, because they are rarely needed and their registers would halve the
// number of blocks per multiprocessor.
template <class T, bool kOwnKeys>
void launch_side(const RelationAttention& r, RelationParams<T> p, ComputeType<T>* grad_boxes, cudaStream_t stream) {
  const RelationAttentionArgs<T>& a = p.a;
  const bool others = kOwnKeys ? a.grad_key != nullptr || a.grad_value != nullptr
                               : a.grad_query != nullptr || a.grad_weight != nullptr || a.grad_bias != nullptr;
  if (grad_boxes != nullptr) launch_side<T, true, kOwnKeys, true>(p, r.query_boxes, grad_boxes, stream);
  if (grad_boxes != nullptr && (kOtherGrads<T, true> || !others)) return;
  dispatch_exact<T>(r.allow_tf32,
                    [&](auto exact) { launch_side<T, exact, kOwnKeys, false>(p, r.query_boxes, nullptr, stream); });
}

}  // namespace

template <class T>
void relation_attention_backward(const RelationAttention& r, const RelationAttentionArgs<T>& a) {
  using Compute = ComputeType<T>;
  const torch::stable::accelerator::DeviceGuard guard(r.query.get_device_index());
  const cudaStream_t stream = current_stream(r.query.get_device_index());
  const int64_t rows = r.N * r.Q * r.M, partials = sizeof(T) == 2 ? ceil_div(r.Dv, kColumns<T>) : 1;
  const Tensor memory = torch::stable::new_empty(r.query_boxes, {partials * rows});
  Compute* const delta = static_cast<Compute*>(memory.mutable_data_ptr());
  if constexpr (sizeof(T) == 2) {
    launch_delta(a, delta, stream);
    if (partials > 1) launch_sum_of_partials(r.op, delta, partials, rows, rows, delta, stream);
  } else {
    const int64_t blocks = ceil_div(grid_size(r.op, rows), kDeltaWarps);  // the kernel numbers the rows in 32 bits
    relation_delta_kernel<T><<<static_cast<unsigned>(blocks), kDeltaThreads, 0, stream>>>(a, delta);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  RelationParams<T> p{a};
  p.vector =
      are_packs(a.query, a.D) && are_packs(a.key, a.D) && are_packs(a.value, a.Dv) && are_packs(a.grad_output, a.Dv);
  p.delta = delta;
  if (a.grad_query != nullptr || a.grad_query_boxes != nullptr || a.grad_weight != nullptr || a.grad_bias != nullptr)
    launch_side<T, false>(r, p, a.grad_query_boxes, stream);
  if (a.grad_key != nullptr || a.grad_value != nullptr || a.grad_key_boxes != nullptr)
    launch_side<T, true>(r, p, a.grad_key_boxes, stream);
}

template void relation_attention_backward(const RelationAttention&, const RelationAttentionArgs<double>&);
template void relation_attention_backward(const RelationAttention&, const RelationAttentionArgs<float>&);
template void relation_attention_backward(const RelationAttention&, const RelationAttentionArgs<Half>&);
template void relation_attention_backward(const RelationAttention&, const RelationAttentionArgs<BFloat16>&);

}  // namespace relops
