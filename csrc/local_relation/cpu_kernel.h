// local_relation on the CPU, for one instruction set. See foreach_isa.h.
//
// Lanes are neighboring outputs of a row. Rows of the map are unpacked into lines, in the compute type and with zeros
// on both sides (WindowColumns); a ring of lines holds what the windows of a row of outputs reach, so that each row is
// unpacked once per group and then stays in the L1 or L2 cache.
//
// Forward: per vector of outputs, the logits of all taps go into a small buffer, there they become weights, and these
// multiply the values of up to eight channels whose sums stay in registers. Per tap and vector of 8 channels there are
// about 13 operations for the exponential, 6 for the logit and 8 multiply-adds, each of which loads.
//
// Backward: the same per row of outputs, whose weights and gradients of logits go into rings of their own. As soon as
// the last output that reads a row of inputs is done, the gradients of its keys and values are sums over taps from
// these rings. Of large windows that would be too much to keep: then the weights of one row of outputs are kept, and
// added to the sums of all rows of inputs that it reads.

#include "common/cpu/simd.h"

namespace relops::RELOPS_ISA {

// Calls f(first, count) for vectors' worth of numbers: count is a constant, of 8, or of 4, 2 and 1 for what is left.
template <class F>
RELOPS_HOST_DEVICE_INLINE void for_each_eight(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) f(i, std::integral_constant<int, 8>{});
  if (n - i >= 4) f(i, std::integral_constant<int, 4>{}), i += 4;
  if (n - i >= 2) f(i, std::integral_constant<int, 2>{}), i += 2;
  if (n - i >= 1) f(i, std::integral_constant<int, 1>{});
}

