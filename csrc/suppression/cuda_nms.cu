// nms, batched_nms and nms_padded on CUDA: greedy suppression that needs neither an N x N bit matrix nor the host.
//
// Entries are sorted by score, then by class (two stable radix sorts), so each class occupies a contiguous span of
// positions. A span is processed in chunks of 1024 boxes. Round r processes chunk r of every span in three launches:
//
// - suppress: compares the boxes of chunk r and of all later chunks with the boxes kept from chunk r - 1. Each thread
//   processes one box and stops at the first kept box that suppresses it. Kept boxes are broadcast to the threads. This
//   launch is bound by arithmetic: all rounds together compare about N/2 pairs per kept box.
// - mask: finds, for each box, the later boxes of the same chunk that it would suppress, and stores one bit per pair of
//   boxes. Each warp processes one box.
// - resolve: decides which boxes of each chunk are kept, in the order of descending score, with one block per chunk.
//   Each step decides which of 64 boxes are kept. The state of these boxes is stored as bits in registers. The step
//   then marks as suppressed all later boxes whose bits are set in the mask rows of the kept boxes. This launch is
//   bound by latency: 16 steps of about a microsecond.
//
// The host does not know the lengths of the spans, so it launches as many rounds as the longest possible span needs.

#include "suppression/cuda_entries.cuh"

namespace relops {

namespace {

constexpr int kChunk = 1024, kWords = kChunk / 64;
constexpr unsigned kMaxBlocks = 4096;  // limit for launches in which most positions are not part of the round

// Boxes and area bounds are in separate arrays, so a box is loaded with one or two 16-byte loads.
template <class Compute>
struct BoxArray {
  struct alignas(16) Aligned {
    Box<Compute> box;
  };
  Aligned* boxes;
  Compute* area_bounds;

  void allocate(Arena& arena, int64_t n) {
    arena.allocate(boxes, n);
    arena.allocate(area_bounds, n);
  }
  __device__ BoundedBox<Compute> get(int64_t i) const { return {boxes[i].box, area_bounds[i]}; }
  __device__ void set(int64_t i, const BoundedBox<Compute>& x) const {
    boxes[i].box = x.box;
    area_bounds[i] = x.area_bound;
  }
};

template <class Compute>
struct NmsParams {
  int64_t n;  // number of positions: B * K
  int B, K;
  int round;
  bool by_class;
  Compute threshold;

  const Compute* boxes;   // [n,4]
  const int32_t* ranked;  // [n]: entries by image, then by descending score; invalid entries are last in each image
  const int32_t* rank;    // [n]: index into `ranked` of each position; null without classes (then, it is the position)
  const int64_t* idxs;    // [n]: class of each entry
  const int64_t* class_of;   // [n]: class of each position
  Span* spans;               // [n]: span of each position; only with classes
  const int* longest;        // length of the longest span; only with classes
  BoxArray<Compute> sorted;  // [n]: box of each position
  BoxArray<Compute> kept;    // [n]: kept boxes of each chunk, beginning at its first position
  int32_t* kept_count;       // [n]: number of kept boxes of the chunk that begins at each position
  uint8_t* suppressed;       // [n]: whether the entry of each position is suppressed or invalid
  uint8_t* is_kept;          // [n]: whether entry ranked[i] is kept
  uint64_t* mask;            // [slots,kWords]: bit j of a box's row is set if the box would suppress box j of its chunk

  // The host launches enough rounds for the longest possible span. Rounds that no span needs do nothing.
  __device__ bool finished() const { return by_class && round * kChunk >= *longest; }
  __device__ Span span(int position) const {
    if (by_class) return spans[position];
    const int begin = position / K * K;
    return {begin, begin + K};
  }
  // Returns the index of the mask row of a position. Without classes, the host knows the chunks of a round, so the mask
  // has rows only for these chunks.
  __device__ int64_t slot(int position) const {
    return by_class ? position : int64_t{position / K} * min(K, kChunk) + (position - position / K * K) % kChunk;
  }
};

// The positions of a launch: `count` positions of each image, beginning with position `first` of the image.
struct PositionRange {
  int first, count;

