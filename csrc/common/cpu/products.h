// Register-tiled products of small matrices that are in the L1 or L2 cache. foreach_isa.h compiles this file once per
// instruction set, and the kernel file undefines the include guard at its end.
#ifndef RELOPS_PRODUCTS
#define RELOPS_PRODUCTS

#include "common/cpu/simd.h"

namespace relops::RELOPS_ISA {

namespace {

// The size of a panel, the part of a product that is kept in registers. A panel takes 24 of the 32 registers of
// AVX-512, and 12 of 16 with other instruction sets.
constexpr int kPanelRows = 6, kPanelVectors = RELOPS_VECTOR_BYTES == 64 ? 4 : 2;

// Element (i, j) of a matrix is at data[i * row + j * step].
template <class Compute>
struct Matrix {
  const Compute* data;
  int64_t row, step;
};

// The factors of a product a times b. The rows of b [depth, lanes] are b_row elements apart.
template <class Compute>
struct Factors {
  Matrix<Compute> a;
  const Compute* b;
  int64_t b_row, depth;
};

template <class Compute, int kRows, int kVectors>
inline void add_products(const Factors<Compute>& f, Vec<Compute> (&sums)[kRows][kVectors]) {
  const Compute *a = f.a.data, *b = f.b;
  for (int64_t i = 0; i < f.depth; ++i, a += f.a.step, b += f.b_row) {
    Vec<Compute> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes<Compute>);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Compute x = a[r * f.a.row];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += x * row[v];
    }
  }
}

template <class Compute, int kRows, int kVectors>
void multiply_panel(const Factors<Compute>& f, const Factors<Compute>* more, bool add, Compute* out, int64_t out_row) {
  Vec<Compute> sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = add ? load(out + r * out_row + v * kLanes<Compute>) : Vec<Compute>{};
  add_products(f, sums);
  if (more != nullptr) add_products(*more, sums);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * out_row + v * kLanes<Compute>, sums[r][v]);
}

// The instances of multiply_panel for all panel sizes: table[vectors - 1][rows - 1].
template <class Compute, class Rows = std::make_integer_sequence<int, kPanelRows>,
          class Vectors = std::make_integer_sequence<int, kPanelVectors>>
struct Panels;
template <class Compute, int... kRows, int... kVectors>
struct Panels<Compute, std::integer_sequence<int, kRows...>, std::integer_sequence<int, kVectors...>> {
  using Panel = void (*)(const Factors<Compute>&, const Factors<Compute>*, bool, Compute*, int64_t);
  template <int kWidth>
  struct Row {
    static constexpr Panel table[] = {multiply_panel<Compute, kRows + 1, kWidth>...};
  };
  static constexpr const Panel* table[] = {Row<kVectors + 1>::table...};
};

// Calls f(first, height) for panels that together have `rows` rows and whose heights differ by at most 1.
template <class F>
inline void for_panels(int64_t rows, F f) {
  int64_t first = 0;
  for (int64_t remaining = ceil_div(rows, kPanelRows); remaining > 0; --remaining) {
    const int64_t height = ceil_div(rows - first, remaining);
    f(first, height);
    first += height;
  }
}

// Sets out [rows, vectors of lanes] to the product of the factors, plus the product of `more` unless it is null. If
// `add`, adds the products to out instead.
template <class Compute>
inline void multiply(const Factors<Compute>& f, int64_t rows, int64_t vectors, Compute* out, int64_t out_row,
                     bool add = false, const Factors<Compute>* more = nullptr) {
  for (int64_t v = 0; v < vectors; v += kPanelVectors) {
    const auto* const panels = Panels<Compute>::table[std::min<int64_t>(vectors - v, kPanelVectors) - 1];
    const auto at = [&](Factors<Compute> factors, int64_t r) {
      factors.a.data += r * factors.a.row;
      factors.b += v * kLanes<Compute>;
      return factors;
    };
    for_panels(rows, [&](int64_t r, int64_t height) {
      const Factors<Compute> second = more == nullptr ? Factors<Compute>{} : at(*more, r);
      panels[height - 1](at(f, r), more == nullptr ? nullptr : &second, add, out + r * out_row + v * kLanes<Compute>,
                         out_row);
    });
  }
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
