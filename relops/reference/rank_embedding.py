"""Sinusoidal embeddings of ranks (https://arxiv.org/abs/1711.11575, section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_embedding(
    ranks: Tensor,  # [..]
    dim: int = 128,
    wavelength: float = 1000.0,
) -> Tensor:  # [..,dim]
    """Compute sines and cosines of ranks [..] as an embedding [..,dim].

    For j from 0 to ``dim / 2 - 1``, the embedding of a rank is::

        angle[j] = rank / wavelength^(2 j / dim)
        output[.., j] = sin(angle[j])
        output[.., dim / 2 + j] = cos(angle[j])

    For 16-bit and integer ranks, all computations use float32.
    """
    dtype = ranks.dtype if ranks.is_floating_point() else torch.float32
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(dim // 2, dtype=wide, device=ranks.device) / (dim // 2)
    angles = ranks.to(wide)[..., None] / wavelength**exponents
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)