// Vector r of the result is the sum over i of weight(i) * the vector at place(i) + r * line. Few sums are each kept in
// several parts, as a chain of additions waits for itself.
template <class C, int R, class Weight, class Place>
RELOPS_HOST_DEVICE_INLINE Batch<C, R> weighted_sums(int64_t count, int64_t line, Weight weight, Place place) {
  constexpr int U = 8 / R;
  Batch<C, R> parts[U] = {};
  const auto add = [&](Batch<C, R>& to, int64_t i) __attribute__((always_inline)) {
    const Vec<C> w = weight(i);
    const C* const p = place(i);
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

// The sum of f(i), likewise in several parts.
template <class C, class F>
RELOPS_HOST_DEVICE_INLINE Vec<C> sum_over(int64_t count, F f) {
  constexpr int U = 4;
  Batch<C, U> parts = {};
  int64_t i = 0;
  for (; i + U <= count; i += U)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) parts.v[u] += f(i + u);
  for (; i < count; ++i) parts.v[0] += f(i);
  return (parts.v[0] + parts.v[1]) + (parts.v[2] + parts.v[3]);
}

// dst[0..n) = src[0..n), converted. A row may be shorter than a vector.
template <class To, class From>
inline void convert_row(const From* src, To* dst, int64_t n) {
  if constexpr (std::is_same_v<To, From>)
    __builtin_memcpy(dst, src, n * sizeof(To));
  else
    convert(src, dst, n);
}

// to[c * line + j] = row[c * c_stride + j * w_stride], converted.
template <class T, class C>
inline void unpack_line(const T* row, int64_t c_stride, int64_t w_stride, int64_t channels, int64_t count, C* to,
                        int64_t line) {
  constexpr int64_t V = kLanes<C>;
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
        Vec<C> v[V] = {};
        for (int64_t i = 0; i < columns; ++i) v[i] = load_first(row + c + (j + i) * w_stride, lanes);
        transpose<C>(v);
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
    for (int64_t j = 0; j < count; ++j) to[c * line + j] = static_cast<C>(row[c * c_stride + j * w_stride]);
}

// row[c * c_stride + j * w_stride] = from[c * line + j], converted. Lines are readable up to whole vectors.
template <class T, class C>
inline void pack_line(const C* from, int64_t line, int64_t channels, int64_t count, T* row, int64_t c_stride,
                      int64_t w_stride) {
  constexpr int64_t V = kLanes<C>;
  if (w_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) convert_row(from + c * line, row + c * c_stride, count);
    return;
  }
  int64_t c = 0;
  if (c_stride == 1) {
    for (; channels - c > V / 2; c += V) {
      const int64_t lanes = std::min(channels - c, V);
      for (int64_t j = 0; j < count; j += V) {
        Vec<C> v[V] = {};
        for (int64_t i = 0; i < lanes; ++i) v[i] = load(from + (c + i) * line + j);
        transpose<C>(v);
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

// What both directions do: the rows that windows reach, the taps of a row of outputs, the weights of a vector of them.
template <Similarity kSimilarity, class T>
class LocalRelationWorker {
 public:
  using C = ComputeType<T>;
  static constexpr int64_t V = kLanes<C>;
  static constexpr int kBatch = 4;  // taps whose exponentials are computed side by side
  using Item = LocalRelationItems::Item;

  LocalRelationWorker(const LocalRelationArgs<T>& a, const WindowRows& rows, const WindowColumns& columns)
      : a_(a), rows_(rows), columns_(columns), taps_(a.k * a.k), ring_(rows.most_inputs()) {
    key_ring_ = zeros(ring_ * columns.line);
    value_ring_ = zeros(ring_ * a.m * columns.line);
    zero_line_ = zeros(columns.width);
    inside_ = scratch_.take<C>(columns.line);
    std::fill_n(inside_, columns.line, -std::numeric_limits<C>::infinity());
    for (size_t part = 0; part < columns.parts.size(); ++part)
      std::fill_n(inside_ + part * columns.part_size + columns.left, columns.parts[part].columns, C(0));
    weights_ = scratch_.take<C>(round_up<int64_t>(taps_, kBatch) * V);
    tap_ = scratch_.take<int32_t>(taps_);
    key_at_ = scratch_.take<const C*>(taps_);
    value_at_ = scratch_.take<const C*>(taps_);
    inside_at_ = scratch_.take<const C*>(taps_);
    prior_at_ = scratch_.take<C>(taps_);
  }

  C* zeros(int64_t count) {
    C* const p = scratch_.take<C>(count);
    std::fill_n(p, count, C(0));
    return p;
  }

  // Begins with another group or strip.
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

  // The taps of a row of outputs: first those that some output has on the map, then, where they count, the others.
  void find_taps(int64_t ho) {
    const int64_t k = a_.k, line = columns_.line;
    const C* const prior = a_.prior == nullptr ? nullptr : a_.prior + g_ * taps_;
    int64_t count = 0;
    const auto add = [&](int64_t tap, const C* key) {
      tap_[count] = static_cast<int32_t>(tap);
      key_at_[count] = key;
      prior_at_[count++] = prior == nullptr ? C(0) : prior[tap];
    };
    const auto on_map = [&](int64_t i) { return rows_.tap(ho, i) >= 0 && rows_.tap(ho, i) < a_.H; };
    for (int64_t i = 0; i < k; ++i) {
      if (!on_map(i)) continue;
      const int64_t slot = rows_.tap(ho, i) % ring_;
      const C* const keys = key_ring_ + slot * line;
      const C* const values = value_ring_ + slot * a_.m * line;
      for (int64_t j = 0; j < k; ++j) {
        const WindowColumns::Tap& tap = columns_.taps[j];
        if (tap.phase < 0) continue;
        const int64_t at = columns_.input_at(tap);
        value_at_[count] = values + at;
        inside_at_[count] = inside_ + at;
        add(i * k + j, keys + at);
      }
    }
    reaching_ = count;
    if (a_.zero_border)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
          if (!on_map(i) || columns_.taps[j].phase < 0) add(i * k + j, zero_line_);
    count_ = count;
  }

  // Fills weights_ for the outputs [w, w + V) with queries q, not yet divided by their sum, which it returns.
  Vec<C> weigh(int64_t w, Vec<C> q) {
    // In locals: the compiler cannot tell that what is stored below is none of them.
    const int64_t count = count_;
    const C* const* const key_at = key_at_;
    const C* const* const inside_at = inside_at_;
    const C* const prior_at = prior_at_;
    C* const weights = weights_;
    const Vec<C> none = broadcast(-std::numeric_limits<C>::infinity());
    Vec<C> most = none;
    const auto logit = [&](int64_t i) __attribute__((always_inline)) {
      return similarity<kSimilarity, Vec<C>>(q, load(key_at[i] + w)) + prior_at[i];
    };
    const auto keep = [&](int64_t i, Vec<C> x) __attribute__((always_inline)) {
      store(weights + i * V, x);
      most = maximum(x, most);
    };
    if (a_.zero_border || columns_.inside_map[w / V])
      for (int64_t i = 0; i < count; ++i) keep(i, logit(i));
    else
      for (int64_t i = 0; i < count; ++i) keep(i, logit(i) + load(inside_at[i] + w));
    for (int64_t i = count; i % kBatch != 0; ++i) store(weights + i * V, none);
    Batch<C, kBatch> total = {};
    for (int64_t i = 0; i < count; i += kBatch) {
      C* const p = weights + i * V;
      const auto e = exponential_of_softmax(
          batch<C, kBatch>([&](int j) __attribute__((always_inline)) { return load(p + j * V) - most; }));
#pragma GCC unroll 4
      for (int j = 0; j < kBatch; ++j) store(p + j * V, e.v[j]);
      total = total + e;
    }
    return (total.v[0] + total.v[1]) + (total.v[2] + total.v[3]);
  }

  // to[c * line + part * part_size + left ...]: a row of the map, by phases.
  void unpack_row(const Map<const T>& map, int64_t c, int64_t y, int64_t channels, C* to) const {
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
  C *key_ring_, *value_ring_;  // [ring,line], [ring,m,line]: row y is in slot y % ring
  C *zero_line_, *inside_;     // inside_: 0 on the map, else -inf

  int64_t n_, g_, first_channel_, channels_, loaded_;

  int64_t count_, reaching_;  // taps of the row of outputs, and those of them that some output has on the map
  int32_t* tap_;
  const C **key_at_, **value_at_, **inside_at_;  // of output 0
  C *prior_at_, *weights_;                       // weights_: [count,V]
};

template <Similarity kSimilarity, class T>
class LocalRelationForward : LocalRelationWorker<kSimilarity, T> {
  using Base = LocalRelationWorker<kSimilarity, T>;
  using Base::V, Base::a_, Base::columns_, Base::value_at_, Base::weights_, Base::n_, Base::first_channel_,
      Base::channels_;
  using typename Base::C, typename Base::Item;

 public:
  LocalRelationForward(const LocalRelationArgs<T>& a, const WindowRows& rows, const WindowColumns& columns)
      : Base(a, rows, columns) {
    query_ = this->zeros(columns.width);
    output_ = this->zeros(a.m * columns.width);
  }

  void operator()(const Item& item) {
    for (int64_t g = item.g; g < item.g_end; ++g) {
      this->start(item.n, g);
      if (channels_ == 0) return;
      for (int64_t ho = item.begin; ho < item.end; ++ho) row(ho);
    }
  }

 private:
  void row(int64_t ho) {
    const int64_t width = columns_.width, line = columns_.line;
    this->unpack_inputs(ho);
    unpack_line(a_.query.at(n_, this->g_, ho), a_.query.c_stride, a_.query.w_stride, 1, a_.Wo, query_, width);
    this->find_taps(ho);
    for (int64_t w = 0; w < width; w += V) {
      const Vec<C> scale = 1 / this->weigh(w, load(query_ + w));
      for_each_eight(channels_, [&](int64_t c, auto count) __attribute__((always_inline)) {
        constexpr int R = count;
        const Batch<C, R> sums = weighted_sums<C, R>(
            this->reaching_, line, [&](int64_t i) __attribute__((always_inline)) { return load(weights_ + i * V); },
            [&](int64_t i) __attribute__((always_inline)) { return value_at_[i] + c * line + w; });
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(output_ + (c + r) * width + w, sums.v[r] * scale);
      });
    }
    pack_line(output_, width, channels_, a_.Wo, a_.output.at(n_, first_channel_, ho), a_.output.c_stride,
              a_.output.w_stride);
  }

  C *query_, *output_;  // [width], [m,width]
};

template <Similarity kSimilarity, class T>
class LocalRelationBackward : LocalRelationWorker<kSimilarity, T> {
  using Base = LocalRelationWorker<kSimilarity, T>;
  using Base::V, Base::a_, Base::rows_, Base::columns_, Base::key_at_, Base::value_at_, Base::weights_, Base::taps_,
      Base::tap_, Base::n_, Base::g_, Base::first_channel_, Base::channels_;
  using typename Base::C, typename Base::Item;

 public:
  LocalRelationBackward(const LocalRelationArgs<T>& a, const WindowRows& rows, const WindowColumns& columns,
                        const LocalRelationItems& items, double* prior_shares)
      : Base(a, rows, columns), items_(items), prior_shares_(prior_shares) {
    want_key_ = a.grad_key.data != nullptr;
    want_value_ = a.grad_value.data != nullptr;
    want_logits_ = want_key_ || a.grad_query.data != nullptr || a.grad_prior != nullptr;
    want_inputs_ = want_key_ || want_value_;
    constexpr int64_t kMostWeights = 1 << 20;
    const int64_t line = columns.output_line;
    keeps_sums_ = want_inputs_ && rows.most_outputs() * taps_ * line > kMostWeights;
    output_ring_ = want_inputs_ && !keeps_sums_ ? rows.most_outputs() : 1;
    query_ring_ = this->zeros(output_ring_ * line);
    grad_ring_ = this->zeros(output_ring_ * a.m * line);
    if (want_value_) weight_ring_ = this->zeros(output_ring_ * taps_ * line);
    if (want_key_) logit_ring_ = this->zeros(output_ring_ * taps_ * line);
    grads_ = this->scratch_.template take<C>(taps_ * V);
    query_sums_ = this->scratch_.template take<C>(columns.width);
    sums_ = this->zeros((keeps_sums_ ? this->ring_ * columns.parts.size() : 1) * sums_size());
    if (a.grad_prior != nullptr) prior_ = this->scratch_.template take<C>(taps_ * V);
    reads_ = this->scratch_.template take<Read>(taps_);
  }

  void operator()(const Item& item) {
    for (int64_t g = item.g; g < item.g_end; ++g) {
      this->start(item.n, g);
      if (a_.grad_prior != nullptr) std::fill_n(prior_, taps_ * V, C(0));
      if (channels_ == 0)
        clear(item);
      else
        strip(item);
      if (a_.grad_prior != nullptr) {
        double* const share = prior_shares_ + ((item.n * items_.strips + item.strip) * a_.G + g) * taps_;
        for (int64_t tap = 0; tap < taps_; ++tap) share[tap] = sum<C>(load(prior_ + tap * V));
      }
    }
  }

 private:
  // An output that reads the row of inputs at hand: its weight and gradient of the logit in the rings, of the output
  // that reads column 0 of the phase, and that output's query and gradient.
  struct Read {
    const C *weight, *logit, *query, *grad;
  };

  void strip(const Item& item) {
    int64_t y = items_.input_begin(item), end = items_.input_end(item);
    int64_t first = item.begin, last = item.end - 1;
    if (want_inputs_ && y < end) {
      first = std::min(first, rows_.first_output(y));
      last = std::max(last, rows_.last_output(end - 1));
    }
    for (int64_t ho = first; ho <= last; ++ho) {
      row(ho, ho >= item.begin && ho < item.end);
      if (!want_inputs_) continue;
      for (int64_t i = 0; i < a_.k && keeps_sums_; ++i)
        if (const int64_t row = rows_.tap(ho, i); row >= items_.input_begin(item) && row < end) add_inputs(row, i);
      for (; y < end && rows_.last_output(y) <= ho; ++y) inputs(y);
    }
  }

  int64_t sums_size() const { return (1 + a_.m) * columns_.width; }

  // Of the gradients of a row of inputs, where they are kept: they are 0 between strips.
  C* sums_of(int64_t y, int64_t part) const {
    return sums_ + (y % this->ring_ * static_cast<int64_t>(columns_.parts.size()) + part) * sums_size();
  }

  // What row i of the taps of the output at hand gives to a row of inputs.
  void add_inputs(int64_t y, int64_t i) {
    for (int64_t part = 0; part < static_cast<int64_t>(columns_.parts.size()); ++part)
      sum_reads(find_reads(y, part, i, i + 1), y, part, sums_of(y, part), true);
  }

  // Everything that depends on a row of outputs; `own`: it is this strip's, not a neighbor's.
  void row(int64_t ho, bool own) {
    const int64_t output_line = columns_.output_line, slot = ho % output_ring_;
    C* const query = query_ring_ + slot * output_line + columns_.output_left;
    C* const grad = grad_ring_ + slot * a_.m * output_line + columns_.output_left;
    C* const weight = want_value_ ? weight_ring_ + slot * taps_ * output_line + columns_.output_left : nullptr;
    C* const logit = want_key_ ? logit_ring_ + slot * taps_ * output_line + columns_.output_left : nullptr;
    this->unpack_inputs(ho);
    unpack_line(a_.query.at(n_, g_, ho), a_.query.c_stride, a_.query.w_stride, 1, a_.Wo, query, output_line);
    unpack_line(a_.grad_output.at(n_, first_channel_, ho), a_.grad_output.c_stride, a_.grad_output.w_stride, channels_,
                a_.Wo, grad, output_line);
    this->find_taps(ho);
    for (int64_t w = 0; w < columns_.width; w += V) {
      const Vec<C> q = load(query + w);
      const Vec<C> scale = 1 / this->weigh(w, q);
      const Vec<C> delta = grads_of_weights(w, scale, grad, weight);
      if (want_logits_) grads_of_logits(w, q, delta, logit, own);
    }
    if (own && a_.grad_query.data != nullptr)
      pack_line(query_sums_, columns_.width, 1, a_.Wo, a_.grad_query.at(n_, g_, ho), a_.grad_query.c_stride,
                a_.grad_query.w_stride);
  }

  // Divides weights_ by their sum, keeps them in the ring, and leaves the gradients of weights in grads_. Gives delta.
  Vec<C> grads_of_weights(int64_t w, Vec<C> scale, const C* grad, C* ring) {
    const int64_t count = this->count_, reaching = this->reaching_, line = columns_.output_line;
    C *const weights = weights_, *const grads = grads_;
    if (w + V > a_.Wo) {  // past the end of the row there is no output, and what was computed there may be anything
      const VecInt<C> there = lanes<C>([](Int<C> j) { return j; }) < broadcast_int<C>(static_cast<Int<C>>(a_.Wo - w));
      for (int64_t i = 0; i < count; ++i) store(weights + i * V, there ? load(weights + i * V) : Vec<C>{});
      scale = there ? scale : Vec<C>{};
    }
    for (int64_t i = 0; i < count; ++i) {
      const Vec<C> p = load(weights + i * V) * scale;
      store(weights + i * V, p);
      if (ring != nullptr && i < reaching) store(ring + tap_[i] * line + w, p);
    }
    if (!want_logits_) return scale;
    for_each_eight(channels_, [&](int64_t c, auto n) __attribute__((always_inline)) {
      constexpr int R = n;
      const auto g = batch<C, R>([&](int r) __attribute__((always_inline)) { return load(grad + (c + r) * line + w); });
      const auto add = [&](int64_t i, Vec<C> sum) __attribute__((always_inline)) {
        const C* const value = value_at_[i] + c * columns_.line + w;
        Vec<C> odd = {};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          Vec<C>& to = r % 2 ? odd : sum;
          to += g.v[r] * load(value + r * columns_.line);
        }
        store(grads + i * V, sum + odd);
      };
      if (c == 0)
        for (int64_t i = 0; i < reaching; ++i) add(i, Vec<C>{});
      else
        for (int64_t i = 0; i < reaching; ++i) add(i, load(grads + i * V));
    });
    return sum_over<C>(reaching, [&](int64_t i) __attribute__((always_inline)) {
      return load(weights + i * V) * load(grads + i * V);
    });
  }

  // The gradients of logits into the ring, and what is the sum of them over taps, or over outputs.
  void grads_of_logits(int64_t w, Vec<C> q, Vec<C> delta, C* ring, bool own) {
    const int64_t line = columns_.output_line, reaching = this->reaching_;
    const C *const weights = weights_, *const grads = grads_;
    const C* const* const key_at = key_at_;
    const int32_t* const taps = tap_;
    C* const prior = own ? prior_ : nullptr;
    const auto add = [&](int64_t i, Vec<C> of_weight) __attribute__((always_inline)) {
      const Vec<C> l = load(weights + i * V) * (of_weight - delta), k = load(key_at[i] + w);
      if (prior != nullptr) {
        C* const sum = prior + taps[i] * V;
        store(sum, load(sum) + l);
      }
      if (ring != nullptr && i < reaching) store(ring + taps[i] * line + w, l);
      if constexpr (kSimilarity == Similarity::kProduct)
        return l * k;
      else
        return -l * slope<kSimilarity, Vec<C>>(q - k);
    };
    Vec<C> grad =
        sum_over<C>(reaching, [&](int64_t i) __attribute__((always_inline)) { return add(i, load(grads + i * V)); });
    for (int64_t i = reaching; i < this->count_; ++i) grad += add(i, Vec<C>{});
    if (own) store(query_sums_ + w, grad * C(kSlopeScale<kSimilarity>));
  }

  // The gradients of a row of inputs. Where no output reads a row or a phase of it, they are zero already.
  void inputs(int64_t y) {
    for (int64_t part = 0; part < static_cast<int64_t>(columns_.parts.size()); ++part) {
      C* const sums = keeps_sums_ ? sums_of(y, part) : sums_;
      if (!keeps_sums_) {
        const int64_t count = find_reads(y, part, 0, a_.k);
        if (count == 0) continue;
        sum_reads(count, y, part, sums, false);
      }
      const WindowColumns::Part& columns = columns_.parts[part];
      if (want_key_)
        pack_line(sums, columns_.width, 1, columns.columns, a_.grad_key.at(n_, g_, y, columns.phase),
                  a_.grad_key.c_stride, a_.grad_key.w_stride * a_.stride);
      if (want_value_)
        pack_line(sums + columns_.width, columns_.width, channels_, columns.columns,
                  a_.grad_value.at(n_, first_channel_, y, columns.phase), a_.grad_value.c_stride,
                  a_.grad_value.w_stride * a_.stride);
      if (keeps_sums_) std::fill_n(sums, sums_size(), C(0));
    }
  }

  // sums [1+m,width]: of the key and of the values of a row of inputs, over the reads at hand; `more`: added to them.
  void sum_reads(int64_t count, int64_t y, int64_t part, C* sums, bool more) {
    const int64_t columns = columns_.parts[part].columns;
    const C* const key = this->key_ring_ + y % this->ring_ * columns_.line + part * columns_.part_size + columns_.left;
    for (int64_t j = 0; want_key_ && j < columns; j += V) {
      const Vec<C> grad = grad_of_keys(count, j, key);
      store(sums + j, more ? load(sums + j) + grad : grad);
    }
    for (int64_t j = 0; want_value_ && j < columns; j += V) grad_of_values(count, j, sums + columns_.width + j, more);
  }

  // Outputs that read a row of inputs by rows [begin, end) of taps.
  int64_t find_reads(int64_t y, int64_t part, int64_t begin, int64_t end) {
    const int64_t line = columns_.output_line;
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t ho = rows_.output(y, i);
      if (ho < 0) continue;
      const int64_t slot = ho % output_ring_;
      for (int64_t j = 0; j < a_.k; ++j) {
        const WindowColumns::Tap& tap = columns_.taps[j];
        if (tap.phase < 0 || tap.part != part) continue;
        const int64_t at = columns_.output_at(tap), of_tap = (slot * taps_ + i * a_.k + j) * line + at;
        reads_[count++] = {want_value_ ? weight_ring_ + of_tap : nullptr, want_key_ ? logit_ring_ + of_tap : nullptr,
                           query_ring_ + slot * line + at, grad_ring_ + slot * a_.m * line + at};
      }
    }
    return count;
  }

  Vec<C> grad_of_keys(int64_t count, int64_t j, const C* key) const {
    const Vec<C> k = load(key + j);
    const Read* const reads = reads_;
    const Vec<C> grad = sum_over<C>(count, [&](int64_t i) __attribute__((always_inline)) {
      const Vec<C> q = load(reads[i].query + j), l = load(reads[i].logit + j);
      if constexpr (kSimilarity == Similarity::kProduct)
        return l * q;
      else
        return l * slope<kSimilarity, Vec<C>>(q - k);
    });
    return grad * C(kSlopeScale<kSimilarity>);
  }

  void grad_of_values(int64_t count, int64_t j, C* to, bool more) {
    for_each_eight(channels_, [&](int64_t c, auto n) __attribute__((always_inline)) {
      constexpr int R = n;
      const Batch<C, R> sums = weighted_sums<C, R>(
          count, columns_.output_line,
          [&](int64_t i) __attribute__((always_inline)) { return load(reads_[i].weight + j); },
          [&](int64_t i) __attribute__((always_inline)) { return reads_[i].grad + c * columns_.output_line + j; });
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        C* const p = to + (c + r) * columns_.width;
        store(p, more ? load(p) + sums.v[r] : sums.v[r]);
      }
    });
  }

  // A group without channels has no influence.
  void clear(const Item& item) {
    const auto rows = [&](const Map<T>& grad, int64_t begin, int64_t end, int64_t columns) {
      if (grad.data == nullptr) return;
      for (int64_t y = begin; y < end; ++y)
        for (int64_t x = 0; x < columns; ++x) *grad.at(n_, g_, y, x) = static_cast<T>(C(0));
    };
    rows(a_.grad_query, item.begin, item.end, a_.Wo);
    rows(a_.grad_key, items_.input_begin(item), items_.input_end(item), a_.W);
  }

  const LocalRelationItems& items_;
  double* const prior_shares_;  // [N,strips,G,k,k]
  bool want_key_, want_value_, want_logits_, want_inputs_;
  bool keeps_sums_;                                   // of the gradients of inputs, instead of the weights of outputs
  int64_t output_ring_;                               // row ho of outputs is in slot ho % output_ring
  C *query_ring_, *grad_ring_;                        // [ring,line], [ring,m,line]
  C *weight_ring_ = nullptr, *logit_ring_ = nullptr;  // [ring,k*k,line]
  C *grads_, *query_sums_;                            // [k*k,V], [width]
  C* sums_;                                           // [1+m,width] or, where these are kept, [ring,parts,1+m,width]
  C* prior_ = nullptr;                                // [k*k,V]
  Read* reads_;
};

template <Similarity kSimilarity, class T>
void local_relation_forward(const LocalRelationArgs<T>& a, const WindowRows& rows, const LocalRelationItems& items,
                            int64_t threads) {
  const WindowColumns columns(a.W, a.Wo, a.k, a.stride, a.dilation, kLanes<ComputeType<T>>);
  for_each_item(items.count, threads, [&] {
    return [worker = LocalRelationForward<kSimilarity, T>(a, rows, columns), &items](int64_t i) mutable {
      worker(items.at(i));
    };
  });
}

template <Similarity kSimilarity, class T>
void local_relation_backward(const LocalRelationArgs<T>& a, const WindowRows& rows, const LocalRelationItems& items,
                             double* prior_shares, int64_t threads) {
  const WindowColumns columns(a.W, a.Wo, a.k, a.stride, a.dilation, kLanes<ComputeType<T>>);
  for_each_item(items.count, threads, [&] {
    return [worker = LocalRelationBackward<kSimilarity, T>(a, rows, columns, items, prior_shares),
            &items](int64_t i) mutable { worker(items.at(i)); };
  });
}

}  // namespace relops::RELOPS_ISA
