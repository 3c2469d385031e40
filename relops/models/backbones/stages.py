"""The simplest backbone, which returns the maps of some stages of a body."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from relops.models.backbones.base import Backbone, Body


class StageBackbone(Backbone):
    """A backbone that returns the maps of some stages unchanged.

    Args:
        body: Network that computes the maps.
        stages: Indices of the stages.

    Example:
        >>> import torch, relops
        >>> from relops.models.backbones.stages import StageBackbone
        >>> backbone = StageBackbone(relops.models.zf(), stages=[2])
        >>> maps = backbone(torch.randn(1, 3, 64, 64))
        >>> [x.shape for x in maps]
        [torch.Size([1, 256, 4, 4])]
    """

    def __init__(self, body: Body, stages: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.stages = list(stages)
        self.channels = [body.channels[i] for i in stages]
        self.strides = [body.strides[i] for i in stages]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps of images.

        Args:
            images: Images [N,3,H,W].

        Returns:
            Maps [N,channels[i],H / strides[i],W / strides[i]] of the selected stages.
        """
        maps = self.body.stage_maps(images)
        return [maps[i] for i in self.stages]
