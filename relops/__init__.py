"""C++ and CUDA operators for region- and relation-based object detection, as torch ops with autograd."""

from relops import _library

_library.load()

from relops import models, nn, ops, reference  # noqa: E402  (these modules need the loaded ops)
from relops.ops import (  # noqa: E402
    batched_nms,
    box_iou,
    deform_conv2d,
    generalized_box_iou,
    linear_sum_assignment,
    local_relation,
    ms_deform_attn,
    ms_deform_attn_fused,
    multi_scale_roi_align,
    nms,
    nms_padded,
    prroi_pool,
    ps_roi_align,
    ps_roi_pool,
    rank_embedding,
    relation_attention,
    roi_align,
    roi_pool,
    soft_nms,
)

__version__: str = _library.build_info()["version"]

__all__ = [
    "batched_nms",
    "box_iou",
    "deform_conv2d",
    "generalized_box_iou",
    "linear_sum_assignment",
    "local_relation",
    "models",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "multi_scale_roi_align",
    "nms",
    "nms_padded",
    "nn",
    "ops",
    "prroi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "rank_embedding",
    "reference",
    "relation_attention",
    "roi_align",
    "roi_pool",
    "soft_nms",
]
