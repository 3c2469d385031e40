"""Sinusoidal embedding of ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_embedding(
    ranks: Tensor,  # [..]
    dim: int = 128,
    wavelength: float = 1000.0,
) -> Tensor:  # [..,dim]
    """16-bit ranks are computed in float32, and integers too."""
    dtype = ranks.dtype if ranks.is_floating_point() else torch.float32
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(dim // 2, dtype=wide, device=ranks.device) / (dim // 2)
    angles = ranks.to(wide)[..., None] / wavelength**exponents
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)
