// linear_sum_assignment on the CPU: the arguments of the kernel.
#pragma once

#include "assignment/problem.h"

namespace relops {

// T is the type of the costs.
template <class T>
struct AssignmentArgs {
  int64_t B, R, C;
  const T* cost;            // [B,R,C]
  const int64_t* num_rows;  // [B]; null: all rows
  const int64_t* num_cols;  // [B]; null: all columns
  bool maximize;
  int64_t* row_to_col;  // [B,R]
  int64_t* col_to_row;  // [B,C]
};

}  // namespace relops
