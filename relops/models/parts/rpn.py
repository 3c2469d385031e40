"""Region proposal network (Ren et al., Faster R-CNN, https://arxiv.org/abs/1506.01497, section 3.1)."""

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
    """Of a batch, by descending score.

    Attributes:
        boxes: [N,P,4] in pixels; zeros = padding.
        scores: [N,P], log-odds that there is an object.
        valid: [N,P], False = padding.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor


class RPNHead(nn.Module):
    """A 3x3 convolution, and behind it two 1x1: scores and deltas of the k anchors of each pixel.

    Args:
        in_channels: of the maps.
        hidden: channels of the 3x3 convolution.
        k: anchors a pixel.
        two_way: two scores an anchor, background and object, of which a softmax is taken, as the released code has it;
            otherwise one, of which a sigmoid is. The softmax of two is the sigmoid of their difference, so that is what
            comes out, and binary cross entropy of it is the loss of either.
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
        """Log-odds [N,H * W * k] and deltas [N,H * W * k,4] of each map, in the order of the anchors."""
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
    """Proposals of a batch of images, and the losses that teach it.

    Targets (section 3.1.2): an anchor is positive if its IoU with an object is at least .7, or the largest that the
    object has with any anchor (ties too), negative if its IoU with every object is below .3, and else ignored.

    Losses: binary cross entropy of the sampled anchors' scores, and smooth L1 of the positive ones' deltas.

    Args:
        head: gives scores and deltas of anchors from maps, as RPNHead does.
        anchors: of the maps.
        levels: so many of the maps given are looked at, from the first; None: all.
        num_samples: anchors an image that the loss is of, at most half of them positive.
        pre_nms, post_nms: proposals an image and level before suppression, and an image after it: (training, test).
        nms_threshold: IoU above which a proposal gives way to one of higher score on the same level; None: none does.
        min_size: shorter proposals are dropped, in pixels.
        filter_first: the order of the released code: all boxes are decoded and clipped, and the small ones are gone
            before the highest scores are taken. Otherwise the highest scores are taken first (faster).
        ignore_outside: anchors that are not wholly in the image take no part in training.
        balance: lambda, with the paper's normalization (there 10): the loss of deltas is divided by the number of
            positions of the maps and multiplied by it. None: the released code's, divided by the number of samples.
    """

    POSITIVE, NEGATIVE = 0.7, 0.3
    WEIGHTS = (1.0, 1.0)
    BETA = 1 / 9  # of smooth L1, where it turns from a parabola into a line (1 / sigma^2)

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
        most: int | None = None,
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals of a batch, and with targets its losses.

        Args:
            maps: of the backbone.
            sizes: [N,2] height and width of each image, in pixels.
            targets: ground truth; None: no losses.
            box_gradients: proposals are differentiable by the deltas they were decoded from (through clipping; which
                are kept is not differentiated), for non-approximate joint training.
            most: proposals an image, in place of `post_nms`; no cut before suppression then.
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
        return self.proposals(logits.detach(), deltas, anchors, counts, sizes, most), losses

    def proposals(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, counts: list[int], sizes: Tensor, most: int | None
    ) -> Proposals:
        """Of scores [N,A], deltas [N,A,4] and anchors [A,4], of which counts belong to each level."""
        stage = 0 if self.training else 1
        pre_nms, post_nms = self.pre_nms[stage], self.post_nms[stage]
        if most is not None:
            pre_nms, post_nms = scores.shape[1], most
        if self.filter_first:
            with torch.no_grad():
                boxes = clip_boxes(decode_boxes(deltas, anchors, self.WEIGHTS), sizes)
                scores = scores.masked_fill(smaller_than(boxes, self.min_size), -math.inf)
        start, chosen, levels = 0, [], []
        for level, of_level in enumerate(scores.split(counts, 1)):
            chosen.append(start + of_level.topk(min(pre_nms, counts[level]), 1).indices)
            levels.append(torch.full_like(chosen[-1], level))
            start += counts[level]
        index = torch.cat(chosen, 1)
        scores = scores.gather(1, index)
        boxes = clip_boxes(decode_boxes(gather_rows(deltas, index), anchors[index], self.WEIGHTS), sizes)
        scores = scores.masked_fill(smaller_than(boxes.detach(), self.min_size), -math.inf)
        if self.nms_threshold is None:
            scores = torch.where(scores > -math.inf, scores, -math.inf)  # a NaN counts as none
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
        """Of scores [N,A] and deltas [N,A,4] of anchors [A,4]."""
        with torch.no_grad():
            positive, negative, matched = self.targets(anchors, sizes, targets)
            index, is_positive, valid = sample_candidates(positive, negative, self.num_samples, self.num_samples // 2)
            at, objects = anchors[index], gather_rows(targets.boxes.to(anchors.dtype), matched.gather(1, index))
            # What is no positive sample needs a target that is a number.
            wanted = encode_boxes(torch.where(is_positive[..., None], objects, at), at, self.WEIGHTS)
            num = valid.sum().clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(logits.gather(1, index), is_positive.float(), reduction="none")
        distance = F.smooth_l1_loss(gather_rows(deltas, index), wanted, reduction="none", beta=self.BETA).sum(-1)
        per = 1 / num if self.balance is None else self.balance * self.anchors.per_cell / logits.numel()
        return {"rpn_objectness": (loss * valid).sum() / num, "rpn_boxes": (distance * is_positive).sum() * per}

    def targets(self, anchors: Tensor, sizes: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Which anchors are positive and which negative, [N,A] bool, and the object each overlaps most with, [N,A]."""
        iou = target_overlaps(anchors[None], targets.boxes, targets.labels)
        inside = None
        if self.ignore_outside:
            limit = sizes.flip(-1)[:, None]
            inside = (anchors[:, :2] >= 0).all(-1) & (anchors[:, 2:] <= limit).all(-1)
            iou.masked_fill_(~inside[:, None], -1)
        best, matched = iou.max(1)
        best_of_object = iou.amax(2, keepdim=True)
        # Whatever has no overlap at all ties with everything else.
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
    """An RPN with its usual head.

    Args:
        channels: of the maps.
        hidden: channels of the head.
        cells, strides: of its Anchors.
        loss: "sigmoid", one score an anchor, or "softmax", two.
        options: of RPN.
    """
    check_choice("models", "rpn_loss", loss, ("sigmoid", "softmax"))
    anchors = Anchors(cells, strides)
    return RPN(RPNHead(channels, hidden, anchors.per_cell, loss == "softmax"), anchors, **options)
