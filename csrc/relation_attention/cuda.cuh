// What forward and backward of relation attention share: geometry of pairs, and products of rows of features.
//
// Everywhere a block has `own` rows (16, or a multiple: queries, or keys for the gradients of what belongs to keys) of
// up to 8 heads, and goes over the `others` in tiles. A step takes a tile through stages, each of which is on another
// tile, so that there is one barrier a step:
//   1. the boxes of the tile: logarithms of sizes, and their sines and cosines;
//   2. b of all pairs and heads, to shared memory: a warp has an other and all own rows; the 32 features of a pair, of
//      dx and dy, are computed in the registers where a tensor core wants them;
//   3. the products of features: a warp has a head;
//   4. in the backward, the gradients that go through b: warps have others again.
#pragma once

#include "common/cuda/mma.cuh"
#include "relation_attention/problem.h"

namespace relops {

constexpr int kOwnRows = 16;
constexpr int kHeads = 8;  // of a block
constexpr int kHeadThreads = 32 * kHeads;

// Pairs and heads: Compute tile[kHeads][kOwnRows][others], padded against bank conflicts.
template <int kOthers>
struct TileLayout {
  static constexpr int kRow = kOthers + 1, kHead = kOwnRows * kRow + 4, kSize = kHeads * kHead;
  static __device__ __forceinline__ int at(int head, int row, int other) { return head * kHead + row * kRow + other; }
};

template <class T>
struct RelationParams {
  using Compute = ComputeType<T>;

  RelationAttentionArgs<T> a;
  bool vector;                          // rows of features can be loaded 16 bytes at a time
  int row_tiles;                        // of kOwnRows, of a block
  unsigned row_blocks, groups, chunks;  // of own rows, of heads, of channels
  // Backward:
  const Compute* delta;  // [N,Q,M], sum over channels of grad_output * output
  Compute* of_weight;    // [N,row_blocks,65 M], shares of the gradients of weights, then biases; null: not wanted
  Compute* of_boxes;     // [groups,N,own rows,4], shares of the gradients of the own boxes; null: not wanted
};

// What a block works on. Row blocks are numbered fastest, as those of a head read the same rows of the other side.
struct RelationBlock {
  template <class T>
  __device__ RelationBlock(const RelationParams<T>& p, int64_t own_rows) {
    unsigned block = blockIdx.x;
    row_block = block % p.row_blocks;
    block /= p.row_blocks;
    group = block % p.groups;
    block /= p.groups;
    chunk = block % p.chunks;
    n = block / p.chunks;
    first = int64_t{row_block} * p.row_tiles * kOwnRows + threadIdx.x / kHeadThreads * kOwnRows;
    const int64_t left = own_rows - first;
    rows = left < 0 ? 0 : left < kOwnRows ? static_cast<int>(left) : kOwnRows;
    head = group * kHeads;
    heads = static_cast<int>(p.a.M - head < kHeads ? p.a.M - head : kHeads);
  }
  unsigned row_block, group, chunk;
  int64_t n, first;  // image; first own row of these eight warps
  int rows;          // of kOwnRows, those there are
  int64_t head;
  int heads;
};

// ---- Boxes and weights ----

template <class Compute>
struct BoxTerms {
  TwoPart<Compute> center[2];
  Log2<Compute> size[2];
  Compute sine[2][kWaves], cosine[2][kWaves];  // of the angles of the size
};

template <class Compute>
__device__ __forceinline__ Log2<Compute> log2_parts(Compute x) {
  if constexpr (sizeof(Compute) == 4) {
    const int32_t bits = std::bit_cast<int32_t>(x), n = (bits - 0x3f3504f3) >> 23;
    const float m = std::bit_cast<float>(bits - (n << 23)), r = __fdividef(m - 1, m + 1);
    return {static_cast<float>(n), r * Series<float>::log2(r * r)};
  } else {
    const int64_t bits = std::bit_cast<int64_t>(x), n = (bits - 0x3fe6a09e667f3bcd) >> 52;
    const double m = std::bit_cast<double>(bits - (n << 52)), r = (m - 1) / (m + 1);
    return {static_cast<double>(n), r * Series<double>::log2(r * r)};
  }
}

// Sine and cosine of the angle of a wave, of a logarithm in parts.
__device__ __forceinline__ void sine_cosine(Log2<float> x, const Wave<float>& wave, float& sine, float& cosine) {
  constexpr float kEven = 3 << 23;  // floats near it are even numbers: adding it rounds to whole turns
  const float part = fmaf(x.n, wave.low, x.l * wave.per_octave);
  const float turns = (fmaf(x.n, wave.high, part) + kEven) - kEven;
  const float angle = 3.14159265f * (fmaf(x.n, wave.high, -turns) + part);
  sine = __sinf(angle);
  cosine = __cosf(angle);
}
__device__ __forceinline__ void sine_cosine(Log2<double> x, const Wave<double>& wave, double& sine, double& cosine) {
  const double part = fma(x.n, wave.low, x.l * wave.per_octave);
  const double turns = rint(fma(x.n, wave.high, part)), r = fma(x.n, wave.high, -turns) + part;
  const double sign = 2 * rint(turns / 2) == turns ? 1 : -1;
  sine = sign * r * Series<double>::sine(r * r);
  cosine = sign * Series<double>::cosine(r * r);
}

// The terms of a wave of a coordinate of the size, and with the first wave those without waves. box: null for what is
// to have no influence, whatever it is. A box that is not finite, or whose size is not positive, has the size NaN,
// which goes to all its pairs.
template <class Compute>
__device__ __forceinline__ void set_box_terms(BoxTerms<Compute>& terms, const Compute* box, int coordinate, int j,
                                              const Wave<Compute>& wave) {
  Compute from = 0, to = 0;
  bool valid = true;
  if (box != nullptr) {
    from = box[coordinate];
    to = box[coordinate + 2];
    const Compute width = box[2] - box[0] + 1, height = box[3] - box[1] + 1;
    constexpr Compute kInfinity = std::numeric_limits<Compute>::infinity();
    valid = width > 0 && width < kInfinity && height > 0 && height < kInfinity;  // thus finite
  }
  Log2<Compute> size = log2_parts(to - from + 1);
  if (!valid) size.l = std::numeric_limits<Compute>::quiet_NaN();
  sine_cosine(size, wave, terms.sine[coordinate][j], terms.cosine[coordinate][j]);
  if (j == 0) {
    terms.center[coordinate] = middle(from, to);
    terms.size[coordinate] = size;
  }
}

template <class Compute>
struct HeadWeights {
  // W with the features of a pair as its columns; those of sizes for log own/other, whichever of them is the query.
  Compute of[kHeads][kEmbedding + 4];
  Compute bias[kHeads];
  Wave<Compute> waves[kWaves];

