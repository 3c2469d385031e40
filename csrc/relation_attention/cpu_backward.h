// relation_attention on the CPU: backward.

namespace relops::RELOPS_ISA {

// What a thread needs for some heads of an image. Letters of arrays: H heads of the part.
template <class T>
struct BackwardWorker {
  using C = ComputeType<T>;
  static constexpr int64_t W = kLanes<C>, kKeys = kTile<C>;

  const RelationAttentionArgs<T>& a;
  const KeyIndex& kept;
  const RelationAttentionShares<C>& shares;
  const bool of_boxes;                // whether their gradients are wanted
  int64_t heads, width, value_width;  // the most heads of a part; padded D and Dv
  int64_t b_stride;
  Scratch scratch;
  BoxTable<C> queries, keys;
  // Of the queries.
  C *query, *grad_query;      // [H,Q,padded D]; query is scaled
  C* grad_output;             // [H,Q,padded Dv]
  C *rotated, *grad_rotated;  // [Q,H,32]
  // Of the tile of keys.
  C *key, *grad_key;  // [H,kTile,padded D]
  C* key_columns;     // [H,D,kTile]
  C* grad_value;      // [H,kTile,padded Dv]
  C* value_columns;   // [H,Dv,kTile]
  C* grad_weight;     // [H,32,lanes]: of the half of dx and dy
  C* grad_bias;       // [H,lanes]
  // Of the block of queries and the tile of keys.
  C* terms;   // [block,32,kTile]: of dx and dy
  C* b;       // [block,H,kTile], then its gradient
  C *p, *dp;  // [block,kTile]: logits, then probabilities; gradients of these, then of the logits
  // Only for gradients of boxes.
  C *slopes, *rotated_slopes;   // [H,32]: derivatives of b by logarithms, as weights of the terms
  C* grad_terms;                // [64,kTile]
  C *grad_queries, *grad_keys;  // [Q,4,lanes], [4,kTile]

  BackwardWorker(const RelationAttentionArgs<T>& a, const KeyIndex& kept, const RelationAttentionShares<C>& shares)
      : a(a),
        kept(kept),
        shares(shares),
        of_boxes(a.grad_query_boxes != nullptr || a.grad_key_boxes != nullptr),
        heads(ceil_div(a.M, shares.parts)),
        width(round_up(a.D, W)),
        value_width(round_up(a.Dv, W)),
        b_stride(heads * kKeys + W),
        queries(a.Q, scratch),
        keys(kKeys, scratch) {
    const auto take = [&](C*& array, int64_t count) { array = scratch.take<C>(count); };
    const int64_t block = kBackwardBlock;
    take(query, heads * a.Q * width);
    take(grad_query, heads * a.Q * width);
    take(grad_output, heads * a.Q * value_width);
    take(rotated, a.Q * heads * kHalf);
    take(grad_rotated, a.Q * heads * kHalf);
    take(key, heads * kKeys * width);
    take(grad_key, heads * kKeys * width);
    take(key_columns, heads * a.D * kKeys);
    take(grad_value, heads * kKeys * value_width);
    take(value_columns, heads * a.Dv * kKeys);
    take(terms, block * kHalf * kKeys);
    take(b, block * b_stride);
    take(p, block * kKeys);
    take(dp, block * kKeys);
    take(grad_weight, heads * kHalf * W);
    take(grad_bias, heads * W);
    take(slopes, heads * kHalf);
    take(rotated_slopes, heads * kHalf);
    take(grad_terms, kEmbedding * kKeys);
    take(grad_queries, of_boxes ? a.Q * 4 * W : 0);
    take(grad_keys, 4 * kKeys);
  }

  // Heads of item: `part` of image n.
  void operator()(int64_t item) {
    const int64_t n = item / shares.parts, part = item % shares.parts;
    const int64_t m0 = part * a.M / shares.parts, H = (part + 1) * a.M / shares.parts - m0;
    const int32_t* const index = kept.index(n);
    const int64_t count = kept.count(n);
    for (int64_t k = 0; k < a.K && count < a.K; ++k)
      if (a.mask[n * a.K + k]) clear(n, k, a.K, m0, H, a.grad_key, a.grad_value);
    if (count == 0) {  // not even NaN of a query may pass
      for (int64_t q = 0; q < a.Q; ++q) clear(n, q, a.Q, m0, H, a.grad_query, nullptr);
      return;
    }
    load_queries(n, m0, H);
    for (int64_t first = 0; first < count; first += kKeys) {
      const int64_t tile = std::min(kKeys, count - first);
      load_keys(n, m0, H, index + first, tile);
      for (int64_t q = 0; q < a.Q; q += kBackwardBlock) visit(n, m0, H, q, std::min(kBackwardBlock, a.Q - q), tile);
      store_keys(n, m0, H, part, index + first, tile);
    }
    store_queries(n, m0, H, part);
  }

