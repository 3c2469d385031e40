// soft_nms: code that the CPU and CUDA kernels share. It contains the function that implements the schema of
// library.cpp, its argument checks, and the factor by which a score decays.
#pragma once

#include "suppression/nms.h"

namespace relops {

// Returns e^x for x <= 0 with an error of about 1 unit in the last place, or 0 if e^x is below the normal range. F is
// Compute or a vector of Compute, and I is the integer or vector of integers of the same size. Unlike the exponential
// functions of math libraries, this function returns the same bits on every device.
template <class Compute, class I, class F>
RELOPS_HOST_DEVICE_INLINE F exp_of_nonpositive(F x) {
  constexpr bool kDouble = sizeof(Compute) == 8;
  constexpr int kMantissa = kDouble ? 52 : 23, kTerms = kDouble ? 13 : 7;
  constexpr Compute kLowest = kDouble ? -708 : -87;
  using Int = std::conditional_t<kDouble, int64_t, int32_t>;
  constexpr Int kOne = Int{kDouble ? 1023 : 127} << kMantissa;  // the bits of 1
  constexpr Compute kShift = static_cast<Compute>(Int{3} << (kMantissa - 1));
  // ln 2 is split into two parts. The high part ends in zero bits, so that its product with n is exact.
  constexpr Compute kLn2High = static_cast<Compute>(kDouble ? 0x1.62e42feep-1 : 0x1.62e4p-1);
  constexpr Compute kLn2Low = static_cast<Compute>(kDouble ? 0x1.a39ef35793c76p-33 : 0x1.7f7d1cf79abcap-20);
  const F none{}, one = none + Compute(1);
  const auto under = x < kLowest;
  x = under ? none : x;
  // Adding 1.5 * 2^m, where m is the number of mantissa bits, rounds to an integer n and leaves it in the low bits.
  const F shifted = product(x, none + Compute(1.44269504088896340736)) + kShift, n = shifted - kShift;
  const F r = (x - product(n, none + kLn2High)) - product(n, none + kLn2Low);
  F sum = one;  // 1 + r (1 + r / 2 (1 + r / 3 (..)))
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = kTerms; i > 0; --i) sum = one + product(product(sum, r), none + Compute(1) / Compute(i));
  I bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << kMantissa) + kOne;
  F power;
  memcpy(&power, &bits, sizeof(bits));
  return under ? none : product(sum, power);
}

// Computes the factor by which the score of an entry decays, given the IoU of the entry with a kept entry.
template <class Compute>
struct Decay {
  bool gaussian;
  Compute iou_threshold, sigma, score_threshold;

  template <class I, class F>
  RELOPS_HOST_DEVICE_INLINE F factor(F iou) const {
    const F none{}, one = none + Compute(1);
    // The IoU is NaN if areas exceed the range of Compute. The factor is then 1.
    if (gaussian) return iou > none ? exp_of_nonpositive<Compute, I>(-product(iou, iou) / sigma) : one;
    return iou > iou_threshold ? one - iou : one;
  }
};

struct SoftNmsProblem : NmsProblem {
  SoftNmsProblem(const Tensor& boxes, const Tensor& scores, const std::string& method, double iou_threshold,
                 double sigma, double score_threshold, const std::optional<Tensor>& idxs)
      : NmsProblem("relops.soft_nms", boxes, scores, idxs, iou_threshold, score_threshold),
        gaussian(method == "gaussian"),
        sigma(sigma) {
    STD_TORCH_CHECK(boxes.scalar_type() == scores.scalar_type(), op, ": boxes and scores must have the same dtype");
    STD_TORCH_CHECK(gaussian || method == "linear", op, ": method must be gaussian or linear");
    STD_TORCH_CHECK(sigma > 0 && std::isfinite(sigma), op, ": sigma must be positive");
    STD_TORCH_CHECK(score_threshold >= 0 && std::isfinite(score_threshold), op,
                    ": score_threshold must not be negative");
  }

  template <class Compute>
  Decay<Compute> decay() const {
    return {gaussian, static_cast<Compute>(iou_threshold), static_cast<Compute>(sigma),
            static_cast<Compute>(score_threshold)};
  }

  bool gaussian;
  double sigma;
};

// keep and count are as in Kept, with max_output = K. scores [B,K] has the scores of the kept entries, padded with
// zeros.
struct SoftKept : Kept {
  explicit SoftKept(const NmsProblem& p) : Kept(p, p.K), scores(torch::stable::empty_like(p.scores)) {}

  Tensor scores;
};

// The function that implements the schema of library.cpp. It calls two functions, which every device defines:
//   SoftKept suppress(const SoftNmsProblem&) and
//   int64_t read(const Tensor& count), which waits for the device.
template <auto kSuppress, auto kRead>
struct SoftNmsOp {
  static std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, std::string method,
                                             double iou_threshold, double sigma, double score_threshold,
                                             std::optional<Tensor> idxs) {
    const SoftNmsProblem p(boxes, scores, method, iou_threshold, sigma, score_threshold, idxs);
    SoftKept kept = kSuppress(p);
    if (p.batched) return {kept.keep, kept.scores};
    const int64_t count = kRead(kept.count);
    return {torch::stable::narrow(kept.keep, 0, 0, count), torch::stable::narrow(kept.scores, 0, 0, count)};
  }
};

template <auto kSuppress, auto kRead>
void register_soft_nms(auto& m) {
  using Op = SoftNmsOp<kSuppress, kRead>;
  m.impl("soft_nms", TORCH_BOX(&Op::soft_nms));
}

}  // namespace relops
