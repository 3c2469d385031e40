// Relation attention on the CPU; compiled once per instruction set by foreach_isa.h.
//
// Per pair and head, forward: 64 multiply-adds of the geometry, D of the logit, Dv of the output; backward: these
// again, 64 for the weights of the geometry, Dv for the gradient of p and D + D + Dv for those of query, key and value.
// Beside them stand 16 sines and cosines per pair (not per head) and an exponential per pair and head. All products run
// in one register-tiled kernel, `multiply`, which is what bounds both directions.
//
// A tile of keys, kTile<C> of them in lanes, is packed head by head, transposed where keys are the lanes of a product,
// and without the masked ones; then blocks of queries visit it. Forward, an item is some of the queries of an image
// with all heads, so that they share the sines. Backward, an item is some of the heads: it owns the gradients of their
// queries, keys and weights, so that nothing is summed in an order that depends on threads.

#include "common/cpu/simd.h"

namespace relops::RELOPS_ISA {

namespace {

template <class C>
constexpr int64_t kTile = 256 / sizeof(C);  // keys

// Vectors that are put through a chain of operations side by side.
constexpr int kAtOnce = 4;

// ---- Products ----

// What of a product is kept in registers: 24 of AVX-512's 32, 12 of the 16 elsewhere.
constexpr int kPanelRows = 6, kPanelVectors = RELOPS_VECTOR_BYTES == 64 ? 4 : 2;

// Element (i, j) of a matrix is at data[i * row + j * step].
template <class C>
struct Matrix {
  const C* data;
  int64_t row, step;
};

// Of a times b: b [depth, lanes] has its rows b_row apart.
template <class C>
struct Factors {
  Matrix<C> a;
  const C* b;
  int64_t b_row, depth;
};

template <class C, int R, int V>
inline void add_products(const Factors<C>& f, Vec<C> (&sums)[R][V]) {
  const C *a = f.a.data, *b = f.b;
  for (int64_t i = 0; i < f.depth; ++i, a += f.a.step, b += f.b_row) {
    Vec<C> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kLanes<C>);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const C x = a[r * f.a.row];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += x * row[v];
    }
  }
}

template <class C, int R, int V>
void multiply_panel(const Factors<C>& f, const Factors<C>* more, bool add, C* out, int64_t out_row) {
  Vec<C> sums[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = add ? load(out + r * out_row + v * kLanes<C>) : Vec<C>{};
  add_products(f, sums);
  if (more != nullptr) add_products(*more, sums);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * out_row + v * kLanes<C>, sums[r][v]);
}

// The panels of every size, by V - 1 and R - 1.
template <class C, class R = std::make_integer_sequence<int, kPanelRows>,
          class V = std::make_integer_sequence<int, kPanelVectors>>
struct Panels;
template <class C, int... R, int... V>
struct Panels<C, std::integer_sequence<int, R...>, std::integer_sequence<int, V...>> {
  using Panel = void (*)(const Factors<C>&, const Factors<C>*, bool, C*, int64_t);
  template <int kV>
  struct Row {
    static constexpr Panel of[] = {multiply_panel<C, R + 1, kV>...};
  };
  static constexpr const Panel* of[] = {Row<V + 1>::of...};
};

// Calls f(first, height) for panels of equal height, as far as that goes, that make up `rows`.
template <class F>
inline void for_panels(int64_t rows, F f) {
  int64_t first = 0;
  for (int64_t left = ceil_div(rows, kPanelRows); left > 0; --left) {
    const int64_t height = ceil_div(rows - first, left);
    f(first, height);
    first += height;
  }
}

// out [rows, vectors of lanes] = (add: +=) the product of the factors, and of `more` where there is it.
template <class C>
inline void multiply(const Factors<C>& f, int64_t rows, int64_t vectors, C* out, int64_t out_row, bool add = false,
                     const Factors<C>* more = nullptr) {
  for (int64_t v = 0; v < vectors; v += kPanelVectors) {
    const auto* const panels = Panels<C>::of[std::min<int64_t>(vectors - v, kPanelVectors) - 1];
    const auto at = [&](Factors<C> of, int64_t r) {
      of.a.data += r * of.a.row;
      of.b += v * kLanes<C>;
      return of;
    };
    for_panels(rows, [&](int64_t r, int64_t height) {
      const Factors<C> second = more == nullptr ? Factors<C>{} : at(*more, r);
      panels[height - 1](at(f, r), more == nullptr ? nullptr : &second, add, out + r * out_row + v * kLanes<C>,
                         out_row);
    });
  }
}

