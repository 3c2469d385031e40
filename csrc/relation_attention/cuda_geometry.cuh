// relation_attention on CUDA: the geometry of pairs. load_boxes computes the values that depend on a single box.
// compute_logits then computes b for all pairs of a tile, with products on tensor cores. problem.h explains the
// mathematics.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "relation_attention/cuda.cuh"

namespace relops {

template <class Compute>
struct BoxTerms {
  TwoPart<Compute> center[2];
  Log2<Compute> size[2];
  Compute sine[2][kWaves], cosine[2][kWaves];  // of the angles for width and height
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

// Computes the sine and cosine of one wave, given a logarithm in two parts.
__device__ __forceinline__ void sine_cosine(Log2<float> x, const Wave<float>& wave, float& sine, float& cosine) {
  constexpr float kEven = 3 << 23;  // floats near this value are even integers, so adding it rounds to whole turns
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

// Sets the sine and cosine of wave j for one coordinate of a box and, if j = 0, the center and the logarithm of the
// size. `box` is null if the box must not have any influence. A size that is not finite or not positive is set to NaN,
// so all pairs of the box become NaN.
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
    valid = width > 0 && width < kInfinity && height > 0 && height < kInfinity;  // which implies that the box is finite
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
  // The weights W, with one column per feature of a pair. The columns for widths and heights apply to log(own / other),
  // even if the other box is the query.
  Compute weight[kHeads][kEmbedding + 4];
  Compute bias[kHeads];
  Wave<Compute> waves[kWaves];

  static __device__ __forceinline__ int feature(int coordinate, bool cosine, int j) {
    return coordinate * kTerms + cosine * kWaves + j;
  }
};

// Loads the weights of some heads with all threads of the block. A barrier must follow.
template <class T>
__device__ void load_head_weights(HeadWeights<ComputeType<T>>& w, const RelationAttentionArgs<T>& a, int64_t head,
                                  int heads, bool own_keys) {
  for (int i = threadIdx.x; i < kHeads * kEmbedding; i += blockDim.x) {
    const int h = i / kEmbedding, feature = i % kEmbedding;
    const bool negate = own_keys && feature >= kHalf && feature % kTerms < kWaves;
    const ComputeType<T> value = h < heads ? a.weight[head * kEmbedding + i] : 0;
    w.weight[h][feature] = negate ? -value : value;
  }
  if (threadIdx.x < kHeads)
    w.bias[threadIdx.x] = static_cast<int>(threadIdx.x) < heads && a.bias != nullptr ? a.bias[head + threadIdx.x] : 0;
  if (threadIdx.x < kWaves) w.waves[threadIdx.x] = a.waves.wave[threadIdx.x];
}

// Computes the terms of `count` boxes, beginning with box `first` of boxes [total,4], with `threads` threads. `masked`
// is the mask of the boxes or null.
template <class Compute>
__device__ __forceinline__ void load_boxes(BoxTerms<Compute>* terms, int count, const Compute* boxes, int64_t first,
                                           int64_t total, const bool* masked, const Wave<Compute>* waves, int thread,
                                           int threads) {
  for (int i = thread; i < count * 2 * kWaves; i += threads) {
    const int64_t box = first + i / (2 * kWaves);
    const bool valid = box < total && (masked == nullptr || !masked[box]);
    const int j = i % kWaves;
    set_box_terms(terms[i / (2 * kWaves)], valid ? boxes + 4 * box : nullptr, i / kWaves % 2, j, waves[j]);
  }
}

// Returns log2 of a center distance divided by a size, but at least the lower limit. Sets at_floor if the limit
// applies.
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

// Computes b for all pairs of a tile and all heads of the block, with eight warps. If by_own, distances are divided by
// the size of the own box. Widths are processed first, then heights, then distances, so that registers hold the
// operands of only one of these steps at a time.
template <int kOthers, class Compute>
__device__ __forceinline__ void compute_logits(const HeadWeights<Compute>& w, const BoxTerms<Compute>* own,
                                               const BoxTerms<Compute>* others, bool by_own, Compute* tile) {
  using Layout = TileLayout<kOthers>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kHeads, g = lane / 4, t = lane % 4;
  // In operand a, rows are own boxes and the depth consists of waves t and t + 4. In operand b, rows are heads.
#pragma unroll 1
  for (int c = 0; c < 2; ++c) {
    OperandA<Compute, true> sines, cosines;
    Compute of_sine[2], of_cosine[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      of_sine[e] = w.weight[g][w.feature(2 + c, false, t + 4 * e)];
      of_cosine[e] = w.weight[g][w.feature(2 + c, true, t + 4 * e)];
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
      of_sine[c].set_stored(e, w.weight[g][w.feature(c, false, t + 4 * e)]);
      of_cosine[c].set_stored(e, w.weight[g][w.feature(c, true, t + 4 * e)]);
    }
  }
  // The four lanes of two rows share the four logarithms: lane t computes row t % 2 and coordinate t / 2.
  const int coordinate = t / 2;
  const BoxTerms<Compute>& own_box = own[g + t % 2 * 8];
#pragma unroll 1
  for (int o = warp; o < kOthers; o += kHeads) {
    const BoxTerms<Compute>& other = others[o];
    bool at_floor;
    const Log2<Compute> lane_ratio = log2_ratio(difference(own_box.center[coordinate], other.center[coordinate]),
                                                by_own ? own_box.size[coordinate] : other.size[coordinate], at_floor);
    Compute b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = tile[Layout::at(2 * t + i % 2, g + i / 2 * 8, o)];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      OperandA<Compute, true> sines, cosines;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Log2<Compute> ratio = shuffle(lane_ratio, g * 4 + 2 * c + row);
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

// Returns max(b, 1e-6), or NaN if b is NaN.
template <class Compute>
__device__ __forceinline__ Compute floored(Compute b) {
  return b <= static_cast<Compute>(kWeightFloor) ? static_cast<Compute>(kWeightFloor) : b;
}

}  // namespace relops
