// soft_nms on the CPU: this file groups entries by class and sorts the kept entries by score. cpu_soft_nms_kernel.h
// computes the decay of the scores.
//
// If multiplications were fused with additions, the scores would differ from those on other processors and on CUDA.
#pragma GCC optimize("fp-contract=off")

#include "suppression/cpu_order.h"
#include "suppression/cpu_soft_nms_args.h"

#define RELOPS_KERNEL "suppression/cpu_soft_nms_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

template <class Compute>
SoftKept suppress(const SoftNmsProblem& p) {
  SoftKept result(p);
  const int64_t B = p.B, K = p.K;
  const auto* boxes = static_cast<const Compute*>(p.boxes.const_data_ptr());
  const auto* scores = static_cast<const Compute*>(p.scores.const_data_ptr());
  const auto* idxs = p.idxs ? static_cast<const int64_t*>(p.idxs->const_data_ptr()) : nullptr;

  Scratch scratch;
  auto* indices = scratch.allocate<uint32_t>(B * K);
  auto* decayed = scratch.allocate<Compute>(B * K);
  std::fill_n(decayed, B * K, Compute(0));
  std::vector<ClassOfImage> classes;
  for (int64_t b = 0; b < B; ++b) {
    int64_t n = 0;
    for (int64_t k = 0; k < K; ++k)
      if (is_valid(boxes + 4 * (b * K + k), scores[b * K + k], static_cast<Compute>(p.score_threshold)))
        indices[b * K + n++] = static_cast<uint32_t>(k);
    for (const auto& [begin, end] : group_by_class(idxs ? idxs + b * K : nullptr, indices + b * K, n))
      classes.push_back({b, b * K + begin, b * K + end});
  }
  const SoftNmsArgs<Compute> args{
      p.decay<Compute>(), K, boxes, scores, indices, classes.data(), static_cast<int64_t>(classes.size()), decayed};
  RELOPS_CALL_ISA(decay_classes, args);

  auto* keep = static_cast<int64_t*>(result.keep.mutable_data_ptr());
  auto* count = static_cast<int64_t*>(result.count.mutable_data_ptr());
  auto* kept_scores = static_cast<Compute*>(result.scores.mutable_data_ptr());
  auto* entries = scratch.allocate<Entry<ScoreKey<Compute>>>(K);
  auto* other = scratch.allocate<Entry<ScoreKey<Compute>>>(K);
  for (int64_t b = 0; b < B; ++b) {
    int64_t n = 0;
    for (int64_t k = 0; k < K; ++k)
      if (decayed[b * K + k] != 0) entries[n++] = {score_key(decayed[b * K + k]), static_cast<uint32_t>(k)};
    const auto* sorted = sort_by_key(entries, other, n);
    for (int64_t i = 0; i < K; ++i) {
      keep[b * K + i] = i < n ? int64_t{sorted[i].index} : -1;
      kept_scores[b * K + i] = i < n ? decayed[b * K + sorted[i].index] : 0;
    }
    count[b] = n;
  }
  return result;
}

SoftKept suppress_any(const SoftNmsProblem& p) {
  return p.boxes.scalar_type() == ScalarType::Double ? suppress<double>(p) : suppress<float>(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_soft_nms<&suppress_any, &read_count>(m); }

}  // namespace relops
