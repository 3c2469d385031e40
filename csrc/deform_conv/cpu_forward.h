// deform_conv2d on the CPU: the forward pass.
#ifndef RELOPS_DEFORM_CONV_FORWARD
#define RELOPS_DEFORM_CONV_FORWARD

#include "common/cpu/products.h"
#include "common/cpu/simd.h"
#include "deform_conv/cpu_args.h"
#include "deform_conv/cpu_samples.h"

namespace relops::RELOPS_ISA {

namespace {

// The samples of some channels and taps, multiplied with vector instructions. Row (c, t) of the matrix holds the
// samples of channel c with tap t.
template <class T>
class VectorProduct {
 public:
  using Compute = ComputeType<T>;
  using Weight = Compute;  // [Co,group_inputs,taps]
  static constexpr int64_t V = kLanes<Compute>, L = kTileLine<Compute>;
  static constexpr int64_t kChannelStep = V;            // channels that are processed together are a multiple of this
  static constexpr int64_t kPanel = kPanelVectors * V;  // columns that a product keeps in registers

  VectorProduct(const DeformConvArgs<T>& a, const Weight* weight, int64_t depth, Scratch& scratch)
      : a_(a),
        weight_(weight),
        depth_(depth),
        matrix_(scratch.allocate<Compute>(depth * round_up(kTilePixels, kPanel))) {}

  // Sets the samples of pixels [p, p + V), channels [c, c + count) and tap t of `taps`. Vector j has those of channel
  // c + j.
  void set(const Vec<Compute> (&samples)[V], int64_t p, int64_t c, int64_t count, int64_t t, int64_t taps) {
    Compute* const out = matrix_ + p / kPanel * depth_ * kPanel + p % kPanel + (c * taps + t) * kPanel;
    if (count >= V) {
#pragma GCC unroll 16
      for (int64_t j = 0; j < V; ++j) store(out + j * taps * kPanel, samples[j]);
    } else {
      for (int64_t j = 0; j < count; ++j) store(out + j * taps * kPanel, samples[j]);
    }
  }

  // Sets the sums [group_outputs,L] to the product of the samples and the weights, or adds it to them.
  void multiply(TapRange taps, const GroupChannels& channels, int64_t pixels, Compute* sums, bool add) const {
    const Compute* const matrix = matrix_ + channels.sampled * taps.count * kPanel;
    if (taps.count == a_.taps) {
      multiply_rows(channels.group, channels.first, 0, channels.count * taps.count, matrix, pixels, sums, add);
    } else {
      for (int64_t i = 0; i < channels.count; ++i)
        multiply_rows(channels.group, channels.first + i, taps.first, taps.count, matrix + i * taps.count * kPanel,
                      pixels, sums, add || i > 0);
    }
  }

 private:
  // Multiplies `depth` rows of the matrix by the weights of a group, beginning with the weight of a channel and a tap.
  void multiply_rows(int64_t group, int64_t channel, int64_t tap, int64_t depth, const Compute* matrix, int64_t pixels,
                     Compute* sums, bool add) const {
    const int64_t row = a_.group_inputs * a_.taps;
    const Compute* const weight = weight_ + group * a_.group_outputs * row + channel * a_.taps + tap;
    for (int64_t p = 0; p < pixels; p += kPanel, matrix += depth_ * kPanel)
      relops::RELOPS_ISA::multiply<Compute>({{weight, row, 1}, matrix, kPanel, depth}, a_.group_outputs,
                                            std::min<int64_t>((pixels - p) / V, kPanelVectors), sums + p, L, add);
  }

  const DeformConvArgs<T>& a_;
  const Weight* weight_;
  int64_t depth_;    // rows of the matrix
  Compute* matrix_;  // [panels,depth_,kPanel]
};

// Computes all output channels of a tile. The samples of some channels and taps form a matrix, by which the weights are
// multiplied. The order of this sum within a range of taps does not depend on the tile.
template <class T, class Product>
class DeformForward {
 public:
  using Compute = ComputeType<T>;
  static constexpr int64_t V = kLanes<Compute>, L = kTileLine<Compute>;

