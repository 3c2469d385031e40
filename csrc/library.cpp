// The schema of every op of relops: the table of contents of the C++ code. Kernels are registered where they are
// defined (<family>/cpu*.cpp, <family>/cuda*.cu). The argument checks that raise errors for users, the fake kernels,
// autograd and autocast are in relops/ops/<op>.py.
//
// An op whose name begins with an underscore computes the gradients of the op that it is named after. If such an op
// returns several gradients, needs_grad has one flag per gradient, in the same order. For a list of gradients,
// needs_grad has one flag per element. A gradient that is not needed is returned as an empty tensor of one dimension.
// The backward ops of region ops get the input features only if a gradient depends on them, as the gradient of the
// boxes and the gradient of roi_pool do.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(relops, m) {
  m.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  m.def(
      "_ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor? level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights, bool deterministic, bool[] needs_grad) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits, Tensor? value_mask=None) -> Tensor");
  m.def(
      "_ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor? level_start_index, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
      "Tensor? value_mask, bool deterministic, bool[] needs_grad) -> (Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "roi_align(Tensor input, Tensor boxes, int[2] output_size, float spatial_scale=1.0, int sampling_ratio=-1, "
      "bool aligned=False) -> Tensor");
  m.def(
      "_roi_align_backward(Tensor grad_output, Tensor? input, Tensor boxes, SymInt[] input_shape, "
      "float spatial_scale, int sampling_ratio, bool aligned, bool channels_last, bool[] needs_grad) -> "
      "(Tensor, Tensor)");
  m.def("roi_pool(Tensor input, Tensor boxes, int[2] output_size, float spatial_scale=1.0) -> Tensor");
  m.def(
      "_roi_pool_backward(Tensor grad_output, Tensor input, Tensor boxes, Tensor output, "
      "float spatial_scale) -> Tensor");
  m.def(
      "ps_roi_align(Tensor input, Tensor boxes, int[2] output_size, float spatial_scale=1.0, "
      "int sampling_ratio=-1) -> Tensor");
  m.def(
      "_ps_roi_align_backward(Tensor grad_output, Tensor? input, Tensor boxes, SymInt[] input_shape, "
      "float spatial_scale, int sampling_ratio, bool channels_last, bool[] needs_grad) -> (Tensor, Tensor)");
  m.def("ps_roi_pool(Tensor input, Tensor boxes, int[2] output_size, float spatial_scale=1.0) -> Tensor");
  m.def(
      "_ps_roi_pool_backward(Tensor grad_output, Tensor boxes, SymInt[] input_shape, float spatial_scale, "
      "bool channels_last) -> Tensor");
  m.def("prroi_pool(Tensor input, Tensor boxes, int[2] output_size, float spatial_scale=1.0) -> Tensor");
  m.def(
      "_prroi_pool_backward(Tensor grad_output, Tensor? input, Tensor boxes, SymInt[] input_shape, "
      "float spatial_scale, bool channels_last, bool[] needs_grad) -> (Tensor, Tensor)");
  m.def(
      "multi_scale_roi_align(Tensor[] inputs, Tensor boxes, int[2] output_size, float[] spatial_scales, "
      "int sampling_ratio=2, bool aligned=False, float canonical_box_size=224.0, int canonical_level=4) -> Tensor");
  m.def(
      "_multi_scale_roi_align_backward(Tensor grad_output, Tensor[] inputs, Tensor boxes, SymInt[] input_shape, "
      "float[] spatial_scales, int sampling_ratio, bool aligned, float canonical_box_size, int canonical_level, "
      "bool channels_last, bool[] needs_grad) -> (Tensor[], Tensor)");

  m.def(
      "relation_attention(Tensor query, Tensor key, Tensor value, Tensor query_boxes, Tensor key_boxes, "
      "Tensor geometry_weight, Tensor? geometry_bias, Tensor? key_mask, str geometry, float wavelength, float? scale, "
      "bool allow_tf32) -> (Tensor, Tensor)");
  m.def(
      "_relation_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor query_boxes, "
      "Tensor key_boxes, Tensor geometry_weight, Tensor? geometry_bias, Tensor? key_mask, Tensor output, "
      "Tensor logsumexp, str geometry, float wavelength, float? scale, bool allow_tf32, bool[] needs_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("rank_embedding(Tensor ranks, SymInt dim, float wavelength) -> Tensor");
  m.def("_rank_embedding_backward(Tensor grad_output, Tensor ranks, float wavelength) -> Tensor");

  m.def(
      "local_relation(Tensor query, Tensor key, Tensor value, Tensor? prior, int kernel_size, int stride, "
      "int dilation, str similarity, str border) -> Tensor");
  m.def(
      "_local_relation_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? prior, "
      "int kernel_size, int stride, int dilation, str similarity, str border, bool[] needs_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, Tensor? mask, bool allow_tf32) -> Tensor");
  m.def(
      "_deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, int[2] stride, "
      "int[2] padding, int[2] dilation, Tensor? mask, bool allow_tf32, bool deterministic, bool[] needs_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "linear_sum_assignment(Tensor cost, Tensor? num_rows=None, Tensor? num_cols=None, bool maximize=False) -> "
      "(Tensor, Tensor)");
  m.def("box_iou(Tensor a, Tensor b) -> Tensor");
  m.def("_box_iou_backward(Tensor grad_output, Tensor a, Tensor b, bool[] needs_grad) -> (Tensor, Tensor)");
  m.def("generalized_box_iou(Tensor a, Tensor b) -> Tensor");
  m.def("_generalized_box_iou_backward(Tensor grad_output, Tensor a, Tensor b, bool[] needs_grad) -> (Tensor, Tensor)");

  m.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
  m.def("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor");
  m.def(
      "nms_padded(Tensor boxes, Tensor scores, float iou_threshold, SymInt max_output, Tensor? idxs=None, "
      "float? score_threshold=None) -> (Tensor, Tensor)");
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, str method=\"gaussian\", float iou_threshold=0.3, float sigma=0.5, "
      "float score_threshold=1e-3, Tensor? idxs=None) -> (Tensor, Tensor)");
}
