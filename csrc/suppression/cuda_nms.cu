// nms, batched_nms and nms_padded on CUDA: greedy suppression without the N x N matrix of bits and without the host.
//
// Entries are sorted by score, then by class (two stable radix sorts), so that a class is a span of places. A span is
// worked on in chunks of 1024 boxes, chunk r of every span in round r, three launches each:
//
// - suppress: every box of the later chunks against the boxes that chunk r - 1 kept, a thread a box, the kept boxes
//   broadcast; it ends at the first that suppresses it. Bound by arithmetic: all of N x kept / 2 pairs is here.
// - mask: which later boxes of its chunk each box would suppress, a bit each, a warp a box.
// - resolve: a block a chunk goes through the greedy order, 64 boxes at a time: within them by bits in registers, then
//   the rows of those kept strike out later boxes. Bound by latency: 16 steps of about a microsecond.
//
// The number of rounds is that of the longest span there may be, as the host does not know the spans.

#include "suppression/cuda_entries.cuh"

namespace relops {

namespace {

constexpr int kChunk = 1024, kWords = kChunk / 64;
constexpr unsigned kMostBlocks = 4096;  // of a launch whose places most often are none of the round's

// Apart, so that a box is one load of 16 bytes, or two.
template <class Compute>
struct BoxArray {
  struct alignas(16) Aligned {
    Box<Compute> box;
  };
  Aligned* boxes;
  Compute* shares;

  void place(Placement& placement, int64_t n) {
    placement.take(boxes, n);
    placement.take(shares, n);
  }
  __device__ SharedBox<Compute> get(int64_t i) const { return {boxes[i].box, shares[i]}; }
  __device__ void set(int64_t i, const SharedBox<Compute>& x) const {
    boxes[i].box = x.box;
    shares[i] = x.share;
  }
};

template <class Compute>
struct NmsParams {
  int64_t n;  // places: B * K
  int B, K;
  int round;
  bool classes;
  Compute threshold;

  const Compute* boxes;      // [n,4]
  const int32_t* ranked;     // [n]: entries by image and descending score; those that do not count come last
  const int32_t* rank;       // [n]: by place, where in `ranked` it is; null without classes, where it is the place
  const int64_t* idxs;       // [n]: by entry
  const int64_t* class_of;   // [n]: by place
  Span* spans;               // [n]: by place; with classes only
  const int* longest;        // of the spans; with classes only
  BoxArray<Compute> sorted;  // [n]: by place
  BoxArray<Compute> kept;    // [n]: those a chunk keeps, from the chunk's first place on
  int32_t* kept_count;       // [n]: of the chunk that begins at the place
  uint8_t* gone;             // [n]: by place: suppressed, or does not count
  uint8_t* keeps;            // [n]: by rank
  uint64_t* mask;            // [slots,kWords]: bit j of the row of a box: it would suppress box j of its chunk

  // The host launches as many rounds as there may be.
  __device__ bool over() const { return classes && round * kChunk >= *longest; }
  __device__ Span span(int place) const {
    if (classes) return spans[place];
    const int begin = place / K * K;
    return {begin, begin + K};
  }
  // The row of the mask: without classes the chunks of a round are known, and other places need none.
  __device__ int64_t slot(int place) const {
    return classes ? place : int64_t{place / K} * min(K, kChunk) + (place - place / K * K) % kChunk;
  }
};

// Where the places of a launch are: from `first` on `count` of each image.
struct Part {
  int first, count;

