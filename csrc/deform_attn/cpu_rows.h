// ms_deform_attn and ms_deform_attn_fused on the CPU: access to the rows of value that samples read, in place or in a
// copy, and the sums over these rows, computed one vector of channels at a time.
#ifndef RELOPS_DEFORM_ATTN_ROWS
#define RELOPS_DEFORM_ATTN_ROWS

#include "common/cpu/simd.h"
#include "deform_attn/cpu_args.h"
#include "deform_attn/cpu_samples.h"

namespace relops::RELOPS_ISA {

namespace {

// The rows of one (image, head) pair, used in place. Row S consists of zeros and stands for all corners outside their
// level.
template <class T>
struct StridedRows {
  T* base;
  int64_t stride;
  T* zero;
  int64_t S;
  T* operator[](int64_t i) const { return i == S ? zero : base + i * stride; }
  template <int64_t kWidth>
  StridedRows of_width() const {
    return *this;
  }
};

// Rows in a dense array, including row S. kWidth is their width if it is known at compile time, otherwise 0.
template <class T, int64_t kWidth = 0>
struct DenseRows {
  T* base;
  int64_t width;
  T* operator[](int64_t i) const { return base + i * (kWidth ? kWidth : width); }
  template <int64_t kKnown>
  DenseRows<T, kKnown> of_width() const {
    return {base, width};
  }
};

// Returns whether to copy the rows of a head before gathering from them. Rows can be read in place only if they consist
// of whole vectors.
template <class T, class U>
bool worth_packing(const MsDeformAttnArgs<T, U>& a) {
  return a.D % kLanes<ComputeType<T>> != 0 || a.Q * a.L * a.P * 4 > 2 * a.S;
}

// Writes the dense rows of (n, m), padded with zeros to whole vectors. Masked rows and row S are zero.
template <class T, class U, class Compute>
void pack_rows(const MsDeformAttnArgs<T, U>& a, int64_t n, int64_t m, Compute* packed, int64_t width) {
  for (int64_t i = 0; i <= a.S; ++i) {
    Compute* row = packed + i * width;
    int64_t written = 0;
    if (i < a.S && !(a.mask && a.mask[n * a.S + i])) {
      convert(a.value + ((n * a.S + i) * a.M + m) * a.D, row, a.D);
      written = a.D;
    }
    for (int64_t d = written; d < width; ++d) row[d] = 0;
  }
}

// The source from which a thread reads rows: either value itself, or a copy that is packed for each (n, m).
template <class T, class U>
class RowSource {
  using Compute = ComputeType<T>;

 public:
  RowSource(const MsDeformAttnArgs<T, U>& a, Scratch& scratch)
      : a_(a), packs(worth_packing(a)), width(round_up(a.D, kLanes<Compute>)) {
    packed_ = scratch.allocate<Compute>((packs ? a.S + 1 : 1) * width);
    zero_ = scratch.allocate<T>(width);
    std::fill_n(zero_, width, T(0));
  }

  // Calls f(rows) with the rows of (n, m).
  template <class F>
  void with(int64_t n, int64_t m, F f) {
    if (packs) {
      if (n != n_ || m != m_) pack_rows(a_, n, m, packed_, width);
      n_ = n, m_ = m;
      f(DenseRows<const Compute>{packed_, width});
    } else {
      f(StridedRows<const T>{a_.value + (n * a_.S * a_.M + m) * a_.D, a_.M * a_.D, zero_, a_.S});
    }
  }

  const bool* mask_for_rows_in_place(int64_t n) const { return a_.mask && !packs ? a_.mask + n * a_.S : nullptr; }

 private:
  const MsDeformAttnArgs<T, U>& a_;

 public:
  const bool packs;
  const int64_t width;