  void load_queries(int64_t n, int64_t m0, int64_t H) {
    queries.fill(a.waves, a.query_boxes + n * a.Q * 4, kept.every_query(), a.Q);
    for (int64_t h = 0; h < H; ++h) {
      const int64_t m = m0 + h;
      pack_rows(a.query, n, m, kept.every_query(), a.Q, a.D, a.scale, query + h * a.Q * width, width);
      pack_rows(a.grad_output, n, m, kept.every_query(), a.Q, a.Dv, C(1), grad_output + h * a.Q * value_width,
                value_width);
      for (int64_t q = 0; q < a.Q; ++q)
        rotate(a.weight + m * kEmbedding, queries.term_rows + q * kHalf, rotated + (q * H + h) * kHalf);
      if (!of_boxes) continue;
      // The slope of W_s sin + W_c cos is f (W_s cos - W_c sin).
      for (int c = 0; c < 2; ++c)
        for (int j = 0; j < kWaves; ++j) {
          const C* weight = a.weight + m * kEmbedding + c * kTerms + j;
          C* slope = slopes + h * kHalf + c * kTerms + j;
          slope[0] = -a.waves.of[j].radians * weight[kWaves];
          slope[kWaves] = a.waves.of[j].radians * weight[0];
        }
    }
    std::fill_n(grad_query, H * a.Q * width, C(0));
    std::fill_n(grad_rotated, a.Q * H * kHalf, C(0));
    if (of_boxes) std::fill_n(grad_queries, a.Q * 4 * W, C(0));
  }

  void load_keys(int64_t n, int64_t m0, int64_t H, const int32_t* index, int64_t count) {
    keys.fill(a.waves, a.key_boxes + n * a.K * 4, index, count);
    for (int64_t h = 0; h < H; ++h) {
      pack_rows(a.key, n, m0 + h, index, count, a.D, C(1), key + h * kKeys * width, width);
      pack_columns(a.key, n, m0 + h, index, count, a.D, key_columns + h * a.D * kKeys, kKeys);
      pack_columns(a.value, n, m0 + h, index, count, a.Dv, value_columns + h * a.Dv * kKeys, kKeys);
    }
    std::fill_n(grad_key, H * kKeys * width, C(0));
    std::fill_n(grad_value, H * kKeys * value_width, C(0));
    std::fill_n(grad_keys, 4 * kKeys, C(0));
    std::fill_n(grad_weight, H * kHalf * W, C(0));
    std::fill_n(grad_bias, H * W, C(0));
  }

  // A block of queries, from q0 on, and the tile of keys.
  void visit(int64_t n, int64_t m0, int64_t H, int64_t q0, int64_t block, int64_t count) {
    const int64_t vectors = ceil_div(count, W);
    for (int64_t q = 0; q < block; ++q)
      geometry_of(a.waves, a.by_query, queries, q0 + q, keys, vectors, H, a.weight + m0 * kEmbedding,
                  rotated + (q0 + q) * H * kHalf, terms + q * kHalf * kKeys, b + q * b_stride);
    for (int64_t h = 0; h < H; ++h) {
      C* const query = this->query + (h * a.Q + q0) * width;
      C* const grad_output = this->grad_output + (h * a.Q + q0) * value_width;
      multiply<C>({{query, width, 1}, key_columns + h * a.D * kKeys, kKeys, a.D}, block, vectors, p, kKeys);
      multiply<C>({{grad_output, value_width, 1}, value_columns + h * a.Dv * kKeys, kKeys, a.Dv}, block, vectors, dp,
                  kKeys);
      for (int64_t q = 0; q < block; ++q) differentiate(n, m0 + h, h, q0 + q, q, count, vectors);
      if (a.grad_value != nullptr)
        multiply<C>({{p, 1, kKeys}, grad_output, value_width, block}, count, value_width / W,
                    grad_value + h * kKeys * value_width, value_width, true);
      if (a.grad_key != nullptr)
        multiply<C>({{dp, 1, kKeys}, query, width, block}, count, width / W, grad_key + h * kKeys * width, width, true);
      if (a.grad_query != nullptr)
        multiply<C>({{dp, kKeys, 1}, key + h * kKeys * width, width, count}, block, width / W,
                    grad_query + (h * a.Q + q0) * width, width, true);
    }
    if (a.grad_weight != nullptr) {
      multiply_lanes(H, kHalf, block, vectors, b, b_stride, terms, kHalf * kKeys, grad_weight);
      for (int64_t q = 0; q < block; ++q) {
        C* const grad = grad_rotated + (q0 + q) * H * kHalf;
        multiply<C>({{b + q * b_stride, kKeys, 1}, keys.term_rows, kHalf, count}, H, kHalf / W, grad, kHalf, true);
      }
    }
    if (of_boxes)
      for (int64_t q = 0; q < block; ++q) differentiate_boxes(m0, H, q0 + q, q, vectors);
  }

