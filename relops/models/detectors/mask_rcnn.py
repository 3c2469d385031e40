"""Mask R-CNN (He et al., https://arxiv.org/abs/1703.06870), which adds masks to Faster R-CNN on a feature pyramid."""

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
from relops.models.parts.padding import present_rows, scatter_rows, select_rows
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, Samples, TwoFCHead
from relops.models.parts.rpn import Proposals
from relops.models.structures import Detections, Targets
from relops.ops.roi_align import roi_align


class MaskHead(nn.Sequential):
    """Four 3x3 convolutions, with the parameter names of torchvision."""

    def __init__(self, in_channels: int, hidden: int) -> None:
        layers = [
            nn.Sequential(nn.Conv2d(in_channels if i == 0 else hidden, hidden, 3, 1, 1), nn.ReLU(inplace=True))
            for i in range(4)
        ]
        super().__init__(*layers)


class MaskPredictor(nn.Module):
    """A transposed convolution that doubles the map size, and a 1x1 convolution for the log-odds of each class."""

    def __init__(self, in_channels: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, hidden, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(hidden, num_classes + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mask_fcn_logits(F.relu(self.conv5_mask(x)))


class MaskRoIHeads(RoIHeads):
    """Region heads that also predict masks, with a sigmoid per class (section 3).

    The mask loss of a region depends only on the mask that is predicted for the region's class. On the CPU, only
    positive regions pass through the mask head. On CUDA, counting the positive regions would require a synchronization.
    All slots that can hold a positive region therefore pass through the mask head, and slots without a positive region
    have no weight in the loss. An object whose target mask is all False contributes only to the other losses. If
    `targets.masks` is None, there is no mask loss.
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
        """Return the mask log-odds [R,28,28] of regions [R,5], each for the region's class in labels [R]."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, rois)))
        class_index = (labels + 1).view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
        return to_compute_dtype(logits.gather(1, class_index).squeeze(1))

    def losses_of(self, maps: list[Tensor], samples: Samples, targets: Targets) -> dict[str, Tensor]:
        losses = super().losses_of(maps, samples, targets)
        if targets.masks is None:
            return losses
        boxes, matched, classes = (
            x[:, : self.max_positive] for x in (samples.boxes.detach(), samples.matched, samples.classes)
        )
        rois, row_index = present_rows(boxes, classes > 0)
        classes = select_rows(classes, row_index)
        logits = self.mask_logits(maps, rois, classes.clamp(min=1) - 1)
        # RoIAlign treats each mask of the batch as an image.
        N, T = targets.labels.shape
        mask_index = select_rows(matched + T * torch.arange(N, device=matched.device)[:, None], row_index)
        rows = torch.cat([mask_index[:, None].to(rois.dtype), rois[:, 1:]], 1)
        mask_targets = roi_align(targets.masks.flatten(0, 1)[:, None].to(rows.dtype), rows, logits.shape[-1])[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, mask_targets, reduction="none").mean((1, 2))
        has_mask = targets.masks.flatten(0, 1).flatten(1).any(1)
        has_loss = (classes > 0) & has_mask[mask_index]
        losses["masks"] = (loss * has_loss).sum() / has_loss.sum().clamp(min=1)
        return losses

    def detect(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        boxes, scores, labels, _ = super().detect(maps, proposals, sizes)
        valid = labels >= 0
        rois, row_index = present_rows(boxes, valid)
        row_labels = select_rows(labels.clamp(min=0), row_index)
        masks = self.mask_logits(maps, rois, row_labels).sigmoid()
        return Detections(boxes, scores, labels, scatter_rows(masks, row_index, *valid.shape))


class MaskRCNN(TwoStageDetector):
    """A two-stage detector that predicts boxes and masks."""

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
    """Build Mask R-CNN on a feature pyramid: Faster R-CNN with a mask head.

    The detector (He et al., https://arxiv.org/abs/1703.06870) has the same layers as in torchvision. `load_torchvision`
    loads a state_dict of torchvision's maskrcnn_resnet50_fpn (num_classes=90 for COCO).

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26" or "lr_net50".
            ResNets accept a suffix that selects the normalization: "-bn" (batch normalization), "-frozen" (batch
            normalization with constant statistics and weights) or "-gn" (group normalization). After the normalization,
            a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2" (modulated deformable
            convolutions in all stages except the first). A number at the end of any name sets the width, that is, the
            number of channels of the stem (64 by default), as in "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the feature pyramid, of the region proposal network (RPN) and of the mask head.
        hidden: Width of the two fully connected layers of the box head.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        num_samples: Number of regions per image that are sampled for the losses of the second stage.
        sizes: Anchor sizes in pixels, one for each of the five pyramid levels, from the finest to the coarsest. An
            anchor of size s has an area of s^2.

    Returns:
        A `MaskRCNN`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "rpn_objectness", "rpn_boxes", "classes" and "boxes". If `targets.masks` is given, there is also the loss
        "masks". In evaluation mode, `detector(images, sizes)` returns `Detections` with at most 100 objects per image.
        The masks [N,D,28,28] of the detections hold probabilities within each box. `images` is [N,3,H,W], `sizes` is
        [N,2] with the height and width of each image without padding (None if there is no padding), and `targets` is a
        `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, if it does not have four stages, or if group normalization does
            not support its width.
        ValueError: If `sizes` does not have five entries.

    Example:
        >>> import torch, relops
        >>> model = relops.models.mask_rcnn(3, backbone="resnet18", channels=32, hidden=64)
        >>> images = torch.rand(1, 3, 64, 64)
        >>> masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
        >>> masks[:, :, 8:48, 8:40] = True
        >>> targets = relops.models.Targets(torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]]), masks)
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['boxes', 'classes', 'masks', 'rpn_boxes', 'rpn_objectness']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images)
        >>> detections.boxes.shape
        torch.Size([1, 100, 4])
        >>> detections.masks.shape
        torch.Size([1, 100, 28, 28])
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
