// IoU is to be the same bit for bit in every lane and on every device: no multiplication fused with an addition.
#pragma GCC optimize("fp-contract=off")

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "box_iou/problem.h"
#include "common/cpu/work.h"

namespace relops {

// Boxes that a work item holds coordinate by coordinate: 20 KB of float32. Fixed, because gradients are summed tile by
// tile.
constexpr int64_t kBoxTile = 1024;
constexpr int64_t kPairsPerItem = 32768;

// Divides N matrices of A x B pairs into work items: some rows of a tile of columns.
struct BoxTiling {
  struct Item {
    int64_t n, row_begin, row_end, column, columns;
  };

  BoxTiling(int64_t A, int64_t B)
      : A(A),
        B(B),
        rows(std::max<int64_t>(1, kPairsPerItem / std::clamp<int64_t>(B, 1, kBoxTile))),
        row_tiles(ceil_div(A, rows)),
        column_tiles(ceil_div(B, kBoxTile)) {}

  int64_t count() const { return row_tiles * column_tiles; }  // of each matrix

  Item at(int64_t item) const {
    const int64_t column = item % column_tiles * kBoxTile, row = item / column_tiles % row_tiles * rows;
    return {item / count(), row, std::min(A, row + rows), column, std::min(kBoxTile, B - column)};
  }

  int64_t A, B, rows, row_tiles, column_tiles;
};

template <class C>
struct BoxIouForward {
  int64_t N, A, B;
  const C *a, *b;
  C* output;
};

}  // namespace relops

#define RELOPS_KERNEL "box_iou/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

struct Kernels {
  static void forward(const BoxPairs& p, const Tensor& output) {
    p.dispatch([&](auto c) {
      using C = typename decltype(c)::type;
      const BoxIouForward<C> args{p.N,
                                  p.A,
                                  p.B,
                                  static_cast<const C*>(p.a.const_data_ptr()),
                                  static_cast<const C*>(p.b.const_data_ptr()),
                                  static_cast<C*>(output.mutable_data_ptr())};
      use_huge_pages(args.output, output.numel() * sizeof(C));
      const double work = (p.generalized ? 8.0 : 5.0) * vectors_of<C>(output.numel());
      RELOPS_CALL_ISA(box_iou_forward, args, p.generalized, threads_for(work));
    });
  }

  // Every tile of the other side gives its share, and shares are summed in their order: always deterministic.
  template <class C>
  static void backward(const BoxPairs& pairs, const BoxIouGradient<C>& p) {
    const int64_t size = p.N * p.own_count * 4, tiles = ceil_div(p.other_count, kBoxTile);
    if (tiles == 0) {
      std::fill_n(p.result, size, C(0));
      return;
    }
    const Tensor memory = torch::stable::new_empty(pairs.a, {tiles > 1 ? tiles : 0, size});
    C* const shares = tiles > 1 ? static_cast<C*>(memory.mutable_data_ptr()) : p.result;
    const double work = (p.generalized ? 17.0 : 13.0) * vectors_of<C>(size / 4.0 * p.other_count);
    RELOPS_CALL_ISA(box_iou_backward, p, shares, threads_for(work));
    if (tiles == 1) return;
    for_each_range(size, threads_for(vectors_of<C>(static_cast<double>(tiles) * size)),
                   [&](int64_t begin, int64_t end) {
                     std::copy(shares + begin, shares + end, p.result + begin);
                     for (int64_t tile = 1; tile < tiles; ++tile)
                       for (int64_t i = begin; i < end; ++i) p.result[i] += shares[tile * size + i];
                   });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { RELOPS_BOX_IOU_IMPL(m, BoxIouOps<Kernels>); }

}  // namespace relops
