"""relops: C++/CUDA operators for region- and relation-based object detection, as autograd-aware torch ops."""

from relops import _library

_library.load()

from relops import models, nn  # noqa: E402  (the ops must be loaded before anything that uses them)
from relops.ops.batched_nms import batched_nms  # noqa: E402
from relops.ops.box_iou import box_iou  # noqa: E402
from relops.ops.generalized_box_iou import generalized_box_iou  # noqa: E402
from relops.ops.linear_sum_assignment import linear_sum_assignment  # noqa: E402
from relops.ops.local_relation import local_relation  # noqa: E402
from relops.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused  # noqa: E402
from relops.ops.multi_scale_roi_align import multi_scale_roi_align  # noqa: E402
from relops.ops.nms import nms  # noqa: E402
from relops.ops.nms_padded import nms_padded  # noqa: E402
from relops.ops.prroi_pool import prroi_pool  # noqa: E402
from relops.ops.ps_roi_align import ps_roi_align  # noqa: E402
from relops.ops.ps_roi_pool import ps_roi_pool  # noqa: E402
from relops.ops.rank_embedding import rank_embedding  # noqa: E402
from relops.ops.relation_attention import relation_attention  # noqa: E402
from relops.ops.roi_align import roi_align  # noqa: E402
from relops.ops.roi_pool import roi_pool  # noqa: E402
from relops.ops.soft_nms import soft_nms  # noqa: E402

__version__: str = _library.build_info()["version"]

__all__ = [
    "batched_nms",
    "box_iou",
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
    "prroi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "rank_embedding",
    "relation_attention",
    "roi_align",
    "roi_pool",
    "soft_nms",
]