  DeformForward(const DeformConvArgs<T>& a, const typename Product::Weight* weight, const DeformTiles& tiles)
      : a_(a),
        tiles_(tiles),
        ranges_(tap_ranges(a.taps)),
        samples_(a, Product::kChannelStep, scratch_),
        product_(a, weight, max_depth(ranges_, Product::kChannelStep), scratch_),
        rows_(scratch_.allocate<Compute>(samples_.kMaxRowElements)),
        sums_(scratch_.allocate<Compute>(a.Co * L)) {}

  void operator()(int64_t item) {
    const DeformTile tile = tiles_.at(item);
    if (a_.C == 0) std::fill_n(sums_, a_.Co * L, Compute(0));  // otherwise, the first products set the sums
    for (int64_t group = 0; group < a_.G; ++group)
      for (const TapRange& taps : ranges_) {
        samples_.template describe<true>(tile, group, taps);
        const int64_t end = (group + 1) * a_.offset_channels;
        for (int64_t c = group * a_.offset_channels; c < end; c += samples_.max_channels)
          add_channels(taps, c, std::min(samples_.max_channels, end - c));
      }
    if (a_.bias != nullptr)
      for (int64_t c = 0; c < a_.Co; ++c)
        for (int64_t p = 0; p < tile.pixels(); p += V)
          store(sums_ + c * L + p, load(sums_ + c * L + p) + broadcast(static_cast<Compute>(a_.bias[c])));
    store_tile(a_.output, tile, a_.Co, sums_);
  }

 private:
  // Adds what channels [first, first + channels) contribute.
  void add_channels(TapRange taps, int64_t first, int64_t channels) {
    if (samples_.has_box) samples_.load_rows(0, first, channels, rows_);
    for (int64_t t = 0; t < taps.count; ++t) {
      if (!samples_.has_box) samples_.load_rows(t, first, channels, rows_);
      sample(t, taps.count, channels);
    }
    // The first product of a group sets the sums, and the others are added.
    for (int64_t c = first; c < first + channels;) {
      const int64_t group = c / a_.group_inputs, begin = group * a_.group_inputs;
      const int64_t end = std::min(first + channels, begin + a_.group_inputs);
      product_.multiply(taps, {group, c - begin, end - c, c - first}, samples_.padded,
                        sums_ + group * a_.group_outputs * L, taps.first > 0 || c > begin);
      c = end;
    }
  }

  // Computes the samples of V pixels, each with `width` channels. This is a function of its own, because the compiler
  // would otherwise keep some of its pointers on the stack.
  __attribute__((noinline)) static void sample_pixels(const Compute* rows, const Int<Compute>* corners,
                                                      const Compute* weights, int64_t width, Compute* out) {
    for (int64_t j = 0; j < V; ++j, out += kMaxChannels) {
      const Compute *const a = rows + corners[j], *const b = rows + corners[L + j];
      const Compute *const c = rows + corners[2 * L + j], *const d = rows + corners[3 * L + j];
      const Vec<Compute> weight_a = broadcast(weights[j]), weight_b = broadcast(weights[L + j]);
      const Vec<Compute> weight_c = broadcast(weights[2 * L + j]), weight_d = broadcast(weights[3 * L + j]);
#pragma GCC unroll 2
      for (int64_t k = 0; k < width; k += V)
        store(out + k,
              weight_a * load(a + k) + weight_b * load(b + k) + weight_c * load(c + k) + weight_d * load(d + k));
    }
  }

  // Computes the samples of tap t.
  void sample(int64_t t, int64_t taps, int64_t channels) {
    for (int64_t p = 0; p < samples_.padded; p += V) {
      sample_pixels(rows_, samples_.corners(t) + p, samples_.weights(t) + p, round_up(channels, V), pixels_);
      for (int64_t c = 0; c < channels; c += V) {
        Vec<Compute> block[V];
#pragma GCC unroll 16
        for (int64_t j = 0; j < V; ++j) block[j] = load(pixels_ + j * kMaxChannels + c);
        transpose<Compute>(block);
        product_.set(block, p, c, channels - c, t, taps);
      }
    }
  }

  const DeformConvArgs<T>& a_;
  const DeformTiles& tiles_;
  std::vector<TapRange> ranges_;
  Scratch scratch_;
  DeformSamples<T> samples_;
  Product product_;
  Compute* rows_;
  Compute* sums_;  // [Co,L]
  alignas(64) Compute pixels_[V * kMaxChannels];
};

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
