// local_relation on CUDA: the backward pass. cuda.cuh explains how the work is divided.
//
// The backward pass has two kernels, one over outputs and one over inputs. In both kernels, no two threads add to the
// same value. The outputs kernel computes the softmax again. Let e be the weights before the division by their sum S, d
// the gradients of the weights, and s the derivative of the logit with respect to the query. Then
//   delta = sum of e d / S,  grad_query = sum of e d s / S - delta * sum of e s / S
// A first pass over the window finds the largest logit, and a second pass computes all these sums. The outputs kernel
// writes delta and the logarithm of S for the inputs kernel. For each pixel, the inputs kernel visits the outputs whose
// windows contain the pixel. It also sums the gradients of the prior for each tap: over the pixels of a thread, then
// over a warp and over a block. A separate kernel sums over all blocks.
//
// The inputs kernel cannot visit taps outside the map, because they have no pixel. If these taps are part of the
// softmax (border "zero"), the outputs kernel computes the gradients of the prior for them.

#include "common/cuda/partial_sums.cuh"
#include "local_relation/cuda.cuh"

namespace relops {

namespace {

template <class T, Similarity kSimilarity, bool kTiled>
__global__ __launch_bounds__(kLocalThreads,
                             1) void local_relation_outputs_kernel(const __grid_constant__ LocalRelationParams<T> p) {
  using Compute = ComputeType<T>;
  constexpr int R = kRows<T, kTiled>;
  constexpr Compute kInfinity = std::numeric_limits<Compute>::infinity();
  extern __shared__ __align__(16) char memory[];
  const LocalRelationArgs<T>& a = p.a;
  const LocalBlock block(p, R);
  const LocalThread thread(p, R);
  const int k = static_cast<int>(a.k), before = k / 2, H = static_cast<int>(a.H), W = static_cast<int>(a.W);
  const int64_t first = block.g * a.m;
  const int64_t group_channels = max(min(a.C - first, a.m), int64_t{0});

  const TileArea area{block.y - before, block.x - before, p.groups * R + k - 1, p.width + k - 1, H, W};
  const int pixels = area.rows * area.columns;
  const LocalMemory<Compute> layout{k * k, static_cast<int>(blockDim.x / 32), kTiled ? pixels : 0, 1,
                                    p.partials != nullptr};
  Compute* const prior = reinterpret_cast<Compute*>(memory);
  Compute* const keys = prior + k * k;
  Compute* const sums = keys + (kTiled ? pixels : 0);  // [warps,k,k]
  auto* const values = reinterpret_cast<Pack<T, kPack<T>>*>(prior + layout.numbers());
  stage_prior(prior, a, block.g);
  if constexpr (kTiled) stage(keys, a.key, block.n, block.g, area);
  __syncthreads();

  const int ho = block.y + thread.row, wo = block.x + thread.column;
  const bool active = thread.active && wo < a.Wo;
  Compute q[R], max_logit[R], total[R], delta_sums[R], query_sums[R], slope_sums[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    q[r] = active && ho + r < a.Ho ? static_cast<Compute>(*a.query.at(block.n, block.g, ho + r, wo)) : Compute(0);
    max_logit[r] = -kInfinity;
    total[r] = delta_sums[r] = query_sums[r] = slope_sums[r] = 0;
  }

  const int at = thread.row * area.columns + thread.column;
  const auto logit_of = [&](int r, Compute key, int tap) {
    return similarity<kSimilarity>(q[r], key) * kLog2E<Compute> + prior[tap];
  };

  if (active)
    visit_taps<kTiled, R>(
        a, block, keys, area.columns, at, ho, wo, [](int, int, int, bool) {},
        [&](int r, Compute key, int tap) { max_logit[r] = max(max_logit[r], logit_of(r, key, tap)); });
  for (int64_t c = 0; c < group_channels; c += kChannels) {
    const int channels = static_cast<int>(min(group_channels - c, int64_t{kChannels}));
    if constexpr (kTiled) {
      if (c > 0) __syncthreads();
      stage_packs(values, a.value, block.n, first + c, channels, p.packs, area);
      __syncthreads();
    }
    if (!active) continue;
    Compute grad[R][kChannels], value[kChannels];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool valid = ho + r < a.Ho;
      read_channels<T>(grad[r], a.grad_output, block.n, first + c, valid ? ho + r : 0, wo, valid ? channels : 0);
    }
    visit_taps<kTiled, R>(
        a, block, keys, area.columns, at, ho, wo,
        [&](int pixel, int y, int x, bool inside) {
          if constexpr (kTiled)
            read_packs<T>(value, values + pixel, pixels);
          else
            read_channels<T>(value, a.value, block.n, first + c, inside ? y : 0, inside ? x : 0, inside ? channels : 0);
        },
        [&](int r, Compute key, int tap) {
          const Compute weight = exp2(logit_of(r, key, tap) - max_logit[r]);
          Compute grad_weight = 0;
#pragma unroll
          for (int i = 0; i < kChannels; ++i) grad_weight += grad[r][i] * value[i];
          Compute s = key;
          if constexpr (kSimilarity != Similarity::kProduct) s = -slope<kSimilarity>(q[r] - key);
          if (c == 0) {
            total[r] += weight;
            slope_sums[r] += weight * s;
          }
          delta_sums[r] += weight * grad_weight;
          query_sums[r] += weight * grad_weight * s;
        });
  }

