// relation_attention on the CPU: the geometry of pairs. BoxTable holds the values that depend on a single box.
// geometry_of computes the sines and cosines of pairs and, from these and the box tables, b for all heads. problem.h
// explains the mathematics.
#ifndef RELOPS_RELATION_ATTENTION_GEOMETRY
#define RELOPS_RELATION_ATTENTION_GEOMETRY

#include "common/cpu/simd.h"
#include "relation_attention/cpu_args.h"
#include "relation_attention/cpu_products.h"

namespace relops::RELOPS_ISA {

namespace {

// The number of vectors that a chain of dependent operations processes at the same time, to hide the latency of each
// operation.
constexpr int kAtOnce = 4;

template <class Compute>
struct Bits;
template <>
struct Bits<float> {
  static constexpr int kMantissa = 23;
  static constexpr int32_t kSign = INT32_MIN, kRootHalf = 0x3f3504f3;
  static constexpr float kRounder = 12582912.0f;  // adding it leaves the rounded integer in the low bits
};
template <>
struct Bits<double> {
  static constexpr int kMantissa = 52;
  static constexpr int64_t kSign = INT64_MIN, kRootHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kRounder = 6755399441055744.0;
};

template <class Compute>
inline Vec<Compute> absolute(Vec<Compute> x) {
  return (Vec<Compute>)((VecInt<Compute>)x & ~Bits<Compute>::kSign);
}

// Returns log2 of x > 0. For x = 0, the exponent is smaller than that of every positive number.
template <class Compute>
inline Log2<Vec<Compute>> log2_of(Vec<Compute> x) {
  const VecInt<Compute> n = ((VecInt<Compute>)x - Bits<Compute>::kRootHalf) >> Bits<Compute>::kMantissa;
  const Vec<Compute> mantissa = (Vec<Compute>)((VecInt<Compute>)x - (n << Bits<Compute>::kMantissa));
  const Vec<Compute> r = (mantissa - 1) / (mantissa + 1);
  return {__builtin_convertvector(n, Vec<Compute>), r * Series<Compute>::log2(r * r)};
}

// Writes the sines and cosines of one coordinate, given its log2, to rows that are `row` elements apart.
template <class Compute>
inline void store_terms(const Waves<Compute>& waves, Log2<Vec<Compute>> log2, Compute* terms, int64_t row) {
  using F = Batch<Compute, kAtOnce>;
#pragma GCC unroll 2
  for (int j = 0; j < kWaves; j += kAtOnce) {
    const Wave<Compute>* const wave = waves.wave + j;
    const F exact = batch<Compute, kAtOnce>([&](int i) { return log2.n * wave[i].high; });
    const F rest = batch<Compute, kAtOnce>([&](int i) { return log2.n * wave[i].low + log2.l * wave[i].per_octave; });
    const F shifted = exact + rest + Bits<Compute>::kRounder;
    const F r = (exact - (shifted - Bits<Compute>::kRounder)) + rest, u = r * r;
    const F sine = r * Series<Compute>::sine(u), cosine = Series<Compute>::cosine(u);
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) {
      // An odd number of half turns changes the signs of sine and cosine.
      const VecInt<Compute> sign = (VecInt<Compute>)shifted.v[i] << (8 * sizeof(Compute) - 1);
      store(terms + (j + i) * row, (Vec<Compute>)((VecInt<Compute>)sine.v[i] ^ sign));
      store(terms + (kWaves + j + i) * row, (Vec<Compute>)((VecInt<Compute>)cosine.v[i] ^ sign));
    }
  }
}

// The values that depend on a single box, stored coordinate by coordinate and padded to whole vectors of boxes.
template <class Compute>
struct BoxTable {
  int64_t padded;
  Compute *x_high, *x_low, *y_high, *y_low;  // centers
  Compute *width, *height;
  Compute *width_n, *width_l, *height_n, *height_l;  // log2 as n + l
  Compute *terms, *term_rows;  // [32,padded], [padded,32]: for width and height; NaN if the box is invalid

  BoxTable(int64_t count, Scratch& scratch) : padded(round_up(count, kLanes<Compute>)) {
    for (Compute** array :
         {&x_high, &x_low, &y_high, &y_low, &width, &height, &width_n, &width_l, &height_n, &height_l})
      *array = scratch.allocate<Compute>(padded);
    terms = scratch.allocate<Compute>(kHalf * padded);
    term_rows = scratch.allocate<Compute>(kHalf * padded);
  }

  // Sets box i of the table to boxes[index[i]] for i < count. The last vector is padded with boxes of one pixel.
  void fill(const Waves<Compute>& waves, const Compute* boxes, const int32_t* index, int64_t count) {
    constexpr int64_t V = kLanes<Compute>;
    for (int64_t first = 0; first < count; first += V) {
      alignas(64) Compute coordinates[4][V] = {};
      for (int64_t i = 0; i < std::min(V, count - first); ++i)
        for (int c = 0; c < 4; ++c) coordinates[c][i] = boxes[4 * index[first + i] + c];
      const Vec<Compute> x1 = load(coordinates[0]), y1 = load(coordinates[1]), x2 = load(coordinates[2]),
                         y2 = load(coordinates[3]);
      const TwoPart<Vec<Compute>> x = middle(x1, x2), y = middle(y1, y2);
      const Vec<Compute> w = x2 - x1 + 1, h = y2 - y1 + 1, zeros = {};
      // A non-finite number multiplied by 0 is NaN, not 0.
      const VecInt<Compute> valid = (w > 0) & (h > 0) & ((x1 + y1 + x2 + y2 + w + h) * zeros == zeros);
      const Log2<Vec<Compute>> log2_w = log2_of<Compute>(w), log2_h = log2_of<Compute>(h);
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
      const Vec<Compute> nan = broadcast(std::numeric_limits<Compute>::quiet_NaN());
      for (int i = 0; i < kHalf; ++i) {
        Compute* at = terms + i * padded + first;
        store(at, valid ? load(at) : nan);
      }
      for (int i = 0; i < kHalf; i += V) {
        Vec<Compute> block[V];
        for (int j = 0; j < V; ++j) block[j] = load(terms + (i + j) * padded + first);
        transpose<Compute>(block);
        for (int j = 0; j < V; ++j) store(term_rows + (first + j) * kHalf + i, block[j]);
      }
    }
  }
};

// A query paired with the vector of keys that begins at `first`: the differences of their centers, and the sizes by
// which the differences are divided.
template <class Compute>
struct Pairs {
  Vec<Compute> dx, dy, w, h;
  Log2<Vec<Compute>> log2_w, log2_h;