  __device__ int position(int i, int K) const { return i / count * K + first + i % count; }
};

template <class Compute, class S>
__global__ __launch_bounds__(kEntryThreads) void nms_keys_kernel(int64_t n, const Compute* boxes, const S* scores,
                                                                 S score_threshold, ScoreKey<S>* keys,
                                                                 int32_t* values) {
  const int64_t i = thread_index();
  if (i >= n) return;
  const bool valid = is_valid(boxes + 4 * i, scores[i], score_threshold);
  keys[i] = valid ? score_key(scores[i]) : kInvalidKey<S>;
  values[i] = static_cast<int32_t>(i);
}

// Gathers the box and the class of each position.
template <class Compute, class S>
__global__ __launch_bounds__(kEntryThreads) void nms_gather_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                   const S* scores, S score_threshold,
                                                                   int64_t* class_of) {
  const int64_t i = thread_index();
  if (i >= p.n) return;
  const int64_t entry = p.ranked[p.by_class ? p.rank[i] : i];
  const Compute* box = p.boxes + 4 * entry;
  p.sorted.set(i, with_area_bound(Box<Compute>{box[0], box[1], box[2], box[3]}, p.threshold));
  p.suppressed[i] = !is_valid(box, scores[entry], score_threshold);
  p.is_kept[i] = 0;
  if (p.by_class) class_of[i] = p.idxs[entry];
}

template <class Compute>
__device__ __forceinline__ bool passes_filter(const BoundedBox<Compute>& a, const BoundedBox<Compute>& b) {
  return intersection(a.box, b.box) > a.area_bound + b.area_bound;
}

template <class Compute>
__global__ __launch_bounds__(kEntryThreads) void nms_suppress_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                     PositionRange range) {
  if (p.finished()) return;
  for (int64_t i = thread_index(); i < int64_t{p.B} * range.count; i += int64_t{gridDim.x} * blockDim.x) {
    const int position = range.position(i, p.K);
    const int chunk = p.span(position).begin + (p.round - 1) * kChunk;
    if (position < chunk + kChunk || p.suppressed[position]) continue;
    // Blocks that differ only in blockIdx.y divide the kept boxes among themselves.
    const unsigned count = p.kept_count[chunk];
    const int from = count * blockIdx.y / gridDim.y, to = count * (blockIdx.y + 1) / gridDim.y;
    const BoundedBox<Compute> own = p.sorted.get(position);
#pragma unroll 4
    for (int k = from; k < to; ++k) {
      const BoundedBox<Compute> kept = p.kept.get(chunk + k);
      if (passes_filter(kept, own) && suppresses(kept.box, own.box, p.threshold)) {
        p.suppressed[position] = 1;
        break;
      }
    }
  }
}

template <class Compute>
__global__ __launch_bounds__(kEntryThreads) void nms_mask_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                 PositionRange range) {
  if (p.finished()) return;
  const int lane = threadIdx.x % 32;
  for (int64_t i = thread_index() / 32; i < int64_t{p.B} * range.count; i += int64_t{gridDim.x} * (blockDim.x / 32)) {
    const int position = range.position(i, p.K);
    const Span span = p.span(position);
    const int chunk = span.begin + p.round * kChunk;
    if (position < chunk || position >= chunk + kChunk || p.suppressed[position]) continue;
    const int size = min(kChunk, span.end - chunk), row = position - chunk;
    const BoundedBox<Compute> own = p.sorted.get(position);
    uint64_t word = 0;  // lane w holds word w of the row
    for (int w = row / 64; 64 * w < size; ++w) {
      unsigned halves[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 64 * w + 32 * half + lane;
        bool hit = false;
        if (column > row && column < size) {
          const BoundedBox<Compute> other = p.sorted.get(chunk + column);
          hit = passes_filter(own, other) && suppresses(own.box, other.box, p.threshold);
        }
        halves[half] = __ballot_sync(kAll, hit);
      }
      if (lane == w) word = uint64_t{halves[1]} << 32 | halves[0];
    }
    if (lane < kWords) p.mask[p.slot(position) * kWords + lane] = word;
  }
}

