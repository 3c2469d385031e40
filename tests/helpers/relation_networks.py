"""A step-by-step implementation of Relation Networks that follows the released code.

It embeds all pairs of boxes, aggregates features before it projects them, and loops over classes. Parameters have the
names and shapes of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def random_parameters(shapes: dict[str, tuple[int, ...]], spread: float = 0.5) -> Parameters:
    """Return random parameters, all of which are large enough to affect the result visibly."""
    return {name: spread * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def relation_shapes(channels: int, heads: int, head_dim: int, prefix: str = "", index: int = 1) -> dict:
    return {
        f"{prefix}query_{index}_weight": (heads * head_dim, channels),
        f"{prefix}query_{index}_bias": (heads * head_dim,),
        f"{prefix}key_{index}_weight": (heads * head_dim, channels),
        f"{prefix}key_{index}_bias": (heads * head_dim,),
        f"{prefix}linear_out_{index}_weight": (channels, channels, 1, 1),
        f"{prefix}linear_out_{index}_bias": (channels,),
        f"{prefix}pair_pos_fc1_{index}_weight": (heads, 64),
        f"{prefix}pair_pos_fc1_{index}_bias": (heads,),
    }


def relation_state(p: Parameters, prefix: str = "", index: int = 1) -> Parameters:
    """Return the parameters under the names that relops.nn.ObjectRelation uses."""
    state = {}
    for ours, theirs in (("query", "query"), ("key", "key"), ("value", "linear_out"), ("geometry", "pair_pos_fc1")):
        state[f"{ours}.weight"] = p[f"{prefix}{theirs}_{index}_weight"].flatten(1)
        state[f"{ours}.bias"] = p[f"{prefix}{theirs}_{index}_bias"]
    return state


def pair_embedding(boxes: Tensor, num_keys: int, geometry: str) -> Tensor:
    """Return the geometric embedding [K,num_keys,64] of every pair of a box and a key box."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = x2 - x1 + 1, y2 - y1 + 1
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    key = slice(num_keys)
    size = (w[None, key], h[None, key]) if geometry == "paper" else (w[:, None], h[:, None])
    numbers = [
        ((x[:, None] - x[None, key]).abs() / size[0]).clamp(min=1e-3).log(),
        ((y[:, None] - y[None, key]).abs() / size[1]).clamp(min=1e-3).log(),
        (w[:, None] / w[None, key]).log(),
        (h[:, None] / h[None, key]).log(),
    ]
    parts = []
    for number in numbers:
        angles = [100 * number / 1000 ** (j / 8) for j in range(8)]
        parts += [a.sin() for a in angles] + [a.cos() for a in angles]
    return torch.stack(parts, -1)


def relation(
    features: Tensor, embedding: Tensor, p: Parameters, heads: int, prefix: str = "", index: int = 1
) -> Tensor:
    """Return the relation features [K,C] of `features` [K,C], without adding `features` to them.

    `embedding` is [K,num_keys,64].
    """
    num_keys = embedding.shape[1]
    names = ("pair_pos_fc1", "query", "key", "linear_out")
    weights = [p[f"{prefix}{name}_{index}_weight"] for name in names]
    biases = [p[f"{prefix}{name}_{index}_bias"] for name in names]
    geometry = (embedding @ weights[0].T + biases[0]).relu()  # [K,num_keys,M]
    query = features @ weights[1].T + biases[1]
    key = features[:num_keys] @ weights[2].T + biases[2]
    D = query.shape[1] // heads
    means = []
    for m in range(heads):
        columns = slice(m * D, (m + 1) * D)
        appearance = query[:, columns] @ key[:, columns].T / math.sqrt(D)
        attention = (geometry[..., m].clamp(min=1e-6).log() + appearance).softmax(1)
        means.append(attention @ features[:num_keys])
    grouped = torch.nn.functional.conv2d(torch.cat(means, 1)[..., None, None], weights[3], biases[3], groups=heads)
    return grouped[..., 0, 0]


