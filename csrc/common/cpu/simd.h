// Vectors of one instruction set, for kernel files compiled by foreach_isa.h (hence no include guard).
//
// Vec<C> holds kLanes<C> values of the compute type C (float or double) in the widest register of the set; arithmetic,
// comparisons and ?: on it are the compiler's own (GCC vector extensions). Features stored in 16 bits are converted
// as they are loaded and stored.

namespace relops::RELOPS_ISA {

template <class C>
constexpr int64_t kLanes = RELOPS_VECTOR_BYTES / sizeof(C);

template <class C>
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

template <class C>
using Vec = typename VecTypes<C>::Float;
// Integers as wide as C, so that comparisons of Vec<C> are masks for both.
template <class C>
using VecInt = typename VecTypes<C>::Int;
template <class C>
using Int = typename VecTypes<C>::Scalar;

template <class C>
inline Vec<C> broadcast(C x) {
  return x - Vec<C>{};
}

template <class C>
inline VecInt<C> broadcast_int(Int<C> x) {
  return x - VecInt<C>{};
}

template <class C>
inline Vec<C> load(const C* p) {
  return *reinterpret_cast<const typename VecTypes<C>::FloatMem*>(p);
}

template <class C>
inline VecInt<C> load_int(const Int<C>* p) {
  return *reinterpret_cast<const typename VecTypes<C>::IntMem*>(p);
}

template <class C>
inline void store(C* p, Vec<C> v) {
  *reinterpret_cast<typename VecTypes<C>::FloatMem*>(p) = v;
}

template <class C>
inline void store_int(Int<C>* p, VecInt<C> v) {
  *reinterpret_cast<typename VecTypes<C>::IntMem*>(p) = v;
}

typedef uint16_t HalfBits __attribute__((vector_size(RELOPS_VECTOR_BYTES / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(RELOPS_VECTOR_BYTES)));

inline Vec<float> load(const BFloat16* p) {
  HalfBits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, FloatBits) << 16);
}

// Rounds to nearest even, as torch does; a NaN stays one.
inline void store(BFloat16* p, Vec<float> v) {
  const FloatBits bits = (FloatBits)v;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const FloatBits chosen = v == v ? rounded : (bits >> 16) | 0x40;
  const HalfBits out = __builtin_convertvector(chosen, HalfBits);
  __builtin_memcpy(p, &out, sizeof(out));
}

#if RELOPS_VECTOR_BYTES == 64
inline Vec<float> load(const Half* p) {
  // maskz: the plain form makes GCC 12 warn of an uninitialised operand of its own header.
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

// The first n values at p, and zeros: nothing past them is read.
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
template <class C>
inline Vec<C> gather(const C* p, VecInt<C> at) {
  Vec<C> v;
  for (int j = 0; j < kLanes<C>; ++j) v[j] = p[at[j]];
  return v;
}
#endif

// dst[0..n) = src[0..n), converted.
template <class To, class From>
inline void convert(const From* src, To* dst, int64_t n) {
  using C = ComputeType<To>;
  constexpr int64_t W = kLanes<C>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  if (i == n) return;
  alignas(RELOPS_VECTOR_BYTES) From in[W] = {};
  alignas(RELOPS_VECTOR_BYTES) To out[W];
  for (int64_t j = i; j < n; ++j) in[j - i] = src[j];
  store(out, load(in));
  for (int64_t j = i; j < n; ++j) dst[j] = out[j - i];
}

// The vector whose lane j is f(j). Built from an initialiser, which the compiler turns into a constant; lanes assigned
// in a loop it may insert one by one at run time.
template <class C, class F, size_t... J>
inline VecInt<C> lanes(F f, std::index_sequence<J...>) {
  return VecInt<C>{f(static_cast<Int<C>>(J))...};
}
template <class C, class F>
inline VecInt<C> lanes(F f) {
  return lanes<C>(f, std::make_index_sequence<kLanes<C>>{});
}

// Lane j of the result is the sum of the lanes of v[j]. Each level adds halves of two vectors into one, so that W sums
// cost W - 1 additions instead of W log2(W).
template <class C, int kDistance = kLanes<C> / 2>
inline Vec<C> transpose_sum(Vec<C>* v) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    constexpr Int<C> W = kLanes<C>;
    // In the numbering of __builtin_shuffle: a's lanes, then b's.
    const VecInt<C> keep = lanes<C>([](Int<C> j) { return (j & kDistance ? W : 0) + j; });
    const VecInt<C> cross = lanes<C>([](Int<C> j) { return (j & kDistance ? W : 0) + (j ^ kDistance); });
    for (int i = 0; i < kDistance; ++i)
      v[i] = __builtin_shuffle(v[i], v[i + kDistance], keep) + __builtin_shuffle(v[i], v[i + kDistance], cross);
    return transpose_sum<C, kDistance / 2>(v);
  }
}