// Returns the number of bits that are set before bit j of word w.
__device__ inline int bits_before(const uint64_t* words, int w, int j) {
  int bits = __popcll(words[w] & ((uint64_t{1} << j) - 1));
  for (int i = 0; i < w; ++i) bits += __popcll(words[i]);
  return bits;
}

template <class Compute>
__device__ void resolve_chunk(const NmsParams<Compute>& p, int chunk, int end, uint64_t* suppressed, uint64_t* kept) {
  const int size = min(kChunk, end - chunk), words = (size + 63) / 64;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint64_t* mask = p.mask + p.slot(chunk) * kWords;  // the rows of a chunk are contiguous
  for (int j = threadIdx.x; j < 64 * words; j += blockDim.x) {
    const unsigned bits = __ballot_sync(kAll, j >= size || p.suppressed[chunk + j]);
    if (lane == 0) reinterpret_cast<unsigned*>(suppressed)[j / 32] = bits;
  }
  __syncthreads();
  for (int w = 0; w < words; ++w) {
    uint64_t remaining = ~suppressed[w];
    const uint64_t low_lane = uint64_t{1} << lane, high_lane = low_lane << 32;
    // The mask rows of suppressed boxes are uninitialized, so they are not loaded.
    const auto load = [&](int row, int column) {
      const bool active = column < words && (remaining >> row & 1);
      return load_pack<uint64_t, 1>(mask + (64 * w + row) * kWords + column, active).x[0];
    };
    const int column = w + 1 + warp, second_column = column + warps;
    const uint64_t low_bits = load(lane, w), high_bits = load(lane + 32, w);
    const uint64_t low_word = load(lane, column), high_word = load(lane + 32, column);
    const uint64_t low_second_word = load(lane, second_column), high_second_word = load(lane + 32, second_column);

    // Every warp computes the same bits.
    uint64_t suppressors = __ballot_sync(kAll, (low_bits & remaining) != 0);
    suppressors |= uint64_t{__ballot_sync(kAll, (high_bits & remaining) != 0)} << 32;
    while (suppressors != 0) {
      const int j = __ffsll(static_cast<long long>(suppressors)) - 1;
      const uint64_t removed = __shfl_sync(kAll, j < 32 ? low_bits : high_bits, j % 32);
      remaining &= ~removed;
      suppressors &= ~removed & (suppressors - 1);
    }

    const auto suppress_word = [&](int index, uint64_t low_bits, uint64_t high_bits) {
      uint64_t removed = (remaining & low_lane ? low_bits : 0) | (remaining & high_lane ? high_bits : 0);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) removed |= __shfl_xor_sync(kAll, removed, distance);
      if (lane == 0) suppressed[index] |= removed;
    };
    if (column < words) suppress_word(column, low_word, high_word);
    if (second_column < words) suppress_word(second_column, low_second_word, high_second_word);
    if (threadIdx.x == 0) kept[w] = remaining;
    __syncthreads();
  }
  for (int j = threadIdx.x; j < size; j += blockDim.x) {
    if (!(kept[j / 64] >> (j % 64) & 1)) continue;
    const int position = chunk + j;
    p.is_kept[p.by_class ? p.rank[position] : position] = 1;
    if (chunk + size < end) p.kept.set(chunk + bits_before(kept, j / 64, j % 64), p.sorted.get(position));
  }
  if (threadIdx.x == 0)
    p.kept_count[chunk] = bits_before(kept, words - 1, 63) + static_cast<int>(kept[words - 1] >> 63);
}

constexpr int kResolveThreads = 256;
static_assert(2 * (kResolveThreads / 32) >= kWords - 1);

