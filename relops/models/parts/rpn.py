"""The region proposal network (Ren et al., Faster R-CNN, https://arxiv.org/abs/1506.01497, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._checks import check_choice
from relops._dtypes import to_compute_dtype
from relops.models.initialization import zero_bias
from relops.models.parts.anchors import Anchors
from relops.models.parts.box_coding import decode_boxes, encode_boxes
from relops.models.parts.boxes import clip_boxes, smaller_than
from relops.models.parts.padding import gather_rows
from relops.models.parts.sampling import sample_candidates, target_overlaps
from relops.models.structures import Targets
from relops.ops.nms_padded import nms_padded


class Proposals(NamedTuple):
    """The proposals of a batch of images, sorted by descending score.

    Attributes:
        boxes: [N,P,4] x1, y1, x2, y2 in pixels; zeros in padding.
        scores: [N,P], the log-odds that the box contains an object.
        valid: [N,P] bool, False in padding.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor


class RPNHead(nn.Module):
    """A 3x3 convolution, and two 1x1 convolutions for the scores and the deltas of the k anchors at each pixel.

    Args:
        in_channels: The number of channels of the maps.
        hidden: The number of channels of the 3x3 convolution.
        k: The number of anchors per pixel.
        two_way: If True, each anchor has a background and an object score, which form a softmax, as in the released
            code. If False, each anchor has one score with a sigmoid. The softmax of two scores is the sigmoid of their
            difference. The head therefore returns this difference, and the loss is the binary cross entropy in both
            cases.
    """

    def __init__(self, in_channels: int, hidden: int, k: int, two_way: bool = False) -> None:
        super().__init__()
        self.two_way = two_way
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(in_channels, hidden, 3, 1, 1), nn.ReLU(inplace=True)))
        self.cls_logits = nn.Conv2d(hidden, 2 * k if two_way else k, 1)
        self.bbox_pred = nn.Conv2d(hidden, 4 * k, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                zero_bias(module)

    def forward(self, maps: list[Tensor], anchors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the log-odds [N,H*W*k] and the deltas [N,H*W*k,4] of each map, in the order of the anchors."""
        logits, deltas = [], []
        for x in maps:
            x = self.conv(x)
            score = self.cls_logits(x)
            if self.two_way:
                background, foreground = score.chunk(2, 1)
                score = foreground - background
            logits.append(score.permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.bbox_pred(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        return logits, deltas


class RPN(nn.Module):
    """A region proposal network, which proposes boxes for a batch of images and computes its own losses.

    An anchor is positive if its IoU with an object is at least 0.7, or if it overlaps an object and no other anchor has
    a larger IoU with that object (section 3.1.2). Among the remaining anchors, those whose IoU with every object is
    below 0.3 are negative, and all others are ignored.

    The losses are the binary cross entropy of the scores of the sampled anchors and the smooth L1 loss of the deltas of
    the positive samples.

    Args:
        head: A module that computes the scores and deltas of anchors from maps, such as RPNHead.
        anchors: The anchors of the maps.
        levels: The number of maps that the RPN uses, counted from the first. If None, all maps are used.
        num_samples: The number of anchors per image that are sampled for the losses. At most half of them are positive.
        pre_nms: The maximum number of proposals per image and level before suppression, in (training, evaluation) mode.
        post_nms: The maximum number of proposals per image after suppression, in (training, evaluation) mode.
        nms_threshold: The IoU above which a proposal is suppressed by a proposal with a higher score on the same level.
            If None, no proposal is suppressed.
        min_size: The minimum width and height of proposals, in pixels.
        filter_first: If True, the RPN decodes and clips all boxes and removes small ones before it selects the highest
            scores, as in the released code. If False, it selects the highest scores first, which is faster.
        ignore_outside: Whether anchors that are not completely inside the image are ignored in training.
        balance: The weight lambda of the loss "rpn_boxes", 10 in the paper. This loss is multiplied by lambda and
            divided by the number of positions on the maps, as in the paper. If `balance` is None, the loss is divided
            by the number of samples, as in the released code.
    """

    POSITIVE, NEGATIVE = 0.7, 0.3
    WEIGHTS = (1.0, 1.0)
    BETA = 1 / 9  # the distance at which the smooth L1 loss changes from quadratic to linear (1 / sigma^2)

    def __init__(
        self,
        head: nn.Module,
        anchors: Anchors,
        *,
        levels: int | None = None,
        num_samples: int = 256,
        pre_nms: tuple[int, int] = (2000, 1000),
        post_nms: tuple[int, int] = (2000, 1000),
        nms_threshold: float | None = 0.7,
        min_size: float = 1e-3,
        filter_first: bool = False,
        ignore_outside: bool = False,
        balance: float | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self.anchors = anchors
        self.levels = levels
        self.num_samples = num_samples
        self.pre_nms, self.post_nms = pre_nms, post_nms
        self.nms_threshold = nms_threshold
        self.min_size = min_size
        self.filter_first = filter_first
        self.ignore_outside = ignore_outside
        self.balance = balance

    def forward(
        self,
        maps: list[Tensor],
        sizes: Tensor,
        targets: Targets | None = None,
        *,
        box_gradients: bool = False,
        max_proposals: int | None = None,
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Return the proposals of a batch and, if targets are given, the losses.

        Args:
            maps: The maps of the backbone.
            sizes: [N,2] height and width of each image, in pixels.
            targets: The ground truth, or None to compute no losses.
            box_gradients: Whether the proposals are differentiable with respect to the predicted deltas, as
                non-approximate joint training requires. Gradients pass through clipping, but not through the selection
                of proposals.
            max_proposals: The maximum number of proposals per image. If given, this number replaces `post_nms`, and
                `pre_nms` is ignored. If None, `pre_nms` and `post_nms` are used.

        Returns:
            The proposals, and a dict of the scalar losses "rpn_objectness" and "rpn_boxes". Without targets, the dict
            is empty.
        """
        maps = maps[: self.levels]
        anchors = self.anchors([x.shape[-2:] for x in maps])
        logits, deltas = self.head(maps, anchors)
        counts = [len(x) for x in anchors]
        logits, deltas = (to_compute_dtype(torch.cat(x, 1)) for x in (logits, deltas))
        anchors = torch.cat(anchors)
        losses = {} if targets is None else self.losses(logits, deltas, anchors, sizes, targets)
        if not box_gradients:
            deltas = deltas.detach()
        return self.proposals(logits.detach(), deltas, anchors, counts, sizes, max_proposals), losses

    def proposals(
        self,
        scores: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        counts: list[int],
        sizes: Tensor,
        max_proposals: int | None,
    ) -> Proposals:
        """Select proposals, given scores [N,A], deltas [N,A,4], anchors [A,4] and the number of anchors per level."""
        stage = 0 if self.training else 1
        pre_nms, post_nms = self.pre_nms[stage], self.post_nms[stage]
        if max_proposals is not None:
            pre_nms, post_nms = scores.shape[1], max_proposals
        if self.filter_first:
            with torch.no_grad():
                boxes = clip_boxes(decode_boxes(deltas, anchors, self.WEIGHTS), sizes)
                scores = scores.masked_fill(smaller_than(boxes, self.min_size), -math.inf)
        start, selected, levels = 0, [], []
        for level, level_scores in enumerate(scores.split(counts, 1)):
            selected.append(start + level_scores.topk(min(pre_nms, counts[level]), 1).indices)
            levels.append(torch.full_like(selected[-1], level))
            start += counts[level]
        index = torch.cat(selected, 1)
        scores = scores.gather(1, index)
        boxes = clip_boxes(decode_boxes(gather_rows(deltas, index), anchors[index], self.WEIGHTS), sizes)
        scores = scores.masked_fill(smaller_than(boxes.detach(), self.min_size), -math.inf)
        if self.nms_threshold is None:
            scores = torch.where(scores > -math.inf, scores, -math.inf)  # NaN also becomes -inf
            best, keep = scores.topk(min(post_nms, scores.shape[1]), 1)
            valid = best > -math.inf
        else:
            keep, _ = nms_padded(
                boxes, scores, self.nms_threshold, post_nms, torch.cat(levels, 1), score_threshold=-math.inf
            )
            valid = keep >= 0
            keep = keep.clamp(min=0)
        boxes = torch.where(valid[..., None], gather_rows(boxes, keep), 0)
        return Proposals(boxes, scores.gather(1, keep), valid)

    def losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """Return the losses, given scores [N,A], deltas [N,A,4] and anchors [A,4]."""
        with torch.no_grad():
            positive, negative, matched = self.targets(anchors, sizes, targets)
            index, is_positive, valid = sample_candidates(positive, negative, self.num_samples, self.num_samples // 2)
            samples = anchors[index]
            objects = gather_rows(targets.boxes.to(anchors.dtype), matched.gather(1, index))
            # The target of a sample that is not positive has no weight, but it must be finite.
            objects = torch.where(is_positive[..., None], objects, samples)
            target_deltas = encode_boxes(objects, samples, self.WEIGHTS)
            num = valid.sum().clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(logits.gather(1, index), is_positive.float(), reduction="none")
        distance = F.smooth_l1_loss(gather_rows(deltas, index), target_deltas, reduction="none", beta=self.BETA).sum(-1)
        scale = 1 / num if self.balance is None else self.balance * self.anchors.per_cell / logits.numel()
        return {"rpn_objectness": (loss * valid).sum() / num, "rpn_boxes": (distance * is_positive).sum() * scale}

    def targets(self, anchors: Tensor, sizes: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Return masks of the positive and the negative anchors, and the object that each anchor overlaps most.

        All three tensors are [N,A]. The third tensor holds indices into the targets of the image.
        """
        iou = target_overlaps(anchors[None], targets.boxes, targets.labels)
        inside = None
        if self.ignore_outside:
            limit = sizes.flip(-1)[:, None]
            inside = (anchors[:, :2] >= 0).all(-1) & (anchors[:, 2:] <= limit).all(-1)
            iou.masked_fill_(~inside[:, None], -1)
        best, matched = iou.max(1)
        best_of_object = iou.amax(2, keepdim=True)
        # Without this line, padding and objects that overlap no anchor would make every anchor positive.
        best_of_object.masked_fill_(best_of_object <= 0, 2)
        positive = (best >= self.POSITIVE) | (iou == best_of_object).any(1)
        negative = (best < self.NEGATIVE) & ~positive
        return positive, negative if inside is None else negative & inside, matched


def make_rpn(
    channels: int,
    hidden: int,
    cells: Sequence[Sequence[Sequence[float]]],
    strides: Sequence[int],
    *,
    loss: str = "sigmoid",
    **options: Any,
) -> RPN:
    """Build an RPN with an `RPNHead`.

    Args:
        channels: The number of channels of the maps.
        hidden: The number of channels of the 3x3 convolution.
        cells: For each level, the cell anchors, which are boxes around the first pixel of the map.
        strides: The stride of each level, in pixels of the image.
        loss: "sigmoid" for one score per anchor, or "softmax" for two.
        options: Options of RPN.

    Raises:
        ValueError: If `loss` is unknown.
    """
    check_choice("models", "rpn_loss", loss, ("sigmoid", "softmax"))
    anchors = Anchors(cells, strides)
    return RPN(RPNHead(channels, hidden, anchors.per_cell, loss == "softmax"), anchors, **options)
