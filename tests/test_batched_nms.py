"""Tests that batched_nms equals nms on each class separately, for any class ids and any coordinates."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.suppression import clustered
from torch import Tensor

import relops
from relops import reference

pytestmark = pytest.mark.quick

LARGEST, SMALLEST = 2**63 - 1, -(2**63)


def class_by_class(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    kept = []
    for c in idxs.unique():
        members = (idxs == c).nonzero()[:, 0]
        kept.append(members[relops.nms(boxes[members], scores[members], iou_threshold)])
    kept = torch.cat(kept).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]


def test_classes_do_not_affect_each_other(device: str) -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 5, device=device)
    scores = torch.tensor([0.1, 0.5, 0.3, 0.4, 0.5], device=device)
    idxs = torch.tensor([7, -1, 7, -1, 0], device=device)
    for op in (relops.batched_nms, reference.batched_nms):
        assert op(boxes, scores, idxs, 0.5).tolist() == [1, 4, 2]


def test_one_class_equals_nms(device: str) -> None:
    boxes, scores, _ = (x.to(device) for x in clustered([500]))
    for class_id in (0, -5, SMALLEST):
        idxs = torch.full((500,), class_id, device=device)
        assert torch.equal(relops.batched_nms(boxes, scores, idxs, 0.4), relops.nms(boxes, scores, 0.4))


@pytest.mark.parametrize("box", [(-50.0, -50.0, -40.0, -40.0), (-1e30, 0.0, 1e30, 1.0), (1e7, 1e7, 1e7 + 1, 1e7 + 1)])
def test_classes_are_separate_for_all_coordinates(box: tuple[float, ...], device: str) -> None:
    """Check boxes for which adding a multiple of the largest coordinate would not separate the classes.

    If the largest coordinate is negative, shifted classes may overlap. If the largest coordinate is huge, rounding
    makes the boxes of different classes equal.
    """
    boxes = torch.tensor([box, box, (0.0, 0.0, 1.0, 1.0)], device=device)
    kept = relops.batched_nms(boxes, torch.tensor([0.3, 0.2, 0.1], device=device), torch.arange(3, device=device), 0.5)
    assert kept.tolist() == [0, 1, 2]


def test_infinite_box_does_not_affect_other_boxes(device: str) -> None:
    boxes, scores, idxs = (x.to(device) for x in clustered([60, 40, 50]))
    expected = relops.batched_nms(boxes, scores, idxs, 0.4)
    for value in (math.inf, -math.inf, math.nan):
        odd = torch.cat([boxes, boxes[:1]])
        odd[-1, 2] = value
        kept = relops.batched_nms(odd, torch.cat([scores, scores[:1] + 1]), torch.cat([idxs, idxs[:1]]), 0.4)
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_class_ids_may_have_any_integer_dtype(dtype: torch.dtype, device: str) -> None:
    boxes, scores, idxs = (x.to(device) for x in clustered([30, 40, 20, 25]))
    info = torch.iinfo(dtype)
    class_ids = torch.tensor([info.min, info.max, info.max - 1, 0 if info.min else 1], dtype=dtype, device=device)
    expected = relops.batched_nms(boxes, scores, idxs, 0.4)
    assert torch.equal(relops.batched_nms(boxes, scores, class_ids[idxs], 0.4), expected)
    assert torch.equal(expected, class_by_class(boxes, scores, idxs, 0.4))


def test_class_ids_that_differ_only_in_high_bits_are_separate(device: str) -> None:
    class_ids = torch.tensor([0, 2**32, 2**40, 2**62, SMALLEST, LARGEST, LARGEST - 2**32, -(2**32)], device=device)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 16, device=device)
    kept = relops.batched_nms(boxes, torch.linspace(1, 0, 16, device=device), class_ids.repeat(2), 0.5)
    assert kept.tolist() == list(range(8))


def test_20_000_classes_are_separate(device: str) -> None:
    """Each class has two overlapping boxes, whose coordinates are the same in all classes."""
    C = 20_000
    boxes = torch.tensor([(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 9.0)], device=device).repeat_interleave(C, 0)
    class_ids = (torch.arange(C, device=device) * 7919 - 10**6).repeat(2)
    scores = torch.rand(2 * C, device=device)
    kept = relops.batched_nms(boxes, scores, class_ids, 0.5)
    expected = scores.view(2, C).argmax(0) * C + torch.arange(C, device=device)
    assert torch.equal(kept.sort().values, expected.sort().values)
    assert (scores[kept].diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_classes_may_have_very_different_sizes(dtype: torch.dtype, device: str) -> None:
    sizes = [1, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 5000]
    boxes, scores, idxs = (x.to(device) for x in clustered(sizes, boxes_per_object=15))
    boxes, scores = boxes.to(dtype), (500 * scores).floor().float()  # with ties
    for iou_threshold in (0.3, 0.6):
        keep = relops.batched_nms(boxes, scores, idxs, iou_threshold)
        assert torch.equal(keep, reference.batched_nms(boxes, scores, idxs, iou_threshold))
        assert torch.equal(keep, class_by_class(boxes, scores, idxs, iou_threshold))