// A block has one position per thread and resolves the chunks that begin at one of these positions.
template <class Compute>
__global__ __launch_bounds__(kResolveThreads) void nms_resolve_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                      PositionRange range) {
  __shared__ uint64_t suppressed[kWords], kept[kWords];
  __shared__ Span chunks[kResolveThreads];
  __shared__ int num_chunks;
  if (p.finished()) return;
  if (threadIdx.x == 0) num_chunks = 0;
  __syncthreads();
  const int64_t i = thread_index();
  if (i < int64_t{p.B} * range.count) {
    const int position = range.position(i, p.K);
    const Span span = p.span(position);
    if (position == span.begin + p.round * kChunk) {
      if (position + 1 == span.end)  // the chunk is a single box
        p.is_kept[p.by_class ? p.rank[position] : position] = !p.suppressed[position];
      else
        chunks[atomicAdd(&num_chunks, 1)] = {position, span.end};
    }
  }
  __syncthreads();
  for (int c = 0; c < num_chunks; ++c) resolve_chunk(p, chunks[c].begin, chunks[c].end, suppressed, kept);
}

constexpr int kCompactThreads = 1024, kFlags = 4;

// Writes at most max_output kept entries of each image, in the order of `ranked`. Each block processes one image.
template <class Compute>
__global__ __launch_bounds__(kCompactThreads) void nms_compact_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                      int64_t max_output, int64_t* keep,
                                                                      int64_t* count) {
  __shared__ int sums[kCompactThreads / 32];
  const int64_t image = blockIdx.x, first = image * p.K;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t* out = keep + image * max_output;
  int64_t num_kept = 0;
  for (int base = 0; base < p.K && num_kept < max_output; base += kCompactThreads * kFlags) {
    const int begin = base + static_cast<int>(threadIdx.x) * kFlags;
    int flags = 0;
#pragma unroll
    for (int j = 0; j < kFlags; ++j)
      if (begin + j < p.K && p.is_kept[first + begin + j]) flags |= 1 << j;
    const int warp_sum = inclusive_sum(__popc(flags));
    if (lane == 31) sums[warp] = warp_sum;
    int before = warp_sum - __popc(flags);
    __syncthreads();
    int total = 0;
    for (int w = 0; w < kCompactThreads / 32; ++w) {
      if (w == warp) before += total;
      total += sums[w];
    }
#pragma unroll
    for (int j = 0; j < kFlags; ++j) {
      if (!(flags >> j & 1)) continue;
      if (num_kept + before < max_output) out[num_kept + before] = p.ranked[first + begin + j] - first;
      ++before;
    }
    num_kept += total;
    __syncthreads();
  }
  num_kept = num_kept < max_output ? num_kept : max_output;
  for (int64_t i = num_kept + threadIdx.x; i < max_output; i += blockDim.x) out[i] = -1;
  if (threadIdx.x == 0) count[image] = num_kept;
}