  Pairs(bool by_query, const BoxTable<Compute>& queries, int64_t q, const BoxTable<Compute>& keys, int64_t first) {
    const auto center = [&](const Compute* high, const Compute* low, const Compute* key_high, const Compute* key_low) {
      return difference<Vec<Compute>>({broadcast(high[q]), broadcast(low[q])},
                                      {load(key_high + first), load(key_low + first)});
    };
    dx = center(queries.x_high, queries.x_low, keys.x_high, keys.x_low);
    dy = center(queries.y_high, queries.y_low, keys.y_high, keys.y_low);
    const auto size = [&](const Compute* query, const Compute* key) {
      return by_query ? broadcast(query[q]) : load(key + first);
    };
    w = size(queries.width, keys.width);
    h = size(queries.height, keys.height);
    log2_w = {size(queries.width_n, keys.width_n), size(queries.width_l, keys.width_l)};
    log2_h = {size(queries.height_n, keys.height_n), size(queries.height_l, keys.height_l)};
  }
};

// Returns log2 max(|d| / size, 1e-3).
template <class Compute>
inline Log2<Vec<Compute>> log2_ratio(Vec<Compute> d, Log2<Vec<Compute>> size) {
  const Log2<Vec<Compute>> ratio = log2_of<Compute>(absolute<Compute>(d)) - size;
  const Compute n = kRatioFloorExponent, l = kRatioFloorMantissa;
  const VecInt<Compute> above = ratio.n + ratio.l > n + l;
  return {above ? ratio.n : broadcast(n), above ? ratio.l : broadcast(l)};
}

// Sets terms [32,kTile] to the sines and cosines of dx and dy between query q and a tile of keys.
template <class Compute>
inline void pair_terms(const Waves<Compute>& waves, bool by_query, const BoxTable<Compute>& queries, int64_t q,
                       const BoxTable<Compute>& keys, int64_t vectors, Compute* terms) {
  for (int64_t k = 0; k < vectors * kLanes<Compute>; k += kLanes<Compute>) {
    const Pairs<Compute> pairs(by_query, queries, q, keys, k);
    store_terms(waves, log2_ratio<Compute>(pairs.dx, pairs.log2_w), terms + k, kTile<Compute>);
    store_terms(waves, log2_ratio<Compute>(pairs.dy, pairs.log2_h), terms + kTerms * kTile<Compute> + k,
                kTile<Compute>);
  }
}

// Calls f(i, W_s, W_c, sine, cosine) for each wave of the separable half. weight [64] belongs to a head, terms [32]
// belong to a query, and i is the index of the sine in terms.
template <class Compute, class F>
inline void for_separable(const Compute* weight, const Compute* terms, F f) {
  for (int c = 0; c < 2; ++c)
#pragma GCC ivdep
    for (int j = 0; j < kWaves; ++j) {
      const int at = c * kTerms + j;
      f(at, weight[kHalf + at], weight[kHalf + at + kWaves], terms[at], terms[at + kWaves]);
    }
}

// Sets out [32] to the weights that a query and head give to the terms of a key's width and height.
template <class Compute>
inline void rotate(const Compute* weight, const Compute* terms, Compute* out) {
  for_separable(weight, terms, [out](int at, Compute of_sine, Compute of_cosine, Compute sine, Compute cosine) {
    out[at] = of_cosine * sine - of_sine * cosine;
    out[at + kWaves] = of_sine * sine + of_cosine * cosine;
  });
}

// For query q and a tile of keys, computes b [heads,kTile] without the biases, and terms [32,kTile], which are the
// sines and cosines of dx and dy. `weight` and `rotated` begin at the first head.
template <class Compute>
inline void geometry_of(const Waves<Compute>& waves, bool by_query, const BoxTable<Compute>& queries, int64_t q,
                        const BoxTable<Compute>& keys, int64_t vectors, int64_t heads, const Compute* weight,
                        const Compute* rotated, Compute* terms, Compute* b) {
  pair_terms(waves, by_query, queries, q, keys, vectors, terms);
  const Factors<Compute> separable{{rotated, kHalf, 1}, keys.terms, keys.padded, kHalf};
  multiply<Compute>({{weight, kEmbedding, 1}, terms, kTile<Compute>, kHalf}, heads, vectors, b, kTile<Compute>, false,
                    &separable);
}

// Returns max(b, 1e-6), or NaN if b is NaN.
template <class Compute>
inline Vec<Compute> above_floor(Vec<Compute> b) {
  return maximum(broadcast(static_cast<Compute>(kWeightFloor)), b);
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
