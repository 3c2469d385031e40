// relation_attention on CUDA: products of feature rows on tensor cores, and loads and stores of these rows.
#pragma once

#include <cstdint>

#include "relation_attention/cuda.cuh"

namespace relops {

// The number of channels of a row that a block sums in accumulators [kColumns / 8][4].
template <class T>
constexpr int kColumns = sizeof(T) == 8 ? 16 : 64;

template <class T>
constexpr int kPack = 16 / sizeof(T);

// Returns a bit mask: bit i tells whether row first + i exists and is not masked. The whole warp must call this
// function.
__device__ __forceinline__ unsigned active_bits(int count, int64_t first, int64_t total, const bool* masked) {
  const int lane = threadIdx.x % 32;
  const bool exists = lane < count && first + lane < total;
  return __ballot_sync(kAll, exists && (masked == nullptr || !masked[first + lane]));
}

// Rows of one head of an image, beginning with the first row of a tile.
template <class T>
struct TileRows {
  static constexpr int V = kPack<T>;

  const T* data;
  int64_t stride;
  unsigned active;  // bit mask of the rows that are read; all other rows count as zeros
  int width;
  bool vector;

  __device__ TileRows(const FeatureRows<const T>& rows, int64_t n, int64_t i, int64_t m, unsigned active, int64_t width,
                      bool vector)
      : data(rows.at(n, i, m)), stride(rows.i_stride), active(active), width(static_cast<int>(width)), vector(vector) {}

  // Sets packs[i] to V channels of row row_of(i). A single branch covers all rows, so all loads are in flight together.
  template <int kCount, class RowOf>
  __device__ __forceinline__ void load(Pack<T, V> (&packs)[kCount], int channel, RowOf row_of) const {
    if (vector) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        packs[i] = load_pack<T, V>(data + row_of(i) * stride + channel, (active >> row_of(i) & 1) && channel < width);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v)
          packs[i].x[v] =
              load_pack<T, 1>(data + row_of(i) * stride + channel + v, (active >> row_of(i) & 1) && channel + v < width)
                  .x[0];
    }
  }
};

// Adds the products of own rows with other rows 8j to 8j + 7 to sums[j]. A lane loads 16 of every 64 bytes of a row, so
// the channels that are multiplied in one step are not consecutive.
template <int kOthers, bool kExact, class T>
__device__ __forceinline__ void dot_rows(ComputeType<T> (&sums)[kOthers / 8][4], const TileRows<T>& own,
                                         const TileRows<T>& others) {
  constexpr int V = kPack<T>, kDepth = kLaneDepth<T>, kSteps = V / kDepth;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int channel = t * V; channel - t * V < own.width; channel += 4 * V) {
    Pack<T, V> x[2], y[kOthers / 8];
    own.load(x, channel, [g](int row) { return 8 * row + g; });
    others.load(y, channel, [g](int j) { return 8 * j + g; });
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      OperandA<T, kExact> a;
#pragma unroll
      for (int row = 0; row < 2; ++row)
#pragma unroll
        for (int e = 0; e < kDepth; ++e) a.set_stored(row, e, x[row].x[step * kDepth + e]);
#pragma unroll
      for (int j = 0; j < kOthers / 8; ++j) {
        OperandB<T, kExact> b;
#pragma unroll
        for (int e = 0; e < kDepth; ++e) b.set_stored(e, y[j].x[step * kDepth + e]);
        multiply<false>(sums[j], a, b);
      }
    }
  }
}

