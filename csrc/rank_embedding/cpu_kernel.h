// rank_embedding on the CPU: the loops. The lanes of a vector are frequencies of one rank. Arithmetic limits the speed,
// and all of it is in double precision.

#include "common/cpu/simd.h"
#include "rank_embedding/problem.h"

namespace relops::RELOPS_ISA {

typedef float NarrowFloats __attribute__((vector_size(RELOPS_VECTOR_BYTES / 2)));

inline void store_as(double* p, Vec<double> v) { store(p, v); }
inline void store_as(float* p, Vec<double> v) {
  const NarrowFloats narrow = __builtin_convertvector(v, NarrowFloats);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

inline Vec<double> load_as_double(const double* p) { return load(p); }
inline Vec<double> load_as_double(const float* p) {
  NarrowFloats narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, Vec<double>);
}

// Computes the sines [padded] and cosines [padded] of all angles of one rank.
template <class Compute>
inline void store_sines(double rank, const double* frequencies, int64_t half, Compute* sines, Compute* cosines) {
  constexpr int64_t V = kLanes<double>;
  using S = std::conditional_t<sizeof(Compute) == 8, Series<double>, SeriesForFloat>;
  // Frequencies either increase or decrease with j, so the first or the last is the largest.
  const bool small = std::fabs(rank) * std::max(frequencies[0], frequencies[half - 1]) < kLargeAngle;
  if (!small) {  // large or NaN
    for (int64_t j = 0; j < half; ++j) {
      sines[j] = static_cast<Compute>(std::sin(rank * frequencies[j]));
      cosines[j] = static_cast<Compute>(std::cos(rank * frequencies[j]));
    }
    return;
  }
  for_batches<double, 2>(half, [&](int64_t j, auto vectors) __attribute__((always_inline)) {
    constexpr int N = vectors;
    Batch<double, N> sine, cosine;
    sin_cos<S>(batch<double, N>([&](int i) { return rank * load(frequencies + j + i * V); }), sine, cosine);
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      store_as(sines + j + i * V, sine.v[i]);
      store_as(cosines + j + i * V, cosine.v[i]);
    }
  });
}

template <class T, class O>
void rank_embedding_forward(const RankEmbeddingArgs<T, O>& p, const double* frequencies, int64_t begin, int64_t end) {
  using Compute = ComputeType<O>;
  const int64_t half = p.half, padded = round_up(half, kLanes<double>);
  Scratch scratch;
  Compute* const sines = scratch.allocate<Compute>(2 * padded);
  Compute* const cosines = sines + padded;
  for (int64_t i = begin; i < end; ++i) {
    store_sines(static_cast<double>(p.ranks[i]), frequencies, half, sines, cosines);
    O* const out = p.output + i * 2 * half;
    convert(sines, out, half);
    convert(cosines, out + half, half);
  }
}

// Computes grad_ranks[i] as the sum over j of frequency[j] * (cosine[j] * grad_sine[j] - sine[j] * grad_cosine[j]).
template <class T>
void rank_embedding_backward(const RankEmbeddingArgs<T, T>& p, const double* frequencies, int64_t begin, int64_t end) {
  using Compute = ComputeType<T>;
  const int64_t half = p.half, padded = round_up(half, kLanes<double>);
  Scratch scratch;
  Compute* const grad_sines = scratch.allocate<Compute>(4 * padded);
  Compute *const grad_cosines = grad_sines + padded, *const sines = grad_cosines + padded,
                 *const cosines = sines + padded;
  std::fill_n(grad_sines, 4 * padded, Compute(0));
  for (int64_t i = begin; i < end; ++i) {
    const T* const grad = p.grad_output + i * 2 * half;
    convert(grad, grad_sines, half);
    convert(grad + half, grad_cosines, half);
    store_sines(static_cast<double>(p.ranks[i]), frequencies, half, sines, cosines);
    Vec<double> total = {};
    for (int64_t j = 0; j < half; j += kLanes<double>)
      total += load(frequencies + j) * (load_as_double(cosines + j) * load_as_double(grad_sines + j) -
                                        load_as_double(sines + j) * load_as_double(grad_cosines + j));
    p.grad_ranks[i] = static_cast<T>(static_cast<Compute>(sum<double>(total)));
  }
}

}  // namespace relops::RELOPS_ISA
