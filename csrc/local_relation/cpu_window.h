// local_relation on the CPU: the softmax over windows, which the forward and backward passes have in common.
#ifndef RELOPS_LOCAL_RELATION_WINDOW
#define RELOPS_LOCAL_RELATION_WINDOW

#include "common/cpu/simd.h"
#include "local_relation/cpu_args.h"
#include "local_relation/cpu_lines.h"

namespace relops::RELOPS_ISA {

// The memory of a thread and the steps that the forward and backward passes have in common: unpacking the rows that
// windows read, finding the taps of a row of outputs, and computing the weights of a vector of outputs.
template <Similarity kSimilarity, class T>
class LocalRelationWorker {
 public:
  using Compute = ComputeType<T>;
  static constexpr int64_t V = kLanes<Compute>;
  static constexpr int kBatch = 4;  // number of taps whose exponentials are computed at the same time
  using Item = LocalRelationItems::Item;

  LocalRelationWorker(const LocalRelationArgs<T>& a, const WindowRows& rows, const WindowColumns& columns)
      : a_(a), rows_(rows), columns_(columns), taps_(a.k * a.k), ring_(rows.max_inputs()) {
    key_ring_ = zeros(ring_ * columns.line);
    value_ring_ = zeros(ring_ * a.m * columns.line);
    zero_line_ = zeros(columns.width);
    inside_ = scratch_.allocate<Compute>(columns.line);
    std::fill_n(inside_, columns.line, -std::numeric_limits<Compute>::infinity());
    for (size_t part = 0; part < columns.parts.size(); ++part)
      std::fill_n(inside_ + part * columns.part_size + columns.left, columns.parts[part].columns, Compute(0));
    weights_ = scratch_.allocate<Compute>(round_up<int64_t>(taps_, kBatch) * V);
    tap_ = scratch_.allocate<int32_t>(taps_);
    key_at_ = scratch_.allocate<const Compute*>(taps_);
    value_at_ = scratch_.allocate<const Compute*>(taps_);
    inside_at_ = scratch_.allocate<const Compute*>(taps_);
    prior_at_ = scratch_.allocate<Compute>(taps_);
  }

  Compute* zeros(int64_t count) {
    Compute* const p = scratch_.allocate<Compute>(count);
    std::fill_n(p, count, Compute(0));
    return p;
  }

  // Starts a new group or strip.
  void start(int64_t n, int64_t g) {
    n_ = n;
    g_ = g;
    first_channel_ = a_.first_channel(g);
    channels_ = a_.first_channel(g + 1) - first_channel_;
    loaded_ = 0;
  }

  void unpack_inputs(int64_t ho) {
    for (int64_t y = std::max(loaded_, rows_.begin(ho)); y < rows_.end(ho); ++y) {
      const int64_t slot = y % ring_;
      unpack_row(a_.key, g_, y, 1, key_ring_ + slot * columns_.line);
      unpack_row(a_.value, first_channel_, y, channels_, value_ring_ + slot * a_.m * columns_.line);
    }
    loaded_ = std::max(loaded_, rows_.end(ho));
  }

  // Finds the taps of a row of outputs: first the taps that are on the map for at least one output, then, if
  // zero_border is set, the other taps.
  void find_taps(int64_t ho) {
    const int64_t k = a_.k, line = columns_.line;
    const Compute* const prior = a_.prior == nullptr ? nullptr : a_.prior + g_ * taps_;
    int64_t count = 0;
    const auto add = [&](int64_t tap, const Compute* key) {
      tap_[count] = static_cast<int32_t>(tap);
      key_at_[count] = key;
      prior_at_[count++] = prior == nullptr ? Compute(0) : prior[tap];
    };
    const auto on_map = [&](int64_t i) { return rows_.tap(ho, i) >= 0 && rows_.tap(ho, i) < a_.H; };
    for (int64_t i = 0; i < k; ++i) {
      if (!on_map(i)) continue;
      const int64_t slot = rows_.tap(ho, i) % ring_;
      const Compute* const keys = key_ring_ + slot * line;
      const Compute* const values = value_ring_ + slot * a_.m * line;
      for (int64_t j = 0; j < k; ++j) {
        const WindowColumns::Tap& tap = columns_.taps[j];
        if (tap.phase < 0) continue;
        const int64_t at = columns_.input_at(tap);
        value_at_[count] = values + at;
        inside_at_[count] = inside_ + at;
        add(i * k + j, keys + at);
      }
    }
    map_taps_ = count;
    if (a_.zero_border)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
          if (!on_map(i) || columns_.taps[j].phase < 0) add(i * k + j, zero_line_);
    count_ = count;
  }

