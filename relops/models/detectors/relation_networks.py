"""Relation Networks for Object Detection (Hu et al., https://arxiv.org/abs/1711.11575): objects that see each other.

Region features go through two fully connected layers, and behind each, object relation modules let the regions of an
image tell each other what they see (section 4.2, equation 9). A learned duplicate removal network then says which of a
class's boxes is the right one of its object, in place of non-maximum suppression (section 4.3). Both are trained end to
end with the rest (section 4.4).
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
from relops.models.parts.padding import gather_rows, present_rows, spread
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, TwoFC
from relops.models.parts.rpn import Proposals, make_rpn
from relops.models.structures import Detections, Targets
from relops.nn.duplicate_removal import DuplicateRemoval
from relops.nn.object_relation import ObjectRelation

HEADS = 16  # N_r, relations of a module; queries and keys of each are hidden / 16 wide, 64 where hidden is 1024


class RelationHead(TwoFC):
    """Equation 9: fc6, r1 relation modules, ReLU, fc7, r2 relation modules, ReLU.

    A module adds to its input (figure 3), so that the ReLU is of a layer's output and what relations add to it; one
    module behind each layer is what the released code has.

    Args:
        in_features: of a region.
        hidden: of both layers, divisible by 16.
        relations: (r1, r2).
    """

    def __init__(self, in_features: int, hidden: int, relations: tuple[int, int]) -> None:
        super().__init__(in_features, hidden)
        self.fc6_relations, self.fc7_relations = (
            nn.ModuleList(ObjectRelation(hidden, HEADS, hidden // HEADS) for _ in range(r)) for r in relations
        )

    def forward(self, x: Tensor, place: Tensor | None, boxes: Tensor, key_mask: Tensor) -> Tensor:
        """[N,K,hidden] of rows [R,...] in their places (as `present_rows` gave them), boxes [N,K,4] and key_mask [N,K],
        True where a region tells the others nothing."""
        x = spread(self.fc6(x.flatten(1)), place, *key_mask.shape)
        for relation in self.fc6_relations:
            x = relation(x, boxes, key_mask)
        x = self.fc7(F.relu(x))
        for relation in self.fc7_relations:
            x = relation(x, boxes, key_mask)
        return F.relu(x)


class RelationRoIHeads(RoIHeads):
    """All proposals of an image at once, with deltas of all classes together, as in the released code.

    In training the objects themselves are among the regions that learn, behind the proposals. They tell the proposals
    nothing, as there are none at inference, and duplicate removal does not see them. Of the regions, the num_samples
    whose loss is largest teach classes and boxes (online hard example mining); duplicate removal learns from proposals.
    Scores up to its score_threshold take no part in it, as at inference (in the released code, only there).

    Args:
        box_roi_pool, box_head, box_predictor: as in RoIHeads; the head is a RelationHead, the deltas class-agnostic.
        duplicate_removal: the last stage; None: RoIHeads' suppression within classes.
        options: of RoIHeads.
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
        """Features [N,K,hidden], scores [N,K,classes + 1] and deltas [N,K,4] of boxes [N,K,4], of which those valid
        [N,K] are there and the first num_keys are seen by the others."""
        boxes = torch.where(valid[..., None], boxes, 0)  # padding is a query, too: it needs numbers
        rois, place = present_rows(boxes, valid)
        key_mask = ~valid | (torch.arange(valid.shape[1], device=valid.device) >= num_keys)
        features = self.box_head(self.box_roi_pool(maps, rois), place, boxes, key_mask)
        logits, deltas = self.box_predictor(features)
        return features, to_compute_dtype(logits), to_compute_dtype(deltas)

    def refine(self, logits: Tensor, deltas: Tensor, proposals: Proposals, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [N,P,4], clipped, and scores s0 [N,P,classes] of proposals; 0 where a box is none."""
        boxes = clip_boxes(decode_boxes(deltas, proposals.boxes, self.WEIGHTS), sizes)
        gone = ~proposals.valid | smaller_than(boxes, 1e-2)
        return boxes, logits.softmax(-1)[..., 1:].masked_fill(gone[..., None], 0)

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
        scores, index = final_scores.flatten(1).topk(min(self.most, P * C), 1)
        found = scores > 0
        boxes = torch.where(found[..., None], gather_rows(boxes, index // C), 0)
        return Detections(boxes, scores, torch.where(found, index % C, -1))


class RelationNetworks(TwoStageDetector):
    """Faster R-CNN with RelationRoIHeads."""

    # Appearance weights are exponentials of products of queries and keys. Adam's first steps, as large as what these
    # layers begin with, made a few of them all, whatever the geometry; no suppression was learned then.
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
    """The second stage on regions of `channels` maps, with the constants of the released code."""
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
    """Relation Networks on Faster R-CNN's one map. Published: ResNet-101 (with frozen_stages=2), where regions are
    pooled of the fourth stage, dilated and reduced to 256 channels; here of the map that the RPN works on.

    Args:
        num_classes: without the background.
        backbone: as in `make_body`.
        channels: of the RPN's convolution.
        hidden: of the two fully connected layers, divisible by 16.
        relations: how many relation modules are behind the first and the second of them.
        duplicate_removal: the learned one; False: class-wise suppression above an IoU of .5.
        proposals: of an image, in training and test.
        proposal_nms: IoU of the RPN's own suppression; None: the best by score as they are, no suppression anywhere.
            Objects have many duplicates then: duplicate removal is of all proposals in each class, otherwise of 100.
        roi: "pool" (published) or "align".
        num_samples: the regions of largest loss of an image, that losses of classes and boxes are of.
        frozen_stages: of the backbone, not trained.
        stride: of the map, 16 or, for small images, 8.
        scales: of anchors, in strides.
        min_size: of proposals, in pixels.
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
    """Relation Networks on a feature pyramid. The released code trains its RPN beforehand, and gives the second stage
    1000 proposals; here it is trained along.

    Args:
        num_classes: without the background.
        backbone: a ResNet or LR-Net, as in `make_body`.
        channels: of the pyramid and the RPN.
        hidden: of the two fully connected layers, divisible by 16.
        relations: how many relation modules are behind the first and the second of them.
        duplicate_removal: the learned one; False: class-wise suppression above an IoU of .5.
        proposals: of an image, in training and test.
        proposal_nms: IoU of the RPN's own suppression; None: the best by score as they are, no suppression anywhere.
            Objects have many duplicates then: duplicate removal is of all proposals in each class, otherwise of 150.
        num_samples: the regions of largest loss of an image, that losses of classes and boxes are of.
        frozen_stages: of the backbone, not trained.
        sizes: of the anchors of each level, in pixels.
    """
    maps, rpn = pyramid(
        backbone, channels, frozen_stages, sizes, post_nms=(proposals, proposals), nms_threshold=proposal_nms
    )
    pool = RegionPool("pyramid", 7, maps.strides[:4])
    first_n = proposals if proposal_nms is None else 150
    heads = relation_heads(pool, channels, hidden, num_classes, relations, duplicate_removal, first_n, num_samples)
    return RelationNetworks(maps, rpn, heads)
