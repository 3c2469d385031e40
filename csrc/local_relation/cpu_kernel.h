// local_relation on the CPU: the entry points of its kernels. foreach_isa.h compiles this file once per instruction
// set.
//
// The lanes of a vector are neighboring outputs of a row. Rows of the map are unpacked into lines, which have the
// compute type and zeros on both sides (WindowColumns). A ring buffer of lines holds the rows that the windows of the
// current output row read, so each row of the map is unpacked once per group and then stays in the L1 or L2 cache.
//
// For each vector of outputs, the forward pass writes the logits of all taps to a small buffer and converts them to
// weights there. Then it multiplies the values of up to eight channels by the weights and keeps the sums in registers.
// For each tap and vector of outputs with 8 channels, there are about 13 operations for the exponential, 6 for the
// logit and 8 multiply-adds, each with a load.
//
// The backward pass computes the weights again in the same way, one row of outputs at a time, and stores the weights
// and the gradients of the logits in further ring buffers. As soon as the last output row that reads a row of inputs
// has been processed, the gradients of the keys and values of that row are computed as sums over taps from these
// buffers. For large windows, the buffers would need too much memory. In that case, only the weights of one output row
// are kept, and what this row contributes is added immediately to the sums of all input rows that it reads.

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
