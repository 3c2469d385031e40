// local_relation on the CPU: the backward pass. It processes the output rows of a strip from top to bottom, and writes
// the gradients of a row of inputs as soon as the last output row that reads this row has been processed.
#ifndef RELOPS_LOCAL_RELATION_BACKWARD
#define RELOPS_LOCAL_RELATION_BACKWARD

#include "common/cpu/simd.h"
#include "local_relation/cpu_args.h"
#include "local_relation/cpu_lines.h"
#include "local_relation/cpu_window.h"

namespace relops::RELOPS_ISA {

template <Similarity kSimilarity, class T>
class LocalRelationBackward : LocalRelationWorker<kSimilarity, T> {
  using Base = LocalRelationWorker<kSimilarity, T>;
  using Base::V, Base::a_, Base::rows_, Base::columns_, Base::key_at_, Base::value_at_, Base::weights_, Base::taps_,
      Base::tap_, Base::n_, Base::g_, Base::first_channel_, Base::channels_;
  using typename Base::Compute, typename Base::Item;

 public:
  LocalRelationBackward(const LocalRelationArgs<T>& a, const WindowRows& rows, const WindowColumns& columns,
                        const LocalRelationItems& items, double* prior_partials)
      : Base(a, rows, columns), items_(items), prior_partials_(prior_partials) {
    needs_key_ = a.grad_key.data != nullptr;
    needs_value_ = a.grad_value.data != nullptr;
    needs_logits_ = needs_key_ || a.grad_query.data != nullptr || a.grad_prior != nullptr;
    needs_inputs_ = needs_key_ || needs_value_;
    constexpr int64_t kMaxWeights = 1 << 20;
    const int64_t line = columns.output_line;
    keeps_sums_ = needs_inputs_ && rows.max_outputs() * taps_ * line > kMaxWeights;
    output_ring_ = needs_inputs_ && !keeps_sums_ ? rows.max_outputs() : 1;
    query_ring_ = this->zeros(output_ring_ * line);
    grad_ring_ = this->zeros(output_ring_ * a.m * line);
    if (needs_value_) weight_ring_ = this->zeros(output_ring_ * taps_ * line);
    if (needs_key_) logit_ring_ = this->zeros(output_ring_ * taps_ * line);
    grads_ = this->scratch_.template allocate<Compute>(taps_ * V);
    query_sums_ = this->scratch_.template allocate<Compute>(columns.width);
    sums_ = this->zeros((keeps_sums_ ? this->ring_ * columns.parts.size() : 1) * sums_size());
    if (a.grad_prior != nullptr) prior_ = this->scratch_.template allocate<Compute>(taps_ * V);
    reads_ = this->scratch_.template allocate<Read>(taps_);
  }

  void operator()(const Item& item) {
    for (int64_t g = item.g; g < item.g_end; ++g) {
      this->start(item.n, g);
      if (a_.grad_prior != nullptr) std::fill_n(prior_, taps_ * V, Compute(0));
      if (channels_ == 0)
        clear(item);
      else
        strip(item);
      if (a_.grad_prior != nullptr) {
        double* const partial = prior_partials_ + ((item.n * items_.strips + item.strip) * a_.G + g) * taps_;
        for (int64_t tap = 0; tap < taps_; ++tap) partial[tap] = sum<Compute>(load(prior_ + tap * V));
      }
    }
  }

 private:
  // A tap with which outputs read the current row of inputs. The pointers belong to the output that reads column 0 of
  // the phase, and point to the weight of the tap, the gradient of its logit, the query of the output, and the gradient
  // of the output.
  struct Read {
    const Compute *weight, *logit, *query, *grad;
  };

  void strip(const Item& item) {
    int64_t y = items_.input_begin(item), end = items_.input_end(item);
    int64_t first = item.begin, last = item.end - 1;
    if (needs_inputs_ && y < end) {
      first = std::min(first, rows_.first_output(y));
      last = std::max(last, rows_.last_output(end - 1));
    }
    for (int64_t ho = first; ho <= last; ++ho) {
      process_row(ho, ho >= item.begin && ho < item.end);
      if (!needs_inputs_) continue;
      for (int64_t i = 0; i < a_.k && keeps_sums_; ++i)
        if (const int64_t row = rows_.tap(ho, i); row >= items_.input_begin(item) && row < end) add_inputs(row, i);
      for (; y < end && rows_.last_output(y) <= ho; ++y) write_inputs(y);
    }
  }

