"""Relation Networks for Object Detection (Hu et al., https://arxiv.org/abs/1711.11575).

Region features pass through two fully connected layers. After each layer, object relation modules let the regions of an
image exchange information (section 4.2, equation 9). Instead of non-maximum suppression, a learned duplicate removal
network then selects one correct box for each object (section 4.3). The relation modules and the duplicate removal
network are trained end-to-end with the rest of the detector (section 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._dtypes import to_compute_dtype
from relops.models.detectors.faster_rcnn import pyramid, single_map
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.parts.anchors import paper_anchors
from relops.models.parts.box_coding import decode_boxes
from relops.models.parts.boxes import clip_boxes, smaller_than
from relops.models.parts.padding import gather_rows, present_rows, scatter_rows
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, TwoFC
from relops.models.parts.rpn import Proposals, make_rpn
from relops.models.structures import Detections, Targets
from relops.nn.duplicate_removal import DuplicateRemoval
from relops.nn.object_relation import ObjectRelation

HEADS = 16  # the number N_r of relations per module; queries and keys have width hidden / 16 (64 for hidden=1024)


class RelationHead(TwoFC):
    """The head of equation 9: fc6, r1 relation modules, ReLU, fc7, r2 relation modules, ReLU.

    A relation module adds its output to its input (figure 3). The ReLU is therefore applied to the sum of a layer's
    output and the outputs of the relation modules after this layer. The released code has one relation module after
    each layer.

    Args:
        in_features: The number of features of a region.
        hidden: The width of fc6 and fc7, divisible by 16.
        relations: The numbers of relation modules (r1, r2).
    """

    def __init__(self, in_features: int, hidden: int, relations: tuple[int, int]) -> None:
        super().__init__(in_features, hidden)
        if len(relations) != 2:
            raise ValueError(f"relops.models: relations must be two numbers, got {relations!r}")
        self.fc6_relations, self.fc7_relations = (
            nn.ModuleList(ObjectRelation(hidden, HEADS, hidden // HEADS) for _ in range(r)) for r in relations
        )

    def forward(self, x: Tensor, row_index: Tensor | None, boxes: Tensor, key_mask: Tensor) -> Tensor:
        """Return the features [N,K,hidden] of regions.

        Args:
            x: [R,...], the pooled features of the rows that `present_rows` returned.
            row_index: The indices that `present_rows` returned.
            boxes: [N,K,4] x1, y1, x2, y2 in pixels.
            key_mask: [N,K] bool, True for regions that do not contribute to the features of other regions.
        """
        x = scatter_rows(self.fc6(x.flatten(1)), row_index, *key_mask.shape)
        for relation in self.fc6_relations:
            x = relation(x, boxes, key_mask)
        x = self.fc7(F.relu(x))
        for relation in self.fc7_relations:
            x = relation(x, boxes, key_mask)
        return F.relu(x)


class RelationRoIHeads(RoIHeads):
    """Region heads that process all proposals of an image together, as in the released code. Deltas are class-agnostic.

    In training, the ground-truth boxes are appended to the proposals as additional regions. These regions do not
    contribute to the features of the proposals, because they do not exist in evaluation mode. In each image, the losses
    of classes and boxes are computed from the num_samples regions with the largest loss (online hard example mining).
    Duplicate removal is trained only on the proposals. In both modes, it ignores proposals whose score does not exceed
    its score_threshold, whereas the released code does so only in evaluation mode.

    Args:
        box_roi_pool: A module that pools the features of regions from maps, such as RegionPool.
        box_head: A RelationHead, which turns pooled features into vectors.
        box_predictor: A module that turns vectors into scores and class-agnostic deltas, such as BoxPredictor.
        duplicate_removal: The network that removes duplicates. If None, non-maximum suppression within classes is used.
        options: Options of RoIHeads.
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: RelationHead,
        box_predictor: nn.Module,
        duplicate_removal: DuplicateRemoval | None,
        **options: Any,
    ) -> None:
        super().__init__(box_roi_pool, box_head, box_predictor, **options)
        self.duplicate_removal = duplicate_removal

    def predict_all(
        self, maps: list[Tensor], boxes: Tensor, valid: Tensor, num_keys: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features [N,K,hidden], the scores [N,K,classes+1] and the deltas [N,K,4] of regions.

        Args:
            maps: The maps of the backbone.
            boxes: [N,K,4] x1, y1, x2, y2 in pixels.
            valid: [N,K] bool, False in padding.
            num_keys: The number of regions per image, counted from the first, that contribute to the features of other
                regions.
        """
        boxes = torch.where(valid[..., None], boxes, 0)  # padding slots are also queries, so their boxes must be finite
        rois, row_index = present_rows(boxes, valid)
        key_mask = ~valid | (torch.arange(valid.shape[1], device=valid.device) >= num_keys)
        features = self.box_head(self.box_roi_pool(maps, rois), row_index, boxes, key_mask)
        logits, deltas = self.box_predictor(features)
        return features, to_compute_dtype(logits), to_compute_dtype(deltas)

    def refine(self, logits: Tensor, deltas: Tensor, proposals: Proposals, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the refined and clipped boxes [N,P,4] of proposals and their scores s0 [N,P,classes].

        The scores of padding and of boxes with a side shorter than 0.01 pixels are 0.
        """
        boxes = clip_boxes(decode_boxes(deltas, proposals.boxes, self.WEIGHTS), sizes)
        removed = ~proposals.valid | smaller_than(boxes, 1e-2)
        return boxes, logits.softmax(-1)[..., 1:].masked_fill(removed[..., None], 0)

    def losses(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        samples, P = self.regions(proposals, targets), proposals.valid.shape[1]
        features, logits, deltas = self.predict_all(maps, samples.boxes, samples.classes >= 0, P)
        losses = self.hardest_losses(logits.flatten(0, 1), deltas.flatten(0, 1), samples, targets, None)
        if self.duplicate_removal is not None:
            boxes, scores = self.refine(logits[:, :P], deltas[:, :P].detach(), proposals, sizes)
            ranked = self.duplicate_removal(features[:, :P], scores, boxes)
            losses["duplicates"] = self.duplicate_removal.loss(ranked, targets.boxes.to(boxes.dtype), targets.labels)
        return losses

    def detect(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        features, logits, deltas = self.predict_all(maps, proposals.boxes, proposals.valid, proposals.valid.shape[1])
        boxes, scores = self.refine(logits, deltas, proposals, sizes)
        if self.duplicate_removal is None:
            return self.select(boxes[:, :, None], scores, proposals, sizes)
        _, P, C = scores.shape
        final_scores = self.duplicate_removal(features, scores, boxes).final_scores
        scores, index = final_scores.flatten(1).topk(min(self.max_detections, P * C), 1)
        found = scores > 0
        boxes = torch.where(found[..., None], gather_rows(boxes, index // C), 0)
        return Detections(boxes, scores, torch.where(found, index % C, -1))


class RelationNetworks(TwoStageDetector):
    """Faster R-CNN with RelationRoIHeads."""

    # Appearance weights are exponentials of query-key products, and the first steps of Adam are as large as the initial
    # parameters of the query and key layers. With the full learning rate, a few weights therefore dominated all others
    # regardless of geometry, and the network did not learn to suppress duplicates.
    slower = ("query", "key")


def relation_heads(
    pool: RegionPool,
    channels: int,
    hidden: int,
    num_classes: int,
    relations: tuple[int, int],
    duplicate_removal: bool,
    first_n: int,
    num_samples: int,
) -> RelationRoIHeads:
    """Return the second stage, with the constants of the released code.

    Args:
        pool: The module that pools the features of regions.
        channels: The number of channels of the pooled features.
        hidden: The width of the two fully connected layers.
        num_classes: The number of object classes, without the background.
        relations: The numbers of relation modules after the first and after the second fully connected layer.
        duplicate_removal: Whether a learned network removes duplicates.
        first_n: The number of regions per class that duplicate removal considers.
        num_samples: The number of regions per image from which losses are computed: those with the largest loss.
    """
    return RelationRoIHeads(
        pool,
        RelationHead(channels * pool.output_size**2, hidden, relations),
        BoxPredictor(hidden, num_classes, class_agnostic=True),
        DuplicateRemoval(hidden, first_n, head_dim=hidden // HEADS) if duplicate_removal else None,
        num_samples=num_samples,
        beta=1.0,
        score_threshold=0.01,
    )


def relation_networks(
    num_classes: int,
    *,
    backbone: str = "resnet101-frozen",
    channels: int = 512,
    hidden: int = 1024,
    relations: tuple[int, int] = (1, 1),
    duplicate_removal: bool = True,
    proposals: int = 300,
    proposal_nms: float | None = 0.7,
    roi: str = "pool",
    num_samples: int = 128,
    frozen_stages: int = 0,
    stride: int = 16,
    scales: Sequence[float] = (4, 8, 16, 32),
    min_size: float = 0,
) -> RelationNetworks:
    """Build Relation Networks: Faster R-CNN with object relation modules and learned duplicate removal.

    The detector (Hu et al., https://arxiv.org/abs/1711.11575) uses one feature map. The paper uses ResNet-101 (with
    frozen_stages=2) and pools regions from its fourth stage, which is dilated and reduced to 256 channels. In relops,
    regions are pooled from the same map that the region proposal network (RPN) uses. This map comes from the third
    stage, whose 3x3 convolutions are deformable if the backbone is "resnet101-frozen-dcn". In the paper's detector with
    deformable convolutions, those of the fourth stage are.

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26", "lr_net50", "vgg16"
            or "zf". All except LR-Nets accept a suffix that selects the normalization: "-bn" (batch normalization),
            "-frozen" (batch normalization with constant statistics and weights) or "-gn" (group normalization). After
            the normalization, a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2"
            (modulated deformable convolutions in all stages except the first). For ResNets and LR-Nets, a number at the
            end of the name sets the width, that is, the number of channels of the stem (64 by default), as in
            "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the 3x3 convolution of the region proposal network (RPN).
        hidden: Width of the two fully connected layers of the box head, divisible by 16.
        relations: Numbers (r1, r2) of object relation modules after the first and after the second fully connected
            layer.
        duplicate_removal: Whether a learned network removes duplicates. If False, non-maximum suppression within each
            class is used, with an IoU threshold of 0.5.
        proposals: Number of proposals per image, in training and in evaluation mode.
        proposal_nms: The RPN suppresses a proposal if its IoU with a proposal of a higher score exceeds this number. If
            None, the RPN returns the proposals with the highest scores, without suppression. Each object then has many
            duplicates, so the learned duplicate removal considers all proposals in each class instead of the best 100.
        roi: Method that pools the features of a region: "pool" for RoI pooling, as published, or "align" for RoIAlign.
        num_samples: Number of regions per image from which the losses "classes" and "boxes" are computed: those with
            the largest loss.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        stride: Stride of the feature map in pixels: 16, as published, or 8 for small images. "zf" supports only 16.
        scales: Scales of the anchors. An anchor of scale s has an area of (s * stride)^2 pixels.
        min_size: Minimum width and height of proposals, in pixels. Smaller proposals are removed.

    Returns:
        A `RelationNetworks`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "rpn_objectness", "rpn_boxes", "classes" and "boxes". If `duplicate_removal` is True, there is also the loss
        "duplicates". In evaluation mode, `detector(images, sizes)` returns `Detections` with at most 100 objects per
        image. `images` is [N,3,H,W], `sizes` is [N,2] with the height and width of each image without padding (None if
        there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, or if group normalization does not support its width.
        ValueError: If `stride` is not 16 or 8, or if it is 8 and `backbone` is "zf".
        ValueError: If `roi` is unknown.
        ValueError: If `hidden` is not divisible by 16 and there is at least one relation module.
        ValueError: If `relations` does not have two entries.

    Example:
        >>> import torch, relops
        >>> model = relops.models.relation_networks(
        ...     3, backbone="resnet18", channels=32, hidden=64, proposals=20, scales=(1, 2)
        ... )
        >>> images = torch.rand(1, 3, 64, 64)
        >>> targets = relops.models.Targets(torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]]))
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['boxes', 'classes', 'duplicates', 'rpn_boxes', 'rpn_objectness']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images)
        >>> detections.boxes.shape
        torch.Size([1, 60, 4])
    """
    maps, size = single_map(backbone, frozen_stages, stride)
    rpn = make_rpn(
        maps.channels[0],
        channels,
        [paper_anchors(stride, scales=scales)],
        maps.strides,
        loss="softmax",
        pre_nms=(6000, 6000),
        post_nms=(proposals, proposals),
        nms_threshold=proposal_nms,
        min_size=min_size,
        ignore_outside=True,
    )
    pool = RegionPool(roi, size, maps.strides)
    first_n = proposals if proposal_nms is None else 100
    heads = relation_heads(
        pool, maps.channels[0], hidden, num_classes, relations, duplicate_removal, first_n, num_samples
    )
    return RelationNetworks(maps, rpn, heads)


def relation_networks_fpn(
    num_classes: int,
    *,
    backbone: str = "resnet101-frozen",
    channels: int = 256,
    hidden: int = 1024,
    relations: tuple[int, int] = (1, 1),
    duplicate_removal: bool = True,
    proposals: int = 300,
    proposal_nms: float | None = 0.7,
    num_samples: int = 512,
    frozen_stages: int = 0,
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
) -> RelationNetworks:
    """Build Relation Networks on a feature pyramid, with relation modules and learned duplicate removal.

    The detector (Hu et al., https://arxiv.org/abs/1711.11575) extends Faster R-CNN on a feature pyramid. The released
    code trains the region proposal network (RPN) beforehand and passes 1000 proposals to the second stage. In relops,
    the RPN is trained jointly with the second stage.

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26" or "lr_net50".
            ResNets accept a suffix that selects the normalization: "-bn" (batch normalization), "-frozen" (batch
            normalization with constant statistics and weights) or "-gn" (group normalization). After the normalization,
            a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2" (modulated deformable
            convolutions in all stages except the first). A number at the end of any name sets the width, that is, the
            number of channels of the stem (64 by default), as in "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the feature pyramid and of the region proposal network (RPN).
        hidden: Width of the two fully connected layers of the box head, divisible by 16.
        relations: Numbers (r1, r2) of object relation modules after the first and after the second fully connected
            layer.
        duplicate_removal: Whether a learned network removes duplicates. If False, non-maximum suppression within each
            class is used, with an IoU threshold of 0.5.
        proposals: Number of proposals per image, in training and in evaluation mode.
        proposal_nms: The RPN suppresses a proposal if its IoU with a proposal of a higher score exceeds this number. If
            None, the RPN returns the proposals with the highest scores, without suppression. Each object then has many
            duplicates, so the learned duplicate removal considers all proposals in each class instead of the best 150.
        num_samples: Number of regions per image from which the losses "classes" and "boxes" are computed: those with
            the largest loss.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        sizes: Anchor sizes in pixels, one for each of the five pyramid levels, from the finest to the coarsest. An
            anchor of size s has an area of s^2.

    Returns:
        A `RelationNetworks`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "rpn_objectness", "rpn_boxes", "classes" and "boxes". If `duplicate_removal` is True, there is also the loss
        "duplicates". In evaluation mode, `detector(images, sizes)` returns `Detections` with at most 100 objects per
        image. `images` is [N,3,H,W], `sizes` is [N,2] with the height and width of each image without padding (None if
        there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, if it does not have four stages, or if group normalization does
            not support its width.
        ValueError: If `sizes` does not have five entries.
        ValueError: If `hidden` is not divisible by 16 and there is at least one relation module.
        ValueError: If `relations` does not have two entries.

    Example:
        >>> import torch, relops
        >>> model = relops.models.relation_networks_fpn(3, backbone="resnet18", channels=32, hidden=64, proposals=20)
        >>> images = torch.rand(1, 3, 64, 64)
        >>> targets = relops.models.Targets(torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]]))
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['boxes', 'classes', 'duplicates', 'rpn_boxes', 'rpn_objectness']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images)
        >>> detections.boxes.shape
        torch.Size([1, 60, 4])
    """
    maps, rpn = pyramid(
        backbone, channels, frozen_stages, sizes, post_nms=(proposals, proposals), nms_threshold=proposal_nms
    )
    pool = RegionPool("pyramid", 7, maps.strides[:4])
    first_n = proposals if proposal_nms is None else 150
    heads = relation_heads(pool, channels, hidden, num_classes, relations, duplicate_removal, first_n, num_samples)
    return RelationNetworks(maps, rpn, heads)