// Adds p times the other rows to sums, for the channels beginning with `first`. p has the layout of the sums of
// dot_rows. Column 8 (i V + v) + g of the sums is channel first + (8 i + g) V + v. The operands hold 16 bits of p if T
// is BFloat16, or 24 bits if kAllBits.
template <int kOthers, bool kExact, bool kAllBits = false, class T>
__device__ __forceinline__ void add_rows(ComputeType<T> (&sums)[kColumns<T> / 8][4],
                                         const ComputeType<T> (&p)[kOthers / 8][4], const TileRows<T>& others,
                                         int first) {
  constexpr int V = kPack<T>, kDepth = kLaneDepth<T>, kTiles = kDepth / 2;  // kTiles: tiles of p per step
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < kOthers / 8 / kTiles; ++step) {
    OperandA<T, kExact> a;
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int e = 0; e < kDepth; ++e) a.set_sum(row, e, p[step * kTiles + e / 2][2 * row + e % 2]);
    constexpr bool kThreeParts = kAllBits && std::is_same_v<T, BFloat16>;
    T last[2][kDepth];  // the third part of p
    if constexpr (kThreeParts) {
#pragma unroll
      for (int row = 0; row < 2; ++row)
#pragma unroll
        for (int e = 0; e < kDepth; ++e)
          last[row][e] = static_cast<T>(p[step * kTiles + e / 2][2 * row + e % 2] - static_cast<float>(a.high[row][e]) -
                                        static_cast<float>(a.rest[row][e]));
    }
#pragma unroll
    for (int i = 0; i < kColumns<T> / 8 / V; ++i) {
      if (first + 8 * i * V >= others.width) break;
      Pack<T, V> y[kDepth];
      others.load(y, first + (8 * i + g) * V, [=](int e) { return 8 * (step * kTiles + e / 2) + 2 * t + e % 2; });
#pragma unroll
      for (int v = 0; v < V; ++v) {
        OperandB<T, kExact> b;
#pragma unroll
        for (int e = 0; e < kDepth; ++e) b.set_stored(e, y[e].x[v]);
        if constexpr (kThreeParts) mma(sums[i * V + v], last, b.high);
        multiply<true>(sums[i * V + v], a, b);
      }
    }
  }
}

// Multiplies own row g + 8 i of the sums of add_rows by factor[i] and writes the rows to dense memory [.., width] that
// begins at `out`. Rows that are not active are set to zero.
template <class T>
__device__ __forceinline__ void store_rows(const ComputeType<T> (&sums)[kColumns<T> / 8][4],
                                           const ComputeType<T> (&factor)[2], T* out, int64_t stride, int rows,
                                           unsigned active, int first, int width, bool vector) {
  constexpr int V = kPack<T>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (g + 8 * row >= rows) continue;
    const bool is_active = active >> (g + 8 * row) & 1;
#pragma unroll
    for (int i = 0; i < kColumns<T> / 8 / V; ++i)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int channel = first + (8 * i + 2 * t + column) * V;
        T* to = out + (g + 8 * row) * stride + channel;
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < V; ++v)
          pack.x[v] = static_cast<T>(is_active ? sums[i * V + v][2 * row + column] * factor[row] : 0);
        if (vector) {
          if (channel < width) store_pack(to, pack);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (channel + v < width) to[v] = pack.x[v];
        }
      }
  }
}

// Computes dots[i], which is factor[i] times the dot product of own row g + 8 i of the sums and row g + 8 i of
// `others`, over the channels of the sums. All lanes of a group get the result.
template <class T>
__device__ __forceinline__ void dot_sums(const ComputeType<T> (&sums)[kColumns<T> / 8][4],
                                         const ComputeType<T> (&factor)[2], const T* others, int64_t stride, int rows,
                                         int first, int width, ComputeType<T> (&dots)[2]) {
  using Compute = ComputeType<T>;
  constexpr int V = kPack<T>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    Compute dot = 0;
#pragma unroll
    for (int i = 0; i < kColumns<T> / 8; ++i)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int channel = first + (8 * (i / V) + 2 * t + column) * V + i % V;
        if (g + 8 * row < rows && channel < width)
          dot += sums[i][2 * row + column] * static_cast<Compute>(others[(g + 8 * row) * stride + channel]);
      }
    dots[row] = group_sum(dot, 4) * factor[row];
  }
}

// Returns whether all rows consist of whole and aligned packs.
template <class T>
bool are_packs(const FeatureRows<const T>& rows, int64_t width) {
  constexpr int V = kPack<T>;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.n_stride % V == 0 && rows.i_stride % V == 0 &&
         rows.m_stride % V == 0 && width % V == 0;
}

}  // namespace relops
