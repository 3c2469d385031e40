// rank_embedding on the CPU: this file computes the powers of the wavelength once and gives each thread a range of
// ranks. The loops are in cpu_kernel.h.

#include "rank_embedding/problem.h"

#define RELOPS_KERNEL "rank_embedding/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

struct Kernels {
  // Returns the frequencies, padded with copies of the last one to whole vectors of any instruction set.
  template <class T, class O>
  static std::vector<double> frequencies(const RankEmbeddingArgs<T, O>& args) {
    std::vector<double> padded(round_up<int64_t>(args.half, 8));
    for (int64_t j = 0; j < static_cast<int64_t>(padded.size()); ++j)
      padded[j] = frequency(args.wavelength, std::min(j, args.half - 1), args.half);
    return padded;
  }

  template <class T, class O, class F>
  static void parallel(const RankEmbeddingArgs<T, O>& args, double nanoseconds_of_vector, F f) {
    const double angles = static_cast<double>(args.count) * args.half;
    for_each_range(args.count, threads_for(nanoseconds_of_vector * vectors_of<double>(angles)), f);
  }

  template <class T, class O>
  static void forward(const char*, const Tensor&, const RankEmbeddingArgs<T, O>& args) {
    const std::vector<double> padded = frequencies(args);
    use_huge_pages(args.output, args.count * 2 * args.half * sizeof(O));
    parallel(args, 7, [&](int64_t begin, int64_t end) {
      RELOPS_CALL_ISA(rank_embedding_forward, args, padded.data(), begin, end);
    });
  }

  template <class T>
  static void backward(const char*, const Tensor&, const RankEmbeddingArgs<T, T>& args) {
    const std::vector<double> padded = frequencies(args);
    parallel(args, 13, [&](int64_t begin, int64_t end) {
      RELOPS_CALL_ISA(rank_embedding_backward, args, padded.data(), begin, end);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_rank_embedding<Kernels>(m); }

}  // namespace relops
