// relation_attention on the CPU.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "relation_attention/cpu_args.h"

#define RELOPS_KERNEL "relation_attention/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

struct Kernels {
  template <class T>
  static void forward(const RelationAttention&, const RelationAttentionArgs<T>& a) {
    const KeyIndex kept(a.N, a.Q, a.K, a.mask);
    RELOPS_CALL_ISA(relation_attention_forward, a, kept);
  }

  template <class T>
  static void backward(const RelationAttention&, RelationAttentionArgs<T> a) {
    using Compute = ComputeType<T>;
    const KeyIndex kept(a.N, a.Q, a.K, a.mask);
    const bool of_boxes = a.grad_query_boxes != nullptr || a.grad_key_boxes != nullptr;
    const int64_t threads = threads_for(relation_nanoseconds(a, of_boxes ? 4 : 2.3));
    std::vector<Compute> delta(a.N * a.Q * a.M);
    a.delta = delta.data();
    if constexpr (sizeof(T) == 2) {
      RELOPS_CALL_ISA(relation_attention_forward, a, kept);
    } else {
      const double work = static_cast<double>(a.N) * a.Q * a.M * (5 + 2 * vectors_of<Compute>(a.Dv));
      for_each_range(a.N * a.Q, threads_for(work),
                     [&](int64_t begin, int64_t end) { RELOPS_CALL_ISA(relation_attention_delta, a, begin, end); });
    }
    // Every part computes the sines anew.
    const int64_t parts = parts_for(a.N, 1, a.M, threads);
    std::vector<double> weight(a.grad_weight == nullptr ? 0 : a.N * a.M * kEmbedding);
    std::vector<double> bias(a.grad_bias == nullptr ? 0 : a.N * a.M);
    std::vector<Compute> query_boxes(a.grad_query_boxes == nullptr ? 0 : parts * a.N * a.Q * 4);
    std::vector<Compute> key_boxes(a.grad_key_boxes == nullptr ? 0 : parts * a.N * a.K * 4);
    const RelationAttentionShares<Compute> shares{parts, weight.data(), bias.data(), query_boxes.data(),
                                                  key_boxes.data()};
    RELOPS_CALL_ISA(relation_attention_backward, a, kept, shares, threads);
    if (a.grad_weight != nullptr) add_shares(shares.weight, a.N, a.M * kEmbedding, a.grad_weight);
    if (a.grad_bias != nullptr) add_shares(shares.bias, a.N, a.M, a.grad_bias);
    if (a.grad_query_boxes != nullptr)
      grad_of_boxes(shares.query_boxes, parts, a.N * a.Q, a.query_boxes, a.grad_query_boxes);
    if (a.grad_key_boxes != nullptr) grad_of_boxes(shares.key_boxes, parts, a.N * a.K, a.key_boxes, a.grad_key_boxes);
  }

 private:
  // sum[i] of the shares [count,size], in their order.
  template <class S, class Compute>
  static void add_shares(const S* shares, int64_t count, int64_t size, Compute* sum) {
    for (int64_t i = 0; i < size; ++i) {
      S total = shares[i];
      for (int64_t share = 1; share < count; ++share) total += shares[share * size + i];
      sum[i] = static_cast<Compute>(total);
    }
  }

  // From shares [parts,boxes,4] of the gradients of centers and logarithms of sizes.
  template <class Compute>
  static void grad_of_boxes(Compute* shares, int64_t parts, int64_t count, const Compute* boxes, Compute* grad) {
    add_shares(shares, parts, count * 4, grad);
    for (int64_t i = 0; i < count; ++i, boxes += 4, grad += 4) {
      const Compute x = grad[0] / 2, y = grad[1] / 2;
      // 0 of a masked key stays 0, whatever its box.
      const Compute w = grad[2] == 0 ? 0 : grad[2] / (boxes[2] - boxes[0] + 1);
      const Compute h = grad[3] == 0 ? 0 : grad[3] / (boxes[3] - boxes[1] + 1);
      grad[0] = x - w;
      grad[1] = y - h;
      grad[2] = x + w;
      grad[3] = y + h;
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { RELOPS_RELATION_ATTENTION_IMPL(m, RelationAttentionOps<Kernels>); }

}  // namespace relops
