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
  const uint32_t* indices;  // of the entries that count, class by class, in each ascending
  const ClassOfImage* classes;
  int64_t num_classes;
  Compute* decayed;  // [B,K]; 0 at first, and where an entry is not kept
};

}  // namespace relops