  __device__ int place(int64_t i, int K) const {
    const int image = static_cast<int>(i / count);
    return image * K + first + static_cast<int>(i - int64_t{image} * count);
  }
};

template <class Compute, class S>
__global__ __launch_bounds__(kEntryThreads) void nms_keys_kernel(int64_t n, const Compute* boxes, const S* scores,
                                                                 S score_threshold, ScoreKey<S>* keys,
                                                                 int32_t* values) {
  const int64_t i = thread_number();
  if (i >= n) return;
  const bool there = counts(boxes + 4 * i, scores[i], score_threshold);
  keys[i] = there ? score_key(scores[i]) : kNoKey<S>;
  values[i] = static_cast<int32_t>(i);
}

// Fetches the boxes of the places, and their classes.
template <class Compute, class S>
__global__ __launch_bounds__(kEntryThreads) void nms_gather_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                   const S* scores, S score_threshold,
                                                                   int64_t* class_of) {
  const int64_t i = thread_number();
  if (i >= p.n) return;
  const int64_t entry = p.ranked[p.classes ? p.rank[i] : i];
  const Compute* box = p.boxes + 4 * entry;
  p.sorted.set(i, with_share(Box<Compute>{box[0], box[1], box[2], box[3]}, p.threshold));
  p.gone[i] = !counts(box, scores[entry], score_threshold);
  p.keeps[i] = 0;
  if (p.classes) class_of[i] = p.idxs[entry];
}

template <class Compute>
__device__ __forceinline__ bool passes(const SharedBox<Compute>& a, const SharedBox<Compute>& b) {
  return intersection(a.box, b.box) > a.share + b.share;
}

template <class Compute>
__global__ __launch_bounds__(kEntryThreads) void nms_suppress_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                     Part part) {
  if (p.over()) return;
  for (int64_t i = thread_number(); i < int64_t{p.B} * part.count; i += int64_t{gridDim.x} * blockDim.x) {
    const int place = part.place(i, p.K);
    const int chunk = p.span(place).begin + (p.round - 1) * kChunk;
    if (place < chunk + kChunk || p.gone[place]) continue;
    // The blocks of a column share the kept boxes.
    const int64_t count = p.kept_count[chunk];
    const int from = static_cast<int>(count * blockIdx.y / gridDim.y);
    const int to = static_cast<int>(count * (blockIdx.y + 1) / gridDim.y);
    const SharedBox<Compute> mine = p.sorted.get(place);
#pragma unroll 4
    for (int k = from; k < to; ++k) {
      const SharedBox<Compute> kept = p.kept.get(chunk + k);
      if (passes(kept, mine) && suppresses(kept.box, mine.box, p.threshold)) {
        p.gone[place] = 1;
        break;
      }
    }
  }
}

template <class Compute>
__global__ __launch_bounds__(kEntryThreads) void nms_mask_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                 Part part) {
  if (p.over()) return;
  const int lane = threadIdx.x % 32;
  for (int64_t i = thread_number() / 32; i < int64_t{p.B} * part.count; i += int64_t{gridDim.x} * (blockDim.x / 32)) {
    const int place = part.place(i, p.K);
    const Span span = p.span(place);
    const int chunk = span.begin + p.round * kChunk;
    if (place < chunk || place >= chunk + kChunk || p.gone[place]) continue;
    const int size = min(kChunk, span.end - chunk), row = place - chunk;
    const SharedBox<Compute> mine = p.sorted.get(place);
    uint64_t word = 0;  // of which lane w keeps word w
    for (int w = row / 64; 64 * w < size; ++w) {
      unsigned halves[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 64 * w + 32 * half + lane;
        bool hit = false;
        if (column > row && column < size) {
          const SharedBox<Compute> other = p.sorted.get(chunk + column);
          hit = passes(mine, other) && suppresses(mine.box, other.box, p.threshold);
        }
        halves[half] = __ballot_sync(kAll, hit);
      }
      if (lane == w) word = uint64_t{halves[1]} << 32 | halves[0];
    }
    if (lane < kWords) p.mask[p.slot(place) * kWords + lane] = word;
  }
}

// The bits of `count` boxes that the words have before bit j of word w.
__device__ inline int bits_before(const uint64_t* words, int w, int j) {
  int bits = __popcll(words[w] & ((uint64_t{1} << j) - 1));
  for (int i = 0; i < w; ++i) bits += __popcll(words[i]);
  return bits;
}

