// linear_sum_assignment: the code that CPU and CUDA have in common. The kernels of both devices perform the same steps
// and return the same assignment.
//
// A problem has n rows and m columns with n <= m. If the costs have more rows than columns, rows and columns are
// exchanged. The search is the algorithm of Jonker and Volgenant (1987), which Crouse (2016) describes for rectangular
// problems. Columns have prices v <= 0, and a column without a row has price 0. First, the rows bid for their cheapest
// columns one after another. A row that bids for a column lowers the price of this column until the row's second choice
// is equally good, and displaces the row that had the column before. Then each row that has no column gets a column
// through a shortest augmenting path (Dijkstra). Prices and distances are float64. The search has no multiplications
// that a compiler could fuse with additions, so both devices round identically.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>

#include "common/host_device.h"
#include "common/tensors.h"

namespace relops {

constexpr const char* kAssignmentOp = "relops.linear_sum_assignment";
constexpr int kBidsPerRow = 4;

// The inputs, checked and dense. The checks keep the kernels from accessing memory outside of these tensors;
// relops/ops/linear_sum_assignment.py raises the errors that are meant for users.
struct AssignmentProblems {
  AssignmentProblems(const Tensor& cost_, const std::optional<Tensor>& num_rows_,
                     const std::optional<Tensor>& num_cols_)
      : cost(dense(cost_)), num_rows(dense(num_rows_)), num_cols(dense(num_cols_)) {
    STD_TORCH_CHECK(cost.dim() == 2 || cost.dim() == 3, kAssignmentOp, ": cost must be [B,R,C] or [R,C]");
    B = cost.dim() == 3 ? cost.size(0) : 1;
    R = cost.size(-2);
    C = cost.size(-1);
    STD_TORCH_CHECK(R < 1 << 30 && C < 1 << 30, kAssignmentOp, ": cost must have fewer than 2^30 rows and columns");
    for (const std::optional<Tensor>& sizes : {num_rows, num_cols}) {
      if (!sizes) continue;
      STD_TORCH_CHECK(sizes->scalar_type() == ScalarType::Long, kAssignmentOp, ": num_rows and num_cols must be int64");
      STD_TORCH_CHECK(sizes->device() == cost.device(), kAssignmentOp,
                      ": num_rows and num_cols must be on the device of cost");
      STD_TORCH_CHECK(sizes->dim() <= 1 && sizes->numel() == B, kAssignmentOp, ": num_rows and num_cols must be [B]");
    }
  }

  // Returns a new tensor for row_to_col or col_to_row.
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

// How costs are converted for the search. Costs are multiplied by `scale` so that their sums do not overflow.
// `forbidden` is the cost of a forbidden pair. It exceeds the difference between the total costs of any two assignments
// without forbidden pairs, so the search selects as few forbidden pairs as possible. `forbidden` is a power of two and
// therefore exact in any dtype with sufficient range.
struct CostScale {
  double scale, forbidden;
};

// Returns the scale for n rows of costs. max_magnitude is the largest magnitude of all costs that are not forbidden.
RELOPS_HOST_DEVICE inline CostScale cost_scale(double max_magnitude, int n) {
  const double scale = max_magnitude > 0x1p900 ? 0x1p-200 : 1.0;
  int exponent, n_exponent;
  frexp(max_magnitude * scale, &exponent);
  frexp(2.0 * n + 3.0, &n_exponent);
  return {scale, ldexp(1.0, exponent + n_exponent)};
}

// The lowest and the second lowest value of cost minus price in a row, the column of the lowest value, and the row of
// this column or -1. Ties go to the first column without a row, or to the first column if all have rows.
struct Lowest {
  double first, second;
  int column, row;
};

// The nearest column that is not settled yet, its distance, and its row or -1. Ties go to the first column without a
// row, or to the first column if all have rows.
struct Nearest {
  double distance;
  int column, row;
};

// Assigns a column to every row. Search holds the costs and the state of a problem and implements the steps that access
// all columns:
//
//   has_column(i)       returns whether row i has a column
//   lowest(i)           returns the lowest values of row i
//   assign(i, lowest)   assigns the lowest column to row i, removes it from its previous row, and lowers its price by
//                       second - first
//   bids_done()         is called between the last assign and the first has_column
//   start(i)            computes the distances from row i and returns the nearest column
//   extend(nearest)     settles this column, relaxes the distances with its row, and returns the next nearest column
//   finish(i, nearest)  updates the prices of the settled columns and exchanges columns along the path from row i
//
// On CUDA, all threads of a block follow the same path through this function.
template <class Search>
RELOPS_HOST_DEVICE void assign_rows(Search& search, int n, int m) {
  // Rows may outbid one another for a long time by ever smaller amounts. Augmenting paths are faster in that case, so
  // the number of bids is limited.
  int64_t bids = m == 1 ? 0 : int64_t{kBidsPerRow} * n;
  for (int i = 0; i < n; ++i)
    for (int row = i; row >= 0 && bids > 0; --bids) {
      const Lowest lowest = search.lowest(row);
      if (lowest.second == lowest.first && lowest.row >= 0)
        break;  // the bid would displace a row without lowering the price
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
