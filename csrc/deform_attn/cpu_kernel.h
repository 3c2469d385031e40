// Multi-scale deformable attention on the CPU; compiled once per instruction set by foreach_isa.h.
//
// The work is Q * M * L * P samples of four rows of D values each; what bounds it is fetching those rows. In value
// [N,S,M,D] the rows of one head lie M * D apart, which leaves all but 1/M of the sets of a cache unused, so where
// queries are many a thread first copies the rows of its (image, head) into a dense array, converted to the compute
// type, and gathers from there: one head of a 100x152 pyramid is 2.6 MB instead of 20, and its smaller levels stay in
// L2. Where queries are few (a decoder) rows are read where they lie.
//
// One item is one (image, query, head). Its L * P samples are first turned into row indices and weights, a vector of
// samples at a time; then their rows are accumulated, a vector of channels at a time. A corner outside its level points
// at a row of zeros, so that the inner loop has no branch. No sampled value is ever stored.
//
// Backward: a thread owns the gradient of an (image, head), so sums need neither locks nor atomics and come out the
// same every time. Where there are fewer (image, head) pairs than threads, queries are split into a few parts with sums
// of their own, added up in a fixed order at the end.

#include "common/cpu/simd.h"

namespace relops::RELOPS_ISA {

namespace {

// Rows of one (image, head) where they lie. Row S, all zeros, stands for whatever is outside.
template <class R>
struct PlacedRows {
  R* base;
  int64_t stride;
  R* zero;
  int64_t S;
  R* operator[](int64_t i) const { return i == S ? zero : base + i * stride; }
  template <int64_t kWidth>
  PlacedRows of_width() const {
    return *this;
  }
};

// Rows in an array of their own, row S among them. kWidth: their width where known when compiling, else 0.
template <class R, int64_t kWidth = 0>
struct DenseRows {
  R* base;
  int64_t width;
  R* operator[](int64_t i) const { return base + i * (kWidth ? kWidth : width); }
  template <int64_t kKnown>
  DenseRows<R, kKnown> of_width() const {
    return {base, width};
  }
};

// Constants of the L * P samples of an item, padded to whole vectors with samples of an empty level.
template <class C>
struct SampleConstants {
  int64_t count, padded;
  C *width, *height;
  Int<C>*width_int, *height_int, *start;
  Int<C>* level;

  template <class Args>
  SampleConstants(const Args& a, Scratch& scratch)
      : count(a.L * a.P),
        padded(round_up(count, kLanes<C>)),
        width(scratch.take<C>(padded)),
        height(scratch.take<C>(padded)),
        width_int(scratch.take<Int<C>>(padded)),
        height_int(scratch.take<Int<C>>(padded)),
        start(scratch.take<Int<C>>(padded)),
        level(scratch.take<Int<C>>(padded)) {
    for (int64_t s = 0; s < padded; ++s) {
      const Level of = s < count ? a.levels[s / a.P] : Level{0, 0, 0};
      width[s] = of.width;
      height[s] = of.height;
      width_int[s] = of.width;
      height_int[s] = of.height;
      start[s] = of.start;
      level[s] = s < count ? s / a.P : 0;
    }
  }
};

// The samples of one item. Corners are numbered (top left, top right, bottom left, bottom right).
template <class C>
struct Samples {
  C *x, *y;   // pixels
  C* weight;  // attention weight
  C *fraction_x, *fraction_y;
  Int<C>* row[4];       // index of a corner's row; S outside
  C* corner_weight[4];  // bilinear weight times attention weight; 0 where the whole sample is outside
  C* dot[4];            // backward: gradient of the output times the corner's row
  C* raw;               // locations or offsets as given, converted
  C *grad_xy, *grad_weight;

