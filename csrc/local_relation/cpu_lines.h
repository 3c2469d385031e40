// local_relation on the CPU: lines of memory. These functions unpack rows of the map into lines, pack lines into rows
// of the map, and compute sums over vectors of lines.
#ifndef RELOPS_LOCAL_RELATION_LINES
#define RELOPS_LOCAL_RELATION_LINES

#include "common/cpu/simd.h"
#include "local_relation/cpu_args.h"

namespace relops::RELOPS_ISA {

// Calls f(first, count) for ranges that cover [0, n). `count` is a constant: 8, and then 4, 2 and 1 for the rest.
template <class F>
RELOPS_HOST_DEVICE_INLINE void for_each_eight(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) f(i, std::integral_constant<int, 8>{});
  if (n - i >= 4) f(i, std::integral_constant<int, 4>{}), i += 4;
  if (n - i >= 2) f(i, std::integral_constant<int, 2>{}), i += 2;
  if (n - i >= 1) f(i, std::integral_constant<int, 1>{});
}

// Returns R sums. Sum r is the total, over i < count, of weight(i) times the vector at row(i) + r * line. If R is
// small, each sum is split into several parts, because every addition in a chain waits for the previous one.
template <class Compute, int R, class Weight, class Row>
RELOPS_HOST_DEVICE_INLINE Batch<Compute, R> weighted_sums(int64_t count, int64_t line, Weight weight, Row row) {
  constexpr int U = 8 / R;
  Batch<Compute, R> parts[U] = {};
  const auto add = [&](Batch<Compute, R>& to, int64_t i) __attribute__((always_inline)) {
    const Vec<Compute> w = weight(i);
    const Compute* const p = row(i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) to.v[r] += w * load(p + r * line);
  };
  int64_t i = 0;
  for (; i + U <= count; i += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) add(parts[u], i + u);
  for (; i < count; ++i) add(parts[0], i);
#pragma GCC unroll 8
  for (int u = 1; u < U; ++u) parts[0] = parts[0] + parts[u];
  return parts[0];
}

// Returns the sum of f(i) over i < count. This sum is also split into several parts.
template <class Compute, class F>
RELOPS_HOST_DEVICE_INLINE Vec<Compute> sum_over(int64_t count, F f) {
  constexpr int U = 4;
  Batch<Compute, U> parts = {};
  int64_t i = 0;
  for (; i + U <= count; i += U)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) parts.v[u] += f(i + u);
  for (; i < count; ++i) parts.v[0] += f(i);
  return (parts.v[0] + parts.v[1]) + (parts.v[2] + parts.v[3]);
}

// Sets dst[0..n) to src[0..n), converted to the type of dst. n may be smaller than the number of lanes of a vector.
template <class To, class From>
inline void convert_row(const From* src, To* dst, int64_t n) {
  if constexpr (std::is_same_v<To, From>)
    __builtin_memcpy(dst, src, n * sizeof(To));
  else
    convert(src, dst, n);
}

// Sets to[c * line + j] to row[c * c_stride + j * w_stride], converted to Compute.
template <class T, class Compute>
inline void unpack_line(const T* row, int64_t c_stride, int64_t w_stride, int64_t channels, int64_t count, Compute* to,
                        int64_t line) {
  constexpr int64_t V = kLanes<Compute>;
  if (w_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) convert_row(row + c * c_stride, to + c * line, count);
    return;
  }
  int64_t c = 0;
  if (c_stride == 1) {
    for (; channels - c > V / 2; c += V) {
      const int64_t lanes = std::min(channels - c, V);
      for (int64_t j = 0; j < count; j += V) {
        const int64_t columns = std::min(count - j, V);
        Vec<Compute> v[V] = {};
        for (int64_t i = 0; i < columns; ++i) v[i] = load_first(row + c + (j + i) * w_stride, lanes);
        transpose<Compute>(v);
        for (int64_t i = 0; i < lanes; ++i) {
          if (columns == V)
            store(to + (c + i) * line + j, v[i]);
          else
            store_first(to + (c + i) * line + j, v[i], columns);
        }
      }
    }
  }
  for (; c < channels; ++c)
    for (int64_t j = 0; j < count; ++j) to[c * line + j] = static_cast<Compute>(row[c * c_stride + j * w_stride]);
}

// Sets row[c * c_stride + j * w_stride] to from[c * line + j], converted to T. Lines must be readable up to whole
// vectors.
template <class T, class Compute>
inline void pack_line(const Compute* from, int64_t line, int64_t channels, int64_t count, T* row, int64_t c_stride,
                      int64_t w_stride) {
  constexpr int64_t V = kLanes<Compute>;
  if (w_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) convert_row(from + c * line, row + c * c_stride, count);
    return;
  }
  int64_t c = 0;
  if (c_stride == 1) {
    for (; channels - c > V / 2; c += V) {
      const int64_t lanes = std::min(channels - c, V);
      for (int64_t j = 0; j < count; j += V) {
        Vec<Compute> v[V] = {};
        for (int64_t i = 0; i < lanes; ++i) v[i] = load(from + (c + i) * line + j);
        transpose<Compute>(v);
        const int64_t columns = std::min(count - j, V);
        for (int64_t i = 0; i < columns; ++i) {
          T* const to = row + c + (j + i) * w_stride;
          if (lanes == V)
            store(to, v[i]);
          else
            store_first(to, v[i], lanes);
        }
      }
    }
  }
  for (; c < channels; ++c)
    for (int64_t j = 0; j < count; ++j) row[c * c_stride + j * w_stride] = static_cast<T>(from[c * line + j]);
}

}  // namespace relops::RELOPS_ISA

#endif
