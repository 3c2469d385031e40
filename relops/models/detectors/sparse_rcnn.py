"""Sparse R-CNN (Sun et al., End-to-End Object Detection with Learnable Proposals, https://arxiv.org/abs/2011.12450).

The first two headings in this file are from section 3 of the paper. Parameters have the same names as in the released
code, except in the backbone, where they have the same names as in torchvision.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._checks import check_choice, check_size
from relops._dtypes import to_compute_dtype
from relops.models.backbones.build import make_body
from relops.models.backbones.pyramid import PyramidBackbone
from relops.models.detectors.set_based import SetDetector
from relops.models.parts.box_coding import decode_boxes
from relops.models.parts.boxes import corners_of, image_extent
from relops.models.parts.padding import as_rows
from relops.models.parts.roi_heads import RegionPool
from relops.models.parts.set_prediction import SetLoss, SetPrediction, set_prior
from relops.models.parts.transformer import xavier_weights
from relops.nn.dynamic_conv import DynamicConv
from relops.ops.box_iou import box_iou

HEADS = 8  # the number of heads of the self-attention
REGION = 7  # the height and width of pooled regions
LOG_CLAMP = math.log(100_000 / 16)  # the maximum growth of log w and log h
MIN_IOU = 1e-6  # the lower limit of an IoU, so that its logarithm is finite
INITS = "image", "center", "grid", "random"


class SparseRCNN(SetDetector):
    """A detector that refines the boxes of learned proposals in stages.

    Args:
        num_classes: The number of object classes, without the background.
        backbone: A feature pyramid that returns its finest map first. The first four maps are used.
        proposals: The number Q of proposals per image.
        stages: The number of stages, each of which refines the boxes of the previous one.
        init: The initial boxes of the proposals: "image", "center", "grid" or "random".
        hidden: The width of the feed-forward network of each stage.
        iou_attention: Whether each self-attention weight is multiplied by the IoU of the two proposals.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: PyramidBackbone,
        *,
        proposals: int,
        stages: int,
        init: str,
        hidden: int,
        iou_attention: bool,
    ) -> None:
        # The set prediction loss of every stage is the weighted sum of the focal loss, the L1 loss and the GIoU loss.
        # The matching cost has the same weights.
        super().__init__(SetLoss(corners=True), max_detections=proposals)
        channels = backbone.channels[0]
        self.backbone = backbone
        self.init_proposal_boxes = nn.Embedding(proposals, 4)
        self.init_proposal_features = nn.Embedding(proposals, channels)
        self.head = DynamicHead(num_classes, channels, backbone.strides[:4], stages, hidden, iou_attention)
        with torch.no_grad():
            self.init_proposal_boxes.weight.copy_(initial_boxes(init, proposals))

    def predict(self, images: Tensor, sizes: Tensor) -> SetPrediction:
        N = images.shape[0]
        extent = image_extent(sizes)
        boxes = corners_of(to_compute_dtype(self.init_proposal_boxes.weight)) * extent
        features = self.init_proposal_features.weight.expand(N, -1, -1)
        logits, boxes = self.head(self.backbone(images), boxes, features)
        return SetPrediction(logits, boxes / extent)


# ---- Learnable proposal box, learnable proposal feature ----


