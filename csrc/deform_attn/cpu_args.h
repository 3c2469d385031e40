// The arguments of the CPU kernels of ms_deform_attn and ms_deform_attn_fused.
#pragma once

#include "deform_attn/problem.h"

namespace relops {

// T is the type of the features. U is the type of the sampling locations and attention weights or, if `reference` is
// set, of the sampling offsets and attention logits.
template <class T, class U>
struct MsDeformAttnArgs : MsDeformAttnSizes {
  using Compute = ComputeType<T>;

  const Level* levels;       // [L]
  const T* value;            // [N,S,M,D]
  const U* locations;        // [N,Q,M,L,P,2]
  const U* weights;          // [N,Q,M,L,P]
  const Compute* reference;  // [N,Q,L,R]; null if not fused
  const bool* mask;          // [N,S]; null if nothing is masked

  T* output;  // [N,Q,M,D]; only for the forward pass

  const T* grad_output;     // [N,Q,M,D]; this and the following are only for the backward pass
  T* grad_value;            // [N,S,M,D]; this and the following gradients are null if not needed
  U* grad_locations;        // [N,Q,M,L,P,2]
  U* grad_weights;          // [N,Q,M,L,P]
  Compute* grad_reference;  // [N,M,Q,L,R]: one partial sum per head
};

}  // namespace relops