template <class C, int R>
void multiply_lanes_panel(int64_t count, int64_t vectors, const C* a, int64_t a_stride, const C* b, int64_t b_stride,
                          C* sums, int64_t sums_row) {
  constexpr int64_t W = kLanes<C>;
  constexpr int V = kPanelVectors;
  Vec<C> panel[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) panel[r][v] = load(sums + r * sums_row + v * W);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < vectors * W; k += W) {
      Vec<C> column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) column[v] = load(b + i * b_stride + v * kTile<C> + k);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Vec<C> x = load(a + i * a_stride + r * kTile<C> + k);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) panel[r][v] += x * column[v];
      }
    }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + r * sums_row + v * W, panel[r][v]);
}

template <class C, int... R>
constexpr auto lanes_panels(std::integer_sequence<int, R...>) {
  return std::array{multiply_lanes_panel<C, R + 1>...};
}

// sums [rows, columns, lanes] += a [count, rows, kTile] times b [count, columns, kTile], lane by lane, over the first
// vectors of each tile. Entries of a and b lie a_stride and b_stride apart.
template <class C>
inline void multiply_lanes(int64_t rows, int64_t columns, int64_t count, int64_t vectors, const C* a, int64_t a_stride,
                           const C* b, int64_t b_stride, C* sums) {
  static constexpr auto kPanels = lanes_panels<C>(std::make_integer_sequence<int, kPanelRows>());
  const int64_t row = columns * kLanes<C>;
  for_panels(rows, [&](int64_t r, int64_t height) {
    for (int64_t c = 0; c < columns; c += kPanelVectors)
      kPanels[height - 1](count, vectors, a + r * kTile<C>, a_stride, b + c * kTile<C>, b_stride,
                          sums + r * row + c * kLanes<C>, row);
  });
}

// ---- Geometry ----

template <class C>
struct Bits;
template <>
struct Bits<float> {
  static constexpr int kMantissa = 23;
  static constexpr int32_t kSign = INT32_MIN, kRootHalf = 0x3f3504f3;
  static constexpr float kRounder = 12582912.0f;  // added, leaves an integer in the low bits
};
template <>
struct Bits<double> {
  static constexpr int kMantissa = 52;
  static constexpr int64_t kSign = INT64_MIN, kRootHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kRounder = 6755399441055744.0;
};

template <class C>
inline Vec<C> absolute(Vec<C> x) {
  return (Vec<C>)((VecInt<C>)x & ~Bits<C>::kSign);
}

// Of x > 0; of 0 an exponent below that of every number.
template <class C>
inline Log2<Vec<C>> log2_of(Vec<C> x) {
  const VecInt<C> n = ((VecInt<C>)x - Bits<C>::kRootHalf) >> Bits<C>::kMantissa;
  const Vec<C> mantissa = (Vec<C>)((VecInt<C>)x - (n << Bits<C>::kMantissa));
  const Vec<C> r = (mantissa - 1) / (mantissa + 1);
  return {__builtin_convertvector(n, Vec<C>), r * Series<C>::log2(r * r)};
}

// The sines and cosines of one coordinate, to rows `row` apart.
template <class C>
inline void store_terms(const Waves<C>& waves, Log2<Vec<C>> log2, C* terms, int64_t row) {
  using F = Batch<C, kAtOnce>;
#pragma GCC unroll 2
  for (int j = 0; j < kWaves; j += kAtOnce) {
    const Wave<C>* const wave = waves.of + j;
    const F exact = batch<C, kAtOnce>([&](int i) { return log2.n * wave[i].high; });
    const F rest = batch<C, kAtOnce>([&](int i) { return log2.n * wave[i].low + log2.l * wave[i].per_octave; });
    const F shifted = exact + rest + Bits<C>::kRounder;
    const F r = (exact - (shifted - Bits<C>::kRounder)) + rest, u = r * r;
    const F sine = r * Series<C>::sine(u), cosine = Series<C>::cosine(u);
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) {
      // An odd number of half turns changes both signs.
      const VecInt<C> sign = (VecInt<C>)shifted.v[i] << (8 * sizeof(C) - 1);
      store(terms + (j + i) * row, (Vec<C>)((VecInt<C>)sine.v[i] ^ sign));
      store(terms + (kWaves + j + i) * row, (Vec<C>)((VecInt<C>)cosine.v[i] ^ sign));
    }
  }
}

// Boxes coordinate by coordinate, padded to whole vectors.
template <class C>
struct BoxTable {
  int64_t padded;
  C *x_high, *x_low, *y_high, *y_low;  // centers
  C *width, *height;
  C *width_n, *width_l, *height_n, *height_l;  // log2
  C *terms, *term_rows;                        // [32,padded], [padded,32], of width and height; NaN for no box