template <class Compute, class S>
Kept suppress(const NmsProblem& problem, int64_t max_output) {
  const Kept result(problem, max_output);
  const int64_t B = problem.B, K = problem.K, n = B * K;
  if (B == 0) return result;
  const cudaStream_t stream = current_stream(problem.boxes.get_device_index());
  const char* op = problem.op;
  const bool by_class = problem.idxs.has_value();
  const auto* scores = static_cast<const S*>(problem.scores.const_data_ptr());
  const S score_threshold = static_cast<S>(problem.score_threshold);

  NmsParams<Compute> p{};
  p.n = n;
  p.B = static_cast<int>(B);
  p.K = static_cast<int>(K);
  p.by_class = by_class;
  p.threshold = static_cast<Compute>(problem.iou_threshold);
  p.boxes = static_cast<const Compute*>(problem.boxes.const_data_ptr());
  SortBuffers<ScoreKey<S>> score_sort;
  SortBuffers<uint32_t> image_sort[2];
  SortBuffers<uint64_t> class_sort;
  int64_t* class_of = nullptr;
  int* longest = nullptr;
  const Tensor memory = allocate_memory(problem.boxes, [&](Arena& arena) {
    score_sort.allocate(arena, n);
    if (by_class) {
      class_sort.allocate(arena, n);
      arena.allocate(class_of, n);
      arena.allocate(p.spans, n);
      arena.allocate(longest, 1);
    }
    for (int i = 0; B > 1 && i < 1 + by_class; ++i) image_sort[i].allocate(arena, n);
    p.sorted.allocate(arena, n);
    p.kept.allocate(arena, n);
    arena.allocate(p.kept_count, n);
    arena.allocate(p.suppressed, n);
    arena.allocate(p.is_kept, n);
    arena.allocate(p.mask, (by_class ? n : B * std::min<int64_t>(K, kChunk)) * kWords);
  });
  const auto blocks = [op](int64_t threads) { return grid_size(op, ceil_div(threads, kEntryThreads)); };
  if (n > 0) {
    nms_keys_kernel<Compute, S><<<blocks(n), kEntryThreads, 0, stream>>>(n, p.boxes, scores, score_threshold,
                                                                         score_sort.keys, score_sort.values);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    score_sort.sort(n, 8 * sizeof(S), stream);
    p.ranked = B > 1 ? sort_by_image(problem, score_sort.order, image_sort[0], stream) : score_sort.order;
    if (by_class) {
      p.idxs = static_cast<const int64_t*>(problem.idxs->const_data_ptr());
      class_keys_kernel<<<blocks(n), kEntryThreads, 0, stream>>>(n, p.idxs, p.ranked, class_sort.keys,
                                                                 class_sort.values);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      class_sort.sort(n, 64, stream);
      p.rank = B > 1 ? sort_by_image(problem, class_sort.order, image_sort[1], stream) : class_sort.order;
    }
    nms_gather_kernel<Compute, S><<<blocks(n), kEntryThreads, 0, stream>>>(p, scores, score_threshold, class_of);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (by_class) {
      STD_CUDA_CHECK(cudaMemsetAsync(longest, 0, sizeof(int), stream));
      p.longest = longest;
      spans_kernel<<<blocks(n), kEntryThreads, 0, stream>>>(n, p.K, class_of, p.spans, longest);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  for (p.round = 0; int64_t{p.round} * kChunk < K && B > 0; ++p.round) {
    // Without classes, the host knows the positions of this round's chunks.
    const int first = by_class ? 0 : p.round * kChunk, rest = p.K - first;
    const PositionRange later{first, rest}, chunk{first, by_class ? rest : std::min(rest, kChunk)};
    if (p.round > 0) {
      // If there are few boxes, 8 blocks divide the kept boxes among themselves, because most of the device would
      // otherwise be idle.
      const dim3 grid(std::min(kMaxBlocks, blocks(B * later.count)), B * later.count < (1 << 16) ? 8 : 1);
      nms_suppress_kernel<Compute><<<grid, kEntryThreads, 0, stream>>>(p, later);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const unsigned warps = std::min(kMaxBlocks, blocks(32 * B * chunk.count));
    nms_mask_kernel<Compute><<<warps, kEntryThreads, 0, stream>>>(p, chunk);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    nms_resolve_kernel<Compute><<<blocks(B * chunk.count), kResolveThreads, 0, stream>>>(p, chunk);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  Tensor keep = result.keep, count = result.count;
  nms_compact_kernel<Compute><<<grid_size(op, B), kCompactThreads, 0, stream>>>(
      p, max_output, static_cast<int64_t*>(keep.mutable_data_ptr()), static_cast<int64_t*>(count.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Kept suppress_any(const NmsProblem& p, int64_t max_output) {
  const torch::stable::accelerator::DeviceGuard guard(p.boxes.get_device_index());
  std::optional<Kept> result;
  dispatch_boxes_and_scores(p, [&](auto c, auto s) {
    result = suppress<typename decltype(c)::type, typename decltype(s)::type>(p, max_output);
  });
  return *result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CUDA, m) { register_nms<&suppress_any, &read_count>(m); }

}  // namespace relops
