// relation_attention on the CPU: the backward pass. BackwardWorker processes some heads of an image. It iterates over
// the tiles of keys and, for each tile, over blocks of queries. The gradients of keys are therefore complete at the end
// of their tile, and those of queries at the end of the image.
#ifndef RELOPS_RELATION_ATTENTION_BACKWARD
#define RELOPS_RELATION_ATTENTION_BACKWARD

#include "common/cpu/simd.h"
#include "relation_attention/cpu_args.h"
#include "relation_attention/cpu_geometry.h"
#include "relation_attention/cpu_products.h"

namespace relops::RELOPS_ISA {

// Processes items and owns the memory that a thread needs for them. An item is some heads of one image. In the shapes
// of arrays, `heads` is the number of heads of the item.
template <class T>
struct BackwardWorker {
  using Compute = ComputeType<T>;
  static constexpr int64_t V = kLanes<Compute>, kKeys = kTile<Compute>;

  const RelationAttentionArgs<T>& a;
  const KeyIndex& key_index;
  const RelationAttentionPartials<Compute>& partials;
  const bool needs_box_grads;             // whether any gradient of boxes is needed
  int64_t max_heads, width, value_width;  // largest number of heads of an item; padded D and Dv
  int64_t b_stride;
  Scratch scratch;
  BoxTable<Compute> queries, keys;
  // Arrays for all queries:
  Compute *query, *grad_query;      // [heads,Q,padded D]; query is multiplied by scale
  Compute* grad_output;             // [heads,Q,padded Dv]
  Compute *rotated, *grad_rotated;  // [Q,heads,32]
  // Arrays for a tile of keys:
  Compute *key, *grad_key;  // [heads,kTile,padded D]
  Compute* key_columns;     // [heads,D,kTile]
  Compute* grad_value;      // [heads,kTile,padded Dv]
  Compute* value_columns;   // [heads,Dv,kTile]
  Compute* grad_weight;     // [heads,32,lanes]: for the terms of dx and dy
  Compute* grad_bias;       // [heads,lanes]
  // Arrays for a block of queries and a tile of keys:
  Compute* terms;   // [block,32,kTile]: terms of dx and dy
  Compute* b;       // [block,heads,kTile]; later replaced by its gradient
  Compute *p, *dp;  // [block,kTile]; p: logits, later probabilities; dp: their gradients
  // Arrays that only gradients of boxes need:
  Compute *slopes, *rotated_slopes;   // [heads,32]: weights of the terms in d b / d logarithm
  Compute* grad_terms;                // [64,kTile]
  Compute *grad_queries, *grad_keys;  // [Q,4,lanes], [4,kTile]

  BackwardWorker(const RelationAttentionArgs<T>& a, const KeyIndex& key_index,
                 const RelationAttentionPartials<Compute>& partials)
      : a(a),
        key_index(key_index),
        partials(partials),
        needs_box_grads(a.grad_query_boxes != nullptr || a.grad_key_boxes != nullptr),
        max_heads(ceil_div(a.M, partials.parts)),
        width(round_up(a.D, V)),
        value_width(round_up(a.Dv, V)),
        b_stride(max_heads * kKeys + V),
        queries(a.Q, scratch),
        keys(kKeys, scratch) {
    const auto allocate = [&](Compute*& array, int64_t count) { array = scratch.allocate<Compute>(count); };
    const int64_t block = kBackwardBlock;
    allocate(query, max_heads * a.Q * width);
    allocate(grad_query, max_heads * a.Q * width);
    allocate(grad_output, max_heads * a.Q * value_width);
    allocate(rotated, a.Q * max_heads * kHalf);
    allocate(grad_rotated, a.Q * max_heads * kHalf);
    allocate(key, max_heads * kKeys * width);
    allocate(grad_key, max_heads * kKeys * width);
    allocate(key_columns, max_heads * a.D * kKeys);
    allocate(grad_value, max_heads * kKeys * value_width);
    allocate(value_columns, max_heads * a.Dv * kKeys);
    allocate(terms, block * kHalf * kKeys);
    allocate(b, block * b_stride);
    allocate(p, block * kKeys);
    allocate(dp, block * kKeys);
    allocate(grad_weight, max_heads * kHalf * V);
    allocate(grad_bias, max_heads * V);
    allocate(slopes, max_heads * kHalf);
    allocate(rotated_slopes, max_heads * kHalf);
    allocate(grad_terms, kEmbedding * kKeys);
    allocate(grad_queries, needs_box_grads ? a.Q * 4 * V : 0);
    allocate(grad_keys, 4 * kKeys);
  }

