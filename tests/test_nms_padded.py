"""Tests that nms_padded equals nms of each image, truncated or padded to `max_output`."""

from __future__ import annotations

import pytest
import torch
from helpers.suppression import clustered

import relops
from relops import reference

pytestmark = pytest.mark.quick


def batch(device: str, B: int = 3, K: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = [clustered([K // 2, K // 3, K - K // 2 - K // 3], boxes_per_object=10, seed=b) for b in range(B)]
    boxes, scores, idxs = (torch.stack(x).to(device) for x in zip(*images))
    return boxes.float(), scores.float(), idxs


def test_by_hand(device: str) -> None:
    unit = [0.0, 0.0, 1.0, 1.0]
    boxes = torch.tensor([unit, unit, [2.0, 0.0, 3.0, 1.0], [4.0, 0.0, 5.0, 1.0]], device=device)
    scores = torch.tensor([0.25, 0.5, 0.75, 0.125], device=device)
    for op in (relops.nms_padded, reference.nms_padded):
        for max_output, expected in ((0, []), (1, [2]), (2, [2, 1]), (3, [2, 1, 3]), (5, [2, 1, 3, -1, -1])):
            keep, count = op(boxes, scores, 0.5, max_output)
            assert keep.tolist() == expected and count.item() == min(3, max_output)
            assert keep.dtype == count.dtype == torch.int64 and count.shape == ()
        keep, count = op(boxes[None], scores[None], 0.5, 2, torch.tensor([[0, 1, 0, 0]], device=device))
        assert keep.tolist() == [[2, 1]] and count.tolist() == [2]
        keep, count = op(boxes, scores, 0.5, 5, torch.tensor([0, 1, 0, 0], device=device))
        assert keep.tolist() == [2, 1, 0, 3, -1] and count.item() == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_score_equal_to_the_threshold_is_dropped(dtype: torch.dtype, device: str) -> None:
    unit = [0.0, 0.0, 1.0, 1.0]
    boxes = torch.tensor([unit, [2.0, 0.0, 3.0, 1.0], unit], dtype=dtype, device=device)
    scores = torch.tensor([0.5, 0.75, 0.625], dtype=dtype, device=device)
    for threshold, expected in ((0.5, [1, 2]), (0.625, [1, -1]), (0.75, [-1, -1]), (-1.0, [1, 2]), (0.4375, [1, 2])):
        keep, count = relops.nms_padded(boxes, scores, 0.5, 2, score_threshold=threshold)
        assert keep.tolist() == expected and count.item() == sum(i >= 0 for i in expected)


def test_score_threshold_is_rounded_like_the_scores(device: str) -> None:
    """Check a score of 0.3 in float32, which is greater than 0.3 in float64."""
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    for op in (relops.nms_padded, reference.nms_padded):
        assert op(boxes, torch.tensor([0.3], device=device), 0.5, 1, score_threshold=0.3)[1].item() == 0


def test_infinite_score_thresholds(device: str) -> None:
    inf = float("inf")
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0]], device=device)
    scores = torch.tensor([-inf, inf], device=device)
    for threshold, expected in ((None, [1, 0]), (-inf, [1, -1]), (inf, [-1, -1])):
        assert relops.nms_padded(boxes, scores, 0.5, 2, score_threshold=threshold)[0].tolist() == expected


@pytest.mark.parametrize("classes", [False, True], ids=["", "classes"])
@pytest.mark.parametrize("max_output", [0, 1, 20, 300, 400])
def test_batch_equals_a_loop_over_images(classes: bool, max_output: int, device: str) -> None:
    boxes, scores, idxs = batch(device)
    scores[1, ::2] = float("nan")  # an image with fewer boxes
    keep, count = relops.nms_padded(boxes, scores, 0.4, max_output, idxs if classes else None)
    assert keep.shape == (3, max_output) and count.shape == (3,)
    for b in range(3):
        if classes:
            alone = relops.batched_nms(boxes[b], scores[b], idxs[b], 0.4)
        else:
            alone = relops.nms(boxes[b], scores[b], 0.4)
        n = min(len(alone), max_output)
        assert count[b] == n
        assert torch.equal(keep[b, :n], alone[:n]) and (keep[b, n:] == -1).all()


@pytest.mark.parametrize("score_threshold", [None, 0.3])
@pytest.mark.parametrize("K", [63, 64, 65, 1023, 1025, 3000])
def test_many_boxes(K: int, score_threshold: float | None, device: str) -> None:
    boxes, scores, idxs = batch(device, B=2, K=K)
    scores = (100 * scores).floor() / 100
    for given in (None, idxs):
        arguments = (boxes, scores, 0.5, K // 4, given, score_threshold)
        for x, y in zip(relops.nms_padded(*arguments), reference.nms_padded(*arguments), strict=True):
            assert torch.equal(x, y)


def test_max_output_may_be_a_symbolic_size(device: str, fresh_compiler: None) -> None:
    """Check a max_output that depends on the shape of a tensor. Such a number is a symbol in a graph."""

    def keep_half(boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return relops.nms_padded(boxes, scores, 0.4, boxes.shape[1] // 2)

    class KeepHalf(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return keep_half(boxes, scores)

    inputs, larger = (batch(device, B=B, K=K)[:2] for B, K in ((2, 40), (3, 64)))
    dynamic = tuple(dict.fromkeys(range(2), torch.export.Dim.AUTO) for _ in inputs)
    exported = torch.export.export(KeepHalf(), inputs, dynamic_shapes=dynamic).module()
    compiled = torch.compile(keep_half, fullgraph=True, dynamic=True, backend="aot_eager")
    for given in (inputs, larger):
        for f in (exported, compiled):
            for x, y in zip(f(*given), keep_half(*given), strict=True):
                assert torch.equal(x, y)
