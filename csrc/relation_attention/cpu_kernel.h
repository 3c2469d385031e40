// relation_attention on the CPU: the entry points of its kernels, compiled once per instruction set by foreach_isa.h.
//
// Per pair and head, the forward takes 64 multiply-adds for the geometry, D for the logit and Dv for the output. The
// backward takes these again, 64 for the weights of the geometry, Dv for the gradient of p, and D + D + Dv for the
// gradients of query, key and value. In addition there are 16 sines and cosines per pair (not per head) and an
// exponential per pair and head. All products run in one register-tiled kernel, `multiply`, which is what bounds both
// directions.
//
// A tile of keys, with kTile<Compute> keys in lanes, is packed head by head, without the masked keys, and transposed
// where keys are the lanes of a product; then blocks of queries visit it. In the forward an item is some of the queries
// of an image with all heads, so that the heads share the sines. In the backward an item is some of the heads: it owns
// the gradients of their queries, keys and weights, so that no sum depends on which thread came first.

#include "common/cpu/simd.h"
#include "relation_attention/cpu_args.h"
#include "relation_attention/cpu_backward.h"
#include "relation_attention/cpu_forward.h"
#include "relation_attention/cpu_products.h"

namespace relops::RELOPS_ISA {

// Writes output and logsumexp; or delta, where it is asked for.
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

// Writes delta of the queries [begin,end), counted over all images.
template <class T>
void relation_attention_delta(const RelationAttentionArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin * a.M; row < end * a.M; ++row) {
    const T* const grad = a.grad_output.at(row / a.M / a.Q, row / a.M % a.Q, row % a.M);
    a.delta[row] = dot<ComputeType<T>>(a.output + row * a.Dv, grad, a.Dv);
  }
}

// Writes the gradients of query, key and value that are asked for, and adds those of weights and boxes to `partials`.
template <class T>
void relation_attention_backward(const RelationAttentionArgs<T>& a, const KeyIndex& kept,
                                 const RelationAttentionPartials<ComputeType<T>>& partials, int64_t threads) {
  for_each_item(a.N * partials.parts, threads, [&] { return BackwardWorker<T>(a, kept, partials); });
}

}  // namespace relops::RELOPS_ISA

// The next instruction set compiles the pieces again.
#undef RELOPS_RELATION_ATTENTION_PRODUCTS
#undef RELOPS_RELATION_ATTENTION_GEOMETRY
#undef RELOPS_RELATION_ATTENTION_FORWARD
#undef RELOPS_RELATION_ATTENTION_BACKWARD
