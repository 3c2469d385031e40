// soft_nms on CUDA: suppression by decay, a block for each class. Each step all of its threads find the entry of the
// highest score together, then let the scores of their own entries decay, looking for the next highest in the same
// pass. One barrier a step; bound by its latency and that of the exchange between warps, some 0.3 us, as steps cannot
// overlap. Scores are computed as on the CPU, bit for bit.

#include "suppression/cuda_entries.cuh"
#include "suppression/soft_nms.h"

namespace relops {

namespace {

constexpr int kDecayThreads = 512, kWarps = kDecayThreads / 32;

template <class Compute>
using ScoreInt = std::make_signed_t<ScoreKey<Compute>>;

template <class Compute>
struct SoftNmsParams {
  int64_t n;  // B * K
  int K;
  Decay<Compute> decay;
  const Compute* boxes;    // [n,4]
  const Compute* scores;   // [n]
  const int32_t* grouped;  // [n]: entries by image and class; null without classes, where they are as they lie
  const Span* spans;       // [n]: by place; with classes only
  Compute* left;           // [n]: by place: the score while an entry is waiting to be kept, then 0
  Compute* decayed;        // [n]: by entry: the score of one that is kept, or 0

  __device__ int64_t entry(int64_t place) const { return grouped == nullptr ? place : grouped[place]; }
  __device__ Box<Compute> box(int64_t place) const {
    const Compute* box = boxes + 4 * entry(place);
    return {box[0], box[1], box[2], box[3]};
  }
};

__global__ __launch_bounds__(kEntryThreads) void soft_nms_classes_kernel(int64_t n, const int64_t* idxs,
                                                                         const int32_t* grouped, int64_t* class_of) {
  const int64_t i = thread_number();
  if (i < n) class_of[i] = idxs[grouped[i]];
}

// The highest score seen, and the first place that has it.
template <class Compute>
struct Best {
  Compute score = 0;
  int place = 0;

