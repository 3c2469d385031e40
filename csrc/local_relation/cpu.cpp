// local_relation on the CPU.

#include <tuple>
#include <vector>

#include "local_relation/cpu_args.h"

#define RELOPS_KERNEL "local_relation/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

struct Kernels {
  // The work of a forward, or of so many.
  template <class T>
  static double nanoseconds(const LocalRelationArgs<T>& a, double times) {
    const double logits = static_cast<double>(a.N) * a.G * a.Ho * a.Wo * a.k * a.k;
    return times * vectors_of<ComputeType<T>>(logits) * (12 + a.m);
  }

  template <Similarity kSimilarity, class T>
  static void forward(const LocalRelation&, const LocalRelationArgs<T>& a) {
    const WindowRows rows{a.H, a.Ho, a.k, a.stride, a.dilation};
    const LocalRelationItems items(a, rows);
    RELOPS_CALL_ISA(local_relation_forward<kSimilarity>, a, rows, items, threads_for(nanoseconds(a, 1)));
  }

  template <Similarity kSimilarity, class T>
  static void backward(const LocalRelation&, const LocalRelationArgs<T>& a, const LocalRelationGrads& grads) {
    // Where windows may leave pixels out, the kernel does not write their gradients.
    const bool all_read = a.stride == 1 || (a.dilation == 1 && (a.k + 1) / 2 >= a.stride);
    if (!all_read) {
      torch::stable::fill_(std::get<1>(grads), 0);
      torch::stable::fill_(std::get<2>(grads), 0);
    }
    const WindowRows rows{a.H, a.Ho, a.k, a.stride, a.dilation};
    const LocalRelationItems items(a, rows);
    const int64_t shares = a.N * items.strips, taps = a.G * a.k * a.k;
    std::vector<double> prior(a.grad_prior == nullptr ? 0 : shares * taps);  // [N,strips,G,k,k]
    RELOPS_CALL_ISA(local_relation_backward<kSimilarity>, a, rows, items, prior.data(), threads_for(nanoseconds(a, 3)));
    if (a.grad_prior == nullptr) return;
    for (int64_t i = 0; i < taps; ++i) {
      double total = 0;
      for (int64_t share = 0; share < shares; ++share) total += prior[share * taps + i];
      a.grad_prior[i] = static_cast<ComputeType<T>>(total);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { RELOPS_LOCAL_RELATION_IMPL(m, LocalRelationOps<Kernels>); }

}  // namespace relops
