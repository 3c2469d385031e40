// ms_deform_attn and ms_deform_attn_fused on CUDA: the forward pass, and the registration of both passes. cuda.cuh
// explains how the work is divided.
//
// L1 limits the speed for float32: at the encoder shape of 800x1333 the gathered rows amount to 2.9 GB, whereas only
// 159 MB must be read from memory. For 16-bit dtypes, the limit is the number of instructions. Therefore each lane
// requests 16 bytes of a row, kUnroll samples with 4 corners each are in flight, and the order of blocks favors the
// caches.

#include "deform_attn/cuda.cuh"

namespace relops {

namespace {

constexpr int kUnroll = 4;

// A lane owns V channels of an item. If D exceeds the channels of a group of lanes, the channels are divided among
// several blocks.
template <class Params, int V, bool kFused>
__global__ __launch_bounds__(256, 2) void forward_kernel(const __grid_constant__ Params p) {
  using T = typename Params::T;
  using Compute = typename Params::Compute;
  extern __shared__ __align__(16) char memory[];
  const Staging<StagedSample<Compute>> staging(memory, p.L);
  const bool levels_fit = load_levels(p, p.levels, staging.levels);

  const WorkItem work = find_work_item(p, staging.levels, levels_fit);
  const int64_t channel = ((work.channel_block << p.group_log2) + work.lane) * V;
  const bool owns_channels = work.active && channel < p.D;
  const int64_t nq = work.n * p.Q + work.q, item = nq * p.M + work.m;
  const T* value = p.value + (work.n * p.S * p.M + work.m) * p.D + channel;
  const bool* mask = p.mask != nullptr ? p.mask + work.n * p.S : nullptr;
  const int count = static_cast<int>(p.L * p.P);
  const int staged = work.active ? count : 0;
  StagedSample<Compute>* samples = staging.samples + work.slot;

  SoftmaxStats<Compute> stats{};
  if constexpr (kFused) stats = softmax_stats<Compute>(p.weights + item * count, count, work.lane, work.group);

  Compute sum[V] = {};
  for (int first = 0; first < count; first += kChunk) {
    __syncwarp();  // waits until the previous chunk has been read
    for (int j = work.lane; j < kChunk; j += work.group) {
      Corners<Compute> c{{-1, -1, -1, -1}, {}, 0, 0, {}};
      if (first + j < staged)
        c = find_corners(read_sample<kFused>(p, staging.levels, nq, item, first + j, stats), mask);
      samples[j] = {{c.row[0], c.row[1], c.row[2], c.row[3]}, {c.weight[0], c.weight[1], c.weight[2], c.weight[3]}};
    }
    __syncwarp();
    if (!owns_channels) continue;
    for (int begin = 0; begin < min(kChunk, count - first); begin += kUnroll) {
#pragma unroll
      for (int j = begin; j < begin + kUnroll; ++j) {
        const StagedSample<Compute> sample = samples[j];
        Pack<T, V> values[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner)
          values[corner] = load_row<T, V>(row_at(value, sample.row[corner], p.row_bytes), sample.row[0]);
        if (sample.row[0] >= 0) {
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            Compute x[V];
            to_compute(values[corner], x);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += sample.weight[corner] * x[v];
          }
        }
      }
    }
  }
  if (!owns_channels) return;
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.x[v] = static_cast<T>(levels_fit ? sum[v] : static_cast<Compute>(NAN));
  store_pack<T, V>(p.output + item * p.D + channel, out);
}

template <class Params, int V, bool kFused>
void launch_forward(const char* op, Params p, cudaStream_t stream) {
  const Launch launch = plan_launch<StagedSample<typename Params::Compute>>(op, p, V, true);
  forward_kernel<Params, V, kFused><<<launch.blocks, launch.threads, launch.shared, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

Tensor ms_deform_attn_forward_cuda(const MsDeformAttnInputs& in) {
  const auto& z = in.sizes;
  const torch::stable::accelerator::DeviceGuard guard(in.value.get_device_index());
  Tensor output = torch::stable::new_empty(in.value, {z.N, z.Q, z.M * z.D});
  if (output.numel() == 0) return output;
  dispatch_features_and_coordinates(in.op, in.value.scalar_type(), in.locations.scalar_type(), [&](auto t, auto u) {
    using T = typename decltype(t)::type;
    std::vector<Tensor> keep_alive;
    auto p = make_params<T, typename decltype(u)::type>(in, keep_alive);
    p.output = static_cast<T*>(output.mutable_data_ptr());
    dispatch_launch<T>(z.D, in.reference_points.has_value(), [&](auto width, auto fused) {
      launch_forward<decltype(p), width, fused>(in.op, p, current_stream(in.value.get_device_index()));
    });
  });
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) {
  register_ms_deform_attn<&ms_deform_attn_forward_cuda, &ms_deform_attn_backward_cuda>(m);
}

}  // namespace relops
