"""Pure-PyTorch twins of the ops: oracle of the tests, baseline of the benchmarks, written to be read."""

from relops.reference.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]
