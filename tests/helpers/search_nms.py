"""Search for disagreements between the suppression ops and plain loops.

    python tests/helpers/search_nms.py --problems 100000

The problems are small and contain many edge cases: boxes on a grid whose IoUs equal the threshold, equal scores,
duplicates, several classes, and boxes that are inverted, huge, not finite or without area. The loops process one pair
of boxes at a time, in many problems at once, and share no code with the twins.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

import relops

# IoU thresholds. In each dtype, the IoU of some boxes on a grid equals the rounded threshold.
THRESHOLDS = (0.0, 1.0, 1 / 2, 1 / 3, 1 / 4, 2 / 3, 0.3, 0.7, 0.45)
CLASSES = np.array([0, 1, -1, 2**63 - 1, -(2**63), 2**32])
ODD_BOXES = (
    (np.nan, 0, 1, 1),
    (0, 0, np.inf, 1),
    (0, -np.inf, 1, 1),
    (0, 0, 0, 0),
    (1, 1, 1, 3),
    (2, 0, 0, 2),
    (2, 2, 0, 0),
    (-1e30, -1e30, 1e30, 1e30),
    (0, 0, 1e30, 1e30),
    (0, 0, 1e-30, 1e-30),
    (-1e5, -1e5, 1e5, 1e5),
)
ODD_SCORES = (np.nan, np.inf, -np.inf, -0.0, 0.0, -1.0)


# ---- Plain loops over P problems of K boxes ----


def plain_iou(boxes: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes i[p] and j[p] of each problem p, with every step rounded to the dtype of the boxes."""
    p = np.arange(len(boxes))
    a, b = boxes[p, i].T, boxes[p, j].T
    zero = boxes.dtype.type(0)
    width = np.maximum(np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]), zero)
    height = np.maximum(np.minimum(a[3], b[3]) - np.maximum(a[1], b[1]), zero)
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return np.where(union == 0, zero, intersection / union)


def plain_present(boxes: np.ndarray, scores: np.ndarray, score_threshold: float | None) -> np.ndarray:
    present = np.isfinite(boxes).all(-1) & ~np.isnan(scores)
    return present if score_threshold is None else present & (scores > scores.dtype.type(score_threshold))


@np.errstate(all="ignore")
def plain_nms(
    boxes: np.ndarray,  # [P,K,4]
    scores: np.ndarray,  # [P,K]
    idxs: np.ndarray | None,  # [P,K]
    iou_threshold: float,
    score_threshold: float | None = None,
) -> list[list[int]]:
    P, K = scores.shape
    present = plain_present(boxes, scores, score_threshold)
    rank = np.where(present, -scores, np.inf)
    order = np.stack([np.lexsort((range(K), each)) for each in rank]) if K else np.zeros((P, 0), int)
    p = np.arange(P)
    kept = np.zeros((P, K), bool)  # by rank in `order`
    for later in range(K):
        j = order[:, later]
        suppressed = np.zeros(P, bool)
        for earlier in range(later):
            i = order[:, earlier]
            same_class = True if idxs is None else idxs[p, i] == idxs[p, j]
            suppressed |= kept[:, earlier] & same_class & (plain_iou(boxes, i, j) > boxes.dtype.type(iou_threshold))
        kept[:, later] = present[p, j] & ~suppressed
    return [order[q, kept[q]].tolist() for q in range(P)]