template <class Compute>
__device__ void resolve_chunk(const NmsParams<Compute>& p, int chunk, int end, uint64_t* gone, uint64_t* kept) {
  const int size = min(kChunk, end - chunk), words = (size + 63) / 64;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int j = threadIdx.x; j < 64 * words; j += blockDim.x) {
    const unsigned bits = __ballot_sync(kAll, j >= size || p.gone[chunk + j]);
    if (lane == 0) reinterpret_cast<unsigned*>(gone)[j / 32] = bits;
  }
  __syncthreads();
  for (int w = 0; w < words; ++w) {
    // The rows of boxes that are gone were not written; what is read there is not used.
    const int low = 64 * w + lane, high = low + 32;
    const uint64_t* low_row = p.mask + p.slot(chunk + min(low, size - 1)) * kWords;
    const uint64_t* high_row = p.mask + p.slot(chunk + min(high, size - 1)) * kWords;
    const uint64_t low_bits = low_row[w], high_bits = high_row[w];
    const int column = w + 1 + warp, further = column + warps;
    uint64_t low_column = 0, high_column = 0, low_further = 0, high_further = 0;
    if (column < words) low_column = low_row[column], high_column = high_row[column];
    if (further < words) low_further = low_row[further], high_further = high_row[further];

    // Every warp finds the same.
    uint64_t left = ~gone[w];
    const uint64_t low_lane = uint64_t{1} << lane, high_lane = low_lane << 32;
    uint64_t busy = __ballot_sync(kAll, (left & low_lane) && (low_bits & left));
    busy |= uint64_t{__ballot_sync(kAll, (left & high_lane) && (high_bits & left))} << 32;
    while (busy != 0) {
      const int j = __ffsll(static_cast<long long>(busy)) - 1;
      const uint64_t struck = __shfl_sync(kAll, j < 32 ? low_bits : high_bits, j % 32);
      left &= ~struck;
      busy &= ~struck & (busy - 1);
    }

    const auto strike = [&](int at, uint64_t low_word, uint64_t high_word) {
      uint64_t struck = (left & low_lane ? low_word : 0) | (left & high_lane ? high_word : 0);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) struck |= __shfl_xor_sync(kAll, struck, distance);
      if (lane == 0) gone[at] |= struck;
    };
    if (column < words) strike(column, low_column, high_column);
    if (further < words) strike(further, low_further, high_further);
    if (threadIdx.x == 0) kept[w] = left;
    __syncthreads();
  }
  for (int j = threadIdx.x; j < size; j += blockDim.x) {
    if (!(kept[j / 64] >> (j % 64) & 1)) continue;
    const int place = chunk + j;
    p.keeps[p.classes ? p.rank[place] : place] = 1;
    if (chunk + size < end) p.kept.set(chunk + bits_before(kept, j / 64, j % 64), p.sorted.get(place));
  }
  if (threadIdx.x == 0)
    p.kept_count[chunk] = bits_before(kept, words - 1, 63) + static_cast<int>(kept[words - 1] >> 63);
}

constexpr int kResolveThreads = 256;
static_assert(2 * (kResolveThreads / 32) >= kWords - 1);

// A block looks through as many places as it has threads for the first ones of chunks.
template <class Compute>
__global__ __launch_bounds__(kResolveThreads) void nms_resolve_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                      Part part) {
  __shared__ uint64_t gone[kWords], kept[kWords];
  __shared__ Span chunks[kResolveThreads];
  __shared__ int found;
  if (p.over()) return;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const int64_t i = thread_number();
  if (i < int64_t{p.B} * part.count) {
    const int place = part.place(i, p.K);
    const Span span = p.span(place);
    if (place == span.begin + p.round * kChunk) {
      if (place + 1 == span.end)  // on its own
        p.keeps[p.classes ? p.rank[place] : place] = !p.gone[place];
      else
        chunks[atomicAdd(&found, 1)] = {place, span.end};
    }
  }
  __syncthreads();
  for (int c = 0; c < found; ++c) resolve_chunk(p, chunks[c].begin, chunks[c].end, gone, kept);
}

constexpr int kCompactThreads = 1024, kFlags = 4;

