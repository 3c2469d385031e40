"""The learned duplicate removal network, which replaces non-maximum suppression."""

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

# The loss clamps class scores to [SCORE_MARGIN, 1 - SCORE_MARGIN]. The margin is the machine epsilon of float32.
SCORE_MARGIN = 2.0**-23


class RankedDetections(NamedTuple):
    """The output of `DuplicateRemoval` for B images with K objects and C classes.

    The output has n = min(first_n, K) slots per class, sorted by descending class score s0. If fewer objects remain in
    a class, the unused slots have the index -1 and zeros in the other fields. Floating-point tensors are float32, or
    float64 for float64 inputs.

    Attributes:
        final_scores: Scores [B,K,C] for ranking the detections: s0 times the mean of s1 over the thresholds, and 0 for
            excluded objects.
        indices: Indices [B,C,n] of the objects, int64 in [0,K).
        boxes: Boxes [B,C,n,4], without gradient.
        scores: Class scores s0 [B,C,n].
        logits: Logits [B,C,n,E], whose sigmoid is s1.
    """

    final_scores: Tensor
    indices: Tensor
    boxes: Tensor
    scores: Tensor
    logits: Tensor


class DuplicateRemoval(nn.Module):
    """Learned duplicate removal (Relation Networks, https://arxiv.org/abs/1711.11575, section 4.3).

    For each class, the `first_n` objects with the highest class scores s0 are ranked by s0. The embedding of an
    object's rank and the object's feature are projected to `hidden_dim` and added. An `ObjectRelation` then exchanges
    information between the objects of the class. A ReLU, a linear layer and a sigmoid turn the output into s1. For each
    of several IoU thresholds, s1 is the probability that the box is the correct box of its object. The final score is
    s0 times the mean of s1 over the thresholds. All classes of all images are processed as one batch.

    An object is excluded from a class if its s0 does not exceed `score_threshold`. It is also excluded if its s0 is
    NaN, or if its box is inverted or not finite, because such invalid values would spread to all other objects of the
    class. Objects with equal scores are ranked by ascending index. On the CPU, classes without remaining objects are
    skipped, and the other classes are processed in groups with similar numbers of objects. On CUDA and under
    torch.compile, no shape depends on values, so the host never waits for the device.

    The parameters of the released code can be used with `geometry="official"`. Their names in relops are::

        nms_rank_weight, nms_rank_bias                               rank.weight [128,1024], rank.bias
        roi_feat_embedding_weight, roi_feat_embedding_bias           feature.weight [128,1024], feature.bias
        nms_query_1_weight, nms_query_1_bias                         relation.query.weight [1024,128], ..bias
        nms_key_1_weight, nms_key_1_bias                             relation.key.weight [1024,128], ..bias
        nms_linear_out_1_weight.flatten(1), nms_linear_out_1_bias    relation.value.weight [128,128], ..bias
        nms_pair_pos_fc1_1_weight, nms_pair_pos_fc1_1_bias           relation.geometry.weight [16,64], ..bias
        nms_logit_weight, nms_logit_bias                             logit.weight [5,128], logit.bias

    Args:
        channels: Width of the features.
        first_n: Maximum number of objects per class. The released code uses 100, and 150 with a feature pyramid.
        thresholds: E IoU thresholds. The network predicts one s1 for each threshold.
        score_threshold: An object is excluded from a class if its s0 does not exceed this number, in training as well
            as in evaluation. The released code excludes only entire classes, and only at test time. Set the threshold
            to 0 to reproduce the training of the released code.
        positive_weight: Weight of the correct box of each object in the loss. All other boxes have weight 1.
        rank_dim: Width of the rank embedding. The released code uses 1024, and the paper uses 128.
        hidden_dim: Width of the features inside the `ObjectRelation`; must be divisible by `heads`.
        heads: Number of relations.
        head_dim: Width of the queries and keys of each relation.
        geometry: Normalization of the distance between two boxes. "paper" divides the distance by the size of the key's
            box, and "official" by the size of the query's box, as in the released code.

    Raises:
        ValueError: If `heads` does not divide `hidden_dim`, or `geometry` is unknown.

    Example:
        >>> import torch, relops
        >>> removal = relops.nn.DuplicateRemoval(32, first_n=5, rank_dim=32, hidden_dim=32, heads=4, head_dim=8)
        >>> features, scores = torch.randn(2, 10, 32), torch.rand(2, 10, 3)  # 2 images, 10 objects, 3 classes
        >>> corner = 100 * torch.rand(2, 10, 2)
        >>> boxes = torch.cat([corner, corner + 20], -1)
        >>> detections = removal(features, scores, boxes)
        >>> detections.final_scores.shape
        torch.Size([2, 10, 3])

        The best detections need no suppression afterwards:

        >>> score, index = detections.final_scores.flatten(1).topk(4)
        >>> objects, classes = index // 3, index % 3

        The loss is computed from the ground truth, which is padded with the label -1:

        >>> loss = removal.loss(detections, gt_boxes=boxes[:, :2], gt_labels=torch.tensor([[0, 1], [2, -1]]))
        >>> loss.shape
        torch.Size([])
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
        """Initialize the parameters as the released code does, except for the geometry bias of `relation`.

        The geometry bias starts at 0.1, and s1 starts at about 1/20.
        """
        self.relation.reset_parameters()
        for linear in (self.rank, self.feature, self.logit):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.logit.bias, -3.0)

    def forward(
        self, features: Tensor, scores: Tensor, boxes: Tensor, padding_mask: Tensor | None = None
    ) -> RankedDetections:
        """Rank the objects of each class and predict which boxes are duplicates.

        Args:
            features: Features [B,K,channels] of K objects of B images, of dtype float64, float32, float16 or bfloat16.
            scores: Class scores s0 [B,K,C] in [0,1], without the background.
            boxes: Boxes [B,K,4], or [B,K,C,4] if each class has its own, as x1, y1, x2, y2 in pixels of the image. With
                16-bit features, use float32 boxes. Boxes get no gradient.
            padding_mask: Bool mask [B,K], True for slots without an object, or None if there is no padding. The values
                in padding slots are not used, but the features must be finite.

        Returns:
            The ranked detections with their scores.

        Gradients:
            Gradients flow to `features`, `scores` and all parameters.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape.
        """
        self._check(features, scores, boxes, padding_mask)
        B, K, C = scores.shape
        scores = scores.to(compute_dtype(scores.dtype)).transpose(1, 2)
        boxes = boxes.detach()[:, None] if boxes.dim() == 3 else boxes.detach().transpose(1, 2)
        valid = boxes.isfinite().all(-1) & (boxes[..., :2] <= boxes[..., 2:]).all(-1)
        excluded = ~((scores > self.score_threshold) & valid)  # [B,C,K]
        if padding_mask is not None:
            excluded = excluded | padding_mask[:, None]

        n = min(self.first_n, K)
        ranked, order = scores.detach().masked_fill(excluded, -math.inf).sort(dim=-1, descending=True, stable=True)
        order, padding = order[..., :n], ranked[..., :n] == -math.inf
        scores = scores.gather(-1, order).masked_fill(padding, 0.0)
        boxes = boxes.expand(B, C, K, 4).gather(2, order[..., None].expand(B, C, n, 4))
        boxes = boxes.masked_fill(padding[..., None], 0.0)

        logits = self._logits(features, order, boxes, padding)
        final = scores * logits.sigmoid().mean(-1)
        final_scores = final.new_zeros(B, C, K).scatter(-1, order, final).transpose(1, 2)
        return RankedDetections(final_scores, order.masked_fill(padding, -1), boxes, scores, logits)

    def _logits(self, features: Tensor, order: Tensor, boxes: Tensor, padding: Tensor) -> Tensor:
        """Compute the logits [B,C,n,E] of the ranked objects."""
        (B, K, _), (_, C, n) = features.shape, order.shape
        objects = order + K * torch.arange(B, device=order.device)[:, None, None]
        objects, boxes, padding = (x.flatten(0, 1) for x in (objects, boxes, padding))
        groups, length_order = [(0, B * C, n)], None
        if padding.device.type == "cpu" and has_values(padding):
            lengths, length_order = (n - padding.sum(1)).sort()
            groups = _group_lengths(lengths.tolist())
            objects, boxes, padding = (x[length_order] for x in (objects, boxes, padding))

        # The same object occurs in many classes, and the same ranks occur in all classes. The projections are linear,
        # so each feature and each rank is projected only once, and their projections are added.
        ranks = torch.arange(groups[-1][2], device=order.device)
        ranks = rank_embedding(ranks.to(compute_dtype(features.dtype)), self.rank_dim).to(self.rank.weight.dtype)
        ranks = self._project(self.rank(ranks), with_bias=False)
        features = self._project(self.feature(features).flatten(0, 1))
        M, D, hidden = self.relation.heads, self.relation.head_dim, self.relation.channels

        logits = features.new_zeros(B * C, n, len(self.thresholds), dtype=compute_dtype(features.dtype))
        for first, end, length in groups:
            group_slice = slice(first, end), slice(length)
            x = features.index_select(0, objects[group_slice].flatten())
            x = x.view(end - first, length, features.shape[1]).add_(ranks[:length])
            x, query, key, value = x.split([hidden, M * D, M * D, hidden], -1)
            x = x + self.relation.relate(query, key, value, boxes[group_slice], padding[group_slice])
            logits[group_slice] = self.logit(x.relu()).to(logits.dtype)
        logits = logits.masked_fill(padding[..., None], 0.0)
        if length_order is not None:
            logits = torch.empty_like(logits).index_copy(0, length_order, logits)
        return logits.unflatten(0, (B, C))

    def _project(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """Concatenate x [..,hidden_dim] and its projections to the query, key and value of the relation."""
        projections = (self.relation.query, self.relation.key, self.relation.value)
        return torch.cat([x, *(F.linear(x, p.weight, p.bias if with_bias else None) for p in projections)], -1)

    def targets(self, detections: RankedDetections, gt_boxes: Tensor, gt_labels: Tensor) -> Tensor:
        """Determine which detections are correct.

        Each box is assigned to the object of the same class with which it has the largest IoU. Ties go to the first
        object, and a box is assigned to at most one object. For each object and threshold, the box with the highest s0
        is correct among the assigned boxes whose IoU exceeds the threshold. All other boxes are wrong. The released
        code does the same, except that its IoU adds one pixel to widths and heights. The targets are computed on the
        device of the detections, and the host does not wait for the device.

        Args:
            detections: Output of the forward pass.
            gt_boxes: Ground-truth boxes [B,G,4] as x1, y1, x2, y2 in pixels of the image.
            gt_labels: Classes [B,G] in [0,C), of an integer dtype. All other values mark padding.

        Returns:
            A bool tensor [B,C,n,E], False in padding.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device.
        """
        self._check_ground_truth(detections, gt_boxes, gt_labels)
        B, C, n = detections.indices.shape
        G, device = gt_boxes.shape[1], gt_boxes.device
        if G == 0:
            return torch.zeros_like(detections.logits, dtype=torch.bool)
        iou = box_iou(detections.boxes.flatten(1, 2), gt_boxes.detach()).view(B, C, n, G)
        same_class = gt_labels[:, None, :] == torch.arange(C, device=device)[:, None]  # [B,C,G]
        iou, matched = iou.masked_fill(~same_class[:, :, None], -1.0).max(-1)
        iou = iou.masked_fill(detections.indices < 0, -1.0)

        overlapping = torch.stack([iou > threshold for threshold in self.thresholds], -1)  # [B,C,n,E]
        matched = matched[..., None].expand(overlapping.shape)
        rank = torch.arange(n, device=device)[:, None].expand(overlapping.shape)
        best = rank.new_full((B, C, G, overlapping.shape[-1]), n)
        best = best.scatter_reduce(2, matched, rank.where(overlapping, n), "amin")
        return overlapping & (best.gather(2, matched) == rank)

    def loss(self, detections: RankedDetections, gt_boxes: Tensor, gt_labels: Tensor) -> Tensor:
        """Compute the binary cross entropy between s0 * s1 and the `targets`.

        The loss is summed over detections, classes and thresholds, divided by first_n * E as in the released code, and
        averaged over the images.

        The loss is computed from the logits of s1, with 1 - s0 * s1 = (1 - s0) + s0 * (1 - s1), which avoids
        cancellation. Instead of adding 1e-8 in the logarithms, as the released code does, the loss clamps s0 to [2^-23,
        1 - 2^-23]. The loss is therefore finite for any s0 in [0,1] and any finite logits. The derivative of a term of
        the sum with respect to its logit is at most `positive_weight`. The derivative with respect to s0 is 0 if s0 is
        clamped. Otherwise, the derivative with respect to s0 is at most positive_weight / max(s0, 2^-23) for a correct
        box and at most 2^23 for a wrong box.

        Args:
            detections: Output of the forward pass.
            gt_boxes: Ground-truth boxes [B,G,4] as x1, y1, x2, y2 in pixels of the image.
            gt_labels: Classes [B,G] in [0,C), of an integer dtype. All other values mark padding.

        Returns:
            The loss, a scalar.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device.
        """
        targets = self.targets(detections, gt_boxes, gt_labels)
        s0, logits = detections.scores.clamp(SCORE_MARGIN, 1 - SCORE_MARGIN)[..., None], detections.logits
        positive = -self.positive_weight * (s0.log() + F.logsigmoid(logits))
        negative = -torch.log((1 - s0) + s0 * (-logits).sigmoid())
        terms = positive.where(targets, negative).masked_fill(detections.indices[..., None] < 0, 0.0)
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

    def _check_ground_truth(self, detections: RankedDetections, gt_boxes: Tensor, gt_labels: Tensor) -> None:
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


def _group_lengths(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Group lengths, which must be in ascending order, by their highest bit.

    Returns:
        For each group, the index of the first element, the index after the last element, and the longest length in the
        group. Lengths of 0 belong to no group. If all lengths are 0, the result is a single group without elements, so
        that the parameters still get a gradient.
    """
    first = bisect.bisect_right(lengths, 0)
    groups = []
    while first < len(lengths):
        end = bisect.bisect_left(lengths, 1 << lengths[first].bit_length())
        groups.append((first, end, lengths[end - 1]))
        first = end
    return groups or [(0, 0, 0)]
