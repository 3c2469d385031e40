// box_iou and generalized_box_iou on the CPU: the arguments of the kernels, and how pairs are divided into work items.
#pragma once

#include <algorithm>
#include <cstdint>

#include "box_iou/problem.h"

namespace relops {

// The largest number of boxes in a tile. A tile is stored as one array per coordinate and one for the areas: 20 KB in
// float32. The number is a constant, because gradients are summed tile by tile and the order of summation must not
// vary.
constexpr int64_t kBoxTile = 1024;
constexpr int64_t kPairsPerItem = 32768;

// Divides N matrices of A x B pairs into work items. Each item consists of some rows and at most kBoxTile columns of a
// matrix.
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

  int64_t count() const { return row_tiles * column_tiles; }  // items per matrix

  Item at(int64_t item) const {
    const int64_t column = item % column_tiles * kBoxTile, row = item / column_tiles % row_tiles * rows;
    return {item / count(), row, std::min(A, row + rows), column, std::min(kBoxTile, B - column)};
  }

  int64_t A, B, rows, row_tiles, column_tiles;
};

template <class Compute>
struct BoxIouForward {
  int64_t N, A, B;
  const Compute *a, *b;
  Compute* output;
};

}  // namespace relops