  BoxTable(int64_t count, Scratch& scratch) : padded(round_up(count, kLanes<C>)) {
    for (C** array : {&x_high, &x_low, &y_high, &y_low, &width, &height, &width_n, &width_l, &height_n, &height_l})
      *array = scratch.take<C>(padded);
    terms = scratch.take<C>(kHalf * padded);
    term_rows = scratch.take<C>(kHalf * padded);
  }

  // Box i is boxes[index[i]], for i < count. The last vector is padded with boxes of one pixel.
  void fill(const Waves<C>& waves, const C* boxes, const int32_t* index, int64_t count) {
    constexpr int64_t W = kLanes<C>;
    for (int64_t first = 0; first < count; first += W) {
      alignas(64) C of[4][W] = {};
      for (int64_t i = 0; i < std::min(W, count - first); ++i)
        for (int c = 0; c < 4; ++c) of[c][i] = boxes[4 * index[first + i] + c];
      const Vec<C> x1 = load(of[0]), y1 = load(of[1]), x2 = load(of[2]), y2 = load(of[3]);
      const TwoPart<Vec<C>> x = middle(x1, x2), y = middle(y1, y2);
      const Vec<C> w = x2 - x1 + 1, h = y2 - y1 + 1, none = {};
      // What is not finite is not 0 when multiplied by it.
      const VecInt<C> valid = (w > 0) & (h > 0) & ((x1 + y1 + x2 + y2 + w + h) * none == none);
      const Log2<Vec<C>> log2_w = log2_of<C>(w), log2_h = log2_of<C>(h);
      store(x_high + first, x.high);
      store(x_low + first, x.low);
      store(y_high + first, y.high);
      store(y_low + first, y.low);
      store(width + first, w);
      store(height + first, h);
      store(width_n + first, log2_w.n);
      store(width_l + first, log2_w.l);
      store(height_n + first, log2_h.n);
      store(height_l + first, log2_h.l);
      store_terms(waves, log2_w, terms + first, padded);
      store_terms(waves, log2_h, terms + kTerms * padded + first, padded);
      const Vec<C> nan = broadcast(std::numeric_limits<C>::quiet_NaN());
      for (int i = 0; i < kHalf; ++i) {
        C* at = terms + i * padded + first;
        store(at, valid ? load(at) : nan);
      }
      for (int i = 0; i < kHalf; i += W) {
        Vec<C> block[W];
        for (int j = 0; j < W; ++j) block[j] = load(terms + (i + j) * padded + first);
        transpose<C>(block);
        for (int j = 0; j < W; ++j) store(term_rows + (first + j) * kHalf + i, block[j]);
      }
    }
  }
};

// A query beside a vector of keys that begins at `first`: the differences of their centers, and the sizes that they are
// divided by.
template <class C>
struct Pairs {
  Vec<C> dx, dy, w, h;
  Log2<Vec<C>> log2_w, log2_h;

  Pairs(bool by_query, const BoxTable<C>& queries, int64_t q, const BoxTable<C>& keys, int64_t first) {
    const auto center = [&](const C* high, const C* low, const C* key_high, const C* key_low) {
      return difference<Vec<C>>({broadcast(high[q]), broadcast(low[q])},
                                {load(key_high + first), load(key_low + first)});
    };
    dx = center(queries.x_high, queries.x_low, keys.x_high, keys.x_low);
    dy = center(queries.y_high, queries.y_low, keys.y_high, keys.y_low);
    const auto size = [&](const C* query, const C* key) { return by_query ? broadcast(query[q]) : load(key + first); };
    w = size(queries.width, keys.width);
    h = size(queries.height, keys.height);
    log2_w = {size(queries.width_n, keys.width_n), size(queries.width_l, keys.width_l)};
    log2_h = {size(queries.height_n, keys.height_n), size(queries.height_l, keys.height_l)};
  }
};

// log2 max(|d| / size, 1e-3)
template <class C>
inline Log2<Vec<C>> log2_ratio(Vec<C> d, Log2<Vec<C>> size) {
  const Log2<Vec<C>> ratio = log2_of<C>(absolute<C>(d)) - size;
  const C n = kRatioFloorExponent, l = kRatioFloorMantissa;
  const VecInt<C> above = ratio.n + ratio.l > n + l;
  return {above ? ratio.n : broadcast(n), above ? ratio.l : broadcast(l)};
}

// terms [32,kTile]: of dx and dy between query q and a tile of keys.
template <class C>
inline void pair_terms(const Waves<C>& waves, bool by_query, const BoxTable<C>& queries, int64_t q,
                       const BoxTable<C>& keys, int64_t vectors, C* terms) {
  for (int64_t k = 0; k < vectors * kLanes<C>; k += kLanes<C>) {
    const Pairs<C> pairs(by_query, queries, q, keys, k);
    store_terms(waves, log2_ratio<C>(pairs.dx, pairs.log2_w), terms + k, kTile<C>);
    store_terms(waves, log2_ratio<C>(pairs.dy, pairs.log2_h), terms + kTerms * kTile<C> + k, kTile<C>);
  }
}