  // Processes `item`, which is part item % parts of the heads of image item / parts.
  void operator()(int64_t item) {
    const int64_t n = item / partials.parts, part = item % partials.parts;
    const int64_t m0 = part * a.M / partials.parts, heads = (part + 1) * a.M / partials.parts - m0;
    const int32_t* const index = key_index.index(n);
    const int64_t count = key_index.count(n);
    for (int64_t k = 0; k < a.K && count < a.K; ++k)
      if (a.mask[n * a.K + k]) clear(n, k, a.K, m0, heads, a.grad_key, a.grad_value);
    if (count == 0) {  // without keys, queries have zero gradients even if their features are NaN
      for (int64_t q = 0; q < a.Q; ++q) clear(n, q, a.Q, m0, heads, a.grad_query, nullptr);
      return;
    }
    load_queries(n, m0, heads);
    for (int64_t first = 0; first < count; first += kKeys) {
      const int64_t tile = std::min(kKeys, count - first);
      load_keys(n, m0, heads, index + first, tile);
      for (int64_t q = 0; q < a.Q; q += kBackwardBlock) visit(n, m0, heads, q, std::min(kBackwardBlock, a.Q - q), tile);
      store_keys(n, m0, heads, part, index + first, tile);
    }
    store_queries(n, m0, heads, part);
  }

  void load_queries(int64_t n, int64_t m0, int64_t heads) {
    queries.fill(a.waves, a.query_boxes + n * a.Q * 4, key_index.every_query(), a.Q);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t m = m0 + h;
      pack_rows(a.query, n, m, key_index.every_query(), a.Q, a.D, a.scale, query + h * a.Q * width, width);
      pack_rows(a.grad_output, n, m, key_index.every_query(), a.Q, a.Dv, Compute(1),
                grad_output + h * a.Q * value_width, value_width);
      for (int64_t q = 0; q < a.Q; ++q)
        rotate(a.weight + m * kEmbedding, queries.term_rows + q * kHalf, rotated + (q * heads + h) * kHalf);
      if (!needs_box_grads) continue;
      // The derivative of W_s sin + W_c cos is f (W_s cos - W_c sin).
      for (int c = 0; c < 2; ++c)
        for (int j = 0; j < kWaves; ++j) {
          const Compute* weight = a.weight + m * kEmbedding + c * kTerms + j;
          Compute* slope = slopes + h * kHalf + c * kTerms + j;
          slope[0] = -a.waves.wave[j].radians * weight[kWaves];
          slope[kWaves] = a.waves.wave[j].radians * weight[0];
        }
    }
    std::fill_n(grad_query, heads * a.Q * width, Compute(0));
    std::fill_n(grad_rotated, a.Q * heads * kHalf, Compute(0));
    if (needs_box_grads) std::fill_n(grad_queries, a.Q * 4 * V, Compute(0));
  }

