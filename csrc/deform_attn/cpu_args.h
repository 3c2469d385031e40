// The arguments of the CPU kernels of ms_deform_attn and ms_deform_attn_fused.
#pragma once

#include "deform_attn/problem.h"

namespace relops {

// T: features. U: sampling locations and attention weights, or offsets and logits
// where reference is set.
template <class T, class U>
struct MsDeformAttnArgs : MsDeformAttnSizes {
  using Compute = ComputeType<T>;

  const Level* levels;       // [L]
  const T* value;            // [N,S,M,D]
  const U* locations;        // [N,Q,M,L,P,2]
  const U* weights;          // [N,Q,M,L,P]
  const Compute* reference;  // [N,Q,L,R], null when not fused
  const bool* mask;          // [N,S], null: nothing is masked

  T* output;  // [N,Q,M,D]; forward only

  const T* grad_output;     // [N,Q,M,D]; from here on backward only
  T* grad_value;            // [N,S,M,D], null where not wanted, like the rest
  U* grad_locations;        // [N,Q,M,L,P,2]
  U* grad_weights;          // [N,Q,M,L,P]
  Compute* grad_reference;  // [N,M,Q,L,R]: a share per head
};

}  // namespace relops
