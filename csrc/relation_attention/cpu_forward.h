// relation_attention on the CPU: forward.

namespace relops::RELOPS_ISA {

template <class C>
struct KeyTile {
  BoxTable<C> boxes;
  C* columns;  // [M,D,width]
  C* values;   // [M,width,padded Dv]
};

// The keys of some images, from `first` on, tile by tile.
template <class T>
struct PackedKeys {
  using C = ComputeType<T>;

  const RelationAttentionArgs<T>& a;
  const KeyIndex& kept;
  int64_t of_image, width, value_width;  // tiles; keys of each, fewer than kTile where there are no more; padded Dv
  int64_t images, first = 0;
  Scratch scratch;
  std::vector<KeyTile<C>> tiles;

  PackedKeys(const RelationAttentionArgs<T>& a, const KeyIndex& kept, int64_t threads)
      : a(a),
        kept(kept),
        of_image(ceil_div(a.K, kTile<C>)),
        width(std::min(kTile<C>, round_up(a.K, kLanes<C>))),
        value_width(round_up(a.Dv, kLanes<C>)) {
    const int64_t bytes = of_image * width * a.M * (a.D + value_width) * sizeof(C);
    images = std::clamp<int64_t>(threads * kPackedBytes / bytes, 1, a.N);
    for (int64_t i = 0; i < images * of_image; ++i)
      tiles.push_back({BoxTable<C>(width, scratch), scratch.take<C>(a.M * a.D * width),
                       scratch.take<C>(a.M * width * value_width)});
  }

  // Packs tile `item`.
  void operator()(int64_t item) {
    const int64_t n = first + item / of_image, from = item % of_image * kTile<C>;
    const int64_t count = std::min(kTile<C>, kept.count(n) - from);
    if (count <= 0) return;
    const int32_t* const index = kept.index(n) + from;
    KeyTile<C>& tile = tiles[item];
    tile.boxes.fill(a.waves, a.key_boxes + n * a.K * 4, index, count);
    for (int64_t m = 0; m < a.M; ++m) {
      pack_columns(a.key, n, m, index, count, a.D, tile.columns + m * a.D * width, width);
      pack_rows(a.value, n, m, index, count, a.Dv, C(1), tile.values + m * width * value_width, value_width);
    }
  }
};

// What a thread needs for a block of queries with all heads.
template <class T>
struct ForwardWorker {
  using C = ComputeType<T>;
  static constexpr int64_t W = kLanes<C>, kKeys = kTile<C>;

  const RelationAttentionArgs<T>& a;
  const PackedKeys<T>& keys;
  int64_t blocks, most;        // of an image; queries of a block
  int64_t width, value_width;  // padded D and Dv
  // Distance of queries in b: a vector more than it holds, or their rows would meet in the same sets of a cache.
  int64_t b_stride;
  Scratch scratch;
  BoxTable<C> queries;
  C* query;    // [M,most,padded D], scaled
  C* rotated;  // [most,M,32]
  C* output;   // [M,most,padded Dv]
  C* top;      // [M,most]: about the largest s of the keys so far
  C* total;    // [M,most,lanes]: sums of the weights in its scale
  C* terms;    // [32,kTile]
  C* b;        // [most,M,kTile]
  C* p;        // [most,kTile]

  ForwardWorker(const RelationAttentionArgs<T>& a, const PackedKeys<T>& keys, int64_t blocks)
      : a(a),
        keys(keys),
        blocks(blocks),
        most(ceil_div(ceil_div(a.Q, kPanelRows), blocks) * kPanelRows),
        width(round_up(a.D, W)),
        value_width(round_up(a.Dv, W)),
        b_stride(a.M * kKeys + W),
        queries(most, scratch),
        query(scratch.take<C>(a.M * most * width)),
        rotated(scratch.take<C>(most * a.M * kHalf)),
        output(scratch.take<C>(a.M * most * value_width)),
        top(scratch.take<C>(a.M * most)),
        total(scratch.take<C>(a.M * most * W)),
        terms(scratch.take<C>(kHalf * kKeys)),
        b(scratch.take<C>(most * b_stride)),
        p(scratch.take<C>(most * kKeys)) {}

  void operator()(int64_t item) {
    const int64_t image = item / blocks, n = keys.first + image;
    // Whole panels of rows, of which a smaller one takes nearly as long.
    const auto from = [&](int64_t block) { return block * ceil_div(a.Q, kPanelRows) / blocks * kPanelRows; };
    const int64_t first = from(item % blocks), count = std::min(from(item % blocks + 1), a.Q) - first;
    load_queries(n, first, count);
    for (int64_t i = 0; i * kKeys < keys.kept.count(n); ++i)
      visit(count, keys.tiles[image * keys.of_image + i], std::min(kKeys, keys.kept.count(n) - i * kKeys));
    store_queries(n, first, count);
  }

