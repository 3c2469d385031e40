"""Test cases for nms, batched_nms, nms_padded and soft_nms: boxes with scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .base import Bad, Inputs, Selection, bad_numbers, bad_options, change, put, to_other_device


@dataclass(frozen=True)
class Suppression:
    """The sizes and options of a sample. The letters have the same meaning as in relops.nms_padded."""

    K: int = 40
    B: int | None = None
    classes: int | None = None  # the number of classes; None: no idxs, or one class for batched_nms
    kind: str = "grid"  # the kind of boxes and scores: "grid", "anywhere" or "degenerate"
    iou_threshold: float = 1 / 3
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.K,) if self.B is None else (self.B, self.K)

    def boxes(self, generator: torch.Generator) -> Tensor:
        """Return random boxes. For the kind "grid", some boxes are duplicates and some IoUs equal the threshold."""
        corner, extent = torch.rand(2, *self.shape, 2, generator=generator, dtype=torch.float64)
        if self.kind == "anywhere":
            return torch.cat([100 * corner, 100 * corner + 60 * extent], -1)
        corner, extent = (9 * corner).floor() - 4, (6 * extent).floor() + 1
        boxes = torch.cat([corner, corner + extent], -1)
        if self.kind == "degenerate":
            odd = [
                [math.nan, 0.0, 3.0, 3.0],
                [0.0, 0.0, math.inf, 3.0],
                [-math.inf, 0.0, 3.0, 3.0],
                [0.0, 0.0, 0.0, 0.0],
                [2.0, 2.0, 2.0, 2.0],
                [3.0, 0.0, 0.0, 3.0],
                [3.0, 3.0, 0.0, 0.0],
                [-1e30, -1e30, 1e30, 1e30],
                [0.0, 0.0, 1e30, 1e30],
                [-1e4, -1e4, 1e4, 1e4],
            ]
            indices = torch.randperm(self.K, generator=generator)[: 2 * len(odd)]
            boxes[..., indices, :] = torch.tensor(odd + odd, dtype=torch.float64)[: len(indices)]
        return boxes

    def scores(self, generator: torch.Generator) -> Tensor:
        """Return random scores. Some scores are equal unless `kind` is "anywhere"."""
        scores = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.kind != "anywhere":
            scores = (16 * scores).floor() / 16
        if self.kind == "degenerate":
            odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, math.nan, -1.0])
            indices = torch.randperm(self.K, generator=generator)[: len(odd)]
            scores[..., indices] = odd.double()[: len(indices)]
        return scores

    def idxs(self, generator: torch.Generator) -> Tensor | None:
        if self.classes is None:
            return None
        ids = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 2**32, 5])
        return ids[torch.randint(self.classes, self.shape, generator=generator)]

    def nms(self, generator: torch.Generator) -> Inputs:
        boxes, scores = self.boxes(generator), self.scores(generator)
        return {"boxes": boxes, "scores": scores, "iou_threshold": self.iou_threshold}

    def batched_nms(self, generator: torch.Generator) -> Inputs:
        boxes, scores = self.boxes(generator), self.scores(generator)
        idxs = replace(self, classes=self.classes or 1).idxs(generator)
        return {"boxes": boxes, "scores": scores, "idxs": idxs, "iou_threshold": self.iou_threshold}

    def nms_padded(self, generator: torch.Generator) -> Inputs:
        options = {"max_output": 12, "idxs": self.idxs(generator), "score_threshold": None} | dict(self.options)
        return self.nms(generator) | options

    def soft_nms(self, generator: torch.Generator) -> Inputs:
        options = {
            "method": "gaussian",
            "iou_threshold": self.iou_threshold,
            "sigma": 0.5,
            "score_threshold": 1e-3,
            "idxs": self.idxs(generator),
        }
        scores = self.scores(generator)
        scores[scores == math.inf] = 2.0  # multiplication cannot lower an infinite score
        return {"boxes": self.boxes(generator), "scores": scores} | options | dict(self.options)


SUPPRESSION = {
    "typical": Suppression(),
    "one": Suppression(K=1),
    "anywhere": Suppression(K=150, kind="anywhere", iou_threshold=0.3),
    "classes": Suppression(K=150, classes=6),
    "degenerate": Suppression(K=60, kind="degenerate", classes=2, iou_threshold=0.0),
}
SUPPRESSION_BATCHED = SUPPRESSION | {
    "batch": Suppression(K=70, B=3, classes=2),
    "batch of one": Suppression(B=1, kind="anywhere"),
    "batch degenerate": Suppression(K=30, B=2, kind="degenerate", iou_threshold=0.5),
}
NMS_PADDED = SUPPRESSION_BATCHED | {
    "max_output above K": Suppression(K=9, B=2, options=(("max_output", 20),)),
    "max_output 0": Suppression(options=(("max_output", 0),)),
    "score threshold": Suppression(B=2, options=(("score_threshold", 0.5), ("max_output", 40))),
}
SOFT_NMS = SUPPRESSION_BATCHED | {
    "linear": Suppression(K=70, classes=2, options=(("method", "linear"),)),
    "linear batch": Suppression(B=2, kind="degenerate", options=(("method", "linear"), ("score_threshold", 0.25))),
}
SUPPRESSION_EMPTY = {"K": Suppression(K=0)}
SUPPRESSION_EMPTY_BATCHED = SUPPRESSION_EMPTY | {
    "K of a batch": Suppression(K=0, B=2, classes=1),
    "B": Suppression(B=0, classes=1),
}


def suppression_growing(k: int, B: int | None) -> Suppression:
    return Suppression(K=11 + 13 * k, B=None if B is None else B + k, classes=6, kind="anywhere")


def bad_suppression(letters: str, *more: Bad) -> tuple[Bad, ...]:
    """Return changes that make the sample "typical" invalid.

    This sample has K = 40, the dtype float32 and no batch dimension.
    """
    return (
        Bad("boxes not a tensor", put("boxes", [1.0]), TypeError, "boxes must be a Tensor, got list"),
        Bad("boxes bool", change("boxes", Tensor.bool), TypeError, "boxes must be float64.*or integer, got torch.bool"),
        Bad("boxes complex", change("boxes", Tensor.cfloat), TypeError, "boxes must be float64.*got torch.complex64"),
        Bad("boxes 1-D", change("boxes", lambda x: x[0]), ValueError, rf"boxes must be {letters}, got shape \[4\]"),
        Bad("boxes 4-D", change("boxes", lambda x: x[None, None]), ValueError, rf"boxes must be {letters}, got shape"),
        Bad(
            "boxes of 5",
            change("boxes", lambda x: x[:, [0, 0, 1, 2, 3]]),
            ValueError,
            rf"boxes must be {letters}, got shape \[40, 5\]",
        ),
        Bad("scores not a tensor", put("scores", None), TypeError, "scores must be a Tensor, got NoneType"),
        Bad("scores int", change("scores", Tensor.long), TypeError, "scores must be float64.*got torch.int64"),
        Bad(
            "scores too few",
            change("scores", lambda x: x[1:]),
            ValueError,
            r"scores must be \[K\] = \[40\], got shape \[39\]",
        ),
        Bad(
            "scores too many",
            change("scores", lambda x: torch.cat([x, x])),
            ValueError,
            r"scores must be \[K\] = \[40\], got shape \[80\]",
        ),
        Bad("scores 2-D", change("scores", lambda x: x[:, None]), ValueError, r"scores must be .*got shape \[40, 1\]"),
        Bad(
            "scores on another device",
            change("scores", to_other_device),
            ValueError,
            "scores must be on the device of boxes.*got",
        ),
        *bad_numbers("iou_threshold", r"a number in \[0,1\]", -0.1, 1.1, math.nan, math.inf, 2, True),
        Bad("iou_threshold str", put("iou_threshold", "0.5"), TypeError, "iou_threshold must be a number.*got '0.5'"),
        *more,
    )


BAD_IDXS = (
    Bad("idxs not a tensor", put("idxs", 3), TypeError, "idxs must be a Tensor, got int"),
    Bad("idxs float", lambda x: x | {"idxs": x["scores"]}, TypeError, "idxs must be of an integer.*got torch.float32"),
    Bad("idxs bool", lambda x: x | {"idxs": x["scores"] > 0}, TypeError, "idxs must be of an integer.*torch.bool"),
    Bad("idxs too few", lambda x: x | {"idxs": x["scores"][1:].long()}, ValueError, r"idxs must be .*got shape \[39\]"),
    Bad(
        "idxs on another device",
        lambda x: x | {"idxs": to_other_device(x["scores"].long())},
        ValueError,
        "idxs must be on the device of boxes.*got",
    ),
)
BAD_BATCH = (
    Bad(
        "batch of boxes only",
        change("boxes", lambda x: x[None]),
        ValueError,
        r"scores must be \[B,K\] = \[1,40\], got shape \[40\]",
    ),
    Bad(
        "batch of another size",
        lambda x: x | {"boxes": x["boxes"][None], "scores": x["scores"].expand(2, -1)},
        ValueError,
        r"scores must be \[B,K\] = \[1,40\], got shape \[2, 40\]",
    ),
)
BAD_PADDED = (
    *BAD_IDXS,
    *BAD_BATCH,
    *bad_options("max_output", ValueError, -1),
    *bad_options("max_output", TypeError, 2.5, "3", None),
    *bad_options("max_output", TypeError, True, harmless=True),
    *bad_numbers("score_threshold", "a number or None", math.nan, True),
)
BAD_SOFT = (
    *BAD_IDXS,
    *BAD_BATCH,
    *bad_options("method", ValueError, "hard", ""),
    *bad_options("method", ValueError, None, 3),
    *bad_numbers("sigma", "a finite positive number", 0.0, -1.0, math.nan, math.inf, True),
    *bad_numbers("score_threshold", "a finite number of at least 0", -0.1, math.nan, math.inf, True),
)


def by_index(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sort the outputs of soft_nms by index.

    The op sorts boxes by score, and rounding may change the order of boxes whose scores decay to nearly the same value.
    """
    order = outputs[0].argsort(dim=-1, stable=True)
    return tuple(x.gather(-1, order) for x in outputs)


