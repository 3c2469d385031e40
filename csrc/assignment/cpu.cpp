// linear_sum_assignment on the CPU. This file checks the sizes, allocates the results and registers the op. Each thread
// solves one problem at a time. cpu_kernel.h contains the search and explains what limits the speed.

#include <stdexcept>
#include <string>

#include "assignment/cpu_args.h"

#define RELOPS_KERNEL "assignment/cpu_kernel.h"
#include "common/cpu/foreach_isa.h"

namespace relops {

namespace {

void check_sizes(const char* name, const char* letter, const int64_t* sizes, int64_t B, int64_t limit) {
  for (int64_t b = 0; sizes != nullptr && b < B; ++b)
    if (sizes[b] < 0 || sizes[b] > limit)
      throw std::invalid_argument(std::string(kAssignmentOp) + ": " + name + " must be in [0," + letter + "] = [0," +
                                  std::to_string(limit) + "], got " + std::to_string(sizes[b]) + " for problem " +
                                  std::to_string(b));
}

std::tuple<Tensor, Tensor> linear_sum_assignment(const Tensor& cost, const std::optional<Tensor>& num_rows,
                                                 const std::optional<Tensor>& num_cols, bool maximize) {
  const AssignmentProblems p(cost, num_rows, num_cols);
  check_sizes("num_rows", "R", sizes_or_null(p.num_rows), p.B, p.R);
  check_sizes("num_cols", "C", sizes_or_null(p.num_cols), p.B, p.C);
  Tensor row_to_col = p.new_output(p.R), col_to_row = p.new_output(p.C);
  dispatch_features(kAssignmentOp, p.cost.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    AssignmentArgs<T> args{p.B,
                           p.R,
                           p.C,
                           static_cast<const T*>(p.cost.const_data_ptr()),
                           sizes_or_null(p.num_rows),
                           sizes_or_null(p.num_cols),
                           maximize,
                           static_cast<int64_t*>(row_to_col.mutable_data_ptr()),
                           static_cast<int64_t*>(col_to_row.mutable_data_ptr())};
    // The search scans more rows if the cost matrix is nearly square.
    const double n = std::min(p.R, p.C), m = std::max(p.R, p.C);
    const double scans = n * (1 + 10 * n / m), work = p.B * scans * (30 + 2.5 * vectors_of<double>(m));
    RELOPS_CALL_ISA(linear_sum_assignment, args, threads_for(work));
  });
  return {row_to_col, col_to_row};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(relops, CPU, m) { m.impl("linear_sum_assignment", TORCH_BOX(&linear_sum_assignment)); }

}  // namespace relops