  int64_t sums_size() const { return (1 + a_.m) * columns_.width; }

  // Returns the sums that accumulate the gradients of a row of inputs. The sums exist only if keeps_sums_ is set, and
  // are 0 when a strip begins.
  Compute* sums_of(int64_t y, int64_t part) const {
    return sums_ + (y % this->ring_ * static_cast<int64_t>(columns_.parts.size()) + part) * sums_size();
  }

  // Adds what the current output row contributes, through row i of its taps, to the gradients of input row y.
  void add_inputs(int64_t y, int64_t i) {
    for (int64_t part = 0; part < static_cast<int64_t>(columns_.parts.size()); ++part)
      sum_reads(find_reads(y, part, i, i + 1), y, part, sums_of(y, part), true);
  }

  // Processes a row of outputs. `own` is true if the row belongs to this strip, and false if it belongs to a
  // neighboring strip.
  void process_row(int64_t ho, bool own) {
    const int64_t output_line = columns_.output_line, slot = ho % output_ring_;
    Compute* const query = query_ring_ + slot * output_line + columns_.output_left;
    Compute* const grad = grad_ring_ + slot * a_.m * output_line + columns_.output_left;
    Compute* const weight = needs_value_ ? weight_ring_ + slot * taps_ * output_line + columns_.output_left : nullptr;
    Compute* const logit = needs_key_ ? logit_ring_ + slot * taps_ * output_line + columns_.output_left : nullptr;
    this->unpack_inputs(ho);
    unpack_line(a_.query.at(n_, g_, ho), a_.query.c_stride, a_.query.w_stride, 1, a_.Wo, query, output_line);
    unpack_line(a_.grad_output.at(n_, first_channel_, ho), a_.grad_output.c_stride, a_.grad_output.w_stride, channels_,
                a_.Wo, grad, output_line);
    this->find_taps(ho);
    for (int64_t w = 0; w < columns_.width; w += V) {
      const Vec<Compute> q = load(query + w);
      const Vec<Compute> scale = 1 / this->weigh(w, q);
      const Vec<Compute> delta = grads_of_weights(w, scale, grad, weight);
      if (needs_logits_) grads_of_logits(w, q, delta, logit, own);
    }
    if (own && a_.grad_query.data != nullptr)
      pack_line(query_sums_, columns_.width, 1, a_.Wo, a_.grad_query.at(n_, g_, ho), a_.grad_query.c_stride,
                a_.grad_query.w_stride);
  }

  // Divides weights_ by their sum, stores them in the ring, and writes the gradients of the weights to grads_. Returns
  // delta.
  Vec<Compute> grads_of_weights(int64_t w, Vec<Compute> scale, const Compute* grad, Compute* ring) {
    const int64_t count = this->count_, map_taps = this->map_taps_, line = columns_.output_line;
    Compute *const weights = weights_, *const grads = grads_;
    if (w + V > a_.Wo) {  // lanes after the end of the row have no output, so their results are discarded
      const VecInt<Compute> valid = lanes<Compute>([](Int<Compute> j) { return j; }) <
                                    broadcast_int<Compute>(static_cast<Int<Compute>>(a_.Wo - w));
      for (int64_t i = 0; i < count; ++i) store(weights + i * V, valid ? load(weights + i * V) : Vec<Compute>{});
      scale = valid ? scale : Vec<Compute>{};
    }
    for (int64_t i = 0; i < count; ++i) {
      const Vec<Compute> p = load(weights + i * V) * scale;
      store(weights + i * V, p);
      if (ring != nullptr && i < map_taps) store(ring + tap_[i] * line + w, p);
    }
    if (!needs_logits_) return scale;
    for_each_eight(channels_, [&](int64_t c, auto n) __attribute__((always_inline)) {
      constexpr int R = n;
      const auto g =
          batch<Compute, R>([&](int r) __attribute__((always_inline)) { return load(grad + (c + r) * line + w); });
      const auto add = [&](int64_t i, Vec<Compute> sum) __attribute__((always_inline)) {
        const Compute* const value = value_at_[i] + c * columns_.line + w;
        Vec<Compute> odd = {};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          Vec<Compute>& to = r % 2 ? odd : sum;
          to += g.v[r] * load(value + r * columns_.line);
        }
        store(grads + i * V, sum + odd);
      };
      if (c == 0)
        for (int64_t i = 0; i < map_taps; ++i) add(i, Vec<Compute>{});
      else
        for (int64_t i = 0; i < map_taps; ++i) add(i, load(grads + i * V));
    });
    return sum_over<Compute>(map_taps, [&](int64_t i) __attribute__((always_inline)) {
      return load(weights + i * V) * load(grads + i * V);
    });
  }