  static __device__ __forceinline__ int feature(int coordinate, bool cosine, int j) {
    return coordinate * kTerms + cosine * kWaves + j;
  }
};

// All threads of the block; a barrier must follow.
template <class T>
__device__ void load_head_weights(HeadWeights<ComputeType<T>>& w, const RelationAttentionArgs<T>& a, int64_t head,
                                  int heads, bool own_keys) {
  for (int i = threadIdx.x; i < kHeads * kEmbedding; i += blockDim.x) {
    const int h = i / kEmbedding, feature = i % kEmbedding;
    const bool turns = own_keys && feature >= kHalf && feature % kTerms < kWaves;
    const ComputeType<T> value = h < heads ? a.weight[head * kEmbedding + i] : 0;
    w.of[h][feature] = turns ? -value : value;
  }
  if (threadIdx.x < kHeads)
    w.bias[threadIdx.x] = static_cast<int>(threadIdx.x) < heads && a.bias != nullptr ? a.bias[head + threadIdx.x] : 0;
  if (threadIdx.x < kWaves) w.waves[threadIdx.x] = a.waves.of[threadIdx.x];
}

// Terms of `count` boxes from `first` of [total,4] on, by `threads` threads. masked: of the boxes; null: none.
template <class Compute>
__device__ __forceinline__ void load_boxes(BoxTerms<Compute>* terms, int count, const Compute* boxes, int64_t first,
                                           int64_t total, const bool* masked, const Wave<Compute>* waves, int thread,
                                           int threads) {
  for (int i = thread; i < count * 2 * kWaves; i += threads) {
    const int64_t box = first + i / (2 * kWaves);
    const bool there = box < total && (masked == nullptr || !masked[box]);
    const int j = i % kWaves;
    set_box_terms(terms[i / (2 * kWaves)], there ? boxes + 4 * box : nullptr, i / kWaves % 2, j, waves[j]);
  }
}

// log2 of the ratio of a distance of centers and the size it is divided by; whether it is at its floor.
template <class Compute>
__device__ __forceinline__ Log2<Compute> log2_ratio(Compute distance, Log2<Compute> size, bool& at_floor) {
  constexpr Compute kExponent = kRatioFloorExponent, kMantissa = kRatioFloorMantissa;
  const Log2<Compute> ratio = log2_parts(distance < 0 ? -distance : distance) - size;
  at_floor = ratio.n + ratio.l <= kExponent + kMantissa;
  return at_floor ? Log2<Compute>{kExponent, kMantissa} : ratio;
}

template <class Compute>
__device__ __forceinline__ Log2<Compute> shuffle(Log2<Compute> x, int lane) {
  return {__shfl_sync(kAll, x.n, lane), __shfl_sync(kAll, x.l, lane)};
}

// b of all pairs and heads of a tile, by eight warps. by_own: distances are divided by the own size. First widths, then
// heights, then distances, so that registers have to hold the operands of one of them only.
template <int kOthers, class Compute>
__device__ __forceinline__ void compute_logits(const HeadWeights<Compute>& w, const BoxTerms<Compute>* own,
                                               const BoxTerms<Compute>* others, bool by_own, Compute* tile) {
  using Layout = TileLayout<kOthers>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kHeads, g = lane / 4, t = lane % 4;
  // In a, rows are own boxes and the depth waves t and t + 4; in b, rows are heads.
#pragma unroll 1
  for (int c = 0; c < 2; ++c) {
    OperandA<Compute, true> sines, cosines;
    Compute of_sine[2], of_cosine[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      of_sine[e] = w.of[g][w.feature(2 + c, false, t + 4 * e)];
      of_cosine[e] = w.of[g][w.feature(2 + c, true, t + 4 * e)];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        sines.set_stored(row, e, own[g + 8 * row].sine[c][t + 4 * e]);
        cosines.set_stored(row, e, own[g + 8 * row].cosine[c][t + 4 * e]);
      }
    }
#pragma unroll 1
    for (int o = warp; o < kOthers; o += kHeads) {
      Compute b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[i] = c == 0 ? w.bias[2 * t + i % 2] : tile[Layout::at(2 * t + i % 2, g + i / 2 * 8, o)];
      OperandB<Compute, true> with_sines, with_cosines;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Compute s = others[o].sine[c][t + 4 * e], k = others[o].cosine[c][t + 4 * e];
        with_sines.set_stored(e, of_sine[e] * k + of_cosine[e] * s);
        with_cosines.set_stored(e, of_cosine[e] * k - of_sine[e] * s);
      }
      multiply<false>(b, sines, with_sines);
      multiply<false>(b, cosines, with_cosines);
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[Layout::at(2 * t + i % 2, g + i / 2 * 8, o)] = b[i];
    }
  }

  OperandB<Compute, true> of_sine[2], of_cosine[2];
  Wave<Compute> waves[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    waves[e] = w.waves[t + 4 * e];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      of_sine[c].set_stored(e, w.of[g][w.feature(c, false, t + 4 * e)]);
      of_cosine[c].set_stored(e, w.of[g][w.feature(c, true, t + 4 * e)]);
    }
  }
  // The four lanes of two rows share their four logarithms: lane t has row t % 2, coordinate t / 2.
  const int coordinate = t / 2;
  const BoxTerms<Compute>& mine = own[g + t % 2 * 8];
