// nms, batched_nms and nms_padded on the CPU: the arguments of the kernel.
#pragma once

#include "suppression/cpu_order.h"
#include "suppression/nms.h"

namespace relops {

template <class Compute>
struct NmsArgs {
  const SharedBox<Compute>* boxes;  // class by class, in each by descending score
  const Range* classes;
  int64_t num_classes;
  Compute threshold;
  int64_t most;   // kept of a class
  uint8_t* kept;  // [boxes]
};

}  // namespace relops
