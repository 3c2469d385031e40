"""Attention among boxes with geometric weights (https://arxiv.org/abs/1711.11575), using torch's attention."""

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
    """Compute multi-head attention among boxes, with weights that depend on features and relative geometry.

    The output is a weighted sum over the keys k::

        b[n,q,m,k] = geometry_weight[m] . e(q, k) + geometry_bias[m]
        logit[n,q,m,k] = log(max(b[n,q,m,k], 1e-6)) + scale * query[n,q,m] . key[n,k,m]
        output[n,q,m] = sum over k of (softmax over k of logit[n,q,m,k]) * value[n,k,m]

    The embedding e(q, k) has 64 numbers, 16 for each of these four coordinates in turn: the sines and then the cosines
    of ``coordinate * 100 / wavelength^(j / 8)`` for j from 0 to 7::

        log(max(|dx| / w, 1e-3)), log(max(|dy| / h, 1e-3)), log(wq / wk), log(hq / hk)

    The differences between the centers of the two boxes are dx and dy. The width of a box is x2 - x1 + 1, and its
    height is y2 - y1 + 1. The query's box has width wq and height hq, and the key's box has width wk and height hk. The
    divisors w and h are the width and height of the key's box if `geometry` is "paper", and of the query's box if
    `geometry` is "official". Keys for which `key_mask` is True are ignored, and the output of a query whose keys are
    all ignored is zero.

    `query` is [N,Q,M,D], `key` [N,K,M,D], `value` [N,K,M,Dv], `query_boxes` [N,Q,4], `key_boxes` [N,K,4],
    `geometry_weight` [M,64], `geometry_bias` [M], `key_mask` [N,K], and the result [N,Q,M,Dv]. For 16-bit inputs, all
    computations use float32.
    """
    D = query.shape[3]
    dtype = compute_dtype(query)
    if key_mask is not None:  # masked keys, and queries whose keys are all masked, may have any values
        no_keys = key_mask.all(1, keepdim=True)
        key, value = (x.masked_fill(key_mask[:, :, None, None], 0) for x in (key, value))
        query = query.masked_fill(no_keys[:, :, None, None], 0)
        query_boxes, key_boxes = (
            x.masked_fill(mask[:, :, None], 0) for x, mask in ((query_boxes, no_keys), (key_boxes, key_mask))
        )
    angles = geometry_angles(query_boxes.to(dtype), key_boxes.to(dtype), geometry == "official", wavelength)
    # For each of the 4 coordinates, the embedding has 8 sines and then 8 cosines. Both weight matrices are [M,32].
    sine_weight, cosine_weight = (w.flatten(1) for w in geometry_weight.to(dtype).view(-1, 4, 2, 8).unbind(2))
    bias = None if geometry_bias is None else geometry_bias.to(dtype)
    relation = F.linear(angles.sin(), sine_weight, bias) + F.linear(angles.cos(), cosine_weight)  # [N,Q,K,M]
    logits = relation.clamp(min=1e-6).log().permute(0, 3, 1, 2)  # [N,M,Q,K]
    if key_mask is not None:  # if all keys are masked, exclude none, because a softmax over no keys is NaN
        logits = logits.masked_fill((key_mask & ~no_keys)[:, None, None], float("-inf"))

    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    scale = (D**-0.5 if D else 1.0) if scale is None else scale
    output = F.scaled_dot_product_attention(q, k, v, logits, scale=scale).transpose(1, 2)
    if key_mask is not None:
        output = output.masked_fill(no_keys[:, :, None, None], 0)
    return output.to(query.dtype)


def geometry_angles(query_boxes: Tensor, key_boxes: Tensor, by_query: bool, wavelength: float) -> Tensor:
    """Return the angles [N,Q,K,32], 8 for each of 4 coordinates. Their sines and cosines form the embedding."""
    qx, qy, qw, qh = (x.unsqueeze(2) for x in center_and_size(query_boxes))
    kx, ky, kw, kh = (x.unsqueeze(1) for x in center_and_size(key_boxes))
    w, h = (qw, qh) if by_query else (kw, kh)
    coordinates = torch.stack(
        [
            ((qx - kx).abs() / w).clamp(min=1e-3).log(),
            ((qy - ky).abs() / h).clamp(min=1e-3).log(),
            qw.log() - kw.log(),  # unlike log(qw / kw), this is NaN for two inverted boxes
            qh.log() - kh.log(),
        ],
        -1,
    )
    frequencies = 100 / wavelength ** (torch.arange(8, dtype=w.dtype, device=w.device) / 8)
    return (coordinates[..., None] * frequencies).flatten(-2)


def center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return center x, center y, width and height, each [N,K]. Both corner pixels belong to the box."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1 + 1, y2 - y1 + 1