  void load_keys(int64_t n, int64_t m0, int64_t heads, const int32_t* index, int64_t count) {
    keys.fill(a.waves, a.key_boxes + n * a.K * 4, index, count);
    for (int64_t h = 0; h < heads; ++h) {
      pack_rows(a.key, n, m0 + h, index, count, a.D, Compute(1), key + h * kKeys * width, width);
      pack_columns(a.key, n, m0 + h, index, count, a.D, key_columns + h * a.D * kKeys, kKeys);
      pack_columns(a.value, n, m0 + h, index, count, a.Dv, value_columns + h * a.Dv * kKeys, kKeys);
    }
    std::fill_n(grad_key, heads * kKeys * width, Compute(0));
    std::fill_n(grad_value, heads * kKeys * value_width, Compute(0));
    std::fill_n(grad_keys, 4 * kKeys, Compute(0));
    std::fill_n(grad_weight, heads * kHalf * V, Compute(0));
    std::fill_n(grad_bias, heads * V, Compute(0));
  }

  // Adds the gradients of all pairs of the tile of keys and the block of queries that begins at q0.
  void visit(int64_t n, int64_t m0, int64_t heads, int64_t q0, int64_t block, int64_t count) {
    const int64_t vectors = ceil_div(count, V);
    for (int64_t q = 0; q < block; ++q)
      geometry_of(a.waves, a.by_query, queries, q0 + q, keys, vectors, heads, a.weight + m0 * kEmbedding,
                  rotated + (q0 + q) * heads * kHalf, terms + q * kHalf * kKeys, b + q * b_stride);
    for (int64_t h = 0; h < heads; ++h) {
      Compute* const query = this->query + (h * a.Q + q0) * width;
      Compute* const grad_output = this->grad_output + (h * a.Q + q0) * value_width;
      multiply<Compute>({{query, width, 1}, key_columns + h * a.D * kKeys, kKeys, a.D}, block, vectors, p, kKeys);
      multiply<Compute>({{grad_output, value_width, 1}, value_columns + h * a.Dv * kKeys, kKeys, a.Dv}, block, vectors,
                        dp, kKeys);
      for (int64_t q = 0; q < block; ++q) differentiate(n, m0 + h, h, q0 + q, q, count, vectors);
      if (a.grad_value != nullptr)
        multiply<Compute>({{p, 1, kKeys}, grad_output, value_width, block}, count, value_width / V,
                          grad_value + h * kKeys * value_width, value_width, true);
      if (a.grad_key != nullptr)
        multiply<Compute>({{dp, 1, kKeys}, query, width, block}, count, width / V, grad_key + h * kKeys * width, width,
                          true);
      if (a.grad_query != nullptr)
        multiply<Compute>({{dp, kKeys, 1}, key + h * kKeys * width, width, count}, block, width / V,
                          grad_query + (h * a.Q + q0) * width, width, true);
    }
    if (a.grad_weight != nullptr) {
      multiply_lanes(heads, kHalf, block, vectors, b, b_stride, terms, kHalf * kKeys, grad_weight);
      for (int64_t q = 0; q < block; ++q) {
        Compute* const grad = grad_rotated + (q0 + q) * heads * kHalf;
        multiply<Compute>({{b + q * b_stride, kKeys, 1}, keys.term_rows, kHalf, count}, heads, kHalf / V, grad, kHalf,
                          true);
      }
    }
    if (needs_box_grads)
      for (int64_t q = 0; q < block; ++q) differentiate_boxes(m0, heads, q0 + q, q, vectors);
  }

