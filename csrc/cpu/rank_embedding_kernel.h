// The loops of rank_embedding: lanes are along the frequencies of a rank. Bound by arithmetic, all of it in double.

#include "cpu/simd.h"

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

// Calls f(j, sines, cosines) for the angles of a rank, lanes at a time: from j on.
template <class F>
inline void for_angles(double rank, const double* frequencies, int64_t half, F f) {
  constexpr int64_t W = kLanes<double>;
  // Frequencies fall or rise from the first to the last.
  const bool small = std::fabs(rank) * std::max(frequencies[0], frequencies[half - 1]) < kLargeAngle;
  for (int64_t j = 0; j < half; j += W) {
    const Vec<double> angle = rank * load(frequencies + j);
    Vec<double> s, c;
    if (small) {
      sin_cos(angle, s, c);
    } else {  // or NaN
      for (int64_t i = 0; i < W; ++i) {
        s[i] = std::sin(angle[i]);
        c[i] = std::cos(angle[i]);
      }
    }
    f(j, s, c);
  }
}

template <class T, class O>
void rank_embedding_forward(const RankEmbeddingArgs<T, O>& p, const double* frequencies, int64_t begin, int64_t end) {
  using C = ComputeType<O>;
  const int64_t half = p.half, padded = round_up(half, kLanes<double>);
  Scratch scratch;
  C* const sines = scratch.take<C>(2 * padded);
  C* const cosines = sines + padded;
  for (int64_t i = begin; i < end; ++i) {
    for_angles(static_cast<double>(p.ranks[i]), frequencies, half, [&](int64_t j, Vec<double> s, Vec<double> c) {
      store_as(sines + j, s);
      store_as(cosines + j, c);
    });
    O* const out = p.output + i * 2 * half;
    convert(sines, out, half);
    convert(cosines, out + half, half);
  }
}

// grad_ranks[i] = sum over j of frequency j times (cosine times the gradient of the sine - sine times that of the
// cosine).
template <class T>
void rank_embedding_backward(const RankEmbeddingArgs<T, T>& p, const double* frequencies, int64_t begin, int64_t end) {
  using C = ComputeType<T>;
  const int64_t half = p.half, padded = round_up(half, kLanes<double>);
  Scratch scratch;
  C* const grad_sines = scratch.take<C>(2 * padded);
  C* const grad_cosines = grad_sines + padded;
  std::fill_n(grad_sines, 2 * padded, C(0));
  for (int64_t i = begin; i < end; ++i) {
    const T* const grad = p.grad_output + i * 2 * half;
    convert(grad, grad_sines, half);
    convert(grad + half, grad_cosines, half);
    Vec<double> total = {};
    for_angles(static_cast<double>(p.ranks[i]), frequencies, half, [&](int64_t j, Vec<double> s, Vec<double> c) {
      total += load(frequencies + j) * (c * load_as_double(grad_sines + j) - s * load_as_double(grad_cosines + j));
    });
    p.grad_ranks[i] = static_cast<T>(static_cast<C>(sum<double>(total)));
  }
}

}  // namespace relops::RELOPS_ISA