def initial_boxes(init: str, proposals: int) -> Tensor:
    """Return initial boxes [Q,4], which are center x, center y, width and height as fractions of an image.

    Args:
        init: The kind of boxes, from table 8 of the paper: "image" for the whole image, "center" for a centered box
            with a tenth of the image's width and height, "grid" for cells that cover the image, and "random" for the
            sigmoid of normally distributed numbers.
        proposals: The number Q of proposals.

    Raises:
        ValueError: If `init` is unknown, or if `proposals` is less than 1.
        TypeError: If `proposals` is not an int.
    """
    check_choice("models", "init", init, INITS)
    check_size("models", "proposals", proposals, 2**31 - 1)
    if init == "random":
        return torch.randn(proposals, 4).sigmoid()
    if init == "grid":
        rows = math.isqrt(proposals)
        counts = [(proposals + i) // rows for i in range(rows)]  # the number of cells in each row
        return torch.tensor(
            [((x + 0.5) / n, (y + 0.5) / rows, 1 / n, 1 / rows) for y, n in enumerate(counts) for x in range(n)]
        )
    size = 1.0 if init == "image" else 0.1
    return torch.tensor([0.5, 0.5, size, size]).repeat(proposals, 1)


# ---- Dynamic instance interactive head ----


class DynamicHead(nn.Module):
    """A sequence of stages. Gradients flow from stage to stage through the features, but not through the boxes.

    With iou_attention, each self-attention weight is multiplied by the IoU of the two proposals, and the weights are
    then normalized again (Zhao et al., IoU-Enhanced Attention, https://arxiv.org/abs/2209.10391). This adds no
    parameters.
    """

    def __init__(
        self, num_classes: int, channels: int, strides: list[int], stages: int, hidden: int, iou_attention: bool
    ) -> None:
        super().__init__()
        self.iou_attention = iou_attention
        check_size("models", "stages", stages, 2**31 - 1)
        self.box_roi_pool = RegionPool("pyramid", REGION, strides, aligned=True)
        self.head_series = nn.ModuleList(RCNNHead(num_classes, channels, hidden) for _ in range(stages))

    def forward(self, maps: list[Tensor], boxes: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [L,N,Q,classes] and the boxes [L,N,Q,4] of all L stages, in pixels.

        In evaluation mode, L is 1 and only the last stage is included.

        Args:
            maps: The maps of the feature pyramid.
            boxes: The boxes [N,Q,4] of the proposals as x1, y1, x2, y2 in pixels.
            features: [N,Q,C], the features of the proposals.
        """
        outputs = []
        for stage in self.head_series:
            # Neither pooling nor attention is differentiated with respect to the boxes.
            constant_boxes = boxes.detach()
            regions = self.box_roi_pool(maps, as_rows(constant_boxes))
            bias = log_iou(constant_boxes).to(features.dtype) if self.iou_attention else None
            logits, refined, features = stage(features, regions, boxes, bias)
            outputs.append((logits, refined))
            boxes = refined.detach()
        outputs = outputs if self.training else outputs[-1:]
        logits, boxes = (torch.stack(x) for x in zip(*outputs))
        return logits, boxes


class RCNNHead(nn.Module):
    """A stage: self-attention between proposals, interaction of each proposal with its region, and prediction."""

    WEIGHTS = 2.0, 1.0  # the divisors of the center and size deltas

    def __init__(self, num_classes: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, HEADS, batch_first=True)
        self.inst_interact = DynamicConv(channels, max(channels // 4, 1), REGION)
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.cls_module = tower(channels, 1)
        self.reg_module = tower(channels, 3)
        self.class_logits = nn.Linear(channels, num_classes)
        self.bboxes_delta = nn.Linear(channels, 4)
        xavier_weights(self)
        set_prior(self.class_logits)

    def forward(
        self, features: Tensor, regions: Tensor, boxes: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [N,Q,classes], the refined boxes [N,Q,4] and the new features [N,Q,C] of proposals.

        Args:
            features: [N,Q,C], the features of the proposals.
            regions: [N*Q,C,7,7], the features that are pooled from the boxes.
            boxes: [N,Q,4] x1, y1, x2, y2 in pixels.
            bias: [N*8,Q,Q], added to the products of queries and keys, or None to add nothing.
        """
        x = self.norm1(features + self.self_attn(features, features, features, attn_mask=bias, need_weights=False)[0])
        x = self.norm2(x + self.inst_interact(x.flatten(0, 1), regions).view_as(x))
        x = self.norm3(x + self.linear2(F.relu(self.linear1(x))))
        deltas = self.bboxes_delta(self.reg_module(x))
        return self.class_logits(self.cls_module(x)), decode_boxes(deltas, boxes, self.WEIGHTS, LOG_CLAMP), x


def log_iou(boxes: Tensor) -> Tensor:
    """Return the logarithm [N*8,Q,Q] of the IoU of each pair of boxes [N,Q,4], repeated for each head."""
    iou = box_iou(boxes, boxes)
    iou.diagonal(dim1=1, dim2=2).fill_(1)  # an empty box would have an IoU of 0 with itself
    return iou.clamp(min=MIN_IOU).log().repeat_interleave(HEADS, 0)


def tower(channels: int, layers: int) -> nn.Sequential:
    """Return linear layers, each followed by layer normalization and ReLU."""
    parts = [
        part
        for _ in range(layers)
        for part in (nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*parts)


# ---- The detector ----


def sparse_rcnn(
    num_classes: int,
    *,
    backbone: str = "resnet50-frozen",
    channels: int = 256,
    hidden: int = 2048,
    proposals: int = 100,
    stages: int = 6,
    init: str = "image",
    iou_attention: bool = False,
    frozen_stages: int = 0,
) -> SparseRCNN:
    """Build Sparse R-CNN: learned proposals that are refined in stages and trained by set prediction.

    The detector (Sun et al., https://arxiv.org/abs/2011.12450) uses a feature pyramid. `load_sparse_rcnn` loads the
    released weights (num_classes=80 for COCO).

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26" or "lr_net50".
            ResNets accept a suffix that selects the normalization: "-bn" (batch normalization), "-frozen" (batch
            normalization with constant statistics and weights) or "-gn" (group normalization). After the normalization,
            a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2" (modulated deformable
            convolutions in all stages except the first). A number at the end of any name sets the width, that is, the
            number of channels of the stem (64 by default), as in "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the feature pyramid and of the proposal features, divisible by 8. The width
            between the two dynamic filters is a quarter of this number.
        hidden: Width of the feed-forward network of each stage.
        proposals: Number of proposals per image, which is also the maximum number of detections.
        stages: Number of stages, each of which refines the boxes of the previous one.
        init: Initial boxes of the proposals: "image" (the whole image, as published), "center" (a centered box with a
            tenth of the image's width and height), "grid" (cells that cover the image) or "random".
        iou_attention: Whether the attention weight between two proposals is multiplied by the IoU of their boxes
            (https://arxiv.org/abs/2209.10391). The Sparse R-CNN paper does not do this.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.

    Returns:
        A `SparseRCNN`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "classes", "boxes" and "giou" of the last stage. With more than one stage, there is also the loss "auxiliary",
        the sum of the losses of all other stages. In evaluation mode, `detector(images, sizes)` returns `Detections`
        with at most `proposals` objects per image. `images` is [N,3,H,W], `sizes` is [N,2] with the height and width of
        each image without padding (None if there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, if it does not have four stages, or if group normalization does
            not support its width.
        ValueError: If `channels` is not divisible by 8.
        ValueError: If `init` is unknown.
        ValueError: If `proposals` or `stages` is less than 1.
        TypeError: If `proposals` or `stages` is not an int.

    Example:
        >>> import torch, relops
        >>> model = relops.models.sparse_rcnn(3, backbone="resnet18", channels=32, hidden=64, proposals=10, stages=2)
        >>> images = torch.rand(1, 3, 64, 64)
        >>> targets = relops.models.Targets(torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]]))
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['auxiliary', 'boxes', 'classes', 'giou']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images)
        >>> detections.boxes.shape
        torch.Size([1, 10, 4])
    """
    if channels % HEADS:
        raise ValueError(f"relops.models: channels must be divisible by {HEADS}, got {channels}")
    maps = PyramidBackbone(make_body(backbone, frozen_stages), channels)
    return SparseRCNN(
        num_classes,
        maps,
        proposals=proposals,
        stages=stages,
        init=init,
        hidden=hidden,
        iou_attention=iou_attention,
    )
