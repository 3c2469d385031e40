"""Tests of nms without its twin: values by hand, plain loops, and the property that defines the result."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DTYPES
from helpers.search_nms import plain_nms, search
from helpers.suppression import assert_greedy, clustered
from hypothesis import given, settings
from hypothesis import strategies as st

import relops
from relops import reference

inf, nan = math.inf, math.nan
UNIT = (0, 0, 1, 1)

# Each entry has boxes, scores, iou_threshold and the indices of the kept boxes.
BY_HAND = {
    "none": ([], [], 0.5, []),
    "one": ([UNIT], [0.0], 0.5, [0]),
    "disjoint: all": ([UNIT, (2, 0, 3, 1), (0, 2, 1, 3)], [0.1, 0.3, 0.2], 0.0, [1, 2, 0]),
    "identical: the first": ([UNIT] * 3, [0.1, 0.3, 0.2], 0.5, [1]),
    "equal scores: the lower index": ([UNIT] * 3, [0.5] * 3, 0.5, [0]),
    "equal scores, disjoint: in order": ([UNIT, (2, 0, 3, 1), (4, 0, 5, 1)], [0.5] * 3, 0.5, [0, 1, 2]),
    "0 and -0 are equal": ([UNIT, (2, 0, 3, 1), UNIT], [-0.0, 0.0, 0.0], 0.5, [0, 1]),
    "touching": ([UNIT, (1, 0, 2, 1)], [0.1, 0.2], 0.0, [1, 0]),
    "a suppressed box suppresses no other box": (
        [(0, 0, 10, 1), (4, 0, 14, 1), (8, 0, 18, 1)],
        [0.3, 0.2, 0.1],
        0.4,
        [0, 2],
    ),
    "a chain of boxes with equal scores": ([(4 * i, 0, 4 * i + 10, 1) for i in range(6)], [0.5] * 6, 0.4, [0, 2, 4]),
    "threshold 1: identical boxes too": ([UNIT, UNIT], [0.1, 0.2], 1.0, [1, 0]),
    "inside": ([(0, 0, 10, 10), (0, 0, 10, 4)], [0.1, 0.2], 0.3, [1]),
    "three tenths": ([(0, 0, 10, 1), (0, 0, 3, 1)], [0.2, 0.1], 0.3, [0, 1]),
    "negative scores": ([UNIT, UNIT, (2, 0, 3, 1)], [-2.0, -1.0, -3.0], 0.5, [1, 2]),
    "infinite scores": ([UNIT, UNIT, (2, 0, 3, 1)], [0.0, inf, -inf], 0.5, [1, 2]),
    "negative coordinates": ([(-9, -9, -1, -1), (-9, -9, -1, -2)], [0.1, 0.2], 0.5, [1]),
    "without area": ([(1, 1, 1, 1)] * 2, [0.1, 0.2], 0.0, [1, 0]),
    "without width": ([(1, 0, 1, 5)] * 2, [0.1, 0.2], 0.0, [1, 0]),
    "without area inside another": ([(0, 0, 4, 4), (1, 1, 1, 1)], [0.1, 0.2], 0.0, [1, 0]),
    "inverted": ([(1, 1, 0, 0)] * 2, [0.1, 0.2], 0.0, [1, 0]),
    "inverted in x: a negative area": ([(1, 0, 0, 1)] * 2, [0.1, 0.2], 0.0, [1, 0]),
    # The inverted box has the area -1, so the union is 2 - 1. The intersection is empty.
    "inverted inside another": ([(0, 0, 2, 1), (1, 0, 0, 1)], [0.1, 0.2], 0.0, [1, 0]),
    "NaN scores are absent": ([UNIT, UNIT, UNIT], [nan, 0.1, nan], 0.5, [1]),
    "NaN scores only": ([UNIT, UNIT], [nan, nan], 0.5, []),
    "NaN boxes are absent": ([(0, 0, nan, 1), UNIT, UNIT], [0.9, 0.1, 0.5], 0.5, [2]),
    "infinite boxes are absent": ([(-inf, 0, 1, 1), (0, 0, inf, inf), UNIT], [0.9, 0.8, 0.5], 0.0, [2]),
    "an infinite box does not affect other boxes": ([UNIT, (0, 0, inf, 1), UNIT], [0.1, 0.9, 0.2], 0.5, [2]),
    "huge, but the area fits": ([(0, 0, 1e18, 1e18)] * 2, [0.1, 0.2], 0.5, [1]),
    "area beyond float32: no IoU": ([(-1e30, -1e30, 1e30, 1e30)] * 2, [0.1, 0.2], 0.5, [1, 0]),
    "huge around others": ([UNIT, (-1e30, -1e30, 1e30, 1e30), UNIT], [0.1, 0.9, 0.2], 0.5, [1, 2]),
}


@pytest.mark.parametrize(("boxes", "scores", "iou_threshold", "kept"), BY_HAND.values(), ids=BY_HAND.keys())
def test_by_hand(boxes: list, scores: list, iou_threshold: float, kept: list[int], device: str) -> None:
    given = torch.tensor(boxes, dtype=torch.float32, device=device).view(-1, 4), torch.tensor(scores, device=device)
    assert relops.nms(*given, iou_threshold).tolist() == kept
    assert relops.nms(*given, iou_threshold).dtype == torch.int64
    assert reference.nms(*given, iou_threshold).tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("k", "n"), [(1, 2), (1, 3), (3, 10), (7, 10), (9, 10), (2, 3), (1, 7), (5, 11), (1, 100)])
def test_iou_equal_to_the_threshold_is_kept(k: int, n: int, dtype: torch.dtype, device: str) -> None:
    """Check that the threshold k / n is rounded to the dtype of the boxes, so that an IoU of k / n equals it."""
    boxes = torch.tensor([(0, 0, n, 1), (0, 0, k, 1)], dtype=dtype, device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    threshold = torch.tensor(k / n, dtype=dtype)
    below = torch.nextafter(threshold, torch.zeros_like(threshold)).item()
    for op in (relops.nms, reference.nms):
        assert op(boxes, scores, k / n).tolist() == [0, 1]
        assert op(boxes, scores, below).tolist() == [0]


def test_float64_boxes_stay_float64(device: str) -> None:
    boxes = torch.tensor([(0, 0, 1, 1), (0, 0, 1 - 1e-10, 1)], dtype=torch.float64, device=device)
    for dtype in DTYPES:
        scores = torch.tensor([0.5, 0.25], dtype=dtype, device=device)
        assert relops.nms(boxes, scores, 1 - 5e-11).tolist() == [0, 1]
        assert relops.nms(boxes, scores, 1 - 2e-10).tolist() == [0]
    # In float32, the IoU and the threshold are both rounded to 1.
    assert relops.nms(boxes.float(), scores, 1 - 5e-11).tolist() == [0, 1]


def test_float64_scores_stay_float64(device: str) -> None:
    boxes = torch.tensor([UNIT, UNIT], dtype=torch.float32, device=device)
    assert relops.nms(boxes, torch.tensor([1, 1 + 1e-12], dtype=torch.float64, device=device), 0.5).tolist() == [1]


def test_areas_of_float16_boxes_do_not_overflow(device: str) -> None:
    boxes = torch.tensor([(0, 0, 1000, 1000)] * 2, dtype=torch.float16, device=device)
    assert relops.nms(boxes, boxes[:, 0], 0.5).tolist() == [0]


def test_small_problems_match_plain_loops(device: str) -> None:
    search(2000, device=device)


COORDINATES = st.sampled_from([0.0, 1.0, 2.0, 3.0, -1.0, 0.1, nan, inf, -inf, 1e30, -1e30, 3e38, -3e38, 1e-40])
SCORES = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, nan, inf, -inf, 1e-45, 3e38])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(*[COORDINATES] * 4, SCORES, st.sampled_from([0, 1, -(2**63)])), min_size=1, max_size=7),
    iou_threshold=st.sampled_from([0.0, 1 / 3, 0.5, 1.0]),
    dtypes=st.tuples(*[st.sampled_from([torch.float64, torch.float32])] * 2),
)
def test_random_search(rows: list, iou_threshold: float, dtypes: tuple) -> None:
    boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float64).to(dtypes[0])
    scores = torch.tensor([row[4] for row in rows], dtype=torch.float64).to(dtypes[1])
    idxs = torch.tensor([row[5] for row in rows])
    for classes, actual in (
        (None, relops.nms(boxes, scores, iou_threshold)),
        (idxs.numpy()[None], relops.batched_nms(boxes, scores, idxs, iou_threshold)),
    ):
        (expected,) = plain_nms(boxes.numpy()[None], scores.numpy()[None], classes, iou_threshold)
        assert actual.tolist() == expected


@pytest.mark.parametrize("iou_threshold", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_many_boxes(iou_threshold: float, dtype: torch.dtype, device: str) -> None:
    boxes, scores, _ = (x.to(device) for x in clustered([3000]))
    boxes, scores = boxes.to(dtype), scores.float()
    keep = relops.nms(boxes, scores, iou_threshold)
    assert torch.equal(keep, reference.nms(boxes, scores, iou_threshold))
    if iou_threshold == 0.5:
        assert_greedy(keep, boxes, scores, iou_threshold)


@pytest.mark.parametrize("K", [1, 2, 7, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2049])
def test_any_number_of_boxes(K: int, device: str) -> None:
    """Check numbers of boxes close to the sizes of tiles and blocks of the kernels."""
    boxes, scores, _ = (x.to(device) for x in clustered([K], boxes_per_object=6, seed=K))
    boxes, scores = boxes.float(), (16 * scores).floor()
    assert torch.equal(relops.nms(boxes, scores, 0.4), reference.nms(boxes, scores, 0.4))


def test_400_000_boxes_in_linear_memory(device: str) -> None:
    K = 400_000
    boxes, scores, _ = clustered([K], boxes_per_object=K / 3)
    boxes, scores = boxes.float().to(device), scores.float().to(device)
    relops.nms(boxes[:100], scores[:100], 0.3)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        keep = relops.nms(boxes, scores, 0.3)
        growth = torch.cuda.max_memory_allocated() - before
    else:
        status = Path("/proc/self/status")
        if not status.exists():
            pytest.skip("the peak memory is read from /proc, which only Linux has")
        before = peak_resident(status)
        keep = relops.nms(boxes, scores, 0.3)
        growth = peak_resident(status) - before
    assert growth < 300 * K  # in bytes; one bit per pair would take 20,000 MB
    assert_greedy(keep, boxes, scores, np.float32(0.3).item())


def peak_resident(status: Path) -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) << 10


# ---- Graphs that use the kept boxes ----


def postprocess(boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
    keep = relops.nms(boxes, scores, 0.5)
    chosen = boxes[keep]
    return torch.cat([chosen, scores[keep][:, None]], 1), (chosen[:, 2:] - chosen[:, :2]).prod(1), keep[:100]


class Postprocess(torch.nn.Module):
    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return postprocess(boxes, scores)


def detections(kept: int, K: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K boxes, of which nms keeps `kept`, and their scores."""
    boxes = torch.tensor([(2 * min(i, max(kept - 1, 0)), 0, 2 * min(i, max(kept - 1, 0)) + 1, 1) for i in range(K)])
    scores = torch.rand(K) if kept else torch.full((K,), nan)
    return boxes.view(K, 4).float().to(device), scores.to(device)


