// box_iou and generalized_box_iou on the CPU: this file allocates the results, divides the work among threads and adds
// up the partial gradients. The loops are in cpu_kernel.h.
//
// The IoU must be bitwise identical in every lane and on every device, so the compiler must not fuse multiplications
// with additions.
#pragma GCC optimize("fp-contract=off")

#include "box_iou/cpu_args.h"

#define RELOPS_KERNEL "box_iou/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

struct Kernels {
  static void forward(const BoxPairs& p, const Tensor& output) {
    p.dispatch([&](auto c) {
      using Compute = typename decltype(c)::type;
      const BoxIouForward<Compute> args{p.N,
                                        p.A,
                                        p.B,
                                        static_cast<const Compute*>(p.a.const_data_ptr()),
                                        static_cast<const Compute*>(p.b.const_data_ptr()),
                                        static_cast<Compute*>(output.mutable_data_ptr())};
      use_huge_pages(args.output, output.numel() * sizeof(Compute));
      const double work = (p.generalized ? 8.0 : 5.0) * vectors_of<Compute>(output.numel());
      RELOPS_CALL_ISA(box_iou_forward, args, p.generalized, threads_for(work));
    });
  }

  // The gradient of one input sums over the boxes of the other input, which are divided into tiles. Each tile yields a
  // partial gradient. The partial gradients are added up in the order of the tiles, so the result is always
  // deterministic.
  template <class Compute>
  static void backward(const BoxPairs& pairs, const BoxIouGradient<Compute>& p) {
    const int64_t size = p.N * p.own_count * 4, tiles = ceil_div(p.other_count, kBoxTile);
    if (tiles == 0) {
      std::fill_n(p.result, size, Compute(0));
      return;
    }
    const Tensor memory = torch::stable::new_empty(pairs.a, {tiles > 1 ? tiles : 0, size});
    Compute* const partials = tiles > 1 ? static_cast<Compute*>(memory.mutable_data_ptr()) : p.result;
    const double work = (p.generalized ? 17.0 : 13.0) * vectors_of<Compute>(size / 4.0 * p.other_count);
    RELOPS_CALL_ISA(box_iou_backward, p, partials, threads_for(work));
    if (tiles == 1) return;
    for_each_range(size, threads_for(vectors_of<Compute>(static_cast<double>(tiles) * size)),
                   [&](int64_t begin, int64_t end) {
                     std::copy(partials + begin, partials + end, p.result + begin);
                     for (int64_t tile = 1; tile < tiles; ++tile)
                       for (int64_t i = begin; i < end; ++i) p.result[i] += partials[tile * size + i];
                   });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { register_box_iou<Kernels>(m); }

}  // namespace relops