  Samples(int64_t padded, bool backward, Scratch& scratch) {
    for (C** p : {&x, &y, &weight, &fraction_x, &fraction_y}) *p = scratch.take<C>(padded);
    for (auto& p : row) p = scratch.take<Int<C>>(padded);
    for (auto& p : corner_weight) p = scratch.take<C>(padded);
    raw = scratch.take<C>(2 * padded);
    if (!backward) return;
    for (auto& p : dot) p = scratch.take<C>(padded);
    grad_xy = scratch.take<C>(2 * padded);
    grad_weight = scratch.take<C>(padded);
  }
};

// The pairs p[0..2 * count) as C, padded with zeros: p itself where nothing is to be converted or padded.
template <class C, class U>
const C* padded_pairs(const U* p, const SampleConstants<C>& k, C* buffer) {
  if constexpr (std::is_same_v<U, C>)
    if (k.count == k.padded) return p;
  convert(p, buffer, 2 * k.count);
  for (int64_t i = 2 * k.count; i < 2 * k.padded; ++i) buffer[i] = 0;
  return buffer;
}

// The reference point or box of each sample's level, a vector of samples at a time.
template <class C>
class References {
 public:
  template <class Args>
  References(const Args& a, int64_t n, int64_t q, const SampleConstants<C>& k)
      : k_(k), R_(a.R), ref_(a.reference + (n * a.Q + q) * a.L * a.R), in_vector_(a.L * a.R <= kLanes<C>) {
    if (!in_vector_) return;
    alignas(64) C few[kLanes<C>] = {};
    const bool inside = ref_ + kLanes<C> <= a.reference + a.N * a.Q * a.L * a.R;
    if (!inside) std::copy_n(ref_, a.L * a.R, few);
    all_ = load(inside ? ref_ : few);
  }

  // Coordinate c of the levels of samples i, i + 1, ...
  Vec<C> get(int64_t i, Int<C> c) const {
    const VecInt<C> at = load_int<C>(k_.level + i) * static_cast<Int<C>>(R_) + c;
    if (in_vector_) return __builtin_shuffle(all_, at);
    Vec<C> v;
    for (int j = 0; j < kLanes<C>; ++j) v[j] = ref_[at[j]];
    return v;
  }

