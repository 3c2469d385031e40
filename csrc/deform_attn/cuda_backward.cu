// ms_deform_attn and ms_deform_attn_fused on CUDA: the backward pass. cuda.cuh explains how the work is divided.
//
// A group of lanes iterates over the samples of its item, as in the forward pass. For each sample, it adds weight *
// output gradient to the four rows of the gradient of value by reductions to memory, four floats at a time on Hopper.
// Then it gathers the four rows of value and multiplies them by the output gradient of the item. These dot products are
// summed over the group for several samples at the same time: each shuffle step halves the number of sums to which a
// lane contributes, so 4 samples in a group of 8 lanes need 14 shuffles instead of 48. The lane that staged a sample
// computes the derivatives with respect to weight, x and y from the four sums. The reductions to memory limit the speed
// (728 M floats at the encoder shape of 800x1333, N = 2), so they are omitted if value needs no gradient. The gradients
// of 16-bit values are summed in float32 and converted at the end.

#include "deform_attn/cuda.cuh"

namespace relops {

namespace {

template <class Compute>
struct alignas(16) BackwardSample {
  int row[4];
  Compute weight[4];  // replaced by the dot products of the output gradient and the rows
  Compute fx, fy, attention_weight;
  int inside;  // bit i says whether corner i is neither masked nor outside the level
};

// Sums x[j] over the lanes of a group for all j and stores the sums as the dot products of the samples, four for each
// sample. Each step halves the number of sums to which a lane contributes. `distance` is half the number of lanes of
// the group, so at least 1.
template <int kCount, class Compute>
__device__ __forceinline__ void reduce_scatter(Compute* x, int lane, int distance, Compute* dots) {
  constexpr int kHalf = kCount / 2, kPacked = kHalf * sizeof(Compute) <= 16 ? kHalf : 16 / sizeof(Compute);
  constexpr auto at = [](int j) { return j / 4 * int(sizeof(BackwardSample<Compute>) / sizeof(Compute)) + j % 4; };
  // With __shfl_xor_sync, every shuffle would copy the distance from a uniform register.
  const auto exchange = [](Compute give, int distance) { return __shfl_sync(kAll, give, threadIdx.x % 32 ^ distance); };
  const bool upper = lane & distance;
#pragma unroll
  for (int j = 0; j < kHalf; ++j)
    x[j] = (upper ? x[j + kHalf] : x[j]) + exchange(upper ? x[j] : x[j + kHalf], distance);
  if (upper) dots += at(kHalf);
  if (distance > 1) {
    if constexpr (kHalf > 1) return reduce_scatter<kHalf>(x, lane, distance / 2, dots);
    for (distance /= 2; distance > 0; distance /= 2) x[0] += exchange(x[0], distance);
  }
#pragma unroll
  for (int j = 0; j < kHalf; j += kPacked) {
    Pack<Compute, kPacked> pack;
#pragma unroll
    for (int k = 0; k < kPacked; ++k) pack.x[k] = x[j + k];
    store_pack<Compute, kPacked>(dots + at(j), pack);
  }
}

// If kOneStep, the lanes of the group hold all D channels at once.
template <class Params, int V, bool kFused, bool kOneStep>
__global__ __launch_bounds__(256, 2) void backward_kernel(const __grid_constant__ Params p) {
  using T = typename Params::T;
  using U = typename Params::U;
  using Compute = typename Params::Compute;
  // The number of samples that are gathered and summed together. For 4 samples, other kernels lack registers.
  constexpr int kTogether = kOneStep && sizeof(T) == 4 ? 4 : 2;
  extern __shared__ __align__(16) char memory[];
  const Staging<BackwardSample<Compute>> staging(memory, p.L);
  const bool levels_fit = load_levels(p, p.levels, staging.levels);

  const WorkItem work = find_work_item(p, staging.levels, levels_fit);
  const int64_t nq = work.n * p.Q + work.q, item = nq * p.M + work.m;
  const int64_t first_row = (work.n * p.S * p.M + work.m) * p.D;
  const T* value = p.value + first_row + work.lane * V;
  const bool scatter = p.grad_value != nullptr, sampling_grad = p.grad_locations != nullptr;
  const bool* mask = p.mask != nullptr ? p.mask + work.n * p.S : nullptr;
  const int count = static_cast<int>(p.L * p.P), staged = work.active ? count : 0;
  BackwardSample<Compute>* samples = staging.samples + work.slot;

  SoftmaxStats<Compute> stats{};
  if constexpr (kFused) stats = softmax_stats<Compute>(p.weights + item * count, count, work.lane, work.group);

  const T* grad_output = p.grad_output + item * p.D;
  // Loads the output gradient of the channels that this lane gathers.
  const auto load_grad = [&](int offset, Compute(&grad)[V]) {
    const int channel = offset + work.lane * V;
    to_compute(load_pack<T, V>(grad_output + channel, work.active && channel < p.D), grad);
  };
  Compute grad[V];
  if (kOneStep) load_grad(0, grad);
  const int step = V << p.group_log2, steps = kOneStep ? 1 : ceil_div(static_cast<int>(p.D), step);

  Compute expected = 0;  // fused: sum of weight * derivative with respect to weight
  for (int first = 0; first < count; first += kChunk) {
    __syncwarp();  // waits until the previous chunk has been read
    for (int j = work.lane; j < kChunk; j += work.group) {
      Corners<Compute> c{{-1, -1, -1, -1}, {}, 0, 0, {}};
      Compute weight = 0;
      if (first + j < staged) {
        const Sample<Compute> sample = read_sample<kFused>(p, staging.levels, nq, item, first + j, stats);
        c = find_corners(sample, mask);
        weight = sample.weight;
      }
      const int inside = c.inside[0] + 2 * c.inside[1] + 4 * c.inside[2] + 8 * c.inside[3];
      samples[j] = {{c.row[0], c.row[1], c.row[2], c.row[3]},
                    {c.weight[0], c.weight[1], c.weight[2], c.weight[3]},
                    c.fx,
                    c.fy,
                    weight,
                    inside};
    }
    __syncwarp();

#pragma unroll 1
    for (int begin = 0; begin < min(kChunk, count - first); begin += kTogether) {
      if (scatter)
        for (int i = 0, offset = 0; i < steps; ++i, offset += step) {
          // A lane adds to other channels than it gathers, because neighboring lanes must add to neighboring addresses.
          constexpr int W = reduction_width<Compute, V>();
#pragma unroll(W == 4 ? V / W : 1)  // before Hopper, the addresses of all V reductions would lack registers
          for (int v = 0; v < V; v += W) {
            const int channel = offset + v * work.group + work.lane * W;
            if (channel >= p.D) break;
            Compute part[W];
            if constexpr (kOneStep && W == V)
              for (int k = 0; k < W; ++k) part[k] = grad[k];
            else
              to_compute(load_pack<T, W>(grad_output + channel, work.active), part);
            Compute* grad_value = p.grad_value + first_row + channel;
#pragma unroll
            for (int j = begin; j < begin + kTogether; ++j) {
              if (samples[j].row[0] < 0) continue;
#pragma unroll
              for (int corner = 0; corner < 4; ++corner) {
                Compute x[W];
#pragma unroll
                for (int k = 0; k < W; ++k) x[k] = samples[j].weight[corner] * part[k];
                reduce_add(row_at(grad_value, samples[j].row[corner], p.grad_row_bytes), x);
              }
            }
          }
        }
      if (!sampling_grad) continue;
      Compute dots[kTogether * 4] = {};  // of grad and the rows; undefined for rows of -1
      for (int i = 0, offset = 0; i < steps; ++i, offset += step) {
        if (!kOneStep) load_grad(offset, grad);
        if (offset + work.lane * V >= p.D) break;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const auto& row = samples[begin + j].row;
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            Compute x[V];
            to_compute(load_row<T, V>(row_at(value + offset, row[corner], p.row_bytes), row[0]), x);
#pragma unroll
            for (int v = 0; v < V; ++v) dots[j * 4 + corner] += grad[v] * x[v];
          }
        }
      }
      __syncwarp();  // waits until all lanes have read the weights, which the dot products replace
      reduce_scatter<kTogether * 4>(dots, work.lane, work.group / 2, samples[begin].weight);
    }
    if (!sampling_grad) continue;
    __syncwarp();
    // The gradients of a sample are written by the lane that staged it, so neighboring lanes write neighboring
    // addresses.
    for (int j = work.lane; j < kChunk; j += work.group) {
      const int s = first + j;
      if (s >= staged) break;
      const BackwardSample<Compute> sample = samples[j];
      const Compute fx = sample.fx, fy = sample.fy, weight = sample.attention_weight;
      Compute dot[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) dot[i] = sample.inside >> i & 1 ? sample.weight[i] : Compute(0);
      const Compute by_weight = (1 - fy) * ((1 - fx) * dot[0] + fx * dot[1]) + fy * ((1 - fx) * dot[2] + fx * dot[3]);
      const Compute by_x = weight * ((1 - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2]));
      const Compute by_y = weight * ((1 - fx) * (dot[2] - dot[0]) + fx * (dot[3] - dot[1]));
      const int64_t at = item * count + s;
      const int l = level_of(p, s);
      Compute unit_x, unit_y;  // pixels per unit of the locations or offsets
      if constexpr (kFused) {
        unit_x = unit_y = 1;
        if (p.R == 4) {
          const Compute* ref = p.reference + (nq * p.L + l) * p.R;
          unit_x = ref[2] * staging.levels[l].width * p.half_per_point;
          unit_y = ref[3] * staging.levels[l].height * p.half_per_point;
        }
        if (p.grad_pixels != nullptr) store_pack<Compute, 2>(p.grad_pixels + at * 2, {by_x, by_y});
        p.raw_grad_weights[at] = by_weight;
        expected += weight * by_weight;
      } else {
        unit_x = staging.levels[l].width;
        unit_y = staging.levels[l].height;
        p.grad_weights[at] = static_cast<U>(by_weight);
      }
      // A sample that contributed nothing, such as one at a non-finite location, has zero gradient even if the unit is
      // not finite.
      const Compute grad_x = by_x == 0 ? Compute(0) : by_x * unit_x, grad_y = by_y == 0 ? Compute(0) : by_y * unit_y;
      store_pack<U, 2>(p.grad_locations + at * 2, {static_cast<U>(grad_x), static_cast<U>(grad_y)});
    }
  }
  if constexpr (kFused) {
    if (!sampling_grad) return;
    expected = group_sum(expected, work.group);
    if (!work.active) return;
    // This loop has the same order as the loop above, so each lane reads only what it wrote itself.
    for (int first = 0; first < count; first += kChunk)
      for (int s = first + work.lane; s < min(first + kChunk, count); s += work.group) {
        const int64_t at = item * count + s;
        const Compute weight = exponential(static_cast<Compute>(p.weights[at]) - stats.max_logit) * stats.scale;
        p.grad_weights[at] = static_cast<U>(weight * (p.raw_grad_weights[at] - expected));
      }
  }
}

