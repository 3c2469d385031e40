// soft_nms on the CPU: the arguments of the kernel.
#pragma once

#include "suppression/cpu_order.h"
#include "suppression/soft_nms.h"

namespace relops {

struct ClassOfImage {
  int64_t image, begin, end;
};

template <class Compute>
struct SoftNmsArgs {
  Decay<Compute> decay;
  int64_t K;
  const Compute* boxes;     // [B,K,4]
  const Compute* scores;    // [B,K]
  const uint32_t* indices;  // indices of the valid entries, grouped by class; they ascend within each class
  const ClassOfImage* classes;
  int64_t num_classes;
  Compute* decayed;  // [B,K]; must be 0 before the call and stays 0 for entries that are not kept
};

}  // namespace relops
