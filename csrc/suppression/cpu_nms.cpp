// nms, batched_nms and nms_padded on the CPU: this file sorts entries by score and class, and writes the kept entries
// in the order of descending score. cpu_nms_kernel.h compares the boxes.
//
// If multiplications were fused with additions, the IoU would differ from that on other processors and on CUDA.
#pragma GCC optimize("fp-contract=off")

#include "suppression/cpu_nms_args.h"
#include "suppression/cpu_order.h"

#define RELOPS_KERNEL "suppression/cpu_nms_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

// Ranks the valid entries by descending score. Entries with equal scores are ranked by index. Returns the number of
// valid entries.
template <class Compute, class S>
int64_t rank(const Compute* boxes, const S* scores, int64_t K, S score_threshold, uint32_t* ranked) {
  Scratch scratch;
  auto* entries = scratch.allocate<Entry<ScoreKey<S>>>(K);
  int64_t n = 0;
  for (int64_t k = 0; k < K; ++k)
    if (is_valid(boxes + 4 * k, scores[k], score_threshold))
      entries[n++] = {score_key(scores[k]), static_cast<uint32_t>(k)};
  const auto* sorted = sort_by_key(entries, scratch.allocate<Entry<ScoreKey<S>>>(n), n);
  for (int64_t i = 0; i < n; ++i) ranked[i] = sorted[i].index;
  return n;
}

template <class Compute, class S>
Kept suppress(const NmsProblem& p, int64_t max_output) {
  Kept result(p, max_output);
  const int64_t B = p.B, K = p.K;
  const auto* boxes = static_cast<const Compute*>(p.boxes.const_data_ptr());
  const auto* scores = static_cast<const S*>(p.scores.const_data_ptr());
  const auto* idxs = p.idxs ? static_cast<const int64_t*>(p.idxs->const_data_ptr()) : nullptr;
  const Compute threshold = static_cast<Compute>(p.iou_threshold);

  // In each array below, the n[b] elements that begin at b * K are the valid entries of image b.
  std::vector<int64_t> n(B);
  std::vector<std::vector<Range>> ranges(B);
  Scratch scratch;
  auto* ranked = scratch.allocate<uint32_t>(B * K);
  auto* grouped = idxs ? scratch.allocate<uint32_t>(B * K) : ranked;  // by class, and then by score
  auto* sorted = scratch.allocate<BoundedBox<Compute>>(B * K);        // in the order of `grouped`
  auto* kept = scratch.allocate<uint8_t>(B * K);                      // in the order of `grouped`
  for_each_item(B, threads_for(B * (3e3 + (idxs ? 30.0 : 15.0) * K)), [&] {
    return [&](int64_t b) {
      const int64_t first = b * K;
      n[b] = rank(boxes + 4 * first, scores + first, K, static_cast<S>(p.score_threshold), ranked + first);
      if (idxs) std::copy_n(ranked + first, n[b], grouped + first);
      ranges[b] = group_by_class(idxs ? idxs + first : nullptr, grouped + first, n[b]);
      for (int64_t i = first; i < first + n[b]; ++i) {
        const Compute* box = boxes + 4 * (first + grouped[i]);
        sorted[i] = with_area_bound(Box<Compute>{box[0], box[1], box[2], box[3]}, threshold);
        kept[i] = 0;
      }
    };
  });
  std::vector<Range> classes;
  for (int64_t b = 0; b < B; ++b)
    for (const auto& [begin, end] : ranges[b]) classes.push_back({b * K + begin, b * K + end});
  const NmsArgs<Compute> args{sorted,    classes.data(), static_cast<int64_t>(classes.size()),
                              threshold, max_output,     kept};
  RELOPS_CALL_ISA(suppress_classes, args);

  auto* keep = static_cast<int64_t*>(result.keep.mutable_data_ptr());
  auto* count = static_cast<int64_t*>(result.count.mutable_data_ptr());
  std::vector<uint8_t> kept_by_index(K);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = b * K; i < b * K + n[b]; ++i) kept_by_index[grouped[i]] = kept[i];
    int64_t* out = keep + b * max_output;
    int64_t num_kept = 0;
    for (int64_t i = b * K; i < b * K + n[b] && num_kept < max_output; ++i)
      if (kept_by_index[ranked[i]]) out[num_kept++] = ranked[i];
    std::fill(out + num_kept, out + max_output, -1);
    count[b] = num_kept;
  }
  return result;
}

Kept suppress_any(const NmsProblem& p, int64_t max_output) {
  std::optional<Kept> result;
  dispatch_boxes_and_scores(p, [&](auto c, auto s) {
    result = suppress<typename decltype(c)::type, typename decltype(s)::type>(p, max_output);
  });
  return *result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_nms<&suppress_any, &read_count>(m); }

}  // namespace relops
