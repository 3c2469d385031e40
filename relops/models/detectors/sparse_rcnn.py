"""Sparse R-CNN (Sun et al., End-to-End Object Detection with Learnable Proposals, https://arxiv.org/abs/2011.12450).

Sections are those of the paper's section 3. Parameters have the released code's names, but for the backbone, which has
torchvision's.
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

HEADS = 8  # of the self-attention
REGION = 7  # height and width that regions are pooled to
LOG_CLAMP = math.log(100_000 / 16)  # of log w and log h
LEAST_IOU = 1e-6  # in place of 0, so that its logarithm is finite
INITS = "image", "center", "grid", "random"


class SparseRCNN(SetDetector):
    """A backbone's pyramid, learned proposals, and stages that each refine the boxes of the one before.

    Args:
        backbone: images to maps, finest first, of which the first four are used.
        proposals: their number Q.
        stages: their number.
        init: of the proposals' boxes, see `initial_boxes`.
        hidden: of the stages' feed-forward network.
        iou_attention: see `DynamicHead`.
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
        # Set prediction loss: focal loss, L1 and GIoU, with the same weights in costs and losses, of every stage.
        super().__init__(SetLoss(corners=True), most=proposals)
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
    """Center x, center y, width and height [Q,4], as fractions of an image.

    Args:
        init: "image", the whole of it; "center", a tenth of its width and height in its middle; "grid", cells that
            cover it; "random", by a normal distribution behind a sigmoid. (The paper's table 8.)
        proposals: their number Q.
    """
    check_choice("models", "init", init, INITS)
    check_size("models", "proposals", proposals, 2**31 - 1)
    if init == "random":
        return torch.randn(proposals, 4).sigmoid()
    if init == "grid":
        rows = math.isqrt(proposals)
        counts = [(proposals + i) // rows for i in range(rows)]  # of cells in each row
        return torch.tensor(
            [((x + 0.5) / n, (y + 0.5) / rows, 1 / n, 1 / rows) for y, n in enumerate(counts) for x in range(n)]
        )
    size = 1.0 if init == "image" else 0.1
    return torch.tensor([0.5, 0.5, size, size]).repeat(proposals, 1)


# ---- Dynamic instance interactive head ----


class DynamicHead(nn.Module):
    """Stages in a row, each with parameters of its own: boxes are constants between them, features are not.

    With iou_attention the weights of the self-attention are multiplied by the IoU of the two proposals, then divided by
    their sum (Zhao et al., IoU-Enhanced Attention, https://arxiv.org/abs/2209.10391). It has no parameters.
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
        """Logits [L,N,Q,classes] and boxes [L,N,Q,4] in pixels of all stages (in evaluation mode of the last alone), of
        the first one's boxes [N,Q,4] and features [N,Q,C]."""
        outputs = []
        for stage in self.head_series:
            # The level and the samples of a region have no gradient by its box, nor has attention.
            places = boxes.detach()
            regions = self.box_roi_pool(maps, as_rows(places))
            bias = log_iou(places).to(features.dtype) if self.iou_attention else None
            logits, refined, features = stage(features, regions, boxes, bias)
            outputs.append((logits, refined))
            boxes = refined.detach()
        of_stages = zip(*(outputs if self.training else outputs[-1:]))
        logits, boxes = (torch.stack(x) for x in of_stages)
        return logits, boxes


class RCNNHead(nn.Module):
    """A stage: self-attention of proposal features, each one's interaction with its region, and its class and box."""

    WEIGHTS = 2.0, 1.0  # that deltas of center and of size are divided by

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
        """Logits [N,Q,classes], boxes [N,Q,4] and features [N,Q,C] of features [N,Q,C], regions [N*Q,C,7,7], boxes
        [N,Q,4] and what is added to products of queries and keys, [N*8,Q,Q]."""
        x = self.norm1(features + self.self_attn(features, features, features, attn_mask=bias, need_weights=False)[0])
        x = self.norm2(x + self.inst_interact(x.flatten(0, 1), regions).view_as(x))
        x = self.norm3(x + self.linear2(F.relu(self.linear1(x))))
        deltas = self.bboxes_delta(self.reg_module(x))
        return self.class_logits(self.cls_module(x)), decode_boxes(deltas, boxes, self.WEIGHTS, LOG_CLAMP), x


def log_iou(boxes: Tensor) -> Tensor:
    """[N*8,Q,Q], of boxes [N,Q,4] with each other, once for each head."""
    iou = box_iou(boxes, boxes)
    iou.diagonal(dim1=1, dim2=2).fill_(1)  # of a box without an area, too
    return iou.clamp(min=LEAST_IOU).log().repeat_interleave(HEADS, 0)


def tower(channels: int, layers: int) -> nn.Sequential:
    """Linear layers, each normalized and rectified."""
    parts = [
        part
        for _ in range(layers)
        for part in (nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*parts)


# ---- By name ----


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
    """Sparse R-CNN on a feature pyramid. The released weights load through `load_sparse_rcnn` (num_classes=80).

    Args:
        num_classes: without the background.
        backbone: a ResNet or LR-Net, as in `make_body`.
        channels: of the pyramid and the proposals' features, divisible by the attention's eight heads. Dynamic filters
            have a quarter between them.
        hidden: of the stages' feed-forward network.
        proposals: an image; as many detections it has at most.
        stages: their number.
        init: of the proposals' boxes: "image" (as published), "center", "grid" or "random", see `initial_boxes`.
        iou_attention: proposals attend to each other by their IoU, too (not in the paper), see `DynamicHead`.
        frozen_stages: of the backbone, not trained.
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