  void load_queries(int64_t n, int64_t first, int64_t count) {
    const int32_t* const index = keys.kept.every_query() + first;
    queries.fill(a.waves, a.query_boxes + n * a.Q * 4, index, count);
    for (int64_t m = 0; m < a.M; ++m) {
      pack_rows(a.query, n, m, index, count, a.D, a.scale, query + m * most * width, width);
      for (int64_t q = 0; q < count; ++q)
        rotate(a.weight + m * kEmbedding, queries.term_rows + q * kHalf, rotated + (q * a.M + m) * kHalf);
    }
    std::fill_n(output, a.M * most * value_width, C(0));
    std::fill_n(top, a.M * most, -std::numeric_limits<C>::infinity());
    std::fill_n(total, a.M * most * W, C(0));
  }

  void visit(int64_t block, const KeyTile<C>& tile, int64_t count) {
    const int64_t vectors = ceil_div(count, W);
    for (int64_t q = 0; q < block; ++q)
      geometry_of(a.waves, a.by_query, queries, q, tile.boxes, vectors, a.M, a.weight, rotated + q * a.M * kHalf, terms,
                  b + q * b_stride);
    for (int64_t m = 0; m < a.M; ++m) {
      const int64_t row = m * most;
      multiply<C>({{query + row * width, width, 1}, tile.columns + m * a.D * keys.width, keys.width, a.D}, block,
                  vectors, p, kKeys);
      // Keys do not fit the second cache: those of the next head are fetched meanwhile, some lines a query.
      const int64_t columns = a.D * keys.width, values = keys.width * value_width;
      const int64_t lines = m + 1 < a.M ? ceil_div(std::max(columns, values) * int64_t{sizeof(C)}, 64 * block) : 0;
      for (int64_t q = 0; q < block; ++q) {
        prefetch_lines(tile.columns + (m + 1) * columns, columns, q * lines, lines);
        prefetch_lines(tile.values + (m + 1) * values, values, q * lines, lines);
        normalise(row + q, a.bias == nullptr ? 0 : a.bias[m], count, b + q * b_stride + m * kKeys, p + q * kKeys);
      }
      multiply<C>({{p, kKeys, 1}, tile.values + m * keys.width * value_width, value_width, count}, block,
                  value_width / W, output + row * value_width, value_width, true);
    }
  }

  // p: of one query and head, `row`, and a tile, from logits s to weights in the scale of the sums so far. That is
  // changed only where s is much larger than before: a weight may be as large as exp(kSlack) times b.
  void normalise(int64_t row, C bias, int64_t count, const C* b, C* p) {
    constexpr C kSlack = 16;
    mask_last(p, count);
    Vec<C> tops = load(p);
    for (int64_t k = W; k < count; k += W) tops = maximum(load(p + k), tops);
    const C highest = fold<C>(tops, [](Vec<C> x, Vec<C> y) { return maximum(x, y); });
    C& top = this->top[row];
    Vec<C> totals = load(total + row * W);
    if (highest > top + kSlack) {
      const C decay = std::exp(top - highest);
      totals *= decay;
      C* const sums = output + row * value_width;
      for (int64_t d = 0; d < value_width; d += W) store(sums + d, load(sums + d) * decay);
      top = highest;
    }
    for_batches<C, kAtOnce>(count, [&](int64_t k, auto vectors) __attribute__((always_inline)) {
      constexpr int N = vectors;
      const auto e = exponential(batch<C, N>([&](int i) { return load(p + k + i * W) - top; }));
      const auto weight = e * batch<C, N>([&](int i) { return above_floor<C>(load(b + k + i * W) + bias); });
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        store(p + k + i * W, weight.v[i]);
        totals += weight.v[i];
      }
    });
    store(total + row * W, totals);
  }

  // The output; or delta, where it is asked for.
  void store_queries(int64_t n, int64_t first, int64_t count) {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t m = 0; m < a.M; ++m) {
        const int64_t row = m * most + q, to = (n * a.Q + first + q) * a.M + m;
        const bool none = keys.kept.count(n) == 0;
        const C weight = sum<C>(load(total + row * W)), scale = none ? 0 : 1 / weight;
        C* const sums = output + row * value_width;
        for (int64_t d = 0; d < value_width; d += W) store(sums + d, load(sums + d) * scale);
        if (a.delta != nullptr) {
          a.delta[to] = dot<C>(sums, a.grad_output.at(n, first + q, m), a.Dv);
          continue;
        }
        convert(sums, a.output + to * a.Dv, a.Dv);
        a.logsumexp[to] = none ? std::numeric_limits<C>::infinity() : top[row] + std::log(weight);
      }
  }
};

}  // namespace relops::RELOPS_ISA
