"""Modules for multi-scale deformable attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from relops.ops.ms_deform_attn import Shapes, ms_deform_attn, ms_deform_attn_fused


class MSDeformAttn(nn.Module):
    """The multi-scale deformable attention layer of Deformable DETR (https://arxiv.org/abs/2010.04159).

    In each head, a query attends to P points on each of L levels of a feature pyramid. The layer has the arguments, the
    initialization and the state_dict keys of the released code, and calls `relops.ms_deform_attn_fused`.

    Args:
        d_model: Width C of the queries and of the pyramid; must be divisible by `n_heads`.
        n_levels: Number L of levels.
        n_heads: Number M of heads.
        n_points: Number P of points per query, head and level.

    Raises:
        ValueError: If `n_heads` does not divide `d_model`.

    Example:
        >>> import torch, relops
        >>> layer = relops.nn.MSDeformAttn(d_model=64, n_levels=2)
        >>> shapes = [(8, 10), (4, 5)]
        >>> query, pyramid = torch.randn(1, 6, 64), torch.randn(1, 8 * 10 + 4 * 5, 64)
        >>> reference_points = torch.rand(1, 6, 2, 2)
        >>> out = layer(query, reference_points, pyramid, shapes)
        >>> out.shape
        torch.Size([1, 6, 64])
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
        """Initialize the parameters as the released code does.

        Initially, the points of head m have equal weights and lie at distances of 1, 2, ..., P pixels from the
        reference, in the direction 2 pi m / M.
        """
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # the larger coordinate becomes 1 or -1
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
        """Compute the attention of each query to the pyramid.

        Args:
            query: Queries [N,Q,C].
            reference_points: Points [N,Q,L,2] as (x, y), or boxes [N,Q,L,4] as (center x, center y, width, height),
                normalized to [0,1] over the level.
            input_flatten: Pyramid [N,S,C]. The levels are concatenated along S, each in row-major order.
            input_spatial_shapes: Height and width of each level, as a list of pairs or an int64 tensor [L,2].
            input_level_start_index: An int64 tensor [L] with the index in S at which each level begins. If None, each
                level begins where the previous one ends.
            input_padding_mask: Bool mask [N,S], True for padding, which counts as zero. If None, there is no padding.

        Returns:
            A tensor [N,Q,C].

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device, or if the sizes of the levels do not add up to S.
                If `input_spatial_shapes` is a CUDA tensor, checking the levels would require a synchronization. In this
                case, wrong sizes make the output NaN instead.
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
    """Multi-scale deformable attention (https://arxiv.org/abs/2010.04159), with the signature that transformers uses.

    The layer calls `relops.ms_deform_attn` and can replace the layer of the same name in Hugging Face transformers. The
    following lines replace all such layers of a model::

        for module in model.modules():
            if type(module).__name__ == "MultiScaleDeformableAttention":
                module.__class__ = relops.nn.MultiScaleDeformableAttention

    transformers can also replace the layers itself, with LocalLayerRepository of the kernels package, because this
    layer has neither parameters nor an ``__init__`` method.

    Example:
        >>> import torch, relops
        >>> attention = relops.nn.MultiScaleDeformableAttention()
        >>> value, shapes, starts = torch.randn(1, 20, 8, 32), [(4, 4), (2, 2)], torch.tensor([0, 16])
        >>> locations, weights = torch.rand(1, 5, 8, 2, 4, 2), torch.full((1, 5, 8, 2, 4), 1 / 8)
        >>> out = attention(value, torch.tensor(shapes), shapes, starts, locations, weights, im2col_step=64)
        >>> out.shape
        torch.Size([1, 5, 256])
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
        """Compute a weighted sum of bilinear samples of a feature pyramid for each query and head.

        Args:
            value: Pyramid [N,S,M,D] of dtype float64, float32, float16 or bfloat16. S is the sum of H * W over all
                levels. The levels are concatenated along S, each in row-major order.
            value_spatial_shapes: Not used.
            value_spatial_shapes_list: Height and width of each of the L levels.
            level_start_index: Not used.
            sampling_locations: Locations [N,Q,M,L,P,2] as (x, y), normalized to [0,1] over the level, in the dtype of
                `value`, or float32 if `value` has a 16-bit dtype.
            attention_weights: Weights [N,Q,M,L,P] in the dtype of `value`, or float32 if `value` has a 16-bit dtype.
            im2col_step: Not used.

        Returns:
            A tensor [N,Q,M*D] in the dtype of `value`.

        Gradients:
            Gradients flow to `value`, `sampling_locations` and `attention_weights`.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device, or if the sizes of the levels do not add up to S.
        """
        return ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)