def suppression_op(
    name: str,
    samples: Mapping[str, Suppression],
    empty: Mapping[str, Suppression],
    bad: tuple[Bad, ...],
    B: int | None = None,
    **others: Any,
) -> Selection:
    return Selection(
        name=name,
        samples={key: getattr(case, name) for key, case in samples.items()},
        empty={key: getattr(case, name) for key, case in empty.items()},
        growing=lambda k: getattr(suppression_growing(k, B), name),
        floats=("boxes", "scores"),
        bad=bad,
        **others,
    )


one_image = r"\[K,4\]"
images = r"\[K,4\] or \[B,K,4\]"
SELECTIONS = [
    suppression_op(
        "nms", SUPPRESSION, SUPPRESSION_EMPTY, bad_suppression(one_image), vmapped=(), synchronizes=lambda x: True
    ),
    suppression_op(
        "batched_nms",
        SUPPRESSION,
        SUPPRESSION_EMPTY,
        bad_suppression(one_image, *BAD_IDXS),
        vmapped=(),
        synchronizes=lambda x: True,
    ),
    suppression_op(
        "nms_padded",
        NMS_PADDED,
        SUPPRESSION_EMPTY_BATCHED,
        bad_suppression(images, *BAD_PADDED),
        B=3,
        vmapped=("boxes", "scores", "idxs"),
    ),
    suppression_op(
        "soft_nms",
        SOFT_NMS,
        SUPPRESSION_EMPTY_BATCHED,
        bad_suppression(images, *BAD_SOFT),
        B=3,
        vmapped=(),
        synchronizes=lambda x: x["boxes"].dim() == 2,
        comparable=by_index,
    ),
]
