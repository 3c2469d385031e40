// Relation attention on the CPU; compiled once per instruction set by foreach_isa.h.
//
// Per pair and head, forward: 64 multiply-adds of the geometry, D of the logit, Dv of the output; backward: these
// again, 64 for the weights of the geometry, Dv for the gradient of p and D + D + Dv for those of query, key and value.
// Beside them stand 16 sines and cosines per pair (not per head) and an exponential per pair and head. All products run
// in one register-tiled kernel, `multiply`, which is what bounds both directions.
//
// A tile of keys, kTile<Compute> of them in lanes, is packed head by head, transposed where keys are the lanes of a
// product, and without the masked ones; then blocks of queries visit it. Forward, an item is some of the queries of an
// image with all heads, so that they share the sines. Backward, an item is some of the heads: it owns the gradients of
// their queries, keys and weights, so that nothing is summed in an order that depends on threads.

#include "common/cpu/simd.h"
#include "relation_attention/cpu_args.h"

// Products of rows of features.
#include "relation_attention/cpu_products.h"
// b of pairs.
#include "relation_attention/cpu_geometry.h"
// Forward.
#include "relation_attention/cpu_forward.h"
// Backward.
#include "relation_attention/cpu_backward.h"

namespace relops::RELOPS_ISA {

template <class T>
void relation_attention_forward(const RelationAttentionArgs<T>& a, const KeyIndex& kept) {
  const int64_t threads = threads_for(relation_nanoseconds(a, 1));
  PackedKeys<T> keys(a, kept, threads);
  for (; keys.first < a.N; keys.first += keys.images) {
    const int64_t images = std::min(keys.images, a.N - keys.first);
    for_each_item(images * keys.of_image, threads, [&] { return [&](int64_t item) { keys(item); }; });
    const int64_t blocks = parts_for(images, ceil_div(a.Q, kForwardBlock), ceil_div(a.Q, kPanelRows), threads);
    for_each_item(images * blocks, threads, [&] { return ForwardWorker<T>(a, keys, blocks); });
  }
}

// delta of queries [begin,end) of all images.
template <class T>
void relation_attention_delta(const RelationAttentionArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin * a.M; row < end * a.M; ++row) {
    const T* const grad = a.grad_output.at(row / a.M / a.Q, row / a.M % a.Q, row % a.M);
    a.delta[row] = dot<ComputeType<T>>(a.output + row * a.Dv, grad, a.Dv);
  }
}

template <class T>
void relation_attention_backward(const RelationAttentionArgs<T>& a, const KeyIndex& kept,
                                 const RelationAttentionShares<ComputeType<T>>& shares, int64_t threads) {
  for_each_item(a.N * shares.parts, threads, [&] { return BackwardWorker<T>(a, kept, shares); });
}

}  // namespace relops::RELOPS_ISA
