"""relops: C++/CUDA operators for region- and relation-based object detection, as autograd-aware torch ops."""

from relops import _library

_library.load()

from relops import nn  # noqa: E402  (the ops must be loaded before anything that uses them)
from relops.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused  # noqa: E402

__version__: str = _library.build_info()["version"]

__all__ = ["ms_deform_attn", "ms_deform_attn_fused", "nn"]
