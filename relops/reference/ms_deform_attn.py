"""Multi-scale deformable attention by grid_sample, as in the PyTorch code of the Deformable DETR authors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from relops.reference._dtypes import compute_dtype


def ms_deform_attn(
    value: Tensor,  # [N,S,M,D]
    spatial_shapes: Tensor | Sequence[tuple[int, int]],  # [L,2]
    level_start_index: Tensor | None,  # [L]
    sampling_locations: Tensor,  # [N,Q,M,L,P,2]
    attention_weights: Tensor,  # [N,Q,M,L,P]
) -> Tensor:  # [N,Q,M*D]
    """Compute weighted sums of bilinear samples of a feature pyramid, for each query and head.

    The output is a sum over all levels l and points p::

        location = sampling_locations[n,q,m,l,p]
        output[n,q,m] = sum over l, p of attention_weights[n,q,m,l,p] * sample(level l of value[n,:,m], location)

    `value` is [N,S,M,D], `sampling_locations` [N,Q,M,L,P,2], `attention_weights` [N,Q,M,L,P], and the result [N,Q,M*D].
    For 16-bit inputs, all computations use float32. Locations must be finite.
    """
    N, _, M, D = value.shape
    _, Q, _, L, P, _ = sampling_locations.shape
    dtype = compute_dtype(value)
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    if level_start_index is None:
        starts = [sum(h * w for h, w in shapes[:level]) for level in range(L)]
    else:
        starts = level_start_index.tolist()

    grid = 2 * sampling_locations.to(dtype) - 1  # grid_sample expects coordinates in [-1, 1]
    sampled = []
    for level, (H, W) in enumerate(shapes):
        level_value = value[:, starts[level] : starts[level] + H * W].to(dtype)  # [N,HW,M,D]
        image = level_value.permute(0, 2, 3, 1).reshape(N * M, D, H, W)
        level_grid = grid[:, :, :, level].transpose(1, 2).reshape(N * M, Q, P, 2)
        sampled.append(F.grid_sample(image, level_grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    values = torch.stack(sampled, dim=-2).flatten(-2)  # [N*M,D,Q,L*P]
    weights = attention_weights.to(dtype).transpose(1, 2).reshape(N * M, 1, Q, L * P)
    output = (values * weights).sum(-1)  # [N*M,D,Q]
    return output.view(N, M * D, Q).transpose(1, 2).to(value.dtype)


def ms_deform_attn_fused(
    value: Tensor,  # [N,S,M,D]
    spatial_shapes: Tensor | Sequence[tuple[int, int]],  # [L,2]
    level_start_index: Tensor | None,  # [L]
    reference_points: Tensor,  # [N,Q,L,2] or [N,Q,L,4]
    sampling_offsets: Tensor,  # [N,Q,M,L,P,2]
    attention_logits: Tensor,  # [N,Q,M,L,P]
    value_mask: Tensor | None = None,  # [N,S]
) -> Tensor:  # [N,Q,M*D]
    """Compute, one by one, the steps of a Deformable DETR attention layer between its linear layers.

    The steps are::

        value = value with the rows of value_mask set to zero
        locations = reference + offset / (W,H)                              # for reference points
        locations = reference_xy + offset / P * reference_wh * 0.5          # for reference boxes
        weights = softmax of attention_logits over L * P
        output = ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)

    `value` is [N,S,M,D], `reference_points` [N,Q,L,2] or [N,Q,L,4], `sampling_offsets` [N,Q,M,L,P,2],
    `attention_logits` [N,Q,M,L,P], `value_mask` [N,S], and the result [N,Q,M*D]. For 16-bit inputs, all computations
    use float32.
    """
    dtype = compute_dtype(value)
    offsets, reference = sampling_offsets.to(dtype), reference_points.to(dtype)[:, :, None, :, None, :]
    weights = attention_logits.to(dtype).flatten(-2).softmax(-1).view(attention_logits.shape)
    if reference.shape[-1] == 2:
        shapes = torch.as_tensor(spatial_shapes, device=value.device)
        size = shapes.flip(-1).to(dtype)[:, None, :]  # [L,1,2] as (W,H)
        locations = reference + offsets / size
    else:
        P = sampling_offsets.shape[4]
        locations = reference[..., :2] + offsets / P * reference[..., 2:] * 0.5
    if value_mask is not None:
        value = value.masked_fill(value_mask[:, :, None, None], 0)
    return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)