// A block an image: the entries kept, by rank, until there are `most`.
template <class Compute>
__global__ __launch_bounds__(kCompactThreads) void nms_compact_kernel(const __grid_constant__ NmsParams<Compute> p,
                                                                      int64_t most, int64_t* keep, int64_t* count) {
  __shared__ int sums[kCompactThreads / 32];
  const int64_t image = blockIdx.x, first = image * p.K;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t* out = keep + image * most;
  int64_t found = 0;
  for (int base = 0; base < p.K && found < most; base += kCompactThreads * kFlags) {
    const int mine = base + static_cast<int>(threadIdx.x) * kFlags;
    int flags = 0;
#pragma unroll
    for (int j = 0; j < kFlags; ++j)
      if (mine + j < p.K && p.keeps[first + mine + j]) flags |= 1 << j;
    int before = __popc(flags);  // at first, up to and with this thread's
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_sync(kAll, before, max(lane - distance, 0));
      if (lane >= distance) before += other;
    }
    if (lane == 31) sums[warp] = before;
    before -= __popc(flags);
    __syncthreads();
    int total = 0;
    for (int w = 0; w < kCompactThreads / 32; ++w) {
      if (w == warp) before += total;
      total += sums[w];
    }
#pragma unroll
    for (int j = 0; j < kFlags; ++j) {
      if (!(flags >> j & 1)) continue;
      if (found + before < most) out[found + before] = p.ranked[first + mine + j] - first;
      ++before;
    }
    found += total;
    __syncthreads();
  }
  found = found < most ? found : most;
  for (int64_t i = found + threadIdx.x; i < most; i += blockDim.x) out[i] = -1;
  if (threadIdx.x == 0) count[image] = found;
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
  p.classes = by_class;
  p.threshold = static_cast<Compute>(problem.iou_threshold);
  p.boxes = static_cast<const Compute*>(problem.boxes.const_data_ptr());
  SortBuffers<ScoreKey<S>> scored;
  SortBuffers<uint32_t> imaged[2];
  SortBuffers<uint64_t> classed;
  int64_t* class_of = nullptr;
  int* longest = nullptr;
  const Tensor memory = allocate(problem.boxes, [&](Placement& placement) {
    scored.place(placement, n);
    if (by_class) {
      classed.place(placement, n);
      placement.take(class_of, n);
      placement.take(p.spans, n);
      placement.take(longest, 1);
    }
    for (int i = 0; B > 1 && i < 1 + by_class; ++i) imaged[i].place(placement, n);
    p.sorted.place(placement, n);
    p.kept.place(placement, n);
    placement.take(p.kept_count, n);
    placement.take(p.gone, n);
    placement.take(p.keeps, n);
    placement.take(p.mask, (by_class ? n : B * std::min<int64_t>(K, kChunk)) * kWords);
  });
  const auto blocks = [op](int64_t threads) { return grid_size(op, ceil_div(threads, kEntryThreads)); };
  if (n > 0) {
    nms_keys_kernel<Compute, S>
        <<<blocks(n), kEntryThreads, 0, stream>>>(n, p.boxes, scores, score_threshold, scored.keys, scored.values);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    scored.sort(n, 8 * sizeof(S), stream);
    p.ranked = B > 1 ? by_image(problem, scored.order, imaged[0], stream) : scored.order;
    if (by_class) {
      p.idxs = static_cast<const int64_t*>(problem.idxs->const_data_ptr());
      class_keys_kernel<<<blocks(n), kEntryThreads, 0, stream>>>(n, p.idxs, p.ranked, classed.keys, classed.values);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      classed.sort(n, 64, stream);
      p.rank = B > 1 ? by_image(problem, classed.order, imaged[1], stream) : classed.order;
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
    // Without classes it is known where the chunks of the round are.
    const int first = by_class ? 0 : p.round * kChunk, rest = p.K - first;
    const Part later{first, rest}, chunk{first, by_class ? rest : std::min(rest, kChunk)};
    if (p.round > 0) {
      // Few boxes would leave most of the device idle.
      const dim3 grid(std::min(kMostBlocks, blocks(B * later.count)), B * later.count < (1 << 16) ? 8 : 1);
      nms_suppress_kernel<Compute><<<grid, kEntryThreads, 0, stream>>>(p, later);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const unsigned warps = std::min(kMostBlocks, blocks(32 * B * chunk.count));
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
