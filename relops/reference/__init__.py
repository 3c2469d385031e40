"""Pure-PyTorch implementations of the ops, called twins, which are written to be easy to read.

The tests compare the ops with their twins, and the benchmarks use the twins as a baseline. The twins share no code with
the ops, so an error in the code of an op cannot affect its twin.

The attribute `relops.reference.<op>` is the function, not the module of the same name. Import other names of the module
with `from relops.reference.<op> import <name>`.
"""

from relops.reference.batched_nms import batched_nms
from relops.reference.box_iou import box_iou
from relops.reference.deform_conv2d import deform_conv2d
from relops.reference.generalized_box_iou import generalized_box_iou
from relops.reference.linear_sum_assignment import linear_sum_assignment
from relops.reference.local_relation import local_relation
from relops.reference.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from relops.reference.multi_scale_roi_align import multi_scale_roi_align
from relops.reference.nms import nms
from relops.reference.nms_padded import nms_padded
from relops.reference.prroi_pool import prroi_pool
from relops.reference.ps_roi_align import ps_roi_align
from relops.reference.ps_roi_pool import ps_roi_pool
from relops.reference.rank_embedding import rank_embedding
from relops.reference.relation_attention import relation_attention
from relops.reference.roi_align import roi_align
from relops.reference.roi_pool import roi_pool
from relops.reference.soft_nms import soft_nms

__all__ = [
    "batched_nms",
    "box_iou",
    "deform_conv2d",
    "generalized_box_iou",
    "linear_sum_assignment",
    "local_relation",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "multi_scale_roi_align",
    "nms",
    "nms_padded",
    "prroi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "rank_embedding",
    "relation_attention",
    "roi_align",
    "roi_pool",
    "soft_nms",
]
