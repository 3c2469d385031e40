"""Tests of soft_nms without its twin. test_nms.py also compares soft_nms with plain loops on many small problems."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.search_nms import plain_soft_nms
from helpers.suppression import clustered
from torch import Tensor

import relops
from relops import reference

pytestmark = pytest.mark.quick

UNIT = [0.0, 0.0, 1.0, 1.0]
FAR = [5.0, 0.0, 6.0, 1.0]
both = pytest.mark.parametrize("op", [relops.soft_nms, reference.soft_nms], ids=["relops", "twin"])
methods = pytest.mark.parametrize("method", ["linear", "gaussian"])


def tensors(boxes: list, scores: list, device: str) -> tuple[Tensor, Tensor]:
    return torch.tensor(boxes, device=device), torch.tensor(scores, device=device)


@both
def test_gaussian_by_hand(op, device: str) -> None:
    # The first two boxes have an IoU of 1/2, and the third box overlaps neither of them.
    boxes, scores = tensors([[0.0, 0.0, 2.0, 1.0], UNIT, FAR], [0.9, 0.8, 0.6], device)
    keep, decayed = op(boxes, scores)
    assert keep.tolist() == [0, 2, 1]
    assert decayed.tolist() == pytest.approx([0.9, 0.6, 0.8 * math.exp(-0.25 / 0.5)], rel=1e-6)
    keep, decayed = op(boxes, scores, sigma=10.0)
    assert keep.tolist() == [0, 1, 2]
    assert decayed.tolist() == pytest.approx([0.9, 0.8 * math.exp(-0.25 / 10), 0.6], rel=1e-6)


@both
def test_linear_by_hand(op, device: str) -> None:
    boxes, scores = tensors([[0.0, 0.0, 2.0, 1.0], UNIT, FAR], [0.9, 0.8, 0.6], device)
    keep, decayed = op(boxes, scores, "linear", 0.25)
    assert keep.tolist() == [0, 2, 1]
    assert decayed.tolist() == pytest.approx([0.9, 0.6, 0.4], rel=1e-6)
    keep, decayed = op(boxes, scores, "linear", 0.5)  # an IoU of 1/2 does not exceed the threshold
    assert keep.tolist() == [0, 1, 2]
    assert torch.equal(decayed, scores)


@both
def test_all_previously_kept_boxes_lower_a_score(op, device: str) -> None:
    """Check that boxes with lowered scores still lower the scores of others, unless they are below the threshold."""
    boxes, scores = tensors(
        [[0.0, 0.0, 10.0, 1.0], [4.0, 0.0, 14.0, 1.0], [8.0, 0.0, 18.0, 1.0]], [0.9, 0.8, 0.1], device
    )
    near, far = 6 / 14, 2 / 18
    keep, decayed = op(boxes, scores, "linear", 0.1)
    assert keep.tolist() == [0, 1, 2]
    expected = [0.9, 0.8 * (1 - near), 0.1 * (1 - far) * (1 - near)]
    assert decayed.tolist() == pytest.approx(expected, rel=1e-6)
    keep, decayed = op(boxes, scores, "linear", 0.1, score_threshold=0.05)
    assert keep.tolist() == [0, 1, 2]
    keep, decayed = op(boxes, torch.tensor([0.9, 0.1, 0.4], device=device), "linear", 0.1, score_threshold=0.06)
    assert keep.tolist() == [0, 2]
    assert decayed.tolist() == pytest.approx([0.9, 0.4 * (1 - far)], rel=1e-6)


@both
def test_identical_boxes(op, device: str) -> None:
    boxes, scores = tensors([UNIT] * 4, [0.5] * 4, device)
    keep, decayed = op(boxes, scores, "linear")  # the factor is 1 - 1
    assert keep.tolist() == [0] and decayed.tolist() == [0.5]
    keep, decayed = op(boxes, scores, sigma=1.0)
    assert keep.tolist() == [0, 1, 2, 3]
    assert decayed.tolist() == pytest.approx([0.5 * math.exp(-i) for i in range(4)], rel=1e-6)


@both
@methods
def test_classes_do_not_affect_each_other(op, method: str, device: str) -> None:
    boxes, scores = tensors([UNIT] * 3, [0.5, 0.75, 0.5], device)
    keep, decayed = op(boxes, scores, method, idxs=torch.tensor([-1, 2**63 - 1, -(2**63)], device=device))
    assert keep.tolist() == [1, 0, 2] and decayed.tolist() == [0.75, 0.5, 0.5]


@both
@methods
def test_score_equal_to_the_threshold_is_dropped(op, method: str, device: str) -> None:
    boxes, scores = tensors([UNIT, FAR, [9.0, 0.0, 10.0, 1.0]], [0.5, 0.25, -1.0], device)
    for threshold, expected in ((0.0, [0, 1]), (0.25, [0]), (0.2, [0, 1]), (0.5, [])):
        assert op(boxes, scores, method, score_threshold=threshold)[0].tolist() == expected
    halves, scores = tensors([[0.0, 0.0, 2.0, 1.0], UNIT], [1.0, 0.5], device)
    assert op(halves, scores, "linear", score_threshold=0.25)[0].tolist() == [0]  # 0.5 * (1 - 1/2)
    assert op(halves, scores, "linear", score_threshold=0.24)[0].tolist() == [0, 1]


@both
@methods
def test_absent_entries(op, method: str, device: str) -> None:
    nan, inf = math.nan, math.inf
    boxes = [UNIT, [0.0, 0.0, nan, 1.0], [-inf, 0.0, 1.0, 1.0], UNIT, FAR]
    boxes, scores = tensors(boxes, [nan, 0.9, 0.9, 0.5, -inf], device)
    keep, decayed = op(boxes, scores, method)
    assert keep.tolist() == [3] and decayed.tolist() == [0.5]
    keep, decayed = op(boxes[:3], scores[:3], method)
    assert keep.shape == decayed.shape == (0,)


@both
@methods
def test_no_decay_without_an_iou(op, method: str, device: str) -> None:
    """Check boxes without area, and boxes whose area is too large for float32."""
    huge = [-1e30, -1e30, 1e30, 1e30]
    for box in ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0], huge):
        boxes, scores = tensors([box, UNIT, box], [0.9, 0.8, 0.7], device)
        keep, decayed = op(boxes, scores, method, 0.0)
        assert keep.tolist() == [0, 1, 2] and torch.equal(decayed, scores)


@both
def test_dtypes(op, device: str) -> None:
    boxes, scores = tensors([[0.0, 0.0, 2.0, 1.0], UNIT], [0.5, 0.375], device)
    expected = 0.375 * math.exp(-0.5)
    for boxes_dtype, scores_dtype, error in (
        (torch.float32, torch.float64, 1e-14),
        (torch.float64, torch.float32, 1e-7),
        (torch.float16, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 4e-3),
        (torch.bfloat16, torch.float16, 1e-3),
    ):
        decayed = op(boxes.to(boxes_dtype), scores.to(scores_dtype))[1]
        assert decayed.dtype == scores_dtype
        assert decayed[1].item() == pytest.approx(expected, rel=error)


@methods
def test_batch_equals_a_padded_loop_over_images(method: str, device: str) -> None:
    images = [clustered([40, 30], boxes_per_object=8, seed=b) for b in range(3)]
    boxes, scores, idxs = (torch.stack(x).to(device) for x in zip(*images))
    boxes, scores = boxes.float(), scores.float()
    scores[1, ::2] = math.nan
    for given in (None, idxs):
        keep, decayed = relops.soft_nms(boxes, scores, method, score_threshold=0.1, idxs=given)
        assert keep.shape == decayed.shape == (3, 70)
        for b in range(3):
            alone = relops.soft_nms(
                boxes[b], scores[b], method, score_threshold=0.1, idxs=None if given is None else given[b]
            )
            n = len(alone[0])
            assert 0 < n < 70
            assert torch.equal(keep[b, :n], alone[0]) and torch.equal(decayed[b, :n], alone[1])
            assert (keep[b, n:] == -1).all() and (decayed[b, n:] == 0).all()


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("K", [1, 7, 63, 64, 65, 130, 257, 1025])
def test_many_boxes(K: int, method: str, dtype: torch.dtype, device: str) -> None:
    """Compare scores by index, because rounding may decide which of two nearly equal scores comes first."""
    boxes, scores, idxs = clustered([K - K // 3, K // 3], boxes_per_object=10, seed=K)
    boxes, scores, idxs = boxes.to(device, dtype), scores.to(device, dtype), idxs.to(device)
    options = {"method": method, "iou_threshold": 0.3, "sigma": 0.5, "score_threshold": 1e-3}
    keep, decayed = relops.soft_nms(boxes, scores, idxs=idxs, **options)
    assert (decayed.diff() <= 0).all() and (decayed > 1e-3).all()
    by_index = torch.zeros_like(scores).scatter(0, keep, decayed)
    twin_keep, twin_decayed = reference.soft_nms(boxes, scores, idxs=idxs, **options)
    twin_by_index = torch.zeros_like(scores).scatter(0, twin_keep, twin_decayed)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(by_index, twin_by_index, rtol=tolerance, atol=0)


@methods
def test_matches_plain_loop(method: str, device: str) -> None:
    boxes, scores, idxs = (x[None].numpy() for x in clustered([50, 30], boxes_per_object=6))
    expected, values, unsure = plain_soft_nms(boxes, scores, idxs, method, 0.3, 0.5, 1e-3)
    assert not unsure.any()
    given = (torch.from_numpy(x[0]).to(device) for x in (boxes, scores))
    keep, decayed = relops.soft_nms(*given, method, idxs=torch.from_numpy(idxs[0]).to(device))
    n = int((expected >= 0).sum())
    assert keep.tolist() == expected[0, :n].tolist()
    np.testing.assert_allclose(decayed.cpu().numpy(), values[0, :n], rtol=1e-12)
