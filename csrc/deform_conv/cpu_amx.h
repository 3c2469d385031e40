// deform_conv2d on the CPU: the products of the forward pass in bfloat16 with AMX, the matrix instructions of Intel
// processors. This file is empty except when cpu_kernel.h is compiled for AVX-512.
#ifndef RELOPS_DEFORM_CONV_AMX
#define RELOPS_DEFORM_CONV_AMX

#include "common/cpu/simd.h"
#include "deform_conv/cpu_args.h"
#include "deform_conv/cpu_samples.h"

#if RELOPS_HAS_AMX && RELOPS_VECTOR_BYTES == 64

namespace relops::RELOPS_ISA {

namespace {

#define RELOPS_AMX_FUNCTION __attribute__((noinline, target("amx-tile,amx-bf16")))

// Makes the compiler write all variables to memory and read them again. GCC's intrinsics for AMX do not say which
// memory they read or write.
inline void synchronize_memory() { asm volatile("" ::: "memory"); }

// Configures the tile registers of a thread as 16 rows of 64 bytes. The destructor restores the previous configuration,
// in case that another library still uses it.
class TileRegisters {
 public:
  RELOPS_AMX_FUNCTION TileRegisters() {
    _tile_storeconfig(&previous_);
    Configuration own{};
    own.palette = 1;
    std::fill_n(own.row_bytes, 8, 64);
    std::fill_n(own.rows, 8, 16);
    synchronize_memory();
    _tile_loadconfig(&own);
  }
  RELOPS_AMX_FUNCTION ~TileRegisters() {
    if (previous_.palette == 0)
      _tile_release();
    else
      _tile_loadconfig(&previous_);
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);

  Configuration previous_;
};

// Copies row o of the weight [Co,group_inputs,taps] to [Co / 16,group_inputs / 32,taps,16,32], so that tiles are
// contiguous.
inline void pack_amx_weight(const DeformConvArgs<BFloat16>& a, int64_t o, BFloat16* packed) {
  const int64_t row = a.group_inputs * a.taps;
  const BFloat16* const from = a.weight + o * row;
  BFloat16* to = packed + o / 16 * 16 * row + o % 16 * 32;
  for (int64_t c = 0; c < a.group_inputs; c += 32)
    for (int64_t t = 0; t < a.taps; ++t, to += 16 * 32)
      for (int64_t i = 0; i < 32; ++i) to[i] = from[(c + i) * a.taps + t];
}

// The samples of some channels and taps, multiplied with AMX. A sample is stored as the sum of two bfloat16 numbers,
// each of which is multiplied by the weight. It is therefore almost as accurate as a sample in float32, which the other
// instruction sets use.
class AmxProduct {
 public:
  using Weight = BFloat16;  // see pack_amx_weight
  static constexpr int64_t V = 16, L = kTileLine<float>;
  static constexpr int64_t kChannelStep = 32;

  AmxProduct(const DeformConvArgs<BFloat16>& a, const Weight* weight, int64_t depth, Scratch& scratch)
      : a_(a),
        weight_(weight),
        depth_(depth),
        matrix_(scratch.allocate<FloatBits>(2 * depth / 32 * kTileRows * (kTilePixels / 16))) {}

  // Returns whether the channels of all groups consist of whole tiles.
  static bool supports(const DeformConvSizes& z) {
    return z.C > 0 && z.group_inputs % 32 == 0 && z.offset_channels % 32 == 0 && z.group_outputs % 16 == 0;
  }

  // Sets the samples of pixels [p, p + 16), channels [c, c + 16) and tap t of `taps`. Vector j has those of channel
  // c + j.
  void set(const Vec<float> (&samples)[V], int64_t p, int64_t c, int64_t, int64_t t, int64_t taps) {
    FloatBits* out = block(p, c / 32 * taps + t) + c % 32 / 2;
#pragma GCC unroll 8
    for (int64_t j = 0; j < V; j += 2) {
      const Parts even(samples[j]), odd(samples[j + 1]);
      out[j / 2] = (even.high >> 16) | odd.high;
      out[j / 2 + kTileRows] = (even.low >> 16) | (odd.low & kUpper);
    }
  }

