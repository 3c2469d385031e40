// ms_deform_attn and ms_deform_attn_fused on the CPU: the entry points. foreach_isa.h compiles this file once per
// instruction set. cpu_samples.h converts samples to row indices and weights, and cpu_rows.h accumulates weighted rows.
//
// The work consists of N * Q * M * L * P samples. Each sample reads four rows of D values, one per corner. Fetching
// these rows limits the speed. In value [N,S,M,D], consecutive rows of one head are M * D values apart, so they use
// only 1/M of the sets of a cache. If there are many queries, a thread therefore first copies the rows of its (image,
// head) pair into a dense array, converts them to the compute type, and gathers from the copy. One head of a 100x152
// pyramid then takes 2.6 MB instead of 20 MB, and the smaller levels stay in L2. If there are few queries, as in a
// decoder, rows are read in place.
//
// An item is one (image, query, head). The L * P samples of an item are first converted to row indices and weights, one
// vector of samples at a time. Then the rows of the samples are accumulated, one vector of channels at a time. A corner
// outside its level refers to a row of zeros, so the inner loop has no branch. Sampled values are never stored.
//
// In the backward pass, one thread owns the gradient of an (image, head) pair, so the sums need neither locks nor
// atomics and are identical in every run. If there are fewer pairs than threads, the queries of each pair are split
// into a few parts. Each part has its own sums, and these sums are added in a fixed order at the end.

#include "common/cpu/simd.h"
#include "deform_attn/cpu_args.h"
#include "deform_attn/cpu_rows.h"
#include "deform_attn/cpu_samples.h"

namespace relops::RELOPS_ISA {

namespace {

// Estimates the time of a forward or backward pass in nanoseconds. `sampled` is the time per vector of a sampled row,
// and `of_value` is the time per vector of value.
template <class T, class U>
double nanoseconds(const MsDeformAttnArgs<T, U>& a, double sampled, double of_value) {
  const double vectors = ceil_div(a.D, kLanes<ComputeType<T>>), items = static_cast<double>(a.N) * a.M;
  return items * (a.Q * a.L * a.P * (4 + 4 * sampled * vectors) + a.S * of_value * vectors);
}

// Returns the number of parts into which the queries of an (image, head) pair are split if every part has its own dense
// rows. If there are at least as many pairs as threads, the number is `enough`, which balances the threads. Otherwise
// it is the smallest number that occupies all threads, but at most 4, which limits memory.
inline int64_t packing_parts(int64_t threads, int64_t pairs, int64_t enough) {
  return threads <= pairs ? enough : std::min<int64_t>(ceil_div(threads, pairs), 4);
}

// Prefetches p[first..first + count). The address is computed as an integer because it may lie outside of any
// allocation. The function is always_inline because GCC sees no side effect in a function that only prefetches and
// would remove calls to it.
template <class X>
[[gnu::always_inline]] inline void prefetch(const X* p, int64_t first, int64_t count) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + first * sizeof(X);
  for (uintptr_t byte = 0; byte < count * sizeof(X); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(address + byte));
}

// Prefetches what the backward pass of item (n, q, m) reads and writes. In memory, the items of all other heads lie
// between consecutive items of a head. Hardware prefetchers do not follow this stride, and an item is too much work for
// out-of-order execution to reach the next item. The item need not exist and its gradients need not be requested,
// because prefetching an invalid address is harmless.
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
  // Tasks of one (n, m) pair are adjacent, so a thread that gets several of them packs the rows once.
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
          locate_samples(constants, a.S, source.mask_for_rows_in_place(n), samples);
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
  // If rows are used in place, a float32 or float64 gradient also serves as the array of sums.
  const bool sums_in_place = std::is_same_v<T, Compute> && !worth_packing(a);
  const int64_t parts = sums_in_place ? 1 : std::min(a.Q, packing_parts(threads, pairs, 1));
  const int64_t sums_size = (a.S + 1) * width;
  Scratch shared;
  // If there are several parts, their sums must outlive the task.
  Compute* part_sums = scatter && parts > 1 ? shared.allocate<Compute>(pairs * parts * sums_size) : nullptr;

  // Adds the sums of all parts in order and writes rows [from, to) of the gradient of (n, m).
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
    Compute* grad = scratch.allocate<Compute>(width);
    Compute* unused_row = scratch.allocate<Compute>(width);  // receives the gradients of corners outside their level
    for (int64_t d = 0; d < width; ++d) grad[d] = unused_row[d] = 0;
    Compute* own_sums = scatter && !sums_in_place && parts == 1 ? scratch.allocate<Compute>(sums_size) : nullptr;
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
          if constexpr (std::is_same_v<std::decay_t<decltype(rows)>, StridedRows<const Compute>>)
            return StridedRows<Compute>{a.grad_value + (n * a.S * a.M + m) * a.D, a.M * a.D, unused_row, a.S};
          else
            return DenseRows<Compute>{dense_sums, width};
        }();
        for (int64_t q = a.Q * part / parts; q < a.Q * (part + 1) / parts; ++q) {
          prefetch_item(a, n, q + 3, m);
          read_samples(a, constants, n, q, m, samples);
          locate_samples(constants, a.S, source.mask_for_rows_in_place(n), samples);
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

// Each instruction set compiles these headers again.
#undef RELOPS_DEFORM_ATTN_SAMPLES
#undef RELOPS_DEFORM_ATTN_ROWS
