"""Modules built on the ops."""

from relops.nn.ms_deform_attn import MSDeformAttn, MultiScaleDeformableAttention

__all__ = ["MSDeformAttn", "MultiScaleDeformableAttention"]