  const int64_t row = ((block.n * a.G + block.g) * a.Ho + ho) * a.Wo + wo;
  Compute logsumexp[R], delta[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    logsumexp[r] = max_logit[r] + log2(total[r]);
    delta[r] = delta_sums[r] / total[r];
    if (!active || ho + r >= a.Ho) continue;
    if (group_channels > 0) {
      p.logsumexp[row + r * a.Wo] = logsumexp[r];
      p.delta[row + r * a.Wo] = delta[r];
    }
    if (a.grad_query.data == nullptr) continue;
    const Compute grad = (query_sums[r] - delta[r] * slope_sums[r]) / total[r] * Compute(kSlopeScale<kSimilarity>);
    *a.grad_query.at(block.n, block.g, ho + r, wo) = static_cast<T>(group_channels > 0 ? grad : Compute(0));
  }

  if (p.partials == nullptr) return;
  for (int i = threadIdx.x; i < static_cast<int>(blockDim.x / 32) * k * k; i += blockDim.x) sums[i] = 0;
  __syncthreads();
  for (int j = 0; j < k && group_channels > 0; ++j)
    for (int i = 0; i < k; ++i) {
      const int64_t x = a.stride * wo + a.dilation * (j - before);
      Compute grad = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t y = a.stride * (ho + r) + a.dilation * (i - before);
        const bool outside = y < 0 || y >= H || x < 0 || x >= W;
        if (active && ho + r < a.Ho && outside)
          grad -= delta[r] * exp2(logit_of(r, Compute(0), i * k + j) - logsumexp[r]);
      }
      if (__ballot_sync(kAll, grad != 0) != 0) add_to_tap(sums + threadIdx.x / 32 * k * k, i * k + j, grad);
    }
  write_partial(p, block, sums);
}

