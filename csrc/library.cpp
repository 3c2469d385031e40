// Every schema of relops: the table of contents of the C++ side. Kernels register themselves where they are defined
// (cpu/<op>.cpp, cuda/<op>.cu); checks for users, fakes, autograd and autocast are in relops/ops/<op>.py.
//
// An op with a leading underscore is the backward of the op it is named after. Its *_grad flags say which gradients
// are wanted; one not asked for comes back as an empty tensor of one dimension.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(relops, m) {
  m.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  m.def(
      "_ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor? level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights, bool value_grad, bool sampling_grad, "
      "bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits, Tensor? value_mask=None) -> Tensor");
  m.def(
      "_ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor? level_start_index, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
      "Tensor? value_mask, bool value_grad, bool sampling_grad, bool reference_grad, "
      "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)");
}
