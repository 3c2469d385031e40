"""The setting of torch that allows TF32."""

from __future__ import annotations

import torch


# The compiler cannot trace the getter of this setting, but it recompiles when the setting changes.
@torch.compiler.assume_constant_result
def tf32_allowed() -> bool:
    """Return whether any of torch's settings allows matrix products of float32 tensors in TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
