"""Modules built on the operators of relops."""

from relops.nn.deform_conv2d import DeformConv2d, ModulatedDeformConv2d
from relops.nn.duplicate_removal import DuplicateRemoval, RankedDetections
from relops.nn.dynamic_conv import DynamicConv
from relops.nn.local_relation import LocalRelation
from relops.nn.ms_deform_attn import MSDeformAttn, MultiScaleDeformableAttention
from relops.nn.multi_scale_roi_align import MultiScaleRoIAlign
from relops.nn.object_relation import ObjectRelation
from relops.nn.prroi_pool import PrRoIPool
from relops.nn.ps_roi_align import PSRoIAlign
from relops.nn.ps_roi_pool import PSRoIPool
from relops.nn.roi_align import RoIAlign
from relops.nn.roi_pool import RoIPool

__all__ = [
    "DeformConv2d",
    "DuplicateRemoval",
    "DynamicConv",
    "LocalRelation",
    "MSDeformAttn",
    "ModulatedDeformConv2d",
    "MultiScaleDeformableAttention",
    "MultiScaleRoIAlign",
    "ObjectRelation",
    "PSRoIAlign",
    "PSRoIPool",
    "PrRoIPool",
    "RankedDetections",
    "RoIAlign",
    "RoIPool",
]
