// ms_deform_attn and ms_deform_attn_fused on the CPU: the entry points. Compiled once per instruction set by
// foreach_isa.h; cpu_samples.h turns samples into rows and weights, cpu_rows.h sums rows.
//
// The work is Q * M * L * P samples of four rows of D values each; what bounds it is fetching those rows. In value
// [N,S,M,D] the rows of one head lie M * D apart, which leaves all but 1/M of the sets of a cache unused, so where
// queries are many a thread first copies the rows of its (image, head) into a dense array, converted to the compute
// type, and gathers from there: one head of a 100x152 pyramid is 2.6 MB instead of 20, and its smaller levels stay in
// L2. Where queries are few (a decoder) rows are read where they lie.
//
// One item is one (image, query, head). Its L * P samples are first turned into row indices and weights, a vector of
// samples at a time; then their rows are accumulated, a vector of channels at a time. A corner outside its level points
// at a row of zeros, so that the inner loop has no branch. No sampled value is ever stored.
//
// Backward: a thread owns the gradient of an (image, head), so sums need neither locks nor atomics and come out the
// same every time. Where there are fewer (image, head) pairs than threads, queries are split into a few parts with sums
// of their own, added up in a fixed order at the end.

#include "common/cpu/simd.h"
#include "deform_attn/cpu_args.h"
#include "deform_attn/cpu_rows.h"
#include "deform_attn/cpu_samples.h"

namespace relops::RELOPS_ISA {

namespace {

// The work of a direction, by that of a vector of a row that is sampled and by that of one of value.
template <class T, class U>
double nanoseconds(const MsDeformAttnArgs<T, U>& a, double sampled, double of_value) {
  const double vectors = ceil_div(a.D, kLanes<ComputeType<T>>), items = static_cast<double>(a.N) * a.M;
  return items * (a.Q * a.L * a.P * (4 + 4 * sampled * vectors) + a.S * of_value * vectors);
}

// Parts into which the queries of a pair are split where every part has dense rows of its own: `enough` to balance the
// threads where there are pairs for all of them, else as few as occupy them, and never more than 4, which bounds
// memory.
inline int64_t packing_parts(int64_t threads, int64_t pairs, int64_t enough) {
  return threads <= pairs ? enough : std::min<int64_t>(ceil_div(threads, pairs), 4);
}

// Prefetches p[first..first + count). The address is computed as a number, because it may be nobody's.
// always_inline, because GCC drops calls of a function that does nothing but prefetch: it sees no effect in them.
template <class X>
[[gnu::always_inline]] inline void prefetch(const X* p, int64_t first, int64_t count) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + first * sizeof(X);
  for (uintptr_t byte = 0; byte < count * sizeof(X); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(address + byte));
}

// Asks for what the backward of item (n, q, m) reads and writes. The items of a head lie a row of all heads apart,
// which the processor's own prefetchers do not follow, and an item is too much work to look past it out of order.
// There may be no such item, or a gradient not be wanted: a prefetch does not mind.
template <class T, class U>
[[gnu::always_inline]] inline void prefetch_item(const MsDeformAttnArgs<T, U>& a, int64_t n, int64_t q, int64_t m) {
  const int64_t item = (n * a.Q + q) * a.M + m, samples = a.L * a.P;
  prefetch(a.locations, item * samples * 2, samples * 2);
  prefetch(a.weights, item * samples, samples);
  prefetch(a.grad_output, item * a.D, a.D);
  prefetch(a.grad_locations, item * samples * 2, samples * 2);
  prefetch(a.grad_weights, item * samples, samples);
}

}  // namespace

template <class T, class U>
void ms_deform_attn_forward(const MsDeformAttnArgs<T, U>& a) {
  using Compute = ComputeType<T>;
  const int64_t threads = threads_for(nanoseconds(a, 1, worth_packing(a) ? 2 : 0));
  // Tasks of one (n, m) are neighbors, so a thread that gets several packs once.
  const int64_t pairs = a.N * a.M;
  const int64_t parts = std::min(a.Q, worth_packing(a) ? packing_parts(threads, pairs, 8) : 1 + 4 * threads / pairs);
  for_each_range(pairs * parts, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const SampleConstants<Compute> constants(a, scratch);
    const Samples<Compute> samples(constants.padded, false, scratch);
    RowSource<T, U> source(a, scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / parts, part = task % parts, n = pair / a.M, m = pair % a.M;
      source.with(n, m, [&](const auto& rows) {
        for (int64_t q = a.Q * part / parts; q < a.Q * (part + 1) / parts; ++q) {
          read_samples(a, constants, n, q, m, samples);
          locate_samples(constants, a.S, source.mask_in_place(n), samples);
          gather_item(rows, samples, constants.count, a.D, a.output + ((n * a.Q + q) * a.M + m) * a.D);
        }
      });
    }
  });
}

