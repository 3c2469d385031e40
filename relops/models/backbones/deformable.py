"""The 3x3 convolutions of ResNets, plain or deformable, and the conversion of plain weights to deformable ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relops.nn.deform_conv2d import DeformConvWithOffsets, ModulatedDeformConv2d, rename_early_keys

DEFORMABLE = ("v1", "v2")
OFFSET_GROUPS = 4  # of v1, as in R-FCN with deformable convolutions and in Relation Networks


class DeformConv2dPack(DeformConvWithOffsets):
    """A deformable convolution, v1 (https://arxiv.org/abs/1703.06211), with the parameter names of mmcv."""

    modulated = False


def make_conv3x3(deformable: str | None, in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Module:
    """Build a 3x3 convolution without a bias, which is plain or of version "v1" or "v2"."""
    if deformable is None:
        return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, bias=False)
    if deformable == "v1":
        return DeformConv2dPack(
            in_channels, out_channels, 3, stride, dilation, dilation, deform_groups=OFFSET_GROUPS, bias=False
        )
    return ModulatedDeformConv2d(in_channels, out_channels, 3, stride, dilation, dilation, bias=False)


@torch.no_grad()
def begin_as_plain(layer: DeformConvWithOffsets) -> None:
    """Make a layer compute the plain convolution with its current weight.

    The offset convolution is set to zero, so all offsets are 0. All masks of v2 are then sigmoid(0) = 0.5, for which
    the weight is doubled. A bias that makes the masks 1 would leave them without a gradient.
    """
    for parameter in layer.conv_offset.parameters():
        nn.init.zeros_(parameter)
    if layer.modulated:
        layer.weight.mul_(2)


def convert_plain_weights(network: nn.Module, state_dict: dict[str, Tensor], prefix: str = "") -> None:
    """Convert the state_dict of a plain network to that of a network with deformable layers, in place.

    The deformable layers then compute the plain convolutions, as after `begin_as_plain`. The state_dict of a network
    with deformable layers is not changed, except that early names of offset convolutions are replaced.

    Args:
        network: The network.
        state_dict: Parameters of a network with or without offset convolutions.
        prefix: The beginning of the names of the network's parameters.
    """
    layers: dict[str, DeformConvWithOffsets] = {}
    for name, module in network.named_modules():
        module_prefix = f"{prefix}{name}." if name else prefix
        rename_early_keys(module, state_dict, module_prefix)
        if isinstance(module, DeformConvWithOffsets):
            layers[module_prefix] = module
    if any(f"{layer}conv_offset.{end}" in state_dict for layer in layers for end in ("weight", "bias")):
        return
    for layer, module in layers.items():
        weight = state_dict.get(f"{layer}weight")
        if weight is not None:
            for name, parameter in module.conv_offset.named_parameters():
                state_dict[f"{layer}conv_offset.{name}"] = weight.new_zeros(parameter.shape)
            if module.modulated:
                state_dict[f"{layer}weight"] = 2 * weight
