// deform_conv2d on the CPU: the backward pass.
#ifndef RELOPS_DEFORM_CONV_BACKWARD
#define RELOPS_DEFORM_CONV_BACKWARD

#include "common/cpu/products.h"
#include "common/cpu/simd.h"
#include "deform_conv/cpu_args.h"
#include "deform_conv/cpu_samples.h"

namespace relops::RELOPS_ISA {

namespace {

// Sets or adds element (i, j) of a matrix to element (j, i) of another one.
template <bool kAdd, class Compute>
inline void transpose_matrix(const Compute* from, int64_t from_row, int64_t rows, int64_t columns, Compute* to,
                             int64_t to_row) {
  constexpr int64_t V = kLanes<Compute>;
  for (int64_t i = 0; i < rows; i += V)
    for (int64_t j = 0; j < columns; j += V) {
      const Compute* const source = from + i * from_row + j;
      Compute* const target = to + j * to_row + i;
      if (rows - i >= V && columns - j >= V) {
        Vec<Compute> block[V];
#pragma GCC unroll 16
        for (int64_t k = 0; k < V; ++k) block[k] = load(source + k * from_row);
        transpose<Compute>(block);
#pragma GCC unroll 16
        for (int64_t k = 0; k < V; ++k)
          store(target + k * to_row, kAdd ? load(target + k * to_row) + block[k] : block[k]);
      } else {
        for (int64_t x = 0; x < std::min(V, columns - j); ++x)
          for (int64_t y = 0; y < std::min(V, rows - i); ++y) {
            Compute& element = target[x * to_row + y];
            element = (kAdd ? element : 0) + source[y * from_row + x];
          }
      }
    }
}

// Computes what a part, a range of channels, contributes to the gradients of the tiles of a band. No other part adds to
// the same elements of the gradients of input and weight. The gradients of offset and mask are sums over parts, so they
// are written to `partials`, and add_partials() adds them in order.
//
// Samples and their gradients are matrices with one row per pixel and one column per (tap, channel). The channels of a
// tap are adjacent, so that all operations on samples process vectors of channels.
template <class T>
class DeformBackward {
 public:
  using Compute = ComputeType<T>;
  static constexpr int64_t V = kLanes<Compute>, L = kTileLine<Compute>;
  static constexpr int64_t kPanel = kPanelVectors * V;  // columns that a product keeps in registers
  static constexpr int kKinds = 3;                      // gradients per sample: those of y, x and mask

  // partials is [parts,band.count,taps.count,kKinds,L]. It is not used if neither offset nor mask needs a gradient.
  DeformBackward(const DeformConvArgs<T>& a, const Compute* weight, const DeformTiles& tiles,
                 const std::vector<DeformPart>& parts, TapRange taps, DeformBand band, Compute* partials)
      : a_(a),
        weight_(weight),
        tiles_(tiles),
        parts_(parts),
        taps_(taps),
        band_(band),
        partials_(partials),
        needs_grad_samples_(a.needs_positions() || a.grad_input.data != nullptr),
        add_samples_(add_samples_for(a.grad_input.data != nullptr, a.needs_positions(), a.grad_weight != nullptr)),
        samples_(a, V, scratch_),
        grad_lines_(scratch_.allocate<Compute>(a.group_outputs * L)),
        rows_(scratch_.allocate<Compute>(samples_.kMaxRowElements)) {
    const int64_t columns = part_channels(taps.count, V) * taps.count;
    if (a.grad_input.data != nullptr) grad_rows_ = scratch_.allocate<Compute>(samples_.kMaxRowElements);
    if (needs_grad_samples_) {
      row_ = scratch_.allocate<Compute>(columns);
      packed_weight_ = scratch_.allocate<Compute>(a.group_outputs * round_up(columns, kPanel));
      grad_samples_ = scratch_.allocate<Compute>(kTilePixels * columns);
    }
    if (a.grad_weight != nullptr) {
      matrix_ = scratch_.allocate<Compute>(kTilePixels * columns);
      grad_weight_ = scratch_.allocate<Compute>(a.group_outputs * columns);
    }
  }

  void operator()(int64_t item) {
    const DeformPart& part = parts_[item];
    width_ = round_up(part.channels, V);
    columns_ = taps_.count * width_;
    if (needs_grad_samples_) pack_weight(part);
    if (a_.grad_weight != nullptr) std::fill_n(grad_weight_, a_.group_outputs * columns_, Compute(0));
    for (int64_t i = 0; i < band_.count; ++i)
      add_tile(part, tiles_.at(band_.first + i), partials_ + (item * band_.count + i) * taps_.count * kKinds * L);
    if (a_.grad_weight != nullptr) add_weight(part);
  }

