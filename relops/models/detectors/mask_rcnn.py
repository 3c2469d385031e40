"""Mask R-CNN (He et al., https://arxiv.org/abs/1703.06870): Faster R-CNN on a pyramid, and a mask of each object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._dtypes import to_compute_dtype
from relops.models.detectors.faster_rcnn import pyramid
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.initialization import zero_bias
from relops.models.parts.padding import at_places, present_rows, spread
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, Samples, TwoFCHead
from relops.models.parts.rpn import Proposals
from relops.models.structures import Detections, Targets
from relops.ops.roi_align import roi_align


class MaskHead(nn.Sequential):
    """Four 3x3 convolutions, with torchvision's names of parameters."""

    def __init__(self, in_channels: int, hidden: int) -> None:
        layers = [
            nn.Sequential(nn.Conv2d(in_channels if i == 0 else hidden, hidden, 3, 1, 1), nn.ReLU(inplace=True))
            for i in range(4)
        ]
        super().__init__(*layers)


class MaskPredictor(nn.Module):
    """Twice the size, and log-odds of each class."""

    def __init__(self, in_channels: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, hidden, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(hidden, num_classes + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mask_fcn_logits(F.relu(self.conv5_mask(x)))


class MaskRoIHeads(RoIHeads):
    """RoIHeads, and masks: a sigmoid per class, of which only the one of the region's class counts (section 3).

    The mask branch sees positive regions only. On CUDA, where counting them would wait for the device, it sees all
    slots in which they may be, and what is none has no weight. Objects without a mask, whose mask in the targets is all
    False, are trained by their boxes alone; without masks in the targets there is no loss of masks.
    """

    def __init__(self, *parts: nn.Module, channels: int, strides: Sequence[int], num_classes: int, **options: Any):
        super().__init__(*parts, **options)
        self.mask_roi_pool = RegionPool("pyramid", 14, strides)
        self.mask_head = MaskHead(channels, channels)
        self.mask_predictor = MaskPredictor(channels, channels, num_classes)
        for module in (*self.mask_head.modules(), *self.mask_predictor.modules()):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                zero_bias(module)

    def mask_logits(self, maps: list[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """[R,28,28] of rows [R,5] for the class, labels [R], of each."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, rois)))
        of_class = (labels + 1).view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
        return to_compute_dtype(logits.gather(1, of_class).squeeze(1))

    def losses_of(self, maps: list[Tensor], samples: Samples, targets: Targets) -> dict[str, Tensor]:
        losses = super().losses_of(maps, samples, targets)
        if targets.masks is None:
            return losses
        boxes, matched, classes = (
            x[:, : self.most_positive] for x in (samples.boxes.detach(), samples.matched, samples.classes)
        )
        rois, place = present_rows(boxes, classes > 0)
        classes = at_places(classes, place)
        logits = self.mask_logits(maps, rois, classes.clamp(min=1) - 1)
        # Each mask is an image of its own.
        N, T = targets.labels.shape
        of_mask = at_places(matched + T * torch.arange(N, device=matched.device)[:, None], place)
        rows = torch.cat([of_mask[:, None].to(rois.dtype), rois[:, 1:]], 1)
        wanted = roi_align(targets.masks.flatten(0, 1)[:, None].to(rows.dtype), rows, logits.shape[-1])[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((1, 2))
        has_mask = targets.masks.flatten(0, 1).flatten(1).any(1)
        counted = (classes > 0) & has_mask[of_mask]
        losses["masks"] = (loss * counted).sum() / counted.sum().clamp(min=1)
        return losses

    def detect(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        boxes, scores, labels, _ = super().detect(maps, proposals, sizes)
        valid = labels >= 0
        rois, place = present_rows(boxes, valid)
        of_rois = at_places(labels.clamp(min=0), place)
        masks = self.mask_logits(maps, rois, of_rois).sigmoid()
        return Detections(boxes, scores, labels, spread(masks, place, *valid.shape))


class MaskRCNN(TwoStageDetector):
    """Boxes and masks."""

    uses_masks = True


def mask_rcnn(
    num_classes: int,
    *,
    backbone: str = "resnet50-frozen",
    channels: int = 256,
    hidden: int = 1024,
    frozen_stages: int = 0,
    num_samples: int = 512,
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
) -> MaskRCNN:
    """Mask R-CNN on a feature pyramid, as torchvision has it.

    A state_dict of torchvision's maskrcnn_resnet50_fpn loads through `load_torchvision` (num_classes=90 for COCO's).

    Args:
        num_classes: without the background.
        backbone: a ResNet or LR-Net, as in `make_body`.
        channels: of the pyramid, the RPN and the mask branch.
        hidden: of the fully connected layers.
        frozen_stages: of the backbone, not trained.
        num_samples: regions an image that losses are of.
        sizes: of the anchors of each level, in pixels.
    """
    maps, rpn = pyramid(backbone, channels, frozen_stages, sizes)
    strides = maps.strides[:4]
    roi_heads = MaskRoIHeads(
        RegionPool("pyramid", 7, strides),
        TwoFCHead(channels * 49, hidden),
        BoxPredictor(hidden, num_classes),
        channels=channels,
        strides=strides,
        num_classes=num_classes,
        num_samples=num_samples,
    )
    return MaskRCNN(maps, rpn, roi_heads)