 private:
  Compute* packed_;
  T* zero_;
  int64_t n_ = -1, m_ = -1;
};

// Splits the D channels of a row, padded to whole vectors, into groups of 1, 2 or 4 vectors. For each group, calls
// f(number of vectors as a constant, whether the group is the whole row, first channel).
template <class Compute, class F>
void for_channels(int64_t D, F f) {
  constexpr int64_t V = kLanes<Compute>;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 4> four;
  int64_t vectors = ceil_div(D, V), d = 0;
  if (vectors == 1) return f(one, std::true_type{}, 0);
  if (vectors == 2) return f(two, std::true_type{}, 0);
  if (vectors == 4) return f(four, std::true_type{}, 0);
  for (; vectors >= 4; vectors -= 4, d += 4 * V) f(four, std::false_type{}, d);
  if (vectors & 2) f(two, std::false_type{}, d), d += 2 * V;
  if (vectors & 1) f(one, std::false_type{}, d);
}

// Returns the rows with a compile-time width if for_channels processes a whole row at once (kWhole).
template <bool kWhole, int64_t kWidth, class Rows>
auto known_width(const Rows& rows) {
  if constexpr (kWhole)
    return rows.template of_width<kWidth>();
  else
    return rows;
}

// Computes out[0..D) as the sum of weight * row over all samples and corners.
template <class T, class Rows, class Compute>
void gather_item(const Rows& all_rows, const Samples<Compute>& s, int64_t count, int64_t D, T* out) {
  constexpr int64_t V = kLanes<Compute>;
  for_channels<Compute>(D, [&](auto vectors, auto whole, int64_t d) {
    constexpr int kVectors = vectors;
    const auto rows = known_width<whole, kVectors * V>(all_rows);
    // Several sums break the chain of dependent additions; their number is limited by the registers.
    constexpr int kSums = kVectors == 4 ? 2 : 4;
    Vec<Compute> sums[kSums][kVectors];
    for (int k = 0; k < kSums; ++k)
      for (int v = 0; v < kVectors; ++v) sums[k][v] = Vec<Compute>{};  // {} instead of Vec<Compute>{} would be a memset
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
      for (int corner = 0; corner < 4; ++corner) {
        const auto* row = rows[s.row[corner][i]] + d;
        const Compute weight = s.corner_weight[corner][i];
        for (int v = 0; v < kVectors; ++v) sums[corner % kSums][v] += weight * load(row + v * V);
      }
    for (int v = 0; v < kVectors; ++v) {
      Vec<Compute> total = sums[0][v] + sums[1][v];
      if constexpr (kSums == 4) total += sums[2][v] + sums[3][v];
      const int64_t at = d + v * V;
      if (at + V <= D) {
        store(out + at, total);
      } else {
        alignas(64) Compute tail[V];
        store(tail, total);
        convert(tail, out + at, D - at);
      }
    }
  });
}

// Computes dot[corner][sample] = grad . row. If kScatter, also adds corner_weight * grad to sums[row]. `grad` is padded
// with zeros to whole vectors.
template <bool kScatter, class Rows, class Sums, class Compute>
void backward_item(const Rows& all_rows, const Sums& all_sums, const Samples<Compute>& s, int64_t count, int64_t D,
                   const Compute* grad) {
  constexpr int64_t V = kLanes<Compute>;
  constexpr int kGroup = V < 4 ? 1 : V / 4;  // number of samples whose 4 dot products fill a vector
  for_channels<Compute>(D, [&](auto vectors, auto whole, int64_t d) {
    constexpr int kVectors = vectors;
    const auto rows = known_width<whole, kVectors * V>(all_rows);
    const auto sums = known_width<whole, kVectors * V>(all_sums);
    Vec<Compute> g[kVectors];
    for (int v = 0; v < kVectors; ++v) g[v] = load(grad + d + v * V);
    for (int64_t i = 0; i < count; i += kGroup) {
      Vec<Compute> partial[4 * kGroup];
      for (int j = 0; j < kGroup; ++j)
#pragma GCC unroll 4
        for (int corner = 0; corner < 4; ++corner) {
          const Int<Compute> index = s.row[corner][i + j];
          const auto* row = rows[index] + d;
          Vec<Compute> product = g[0] * load(row);
          for (int v = 1; v < kVectors; ++v) product += g[v] * load(row + v * V);
          partial[corner * kGroup + j] = product;
          if constexpr (kScatter) {
            Compute* to = sums[index] + d;
            const Compute weight = s.corner_weight[corner][i + j];
            for (int v = 0; v < kVectors; ++v) store(to + v * V, load(to + v * V) + weight * g[v]);
          }
        }
      alignas(64) Compute dots[4 * kGroup];
      for (int b = 0; b < 4 * kGroup; b += V) store(dots + b, transpose_sum<Compute>(partial + b));
      for (int corner = 0; corner < 4; ++corner)
        for (int j = 0; j < kGroup; ++j)
          s.dot[corner][i + j] = dots[corner * kGroup + j] + (d == 0 ? Compute(0) : s.dot[corner][i + j]);
    }
  });
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
