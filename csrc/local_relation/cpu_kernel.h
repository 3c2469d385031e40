// local_relation on the CPU: the entry points of its kernels. foreach_isa.h compiles this file once per instruction
// set.
//
// The lanes of a vector are neighboring outputs of a row. Rows of the map are unpacked into lines, which have the
// compute type and zeros on both sides (WindowColumns). A ring of lines holds what the windows of a row of outputs
// read, so each row is unpacked once per group and then stays in the L1 or L2 cache.
//
// In the forward pass, the logits of all taps of a vector of outputs are written to a small buffer and converted to
// weights there. The weights multiply the values of up to eight channels, whose sums stay in registers. For each tap
// and vector of 8 channels there are about 13 operations for the exponential, 6 for the logit and 8 multiply-adds, each
// with a load.
//
// The backward pass does the same for each row of outputs and stores the weights and the gradients of the logits in
// rings of their own. As soon as the last output row that reads a row of inputs has been processed, the gradients of
// the keys and values of that row are computed as sums over taps from these rings. For large windows the rings would
// need too much memory. In that case, only the weights of one row of outputs are kept, and their contributions are
// added immediately to the sums of all rows of inputs that this row reads.

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

// Each instruction set compiles these headers again.
#undef RELOPS_LOCAL_RELATION_LINES
#undef RELOPS_LOCAL_RELATION_WINDOW
#undef RELOPS_LOCAL_RELATION_FORWARD
#undef RELOPS_LOCAL_RELATION_BACKWARD