template <class T, Similarity kSimilarity, bool kTiled>
__global__ __launch_bounds__(kLocalThreads,
                             1) void local_relation_inputs_kernel(const __grid_constant__ LocalRelationParams<T> p) {
  using Compute = ComputeType<T>;
  constexpr int R = kRows<T, kTiled>;
  extern __shared__ __align__(16) char memory[];
  const LocalRelationArgs<T>& a = p.a;
  const LocalBlock block(p, R);
  const LocalThread thread(p, R);
  const int k = static_cast<int>(a.k), Ho = static_cast<int>(a.Ho), Wo = static_cast<int>(a.Wo);
  const int stride = static_cast<int>(a.stride), dilation = static_cast<int>(a.dilation);
  const int after = k - 1 - k / 2;  // i and j count outputs, so the taps are k - 1 - i and k - 1 - j
  const int64_t first = block.g * a.m;
  const int64_t group_channels = max(min(a.C - first, a.m), int64_t{0});

  const TileArea area{block.y - after, block.x - after, p.groups * R + k - 1, p.width + k - 1, Ho, Wo};
  const int pixels = area.rows * area.columns;
  const LocalMemory<Compute> layout{k * k, static_cast<int>(blockDim.x / 32), kTiled ? pixels : 0, 3,
                                    p.partials != nullptr};
  Compute* const prior = reinterpret_cast<Compute*>(memory);
  Compute* const queries = prior + k * k;
  Compute *const logsumexps = queries + pixels, *const deltas = logsumexps + pixels;
  Compute* const sums = queries + (kTiled ? 3 * pixels : 0);  // [warps,k,k]
  auto* const grads = reinterpret_cast<Pack<T, kPack<T>>*>(prior + layout.numbers());
  const Map<const Compute> logsumexp_map{p.logsumexp, a.G * Ho * Wo, int64_t{Ho} * Wo, Wo, 1};
  const Map<const Compute> delta_map{p.delta, a.G * Ho * Wo, int64_t{Ho} * Wo, Wo, 1};
  stage_prior(prior, a, block.g);
  if constexpr (kTiled) {
    stage(queries, a.query, block.n, block.g, area);
    stage(logsumexps, logsumexp_map, block.n, block.g, area);
    stage(deltas, delta_map, block.n, block.g, area);
  }
  Compute* const warp_sums = sums + threadIdx.x / 32 * k * k;
  if (p.partials != nullptr)
    for (int i = threadIdx.x % 32; i < k * k; i += 32) warp_sums[i] = 0;
  __syncthreads();

  // In direct mode, the columns of a map are ordered by their remainder modulo the stride, so neighboring threads have
  // the same taps.
  const int y = block.y + thread.row, column = block.x + thread.column;
  const int x = kTiled ? column : column % Wo * stride + column / Wo;
  const bool active = thread.active && column < p.columns && x < a.W;
  Compute key[R], grad_key[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    key[r] = active && y + r < a.H ? static_cast<Compute>(*a.key.at(block.n, block.g, y + r, x)) : Compute(0);
    grad_key[r] = 0;
  }
  for (int64_t c = 0; c < group_channels; c += kChannels) {
    const int channels = static_cast<int>(min(group_channels - c, int64_t{kChannels}));
    if constexpr (kTiled) {
      if (c > 0) __syncthreads();
      stage_packs(grads, a.grad_output, block.n, first + c, channels, p.packs, area);
      __syncthreads();
    }
    Compute value[R][kChannels], grad_value[R][kChannels];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool valid = active && y + r < a.H;
      read_channels<T>(value[r], a.value, block.n, first + c, valid ? y + r : 0, valid ? x : 0, valid ? channels : 0);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) grad_value[r][i] = 0;
    }
    for (int j = 0; j < k; ++j) {
      // tap_sums[r] is the gradient of the prior of tap i - r, summed over pixels 0 to r.
      Compute tap_sums[R] = {};
      const int from_x = kTiled ? x + j - after : x + dilation * (j - after), wo = kTiled ? from_x : from_x / stride;
      const bool inside_x = active && from_x >= 0 && wo < Wo && (kTiled || from_x % stride == 0);
      for (int i = 0; i < k + R - 1; ++i) {
        const int from_y = kTiled ? y + i - after : y + dilation * (i - after), ho = kTiled ? from_y : from_y / stride;
        const bool inside = inside_x && from_y >= 0 && ho < Ho && (kTiled || from_y % stride == 0);
#pragma unroll
        for (int r = R - 1; r > 0; --r) tap_sums[r] = tap_sums[r - 1];
        tap_sums[0] = 0;
        if (inside) {
          const int at = (thread.row + i) * area.columns + thread.column + j;
          Compute query, logsumexp, delta, grad[kChannels];
          if constexpr (kTiled) {
            query = queries[at], logsumexp = logsumexps[at], delta = deltas[at];
            read_packs<T>(grad, grads + at, pixels);
          } else {
            query = static_cast<Compute>(*a.query.at(block.n, block.g, ho, wo));
            logsumexp = *logsumexp_map.at(block.n, block.g, ho, wo);
            delta = *delta_map.at(block.n, block.g, ho, wo);
            read_channels<T>(grad, a.grad_output, block.n, first + c, ho, wo, channels);
          }
          if (c > 0) delta = 0;  // delta is subtracted only with the first channels
#pragma unroll
          for (int r = 0; r < R; ++r) {
            if (static_cast<unsigned>(i - r) >= static_cast<unsigned>(k) || y + r >= a.H) continue;
            const int tap = (k - 1 - (i - r)) * k + k - 1 - j;
            const Compute weight =
                exp2(similarity<kSimilarity>(query, key[r]) * kLog2E<Compute> + prior[tap] - logsumexp);
            Compute grad_weight = -delta;
#pragma unroll
            for (int n = 0; n < kChannels; ++n) grad_weight += value[r][n] * grad[n];
            const Compute grad_logit = weight * grad_weight;
            if constexpr (kSimilarity == Similarity::kProduct)
              grad_key[r] += grad_logit * query;
            else
              grad_key[r] += grad_logit * slope<kSimilarity>(query - key[r]);
#pragma unroll
            for (int n = 0; n < kChannels; ++n) grad_value[r][n] += weight * grad[n];
            tap_sums[r] += grad_logit;
          }
        }
        if (p.partials != nullptr && i >= R - 1)
          add_to_tap(warp_sums, (k - 1 - (i - R + 1)) * k + k - 1 - j, tap_sums[R - 1]);
      }
    }
    if (a.grad_value.data != nullptr)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (active && y + r < a.H)
          write_channels<T>(grad_value[r], a.grad_value, block.n, first + c, y + r, x, channels);
  }
  if (a.grad_key.data != nullptr)
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (active && y + r < a.H)
        *a.grad_key.at(block.n, block.g, y + r, x) = static_cast<T>(grad_key[r] * Compute(kSlopeScale<kSimilarity>));
  if (p.partials != nullptr) write_partial(p, block, sums);
}

}  // namespace

