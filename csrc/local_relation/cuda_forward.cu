// local_relation on CUDA: the forward pass. cuda.cuh explains how the work is divided.
//
// A thread iterates over its windows twice, first to find the largest logit of each output, then to compute the
// exponentials, their sum, and weighted sums of eight channels of the values. With 7 x 7 taps, this work limits the
// speed. Each tap of an output needs an exponential and about 16 operations. With four outputs per thread, 36 bytes are
// read from shared memory for every 2.8 taps. With 3 x 3 taps, memory limits the speed.

#include "local_relation/cuda.cuh"

namespace relops {

namespace {

template <class T, Similarity kSimilarity, bool kTiled>
__global__ __launch_bounds__(kLocalThreads) void local_relation_kernel(
    const __grid_constant__ LocalRelationParams<T> p) {
  using Compute = ComputeType<T>;
  constexpr int R = kRows<T, kTiled>;
  constexpr Compute kInfinity = std::numeric_limits<Compute>::infinity();
  extern __shared__ __align__(16) char memory[];
  const LocalRelationArgs<T>& a = p.a;
  const LocalBlock block(p, R);
  const LocalThread thread(p, R);
  const int k = static_cast<int>(a.k), before = k / 2, H = static_cast<int>(a.H), W = static_cast<int>(a.W);
  const int channel = block.chunk * kChannels;
  const int64_t first = block.g * a.m + channel;
  const int channels = static_cast<int>(min(min(a.C - first, a.m - channel), int64_t{kChannels}));
  if (channels <= 0) return;

  const TileArea area{block.y - before, block.x - before, p.groups * R + k - 1, p.width + k - 1, H, W};
  const int pixels = area.rows * area.columns;
  const LocalMemory<Compute> layout{k * k, static_cast<int>(blockDim.x / 32), kTiled ? pixels : 0, 1, false};
  Compute* const prior = reinterpret_cast<Compute*>(memory);
  Compute* const keys = prior + k * k;
  auto* const values = reinterpret_cast<Pack<T, kPack<T>>*>(prior + layout.numbers());
  stage_prior(prior, a, block.g);
  if constexpr (kTiled) {
    stage(keys, a.key, block.n, block.g, area);
    stage_packs(values, a.value, block.n, first, channels, p.packs, area);
  }
  __syncthreads();

  const int ho = block.y + thread.row, wo = block.x + thread.column;
  if (!thread.active || wo >= a.Wo) return;
  Compute q[R], max_logit[R], total[R], sums[R][kChannels];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    q[r] = ho + r < a.Ho ? static_cast<Compute>(*a.query.at(block.n, block.g, ho + r, wo)) : Compute(0);
    max_logit[r] = -kInfinity;
    total[r] = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[r][c] = 0;
  }

  const int at = thread.row * area.columns + thread.column;
  const auto logit_of = [&](int r, Compute key, int tap) {
    return similarity<kSimilarity>(q[r], key) * kLog2E<Compute> + prior[tap];
  };
  visit_taps<kTiled, R>(
      a, block, keys, area.columns, at, ho, wo, [](int, int, int, bool) {},
      [&](int r, Compute key, int tap) { max_logit[r] = max(max_logit[r], logit_of(r, key, tap)); });
  Compute value[kChannels];
  visit_taps<kTiled, R>(
      a, block, keys, area.columns, at, ho, wo,
      [&](int pixel, int y, int x, bool inside) {
        if constexpr (kTiled)
          read_packs<T>(value, values + pixel, pixels);
        else
          read_channels<T>(value, a.value, block.n, first, inside ? y : 0, inside ? x : 0, inside ? channels : 0);
      },
      [&](int r, Compute key, int tap) {
        const Compute weight = exp2(logit_of(r, key, tap) - max_logit[r]);
        total[r] += weight;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sums[r][c] += weight * value[c];
      });
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (ho + r >= a.Ho) break;
    const Compute scale = 1 / total[r];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[r][c] *= scale;
    write_channels<T>(sums[r], a.output, block.n, first, ho + r, wo, channels);
  }
}

struct Kernels {
  template <class T>
  static void forward(const LocalRelation& r, const LocalRelationArgs<T>& a) {
    const torch::stable::accelerator::DeviceGuard guard(r.value.get_device_index());
    LocalRelationParams<T> params{a};
    params.chunks = static_cast<int>(ceil_div(a.m, kChannels));
    params.packs = has_packs(a.value, a.m);
    const int Ho = static_cast<int>(a.Ho), Wo = static_cast<int>(a.Wo);
    const LocalLaunch<T> launch(params, Ho, Wo, Wo, 1, false);
    const cudaStream_t stream = current_stream(r.value.get_device_index());
    dispatch_similarity(r.similarity, [&](auto similarity) {
      launch.template run<local_relation_kernel<T, similarity(), true>, local_relation_kernel<T, similarity(), false>>(
          stream);
    });
  }

  template <class T>
  static void backward(const LocalRelation& r, const LocalRelationArgs<T>& a, const LocalRelationGrads&) {
    local_relation_backward(r, a);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_local_relation<Kernels>(m); }

}  // namespace relops