  // For one query, head and tile, converts p from logits to probabilities, dp from gradients of the probabilities to
  // gradients of the logits, and b to its gradient.
  void differentiate(int64_t n, int64_t m, int64_t h, int64_t query, int64_t q, int64_t count, int64_t vectors) {
    Compute *const b = this->b + q * b_stride + h * kKeys, *const p = this->p + q * kKeys,
                   *const dp = this->dp + q * kKeys;
    const int64_t row = (n * a.Q + query) * a.M + m;
    const Compute logsumexp = a.logsumexp[row], delta = a.delta[row];
    const Compute bias = a.bias == nullptr ? 0 : a.bias[m];
    const Vec<Compute> zeros = {};
    Vec<Compute> bias_sums = load(grad_bias + h * V);
    mask_last(p, count);
    for_batches<Compute, kAtOnce>(vectors * V, [&](int64_t k, auto at_once) __attribute__((always_inline)) {
      constexpr int N = at_once;
      const auto e = exponential(batch<Compute, N>([&](int i) { return load(p + k + i * V) - logsumexp; }));
      const auto biased_b = batch<Compute, N>([&](int i) { return load(b + k + i * V) + bias; });
      const auto change = batch<Compute, N>([&](int i) { return load(dp + k + i * V) - delta; });
      const auto probability = e * batch<Compute, N>([&](int i) { return above_floor<Compute>(biased_b.v[i]); });
      const auto by_logit = probability * change, by_b = e * change;
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const Vec<Compute> grad_b = biased_b.v[i] <= static_cast<Compute>(kWeightFloor) ? zeros : by_b.v[i];
        store(p + k + i * V, probability.v[i]);
        store(dp + k + i * V, by_logit.v[i]);
        store(b + k + i * V, grad_b);
        bias_sums += grad_b;
      }
    });
    store(grad_bias + h * V, bias_sums);
  }

  // Adds the gradients of one query's box and of the boxes of the tile's keys, given the gradient of b for all heads.
  void differentiate_boxes(int64_t m0, int64_t heads, int64_t query, int64_t q, int64_t vectors) {
    const Compute* const grad_b = b + q * b_stride;
    for (int64_t h = 0; h < heads; ++h)
      for_separable(a.weight + (m0 + h) * kEmbedding, queries.term_rows + query * kHalf,
                    [&](int at, Compute of_sine, Compute of_cosine, Compute sine, Compute cosine) {
                      const Compute radians = a.waves.wave[at % kTerms].radians;
                      Compute* const out = rotated_slopes + h * kHalf + at;
                      out[0] = radians * (of_cosine * cosine + of_sine * sine);
                      out[kWaves] = radians * (of_sine * cosine - of_cosine * sine);
                    });
    multiply<Compute>({{slopes, 1, kHalf}, grad_b, kKeys, heads}, kHalf, vectors, grad_terms, kKeys);
    multiply<Compute>({{rotated_slopes, 1, kHalf}, grad_b, kKeys, heads}, kHalf, vectors, grad_terms + kHalf * kKeys,
                      kKeys);
    const Compute* const terms = this->terms + q * kHalf * kKeys;
    Compute* const grad_query_box = grad_queries + query * 4 * V;
    for (int64_t k = 0; k < vectors * V; k += V) {
      // Gradients of log(|dx|/w), log(|dy|/h), log(wq/wk) and log(hq/hk).
      Vec<Compute> grad_log[4] = {};
      for (int c = 0; c < 4; ++c)
        for (int i = c * kTerms; i < (c + 1) * kTerms; ++i)
          grad_log[c] += load(grad_terms + i * kKeys + k) *
                         (c < 2 ? load(terms + i * kKeys + k) : load(keys.terms + (i - kHalf) * keys.padded + k));
      const Pairs<Compute> pairs(a.by_query, queries, query, keys, k);
      const Vec<Compute> zeros = {}, distance[] = {pairs.dx, pairs.dy}, size[] = {pairs.w, pairs.h};
      for (int c = 0; c < 2; ++c) {
        const VecInt<Compute> is_above_floor = absolute<Compute>(distance[c]) > size[c] * static_cast<Compute>(1e-3);
        const Vec<Compute> by_ratio = is_above_floor ? grad_log[c] : zeros,
                           by_center = is_above_floor ? grad_log[c] / distance[c] : zeros;
        Compute *const query_center = grad_query_box + c * V, *const query_size = grad_query_box + (2 + c) * V;
        Compute *const key_center = grad_keys + c * kKeys + k, *const key_size = grad_keys + (2 + c) * kKeys + k;
        store(query_center, load(query_center) + by_center);
        store(key_center, load(key_center) - by_center);
        store(query_size, load(query_size) + (a.by_query ? grad_log[2 + c] - by_ratio : grad_log[2 + c]));
        store(key_size, load(key_size) - (a.by_query ? grad_log[2 + c] : grad_log[2 + c] + by_ratio));
      }
    }
  }

  // Multiplies the rows [count,padded] of a head's gradient by scale and writes them to out [N,I,M,D] at (n, index, m).
  void store_rows(Compute* rows, int64_t padded, int64_t D, Compute scale, T* out, int64_t I, int64_t n, int64_t m,
                  const int32_t* index, int64_t count) {
    for (int64_t i = 0; i < count; ++i, rows += padded) {
      for (int64_t d = 0; d < padded; d += V) store(rows + d, load(rows + d) * scale);
      convert(rows, out + ((n * I + index[i]) * a.M + m) * D, D);
    }
  }

  void store_keys(int64_t n, int64_t m0, int64_t heads, int64_t part, const int32_t* index, int64_t count) {
    for (int64_t h = 0; h < heads; ++h) {
      if (a.grad_key != nullptr)
        store_rows(grad_key + h * kKeys * width, width, a.D, 1, a.grad_key, a.K, n, m0 + h, index, count);
      if (a.grad_value != nullptr)
        store_rows(grad_value + h * kKeys * value_width, value_width, a.Dv, 1, a.grad_value, a.K, n, m0 + h, index,
                   count);
    }
    // One float32 sum over all pairs of an image would be too inexact, so each tile has its own sums, which are added
    // in float64.
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t head = n * a.M + m0 + h;
      if (a.grad_bias != nullptr) partials.bias[head] += sum<Compute>(load(grad_bias + h * V));
      if (a.grad_weight == nullptr) continue;
      for (int i = 0; i < kHalf; ++i)
        partials.weight[head * kEmbedding + i] += sum<Compute>(load(grad_weight + (h * kHalf + i) * V));
    }
    if (a.grad_key_boxes == nullptr) return;
    for (int64_t k = 0; k < count; ++k)
      for (int c = 0; c < 4; ++c)
        partials.key_boxes[((part * a.N + n) * a.K + index[k]) * 4 + c] = grad_keys[c * kKeys + k];
  }

  // Sets the gradients of row i of I rows to zero for heads [m0, m0 + heads).
  void clear(int64_t n, int64_t i, int64_t I, int64_t m0, int64_t heads, T* of_width, T* of_value_width) {
    const int64_t row = (n * I + i) * a.M + m0;
    if (of_width != nullptr) std::fill_n(of_width + row * a.D, heads * a.D, T(0));
    if (of_value_width != nullptr) std::fill_n(of_value_width + row * a.Dv, heads * a.Dv, T(0));
  }

  void store_queries(int64_t n, int64_t m0, int64_t heads, int64_t part) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t m = m0 + h;
      if (a.grad_query != nullptr)
        store_rows(grad_query + h * a.Q * width, width, a.D, a.scale, a.grad_query, a.Q, n, m, key_index.every_query(),
                   a.Q);
      if (a.grad_weight == nullptr) continue;
      double* const grad = partials.weight + (n * a.M + m) * kEmbedding;
      for (int64_t q = 0; q < a.Q; ++q) {
        const Compute* const grad_row = grad_rotated + (q * heads + h) * kHalf;
        for_separable(a.weight + m * kEmbedding, queries.term_rows + q * kHalf,
                      [&](int at, Compute, Compute, Compute sine, Compute cosine) {
                        grad[kHalf + at] += sine * grad_row[at + kWaves] - cosine * grad_row[at];
                        grad[kHalf + at + kWaves] += sine * grad_row[at] + cosine * grad_row[at + kWaves];
                      });
      }
    }
    if (a.grad_query_boxes == nullptr) return;
    for (int64_t i = 0; i < a.Q * 4; ++i)
      partials.query_boxes[(part * a.N + n) * a.Q * 4 + i] = sum<Compute>(load(grad_queries + i * V));
  }
};

}  // namespace relops::RELOPS_ISA

#endif