  // Computes weights_ for outputs [w, w + V), whose queries are q. The weights are not yet divided by their sum, which
  // this function returns.
  Vec<Compute> weigh(int64_t w, Vec<Compute> q) {
    // These members are copied to local variables, because the compiler cannot tell that the stores below do not change
    // them.
    const int64_t count = count_;
    const Compute* const* const key_at = key_at_;
    const Compute* const* const inside_at = inside_at_;
    const Compute* const prior_at = prior_at_;
    Compute* const weights = weights_;
    const Vec<Compute> minus_infinity = broadcast(-std::numeric_limits<Compute>::infinity());
    Vec<Compute> max_logit = minus_infinity;
    const auto logit = [&](int64_t i) __attribute__((always_inline)) {
      return similarity<kSimilarity, Vec<Compute>>(q, load(key_at[i] + w)) + prior_at[i];
    };
    const auto store_logit = [&](int64_t i, Vec<Compute> x) __attribute__((always_inline)) {
      store(weights + i * V, x);
      max_logit = maximum(x, max_logit);
    };
    if (a_.zero_border || columns_.inside_map[w / V])
      for (int64_t i = 0; i < count; ++i) store_logit(i, logit(i));
    else
      for (int64_t i = 0; i < count; ++i) store_logit(i, logit(i) + load(inside_at[i] + w));
    for (int64_t i = count; i % kBatch != 0; ++i) store(weights + i * V, minus_infinity);
    Batch<Compute, kBatch> total = {};
    for (int64_t i = 0; i < count; i += kBatch) {
      Compute* const p = weights + i * V;
      const auto e = exponential_of_softmax(
          batch<Compute, kBatch>([&](int j) __attribute__((always_inline)) { return load(p + j * V) - max_logit; }));
#pragma GCC unroll 4
      for (int j = 0; j < kBatch; ++j) store(p + j * V, e.v[j]);
      total = total + e;
    }
    return (total.v[0] + total.v[1]) + (total.v[2] + total.v[3]);
  }

  // Unpacks a row of the map, split by phase, and writes it to to[c * line + part * part_size + left ...].
  void unpack_row(const Map<const T>& map, int64_t c, int64_t y, int64_t channels, Compute* to) const {
    for (const WindowColumns::Part& part : columns_.parts) {
      unpack_line(map.at(n_, c, y, part.phase), map.c_stride, map.w_stride * a_.stride, channels, part.columns,
                  to + columns_.left, columns_.line);
      to += columns_.part_size;
    }
  }

 protected:
  const LocalRelationArgs<T>& a_;
  const WindowRows& rows_;
  const WindowColumns& columns_;
  const int64_t taps_, ring_;
  Scratch scratch_;
  Compute *key_ring_, *value_ring_;  // [ring,line], [ring,m,line]: row y is in slot y % ring
  Compute *zero_line_, *inside_;     // inside_: 0 on the map, -inf elsewhere

  int64_t n_, g_, first_channel_, channels_, loaded_;

  int64_t count_, map_taps_;  // number of taps of the row, and how many are on the map for some output
  int32_t* tap_;
  const Compute **key_at_, **value_at_, **inside_at_;  // positions for output 0
  Compute *prior_at_, *weights_;                       // weights_: [count,V]
};

}  // namespace relops::RELOPS_ISA

#endif
