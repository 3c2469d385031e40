// relation_attention on the CPU: products.

namespace relops::RELOPS_ISA {

namespace {

template <class C>
constexpr int64_t kTile = 256 / sizeof(C);  // keys

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

}  // namespace relops::RELOPS_ISA