 private:
  // Returns the index in the weight of the first channel and tap of a part, for output channel o of its group.
  int64_t weight_at(const DeformPart& part, int64_t o) const {
    const int64_t channel = part.first - part.group * a_.group_inputs;
    return ((part.group * a_.group_outputs + o) * a_.group_inputs + channel) * a_.taps + taps_.first;
  }

  void pack_weight(const DeformPart& part) {
    std::fill_n(row_, columns_, Compute(0));  // for the padding of the channels
    for (int64_t o = 0; o < a_.group_outputs; ++o) {
      transpose_matrix<false>(weight_ + weight_at(part, o), a_.taps, part.channels, taps_.count, row_, width_);
      for (int64_t k = 0; k < columns_; k += V)
        store(packed_weight_ + (k / kPanel * a_.group_outputs + o) * kPanel + k % kPanel, load(row_ + k));
    }
  }

  void add_weight(const DeformPart& part) {
    for (int64_t o = 0; o < a_.group_outputs; ++o)
      transpose_matrix<true>(grad_weight_ + o * columns_, width_, taps_.count, part.channels,
                             a_.grad_weight + weight_at(part, o), a_.taps);
  }

  void add_tile(const DeformPart& part, const DeformTile& tile, Compute* partials) {
    load_tile(a_.grad_output, tile, part.group * a_.group_outputs, a_.group_outputs, grad_lines_);
    if (needs_grad_samples_)
      for (int64_t k = 0; k < columns_; k += kPanel)
        multiply<Compute>({{grad_lines_, 1, L}, packed_weight_ + k * a_.group_outputs, kPanel, a_.group_outputs},
                          tile.pixels(), std::min<int64_t>((columns_ - k) / V, kPanelVectors), grad_samples_ + k,
                          columns_);
    samples_.template describe<false>(tile, part.offset_group, taps_);
    for (int64_t c = 0; c < part.channels; c += samples_.max_channels) {
      const int64_t channels = std::min(samples_.max_channels, part.channels - c);
      if (samples_.has_box) begin_rows(0, part.first + c, channels);
      for (int64_t t = 0; t < taps_.count; ++t) {
        if (!samples_.has_box) begin_rows(t, part.first + c, channels);
        (this->*add_samples_)(tile.pixels(), t, c, round_up(channels, V), partials + t * kKinds * L);
        if (!samples_.has_box) end_rows(t, part.first + c, channels);
      }
      if (samples_.has_box) end_rows(0, part.first + c, channels);
    }
    if (a_.grad_weight != nullptr)
      multiply<Compute>({{grad_lines_, L, 1}, matrix_, columns_, tile.pixels()}, a_.group_outputs, columns_ / V,
                        grad_weight_, columns_, true);
  }

  void begin_rows(int64_t t, int64_t channel, int64_t channels) {
    if (a_.needs_positions() || a_.grad_weight != nullptr) samples_.load_rows(t, channel, channels, rows_);
    if (a_.grad_input.data != nullptr) std::fill_n(grad_rows_, samples_.row_count * samples_.max_channels, Compute(0));
  }

  void end_rows(int64_t t, int64_t channel, int64_t channels) {
    if (a_.grad_input.data != nullptr) samples_.add_rows(t, channel, channels, grad_rows_);
  }

  // Processes the samples of tap t for the pixels of a tile and channels [c, c + channels) of the part. `partials` are
  // those of the tap.
  template <bool kInput, bool kOffset, bool kWeight>
  void add_samples(int64_t pixels, int64_t t, int64_t c, int64_t channels, Compute* partials) {
    for (int64_t p = 0; p < pixels; p += V) {
      Vec<Compute> dots[4][V] = {};  // of the gradients of samples and their corners
      for (int64_t j = 0; j < std::min(V, pixels - p); ++j) {
        const int64_t at = (p + j) * columns_ + t * width_ + c;
        const Compute scale = samples_.mask[t * L + p + j];
        const Compute* corner[4];
        Compute* grad_corner[4];
        Compute weight[4];
        for (int k = 0; k < 4; ++k) {
          corner[k] = rows_ + samples_.corners(t)[k * L + p + j];
          if constexpr (kInput) grad_corner[k] = grad_rows_ + samples_.corners(t)[k * L + p + j];
          weight[k] = samples_.weights(t)[k * L + p + j] * scale;
        }
        for (int64_t d = 0; d < channels; d += V) {
          if constexpr (kInput || kOffset) {
            const Vec<Compute> grad = load(grad_samples_ + at + d);
            for (int k = 0; k < 4; ++k) {
              if constexpr (kOffset) dots[k][j] += grad * load(corner[k] + d);
              if constexpr (kInput) store(grad_corner[k] + d, load(grad_corner[k] + d) + weight[k] * grad);
            }
          }
          if constexpr (kWeight)
            store(matrix_ + at + d, weight[0] * load(corner[0] + d) + weight[1] * load(corner[1] + d) +
                                        weight[2] * load(corner[2] + d) + weight[3] * load(corner[3] + d));
        }
      }
      if constexpr (kOffset) add_partials(dots, t, p, c > 0, partials + p);
    }
  }

