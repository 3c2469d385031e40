"""Initialization of layers."""

from __future__ import annotations

from torch import nn


def zero_bias(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Set the bias of a layer to zero if it has one."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