template <class T>
void local_relation_backward(const LocalRelation& r, const LocalRelationArgs<T>& a) {
  using Compute = ComputeType<T>;
  const torch::stable::accelerator::DeviceGuard guard(r.value.get_device_index());
  const cudaStream_t stream = current_stream(r.value.get_device_index());
  const int H = static_cast<int>(a.H), W = static_cast<int>(a.W);
  const int Ho = static_cast<int>(a.Ho), Wo = static_cast<int>(a.Wo);
  const auto new_empty = [&](int64_t size) {
    return torch::stable::empty({size}, compute_dtype(r.value.scalar_type()), std::nullopt, r.value.device());
  };
  const bool prior = a.grad_prior != nullptr, prior_outside = prior && a.zero_border;
  LocalRelationParams<T> params{a};
  params.chunks = 1;
  params.packs = has_packs(a.value, a.m);
  LocalLaunch<T> outputs(params, Ho, Wo, Wo, 1, prior_outside);
  params.packs = has_packs(a.grad_output, a.m);
  const int direct_columns = static_cast<int>(std::min<int64_t>(a.stride, W)) * Wo;
  LocalLaunch<T> inputs(params, H, W, direct_columns, 3, prior);

  const int64_t size = a.N * a.G * a.Ho * a.Wo, taps = a.G * a.k * a.k;
  const Tensor memory = new_empty(2 * size);
  outputs.p.logsumexp = inputs.p.logsumexp = static_cast<Compute*>(memory.mutable_data_ptr());
  outputs.p.delta = inputs.p.delta = outputs.p.logsumexp + size;
  const int64_t input_partials = prior ? inputs.partials() : 0;
  const int64_t output_partials = prior_outside ? outputs.partials() : 0;
  const Tensor partials = new_empty((input_partials + output_partials) * taps);
  if (input_partials > 0) inputs.p.partials = static_cast<Compute*>(partials.mutable_data_ptr());
  if (output_partials > 0) outputs.p.partials = inputs.p.partials + input_partials * taps;

  dispatch_similarity(r.similarity, [&](auto similarity) {
    outputs.template run<local_relation_outputs_kernel<T, similarity(), true>,
                         local_relation_outputs_kernel<T, similarity(), false>>(stream);
    if (a.grad_key.data != nullptr || a.grad_value.data != nullptr || prior)
      inputs.template run<local_relation_inputs_kernel<T, similarity(), true>,
                          local_relation_inputs_kernel<T, similarity(), false>>(stream);
  });
  if (prior)
    launch_sum_of_partials<Compute>(r.op, inputs.p.partials, input_partials + output_partials, taps, taps, a.grad_prior,
                                    stream);
}

template void local_relation_backward(const LocalRelation&, const LocalRelationArgs<double>&);
template void local_relation_backward(const LocalRelation&, const LocalRelationArgs<float>&);
template void local_relation_backward(const LocalRelation&, const LocalRelationArgs<Half>&);
template void local_relation_backward(const LocalRelation&, const LocalRelationArgs<BFloat16>&);

}  // namespace relops
