// local_relation on the CPU: the entry points of its kernels, compiled once per instruction set by foreach_isa.h.
//
// Lanes are neighboring outputs of a row. Rows of the map are unpacked into lines, in the compute type and with zeros
// on both sides (WindowColumns); a ring of lines holds what the windows of a row of outputs reach, so that each row is
// unpacked once per group and then stays in the L1 or L2 cache.
//
// Forward: per vector of outputs, the logits of all taps go into a small buffer, where they become weights, and these
// multiply the values of up to eight channels whose sums stay in registers. Per tap and vector of 8 channels there are
// about 13 operations for the exponential, 6 for the logit and 8 multiply-adds, each of which loads.
//
// Backward: the same per row of outputs, whose weights and gradients of logits go into rings of their own. As soon as
// the last output that reads a row of inputs is done, the gradients of its keys and values are sums over taps from
// these rings. For large windows that would be too much to keep: then only the weights of one row of outputs are kept,
// and added at once to the sums of all rows of inputs that it reads.

#include "common/cpu/simd.h"
#include "local_relation/cpu_args.h"
#include "local_relation/cpu_backward.h"
#include "local_relation/cpu_forward.h"

namespace relops::RELOPS_ISA {

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
                             double* prior_partials, int64_t threads) {
  const WindowColumns columns(a.W, a.Wo, a.k, a.stride, a.dilation, kLanes<ComputeType<T>>);
  for_each_item(items.count, threads, [&] {
    return [worker = LocalRelationBackward<kSimilarity, T>(a, rows, columns, items, prior_partials),
            &items](int64_t i) mutable { worker(items.at(i)); };
  });
}

}  // namespace relops::RELOPS_ISA

// The next instruction set compiles the pieces again.
#undef RELOPS_LOCAL_RELATION_LINES
#undef RELOPS_LOCAL_RELATION_WINDOW
#undef RELOPS_LOCAL_RELATION_FORWARD
#undef RELOPS_LOCAL_RELATION_BACKWARD
