"""Modules of multi-scale deformable attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from relops.ops.ms_deform_attn import Shapes, ms_deform_attn, ms_deform_attn_fused


class MSDeformAttn(nn.Module):
    """Deformable DETR's attention layer: the same arguments, initialization and state_dict keys, on the fused op.

    Args:
        d_model: width C of queries and of the pyramid; divisible by n_heads.
        n_levels, n_heads, n_points: L, M and P.

    Example:
        >>> layer = relops.nn.MSDeformAttn()
        >>> layer(query, reference_points, pyramid, [(100, 167), (50, 84), (25, 42), (13, 21)])
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"relops.nn.MSDeformAttn: d_model must be divisible by n_heads, got {d_model}, {n_heads}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m begins by looking 1, 2, .., P pixels away in direction 2 pi m / M, at uniform weights."""
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the unit square
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        bias = direction[:, None, None, :] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.n_levels, -1, -1).flatten())
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
            for linear in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(linear.weight)
                linear.bias.zero_()

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Shapes,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query: [N,Q,C].
            reference_points: [N,Q,L,2] in [0,1], or [N,Q,L,4] as (center x, center y, width, height).
            input_flatten: [N,S,C], the levels one after the other.
            input_spatial_shapes: [L,2] int64 rows (H,W), or a list of pairs.
            input_level_start_index: [L] int64; None: derived.
            input_padding_mask: [N,S] bool, True = padding.

        Returns:
            [N,Q,C].
        """
        N, Q, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        output = ms_deform_attn_fused(
            self.value_proj(input_flatten).unflatten(-1, (M, -1)),
            input_spatial_shapes,
            input_level_start_index,
            reference_points,
            self.sampling_offsets(query).view(N, Q, M, L, P, 2),
            self.attention_weights(query).view(N, Q, M, L, P),
            input_padding_mask,
        )
        return self.output_proj(output)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, n_points={self.n_points}"


class MultiScaleDeformableAttention(nn.Module):
    """`relops.ms_deform_attn` with the signature of Hugging Face transformers' layer of this name.

    It has no parameters, and no ``__init__``, so that transformers can also put it in place of its own layer itself
    (kernels' LocalLayerRepository). By hand:

        >>> for module in model.modules():
        ...     if type(module).__name__ == "MultiScaleDeformableAttention":
        ...         module.__class__ = relops.nn.MultiScaleDeformableAttention
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """As `relops.ms_deform_attn`; im2col_step is not needed and not looked at."""
        return ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)
