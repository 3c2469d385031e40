// linear_sum_assignment: what both devices share, so that they take the same steps to the same assignment.
//
// A problem of n rows and m columns has n <= m: where it has more rows than columns, these change places. The search
// is that of Jonker and Volgenant (1987), for rectangular problems as Crouse (2016) has it. Columns have prices v <= 0,
// and a column without a row has the price 0. First rows take their cheapest columns, one after the other, lowering
// the price of a column to where the row's second choice would be as good, and so displacing one another. Each row that
// is then without a column gets one by a shortest augmenting path (Dijkstra). Everything is float64, and nothing is
// multiplied in the search, so that there is nothing to fuse and both devices round alike.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>

#include "common/host_device.h"
#include "common/tensors.h"

namespace relops {

constexpr const char* kAssignmentOp = "relops.linear_sum_assignment";
constexpr int kBidsPerRow = 4;

// The argument checks that keep the kernels inside their tensors, and dense tensors. Errors meant for people are raised
// by relops/ops/linear_sum_assignment.py.
struct AssignmentProblems {
  AssignmentProblems(const Tensor& cost_, const std::optional<Tensor>& num_rows_,
                     const std::optional<Tensor>& num_cols_)
      : cost(dense(cost_)), num_rows(dense(num_rows_)), num_cols(dense(num_cols_)) {
    STD_TORCH_CHECK(cost.dim() == 2 || cost.dim() == 3, kAssignmentOp, ": cost must be [B,R,C] or [R,C]");
    B = cost.dim() == 3 ? cost.size(0) : 1;
    R = cost.size(-2);
    C = cost.size(-1);
    STD_TORCH_CHECK(R < 1 << 30 && C < 1 << 30, kAssignmentOp, ": more than 2^30 rows or columns");
    for (const std::optional<Tensor>& sizes : {num_rows, num_cols}) {
      if (!sizes) continue;
      STD_TORCH_CHECK(sizes->scalar_type() == ScalarType::Long, kAssignmentOp, ": num_rows and num_cols must be int64");
      STD_TORCH_CHECK(sizes->device() == cost.device(), kAssignmentOp, ": tensors on several devices");
      STD_TORCH_CHECK(sizes->dim() <= 1 && sizes->numel() == B, kAssignmentOp, ": num_rows and num_cols must be [B]");
    }
  }

  // Of row_to_col, or of col_to_row.
  Tensor new_output(int64_t size) const {
    return cost.dim() == 3 ? torch::stable::new_empty(cost, {B, size}, ScalarType::Long)
                           : torch::stable::new_empty(cost, {size}, ScalarType::Long);
  }

  Tensor cost;
  std::optional<Tensor> num_rows, num_cols;
  int64_t B, R, C;
};

inline const int64_t* sizes_or_null(const std::optional<Tensor>& sizes) {
  return sizes ? static_cast<const int64_t*>(sizes->const_data_ptr()) : nullptr;
}

// Costs as the search sees them: times `scale`, where otherwise sums of them would overflow, and `forbidden` for pairs
// that are. That is more than the costs of all n rows can differ by, so that as few forbidden pairs as possible are
// taken; a power of two, so that it is exact in any dtype that has the range.
struct CostScale {
  double scale, forbidden;
};

// `largest`: of the magnitudes of permitted costs.
RELOPS_HOST_DEVICE inline CostScale cost_scale(double largest, int n) {
  const double scale = largest > 0x1p900 ? 0x1p-200 : 1.0;
  int exponent, more;
  frexp(largest * scale, &exponent);
  frexp(2.0 * n + 3.0, &more);
  return {scale, ldexp(1.0, exponent + more)};
}

// The lowest cost minus price of a row, its column, the row of that column or -1, and the second lowest. Where they are
// equal, the column is the first one of them that has no row, if there is one.
struct Lowest {
  double first, second;
  int column, row;
};

// The nearest column that is not settled yet, and its row or -1. Of equally near ones, the first one without a row, if
// there is one; else the first one.
struct Nearest {
  double distance;
  int column, row;
};

// Search has the costs of a problem and its state, and does what touches all columns:
//
//   has_column(i)                         whether row i has one
//   lowest(i)                             of row i
//   assign(i, lowest)                     gives row i that column, takes it from its row, lowers its price by
//                                         second - first
//   bids_done()                           between the last assign and the first has_column
//   start(i)                              distances from row i, and the nearest column
//   extend(nearest)                       settles that column and relaxes distances by its row; the nearest column then
//   finish(i, nearest)                    prices of the columns settled; exchanges columns along the path from row i
//
// On CUDA all threads of a block take the same way through here.
template <class Search>
RELOPS_HOST_DEVICE void assign_rows(Search& search, int n, int m) {
  // Rows may outbid one another for long, by less and less: then the paths are quicker.
  int64_t bids = m == 1 ? 0 : int64_t{kBidsPerRow} * n;
  for (int i = 0; i < n; ++i)
    for (int row = i; row >= 0 && bids > 0; --bids) {
      const Lowest lowest = search.lowest(row);
      if (lowest.second == lowest.first && lowest.row >= 0)
        break;  // it would displace a row without lowering the price
      search.assign(row, lowest);
      row = lowest.row;
    }
  search.bids_done();
  for (int i = 0; i < n; ++i) {
    if (search.has_column(i)) continue;
    Nearest nearest = search.start(i);
    while (nearest.row >= 0) nearest = search.extend(nearest);
    search.finish(i, nearest);
  }
}

}  // namespace relops
