"""Base classes of feature extractors: a body computes a map per stage, and a backbone turns them into its maps."""

from __future__ import annotations

from torch import Tensor, nn


class Body(nn.Module):
    """A network of several stages, each of which computes a feature map.

    Attributes:
        channels, strides: of the map of each stage.
    """

    channels: list[int]
    strides: list[int]

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules that make each output of `stage_maps` from the one before, for freezing."""
        raise NotImplementedError

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Return the map [N,channels[i],H / strides[i],W / strides[i]] of each stage, sizes rounded up."""
        raise NotImplementedError


class Chain(Body):
    """A body that applies its `parts` to the images one after the other."""

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Return the map [N,channels[i],H / strides[i],W / strides[i]] of each stage."""
        maps, x = [], images
        for part in self.parts():
            for layer in part:
                x = layer(x)
            maps.append(x)
        return maps


class Backbone(nn.Module):
    """A body together with the layers that turn its stage maps into the maps that a detector works on.

    Attributes:
        body: the network whose weights a classifier may have learned.
        channels, strides: of the maps.
    """

    body: Body
    channels: list[int]
    strides: list[int]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps [N,channels[i],H / strides[i],W / strides[i]] of images [N,3,H,W]."""
        raise NotImplementedError
