"""Normalization layers of the backbones, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from relops._checks import check_choice


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization whose statistics, scale and shift are constant.

    The mean, variance, scale and shift are buffers with the same names as in torchvision.

    Args:
        channels: Number of channels.
        eps: Number added to the variance for numerical stability.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # The state_dict of an nn.BatchNorm2d has this entry, but a FrozenBatchNorm2d does not need it.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a feature map [N,C,H,W]."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype).view(1, -1, 1, 1) + shift.to(x.dtype).view(1, -1, 1, 1)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def group_norm(channels: int) -> nn.GroupNorm:
    """Build group normalization with 32 groups, or fewer if a group would have fewer than two channels."""
    return nn.GroupNorm(min(32, channels // 2), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm2d,
    "group": group_norm,
}


def make_norm(name: str) -> Callable[[int], nn.Module]:
    """Return the function that builds a "batch", "frozen" or "group" normalization for a given number of channels."""
    check_choice("models", "norm", name, tuple(NORMS))
    return NORMS[name]
