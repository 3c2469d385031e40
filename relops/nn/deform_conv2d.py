"""Modules for deformable convolution, v1 and v2."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from relops._checks import check_features, check_size, checked_pair
from relops._dtypes import to_compute_dtype
from relops.ops.deform_conv2d import MAX_SIZE, deform_conv2d

MAX_CHANNELS = 2**31

torch.fx.wrap("deform_conv2d")


class DeformConv(nn.Module):
    """The settings and parameters that all modules for deformable convolution have."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
    ) -> None:
        super().__init__()
        op = f"nn.{type(self).__name__}"
        check_size(op, "groups", groups, MAX_CHANNELS)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_size(op, name, channels, MAX_CHANNELS)
            check_divisible(op, name, channels, "groups", groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = checked_pair(op, "kernel_size", kernel_size, 1, MAX_SIZE)
        self.stride = checked_pair(op, "stride", stride, 1, MAX_SIZE)
        self.padding = checked_pair(op, "padding", padding, 0, MAX_SIZE)
        self.dilation = checked_pair(op, "dilation", dilation, 1, MAX_SIZE)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)

    def convolve(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the convolution with the given offsets and masks, as `relops.deform_conv2d` does."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text + (", bias=False" if self.bias is None else "")


class DeformConv2d(DeformConv):
    """A module for deformable convolution, v1 (https://arxiv.org/abs/1703.06211) and v2 (with a mask).

    The module has the arguments, the initialization and the state_dict keys of ``torchvision.ops.DeformConv2d``, and
    calls `relops.deform_conv2d`. Offsets and masks are inputs, and the module does not compute them.

    Args:
        in_channels: Number C of input channels.
        out_channels: Number Co of output channels.
        kernel_size: Height and width (kh,kw) of the kernel, or one int for both.
        stride: Distance in pixels between neighboring outputs, an int or a pair (vertical, horizontal).
        padding: Number of zeros that surround the map on each side, an int or a pair.
        dilation: Distance in pixels between neighboring taps, an int or a pair.
        groups: Number of groups of channels, which must divide C and Co.
        bias: Whether the module has a bias.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or if `groups` does not divide the numbers of channels.

    Example:
        >>> import torch, relops
        >>> layer = relops.nn.DeformConv2d(16, 32, kernel_size=3, padding=1)
        >>> offset = torch.randn(1, 2 * 3 * 3, 20, 30)
        >>> out = layer(torch.randn(1, 16, 20, 30), offset)
        >>> out.shape
        torch.Size([1, 32, 20, 30])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters as torchvision and `torch.nn.Conv2d` do, with uniform distributions."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the convolution with the given offsets and masks.

        Args:
            input: Feature map [N,C,H,W] of dtype float64, float32, float16 or bfloat16. channels_last inputs are read
                without a copy.
            offset: Offsets [N,2*G*kh*kw,Ho,Wo] in pixels of `input`, in the dtype of `input`, or float32 if `input` has
                a 16-bit dtype. The channels are (dy, dx) of each tap of the first offset group, followed by the other
                groups. The number of channels determines the number of offset groups G, which must divide C.
            mask: Factors [N,G*kh*kw,Ho,Wo] of the samples, in the dtype of `input`, or float32 if `input` has a 16-bit
                dtype. If None, all factors are 1.

        Returns:
            A tensor [N,Co,Ho,Wo] in the dtype of `input`, channels_last if `input` is.

        Gradients:
            Gradients flow to `input`, `offset`, `mask` and all parameters.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device, or if the kernel is larger than the padded map.
        """
        return self.convolve(input, offset, mask)


class DeformConvWithOffsets(DeformConv):
    """A deformable convolution whose offsets, and masks if there are any, come from a convolution of its own.

    The channels of `conv_offset` are (dy, dx) of each tap of the first offset group, followed by the other offset
    groups and by the logits of all masks. mmcv splits these channels into three equal parts and concatenates the first
    two, which are the offsets in the same order.
    """

    modulated: bool  # whether the layer has masks

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        _rename_when_parents_load()
        op = f"nn.{type(self).__name__}"
        check_size(op, "deform_groups", deform_groups, MAX_CHANNELS)
        check_divisible(op, "in_channels", in_channels, "deform_groups", deform_groups)
        self.deform_groups = deform_groups
        count = (3 if self.modulated else 2) * deform_groups * math.prod(self.kernel_size)
        self.conv_offset = nn.Conv2d(in_channels, count, self.kernel_size, self.stride, self.padding, self.dilation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters as mmcv's ModulatedDeformConv2dPack does.

        All offsets are initially 0. The masks of a modulated layer are initially 0.5, so the layer computes half of a
        plain convolution plus its bias.
        """
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        for parameter in (self.bias, *self.conv_offset.parameters()):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the offsets and masks, and apply the convolution.

        Args:
            input: Feature map [N,C,H,W] in the dtype of the parameters. Under autocast, it may be float32, float16 or
                bfloat16. channels_last inputs are read without a copy.

        Returns:
            A tensor [N,Co,Ho,Wo], channels_last if `input` is.

        Gradients:
            Gradients flow to `input` and all parameters.

        Raises:
            TypeError: If `input` is not a tensor or has the wrong dtype.
            ValueError: If `input` has the wrong shape.
        """
        op = f"nn.{type(self).__name__}"
        check_features(op, "input", input)
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise ValueError(
                f"relops.{op}: input must be [N,C,H,W] with C = {self.in_channels}, got shape {list(input.shape)}"
            )
        output = self.conv_offset(input)
        input = input.to(output.dtype)  # under autocast, this layer computes in 16 bits, like other convolutions
        output = to_compute_dtype(output)
        if not self.modulated:
            return self.convolve(input, output, None)
        count = output.shape[1] // 3 * 2
        return self.convolve(input, output[:, :count], output[:, count:].sigmoid())

    def extra_repr(self) -> str:
        groups = "" if self.deform_groups == 1 else f", deform_groups={self.deform_groups}"
        return super().extra_repr() + groups


class ModulatedDeformConv2d(DeformConvWithOffsets):
    """A modulated deformable convolution (Deformable ConvNets v2, https://arxiv.org/abs/1811.11168).

    The convolution `conv_offset`, which is part of the layer and has a bias, computes an offset and a mask for each
    output pixel, offset group and tap. The mask, which goes through a sigmoid, is the factor by which the sample is
    multiplied. The layer has the arguments, the initialization and the state_dict keys of mmcv's
    ModulatedDeformConv2dPack, and calls `relops.deform_conv2d`. The initial weights and biases of `conv_offset` are 0.
    Hence all offsets are 0 and all masks are 0.5, and the layer computes half of a plain convolution plus its bias.

    Files of early versions store the offset convolution of a layer named ``conv2`` as ``conv2_offset`` instead of
    ``conv2.conv_offset``. The ``load_state_dict`` methods of networks that contain the layer accept both names.

    Args:
        in_channels: Number C of input channels.
        out_channels: Number Co of output channels.
        kernel_size: Height and width (kh,kw) of the kernel, or one int for both.
        stride: Distance in pixels between neighboring outputs, an int or a pair (vertical, horizontal).
        padding: Number of zeros that surround the map on each side, an int or a pair.
        dilation: Distance in pixels between neighboring taps, an int or a pair.
        groups: Number of groups of channels, which must divide C and Co. `conv_offset` has one group.
        deform_groups: Number G of offset groups, which must divide C. Each offset group has offsets and masks of its
            own.
        bias: Whether the layer has a bias.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or if `groups` or `deform_groups` does not divide the numbers of
            channels.

    Example:
        >>> import torch, relops
        >>> layer = relops.nn.ModulatedDeformConv2d(16, 32, kernel_size=3, padding=1)
        >>> out = layer(torch.randn(1, 16, 20, 30))
        >>> out.shape
        torch.Size([1, 32, 20, 30])
    """

    modulated = True


def rename_early_keys(parent: nn.Module, state_dict: dict[str, Tensor], prefix: str = "", *_: object) -> None:
    """Rename the offset convolutions of all children of a module that have one.

    Args:
        parent: The module.
        state_dict: Parameters, which are modified in place. Files of early versions have ``<layer>_offset.weight`` and
            ``<layer>_offset.bias``, which are renamed to ``<layer>.conv_offset.weight`` and
            ``<layer>.conv_offset.bias``.
        prefix: The beginning of the names of the parent's parameters.
    """
    for name, child in parent.named_children():
        if isinstance(child, DeformConvWithOffsets) and not hasattr(parent, f"{name}_offset"):
            for end in ("weight", "bias"):
                early, current = f"{prefix}{name}_offset.{end}", f"{prefix}{name}.conv_offset.{end}"
                if early in state_dict and current not in state_dict:
                    state_dict[current] = state_dict.pop(early)


@functools.cache
def _rename_when_parents_load() -> None:
    """Make every module that gets such a layer as its child call `rename_early_keys` when it loads a state_dict.

    The layer cannot rename the keys itself, because load_state_dict passes only the parameters whose names begin with
    the name of the layer and a dot.
    """

    def on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(child, DeformConvWithOffsets):
            parent.register_load_state_dict_pre_hook(rename_early_keys)

    register_module_module_registration_hook(on_registration)


def check_divisible(op: str, name: str, number: int, divisor_name: str, divisor: int) -> None:
    if number % divisor != 0:
        raise ValueError(f"relops.{op}: {name} must be divisible by {divisor_name}, got {number}, {divisor}")