// v[i][j] becomes v[j][i]: log2(W) rounds, each of which exchanges blocks of lanes between vectors kDistance apart.
template <class C, int kDistance = kLanes<C> / 2>
inline void transpose(Vec<C>* v) {
  if constexpr (kDistance > 0) {
    constexpr Int<C> W = kLanes<C>;
    const VecInt<C> upper = lanes<C>([](Int<C> j) { return j & kDistance ? W + j - kDistance : j; });
    const VecInt<C> lower = lanes<C>([](Int<C> j) { return j & kDistance ? W + j : j + kDistance; });
    for (int i = 0; i < W; ++i) {
      if (i & kDistance) continue;
      const Vec<C> a = v[i], b = v[i + kDistance];
      v[i] = __builtin_shuffle(a, b, upper);
      v[i + kDistance] = __builtin_shuffle(a, b, lower);
    }
    transpose<C, kDistance / 2>(v);
  }
}

// Folds the lanes of v into one value with the associative f.
template <class C, int kDistance = kLanes<C> / 2, class F>
inline C fold(Vec<C> v, F f) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    const VecInt<C> other = lanes<C>([](Int<C> j) { return j ^ kDistance; });
    return fold<C, kDistance / 2>(f(v, (Vec<C>)__builtin_shuffle(v, other)), f);
  }
}

template <class C>
inline C sum(Vec<C> v) {
  return fold<C>(v, [](Vec<C> a, Vec<C> b) { return a + b; });
}

// A mask's lanes as bits.
template <class C>
inline unsigned mask_bits(VecInt<C> mask) {
#if RELOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(C) == 4)
    return _mm512_movepi32_mask((__m512i)mask);
  else
    return _mm512_movepi64_mask((__m512i)mask);
#elif RELOPS_VECTOR_BYTES == 32
  if constexpr (sizeof(C) == 4)
    return _mm256_movemask_ps((__m256)mask);
  else
    return _mm256_movemask_pd((__m256d)mask);
#else
  unsigned bits = 0;
  for (int j = 0; j < kLanes<C>; ++j) bits |= (mask[j] & 1u) << j;
  return bits;
#endif
}