  // Stores the gradients of the logits in the ring. Sums them over taps for the gradients of queries, and over outputs
  // for the gradient of the prior.
  void grads_of_logits(int64_t w, Vec<Compute> q, Vec<Compute> delta, Compute* ring, bool own) {
    const int64_t line = columns_.output_line, map_taps = this->map_taps_;
    const Compute *const weights = weights_, *const grads = grads_;
    const Compute* const* const key_at = key_at_;
    const int32_t* const taps = tap_;
    Compute* const prior = own ? prior_ : nullptr;
    const auto add = [&](int64_t i, Vec<Compute> grad_weight) __attribute__((always_inline)) {
      const Vec<Compute> l = load(weights + i * V) * (grad_weight - delta), k = load(key_at[i] + w);
      if (prior != nullptr) {
        Compute* const sum = prior + taps[i] * V;
        store(sum, load(sum) + l);
      }
      if (ring != nullptr && i < map_taps) store(ring + taps[i] * line + w, l);
      if constexpr (kSimilarity == Similarity::kProduct)
        return l * k;
      else
        return -l * slope<kSimilarity, Vec<Compute>>(q - k);
    };
    Vec<Compute> grad = sum_over<Compute>(
        map_taps, [&](int64_t i) __attribute__((always_inline)) { return add(i, load(grads + i * V)); });
    for (int64_t i = map_taps; i < this->count_; ++i) grad += add(i, Vec<Compute>{});
    if (own) store(query_sums_ + w, grad * Compute(kSlopeScale<kSimilarity>));
  }

  // Writes the gradients of a row of inputs. Skips rows and phases that no output reads, because their gradients are
  // already zero.
  void write_inputs(int64_t y) {
    for (int64_t part = 0; part < static_cast<int64_t>(columns_.parts.size()); ++part) {
      Compute* const sums = keeps_sums_ ? sums_of(y, part) : sums_;
      if (!keeps_sums_) {
        const int64_t count = find_reads(y, part, 0, a_.k);
        if (count == 0) continue;
        sum_reads(count, y, part, sums, false);
      }
      const WindowColumns::Part& columns = columns_.parts[part];
      if (needs_key_)
        pack_line(sums, columns_.width, 1, columns.columns, a_.grad_key.at(n_, g_, y, columns.phase),
                  a_.grad_key.c_stride, a_.grad_key.w_stride * a_.stride);
      if (needs_value_)
        pack_line(sums + columns_.width, columns_.width, channels_, columns.columns,
                  a_.grad_value.at(n_, first_channel_, y, columns.phase), a_.grad_value.c_stride,
                  a_.grad_value.w_stride * a_.stride);
      if (keeps_sums_) std::fill_n(sums, sums_size(), Compute(0));
    }
  }