  // Of one query, head and tile: p from logits to probabilities, dp from their gradients to those of the logits, b to
  // its gradient.
  void differentiate(int64_t n, int64_t m, int64_t h, int64_t query, int64_t q, int64_t count, int64_t vectors) {
    C *const b = this->b + q * b_stride + h * kKeys, *const p = this->p + q * kKeys, *const dp = this->dp + q * kKeys;
    const int64_t row = (n * a.Q + query) * a.M + m;
    const C logsumexp = a.logsumexp[row], delta = a.delta[row];
    const C bias = a.bias == nullptr ? 0 : a.bias[m];
    const Vec<C> none = {};
    Vec<C> of_bias = load(grad_bias + h * W);
    mask_last(p, count);
    for_batches<C, kAtOnce>(vectors * W, [&](int64_t k, auto at_once) __attribute__((always_inline)) {
      constexpr int N = at_once;
      const auto e = exponential(batch<C, N>([&](int i) { return load(p + k + i * W) - logsumexp; }));
      const auto of_b = batch<C, N>([&](int i) { return load(b + k + i * W) + bias; });
      const auto change = batch<C, N>([&](int i) { return load(dp + k + i * W) - delta; });
      const auto probability = e * batch<C, N>([&](int i) { return above_floor<C>(of_b.v[i]); });
      const auto by_logit = probability * change, by_b = e * change;
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const Vec<C> grad_b = of_b.v[i] <= static_cast<C>(kWeightFloor) ? none : by_b.v[i];
        store(p + k + i * W, probability.v[i]);
        store(dp + k + i * W, by_logit.v[i]);
        store(b + k + i * W, grad_b);
        of_bias += grad_b;
      }
    });
    store(grad_bias + h * W, of_bias);
  }

  void differentiate_boxes(int64_t m0, int64_t H, int64_t query, int64_t q, int64_t vectors) {
    const C* const grad_b = b + q * b_stride;
    for (int64_t h = 0; h < H; ++h)
      for_separable(a.weight + (m0 + h) * kEmbedding, queries.term_rows + query * kHalf,
                    [&](int at, C of_sine, C of_cosine, C sine, C cosine) {
                      const C radians = a.waves.of[at % kTerms].radians;
                      C* const out = rotated_slopes + h * kHalf + at;
                      out[0] = radians * (of_cosine * cosine + of_sine * sine);
                      out[kWaves] = radians * (of_sine * cosine - of_cosine * sine);
                    });
    multiply<C>({{slopes, 1, kHalf}, grad_b, kKeys, H}, kHalf, vectors, grad_terms, kKeys);
    multiply<C>({{rotated_slopes, 1, kHalf}, grad_b, kKeys, H}, kHalf, vectors, grad_terms + kHalf * kKeys, kKeys);
    const C* const terms = this->terms + q * kHalf * kKeys;
    C* const of_query = grad_queries + query * 4 * W;
    for (int64_t k = 0; k < vectors * W; k += W) {
      // By the logarithms of |dx|/w, |dy|/h, and the ratios of widths and of heights.
      Vec<C> by[4] = {};
      for (int c = 0; c < 4; ++c)
        for (int i = c * kTerms; i < (c + 1) * kTerms; ++i)
          by[c] += load(grad_terms + i * kKeys + k) *
                   (c < 2 ? load(terms + i * kKeys + k) : load(keys.terms + (i - kHalf) * keys.padded + k));
      const Pairs<C> pairs(a.by_query, queries, query, keys, k);
      const Vec<C> none = {}, distance[] = {pairs.dx, pairs.dy}, size[] = {pairs.w, pairs.h};
      for (int c = 0; c < 2; ++c) {
        const VecInt<C> moves = absolute<C>(distance[c]) > size[c] * static_cast<C>(1e-3);
        const Vec<C> by_ratio = moves ? by[c] : none, by_center = moves ? by[c] / distance[c] : none;
        C *const query_center = of_query + c * W, *const query_size = of_query + (2 + c) * W;
        C *const key_center = grad_keys + c * kKeys + k, *const key_size = grad_keys + (2 + c) * kKeys + k;
        store(query_center, load(query_center) + by_center);
        store(key_center, load(key_center) - by_center);
        store(query_size, load(query_size) + (a.by_query ? by[2 + c] - by_ratio : by[2 + c]));
        store(key_size, load(key_size) - (a.by_query ? by[2 + c] : by[2 + c] + by_ratio));
      }
    }
  }

