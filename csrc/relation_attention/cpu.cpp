// relation_attention on the CPU: the forward and backward passes, the division of their work among threads, and the
// registration of the ops.
//
// In the forward pass, threads first pack the keys of some images tile by tile and then process blocks of up to 36
// queries with all heads (PackedKeys and ForwardWorker in cpu_forward.h). In the backward pass, each thread processes
// some heads of an image (BackwardWorker in cpu_backward.h) and writes partial gradients of weights and boxes. This
// file adds the partial gradients in a fixed order, so the results do not depend on thread scheduling. The
// multiply-adds of the matrix products limit the speed of both passes; cpu_kernel.h counts them. The sines and cosines
// of cpu_geometry.h are the second largest cost.

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
    const KeyIndex key_index(a.N, a.Q, a.K, a.mask);
    RELOPS_CALL_ISA(relation_attention_forward, a, key_index);
  }

  template <class T>
  static void backward(const RelationAttention&, RelationAttentionArgs<T> a) {
    using Compute = ComputeType<T>;
    const KeyIndex key_index(a.N, a.Q, a.K, a.mask);
    const bool needs_box_grads = a.grad_query_boxes != nullptr || a.grad_key_boxes != nullptr;
    const int64_t threads = threads_for(relation_nanoseconds(a, needs_box_grads ? 4 : 2.3));
    std::vector<Compute> delta(a.N * a.Q * a.M);
    a.delta = delta.data();
    if constexpr (sizeof(T) == 2) {  // a forward pass computes delta: see RelationAttentionArgs
      RELOPS_CALL_ISA(relation_attention_forward, a, key_index);
    } else {
      const double work = static_cast<double>(a.N) * a.Q * a.M * (5 + 2 * vectors_of<Compute>(a.Dv));
      for_each_range(a.N * a.Q, threads_for(work),
                     [&](int64_t begin, int64_t end) { RELOPS_CALL_ISA(relation_attention_delta, a, begin, end); });
    }
    // The number of parts is the smallest that keeps the threads busy, because every part computes the sines again.
    const int64_t parts = parts_for(a.N, 1, a.M, threads);
    std::vector<double> weight(a.grad_weight == nullptr ? 0 : a.N * a.M * kEmbedding);
    std::vector<double> bias(a.grad_bias == nullptr ? 0 : a.N * a.M);
    std::vector<Compute> query_boxes(a.grad_query_boxes == nullptr ? 0 : parts * a.N * a.Q * 4);
    std::vector<Compute> key_boxes(a.grad_key_boxes == nullptr ? 0 : parts * a.N * a.K * 4);
    const RelationAttentionPartials<Compute> partials{parts, weight.data(), bias.data(), query_boxes.data(),
                                                      key_boxes.data()};
    RELOPS_CALL_ISA(relation_attention_backward, a, key_index, partials, threads);
    if (a.grad_weight != nullptr) sum_partials(partials.weight, a.N, a.M * kEmbedding, a.grad_weight);
    if (a.grad_bias != nullptr) sum_partials(partials.bias, a.N, a.M, a.grad_bias);
    if (a.grad_query_boxes != nullptr)
      grad_of_boxes(partials.query_boxes, parts, a.N * a.Q, a.query_boxes, a.grad_query_boxes);
    if (a.grad_key_boxes != nullptr) grad_of_boxes(partials.key_boxes, parts, a.N * a.K, a.key_boxes, a.grad_key_boxes);
  }

 private:
  // Sets sum [size] to the sum of the rows of partials [count,size], added in order.
  template <class S, class Compute>
  static void sum_partials(const S* partials, int64_t count, int64_t size, Compute* sum) {
    for (int64_t i = 0; i < size; ++i) {
      S total = partials[i];
      for (int64_t part = 1; part < count; ++part) total += partials[part * size + i];
      sum[i] = static_cast<Compute>(total);
    }
  }

  // Writes the gradients of boxes, given the partial gradients [parts,boxes,4] of box centers and of the logarithms of
  // box sizes.
  template <class Compute>
  static void grad_of_boxes(Compute* partials, int64_t parts, int64_t count, const Compute* boxes, Compute* grad) {
    sum_partials(partials, parts, count * 4, grad);
    for (int64_t i = 0; i < count; ++i, boxes += 4, grad += 4) {
      const Compute x = grad[0] / 2, y = grad[1] / 2;
      // A masked key has zero gradient even if its box is invalid.
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

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_relation_attention<Kernels>(m); }

}  // namespace relops