template <class Params, int V, bool kFused>
void launch_backward(const char* op, Params p, cudaStream_t stream) {
  const Launch launch = plan_launch<BackwardSample<typename Params::Compute>>(op, p, V, false);
  bool one_step = false;
  if constexpr (V > 1) {
    one_step = p.D <= V << p.group_log2;
    if (one_step) backward_kernel<Params, V, kFused, true><<<launch.blocks, launch.threads, launch.shared, stream>>>(p);
  }
  if (!one_step) backward_kernel<Params, V, kFused, false><<<launch.blocks, launch.threads, launch.shared, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Computes the gradient of the reference points: one thread per (image, query, level) sums over heads and points in
// order.
template <class Params>
__global__ __launch_bounds__(256, 1) void reference_kernel(const __grid_constant__ Params p,
                                                           typename Params::Compute* grad_reference) {
  using Compute = typename Params::Compute;
  extern __shared__ __align__(16) char memory[];
  DeviceLevel* levels = reinterpret_cast<DeviceLevel*>(memory);
  load_levels(p, p.levels, levels);
  // 32 bits suffice: tensors with more queries would not fit in device memory.
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.N * p.Q * p.L) return;
  const unsigned l = i % static_cast<unsigned>(p.L);
  const int64_t nq = i / static_cast<unsigned>(p.L);
  const Compute width = levels[l].width, height = levels[l].height;
  Compute center_x = 0, center_y = 0, extent_x = 0, extent_y = 0;
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t point = 0; point < p.P; ++point) {
      const int64_t at = (((nq * p.M + m) * p.L + l) * p.P + point) * 2;
      const Compute grad_x = p.grad_pixels[at] * width, grad_y = p.grad_pixels[at + 1] * height;
      center_x += grad_x;
      center_y += grad_y;
      // 0 * infinity must be 0, as in backward_kernel.
      if (grad_x != 0) extent_x += grad_x * p.half_per_point * static_cast<Compute>(p.locations[at]);
      if (grad_y != 0) extent_y += grad_y * p.half_per_point * static_cast<Compute>(p.locations[at + 1]);
    }
  Compute* out = grad_reference + int64_t{i} * p.R;
  out[0] = center_x;
  out[1] = center_y;
  if (p.R == 4) {
    out[2] = extent_x;
    out[3] = extent_y;
  }
}

