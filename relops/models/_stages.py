"""Networks that are one chain of layers, cut into stages."""

from __future__ import annotations

from torch import Tensor, nn


class Chain(nn.Module):
    """A backbone whose `parts`, one after the other, are all that lies between images and its last map."""

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """[N,channels[i],H / strides[i],W / strides[i]] of each stage."""
        maps, x = [], images
        for part in self.parts():
            for layer in part:
                x = layer(x)
            maps.append(x)
        return maps