#pragma unroll 1
  for (int o = warp; o < kOthers; o += kHeads) {
    const BoxTerms<Compute>& other = others[o];
    bool at_floor;
    const Log2<Compute> shared = log2_ratio(difference(mine.center[coordinate], other.center[coordinate]),
                                            by_own ? mine.size[coordinate] : other.size[coordinate], at_floor);
    Compute b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = tile[Layout::at(2 * t + i % 2, g + i / 2 * 8, o)];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      OperandA<Compute, true> sines, cosines;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Log2<Compute> ratio = shuffle(shared, g * 4 + 2 * c + row);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Compute sine, cosine;
          sine_cosine(ratio, waves[e], sine, cosine);
          sines.set_stored(row, e, sine);
          cosines.set_stored(row, e, cosine);
        }
      }
      multiply<false>(b, sines, of_sine[c]);
      multiply<false>(b, cosines, of_cosine[c]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[Layout::at(2 * t + i % 2, g + i / 2 * 8, o)] = b[i];
  }
}

// max(b, 1e-6), where NaN stays.
template <class Compute>
__device__ __forceinline__ Compute floored(Compute b) {
  return b <= static_cast<Compute>(kWeightFloor) ? static_cast<Compute>(kWeightFloor) : b;
}

// ---- Rows of features ----

