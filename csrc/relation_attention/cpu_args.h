// relation_attention on the CPU: the arguments of the kernels in addition to RelationAttentionArgs (problem.h), and the
// division of their work.
#pragma once

#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/cpu/work.h"
#include "relation_attention/problem.h"

namespace relops {

// The largest number of queries in a block, a multiple of the six rows of a panel.
constexpr int64_t kForwardBlock = 36, kBackwardBlock = 24;

// The limit on the memory per thread for packed keys. Without a limit, the packed keys of a large batch would need so
// much new memory that page faults would cost more than the packing.
constexpr int64_t kPackedBytes = 2 << 20;

// Returns the number of parts into which each of N images is divided: the smallest number from min_parts to max_parts
// that keeps the threads evenly busy.
inline int64_t parts_for(int64_t N, int64_t min_parts, int64_t max_parts, int64_t threads) {
  int64_t count = min_parts;
  while (count < max_parts && N * count < 4 * threads && N * count % threads != 0) ++count;
  return count;
}

// Estimates the time of `times` forward passes on one thread, in nanoseconds.
template <class T>
double relation_nanoseconds(const RelationAttentionArgs<T>& a, double times) {
  const double pairs = static_cast<double>(a.N) * a.Q * a.K;
  return times * vectors_of<ComputeType<T>>(pairs) * (60 + a.M * (35 + 0.5 * (a.D + a.Dv)));
}

// The indices of the unmasked keys of each image, and the indices of all queries.
class KeyIndex {
 public:
  KeyIndex(int64_t N, int64_t Q, int64_t K, const bool* mask) : K_(K), index_(N * K), counts_(N), queries_(Q) {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k)
        if (mask == nullptr || !mask[n * K + k]) index_[n * K + counts_[n]++] = static_cast<int32_t>(k);
    std::iota(queries_.begin(), queries_.end(), 0);
  }
  const int32_t* index(int64_t n) const { return index_.data() + n * K_; }
  int64_t count(int64_t n) const { return counts_[n]; }
  const int32_t* every_query() const { return queries_.data(); }

 private:
  int64_t K_;
  std::vector<int32_t> index_;
  std::vector<int64_t> counts_;
  std::vector<int32_t> queries_;
};

// Partial gradients, which must be summed over the images of a batch or over parts of the heads. cpu.cpp adds them in
// order at the end.
template <class Compute>
struct RelationAttentionPartials {
  int64_t parts;          // number of parts into which the heads are divided
  double *weight, *bias;  // [N,M,64], [N,M]
  Compute *query_boxes,
      *key_boxes;  // [parts,N,Q,4], [parts,N,K,4]: gradients of the center's x and y and of
                   // the logarithms of width and height
};

}  // namespace relops
