"""Local relation of LR-Net (https://arxiv.org/abs/1904.11491), computed by unfolding windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from relops.reference._dtypes import compute_dtype


def local_relation(
    query: Tensor,  # [N,G,Ho,Wo]
    key: Tensor,  # [N,G,H,W]
    value: Tensor,  # [N,C,H,W]
    prior: Tensor | None = None,  # [G,k,k]
    *,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    similarity: str = "squared_difference",
    border: str = "mask",
) -> Tensor:  # [N,C,Ho,Wo]
    """Aggregate values over k x k windows with weights that depend on similarity and relative position.

    For output pixel (ho, wo) and channel c of group g, the result is a weighted mean over the window positions, or
    taps, t::

        weight[t] = softmax over t of (phi(query[n,g,ho,wo], key[n,g,y,x]) + prior[g,t])
        output[n,c,ho,wo] = sum over t of weight[t] * value[n,c,y,x]

    Tap t reads pixel (y, x). Tap (i, j) of the window reads the pixel
    ``(stride * ho + dilation * (i - k // 2), stride * wo + dilation * (j - k // 2))``. The argument `similarity`
    selects ``-(q - k)^2``, ``-|q - k|`` or ``q * k`` as the function phi(q, k). If `border` is "mask", taps outside of
    the map are excluded from the softmax. If `border` is "zero", they have the key 0 and the value 0.

    `query` is [N,G,Ho,Wo], `key` [N,G,H,W], `value` [N,C,H,W], `prior` [G,k,k], and the result [N,C,Ho,Wo]. For 16-bit
    inputs, all computations use float32.
    """
    N, G, Ho, Wo = query.shape
    C, H, W = value.shape[1:]
    dtype = compute_dtype(value)

    def windows(x: Tensor) -> Tensor:
        """Unfold a map [N,C,H,W] into its windows [N,C,k*k,Ho*Wo]."""
        padding = dilation * (kernel_size // 2)
        extent = dilation * (kernel_size - 1) + 1
        right, below = (stride * (out - 1) + extent - padding - size for out, size in ((Wo, W), (Ho, H)))
        x = F.unfold(F.pad(x, (padding, right, padding, below)), kernel_size, dilation, stride=stride)
        return x.unflatten(1, (-1, kernel_size**2))

    q, k = query.to(dtype).flatten(2).unsqueeze(2), windows(key.to(dtype))  # [N,G,1,Ho*Wo], [N,G,k*k,Ho*Wo]
    if similarity == "squared_difference":
        logits = -(q - k).square()
    elif similarity == "absolute_difference":
        logits = -(q - k).abs()
    else:
        logits = q * k
    if prior is not None:
        logits = logits + prior.to(dtype).flatten(1).unsqueeze(-1)
    if border == "mask":
        inside = windows(torch.ones(1, 1, H, W, dtype=dtype, device=value.device))
        logits = logits.masked_fill(inside == 0, float("-inf"))
    weights = logits.softmax(2)

    m = -(-C // G)
    if C % G:  # the last groups have fewer than m channels, so pad them
        value = F.pad(value, (0, 0, 0, 0, 0, G * m - C))
    values = windows(value.to(dtype)).unflatten(1, (G, m))  # [N,G,m,k*k,Ho*Wo]
    output = (weights.unsqueeze(2) * values).sum(3)
    return output.view(N, G * m, Ho, Wo)[:, :C].to(value.dtype)