def assert_postprocessed(actual: tuple[torch.Tensor, ...], kept: int, given: tuple) -> None:
    assert len(actual[0]) == kept
    for x, y in zip(actual, postprocess(*given), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", None), ("inductor", True)])
def test_compiled_graph_keeps_any_number(backend: str, dynamic: bool | None, device: str, fresh_compiler: None) -> None:
    """Check that one graph works for any number of kept boxes.

    With torchvision's nms, a graph works only if at least two boxes are kept.
    """
    compiled = torch.compile(postprocess, fullgraph=True, backend=backend, dynamic=dynamic)
    for kept, K in ((3, 5), (0, 5), (1, 5), (5, 5), (1, 9), (0, 12), (1, 1), (0, 0)):
        given = detections(kept, K, device)
        assert_postprocessed(compiled(*given), kept, given)


@pytest.mark.parametrize("first", [0, 1, 5])
def test_exported_graph_keeps_any_number(first: int, device: str, fresh_compiler: None) -> None:
    automatic = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(
        Postprocess(), detections(first, 7, device), dynamic_shapes=(automatic, automatic)
    ).module()
    for kept, K in ((3, 5), (0, 5), (1, 5), (9, 9)):
        given = detections(kept, K, device)
        assert_postprocessed(exported(*given), kept, given)


def test_scripted(device: str) -> None:
    for kept in (0, 1, 3):
        given = detections(kept, 5, device)
        assert torch.equal(torch.jit.script(relops.nms)(*given, 0.5), relops.nms(*given, 0.5))
        idxs = torch.arange(5, dtype=torch.int32, device=device) % 2
        scripted = torch.jit.script(relops.batched_nms)
        assert torch.equal(scripted(*given, idxs, 0.5), relops.batched_nms(*given, idxs, 0.5))