template <class Params>
void launch_reference(const char* op, const Params& p, typename Params::Compute* grad_reference, cudaStream_t stream) {
  const unsigned blocks = grid_size(op, p.N * p.Q * p.L) / 256 + 1;
  reference_kernel<Params><<<blocks, 256, p.L * sizeof(DeviceLevel), stream>>>(p, grad_reference);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

MsDeformAttnGrads ms_deform_attn_backward_cuda(const MsDeformAttnInputs& in, const Tensor& grad_output,
                                               MsDeformAttnNeeds needs) {
  const auto& z = in.sizes;
  check_grad_output(in, grad_output);
  if (grad_output.numel() == 0) return zero_grads(in, needs);
  const torch::stable::accelerator::DeviceGuard guard(in.value.get_device_index());
  const cudaStream_t stream = current_stream(in.value.get_device_index());
  const bool fused = in.reference_points.has_value();
  const ScalarType compute = compute_dtype(in.value.scalar_type());
  const auto in_compute_dtype = [&](const Tensor& like) {
    return torch::stable::new_empty(like, like.sizes(), compute);
  };

  MsDeformAttnGrads grads = no_grads(in);
  const Tensor grad = aligned(grad_output);
  const bool scatter = needs.value && !needs.deterministic;
  Tensor value_sums = none_like(in.value), raw_grad_weights = none_like(in.weights), grad_pixels = none_like(in.value);
  if (scatter) value_sums = torch::stable::new_zeros(in.value, in.value.sizes(), compute);
  if (needs.sampling) {
    grads.locations = torch::stable::new_empty(in.locations, in.locations.sizes());
    grads.weights = torch::stable::new_empty(in.weights, in.weights.sizes());
    const bool same = in.weights.scalar_type() == compute;
    if (fused) raw_grad_weights = same ? grads.weights : in_compute_dtype(in.weights);
    // If the reference points have two coordinates, the gradient in pixels equals the gradient of the offsets. One
    // tensor then serves for both if the offsets have the compute dtype.
    if (needs.reference) grad_pixels = same && z.R == 2 ? grads.locations : in_compute_dtype(in.locations);
  }
  if (needs.reference) grads.reference = torch::stable::new_empty(*in.reference_points, in.reference_points->sizes());

  dispatch_features_and_coordinates(in.op, in.value.scalar_type(), in.locations.scalar_type(), [&](auto t, auto u) {
    using T = typename decltype(t)::type;
    using U = typename decltype(u)::type;
    using Compute = ComputeType<T>;
    if (!scatter && !needs.sampling) return;
    std::vector<Tensor> keep_alive;
    auto p = make_params<T, U>(in, keep_alive);
    p.grad_output = static_cast<const T*>(grad.const_data_ptr());
    if (scatter) p.grad_value = static_cast<Compute*>(value_sums.mutable_data_ptr());
    if (needs.sampling) {
      p.grad_locations = static_cast<U*>(grads.locations.mutable_data_ptr());
      p.grad_weights = static_cast<U*>(grads.weights.mutable_data_ptr());
      p.raw_grad_weights = static_cast<Compute*>(raw_grad_weights.mutable_data_ptr());
      if (needs.reference) p.grad_pixels = static_cast<Compute*>(grad_pixels.mutable_data_ptr());
    }
    dispatch_launch<T>(z.D, fused, [&](auto width, auto is_fused) {
      launch_backward<decltype(p), width, is_fused>(in.op, p, stream);
    });
    if (needs.reference) launch_reference(in.op, p, static_cast<Compute*>(grads.reference.mutable_data_ptr()), stream);
  });
  if (scatter) {
    grads.value = value_sums.scalar_type() == in.value.scalar_type()
                      ? value_sums
                      : torch::stable::to(value_sums, in.value.scalar_type());
  } else if (needs.value) {
    grads.value = torch::stable::new_empty(in.value, in.value.sizes());
    ms_deform_attn_grad_value_deterministic(in, grad, grads.value);
  }
  return grads;
}

}  // namespace relops
