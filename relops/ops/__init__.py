"""The public ops. The file of an op contains its checks, fake kernels, autograd, autocast and vmap.

The attribute `relops.ops.<op>` is the function, not the module of the same name. Import other names of the module with
`from relops.ops.<op> import <name>`.
"""

from relops.ops.batched_nms import batched_nms
from relops.ops.box_iou import box_iou
from relops.ops.deform_conv2d import deform_conv2d
from relops.ops.generalized_box_iou import generalized_box_iou
from relops.ops.linear_sum_assignment import linear_sum_assignment
from relops.ops.local_relation import local_relation
from relops.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from relops.ops.multi_scale_roi_align import multi_scale_roi_align
from relops.ops.nms import nms
from relops.ops.nms_padded import nms_padded
from relops.ops.prroi_pool import prroi_pool
from relops.ops.ps_roi_align import ps_roi_align
from relops.ops.ps_roi_pool import ps_roi_pool
from relops.ops.rank_embedding import rank_embedding
from relops.ops.relation_attention import relation_attention
from relops.ops.roi_align import roi_align
from relops.ops.roi_pool import roi_pool
from relops.ops.soft_nms import soft_nms

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