def assert_same(actual: Tensor, expected: Tensor, what: str = "output") -> None:
    """Assert that float64 results are equal up to rounding errors.

    The logarithm of a geometric weight near 1e-6 amplifies rounding errors by a factor of a million.
    """
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().cpu(),
        expected.detach().cpu(),
        rtol=1e-9,
        atol=1e-9 * largest,
        msg=lambda text: f"{what}: {text}",
    )


# ---- Duplicate removal ----


def removal_shapes(channels: int, rank_dim: int, hidden: int, heads: int, head_dim: int, thresholds: int) -> dict:
    return {
        "nms_rank_weight": (hidden, rank_dim),
        "nms_rank_bias": (hidden,),
        "roi_feat_embedding_weight": (hidden, channels),
        "roi_feat_embedding_bias": (hidden,),
        **relation_shapes(hidden, heads, head_dim, "nms_"),
        "nms_logit_weight": (thresholds, hidden),
        "nms_logit_bias": (thresholds,),
    }


def removal_state(p: Parameters) -> Parameters:
    """Return the parameters under the names that relops.nn.DuplicateRemoval uses."""
    state = {f"relation.{name}": x for name, x in relation_state(p, "nms_").items()}
    for ours, theirs in (("rank", "nms_rank"), ("feature", "roi_feat_embedding"), ("logit", "nms_logit")):
        state |= {f"{ours}.{kind}": p[f"{theirs}_{kind}"] for kind in ("weight", "bias")}
    return state


def rank_embeddings(count: int, dim: int) -> Tensor:
    rows = []
    for rank in range(count):
        angles = [rank / 1000 ** (2 * j / dim) for j in range(dim // 2)]
        rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    return torch.tensor(rows, dtype=torch.float64).view(count, dim)


def remove_duplicates(
    features: Tensor,
    scores: Tensor,
    boxes: Tensor,
    p: Parameters,
    heads: int,
    first_n: int,
    score_threshold: float,
    geometry: str,
) -> list[tuple[list[int], Tensor, Tensor]]:
    """Remove the duplicates of one image, with features [K,channels], scores [K,C] and boxes [K,C,4].

    Return, for each class, the indices of its n best boxes, their class scores s0 [n], and the scores s1 [n,E] by which
    duplicate removal multiplies them.
    """
    result = []
    for c in range(scores.shape[1]):
        values = scores[:, c].tolist()
        left = [k for k in range(len(values)) if values[k] > score_threshold]
        best = sorted(left, key=lambda k: (-values[k], k))[:first_n]
        ranks = rank_embeddings(len(best), p["nms_rank_weight"].shape[1]).to(features)
        x = features[best] @ p["roi_feat_embedding_weight"].T + p["roi_feat_embedding_bias"]
        x = x + (ranks @ p["nms_rank_weight"].T + p["nms_rank_bias"])
        if best:
            x = x + relation(x, pair_embedding(boxes[best, c], len(best), geometry), p, heads, "nms_")
        s1 = (x.relu() @ p["nms_logit_weight"].T + p["nms_logit_bias"]).sigmoid()
        result.append((best, scores[best, c], s1))
    return result


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def correct_ranks(boxes: list, objects: list, threshold: float) -> set[int]:
    """Return the ranks of the correct boxes of one class. `boxes` must be sorted by descending score."""
    best: dict[int, int] = {}
    for rank, box in enumerate(boxes):
        overlaps = [iou(box, x) for x in objects]
        if overlaps and max(overlaps) > threshold:
            best.setdefault(overlaps.index(max(overlaps)), rank)
    return set(best.values())


def removal_loss(s0: Tensor, s1: Tensor, correct: list[set[int]], positive_weight: float) -> Tensor:
    """Return the summed loss of one class with scores s0 [n] and s1 [n,E].

    `correct` contains, for each threshold, the ranks of the correct boxes.
    """
    total = s0.new_zeros(())
    for e, ranks in enumerate(correct):
        for rank in range(len(s0)):
            s = s0[rank] * s1[rank, e]
            total = total - (positive_weight * s.log() if rank in ranks else (1 - s).log())
    return total