 private:
  const SampleConstants<C>& k_;
  int64_t R_;
  const C* ref_;
  bool in_vector_;
  Vec<C> all_;
};

// Prefetches p[first..first + count). The address is computed as a number, because it may be nobody's.
// always_inline, because GCC drops calls of a function that does nothing but prefetch: it sees no effect in them.
template <class X>
[[gnu::always_inline]] inline void prefetch(const X* p, int64_t first, int64_t count) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + first * sizeof(X);
  for (uintptr_t byte = 0; byte < count * sizeof(X); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(address + byte));
}

// Asks for what the backward of item (n, q, m) reads and writes. The items of a head lie a row of all heads apart,
// which the processor's own prefetchers do not follow, and an item is too much work to look past it out of order.
// There may be no such item, or a gradient not be wanted: a prefetch does not mind.
template <class T, class U>
[[gnu::always_inline]] inline void prefetch_item(const MsDeformAttnArgs<T, U>& a, int64_t n, int64_t q, int64_t m) {
  const int64_t item = (n * a.Q + q) * a.M + m, samples = a.L * a.P;
  prefetch(a.locations, item * samples * 2, samples * 2);
  prefetch(a.weights, item * samples, samples);
  prefetch(a.grad_output, item * a.D, a.D);
  prefetch(a.grad_locations, item * samples * 2, samples * 2);
  prefetch(a.grad_weights, item * samples, samples);
}

// Fills x, y (in pixels) and weight from the inputs of item (n, q, m).
template <class T, class U, class C>
void read_samples(const MsDeformAttnArgs<T, U>& a, const SampleConstants<C>& k, int64_t n, int64_t q, int64_t m,
                  const Samples<C>& s) {
  const int64_t item = (n * a.Q + q) * a.M + m;
  const C* xy = padded_pairs(a.locations + item * k.count * 2, k, s.raw);
  convert(a.weights + item * k.count, s.weight, k.count);
  Vec<C> x, y;
  if (a.reference == nullptr) {
    for (int64_t i = k.count; i < k.padded; ++i) s.weight[i] = 0;
    for (int64_t i = 0; i < k.padded; i += kLanes<C>) {
      load_pairs(xy + 2 * i, x, y);
      store(s.x + i, x * load(k.width + i) - C(0.5));
      store(s.y + i, y * load(k.height + i) - C(0.5));
    }
    return;
  }
  softmax(s.weight, k.count, k.padded);
  const References<C> reference(a, n, q, k);
  const C half_per_point = C(0.5) / a.P;
  for (int64_t i = 0; i < k.padded; i += kLanes<C>) {
    const Vec<C> width = load(k.width + i), height = load(k.height + i);
    load_pairs(xy + 2 * i, x, y);
    if (a.R == 4) {
      x *= reference.get(i, 2) * width * half_per_point;
      y *= reference.get(i, 3) * height * half_per_point;
    }
    store(s.x + i, reference.get(i, 0) * width - C(0.5) + x);
    store(s.y + i, reference.get(i, 1) * height - C(0.5) + y);
  }
}

// From x, y and weight to rows and weights of corners. `mask` is given only where rows are read in place.
template <class C>
void locate_samples(const SampleConstants<C>& k, int64_t S, const bool* mask, const Samples<C>& s) {
  using V = Vec<C>;
  using VI = VecInt<C>;
  const VI outside = broadcast_int<C>(S);
  for (int64_t i = 0; i < k.padded; i += kLanes<C>) {
    V x = load(s.x + i), y = load(s.y + i);
    const VI width = load_int<C>(k.width_int + i), height = load_int<C>(k.height_int + i);
    // False for NaN; what remains fits an int.
    const VI inside = (x > C(-1)) & (x < load(k.width + i)) & (y > C(-1)) & (y < load(k.height + i));
    x = inside ? x : V{};
    y = inside ? y : V{};
    VI left = __builtin_convertvector(x, VI), top = __builtin_convertvector(y, VI);
    left += x < __builtin_convertvector(left, V);  // truncation to floor: a true comparison is -1
    top += y < __builtin_convertvector(top, V);
    const V fx = x - __builtin_convertvector(left, V), fy = y - __builtin_convertvector(top, V);
    const V weight = inside ? load(s.weight + i) : V{};
    const V above = (1 - fy) * weight, below = fy * weight;
    const VI in_left = inside & (left >= 0), in_right = inside & (left + 1 < width);
    const VI in_top = top >= 0, in_bottom = top + 1 < height;
    const VI first = load_int<C>(k.start + i) + top * width + left;
    store(s.fraction_x + i, fx);
    store(s.fraction_y + i, fy);
    store_int<C>(s.row[0] + i, in_left & in_top ? first : outside);
    store_int<C>(s.row[1] + i, in_right & in_top ? first + 1 : outside);
    store_int<C>(s.row[2] + i, in_left & in_bottom ? first + width : outside);
    store_int<C>(s.row[3] + i, in_right & in_bottom ? first + width + 1 : outside);
    store(s.corner_weight[0] + i, (1 - fx) * above);
    store(s.corner_weight[1] + i, fx * above);
    store(s.corner_weight[2] + i, (1 - fx) * below);
    store(s.corner_weight[3] + i, fx * below);
  }
  if (mask == nullptr) return;
  for (auto* row : s.row)
    for (int64_t i = 0; i < k.count; ++i)
      if (row[i] != S && mask[row[i]]) row[i] = S;
}

// Calls f(constant number of vectors, whether they are all of a row, first channel) over the D channels of a row,
// padded to whole vectors.
template <class C, class F>
void for_channels(int64_t D, F f) {
  constexpr int64_t W = kLanes<C>;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 4> four;
  int64_t vectors = ceil_div(D, W), d = 0;
  if (vectors == 1) return f(one, std::true_type{}, 0);
  if (vectors == 2) return f(two, std::true_type{}, 0);
  if (vectors == 4) return f(four, std::true_type{}, 0);
  for (; vectors >= 4; vectors -= 4, d += 4 * W) f(four, std::false_type{}, d);
  if (vectors & 2) f(two, std::false_type{}, d), d += 2 * W;
  if (vectors & 1) f(one, std::false_type{}, d);
}

// Rows as for_channels' f best reads them.
template <bool kWhole, int64_t kWidth, class Rows>
auto known_width(const Rows& rows) {
  if constexpr (kWhole)
    return rows.template of_width<kWidth>();
  else
    return rows;
}

// out[0..D) = sum over samples and corners of weight * row.
template <class T, class Rows, class C>
void gather_item(const Rows& all_rows, const Samples<C>& s, int64_t count, int64_t D, T* out) {
  constexpr int64_t W = kLanes<C>;
  for_channels<C>(D, [&](auto vectors, auto whole, int64_t d) {
    constexpr int V = vectors;
    const auto rows = known_width<whole, V * W>(all_rows);
    // Separate sums break the chain of dependent additions: as many as registers allow.
    constexpr int kSums = V == 4 ? 2 : 4;
    Vec<C> sums[kSums][V];
    for (int k = 0; k < kSums; ++k)
      for (int v = 0; v < V; ++v) sums[k][v] = Vec<C>{};  // = {} would be a memset
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
      for (int corner = 0; corner < 4; ++corner) {
        const auto* row = rows[s.row[corner][i]] + d;
        const C weight = s.corner_weight[corner][i];
        for (int v = 0; v < V; ++v) sums[corner % kSums][v] += weight * load(row + v * W);
      }
    for (int v = 0; v < V; ++v) {
      Vec<C> total = sums[0][v] + sums[1][v];
      if constexpr (kSums == 4) total += sums[2][v] + sums[3][v];
      const int64_t at = d + v * W;
      if (at + W <= D) {
        store(out + at, total);
      } else {
        alignas(64) C tail[W];
        store(tail, total);
        convert(tail, out + at, D - at);
      }
    }
  });
}

// dot[corner][sample] = grad . row, and, with kScatter, sums[row] += corner_weight * grad.
// grad is padded with zeros to whole vectors.
template <bool kScatter, class Rows, class Sums, class C>
void backward_item(const Rows& all_rows, const Sums& all_sums, const Samples<C>& s, int64_t count, int64_t D,
                   const C* grad) {
  constexpr int64_t W = kLanes<C>;
  constexpr int kGroup = W < 4 ? 1 : W / 4;  // samples whose 4 dot products fill a vector
  for_channels<C>(D, [&](auto vectors, auto whole, int64_t d) {
    constexpr int V = vectors;
    const auto rows = known_width<whole, V * W>(all_rows);
    const auto sums = known_width<whole, V * W>(all_sums);
    Vec<C> g[V];
    for (int v = 0; v < V; ++v) g[v] = load(grad + d + v * W);
    for (int64_t i = 0; i < count; i += kGroup) {
      Vec<C> partial[4 * kGroup];
      for (int j = 0; j < kGroup; ++j)
#pragma GCC unroll 4
        for (int corner = 0; corner < 4; ++corner) {
          const Int<C> index = s.row[corner][i + j];
          const auto* row = rows[index] + d;
          Vec<C> product = g[0] * load(row);
          for (int v = 1; v < V; ++v) product += g[v] * load(row + v * W);
          partial[corner * kGroup + j] = product;
          if constexpr (kScatter) {
            C* to = sums[index] + d;
            const C weight = s.corner_weight[corner][i + j];
            for (int v = 0; v < V; ++v) store(to + v * W, load(to + v * W) + weight * g[v]);
          }
        }
      alignas(64) C dots[4 * kGroup];
      for (int b = 0; b < 4 * kGroup; b += W) store(dots + b, transpose_sum<C>(partial + b));
      for (int corner = 0; corner < 4; ++corner)
        for (int j = 0; j < kGroup; ++j)
          s.dot[corner][i + j] = dots[corner * kGroup + j] + (d == 0 ? C(0) : s.dot[corner][i + j]);
    }
  });
}

// From the dot products to the gradients of locations and weights (or offsets, logits and reference) of an item.
template <class T, class U, class C>
void write_sampling_grads(const MsDeformAttnArgs<T, U>& a, const SampleConstants<C>& k, int64_t n, int64_t q, int64_t m,
                          const Samples<C>& s) {
  const int64_t item = (n * a.Q + q) * a.M + m;
  for (int64_t i = 0; i < k.padded; i += kLanes<C>) {
    const Vec<C> fx = load(s.fraction_x + i), fy = load(s.fraction_y + i), weight = load(s.weight + i);
    const Vec<C> d0 = load(s.dot[0] + i), d1 = load(s.dot[1] + i), d2 = load(s.dot[2] + i), d3 = load(s.dot[3] + i);
    const Vec<C> dx = (1 - fy) * (d1 - d0) + fy * (d3 - d2), dy = (1 - fx) * (d2 - d0) + fx * (d3 - d1);
    store(s.grad_weight + i, (1 - fy) * ((1 - fx) * d0 + fx * d1) + fy * ((1 - fx) * d2 + fx * d3));
    store(s.x + i, weight * dx);  // x and y are spent; from here on they hold the gradient in pixels
    store(s.y + i, weight * dy);
  }
  // Written in place where the memory holds whole vectors of C.
  C *grad_xy = s.grad_xy, *grad_weight = s.grad_weight;
  bool in_place = false;
  if constexpr (std::is_same_v<U, C>)
    if (k.count == k.padded) {
      in_place = true;
      grad_xy = a.grad_locations + item * k.count * 2;
      grad_weight = a.grad_weights + item * k.count;
    }
  Vec<C> expected = {};
  for (int64_t i = 0; i < k.padded; i += kLanes<C>) expected += load(s.weight + i) * load(s.grad_weight + i);
  const C mean = a.reference ? sum<C>(expected) : C(0);
  for (int64_t i = 0; i < k.padded; i += kLanes<C>) {
    const Vec<C> dx = load(s.x + i), dy = load(s.y + i);
    if (a.reference == nullptr) {
      store(grad_weight + i, load(s.grad_weight + i));
      store_pairs(grad_xy + 2 * i, dx * load(k.width + i), dy * load(k.height + i));
      continue;
    }
    store(grad_weight + i, load(s.weight + i) * (load(s.grad_weight + i) - mean));
    if (a.R == 2) {
      store_pairs(grad_xy + 2 * i, dx, dy);
      continue;
    }
    const References<C> reference(a, n, q, k);
    const C half_per_point = C(0.5) / a.P;
    // A sample that contributed nothing, a non-finite one among them, has no gradient.
    store_pairs(grad_xy + 2 * i, dx != 0 ? dx * load(k.width + i) * half_per_point * reference.get(i, 2) : Vec<C>{},
                dy != 0 ? dy * load(k.height + i) * half_per_point * reference.get(i, 3) : Vec<C>{});
  }
  if (!in_place) {
    convert(grad_xy, a.grad_locations + item * k.count * 2, 2 * k.count);
    convert(grad_weight, a.grad_weights + item * k.count, k.count);
  }
  if (a.grad_reference == nullptr) return;

  const C* offsets = padded_pairs(a.locations + item * k.count * 2, k, s.raw);
  C* grad_ref = a.grad_reference + ((n * a.M + m) * a.Q + q) * a.L * a.R;
  for (int64_t l = 0, i = 0; l < a.L; ++l, grad_ref += a.R) {
    C center[2] = {}, extent[2] = {};
    for (int64_t p = 0; p < a.P; ++p, ++i) {
      const C grad[2] = {s.x[i] * k.width[i], s.y[i] * k.height[i]};
      for (int c = 0; c < 2; ++c) {
        center[c] += grad[c];
        if (grad[c] != 0) extent[c] += grad[c] * C(0.5) / a.P * offsets[2 * i + c];
      }
    }
    for (int c = 0; c < 2; ++c) {
      grad_ref[c] = center[c];
      if (a.R == 4) grad_ref[2 + c] = extent[c];
    }
  }
}

// Whether to copy the rows of a head before gathering from them. In place, a row must be whole vectors.
template <class T, class U>
bool worth_packing(const MsDeformAttnArgs<T, U>& a) {
  return a.D % kLanes<ComputeType<T>> != 0 || a.Q * a.L * a.P * 4 > 2 * a.S;
}

// The work of a direction, by that of a vector of a row that is sampled and by that of one of value.
template <class T, class U>
double nanoseconds(const MsDeformAttnArgs<T, U>& a, double sampled, double of_value) {
  const double vectors = ceil_div(a.D, kLanes<ComputeType<T>>), items = static_cast<double>(a.N) * a.M;
  return items * (a.Q * a.L * a.P * (4 + 4 * sampled * vectors) + a.S * of_value * vectors);
}

// Parts into which the queries of a pair are split where every part has dense rows of its own: `enough` to balance the
// threads where there are pairs for all of them, else as few as occupy them, and never more than 4, which bounds
// memory.
inline int64_t packing_parts(int64_t threads, int64_t pairs, int64_t enough) {
  return threads <= pairs ? enough : std::min<int64_t>(ceil_div(threads, pairs), 4);
}

// Dense rows of (n, m), padded with zeros to whole vectors; masked rows and row S are zero.
template <class T, class U, class C>
void pack_rows(const MsDeformAttnArgs<T, U>& a, int64_t n, int64_t m, C* packed, int64_t width) {
  for (int64_t i = 0; i <= a.S; ++i) {
    C* row = packed + i * width;
    int64_t written = 0;
    if (i < a.S && !(a.mask && a.mask[n * a.S + i])) {
      convert(a.value + ((n * a.S + i) * a.M + m) * a.D, row, a.D);
      written = a.D;
    }
    for (int64_t d = written; d < width; ++d) row[d] = 0;
  }
}

// What a thread reads rows from: either packed anew for each (n, m), or value in place.
template <class T, class U>
class RowSource {
  using C = ComputeType<T>;

