"""Attention weighted by the geometry of boxes (object relation module), by scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from relops.reference._dtypes import compute_dtype


def relation_attention(
    query: Tensor,  # [N,Q,M,D]
    key: Tensor,  # [N,K,M,D]
    value: Tensor,  # [N,K,M,Dv]
    query_boxes: Tensor,  # [N,Q,4]
    key_boxes: Tensor,  # [N,K,4]
    geometry_weight: Tensor,  # [M,64]
    geometry_bias: Tensor | None = None,  # [M]
    *,
    key_mask: Tensor | None = None,  # [N,K]
    geometry: str = "paper",
    wavelength: float = 1000.0,
    scale: float | None = None,
) -> Tensor:  # [N,Q,M,Dv]
    """16-bit inputs are computed in float32."""
    D = query.shape[3]
    dtype = compute_dtype(query)
    if key_mask is not None:  # masked keys may be anything, and so may queries that have no others
        nothing = key_mask.all(1, keepdim=True)
        key, value = (x.masked_fill(key_mask[:, :, None, None], 0) for x in (key, value))
        query = query.masked_fill(nothing[:, :, None, None], 0)
        query_boxes, key_boxes = (
            x.masked_fill(mask[:, :, None], 0) for x, mask in ((query_boxes, nothing), (key_boxes, key_mask))
        )
    angles = geometry_angles(query_boxes.to(dtype), key_boxes.to(dtype), geometry == "official", wavelength)
    # [M,32] each: of an embedding that is 8 sines, then 8 cosines, of each of the 4 coordinates.
    sine_weight, cosine_weight = (w.flatten(1) for w in geometry_weight.to(dtype).view(-1, 4, 2, 8).unbind(2))
    bias = None if geometry_bias is None else geometry_bias.to(dtype)
    relation = F.linear(angles.sin(), sine_weight, bias) + F.linear(angles.cos(), cosine_weight)  # [N,Q,K,M]
    logits = relation.clamp(min=1e-6).log().permute(0, 3, 1, 2)  # [N,M,Q,K]
    if key_mask is not None:  # the softmax of no logit would be NaN
        logits = logits.masked_fill((key_mask & ~nothing)[:, None, None], float("-inf"))

    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    scale = (D**-0.5 if D else 1.0) if scale is None else scale
    output = F.scaled_dot_product_attention(q, k, v, logits, scale=scale).transpose(1, 2)
    if key_mask is not None:
        output = output.masked_fill(nothing[:, :, None, None], 0)
    return output.to(query.dtype)


def geometry_angles(query_boxes: Tensor, key_boxes: Tensor, by_query: bool, wavelength: float) -> Tensor:
    """[N,Q,K,32]: the angles whose sines and cosines are the embedding, 8 of each of 4 coordinates."""
    qx, qy, qw, qh = (x.unsqueeze(2) for x in center_and_size(query_boxes))
    kx, ky, kw, kh = (x.unsqueeze(1) for x in center_and_size(key_boxes))
    w, h = (qw, qh) if by_query else (kw, kh)
    coordinates = torch.stack(
        [
            ((qx - kx).abs() / w).clamp(min=1e-3).log(),
            ((qy - ky).abs() / h).clamp(min=1e-3).log(),
            qw.log() - kw.log(),  # not of qw / kw, which of two inverted boxes has a logarithm
            qh.log() - kh.log(),
        ],
        -1,
    )
    frequencies = 100 / wavelength ** (torch.arange(8, dtype=w.dtype, device=w.device) / 8)
    return (coordinates[..., None] * frequencies).flatten(-2)


def center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N,K] each. Both corners are pixels of the box."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1 + 1, y2 - y1 + 1