template <class T, class U>
void ms_deform_attn_backward(const MsDeformAttnArgs<T, U>& a) {
  using Compute = ComputeType<T>;
  const int64_t threads = threads_for(nanoseconds(a, 3, worth_packing(a) || a.grad_value != nullptr ? 4 : 0));
  const int64_t pairs = a.N * a.M, width = round_up(a.D, kLanes<Compute>);
  const bool scatter = a.grad_value != nullptr;
  // In place, a float32 or float64 gradient is its own array of sums.
  const bool sums_in_place = std::is_same_v<T, Compute> && !worth_packing(a);
  const int64_t parts = sums_in_place ? 1 : std::min(a.Q, packing_parts(threads, pairs, 1));
  const int64_t sums_size = (a.S + 1) * width;
  Scratch shared;
  // With several parts their sums must outlive the task.
  Compute* part_sums = scatter && parts > 1 ? shared.take<Compute>(pairs * parts * sums_size) : nullptr;

  // Adds up `parts` sums, one after the other, and writes rows [from, to) of the gradient of (n, m).
  auto write_grad_value = [&](int64_t pair, Compute* sums, int64_t from, int64_t to) {
    const int64_t n = pair / a.M, m = pair % a.M;
    for (int64_t i = from; i < to; ++i) {
      T* row = a.grad_value + ((n * a.S + i) * a.M + m) * a.D;
      if (a.mask && a.mask[n * a.S + i]) {
        std::fill_n(row, a.D, T(0));
        continue;
      }
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t d = 0; d < width; ++d) sums[i * width + d] += sums[part * sums_size + i * width + d];
      convert(sums + i * width, row, a.D);
    }
  };

  for_each_range(pairs * parts, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const SampleConstants<Compute> constants(a, scratch);
    const Samples<Compute> samples(constants.padded, true, scratch);
    RowSource<T, U> source(a, scratch);
    Compute* grad = scratch.take<Compute>(width);
    Compute* unused_row = scratch.take<Compute>(width);  // takes what falls outside
    for (int64_t d = 0; d < width; ++d) grad[d] = unused_row[d] = 0;
    Compute* own_sums = scatter && !sums_in_place && parts == 1 ? scratch.take<Compute>(sums_size) : nullptr;
    for (int64_t i = 0; i < constants.padded; ++i)
      for (auto* dot : samples.dot) dot[i] = 0;

    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / parts, part = task % parts, n = pair / a.M, m = pair % a.M;
      Compute* dense_sums = nullptr;
      if (scatter && sums_in_place) {
        for (int64_t i = 0; i < a.S; ++i) std::fill_n(a.grad_value + ((n * a.S + i) * a.M + m) * a.D, a.D, T(0));
      } else if (scatter) {
        dense_sums = own_sums ? own_sums : part_sums + task * sums_size;
        std::fill_n(dense_sums, sums_size, Compute(0));
      }
      source.with(n, m, [&](const auto& rows) {
        const auto sums = [&] {
          if constexpr (std::is_same_v<std::decay_t<decltype(rows)>, PlacedRows<const Compute>>)
            return PlacedRows<Compute>{a.grad_value + (n * a.S * a.M + m) * a.D, a.M * a.D, unused_row, a.S};
          else
            return DenseRows<Compute>{dense_sums, width};
        }();
        for (int64_t q = a.Q * part / parts; q < a.Q * (part + 1) / parts; ++q) {
          prefetch_item(a, n, q + 3, m);
          read_samples(a, constants, n, q, m, samples);
          locate_samples(constants, a.S, source.mask_in_place(n), samples);
          convert(a.grad_output + ((n * a.Q + q) * a.M + m) * a.D, grad, a.D);
          if (scatter)
            backward_item<true>(rows, sums, samples, constants.count, a.D, grad);
          else
            backward_item<false>(rows, sums, samples, constants.count, a.D, grad);
          if (a.grad_locations) write_sampling_grads(a, constants, n, q, m, samples);
        }
      });
      if (own_sums) write_grad_value(pair, own_sums, 0, a.S);
    }
  });

  if (part_sums == nullptr) return;
  for_each_range(pairs * a.S, threads_for(vectors_of<Compute>(static_cast<double>(pairs) * parts * sums_size)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end;) {
                     const int64_t pair = i / a.S, row = i % a.S, rows = std::min(a.S - row, end - i);
                     write_grad_value(pair, part_sums + pair * parts * sums_size, row, row + rows);
                     i += rows;
                   }
                 });
}

}  // namespace relops::RELOPS_ISA

// The next instruction set compiles the pieces again.
#undef RELOPS_DEFORM_ATTN_SAMPLES
#undef RELOPS_DEFORM_ATTN_ROWS