@np.errstate(all="ignore")
def plain_soft_nms(
    boxes: np.ndarray,  # [P,K,4]
    scores: np.ndarray,  # [P,K]
    idxs: np.ndarray | None,  # [P,K]
    method: str,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [P,K], [P,K], [P]
    """Return padded indices and scores, and whether the rounding of an exponential may have affected the selection."""
    P, K = scores.shape
    number, p = boxes.dtype.type, np.arange(P)
    remaining = plain_present(boxes, scores, score_threshold)
    scores, lowered = scores.copy(), np.zeros((P, K), bool)
    keep, decayed, unsure = np.full((P, K), -1), np.zeros_like(scores), np.zeros(P, bool)
    for step in range(K):
        best, i = np.zeros(P, scores.dtype), np.full(P, -1)
        for j in range(K):
            better = remaining[:, j] & (scores[:, j] > best)
            best, i = np.where(better, scores[:, j], best), np.where(better, j, i)
        found = i >= 0
        keep[:, step], decayed[:, step] = i, best
        for j in range(K):
            near = remaining[:, j] & (i != j) & (np.abs(scores[:, j] - best) <= 1e-5 * best)
            unsure |= near & (lowered[:, j] | lowered[p, i])
        remaining[p[found], i[found]] = False
        for j in range(K):
            iou = plain_iou(boxes, i, np.full(P, j))
            if method == "linear":
                lowers, factor = iou > number(iou_threshold), 1 - iou
            else:
                lowers, factor = iou > 0, np.exp(-(iou * iou) / number(sigma))
            if idxs is not None:
                lowers &= idxs[p, i] == idxs[:, j]
            lowers &= remaining[:, j] & found
            scores[:, j] = np.where(lowers, scores[:, j] * factor, scores[:, j])
            lowered[:, j] |= lowers
            unsure |= lowers & (np.abs(scores[:, j] - score_threshold) <= 1e-5 * score_threshold)
            remaining[:, j] &= ~lowers | (scores[:, j] > number(score_threshold))
    return keep, decayed, unsure & (method == "gaussian")


# ---- The search ----


class Problems:
    """P problems of K boxes each, with the same options."""

    def __init__(self, random: np.random.Generator, P: int) -> None:
        self.P, self.K = P, int(random.integers(0, 11))
        shape = (P, self.K)
        # The dtypes of boxes and scores.
        self.dtypes = [(torch.float64, torch.float32)[d] for d in random.integers(2, size=2)]
        self.iou_threshold = float(random.choice(THRESHOLDS)) if random.random() < 0.8 else random.random()
        self.score_threshold = (None, 0.0, 0.25, 0.3)[random.integers(4)]
        self.max_output = int(random.integers(0, 13))
        corner = random.integers(-2, 4, (*shape, 2))
        boxes = np.concatenate([corner, corner + random.integers(0, 4, (*shape, 2))], -1).astype(float)
        boxes *= random.choice([1.0, 0.1, 1 / 3, 1000.0], size=(P, 1, 1))
        scores = random.integers(0, 8, shape) / 8 if random.random() < 0.7 else random.random(shape)
        for values, odd in ((boxes, ODD_BOXES), (scores, ODD_SCORES)):
            replaced = random.random(shape) < random.choice([0.0, 0.3], size=(P, 1))
            values[replaced] = np.array(odd, float)[random.integers(len(odd), size=int(replaced.sum()))]
        self.idxs = CLASSES[random.integers(random.integers(1, 5), size=shape)] if random.random() < 0.6 else None
        self.boxes, self.scores = (
            torch.from_numpy(x).to(dtype).numpy() for x, dtype in zip((boxes, scores), self.dtypes)
        )

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        idxs = None if self.idxs is None else torch.from_numpy(self.idxs).to(device)
        return torch.from_numpy(self.boxes).to(device), torch.from_numpy(self.scores).to(device), idxs

    def check(self, what: str, q: int, got: Sequence, expected: Sequence, **options: object) -> None:
        assert list(got) == list(expected), (
            f"{what}: got {list(got)}, expected {list(expected)}\nboxes = {self.boxes[q].tolist()}\n"
            f"scores = {self.scores[q].tolist()}\nidxs = {None if self.idxs is None else self.idxs[q].tolist()}\n"
            f"dtypes = {self.dtypes}, iou_threshold = {self.iou_threshold!r}, {options}"
        )


def check_nms(problems: Problems, device: str) -> None:
    boxes, scores, idxs = problems.tensors(device)
    expected = plain_nms(problems.boxes, problems.scores, problems.idxs, problems.iou_threshold)
    for q in range(problems.P):
        if idxs is None:
            got = relops.nms(boxes[q], scores[q], problems.iou_threshold)
        else:
            got = relops.batched_nms(boxes[q], scores[q], idxs[q], problems.iou_threshold)
        problems.check("nms" if idxs is None else "batched_nms", q, got.tolist(), expected[q])


def check_nms_padded(problems: Problems, device: str) -> None:
    boxes, scores, idxs = problems.tensors(device)
    options = {"max_output": problems.max_output, "score_threshold": problems.score_threshold}
    keep, count = relops.nms_padded(boxes, scores, problems.iou_threshold, idxs=idxs, **options)
    expected = plain_nms(
        problems.boxes, problems.scores, problems.idxs, problems.iou_threshold, problems.score_threshold
    )
    for q, (got, n) in enumerate(zip(keep.tolist(), count.tolist())):
        kept = expected[q][: problems.max_output]
        padding = [-1] * (problems.max_output - len(kept))
        problems.check("nms_padded", q, [*got, n], [*kept, *padding, len(kept)], **options)


def check_soft_nms(problems: Problems, device: str, method: str, sigma: float) -> int:
    """Check soft_nms. Return the number of problems that are not compared because rounding may affect the result."""
    boxes, scores, idxs = problems.tensors(device)
    scores = torch.where(scores.isposinf(), 2, scores)  # a decayed infinite score may be inf * 0, which is NaN
    options = {
        "method": method,
        "iou_threshold": problems.iou_threshold,
        "sigma": sigma,
        "score_threshold": problems.score_threshold or 0.0,
    }
    keep, decayed = relops.soft_nms(boxes, scores, idxs=idxs, **options)
    wide = np.promote_types(problems.boxes.dtype, problems.scores.dtype)
    expected = plain_soft_nms(problems.boxes.astype(wide), scores.cpu().numpy().astype(wide), problems.idxs, **options)
    close = np.isclose(decayed.cpu().numpy(), expected[1].astype(problems.scores.dtype), rtol=1e-5, atol=0)
    for q in np.flatnonzero(~expected[2]):
        problems.check("soft_nms", q, keep[q].tolist(), expected[0][q].tolist(), **options)
        assert close[q].all(), (decayed[q], expected[1][q])
        assert all(a >= b for a, b in zip(decayed[q].tolist(), decayed[q].tolist()[1:]))
    q = int(np.argmin(expected[2])) if problems.P else 0
    alone = relops.soft_nms(boxes[q], scores[q], idxs=None if idxs is None else idxs[q], **options)
    kept = int((keep[q] >= 0).sum())
    assert torch.equal(alone[0], keep[q, :kept]) and torch.equal(alone[1], decayed[q, :kept])
    return int(expected[2].sum())


def search(problems: int, seed: int = 0, device: str = "cpu") -> int:
    """Compare the ops with the loops, and return the number of soft_nms results that could not be compared.

    Raises:
        AssertionError: If an op and a loop disagree. The message shows the problem.
    """
    random, unsure = np.random.default_rng(seed), 0
    for _ in range(0, problems, 100):
        drawn = Problems(random, min(100, problems))
        check_nms(drawn, device)
        check_nms_padded(drawn, device)
        sigma = float(random.choice([0.5, 0.1, 2.0]))
        for method in ("linear", "gaussian"):
            unsure += check_soft_nms(drawn, device, method, sigma)
    return unsure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    unsure = search(options.problems, options.seed, options.device)
    print(
        f"{options.problems} problems on {options.device}, seed {options.seed}: no disagreement. soft_nms ran on each "
        f"problem with both methods; {unsure} of these results were not compared, because the rounding of an "
        f"exponential may affect the selection."
    )


if __name__ == "__main__":
    main()