  // The rows of a head's gradient [count,padded width], scaled, to out [N,I,M,D] at (n, index, m).
  void store_rows(C* rows, int64_t padded, int64_t D, C scale, T* out, int64_t I, int64_t n, int64_t m,
                  const int32_t* index, int64_t count) {
    for (int64_t i = 0; i < count; ++i, rows += padded) {
      for (int64_t d = 0; d < padded; d += W) store(rows + d, load(rows + d) * scale);
      convert(rows, out + ((n * I + index[i]) * a.M + m) * D, D);
    }
  }

  void store_keys(int64_t n, int64_t m0, int64_t H, int64_t part, const int32_t* index, int64_t count) {
    for (int64_t h = 0; h < H; ++h) {
      if (a.grad_key != nullptr)
        store_rows(grad_key + h * kKeys * width, width, a.D, 1, a.grad_key, a.K, n, m0 + h, index, count);
      if (a.grad_value != nullptr)
        store_rows(grad_value + h * kKeys * value_width, value_width, a.Dv, 1, a.grad_value, a.K, n, m0 + h, index,
                   count);
    }
    // All pairs of an image are too many terms for one sum in float32.
    for (int64_t h = 0; h < H; ++h) {
      const int64_t head = n * a.M + m0 + h;
      if (a.grad_bias != nullptr) shares.bias[head] += sum<C>(load(grad_bias + h * W));
      if (a.grad_weight == nullptr) continue;
      for (int i = 0; i < kHalf; ++i)
        shares.weight[head * kEmbedding + i] += sum<C>(load(grad_weight + (h * kHalf + i) * W));
    }
    if (a.grad_key_boxes == nullptr) return;
    for (int64_t k = 0; k < count; ++k)
      for (int c = 0; c < 4; ++c)
        shares.key_boxes[((part * a.N + n) * a.K + index[k]) * 4 + c] = grad_keys[c * kKeys + k];
  }

  // The gradients of entry i of I, in some heads.
  void clear(int64_t n, int64_t i, int64_t I, int64_t m0, int64_t H, T* of_width, T* of_value_width) {
    const int64_t row = (n * I + i) * a.M + m0;
    if (of_width != nullptr) std::fill_n(of_width + row * a.D, H * a.D, T(0));
    if (of_value_width != nullptr) std::fill_n(of_value_width + row * a.Dv, H * a.Dv, T(0));
  }

  void store_queries(int64_t n, int64_t m0, int64_t H, int64_t part) {
    for (int64_t h = 0; h < H; ++h) {
      const int64_t m = m0 + h;
      if (a.grad_query != nullptr)
        store_rows(grad_query + h * a.Q * width, width, a.D, a.scale, a.grad_query, a.Q, n, m, kept.every_query(), a.Q);
      if (a.grad_weight == nullptr) continue;
      double* const grad = shares.weight + (n * a.M + m) * kEmbedding;
      for (int64_t q = 0; q < a.Q; ++q) {
        const C* const of = grad_rotated + (q * H + h) * kHalf;
        for_separable(a.weight + m * kEmbedding, queries.term_rows + q * kHalf, [&](int at, C, C, C sine, C cosine) {
          grad[kHalf + at] += sine * of[at + kWaves] - cosine * of[at];
          grad[kHalf + at + kWaves] += sine * of[at] + cosine * of[at + kWaves];
        });
      }
    }
    if (a.grad_query_boxes == nullptr) return;
    for (int64_t i = 0; i < a.Q * 4; ++i)
      shares.query_boxes[(part * a.N + n) * a.Q * 4 + i] = sum<C>(load(grad_queries + i * W));
  }
};

}  // namespace relops::RELOPS_ISA
