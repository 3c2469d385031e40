"""Base classes of feature extractors.

A body consists of stages and computes one feature map per stage. A backbone turns these maps into the maps that a
detector uses.
"""

from __future__ import annotations

from torch import Tensor, nn


class Body(nn.Module):
    """A network of several stages, each of which computes a feature map.

    Attributes:
        channels: Number of channels of each map.
        strides: Stride of each map in pixels of the image.
    """

    channels: list[int]
    strides: list[int]

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each stage, in the order in which they are applied.

        To freeze a stage, freeze its modules.
        """
        raise NotImplementedError

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature map of each stage.

        Args:
            images: Images [N,3,H,W].

        Returns:
            Maps [N,channels[i],H / strides[i],W / strides[i]], with sizes rounded up.
        """
        raise NotImplementedError


class Chain(Body):
    """A body that applies the modules in its `parts` one after another."""

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature map of each stage.

        Args:
            images: Images [N,3,H,W].

        Returns:
            Maps [N,channels[i],H / strides[i],W / strides[i]].
        """
        maps, x = [], images
        for part in self.parts():
            for layer in part:
                x = layer(x)
            maps.append(x)
        return maps


class Backbone(nn.Module):
    """A body with additional layers that turn its maps into the maps that a detector uses.

    Attributes:
        body: Network whose weights can be loaded from a classifier.
        channels: Number of channels of each map.
        strides: Stride of each map in pixels of the image.
    """

    body: Body
    channels: list[int]
    strides: list[int]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps of images.

        Args:
            images: Images [N,3,H,W].

        Returns:
            Maps [N,channels[i],H / strides[i],W / strides[i]].
        """
        raise NotImplementedError
