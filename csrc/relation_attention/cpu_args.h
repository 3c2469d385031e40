// relation_attention on the CPU: args.
#pragma once

#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/cpu/work.h"
#include "relation_attention/problem.h"

namespace relops {

// Queries that are worked on together, at most: panels of six rows.
constexpr int64_t kForwardBlock = 36, kBackwardBlock = 24;

// What a thread's share of packed keys may take. Without a limit all images of a large batch would lie in new memory,
// whose pages cost more than the packing.
constexpr int64_t kPackedBytes = 2 << 20;

// The least number of parts of each of N images, from `least` on, that keeps the threads evenly busy.
inline int64_t parts_for(int64_t N, int64_t least, int64_t most, int64_t threads) {
  int64_t count = least;
  while (count < most && N * count < 4 * threads && N * count % threads != 0) ++count;
  return count;
}

// The work of a forward, or of so many.
template <class T>
double relation_nanoseconds(const RelationAttentionArgs<T>& a, double times) {
  const double pairs = static_cast<double>(a.N) * a.Q * a.K;
  return times * vectors_of<ComputeType<T>>(pairs) * (60 + a.M * (35 + 0.5 * (a.D + a.Dv)));
}

// Which keys of each image count, and the indices of all queries.
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

// What backward sums over the images of a batch, or over parts of the heads: shares of it, added up at the end.
template <class Compute>
struct RelationAttentionShares {
  int64_t parts;          // of the heads
  double *weight, *bias;  // [N,M,64], [N,M]
  Compute *query_boxes,
      *key_boxes;  // [parts,N,Q,4], [parts,N,K,4]: of center x and y, and of the logarithms of the sizes
};

}  // namespace relops