 public:
  RowSource(const MsDeformAttnArgs<T, U>& a, Scratch& scratch)
      : a_(a), packs(worth_packing(a)), width(round_up(a.D, kLanes<C>)) {
    packed_ = scratch.take<C>((packs ? a.S + 1 : 1) * width);
    zero_ = scratch.take<T>(width);
    std::fill_n(zero_, width, T(0));
  }

  // f(Rows) with the rows of (n, m).
  template <class F>
  void with(int64_t n, int64_t m, F f) {
    if (packs) {
      if (n != n_ || m != m_) pack_rows(a_, n, m, packed_, width);
      n_ = n, m_ = m;
      f(DenseRows<const C>{packed_, width});
    } else {
      f(PlacedRows<const T>{a_.value + (n * a_.S * a_.M + m) * a_.D, a_.M * a_.D, zero_, a_.S});
    }
  }

  const bool* mask_in_place(int64_t n) const { return a_.mask && !packs ? a_.mask + n * a_.S : nullptr; }

 private:
  const MsDeformAttnArgs<T, U>& a_;

 public:
  const bool packs;
  const int64_t width;

 private:
  C* packed_;
  T* zero_;
  int64_t n_ = -1, m_ = -1;
};

}  // namespace

template <class T, class U>
void ms_deform_attn_forward(const MsDeformAttnArgs<T, U>& a) {
  using C = ComputeType<T>;
  const int64_t threads = threads_for(nanoseconds(a, 1, worth_packing(a) ? 2 : 0));
  // Tasks of one (n, m) are neighbours, so a thread that gets several packs once.
  const int64_t pairs = a.N * a.M;
  const int64_t parts = std::min(a.Q, worth_packing(a) ? packing_parts(threads, pairs, 8) : 1 + 4 * threads / pairs);
  for_each_range(pairs * parts, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const SampleConstants<C> constants(a, scratch);
    const Samples<C> samples(constants.padded, false, scratch);
    RowSource<T, U> source(a, scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / parts, part = task % parts, n = pair / a.M, m = pair % a.M;
      source.with(n, m, [&](const auto& rows) {
        for (int64_t q = a.Q * part / parts; q < a.Q * (part + 1) / parts; ++q) {
          read_samples(a, constants, n, q, m, samples);
          locate_samples(constants, a.S, source.mask_in_place(n), samples);
          gather_item(rows, samples, constants.count, a.D, a.output + ((n * a.Q + q) * a.M + m) * a.D);
        }
      });
    }
  });
}

