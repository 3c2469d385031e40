"""The learned duplicate removal network, which takes the place of non-maximum suppression."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._checks import check_features, check_integers, check_mask, check_shape
from relops._dtypes import compute_dtype
from relops._tracing import has_values
from relops.nn.object_relation import ObjectRelation
from relops.ops.box_iou import box_iou
from relops.ops.rank_embedding import rank_embedding

# The loss sees class scores no closer to 0 and 1 than this: to 1, float32 comes no closer.
CLOSEST = 2.0**-23


class RankedDetections(NamedTuple):
    """What `DuplicateRemoval` makes of B images, K objects, C classes: n = min(first_n, K) objects a class, best first.

    Classes in which fewer are left are filled up with index -1 and zeros. Numbers are float32, or float64 for float64
    inputs.

    Attributes:
        final_scores: [B,K,C], what to rank detections by: s0 times the mean of s1 over the thresholds; 0 where an
            object was left out.
        indices: [B,C,n] int64 in [0,K).
        boxes: [B,C,n,4], without gradient.
        scores: [B,C,n], s0.
        logits: [B,C,n,E], whose sigmoid is s1.
    """

    final_scores: Tensor
    indices: Tensor
    boxes: Tensor
    scores: Tensor
    logits: Tensor


class DuplicateRemoval(nn.Module):
    """Learned suppression of duplicates (Hu et al., Relation Networks for Object Detection, 2018).

    In every class the first_n best objects are ranked by class score, s0. The embedded rank of an object and its
    feature, both projected to hidden_dim, are added, and an `ObjectRelation` lets the objects of the class see each
    other. From a ReLU of that, a linear layer and a sigmoid give s1: the probability that this box is the right one of
    its object, for each of several thresholds of IoU. The final score is s0 * s1. All classes of all images are one
    batch.

    Args:
        channels: width of the features.
        first_n: how many objects of a class take part; the released code has 100, and 150 with a feature pyramid.
        thresholds: E thresholds of IoU, each with an s1 of its own.
        score_threshold: an object whose s0 is not larger is left out of that class, in training too. The released code
            does so at test alone, and with whole classes; 0 gives what it computes in training.
        positive_weight: of the one right box in the loss, against 1 of all others.
        rank_dim: width of the embedded rank: 1024 in the released code, 128 in the paper.
        hidden_dim, heads, head_dim, geometry: those of the `ObjectRelation`.

    Left out are also objects with a score of NaN, or a box that is inverted or not finite, which would spread to all
    others of their class. Of equal scores the lower index is first.
    On the CPU, classes in which no object is left cost nothing, and the others are computed with those of about their
    length; on CUDA and under torch.compile shapes depend on no value, and nothing waits for the device.

    The released parameters fit as they are, with geometry="official":

        nms_rank_weight, nms_rank_bias                               rank.weight [128,1024], rank.bias
        roi_feat_embedding_weight, roi_feat_embedding_bias           feature.weight [128,1024], feature.bias
        nms_query_1_weight, nms_query_1_bias                         relation.query.weight [1024,128], ..bias
        nms_key_1_weight, nms_key_1_bias                             relation.key.weight [1024,128], ..bias
        nms_linear_out_1_weight.flatten(1), nms_linear_out_1_bias    relation.value.weight [128,128], ..bias
        nms_pair_pos_fc1_1_weight, nms_pair_pos_fc1_1_bias           relation.geometry.weight [16,64], ..bias
        nms_logit_weight, nms_logit_bias                             logit.weight [5,128], logit.bias

    Example:
        >>> removal = relops.nn.DuplicateRemoval()
        >>> detections = removal(features, logits.softmax(-1)[..., 1:], boxes)  # [B,K,1024], [B,K,80], [B,K,4]
        >>> loss = removal.loss(detections, gt_boxes, gt_labels)  # [B,G,4], [B,G]
        >>> score, which = detections.final_scores.flatten(1).topk(100)  # no suppression follows
        >>> objects, classes = which // 80, which % 80
    """

    def __init__(
        self,
        channels: int = 1024,
        first_n: int = 100,
        thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9),
        score_threshold: float = 0.01,
        positive_weight: float = 4.0,
        rank_dim: int = 1024,
        hidden_dim: int = 128,
        heads: int = 16,
        head_dim: int = 64,
        geometry: str = "paper",
    ) -> None:
        super().__init__()
        self.channels, self.first_n, self.thresholds = channels, first_n, tuple(thresholds)
        self.score_threshold, self.positive_weight, self.rank_dim = score_threshold, positive_weight, rank_dim
        self.rank = nn.Linear(rank_dim, hidden_dim)
        self.feature = nn.Linear(channels, hidden_dim)
        self.relation = ObjectRelation(hidden_dim, heads, head_dim, geometry)
        self.logit = nn.Linear(hidden_dim, len(self.thresholds))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the released code, but for the relation's geometry: at first, s1 is about 1/20."""
        self.relation.reset_parameters()
        for linear in (self.rank, self.feature, self.logit):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.logit.bias, -3.0)

    def forward(
        self, features: Tensor, scores: Tensor, boxes: Tensor, padding_mask: Tensor | None = None
    ) -> RankedDetections:
        """
        Args:
            features: [B,K,channels].
            scores: [B,K,C] in [0,1]: s0, of all classes but the background.
            boxes: [B,K,4], or [B,K,C,4] where every class has its own: x1, y1, x2, y2 in pixels of the image, float32
                beside 16-bit features. They get no gradient.
            padding_mask: [B,K] bool; True: there is no such object. Its numbers are not used, but features are finite.
        """
        self._check(features, scores, boxes, padding_mask)
        B, K, C = scores.shape
        scores = scores.to(compute_dtype(scores.dtype)).transpose(1, 2)
        boxes = boxes.detach()[:, None] if boxes.dim() == 3 else boxes.detach().transpose(1, 2)
        proper = boxes.isfinite().all(-1) & (boxes[..., :2] <= boxes[..., 2:]).all(-1)
        left_out = ~((scores > self.score_threshold) & proper)  # [B,C,K]
        if padding_mask is not None:
            left_out = left_out | padding_mask[:, None]

        n = min(self.first_n, K)
        ranked, order = scores.detach().masked_fill(left_out, -math.inf).sort(dim=-1, descending=True, stable=True)
        order, padding = order[..., :n], ranked[..., :n] == -math.inf
        scores = scores.gather(-1, order).masked_fill(padding, 0.0)
        boxes = boxes.expand(B, C, K, 4).gather(2, order[..., None].expand(B, C, n, 4))
        boxes = boxes.masked_fill(padding[..., None], 0.0)

        logits = self._logits(features, order, boxes, padding)
        final = scores * logits.sigmoid().mean(-1)
        final_scores = final.new_zeros(B, C, K).scatter(-1, order, final).transpose(1, 2)
        return RankedDetections(final_scores, order.masked_fill(padding, -1), boxes, scores, logits)

    def _logits(self, features: Tensor, order: Tensor, boxes: Tensor, padding: Tensor) -> Tensor:
        (B, K, _), (_, C, n) = features.shape, order.shape
        objects = order + K * torch.arange(B, device=order.device)[:, None, None]
        objects, boxes, padding = (x.flatten(0, 1) for x in (objects, boxes, padding))
        groups, by_length = [(0, B * C, n)], None
        if padding.device.type == "cpu" and has_values(padding):
            lengths, by_length = (n - padding.sum(1)).sort()
            groups = _groups_of_length(lengths.tolist())
            objects, boxes, padding = (x[by_length] for x in (objects, boxes, padding))

        # An object is in many classes, a rank in all, and projections are linear: those of their sum are added up.
        ranks = torch.arange(groups[-1][2], device=order.device)
        ranks = rank_embedding(ranks.to(compute_dtype(features.dtype)), self.rank_dim).to(self.rank.weight.dtype)
        ranks = self._projected(self.rank(ranks), with_bias=False)
        features = self._projected(self.feature(features).flatten(0, 1))
        M, D, hidden = self.relation.heads, self.relation.head_dim, self.relation.channels

        logits = features.new_zeros(B * C, n, len(self.thresholds), dtype=compute_dtype(features.dtype))
        for first, end, length in groups:
            of_group = slice(first, end), slice(length)
            x = features.index_select(0, objects[of_group].flatten())
            x = x.view(end - first, length, features.shape[1]).add_(ranks[:length])
            x, query, key, value = x.split([hidden, M * D, M * D, hidden], -1)
            x = x + self.relation.relate(query, key, value, boxes[of_group], padding[of_group])
            logits[of_group] = self.logit(x.relu()).to(logits.dtype)
        logits = logits.masked_fill(padding[..., None], 0.0)
        if by_length is not None:
            logits = torch.empty_like(logits).index_copy(0, by_length, logits)
        return logits.unflatten(0, (B, C))

    def _projected(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """x [..,hidden_dim], and beside it what the relation makes of it: query, key and value."""
        projections = (self.relation.query, self.relation.key, self.relation.value)
        return torch.cat([x, *(F.linear(x, p.weight, p.bias if with_bias else None) for p in projections)], -1)

    def targets(self, detections: RankedDetections, gt_boxes: Tensor, gt_labels: Tensor) -> Tensor:
        """Which detections are right, on the device that they are on, without waiting for it.

        A box belongs to the object of its class with which it has the largest IoU, of equals the first; no box serves
        two. Of the boxes of an object whose IoU is larger than a threshold, the one of highest s0 is right at it, and
        all others are wrong. So it is in the released code, but for the pixel that its IoU adds to widths and heights.

        Args:
            detections: of the forward pass.
            gt_boxes: [B,G,4], as the boxes.
            gt_labels: [B,G] of an integer dtype in [0,C); others are padding.

        Returns:
            [B,C,n,E] bool; False in padding.
        """
        self._check_objects(detections, gt_boxes, gt_labels)
        B, C, n = detections.indices.shape
        G, device = gt_boxes.shape[1], gt_boxes.device
        if G == 0:
            return torch.zeros_like(detections.logits, dtype=torch.bool)
        iou = box_iou(detections.boxes.flatten(1, 2), gt_boxes.detach()).view(B, C, n, G)
        of_class = gt_labels[:, None, :] == torch.arange(C, device=device)[:, None]  # [B,C,G]
        iou, owner = iou.masked_fill(~of_class[:, :, None], -1.0).max(-1)
        iou = iou.masked_fill(detections.indices < 0, -1.0)

        matches = torch.stack([iou > threshold for threshold in self.thresholds], -1)  # [B,C,n,E]
        owner = owner[..., None].expand(matches.shape)
        rank = torch.arange(n, device=device)[:, None].expand(matches.shape)
        best = rank.new_full((B, C, G, matches.shape[-1]), n)
        best = best.scatter_reduce(2, owner, rank.where(matches, n), "amin")
        return matches & (best.gather(2, owner) == rank)

    def loss(self, detections: RankedDetections, gt_boxes: Tensor, gt_labels: Tensor) -> Tensor:
        """Binary cross entropy of s0 * s1 and `targets`, whose arguments it takes; a scalar.

        It is summed over the detections, classes and thresholds, divided by first_n * E as in the released code, and
        averaged over images. It is computed from the logits of s1, as 1 - s0 * s1 = (1 - s0) + s0 * (1 - s1), which
        nothing cancels in, and without the released code's 1e-8 in the logarithms; instead, s0 is clamped to
        [2^-23, 1 - 2^-23]. So it is finite for any s0 in [0,1] and any finite logits. Of one term, the derivative by a
        logit is at most positive_weight, that by s0 at most positive_weight / max(s0, 2^-23) where the box is right and
        2^23 where it is wrong, but 0 where s0 is clamped.
        """
        targets = self.targets(detections, gt_boxes, gt_labels)
        s0, logits = detections.scores.clamp(CLOSEST, 1 - CLOSEST)[..., None], detections.logits
        right = -self.positive_weight * (s0.log() + F.logsigmoid(logits))
        wrong = -torch.log((1 - s0) + s0 * (-logits).sigmoid())
        terms = right.where(targets, wrong).masked_fill(detections.indices[..., None] < 0, 0.0)
        return terms.sum() / (self.first_n * len(self.thresholds) * max(len(terms), 1))

    def _check(self, features: Tensor, scores: Tensor, boxes: Tensor, padding_mask: Tensor | None) -> None:
        name = "nn.DuplicateRemoval"
        check_features(name, "features", features)
        check_features(name, "scores", scores)
        check_features(name, "boxes", boxes)
        if features.dim() != 3 or features.shape[-1] != self.channels:
            raise ValueError(
                f"relops.{name}: features must be [B,K,channels] with {self.channels} channels, got shape "
                f"{list(features.shape)}"
            )
        B, K, _ = features.shape
        if scores.dim() != 3 or scores.shape[:2] != (B, K):
            raise ValueError(f"relops.{name}: scores must be [B,K,C] = [{B},{K},C], got shape {list(scores.shape)}")
        C = scores.shape[-1]
        if boxes.shape not in ((B, K, 4), (B, K, C, 4)):
            raise ValueError(
                f"relops.{name}: boxes must be [B,K,4] = [{B},{K},4] or [B,K,C,4] = [{B},{K},{C},4], got shape "
                f"{list(boxes.shape)}"
            )
        if padding_mask is not None:
            check_mask(name, "padding_mask", padding_mask, "[B,K]", B, K)

    def _check_objects(self, detections: RankedDetections, gt_boxes: Tensor, gt_labels: Tensor) -> None:
        name, B = "nn.DuplicateRemoval", len(detections.indices)
        check_features(name, "gt_boxes", gt_boxes)
        if gt_boxes.dim() != 3 or gt_boxes.shape[0] != B or gt_boxes.shape[2] != 4:
            raise ValueError(f"relops.{name}: gt_boxes must be [B,G,4] = [{B},G,4], got shape {list(gt_boxes.shape)}")
        check_integers(name, "gt_labels", gt_labels)
        check_shape(name, "gt_labels", gt_labels, "[B,G]", *gt_boxes.shape[:2])

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, first_n={self.first_n}, thresholds={self.thresholds}, "
            f"score_threshold={self.score_threshold}, positive_weight={self.positive_weight}, rank_dim={self.rank_dim}"
        )


def _groups_of_length(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Of ascending lengths: first, end and longest length of those that share the highest bit; none of length 0.

    Where there are none at all, a group without rows: parameters then still have a gradient.
    """
    first = bisect.bisect_right(lengths, 0)
    groups = []
    while first < len(lengths):
        end = bisect.bisect_left(lengths, 1 << lengths[first].bit_length())
        groups.append((first, end, lengths[end - 1]))
        first = end
    return groups or [(0, 0, 0)]
