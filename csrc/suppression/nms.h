// nms, batched_nms and nms_padded: code that the CPU and CUDA kernels share. It contains the sort key of a score, the
// functions that implement the schemas of library.cpp, and NmsProblem, which describes a call of one of these ops and
// checks its arguments. soft_nms also uses the sort key and NmsProblem. An entry is a box with its score and its class.
//
// The checks keep the kernels from accessing memory outside of their tensors if torch.ops is called directly.
// relops/ops/_suppression.py raises the errors that are meant for users.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>

#include "common/boxes.h"
#include "common/tensors.h"

namespace relops {

// The type of the sort key of a score: an unsigned integer of the same width.
template <class S>
using ScoreKey = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;

// The sort key of an invalid entry. No score has this key.
template <class S>
constexpr ScoreKey<S> kInvalidKey = ~ScoreKey<S>{0};

// Returns the sort key of a score, which must not be NaN. Higher scores have lower keys. Equal scores, including 0 and
// -0, have equal keys.
template <class S>
RELOPS_HOST_DEVICE inline ScoreKey<S> score_key(S score) {
  constexpr ScoreKey<S> kSign = ScoreKey<S>{1} << (8 * sizeof(S) - 1);
  score += 0;  // -0 becomes 0
  ScoreKey<S> bits;
  memcpy(&bits, &score, sizeof(bits));
  return bits & kSign ? bits : bits ^ ~kSign;
}

// Returns whether an entry is valid: its coordinates must be finite, and its score must be above the threshold and not
// NaN. A threshold of NaN means that there is no threshold.
template <class Compute, class S>
RELOPS_HOST_DEVICE inline bool is_valid(const Compute* box, S score, S score_threshold) {
  for (int i = 0; i < 4; ++i)
    if (!(box[i] - box[i] == 0)) return false;
  return score == score && !(score <= score_threshold);
}

// A box and its area bound. If t is the IoU threshold, the area bound is t / (1 + t) times the area of the box, minus a
// margin for rounding errors of the bound and of intersections. Except for rounding, IoU > t is equivalent to
// intersection > t / (1 + t) (area_a + area_b). Therefore, if the intersection of two boxes is not larger than the sum
// of their area bounds, neither box suppresses the other. If the intersection is larger, suppresses() decides.
template <class Compute>
struct BoundedBox {
  Box<Compute> box;
  Compute area_bound;
};

template <class Compute>
RELOPS_HOST_DEVICE inline BoundedBox<Compute> with_area_bound(const Box<Compute>& box, Compute threshold) {
  constexpr double kMargin = 1 - 1.0 / (1 << 16);
  constexpr Compute kSmallest =
      sizeof(Compute) == 8 ? Compute(4.9406564584124654e-324) : Compute(1.4012984643248171e-45f);
  const Compute area_bound = static_cast<Compute>(threshold / (1.0 + threshold) * kMargin * area(box)) - kSmallest;
  return {box, larger(area_bound, Compute(0))};
}

// Returns whether the IoU of two boxes exceeds the threshold, so that either box, if kept, suppresses the other.
template <class Compute>
RELOPS_HOST_DEVICE inline bool suppresses(const Box<Compute>& a, const Box<Compute>& b, Compute threshold) {
  return iou(area(a), area(b), intersection(a, b)) > threshold;
}

struct NmsProblem {
  NmsProblem(const char* op, const Tensor& boxes_, const Tensor& scores_, const std::optional<Tensor>& idxs_,
             double iou_threshold, double score_threshold = NAN)
      : op(op), iou_threshold(iou_threshold), score_threshold(score_threshold) {
    batched = boxes_.dim() == 3;
    STD_TORCH_CHECK((batched || boxes_.dim() == 2) && boxes_.size(-1) == 4, op, ": boxes must be [K,4] or [B,K,4]");
    B = batched ? boxes_.size(0) : 1;
    K = boxes_.size(-2);
    STD_TORCH_CHECK(B * K < std::numeric_limits<int32_t>::max(), op, ": boxes must contain fewer than 2^31 - 1 boxes");
    check_wide("boxes", boxes_);
    check_wide("scores", scores_);
    check_entries("scores", scores_);
    boxes = dense(boxes_);
    scores = dense(scores_);
    if (idxs_) {
      STD_TORCH_CHECK(idxs_->scalar_type() == ScalarType::Long, op, ": idxs must be int64");
      check_entries("idxs", *idxs_);
      idxs = dense(*idxs_);
    }
    STD_TORCH_CHECK(iou_threshold >= 0 && iou_threshold <= 1, op, ": iou_threshold must be in [0, 1]");
  }

