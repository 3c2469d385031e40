// relation_attention on the CPU: geometry.

namespace relops::RELOPS_ISA {

namespace {

// Vectors that are put through a chain of operations side by side.
constexpr int kAtOnce = 4;

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

}  // namespace

}  // namespace relops::RELOPS_ISA
