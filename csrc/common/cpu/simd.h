// SIMD vectors for kernel files. foreach_isa.h compiles this file once per instruction set and undefines the include
// guard each time.
//
// Vec<Compute> holds kLanes<Compute> values of the compute type Compute (float or double) in the widest register of the
// instruction set. Arithmetic, comparisons and ?: on a Vec are built into the compiler (GCC vector extensions). 16-bit
// features are converted when they are loaded or stored.

#ifndef RELOPS_SIMD
#define RELOPS_SIMD

#include "common/cpu/kernel_includes.h"

#ifndef RELOPS_ISA  // foreach_isa.h defines it; this default lets an editor parse a kernel file on its own
#define RELOPS_ISA baseline
#define RELOPS_VECTOR_BYTES 16
#endif

namespace relops::RELOPS_ISA {

template <class Compute>
constexpr int64_t kLanes = RELOPS_VECTOR_BYTES / sizeof(Compute);

template <class Compute>
struct VecTypes;
template <>
struct VecTypes<float> {
  using Scalar = int32_t;
  typedef float Float __attribute__((vector_size(RELOPS_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(RELOPS_VECTOR_BYTES)));
  typedef float FloatMem __attribute__((vector_size(RELOPS_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t IntMem __attribute__((vector_size(RELOPS_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VecTypes<double> {
  using Scalar = int64_t;
  typedef double Float __attribute__((vector_size(RELOPS_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(RELOPS_VECTOR_BYTES)));
  typedef double FloatMem __attribute__((vector_size(RELOPS_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t IntMem __attribute__((vector_size(RELOPS_VECTOR_BYTES), aligned(8), may_alias));
};

template <class Compute>
using Vec = typename VecTypes<Compute>::Float;
// The integers are as wide as Compute, so a comparison of two Vec<Compute> is a mask for both Vec<Compute> and
// VecInt<Compute>.
template <class Compute>
using VecInt = typename VecTypes<Compute>::Int;
template <class Compute>
using Int = typename VecTypes<Compute>::Scalar;

template <class Compute>
inline Vec<Compute> broadcast(Compute x) {
  return x - Vec<Compute>{};
}

template <class Compute>
inline VecInt<Compute> broadcast_int(Int<Compute> x) {
  return x - VecInt<Compute>{};
}

template <class Compute>
inline Vec<Compute> load(const Compute* p) {
  return *reinterpret_cast<const typename VecTypes<Compute>::FloatMem*>(p);
}

template <class Compute>
inline VecInt<Compute> load_int(const Int<Compute>* p) {
  return *reinterpret_cast<const typename VecTypes<Compute>::IntMem*>(p);
}

template <class Compute>
inline void store(Compute* p, Vec<Compute> v) {
  *reinterpret_cast<typename VecTypes<Compute>::FloatMem*>(p) = v;
}

template <class Compute>
inline void store_int(Int<Compute>* p, VecInt<Compute> v) {
  *reinterpret_cast<typename VecTypes<Compute>::IntMem*>(p) = v;
}

typedef uint16_t HalfBits __attribute__((vector_size(RELOPS_VECTOR_BYTES / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(RELOPS_VECTOR_BYTES)));

inline Vec<float> load(const BFloat16* p) {
  HalfBits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, FloatBits) << 16);
}

// Rounds to nearest even, as torch does. NaN stays NaN.
inline void store(BFloat16* p, Vec<float> v) {
  const FloatBits bits = (FloatBits)v;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const FloatBits chosen = v == v ? rounded : (bits >> 16) | 0x40;
  const HalfBits out = __builtin_convertvector(chosen, HalfBits);
  __builtin_memcpy(p, &out, sizeof(out));
}

#if RELOPS_VECTOR_BYTES == 64
inline Vec<float> load(const Half* p) {
  // The intrinsic without maskz makes GCC 12 warn about an uninitialized operand in one of GCC's own headers.
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif RELOPS_VECTOR_BYTES == 32
inline Vec<float> load(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(Half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
inline void store(Half* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = static_cast<Half>(v[i]);
}
#endif

// Loads the first n values at p and sets the other lanes to zero. Nothing past these n values is read.
template <class T>
inline Vec<ComputeType<T>> load_first(const T* p, int64_t n) {
  if (n >= kLanes<ComputeType<T>>) return load(p);
  alignas(RELOPS_VECTOR_BYTES) T few[kLanes<ComputeType<T>>] = {};
  for (int64_t i = 0; i < n; ++i) few[i] = p[i];
  return load(few);
}

template <class T>
inline void store_first(T* p, Vec<ComputeType<T>> v, int64_t n) {
  alignas(RELOPS_VECTOR_BYTES) T few[kLanes<ComputeType<T>>];
  store(few, v);
  for (int64_t i = 0; i < n; ++i) p[i] = few[i];
}

// Lane j of the result is p[at[j]].
#if RELOPS_VECTOR_BYTES == 64
inline Vec<float> gather(const float* p, VecInt<float> at) {
  return (Vec<float>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, (__m512i)at, p, 4);
}
inline Vec<double> gather(const double* p, VecInt<double> at) {
  return (Vec<double>)_mm512_mask_i64gather_pd(_mm512_setzero_pd(), 0xff, (__m512i)at, p, 8);
}
#else
template <class Compute>
inline Vec<Compute> gather(const Compute* p, VecInt<Compute> at) {
  Vec<Compute> v;
  for (int j = 0; j < kLanes<Compute>; ++j) v[j] = p[at[j]];
  return v;
}
#endif

// Converts src[0..n) to dst[0..n).
template <class To, class From>
inline void convert(const From* src, To* dst, int64_t n) {
  using Compute = ComputeType<To>;
  constexpr int64_t V = kLanes<Compute>;
  int64_t i = 0;
  for (; i + V <= n; i += V) store(dst + i, load(src + i));
  if (i == n) return;
  alignas(RELOPS_VECTOR_BYTES) From in[V] = {};
  alignas(RELOPS_VECTOR_BYTES) To out[V];
  for (int64_t j = i; j < n; ++j) in[j - i] = src[j];
  store(out, load(in));
  for (int64_t j = i; j < n; ++j) dst[j] = out[j - i];
}

// Returns the vector whose lane j is f(j). The vector is built from an initializer list, which the compiler turns into
// a constant. With a loop that assigns the lanes, the compiler might insert them one by one at run time.
template <class Compute, class F, size_t... J>
inline VecInt<Compute> lanes(F f, std::index_sequence<J...>) {
  return VecInt<Compute>{f(static_cast<Int<Compute>>(J))...};
}
template <class Compute, class F>
inline VecInt<Compute> lanes(F f) {
  return lanes<Compute>(f, std::make_index_sequence<kLanes<Compute>>{});
}

// Returns a vector whose lane j is the sum of the lanes of v[j]. Each round adds pairs of shuffled vectors and halves
// the number of vectors, so V sums cost V - 1 vector additions instead of V log2(V).
template <class Compute, int kDistance = kLanes<Compute> / 2>
inline Vec<Compute> transpose_sum(Vec<Compute>* v) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    constexpr Int<Compute> V = kLanes<Compute>;
    // __builtin_shuffle numbers the lanes of its first operand from 0 and those of its second operand from V.
    const VecInt<Compute> keep = lanes<Compute>([](Int<Compute> j) { return (j & kDistance ? V : 0) + j; });
    const VecInt<Compute> cross =
        lanes<Compute>([](Int<Compute> j) { return (j & kDistance ? V : 0) + (j ^ kDistance); });
    for (int i = 0; i < kDistance; ++i)
      v[i] = __builtin_shuffle(v[i], v[i + kDistance], keep) + __builtin_shuffle(v[i], v[i + kDistance], cross);
    return transpose_sum<Compute, kDistance / 2>(v);
  }
}

// Transposes v: v[i][j] becomes v[j][i]. Each of the log2(V) rounds exchanges blocks of lanes between vectors that are
// kDistance apart.
template <class Compute, int kDistance = kLanes<Compute> / 2>
inline void transpose(Vec<Compute>* v) {
  if constexpr (kDistance > 0) {
    constexpr Int<Compute> V = kLanes<Compute>;
    const VecInt<Compute> upper = lanes<Compute>([](Int<Compute> j) { return j & kDistance ? V + j - kDistance : j; });
    const VecInt<Compute> lower = lanes<Compute>([](Int<Compute> j) { return j & kDistance ? V + j : j + kDistance; });
    for (int i = 0; i < V; ++i) {
      if (i & kDistance) continue;
      const Vec<Compute> a = v[i], b = v[i + kDistance];
      v[i] = __builtin_shuffle(a, b, upper);
      v[i + kDistance] = __builtin_shuffle(a, b, lower);
    }
    transpose<Compute, kDistance / 2>(v);
  }
}

// Reduces the lanes of v to one value with the associative function f.
template <class Compute, int kDistance = kLanes<Compute> / 2, class F>
inline Compute fold(Vec<Compute> v, F f) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    const VecInt<Compute> other = lanes<Compute>([](Int<Compute> j) { return j ^ kDistance; });
    return fold<Compute, kDistance / 2>(f(v, (Vec<Compute>)__builtin_shuffle(v, other)), f);
  }
}

template <class Compute>
inline Compute sum(Vec<Compute> v) {
  return fold<Compute>(v, [](Vec<Compute> a, Vec<Compute> b) { return a + b; });
}

// Converts a vector mask to a bit mask with one bit per lane.
template <class Compute>
inline unsigned mask_bits(VecInt<Compute> mask) {
#if RELOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(Compute) == 4)
    return _mm512_movepi32_mask((__m512i)mask);
  else
    return _mm512_movepi64_mask((__m512i)mask);
#elif RELOPS_VECTOR_BYTES == 32
  if constexpr (sizeof(Compute) == 4)
    return _mm256_movemask_ps((__m256)mask);
  else
    return _mm256_movemask_pd((__m256d)mask);
#else
  unsigned bits = 0;
  for (int j = 0; j < kLanes<Compute>; ++j) bits |= (mask[j] & 1u) << j;
  return bits;
#endif
}

// minimum and maximum return their second operand if either operand is NaN.
inline Vec<float> minimum(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
inline Vec<double> minimum(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
// maximum uses intrinsics, because if b is a constant, GCC does not compile a > b ? a : b to a single instruction.
#if RELOPS_VECTOR_BYTES == 64
inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
inline Vec<double> maximum(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
}
#elif RELOPS_VECTOR_BYTES == 32
inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec<double> maximum(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
#else
inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
inline Vec<double> maximum(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
#endif

// Returns the bit mask of the lanes in which a > b. For AVX-512, an intrinsic is used, because GCC would convert the
// result of a > b to a vector mask and then back to a bit mask.
inline unsigned greater_bits(Vec<float> a, Vec<float> b) {
#if RELOPS_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  return mask_bits<float>(a > b);
#endif
}
inline unsigned greater_bits(Vec<double> a, Vec<double> b) {
#if RELOPS_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#else
  return mask_bits<double>(a > b);
#endif
}

// Returns the bit mask of the lanes in which a == b.
inline unsigned equal_bits(Vec<double> a, Vec<double> b) {
#if RELOPS_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
#else
  return mask_bits<double>(a == b);
#endif
}

// Loads the pairs (p[0], p[1]), (p[2], p[3]), .. and separates their first elements from their second elements.
template <class Compute>
inline void load_pairs(const Compute* p, Vec<Compute>& first, Vec<Compute>& second) {
  const Vec<Compute> low = load(p), high = load(p + kLanes<Compute>);
  first = __builtin_shuffle(low, high, lanes<Compute>([](Int<Compute> j) { return 2 * j; }));
  second = __builtin_shuffle(low, high, lanes<Compute>([](Int<Compute> j) { return 2 * j + 1; }));
}

template <class Compute>
inline void store_pairs(Compute* p, Vec<Compute> first, Vec<Compute> second) {
  constexpr Int<Compute> V = kLanes<Compute>;
  const VecInt<Compute> low = lanes<Compute>([](Int<Compute> j) { return j / 2 + (j % 2 ? V : 0); });
  store(p, (Vec<Compute>)__builtin_shuffle(first, second, low));
  store(p + V, (Vec<Compute>)__builtin_shuffle(first, second, low + V / 2));
}

template <class Compute, int N>
using Batch = VectorBatch<Vec<Compute>, N>;

// Returns the batch with v[i] = f(i).
template <class Compute, int N, class F>
RELOPS_HOST_DEVICE_INLINE Batch<Compute, N> batch(F f) {
  Batch<Compute, N> x;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x.v[i] = f(i);
  return x;
}

// Divides `lanes` lanes into batches and calls f(k, count) for each batch, which has `count` vectors and begins at lane
// k. count is N while at least N full vectors remain, then 1.
template <class Compute, int N, class F>
RELOPS_HOST_DEVICE_INLINE void for_batches(int64_t lanes, F f) {
  int64_t k = 0;
  for (; k + N * kLanes<Compute> <= lanes; k += N * kLanes<Compute>) f(k, std::integral_constant<int, N>{});
  for (; k < lanes; k += kLanes<Compute>) f(k, std::integral_constant<int, 1>{});
}

// Computes e^x with an error of about 1 unit in the last place. x must not be so large that e^x overflows. NaN stays
// NaN. In float, results below the normal range are inexact, and they are 0 for x < -87.7.
template <int N>
RELOPS_HOST_DEVICE_INLINE Batch<float, N> exponential(Batch<float, N> x) {
  // At x = -88, the power of two that is computed below has the exponent field 0 and is therefore 0.
  x = batch<float, N>([&](int i) { return maximum(broadcast(-88.0f), x.v[i]); });
  // Adding 1.5 * 2^23 + 127 rounds to the nearest integer and leaves it in the low bits, with the bias of a float
  // exponent.
  constexpr float kRounder = 12582912.0f + 127;
  const Batch<float, N> shifted = x * 1.44269504f + kRounder, n = shifted - kRounder;
  const Batch<float, N> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  const Batch<float, N> p = polynomial(r, 1.0f, 1.0f, 0.5f, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720);
  return batch<float, N>([&](int i) { return p.v[i] * (Vec<float>)((VecInt<float>)shifted.v[i] << 23); });
}

template <int N>
inline Batch<double, N> exponential(Batch<double, N> x) {
  for (Vec<double>& v : x.v)
    for (int i = 0; i < kLanes<double>; ++i) v[i] = std::exp(v[i]);
  return x;
}

// Computes e^x for x <= 0 with an absolute error of at most 1.5e-7, which suffices for a softmax. The function takes
// two thirds as many operations as exponential(). The relative error of small results grows in proportion to -x,
// because x times log2(e) is rounded once.
template <int N>
RELOPS_HOST_DEVICE_INLINE Batch<float, N> exponential_of_softmax(Batch<float, N> x) {
  x = x * 1.44269504f;
  x = batch<float, N>([&](int i) { return maximum(broadcast(-127.0f), x.v[i]); });
  constexpr float kRounder = 12582912.0f + 127;
  const Batch<float, N> shifted = x + kRounder, r = x - (shifted - kRounder);
  // This minimax polynomial has an error of 7.5e-8 on [-1/2, 1/2].
  const Batch<float, N> p =
      polynomial(r, 1.0000001f, 0.693146944f, 0.240221202f, 0.0555071309f, 0.00967554096f, 0.00132764725f);
  return batch<float, N>([&](int i) { return p.v[i] * (Vec<float>)((VecInt<float>)shifted.v[i] << 23); });
}

template <int N>
inline Batch<double, N> exponential_of_softmax(Batch<double, N> x) {
  return exponential(x);
}

// Computes the softmax of p[0..n) in place and sets p[n..padded) to 0. padded must be a multiple of the number of
// lanes.
template <class Compute>
inline void softmax(Compute* p, int64_t n, int64_t padded) {
  for (int64_t i = n; i < padded; ++i) p[i] = -std::numeric_limits<Compute>::infinity();
  Vec<Compute> tops = load(p);
  for (int64_t i = kLanes<Compute>; i < padded; i += kLanes<Compute>) tops = maximum(load(p + i), tops);
  const Compute top = fold<Compute>(tops, [](Vec<Compute> a, Vec<Compute> b) { return maximum(a, b); });
  Vec<Compute> total = {};
  for (int64_t i = 0; i < padded; i += kLanes<Compute>) {
    const Vec<Compute> e = exponential(Batch<Compute, 1>{{load(p + i) - top}}).v[0];
    store(p + i, e);
    total += e;
  }
  const Compute scale = 1 / sum<Compute>(total);
  for (int64_t i = 0; i < padded; i += kLanes<Compute>) store(p + i, load(p + i) * scale);
}

}  // namespace relops::RELOPS_ISA

#endif