// Channels of a row that a block sums up, in accumulators [kColumns / 8][4].
template <class T>
constexpr int kColumns = sizeof(T) == 8 ? 16 : 64;

template <class T>
constexpr int kPack = 16 / sizeof(T);

// Bit i: other first + i is there and not masked. The whole warp.
__device__ __forceinline__ unsigned active_bits(int count, int64_t first, int64_t total, const bool* masked) {
  const int lane = threadIdx.x % 32;
  const bool there = lane < count && first + lane < total;
  return __ballot_sync(kAll, there && (masked == nullptr || !masked[first + lane]));
}

// Rows of one head of an image, from the first of a tile on.
template <class T>
struct TileRows {
  static constexpr int V = kPack<T>;

  const T* data;
  int64_t stride;
  unsigned active;  // the rows that are read; others count as zeros
  int width;
  bool vector;

  __device__ TileRows(const FeatureRows<const T>& rows, int64_t n, int64_t i, int64_t m, unsigned active, int64_t width,
                      bool vector)
      : data(rows.at(n, i, m)), stride(rows.i_stride), active(active), width(static_cast<int>(width)), vector(vector) {}

  // packs[i] = V channels of row row_of(i). One branch for all, so that all loads are in flight together.
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

// sums[j] += own rows times other rows 8j to 8j + 7. A lane has of each row 16 bytes in 64, so which channels are
// multiplied by which in a step is not as they are numbered.
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

// sums += p times other rows, of the channels from `first` on; p as dot_rows leaves its sums. Column 8 (i V + v) + g of
// the sums is channel first + (8 i + g) V + v.
template <int kOthers, bool kExact, class T>
__device__ __forceinline__ void add_rows(ComputeType<T> (&sums)[kColumns<T> / 8][4],
                                         const ComputeType<T> (&p)[kOthers / 8][4], const TileRows<T>& others,
                                         int first) {
  constexpr int V = kPack<T>, kDepth = kLaneDepth<T>, kTiles = kDepth / 2;  // kTiles: of p, in a step
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < kOthers / 8 / kTiles; ++step) {
    OperandA<T, kExact> a;
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int e = 0; e < kDepth; ++e) a.set_sum(row, e, p[step * kTiles + e / 2][2 * row + e % 2]);
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
        multiply<true>(sums[i * V + v], a, b);
      }
    }
  }
}

// Writes the sums of add_rows, times factor[g or g + 8], to dense rows [.., width] whose first is `out`; those that are
// not active get zeros.
template <class T>
__device__ __forceinline__ void store_rows(const ComputeType<T> (&sums)[kColumns<T> / 8][4],
                                           const ComputeType<T> (&factor)[2], T* out, int64_t stride, int rows,
                                           unsigned active, int first, int width, bool vector) {
  constexpr int V = kPack<T>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (g + 8 * row >= rows) continue;
    const bool there = active >> (g + 8 * row) & 1;
#pragma unroll
    for (int i = 0; i < kColumns<T> / 8 / V; ++i)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int channel = first + (8 * i + 2 * t + column) * V;
        T* to = out + (g + 8 * row) * stride + channel;
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < V; ++v)
          pack.x[v] = static_cast<T>(there ? sums[i * V + v][2 * row + column] * factor[row] : 0);
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

// dots[i] = sum, over the channels of these sums, of the sums of own row g + 8 i, times factor[i], with row g + 8 i of
// `others`. All lanes of the warp have them.
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

// ---- Launches ----

// Whether all rows are of whole packs and aligned to them.
template <class T>
bool are_packs(const FeatureRows<const T>& rows, int64_t width) {
  constexpr int V = kPack<T>;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.n_stride % V == 0 && rows.i_stride % V == 0 &&
         rows.m_stride % V == 0 && width % V == 0;
}

// Calls f(Type<T>{}, exact), a std::bool_constant: whether products of float32 are as exact as float32 is.
template <class T, class F>
void dispatch_exact(bool allow_tf32, F f) {
  if constexpr (std::is_same_v<T, float>)
    if (allow_tf32) return f(std::false_type{});
  f(std::true_type{});
}

// In cuda_backward.cu.
template <class T>
void relation_attention_backward(const RelationAttention& r, const RelationAttentionArgs<T>& a);

// In cuda_forward.cu, for 16-bit features: shares [chunks of kColumns<T> channels,N,Q,M] of delta, by the
// forward.
template <class T>
void launch_delta(RelationAttentionArgs<T> a, float* shares, cudaStream_t stream);

}  // namespace relops
