"""What detectors of two stages have in common."""

from __future__ import annotations

from torch import Tensor, nn

from relops.models.backbones.base import Backbone
from relops.models.detectors.base import BaseDetector
from relops.models.parts.roi_heads import RoIHeads
from relops.models.parts.rpn import Proposals
from relops.models.structures import Detections, Targets


class TwoStageDetector(BaseDetector):
    """Backbone, region proposal network, and heads on regions.

    Args:
        backbone: images to a list of maps.
        rpn: proposals from maps.
        roi_heads: losses and detections from maps and proposals.
        box_gradients: non-approximate joint training: gradients of the second stage reach the RPN through the boxes,
            too, by RoI Align (RoI warping), regression targets and clipping. Otherwise proposals are constants.
    """

    def __init__(self, backbone: Backbone, rpn: nn.Module, roi_heads: RoIHeads, *, box_gradients: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.box_gradients = box_gradients

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor] | Detections:
        sizes = self.checked_sizes(images, sizes)
        if not self.training:
            maps = self.backbone(images)
            proposals, _ = self.rpn(maps, sizes)
            return self.roi_heads.detect(maps, proposals, sizes)
        targets = self.checked_targets(images, targets)
        maps = self.backbone(images)
        proposals, losses = self.rpn(maps, sizes, targets, box_gradients=self.box_gradients)
        return losses | self.roi_heads.losses(maps, proposals, sizes, targets)

    def propose(self, images: Tensor, sizes: Tensor | None = None, most: int | None = None) -> Proposals:
        """The RPN's proposals; `most` as in RPN.forward."""
        sizes = self.checked_sizes(images, sizes)
        return self.rpn(self.backbone(images), sizes, most=most)[0]
