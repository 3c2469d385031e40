// relation_attention on the CPU: packing and products of feature rows. Rows are converted to the compute type and
// packed into arrays from which products read whole vectors. `multiply_lanes` is the register-tiled product of the
// backward pass that sums over lanes; common/cpu/products.h has the other products.
#ifndef RELOPS_RELATION_ATTENTION_PRODUCTS
#define RELOPS_RELATION_ATTENTION_PRODUCTS

#include "common/cpu/products.h"
#include "common/cpu/simd.h"
#include "relation_attention/cpu_args.h"

namespace relops::RELOPS_ISA {

namespace {

// The number of keys in a tile.
template <class Compute>
constexpr int64_t kTile = 256 / sizeof(Compute);

template <class Compute, int kRows>
void multiply_lanes_panel(int64_t count, int64_t vectors, const Compute* a, int64_t a_stride, const Compute* b,
                          int64_t b_stride, Compute* sums, int64_t sums_row) {
  constexpr int64_t V = kLanes<Compute>;
  Vec<Compute> panel[kRows][kPanelVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) panel[r][v] = load(sums + r * sums_row + v * V);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < vectors * V; k += V) {
      Vec<Compute> column[kPanelVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) column[v] = load(b + i * b_stride + v * kTile<Compute> + k);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Vec<Compute> x = load(a + i * a_stride + r * kTile<Compute> + k);
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) panel[r][v] += x * column[v];
      }
    }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) store(sums + r * sums_row + v * V, panel[r][v]);
}

template <class Compute, int... kRows>
constexpr auto lanes_panels(std::integer_sequence<int, kRows...>) {
  return std::array{multiply_lanes_panel<Compute, kRows + 1>...};
}

// Adds the product of a [count, rows, kTile] and b [count, columns, kTile] to sums [rows, columns, lanes], lane by lane
// over the first `vectors` vectors of each tile. Entries of a and b are a_stride and b_stride elements apart.
template <class Compute>
inline void multiply_lanes(int64_t rows, int64_t columns, int64_t count, int64_t vectors, const Compute* a,
                           int64_t a_stride, const Compute* b, int64_t b_stride, Compute* sums) {
  static constexpr auto kPanels = lanes_panels<Compute>(std::make_integer_sequence<int, kPanelRows>());
  const int64_t row = columns * kLanes<Compute>;
  for_panels(rows, [&](int64_t r, int64_t height) {
    for (int64_t c = 0; c < columns; c += kPanelVectors)
      kPanels[height - 1](count, vectors, a + r * kTile<Compute>, a_stride, b + c * kTile<Compute>, b_stride,
                          sums + r * row + c * kLanes<Compute>, row);
  });
}

// Sets out[i] to scale times the D elements of row index[i], padded with zeros to `padded` elements.
template <class Compute, class T>
inline void pack_rows(FeatureRows<const T> rows, int64_t n, int64_t m, const int32_t* index, int64_t count, int64_t D,
                      Compute scale, Compute* out, int64_t padded) {
  constexpr int64_t V = kLanes<Compute>;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows.at(n, index[i], m);
    for (int64_t d = 0; d < padded; d += V)
      store(out + i * padded + d, load_first(row + d, std::max<int64_t>(D - d, 0)) * scale);
  }
}

// Sets out[d][i] to element d of row index[i] for i < count, and pads out[d] with zeros to whole vectors. The rows of
// out are `row` elements apart.
template <class Compute, class T>
inline void pack_columns(FeatureRows<const T> rows, int64_t n, int64_t m, const int32_t* index, int64_t count,
                         int64_t D, Compute* out, int64_t row) {
  constexpr int64_t V = kLanes<Compute>;
  for (int64_t first = 0; first < count; first += V)
    for (int64_t d = 0; d < D; d += V) {
      Vec<Compute> block[V];
      for (int64_t i = 0; i < V; ++i)
        block[i] = first + i < count ? load_first(rows.at(n, index[first + i], m) + d, D - d) : Vec<Compute>{};
      transpose<Compute>(block);
      for (int64_t i = 0; i < std::min(V, D - d); ++i) store(out + (d + i) * row + first, block[i]);
    }
}

template <class Compute, class A, class B>
inline Compute dot(const A* a, const B* b, int64_t n) {
  Vec<Compute> products = {};
  for (int64_t d = 0; d < n; d += kLanes<Compute>) products += load_first(a + d, n - d) * load_first(b + d, n - d);
  return sum<Compute>(products);
}

// Prefetches `lines` cache lines of p[0..size), beginning with line `first`, into the L2 cache.
template <class Compute>
inline void prefetch_lines(const Compute* p, int64_t size, int64_t first, int64_t lines) {
  constexpr int64_t kLine = 64 / sizeof(Compute);
  for (int64_t i = first * kLine; i < std::min((first + lines) * kLine, size); i += kLine)
    __builtin_prefetch(p + i, 0, 2);
}

// Sets the unused lanes in the last vector of the logits p[0..count) to minus infinity.
template <class Compute>
inline void mask_last(Compute* p, int64_t count) {
  constexpr int64_t V = kLanes<Compute>;
  const Int<Compute> remaining = static_cast<Int<Compute>>(count % V);
  if (remaining == 0) return;
  Compute* const last = p + count - remaining;
  const VecInt<Compute> key = lanes<Compute>([](Int<Compute> j) { return j; }) < remaining;
  store(last, key ? load(last) : broadcast(-std::numeric_limits<Compute>::infinity()));
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