// For each term of the separable half, of which weight [64] is a head's and terms [32] are a query's:
// f(place, W_s, W_c, sine, cosine), where place is that of the sine in 32.
template <class C, class F>
inline void for_separable(const C* weight, const C* terms, F f) {
  for (int c = 0; c < 2; ++c)
#pragma GCC ivdep
    for (int j = 0; j < kWaves; ++j) {
      const int at = c * kTerms + j;
      f(at, weight[kHalf + at], weight[kHalf + at + kWaves], terms[at], terms[at + kWaves]);
    }
}

// out [32]: the weights that the terms of a key's width and height have for a query and head.
template <class C>
inline void rotate(const C* weight, const C* terms, C* out) {
  for_separable(weight, terms, [out](int at, C of_sine, C of_cosine, C sine, C cosine) {
    out[at] = of_cosine * sine - of_sine * cosine;
    out[at + kWaves] = of_sine * sine + of_cosine * cosine;
  });
}

// b [heads,kTile], without biases, of query q and a tile of keys; terms [32,kTile] as pair_terms leaves them. weight
// and rotated are those of the first head.
template <class C>
inline void geometry_of(const Waves<C>& waves, bool by_query, const BoxTable<C>& queries, int64_t q,
                        const BoxTable<C>& keys, int64_t vectors, int64_t heads, const C* weight, const C* rotated,
                        C* terms, C* b) {
  pair_terms(waves, by_query, queries, q, keys, vectors, terms);
  const Factors<C> separable{{rotated, kHalf, 1}, keys.terms, keys.padded, kHalf};
  multiply<C>({{weight, kEmbedding, 1}, terms, kTile<C>, kHalf}, heads, vectors, b, kTile<C>, false, &separable);
}

// ---- Packing ----

// out[i][0..padded) = scale * (the row of entry index[i]), with zeros after its D elements.
template <class C, class T>
inline void pack_rows(FeatureRows<const T> rows, int64_t n, int64_t m, const int32_t* index, int64_t count, int64_t D,
                      C scale, C* out, int64_t padded) {
  constexpr int64_t W = kLanes<C>;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows.at(n, index[i], m);
    for (int64_t d = 0; d < padded; d += W)
      store(out + i * padded + d, load_first(row + d, std::max<int64_t>(D - d, 0)) * scale);
  }
}

// out[d][i] = element d of entry index[i], zero for i from count to the end of its vector. Rows of out lie `row` apart.
template <class C, class T>
inline void pack_columns(FeatureRows<const T> rows, int64_t n, int64_t m, const int32_t* index, int64_t count,
                         int64_t D, C* out, int64_t row) {
  constexpr int64_t W = kLanes<C>;
  for (int64_t first = 0; first < count; first += W)
    for (int64_t d = 0; d < D; d += W) {
      Vec<C> block[W];
      for (int64_t i = 0; i < W; ++i)
        block[i] = first + i < count ? load_first(rows.at(n, index[first + i], m) + d, D - d) : Vec<C>{};
      transpose<C>(block);
      for (int64_t i = 0; i < std::min(W, D - d); ++i) store(out + (d + i) * row + first, block[i]);
    }
}

template <class C, class A, class B>
inline C dot(const A* a, const B* b, int64_t n) {
  Vec<C> products = {};
  for (int64_t d = 0; d < n; d += kLanes<C>) products += load_first(a + d, n - d) * load_first(b + d, n - d);
  return sum<C>(products);
}

// Into the second cache: `lines` cache lines of p[0..size), from line `first` on.
template <class C>
inline void prefetch_lines(const C* p, int64_t size, int64_t first, int64_t lines) {
  constexpr int64_t kLine = 64 / sizeof(C);
  for (int64_t i = first * kLine; i < std::min((first + lines) * kLine, size); i += kLine)
    __builtin_prefetch(p + i, 0, 2);
}

// Minus infinity in the lanes of the last vector of logits p[0..count) that are of no key.
template <class C>
inline void mask_last(C* p, int64_t count) {
  constexpr int64_t W = kLanes<C>;
  const Int<C> left = static_cast<Int<C>>(count % W);
  if (left == 0) return;
  C* const last = p + count - left;
  const VecInt<C> key = lanes<C>([](Int<C> j) { return j; }) < left;
  store(last, key ? load(last) : broadcast(-std::numeric_limits<C>::infinity()));
}

template <class C>
inline Vec<C> above_floor(Vec<C> b) {
  return maximum(broadcast(static_cast<C>(kWeightFloor)), b);
}

}  // namespace

// ---- Forward ----

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

// ---- Backward ----

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