  // Sets the sums [group_outputs,L] to the product of the samples and the weights, or adds it to them. All weights are
  // read once per 32 pixels from L2, and the samples of these pixels are in L1.
  void multiply(TapRange taps, const GroupChannels& channels, int64_t pixels, float* sums, bool add) const {
    const int64_t row = a_.group_inputs * a_.taps;
    const BFloat16* const weight =
        weight_ + channels.group * a_.group_outputs * row + (channels.first / 32 * a_.taps + taps.first) * kTileWeights;
    for (int64_t p = 0; p < pixels; p += 32)
      for (int64_t o = 0; o < a_.group_outputs; o += 32) {
        const bool rows = a_.group_outputs - o > 16, columns = pixels - p > 16;  // whether there are two of them
        const auto tiles = rows ? (columns ? &AmxProduct::multiply_tiles<2, 2> : &AmxProduct::multiply_tiles<2, 1>)
                                : (columns ? &AmxProduct::multiply_tiles<1, 2> : &AmxProduct::multiply_tiles<1, 1>);
        (this->*tiles)(taps.count, channels.count / 32, weight + o * row, block(p, channels.sampled / 32 * taps.count),
                       sums + o * L + p, add);
      }
  }

 private:
  static constexpr int64_t kTileWeights = 16 * 32;  // output channels x input channels
  static constexpr int64_t kTileRows = 16;          // a row of samples is a vector of 16 pairs
  static constexpr uint32_t kUpper = 0xffff0000;

  // A number as the sum of two numbers, whose upper 16 bits are bfloat16 numbers. `high` is truncated and not rounded,
  // because rounding could turn a finite number into infinity. For an infinite number, `low` is 0. For NaN, it is NaN.
  struct Parts {
    FloatBits high, low;
    explicit Parts(Vec<float> x) : high((FloatBits)x & kUpper) {
      const Vec<float> upper = (Vec<float>)high;
      low = (FloatBits)(x == upper ? Vec<float>{} : x - upper) + 0x8000;
    }
  };

  // Returns tile i of the samples of pixels [p, p + 16): their upper parts, which are followed by the lower ones.
  FloatBits* block(int64_t p, int64_t i) const { return matrix_ + (p / 16 * depth_ / 32 + i) * 2 * kTileRows; }

  // Multiplies the weights of kRows x 16 output channels by the samples of kColumns x 16 pixels and `blocks` blocks of
  // 32 channels.
  template <int kRows, int kColumns>
  RELOPS_AMX_FUNCTION void multiply_tiles(int64_t taps, int64_t blocks, const BFloat16* weight,
                                          const FloatBits* samples, float* sums, bool add) const {
    constexpr int64_t kSumsRow = L * sizeof(float);
    const int64_t next_rows = 16 * a_.group_inputs * a_.taps;
    const int64_t column = depth_ / 32 * 2 * kTileRows;
    synchronize_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
      _tile_loadd(0, sums, kSumsRow);
      if constexpr (kColumns == 2) _tile_loadd(1, sums + 16, kSumsRow);
      if constexpr (kRows == 2) _tile_loadd(2, sums + 16 * L, kSumsRow);
      if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, sums + 16 * L + 16, kSumsRow);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const BFloat16* w = weight + b * a_.taps * kTileWeights;
      for (int64_t t = 0; t < taps; ++t, w += kTileWeights, samples += 2 * kTileRows) {
        _tile_loadd(4, w, 64);
        if constexpr (kRows == 2) _tile_loadd(5, w + next_rows, 64);
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
          const FloatBits* const s = samples + part * kTileRows;
          _tile_loadd(6, s, 64);
          _tile_dpbf16ps(0, 4, 6);
          if constexpr (kRows == 2) _tile_dpbf16ps(2, 5, 6);
          if constexpr (kColumns == 2) {
            _tile_loadd(7, s + column, 64);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (kRows == 2) _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
    }
    _tile_stored(0, sums, kSumsRow);
    if constexpr (kColumns == 2) _tile_stored(1, sums + 16, kSumsRow);
    if constexpr (kRows == 2) _tile_stored(2, sums + 16 * L, kSumsRow);
    if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, sums + 16 * L + 16, kSumsRow);
    synchronize_memory();
  }

  const DeformConvArgs<BFloat16>& a_;
  const Weight* weight_;
  int64_t depth_;      // channels x taps
  FloatBits* matrix_;  // [pixels / 16,depth_ / 32,2,16] vectors
  TileRegisters registers_;
};

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif

#endif
