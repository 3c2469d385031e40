// local_relation on CUDA: the backward. See cuda.cuh for who does what.
//
// Two kernels, neither of which adds to what another thread adds to. That of the outputs computes the softmax anew:
// with weights e not yet divided by their sum S and gradients of weights d,
//   delta = sum of e d / S,  grad_query = sum of e d s / S - delta * sum of e s / S
// where s is the derivative of the logit by the query, so one pass suffices after that for the largest logit. It leaves
// delta and the logarithm of the sum for the kernel of the inputs, which visits, per pixel, the outputs whose windows
// hold it. That one also adds up the gradients of the prior: per tap over a thread's pixels, the warp's, the block's,
// and, in a kernel of its own, those of all blocks.
//
// Taps outside the map have no pixel. Where they count (border "zero") the kernel of the outputs adds their part.

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
  const int64_t of_group = max(min(a.C - first, a.m), int64_t{0});

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
  Compute q[R], largest[R], total[R], of_weights[R], of_query[R], slopes[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    q[r] = active && ho + r < a.Ho ? static_cast<Compute>(*a.query.at(block.n, block.g, ho + r, wo)) : Compute(0);
    largest[r] = -kInfinity;
    total[r] = of_weights[r] = of_query[r] = slopes[r] = 0;
  }

  const int at = thread.row * area.columns + thread.column;
  const auto logit_of = [&](int r, Compute key, int tap) {
    return similarity<kSimilarity>(q[r], key) * kLog2E<Compute> + prior[tap];
  };

  if (active)
    visit_taps<kTiled, R>(
        a, block, keys, area.columns, at, ho, wo, [](int, int, int, bool) {},
        [&](int r, Compute key, int tap) { largest[r] = max(largest[r], logit_of(r, key, tap)); });
  for (int64_t c = 0; c < of_group; c += kChannels) {
    const int channels = static_cast<int>(min(of_group - c, int64_t{kChannels}));
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
          const Compute weight = exp2(logit_of(r, key, tap) - largest[r]);
          Compute of_weight = 0;
#pragma unroll
          for (int i = 0; i < kChannels; ++i) of_weight += grad[r][i] * value[i];
          Compute s = key;
          if constexpr (kSimilarity != Similarity::kProduct) s = -slope<kSimilarity>(q[r] - key);
          if (c == 0) {
            total[r] += weight;
            slopes[r] += weight * s;
          }
          of_weights[r] += weight * of_weight;
          of_query[r] += weight * of_weight * s;
        });
  }

  const int64_t row = ((block.n * a.G + block.g) * a.Ho + ho) * a.Wo + wo;
  Compute logsumexp[R], delta[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    logsumexp[r] = largest[r] + log2(total[r]);
    delta[r] = of_weights[r] / total[r];
    if (!active || ho + r >= a.Ho) continue;
    if (of_group > 0) {
      p.logsumexp[row + r * a.Wo] = logsumexp[r];
      p.delta[row + r * a.Wo] = delta[r];
    }
    if (a.grad_query.data == nullptr) continue;
    const Compute grad = (of_query[r] - delta[r] * slopes[r]) / total[r] * Compute(kSlopeScale<kSimilarity>);
    *a.grad_query.at(block.n, block.g, ho + r, wo) = static_cast<T>(of_group > 0 ? grad : Compute(0));
  }

  if (p.partials == nullptr) return;
  for (int i = threadIdx.x; i < static_cast<int>(blockDim.x / 32) * k * k; i += blockDim.x) sums[i] = 0;
  __syncthreads();
  for (int j = 0; j < k && of_group > 0; ++j)
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
  const int after = k - 1 - k / 2;  // where i and j count outputs, taps are k - 1 - i and k - 1 - j
  const int64_t first = block.g * a.m;
  const int64_t of_group = max(min(a.C - first, a.m), int64_t{0});

  const TileArea area{block.y - after, block.x - after, p.groups * R + k - 1, p.width + k - 1, Ho, Wo};
  const int pixels = area.rows * area.columns;
  const LocalMemory<Compute> layout{k * k, static_cast<int>(blockDim.x / 32), kTiled ? pixels : 0, 3,
                                    p.partials != nullptr};
  Compute* const prior = reinterpret_cast<Compute*>(memory);
  Compute* const queries = prior + k * k;
  Compute *const logsumexps = queries + pixels, *const deltas = logsumexps + pixels;
  Compute* const sums = queries + (kTiled ? 3 * pixels : 0);  // [warps,k,k]
  auto* const grads = reinterpret_cast<Pack<T, kPack<T>>*>(prior + layout.numbers());
  const Map<const Compute> of_logsumexp{p.logsumexp, a.G * Ho * Wo, int64_t{Ho} * Wo, Wo, 1};
  const Map<const Compute> of_delta{p.delta, a.G * Ho * Wo, int64_t{Ho} * Wo, Wo, 1};
  stage_prior(prior, a, block.g);
  if constexpr (kTiled) {
    stage(queries, a.query, block.n, block.g, area);
    stage(logsumexps, of_logsumexp, block.n, block.g, area);
    stage(deltas, of_delta, block.n, block.g, area);
  }
  Compute* const of_warp = sums + threadIdx.x / 32 * k * k;
  if (p.partials != nullptr)
    for (int i = threadIdx.x % 32; i < k * k; i += 32) of_warp[i] = 0;
  __syncthreads();

  // Direct, the columns of a map are dealt out by their remainder modulo the stride: neighbors then meet the same taps.
  const int y = block.y + thread.row, column = block.x + thread.column;
  const int x = kTiled ? column : static_cast<int>(column % Wo * a.stride + column / Wo);
  const bool active = thread.active && column < p.columns && x < a.W;
  Compute key[R], grad_key[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    key[r] = active && y + r < a.H ? static_cast<Compute>(*a.key.at(block.n, block.g, y + r, x)) : Compute(0);
    grad_key[r] = 0;
  }
  for (int64_t c = 0; c < of_group; c += kChannels) {
    const int channels = static_cast<int>(min(of_group - c, int64_t{kChannels}));
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
      // of_taps[r]: of the tap i - r, over the pixels 0 to r.
      Compute of_taps[R] = {};
      const int64_t from_x = kTiled ? x + j - after : x + a.dilation * (j - after);
      const int wo = static_cast<int>(kTiled ? from_x : from_x / a.stride);
      const bool inside_x = active && from_x >= 0 && wo < Wo && (kTiled || from_x % a.stride == 0);
      for (int i = 0; i < k + R - 1; ++i) {
        const int64_t from_y = kTiled ? y + i - after : y + a.dilation * (i - after);
        const int ho = static_cast<int>(kTiled ? from_y : from_y / a.stride);
        const bool inside = inside_x && from_y >= 0 && ho < Ho && (kTiled || from_y % a.stride == 0);
#pragma unroll
        for (int r = R - 1; r > 0; --r) of_taps[r] = of_taps[r - 1];
        of_taps[0] = 0;
        if (inside) {
          const int at = (thread.row + i) * area.columns + thread.column + j;
          Compute query, logsumexp, delta, grad[kChannels];
          if constexpr (kTiled) {
            query = queries[at], logsumexp = logsumexps[at], delta = deltas[at];
            read_packs<T>(grad, grads + at, pixels);
          } else {
            query = static_cast<Compute>(*a.query.at(block.n, block.g, ho, wo));
            logsumexp = *of_logsumexp.at(block.n, block.g, ho, wo);
            delta = *of_delta.at(block.n, block.g, ho, wo);
            read_channels<T>(grad, a.grad_output, block.n, first + c, ho, wo, channels);
          }
          if (c > 0) delta = 0;  // taken off once
#pragma unroll
          for (int r = 0; r < R; ++r) {
            if (static_cast<unsigned>(i - r) >= static_cast<unsigned>(k) || y + r >= a.H) continue;
            const int tap = (k - 1 - (i - r)) * k + k - 1 - j;
            const Compute weight =
                exp2(similarity<kSimilarity>(query, key[r]) * kLog2E<Compute> + prior[tap] - logsumexp);
            Compute of_weight = -delta;
#pragma unroll
            for (int n = 0; n < kChannels; ++n) of_weight += value[r][n] * grad[n];
            const Compute of_logit = weight * of_weight;
            if constexpr (kSimilarity == Similarity::kProduct)
              grad_key[r] += of_logit * query;
            else
              grad_key[r] += of_logit * slope<kSimilarity>(query - key[r]);
#pragma unroll
            for (int n = 0; n < kChannels; ++n) grad_value[r][n] += weight * grad[n];
            of_taps[r] += of_logit;
          }
        }
        if (p.partials != nullptr && i >= R - 1)
          add_to_tap(of_warp, (k - 1 - (i - R + 1)) * k + k - 1 - j, of_taps[R - 1]);
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
  const int dealt = static_cast<int>(std::min<int64_t>(a.stride, W)) * Wo;
  LocalLaunch<T> inputs(params, H, W, dealt, 3, prior);

  const int64_t size = a.N * a.G * a.Ho * a.Wo, taps = a.G * a.k * a.k;
  const Tensor memory = new_empty(2 * size);
  outputs.p.logsumexp = inputs.p.logsumexp = static_cast<Compute*>(memory.mutable_data_ptr());
  outputs.p.delta = inputs.p.delta = outputs.p.logsumexp + size;
  const int64_t of_inputs = prior ? inputs.partials() : 0;
  const int64_t of_outputs = prior_outside ? outputs.partials() : 0;
  const Tensor partials = new_empty((of_inputs + of_outputs) * taps);
  if (of_inputs > 0) inputs.p.partials = static_cast<Compute*>(partials.mutable_data_ptr());
  if (of_outputs > 0) outputs.p.partials = inputs.p.partials + of_inputs * taps;

  dispatch_similarity(r.similarity, [&](auto similarity) {
    outputs.run(local_relation_outputs_kernel<T, similarity(), true>,
                local_relation_outputs_kernel<T, similarity(), false>, stream);
    if (a.grad_key.data != nullptr || a.grad_value.data != nullptr || prior)
      inputs.run(local_relation_inputs_kernel<T, similarity(), true>,
                 local_relation_inputs_kernel<T, similarity(), false>, stream);
  });
  if (prior)
    launch_sum_of_partials<Compute>(r.op, inputs.p.partials, of_inputs + of_outputs, taps, taps, a.grad_prior, stream);
}

template void local_relation_backward(const LocalRelation&, const LocalRelationArgs<double>&);
template void local_relation_backward(const LocalRelation&, const LocalRelationArgs<float>&);
template void local_relation_backward(const LocalRelation&, const LocalRelationArgs<Half>&);
template void local_relation_backward(const LocalRelation&, const LocalRelationArgs<BFloat16>&);

}  // namespace relops