  // Computes the gradients of one row of inputs, summed over the first `count` entries of reads_. Row 0 of sums
  // [1+m,width] is the gradient of the key, and rows 1 to m are the gradients of the m value channels. If `accumulate`,
  // adds the gradients to sums instead of overwriting them.
  void sum_reads(int64_t count, int64_t y, int64_t part, Compute* sums, bool accumulate) {
    const int64_t columns = columns_.parts[part].columns;
    const Compute* const key =
        this->key_ring_ + y % this->ring_ * columns_.line + part * columns_.part_size + columns_.left;
    for (int64_t j = 0; needs_key_ && j < columns; j += V) {
      const Vec<Compute> grad = grad_of_keys(count, j, key);
      store(sums + j, accumulate ? load(sums + j) + grad : grad);
    }
    for (int64_t j = 0; needs_value_ && j < columns; j += V)
      grad_of_values(count, j, sums + columns_.width + j, accumulate);
  }

  // Fills reads_ with the taps in rows [begin, end) with which outputs read input row y, and returns their number.
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
        const int64_t at = columns_.output_at(tap), tap_offset = (slot * taps_ + i * a_.k + j) * line + at;
        reads_[count++] = {needs_value_ ? weight_ring_ + tap_offset : nullptr,
                           needs_key_ ? logit_ring_ + tap_offset : nullptr, query_ring_ + slot * line + at,
                           grad_ring_ + slot * a_.m * line + at};
      }
    }
    return count;
  }

  Vec<Compute> grad_of_keys(int64_t count, int64_t j, const Compute* key) const {
    const Vec<Compute> k = load(key + j);
    const Read* const reads = reads_;
    const Vec<Compute> grad = sum_over<Compute>(count, [&](int64_t i) __attribute__((always_inline)) {
      const Vec<Compute> q = load(reads[i].query + j), l = load(reads[i].logit + j);
      if constexpr (kSimilarity == Similarity::kProduct)
        return l * q;
      else
        return l * slope<kSimilarity, Vec<Compute>>(q - k);
    });
    return grad * Compute(kSlopeScale<kSimilarity>);
  }

  void grad_of_values(int64_t count, int64_t j, Compute* to, bool accumulate) {
    for_each_eight(channels_, [&](int64_t c, auto n) __attribute__((always_inline)) {
      constexpr int R = n;
      const Batch<Compute, R> sums = weighted_sums<Compute, R>(
          count, columns_.output_line,
          [&](int64_t i) __attribute__((always_inline)) { return load(reads_[i].weight + j); },
          [&](int64_t i) __attribute__((always_inline)) { return reads_[i].grad + c * columns_.output_line + j; });
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Compute* const p = to + (c + r) * columns_.width;
        store(p, accumulate ? load(p) + sums.v[r] : sums.v[r]);
      }
    });
  }

  // Sets the gradients of a group without channels to zero, because such a group does not affect the output.
  void clear(const Item& item) {
    const auto rows = [&](const Map<T>& grad, int64_t begin, int64_t end, int64_t columns) {
      if (grad.data == nullptr) return;
      for (int64_t y = begin; y < end; ++y)
        for (int64_t x = 0; x < columns; ++x) *grad.at(n_, g_, y, x) = static_cast<T>(Compute(0));
    };
    rows(a_.grad_query, item.begin, item.end, a_.Wo);
    rows(a_.grad_key, items_.input_begin(item), items_.input_end(item), a_.W);
  }

  const LocalRelationItems& items_;
  double* const prior_partials_;  // [N,strips,G,k,k]
  bool needs_key_, needs_value_, needs_logits_, needs_inputs_;
  bool keeps_sums_;                   // whether sums of input gradients are kept instead of rings of weights
  int64_t output_ring_;               // row ho of outputs is in slot ho % output_ring
  Compute *query_ring_, *grad_ring_;  // [ring,line], [ring,m,line]
  Compute *weight_ring_ = nullptr, *logit_ring_ = nullptr;  // [ring,k*k,line]
  Compute *grads_, *query_sums_;                            // [k*k,V], [width]
  Compute* sums_;                                           // [1+m,width], or [ring,parts,1+m,width] if keeps_sums_
  Compute* prior_ = nullptr;                                // [k*k,V]
  Read* reads_;
};

}  // namespace relops::RELOPS_ISA

#endif