  void add_partials(Vec<Compute> (&dots)[4][V], int64_t t, int64_t p, bool add, Compute* partials) const {
    const int64_t i = t * L + p;
    Vec<Compute> dot[4];
    for (int k = 0; k < 4; ++k) dot[k] = transpose_sum<Compute>(dots[k]);
    const Vec<Compute> y = load(samples_.fraction_y + i), x = load(samples_.fraction_x + i);
    const Vec<Compute> scale = load(samples_.mask + i);
    Vec<Compute> grads[kKinds] = {scale * ((1 - x) * (dot[2] - dot[0]) + x * (dot[3] - dot[1])),
                                  scale * ((1 - y) * (dot[1] - dot[0]) + y * (dot[3] - dot[2])), Vec<Compute>{}};
    for (int k = 0; k < 4; ++k) grads[2] += load(samples_.weights(t) + k * L + p) * dot[k];
    for (int kind = 0; kind < kKinds; ++kind) {
      Compute* const to = partials + kind * L;
      store(to, add ? load(to) + grads[kind] : grads[kind]);
    }
  }

  using AddSamples = void (DeformBackward::*)(int64_t, int64_t, int64_t, int64_t, Compute*);

  template <bool... kNeeds>
  static AddSamples add_samples_for() {
    return &DeformBackward::add_samples<kNeeds...>;
  }
  template <bool... kNeeds, class... Needs>
  static AddSamples add_samples_for(bool needed, Needs... needs) {
    return needed ? add_samples_for<kNeeds..., true>(needs...) : add_samples_for<kNeeds..., false>(needs...);
  }

  const DeformConvArgs<T>& a_;
  const Compute* weight_;
  const DeformTiles& tiles_;
  const std::vector<DeformPart>& parts_;
  TapRange taps_;
  DeformBand band_;
  Compute* partials_;
  bool needs_grad_samples_;
  AddSamples add_samples_;
  Scratch scratch_;
  DeformSamples<T> samples_;
  int64_t width_ = 0, columns_ = 0;  // columns per tap, and of a matrix
  Compute* grad_lines_;              // [group_outputs,L]: the gradient of the output
  Compute *rows_, *grad_rows_ = nullptr;
  Compute *row_ = nullptr, *packed_weight_ = nullptr;    // [columns_] and [panels,group_outputs,kPanel]
  Compute* grad_weight_ = nullptr;                       // [group_outputs,columns_]
  Compute *grad_samples_ = nullptr, *matrix_ = nullptr;  // [kTilePixels,columns_]
};

// Adds the partial gradients of a band to the gradients of offset and mask.
template <class T, class Compute = ComputeType<T>>
void add_deform_partials(const DeformConvArgs<T>& a, const DeformTiles& tiles, const std::vector<DeformPart>& parts,
                         TapRange taps, DeformBand band, const Compute* partials, int64_t threads) {
  constexpr int kKinds = DeformBackward<T>::kKinds;
  constexpr int64_t L = kTileLine<Compute>, V = kLanes<Compute>;
  for_each_range(band.count * taps.count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const DeformTile tile = tiles.at(band.first + i / taps.count);
      for (size_t part = 0; part < parts.size();) {
        const int64_t group = parts[part].offset_group, first = part;
        while (part < parts.size() && parts[part].offset_group == group) ++part;
        const int64_t channel = group * a.taps + taps.first + i % taps.count;
        for (int kind = 0; kind < kKinds; ++kind) {
          const Map<Compute>& grad = kind < 2 ? a.grad_offset : a.grad_mask;
          if (grad.data == nullptr) continue;
          alignas(RELOPS_VECTOR_BYTES) Compute sums[L];
          for (int64_t p = 0; p < tile.pixels(); p += V) {
            Vec<Compute> sum = {};
            for (size_t k = first; k < part; ++k)
              sum += load(partials + ((k * band.count * taps.count + i) * kKinds + kind) * L + p);
            store(sums + p, sum);
          }
          for_row_parts(tile, 1, [&](int64_t p, int64_t y, int64_t x, int64_t) {
            *grad.at(tile.n, kind < 2 ? 2 * channel + kind : channel, y, x) += sums[p];
          });
        }
      }
    }
  });
}

}  // namespace

}  // namespace relops::RELOPS_ISA

#endif
