// local_relation on the CPU: the forward and backward passes, the division of their work among threads, and the
// registration of the ops.
//
// An item is a strip of output rows for some channel groups of one image (LocalRelationItems in cpu_args.h). Threads
// process items one at a time. The operations per tap and vector of outputs limit the speed: about 13 for the
// exponential, 6 for the logit, and one multiply-add with a load per channel. The backward pass takes about three times
// as long as the forward pass. cpu_kernel.h describes both algorithms. Every item writes the gradients of its own
// queries, keys and values. This file adds the partial gradients of the prior in the order of the strips, so the
// results do not depend on the number of threads.

#include <tuple>
#include <vector>

#include "local_relation/cpu_args.h"

#define RELOPS_KERNEL "local_relation/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

struct Kernels {
  // Estimates the time of `times` forward passes on one thread, in nanoseconds.
  template <class T>
  static double nanoseconds(const LocalRelationArgs<T>& a, double times) {
    const double logits = static_cast<double>(a.N) * a.G * a.Ho * a.Wo * a.k * a.k;
    return times * vectors_of<ComputeType<T>>(logits) * (12 + a.m);
  }

  template <class T>
  static void forward(const LocalRelation& r, const LocalRelationArgs<T>& a) {
    const WindowRows rows{a.H, a.Ho, a.k, a.stride, a.dilation};
    const LocalRelationItems items(a, rows);
    dispatch_similarity(r.similarity, [&](auto similarity) {
      RELOPS_CALL_ISA(local_relation_forward<similarity()>, a, rows, items, threads_for(nanoseconds(a, 1)));
    });
  }

  template <class T>
  static void backward(const LocalRelation& r, const LocalRelationArgs<T>& a, const LocalRelationGrads& grads) {
    // If windows may skip pixels, the kernel does not write the gradients of these pixels, so they are set to zero
    // first.
    const bool all_read = a.stride == 1 || (a.dilation == 1 && (a.k + 1) / 2 >= a.stride);
    if (!all_read) {
      torch::stable::fill_(std::get<1>(grads), 0);
      torch::stable::fill_(std::get<2>(grads), 0);
    }
    const WindowRows rows{a.H, a.Ho, a.k, a.stride, a.dilation};
    const LocalRelationItems items(a, rows);
    const int64_t strips = a.N * items.strips, taps = a.G * a.k * a.k;
    std::vector<double> prior(a.grad_prior == nullptr ? 0 : strips * taps);  // [N,strips,G,k,k]
    dispatch_similarity(r.similarity, [&](auto similarity) {
      RELOPS_CALL_ISA(local_relation_backward<similarity()>, a, rows, items, prior.data(),
                      threads_for(nanoseconds(a, 3)));
    });
    if (a.grad_prior == nullptr) return;
    for (int64_t i = 0; i < taps; ++i) {
      double total = 0;
      for (int64_t strip = 0; strip < strips; ++strip) total += prior[strip * taps + i];
      a.grad_prior[i] = static_cast<ComputeType<T>>(total);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_local_relation<Kernels>(m); }

}  // namespace relops
