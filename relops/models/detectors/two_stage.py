"""The class of two-stage detectors."""

from __future__ import annotations

from torch import Tensor, nn

from relops.models.backbones.base import Backbone
from relops.models.detectors.base import BaseDetector
from relops.models.parts.roi_heads import RoIHeads
from relops.models.parts.rpn import Proposals
from relops.models.structures import Detections, Targets


class TwoStageDetector(BaseDetector):
    """A detector that consists of a backbone, a region proposal network, and region heads.

    Args:
        backbone: A module that computes a list of maps from images.
        rpn: A module that computes proposals from maps.
        roi_heads: A module that computes losses and detections from maps and proposals.
        box_gradients: Whether gradients of the second stage also flow through the proposed boxes to the RPN. This is
            called non-approximate joint training. The gradients flow through RoIAlign (RoI warping), the regression
            targets and the clipping of boxes. If False, proposals are constants for the second stage.
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
        """Return the losses in training mode and the detections in evaluation mode.

        Args:
            images: [N,3,H,W], normalized as the backbone requires and padded on the right and at the bottom.
            sizes: [N,2], the height and width of each image in pixels, without its padding, or None if there is no
                padding.
            targets: The ground truth, which is required in training mode and ignored in evaluation mode.

        Returns:
            In training mode, a dict of scalar losses, whose sum is the training loss. In evaluation mode, `Detections`.

        Raises:
            ValueError: If `images`, `sizes` or `targets` has an invalid shape, or if `targets` is missing in training
                mode.
        """
        sizes = self.checked_sizes(images, sizes)
        if not self.training:
            maps = self.backbone(images)
            proposals, _ = self.rpn(maps, sizes)
            return self.roi_heads.detect(maps, proposals, sizes)
        targets = self.checked_targets(images, targets)
        maps = self.backbone(images)
        proposals, losses = self.rpn(maps, sizes, targets, box_gradients=self.box_gradients)
        return losses | self.roi_heads.losses(maps, proposals, sizes, targets)

    def propose(self, images: Tensor, sizes: Tensor | None = None, max_proposals: int | None = None) -> Proposals:
        """Return the proposals of the RPN.

        Args:
            images: [N,3,H,W], normalized as the backbone requires and padded on the right and at the bottom.
            sizes: [N,2], the height and width of each image in pixels, without its padding, or None if there is no
                padding.
            max_proposals: The maximum number of proposals per image. If None, the RPN's `post_nms` for the current mode
                is used.
        """
        sizes = self.checked_sizes(images, sizes)
        return self.rpn(self.backbone(images), sizes, max_proposals=max_proposals)[0]