  __device__ void see(Compute other, int at) {
    if (other > score || (other == score && at < place)) {
      score = other;
      place = at;
    }
  }
  __device__ void see_lanes(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const Compute other = __shfl_xor_sync(kAll, score, distance);
      const int at = __shfl_xor_sync(kAll, place, distance);
      see(other, at);
    }
  }
};

template <class Compute>
__device__ void decay_class(const SoftNmsParams<Compute>& p, Span span, Best<Compute> (&bests)[2][kWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Best<Compute> best;
  for (int place = span.begin + threadIdx.x; place < span.end; place += kDecayThreads) {
    const int64_t entry = p.entry(place);
    const Compute score =
        counts(p.boxes + 4 * entry, p.scores[entry], p.decay.score_threshold) ? p.scores[entry] : Compute(0);
    p.left[place] = score;
    p.decayed[entry] = 0;
    best.see(score, place);
  }
  for (int step = 0;; step ^= 1) {
    best.see_lanes(32);
    // Two, in turn: a warp may be a step ahead of one that still reads.
    if (lane == 0) bests[step][warp] = best;
    __syncthreads();
    best = bests[step][lane % kWarps];
    best.see_lanes(kWarps);
    if (!(best.score > 0)) return;

    const int top = best.place;
    const Box<Compute> kept = p.box(top);
    const Compute kept_area = area(kept);
    const Best<Compute> chosen = best;
    best = {};
    for (int place = span.begin + threadIdx.x; place < span.end; place += kDecayThreads) {
      Compute score = p.left[place];
      if (!(score > 0)) continue;
      if (place == top) {
        p.decayed[p.entry(place)] = chosen.score;
        p.left[place] = 0;
        continue;
      }
      const Box<Compute> box = p.box(place);
      const Compute common = intersection(kept, box);
      if (common > 0) {
        score = product(score, p.decay.template factor<ScoreInt<Compute>>(iou(kept_area, area(box), common)));
        score = score > p.decay.score_threshold ? score : Compute(0);
        p.left[place] = score;
      }
      best.see(score, place);
    }
  }
}

// A block looks through `places` places for the first ones of classes.
template <class Compute>
__global__ __launch_bounds__(kDecayThreads) void soft_nms_decay_kernel(const __grid_constant__ SoftNmsParams<Compute> p,
                                                                       int places) {
  __shared__ Best<Compute> bests[2][kWarps];
  const int64_t first = int64_t{blockIdx.x} * places;
  for (int64_t place = first; place < first + places && place < p.n;) {
    const int begin = static_cast<int>(place) / p.K * p.K;
    const Span span = p.spans == nullptr ? Span{begin, begin + p.K} : p.spans[place];
    if (span.begin == place) {
      decay_class(p, span, bests);
      __syncthreads();
    }
    place = span.end;
  }
}

template <class Compute>
__global__ __launch_bounds__(kEntryThreads) void soft_nms_keys_kernel(int64_t n, const Compute* decayed,
                                                                      ScoreKey<Compute>* keys, int32_t* values) {
  const int64_t i = thread_number();
  if (i >= n) return;
  keys[i] = decayed[i] > 0 ? score_key(decayed[i]) : kNoKey<Compute>;
  values[i] = static_cast<int32_t>(i);
}

// From the entries of each image by descending score, those that are not kept last.
template <class Compute>
__global__ __launch_bounds__(kEntryThreads) void soft_nms_output_kernel(int64_t n, int K, const Compute* decayed,
                                                                        const int32_t* ranked, int64_t* keep,
                                                                        Compute* scores, int64_t* count) {
  const int64_t i = thread_number();
  if (i >= n) return;
  const int64_t image = i / K, first = image * K;
  const Compute score = decayed[ranked[i]];
  const bool kept = score > 0;
  keep[i] = kept ? ranked[i] - first : -1;
  scores[i] = score;
  if (kept && (i + 1 == first + K || !(decayed[ranked[i + 1]] > 0))) count[image] = i + 1 - first;
  if (!kept && i == first) count[image] = 0;
}

template <class Compute>
SoftKept suppress(const SoftNmsProblem& problem) {
  SoftKept result(problem);
  const int64_t B = problem.B, K = problem.K, n = B * K;
  auto* keep = static_cast<int64_t*>(result.keep.mutable_data_ptr());
  auto* count = static_cast<int64_t*>(result.count.mutable_data_ptr());
  if (n == 0) {
    torch::stable::zero_(result.count);
    return result;
  }
  const cudaStream_t stream = current_stream(problem.boxes.get_device_index());
  const unsigned blocks = grid_size(problem.op, ceil_div(n, kEntryThreads));
  const bool by_class = problem.idxs.has_value();

  SoftNmsParams<Compute> p{};
  p.n = n;
  p.K = static_cast<int>(K);
  p.decay = problem.decay<Compute>();
  p.boxes = static_cast<const Compute*>(problem.boxes.const_data_ptr());
  p.scores = static_cast<const Compute*>(problem.scores.const_data_ptr());
  SortBuffers<uint64_t> classed;
  SortBuffers<uint32_t> imaged[2];
  SortBuffers<ScoreKey<Compute>> scored;
  int64_t* class_of = nullptr;
  Span* spans = nullptr;
  const Tensor memory = allocate(problem.boxes, [&](Placement& placement) {
    if (by_class) {
      classed.place(placement, n);
      placement.take(class_of, n);
      placement.take(spans, n);
    }
    for (int i = 0; B > 1 && i < 1 + by_class; ++i) imaged[i].place(placement, n);
    scored.place(placement, n);
    placement.take(p.left, n);
    placement.take(p.decayed, n);
  });
  if (by_class) {
    const auto* idxs = static_cast<const int64_t*>(problem.idxs->const_data_ptr());
    class_keys_kernel<<<blocks, kEntryThreads, 0, stream>>>(n, idxs, nullptr, classed.keys, classed.values);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    classed.sort(n, 64, stream);
    p.grouped = B > 1 ? by_image(problem, classed.order, imaged[1], stream) : classed.order;
    soft_nms_classes_kernel<<<blocks, kEntryThreads, 0, stream>>>(n, idxs, p.grouped, class_of);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    spans_kernel<<<blocks, kEntryThreads, 0, stream>>>(n, p.K, class_of, spans, nullptr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    p.spans = spans;
  }
  // Short, so that a block has not many small classes; without classes, images.
  const int places = by_class ? 64 : p.K;
  soft_nms_decay_kernel<Compute><<<grid_size(problem.op, ceil_div(n, places)), kDecayThreads, 0, stream>>>(p, places);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  soft_nms_keys_kernel<Compute><<<blocks, kEntryThreads, 0, stream>>>(n, p.decayed, scored.keys, scored.values);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  scored.sort(n, 8 * sizeof(Compute), stream);
  const int32_t* ranked = B > 1 ? by_image(problem, scored.order, imaged[0], stream) : scored.order;
  soft_nms_output_kernel<Compute><<<blocks, kEntryThreads, 0, stream>>>(
      n, p.K, p.decayed, ranked, keep, static_cast<Compute*>(result.scores.mutable_data_ptr()), count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

SoftKept suppress_any(const SoftNmsProblem& p) {
  const torch::stable::accelerator::DeviceGuard guard(p.boxes.get_device_index());
  return p.boxes.scalar_type() == ScalarType::Double ? suppress<double>(p) : suppress<float>(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_soft_nms<&suppress_any, &read_count>(m); }

}  // namespace relops