template <class T, class U>
void ms_deform_attn_backward(const MsDeformAttnArgs<T, U>& a) {
  using C = ComputeType<T>;
  const int64_t threads = threads_for(nanoseconds(a, 3, worth_packing(a) || a.grad_value != nullptr ? 4 : 0));
  const int64_t pairs = a.N * a.M, width = round_up(a.D, kLanes<C>);
  const bool scatter = a.grad_value != nullptr;
  // In place, a float32 or float64 gradient is its own array of sums.
  const bool sums_in_place = std::is_same_v<T, C> && !worth_packing(a);
  const int64_t parts = sums_in_place ? 1 : std::min(a.Q, packing_parts(threads, pairs, 1));
  const int64_t sums_size = (a.S + 1) * width;
  Scratch shared;
  // With several parts their sums must outlive the task.
  C* part_sums = scatter && parts > 1 ? shared.take<C>(pairs * parts * sums_size) : nullptr;

  // Adds up `parts` sums, one after the other, and writes rows [from, to) of the gradient of (n, m).
  auto write_grad_value = [&](int64_t pair, C* sums, int64_t from, int64_t to) {
    const int64_t n = pair / a.M, m = pair % a.M;
    for (int64_t i = from; i < to; ++i) {
      T* row = a.grad_value + ((n * a.S + i) * a.M + m) * a.D;
      if (a.mask && a.mask[n * a.S + i]) {
        std::fill_n(row, a.D, T(0));
        continue;
      }
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t d = 0; d < width; ++d) sums[i * width + d] += sums[part * sums_size + i * width + d];
      convert(sums + i * width, row, a.D);
    }
  };

  for_each_range(pairs * parts, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const SampleConstants<C> constants(a, scratch);
    const Samples<C> samples(constants.padded, true, scratch);
    RowSource<T, U> source(a, scratch);
    C* grad = scratch.take<C>(width);
    C* unused_row = scratch.take<C>(width);  // takes what falls outside
    for (int64_t d = 0; d < width; ++d) grad[d] = unused_row[d] = 0;
    C* own_sums = scatter && !sums_in_place && parts == 1 ? scratch.take<C>(sums_size) : nullptr;
    for (int64_t i = 0; i < constants.padded; ++i)
      for (auto* dot : samples.dot) dot[i] = 0;

    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / parts, part = task % parts, n = pair / a.M, m = pair % a.M;
      C* dense_sums = nullptr;
      if (scatter && sums_in_place) {
        for (int64_t i = 0; i < a.S; ++i) std::fill_n(a.grad_value + ((n * a.S + i) * a.M + m) * a.D, a.D, T(0));
      } else if (scatter) {
        dense_sums = own_sums ? own_sums : part_sums + task * sums_size;
        std::fill_n(dense_sums, sums_size, C(0));
      }
      source.with(n, m, [&](const auto& rows) {
        const auto sums = [&] {
          if constexpr (std::is_same_v<std::decay_t<decltype(rows)>, PlacedRows<const C>>)
            return PlacedRows<C>{a.grad_value + (n * a.S * a.M + m) * a.D, a.M * a.D, unused_row, a.S};
          else
            return DenseRows<C>{dense_sums, width};
        }();
        for (int64_t q = a.Q * part / parts; q < a.Q * (part + 1) / parts; ++q) {
          prefetch_item(a, n, q + 3, m);
          read_samples(a, constants, n, q, m, samples);
          locate_samples(constants, a.S, source.mask_in_place(n), samples);
          convert(a.grad_output + ((n * a.Q + q) * a.M + m) * a.D, grad, a.D);
          if (scatter)
            backward_item<true>(rows, sums, samples, constants.count, a.D, grad);
          else
            backward_item<false>(rows, sums, samples, constants.count, a.D, grad);
          if (a.grad_locations) write_sampling_grads(a, constants, n, q, m, samples);
        }
      });
      if (own_sums) write_grad_value(pair, own_sums, 0, a.S);
    }
  });

  if (part_sums == nullptr) return;
  for_each_range(pairs * a.S, threads_for(vectors_of<C>(static_cast<double>(pairs) * parts * sums_size)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end;) {
                     const int64_t pair = i / a.S, row = i % a.S, rows = std::min(a.S - row, end - i);
                     write_grad_value(pair, part_sums + pair * parts * sums_size, row, row + rows);
                     i += rows;
                   }
                 });
}

}  // namespace relops::RELOPS_ISA
