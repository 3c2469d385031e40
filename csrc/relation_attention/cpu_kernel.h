// relation_attention on the CPU: the entry points of its kernels. foreach_isa.h compiles this file once per instruction
// set.
//
// For each pair and head, the forward pass needs 64 multiply-adds for the geometry, D for the logit and Dv for the
// output. The backward pass repeats the multiply-adds of the geometry and the logit and needs another 64 for the
// gradients of the geometry's weights, Dv for the gradient of p, and D + D + Dv for the gradients of query, key and
// value. In addition, both passes need 16 sines and cosines per pair (not per head) and one exponential per pair and
// head. A single register-tiled kernel, `multiply`, computes the products and limits the speed of both passes.
//
// Keys are processed in tiles of kTile<Compute> keys. A tile is packed head by head without the masked keys, and
// transposed for products whose vector lanes are keys. Then the tile is combined with blocks of queries. In the forward
// pass, an item consists of some queries of an image with all heads, so the heads share the sines. In the backward
// pass, an item consists of some heads of an image. Only this item adds to the gradients of the queries, keys and
// weights of these heads, so no sum depends on the order in which threads run.

#include "common/cpu/simd.h"
#include "relation_attention/cpu_args.h"
#include "relation_attention/cpu_backward.h"
#include "relation_attention/cpu_forward.h"
#include "relation_attention/cpu_products.h"

namespace relops::RELOPS_ISA {

// Writes output and logsumexp, or only delta if it is requested.
template <class T>
void relation_attention_forward(const RelationAttentionArgs<T>& a, const KeyIndex& key_index) {
  const int64_t threads = threads_for(relation_nanoseconds(a, 1));
  PackedKeys<T> keys(a, key_index, threads);
  for (; keys.first < a.N; keys.first += keys.images) {
    const int64_t images = std::min(keys.images, a.N - keys.first);
    for_each_item(images * keys.tiles_per_image, threads, [&] { return [&](int64_t item) { keys(item); }; });
    const int64_t blocks = parts_for(images, ceil_div(a.Q, kForwardBlock), ceil_div(a.Q, kPanelRows), threads);
    for_each_item(images * blocks, threads, [&] { return ForwardWorker<T>(a, keys, blocks); });
  }
}

// Writes delta for the queries [begin,end), numbered across all images.
template <class T>
void relation_attention_delta(const RelationAttentionArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin * a.M; row < end * a.M; ++row) {
    const T* const grad = a.grad_output.at(row / a.M / a.Q, row / a.M % a.Q, row % a.M);
    a.delta[row] = dot<ComputeType<T>>(a.output + row * a.Dv, grad, a.Dv);
  }
}

// Writes the requested gradients of query, key and value, and adds those of weights and boxes to `partials`.
template <class T>
void relation_attention_backward(const RelationAttentionArgs<T>& a, const KeyIndex& key_index,
                                 const RelationAttentionPartials<ComputeType<T>>& partials, int64_t threads) {
  for_each_item(a.N * partials.parts, threads, [&] { return BackwardWorker<T>(a, key_index, partials); });
}

}  // namespace relops::RELOPS_ISA

// Each instruction set compiles these headers again.
#undef RELOPS_PRODUCTS
#undef RELOPS_RELATION_ATTENTION_PRODUCTS
#undef RELOPS_RELATION_ATTENTION_GEOMETRY
#undef RELOPS_RELATION_ATTENTION_FORWARD
#undef RELOPS_RELATION_ATTENTION_BACKWARD
