// local_relation on the CPU: the forward pass. For each vector of outputs, it computes the weights and then the
// weighted sums of values, up to eight channels at a time.
#ifndef RELOPS_LOCAL_RELATION_FORWARD
#define RELOPS_LOCAL_RELATION_FORWARD

#include "common/cpu/simd.h"
#include "local_relation/cpu_args.h"
#include "local_relation/cpu_lines.h"
#include "local_relation/cpu_window.h"

namespace relops::RELOPS_ISA {

template <Similarity kSimilarity, class T>
class LocalRelationForward : LocalRelationWorker<kSimilarity, T> {
  using Base = LocalRelationWorker<kSimilarity, T>;
  using Base::V, Base::a_, Base::columns_, Base::value_at_, Base::weights_, Base::n_, Base::first_channel_,
      Base::channels_;
  using typename Base::Compute, typename Base::Item;

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
      for (int64_t ho = item.begin; ho < item.end; ++ho) process_row(ho);
    }
  }

 private:
  void process_row(int64_t ho) {
    const int64_t width = columns_.width, line = columns_.line;
    this->unpack_inputs(ho);
    unpack_line(a_.query.at(n_, this->g_, ho), a_.query.c_stride, a_.query.w_stride, 1, a_.Wo, query_, width);
    this->find_taps(ho);
    for (int64_t w = 0; w < width; w += V) {
      const Vec<Compute> scale = 1 / this->weigh(w, load(query_ + w));
      for_each_eight(channels_, [&](int64_t c, auto count) __attribute__((always_inline)) {
        constexpr int R = count;
        const Batch<Compute, R> sums = weighted_sums<Compute, R>(
            this->map_taps_, line, [&](int64_t i) __attribute__((always_inline)) { return load(weights_ + i * V); },
            [&](int64_t i) __attribute__((always_inline)) { return value_at_[i] + c * line + w; });
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(output_ + (c + r) * width + w, sums.v[r] * scale);
      });
    }
    pack_line(output_, width, channels_, a_.Wo, a_.output.at(n_, first_channel_, ho), a_.output.c_stride,
              a_.output.w_stride);
  }

  Compute *query_, *output_;  // [width], [m,width]
};

}  // namespace relops::RELOPS_ISA

#endif