// The second where either is NaN.
inline Vec<float> minimum(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
inline Vec<double> minimum(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
// By intrinsic: of a comparison with a constant and a selection GCC does not make one instruction.
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

// The lanes in which a > b, as bits. By intrinsic: from a comparison GCC makes a vector of the mask, and a mask of
// that.
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

// The lanes in which a and b are equal, as bits.
inline unsigned equal_bits(Vec<double> a, Vec<double> b) {
#if RELOPS_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
#else
  return mask_bits<double>(a == b);
#endif
}

// From pairs p[0], p[1], .. to the first and the second of each.
template <class C>
inline void load_pairs(const C* p, Vec<C>& first, Vec<C>& second) {
  const Vec<C> low = load(p), high = load(p + kLanes<C>);
  first = __builtin_shuffle(low, high, lanes<C>([](Int<C> j) { return 2 * j; }));
  second = __builtin_shuffle(low, high, lanes<C>([](Int<C> j) { return 2 * j + 1; }));
}

template <class C>
inline void store_pairs(C* p, Vec<C> first, Vec<C> second) {
  constexpr Int<C> W = kLanes<C>;
  const VecInt<C> low = lanes<C>([](Int<C> j) { return j / 2 + (j % 2 ? W : 0); });
  store(p, (Vec<C>)__builtin_shuffle(first, second, low));
  store(p + W, (Vec<C>)__builtin_shuffle(first, second, low + W / 2));
}

template <class C, int N>
using Batch = VectorBatch<Vec<C>, N>;

// v[i] = f(i)
template <class C, int N, class F>
RELOPS_HOST_DEVICE_INLINE Batch<C, N> batch(F f) {
  Batch<C, N> x;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x.v[i] = f(i);
  return x;
}

// Calls f(k, count) for the vectors of lanes k, k + 1, .. of `lanes`: N of them where there are so many, else 1.
template <class C, int N, class F>
RELOPS_HOST_DEVICE_INLINE void for_batches(int64_t lanes, F f) {
  int64_t k = 0;
  for (; k + N * kLanes<C> <= lanes; k += N * kLanes<C>) f(k, std::integral_constant<int, N>{});
  for (; k < lanes; k += kLanes<C>) f(k, std::integral_constant<int, 1>{});
}

// e^x to about 1 unit in the last place, for x that do not overflow; NaN stays NaN. In float what is below the normal
// range is inexact down to x = -87.7, and 0 from there on.
template <int N>
RELOPS_HOST_DEVICE_INLINE Batch<float, N> exponential(Batch<float, N> x) {
  // At -88 the power of two below is 2^-127, whose bits are those of 0.
  x = batch<float, N>([&](int i) { return maximum(broadcast(-88.0f), x.v[i]); });
  // Adding 1.5 * 2^23 + 127 rounds to the nearest integer, which then stands in the low bits, biased as an exponent.
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

// The same for x <= 0 with an error of at most 1.5e-7 of e^0, as a softmax needs it; two thirds of the operations. Of
// smaller results the relative error grows as -x does: x times log2(e) is rounded once.
template <int N>
RELOPS_HOST_DEVICE_INLINE Batch<float, N> exponential_of_softmax(Batch<float, N> x) {
  x = x * 1.44269504f;
  x = batch<float, N>([&](int i) { return maximum(broadcast(-127.0f), x.v[i]); });
  constexpr float kRounder = 12582912.0f + 127;
  const Batch<float, N> shifted = x + kRounder, r = x - (shifted - kRounder);
  // Minimax on [-1/2, 1/2]: 7.5e-8.
  const Batch<float, N> p =
      polynomial(r, 1.0000001f, 0.693146944f, 0.240221202f, 0.0555071309f, 0.00967554096f, 0.00132764725f);
  return batch<float, N>([&](int i) { return p.v[i] * (Vec<float>)((VecInt<float>)shifted.v[i] << 23); });
}

template <int N>
inline Batch<double, N> exponential_of_softmax(Batch<double, N> x) {
  return exponential(x);
}

// In place over p[0..padded), padded a multiple of the lanes; entries from n on become 0.
template <class C>
inline void softmax(C* p, int64_t n, int64_t padded) {
  for (int64_t i = n; i < padded; ++i) p[i] = -std::numeric_limits<C>::infinity();
  Vec<C> tops = load(p);
  for (int64_t i = kLanes<C>; i < padded; i += kLanes<C>) tops = maximum(load(p + i), tops);
  const C top = fold<C>(tops, [](Vec<C> a, Vec<C> b) { return maximum(a, b); });
  Vec<C> total = {};
  for (int64_t i = 0; i < padded; i += kLanes<C>) {
    const Vec<C> e = exponential(Batch<C, 1>{{load(p + i) - top}}).v[0];
    store(p + i, e);
    total += e;
  }
  const C scale = 1 / sum<C>(total);
  for (int64_t i = 0; i < padded; i += kLanes<C>) store(p + i, load(p + i) * scale);
}

}  // namespace relops::RELOPS_ISA