  void check_wide(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.scalar_type() == compute_dtype(tensor.scalar_type()), op, ": ", name,
                    " must be float32 or float64");
  }

  void check_entries(const char* name, const Tensor& tensor) const {
    if (batched)
      check_shape(op, name, tensor, {B, K});
    else
      check_shape(op, name, tensor, {K});
  }

  const char* op;
  double iou_threshold;
  double score_threshold;  // NaN if there is no threshold
  bool batched;
  int64_t B, K;
  Tensor boxes, scores;        // [B,K,4] and [B,K], or [K,4] and [K] if not batched
  std::optional<Tensor> idxs;  // [B,K], or [K] if not batched
};

struct Kept {
  Kept(const NmsProblem& p, int64_t max_output)
      : keep(p.batched ? new_int64(p.boxes, {p.B, max_output}) : new_int64(p.boxes, {max_output})),
        count(p.batched ? new_int64(p.boxes, {p.B}) : new_int64(p.boxes, {})) {}

  static Tensor new_int64(const Tensor& like, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(like, shape, ScalarType::Long);
  }

  Tensor keep;   // [B,max_output]: for each image, the indices of the kept entries, padded with -1
  Tensor count;  // [B]: for each image, the number of kept entries
};

// Calls f(Type<Compute>{}, Type<S>{}) for boxes of type Compute and scores of type S.
template <class F>
void dispatch_boxes_and_scores(const NmsProblem& p, F f) {
  const bool wide_scores = p.scores.scalar_type() == ScalarType::Double;
  if (p.boxes.scalar_type() == ScalarType::Double)
    wide_scores ? f(Type<double>{}, Type<double>{}) : f(Type<double>{}, Type<float>{});
  else
    wide_scores ? f(Type<float>{}, Type<double>{}) : f(Type<float>{}, Type<float>{});
}

// The functions that implement the schemas of library.cpp. They call two functions, which every device defines:
//   Kept suppress(const NmsProblem&, int64_t max_output) and
//   int64_t read(const Tensor& count), which waits for the device.
template <auto kSuppress, auto kRead>
struct NmsOps {
  static Tensor trimmed(const NmsProblem& p) {
    STD_TORCH_CHECK(!p.batched, p.op, ": boxes must be [K,4]");
    const Kept kept = kSuppress(p, p.K);
    Tensor keep = kept.keep;
    return torch::stable::narrow(keep, 0, 0, kRead(kept.count));
  }

  static Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
    return trimmed({"relops.nms", boxes, scores, std::nullopt, iou_threshold});
  }

  static Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
    return trimmed({"relops.batched_nms", boxes, scores, idxs, iou_threshold});
  }

  static std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                                               int64_t max_output, std::optional<Tensor> idxs,
                                               std::optional<double> score_threshold) {
    const NmsProblem p("relops.nms_padded", boxes, scores, idxs, iou_threshold, score_threshold.value_or(NAN));
    STD_TORCH_CHECK(max_output >= 0, p.op, ": max_output must not be negative");
    const Kept kept = kSuppress(p, max_output);
    return {kept.keep, kept.count};
  }
};

template <auto kSuppress, auto kRead>
void register_nms(auto& m) {
  using Ops = NmsOps<kSuppress, kRead>;
  m.impl("nms", TORCH_BOX(&Ops::nms));
  m.impl("batched_nms", TORCH_BOX(&Ops::batched_nms));
  m.impl("nms_padded", TORCH_BOX(&Ops::nms_padded));
}

}  // namespace relops
