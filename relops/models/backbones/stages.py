"""The simplest backbones: some stage maps of a body."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from relops.models.backbones.base import Backbone, Body


class StageBackbone(Backbone):
    """Some stage maps as they are."""

    def __init__(self, body: Body, stages: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.stages = list(stages)
        self.channels = [body.channels[i] for i in stages]
        self.strides = [body.strides[i] for i in stages]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body.stage_maps(images)
        return [maps[i] for i in self.stages]
