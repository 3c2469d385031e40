// nms, batched_nms and nms_padded on the CPU: the arguments of the kernel.
#pragma once

#include "suppression/cpu_order.h"
#include "suppression/nms.h"

namespace relops {

template <class Compute>
struct NmsArgs {
  const BoundedBox<Compute>* boxes;  // sorted by class, then by descending score
  const Range* classes;
  int64_t num_classes;
  Compute threshold;
  int64_t max_kept;  // per class
  uint8_t* kept;     // 1 for each box that is kept
};

}  // namespace relops
