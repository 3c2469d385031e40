"""Fast R-CNN (Girshick, https://arxiv.org/abs/1504.08083): classes and boxes of proposals that are given."""

from __future__ import annotations

from torch import Tensor, nn

from relops._dtypes import compute_dtype
from relops.models.backbones.base import Backbone
from relops.models.detectors.faster_rcnn import single_map
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, TwoFCHead
from relops.models.parts.rpn import Proposals
from relops.models.structures import Detections, Targets


class FastRCNN(TwoStageDetector):
    """A detector of the second stage only: its proposals come with the targets (`Targets.proposals`), also in
    evaluation, where the rest of the targets is not looked at."""

    uses_proposals = True

    def __init__(self, backbone: Backbone, roi_heads: RoIHeads) -> None:
        super().__init__(backbone, nn.Identity(), roi_heads)

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor] | Detections:
        sizes = self.checked_sizes(images, sizes)
        if self.training:
            targets = self.checked_targets(images, targets)
        if targets is None or targets.proposals is None:
            raise ValueError("relops.models.FastRCNN: targets.proposals must be given, in evaluation too, got None")
        boxes = targets.proposals.to(compute_dtype(images.dtype))
        valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        proposals = Proposals(boxes, valid.float(), valid)
        maps = self.backbone(images)
        if self.training:
            return self.roi_heads.losses(maps, proposals, sizes, targets)
        return self.roi_heads.detect(maps, proposals, sizes)

    def propose(self, images: Tensor, sizes: Tensor | None = None, most: int | None = None) -> Proposals:
        raise TypeError("relops.models.FastRCNN: makes no proposals, it is given them")


def fast_rcnn(
    num_classes: int,
    *,
    backbone: str = "vgg16",
    hidden: int = 4096,
    roi: str = "pool",
    dropout: float = 0.5,
    num_samples: int = 64,
    frozen_stages: int = 0,
    stride: int = 16,
) -> FastRCNN:
    """Fast R-CNN: one map at a stride of 16, RoI pooling, two fully connected layers, scores and deltas per class.

    Of an image num_samples regions are trained on, a quarter of them with an IoU of at least .5 with an object, the
    others between .1 and .5 (section 2.3).

    Args:
        num_classes: without the background.
        backbone: as in `make_body`.
        hidden: of the fully connected layers.
        roi: "pool" (published) or "align".
        dropout: behind the fully connected layers.
        num_samples: regions an image that losses are of.
        frozen_stages: of the backbone, not trained.
        stride: of the map, 16 or, for small images, 8.
    """
    maps, size = single_map(backbone, frozen_stages, stride)
    roi_heads = RoIHeads(
        RegionPool(roi, size, maps.strides),
        TwoFCHead(maps.channels[0] * size**2, hidden, dropout),
        BoxPredictor(hidden, num_classes),
        num_samples=num_samples,
        negative=(0.1, 0.5),
        beta=1.0,
        nms_threshold=0.3,
    )
    return FastRCNN(maps, roi_heads)
