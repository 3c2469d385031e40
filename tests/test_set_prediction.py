"""Tests of set prediction: matching and losses by loops over pairs, detections by hand, and sine positions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relops.models.detectors.set_based import SetDetector
from relops.models.parts.boxes import centers_of, corners_of
from relops.models.parts.set_prediction import SetLoss, SetPrediction, focal_losses, mean_over_processes
from relops.models.parts.transformer import extent_of, sine_positions


def problem(focal: bool, corners: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits [3,2,5,C] and boxes [3,2,5,4] of three layers, labels [2,3], and objects [2,3,4]. The label -1 in
    the middle of the first image marks padding."""
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 5, 4 if focal else 5, dtype=torch.float64)
    boxes, objects = (torch.rand(*n, 4, dtype=torch.float64) * 0.4 + 0.1 for n in ((3, 2, 5), (2, 3)))
    if corners:
        boxes, objects = corners_of(boxes), corners_of(objects)
    return logits, boxes, torch.tensor([[2, -1, 0], [3, 3, 1]]), objects


def giou(a: list[float], b: list[float]) -> float:
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1, 0) * max(y2 - y1, 0)

    inner = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    hull = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    union = area(*a) + area(*b) - inner
    return inner / union - (hull - union) / hull


def box_costs(box: Tensor, target: Tensor, corners: bool) -> tuple[float, float]:
    """Return the L1 distance and 1 - GIoU of a pair of boxes."""
    a, b = ((x if corners else corners_of(x)).tolist() for x in (box, target))
    return sum(abs(x - y) for x, y in zip(box.tolist(), target.tolist())), 1 - giou(a, b)


def focal_terms(p: float) -> tuple[float, float]:
    """Return the focal loss of a probability p for a class that is present, and for a class that is absent."""
    return -0.25 * (1 - p) ** 2 * math.log(p), -0.75 * p**2 * math.log(1 - p)


def match_by_brute_force(loss: SetLoss, logits: Tensor, boxes: Tensor, labels: Tensor, objects: Tensor) -> list[int]:
    """Assign predictions to the objects of an image so that the total cost is lowest. The logits are [Q,C]."""
    valid = [t for t, label in enumerate(labels.tolist()) if label >= 0]

    def cost(q: int, t: int) -> float:
        distance, overlap = box_costs(boxes[q], objects[t], loss.corners)
        if loss.focal:
            present, absent = focal_terms(logits[q, labels[t]].sigmoid().item())
            class_cost = present - absent
        else:
            class_cost = -logits[q].softmax(0)[labels[t]].item()
        return loss.costs[0] * class_cost + loss.costs[1] * distance + loss.costs[2] * overlap

    best = min(
        itertools.permutations(range(len(logits)), len(valid)),
        key=lambda chosen: sum(cost(q, t) for q, t in zip(chosen, valid)),
    )
    pairs = [-1] * len(labels)
    for q, t in zip(best, valid):
        pairs[t] = q
    return pairs


SETTINGS = pytest.mark.parametrize(
    "loss",
    [
        SetLoss(),
        SetLoss(corners=True, weights=(1, 2, 3), costs=(3, 1, 2)),
        SetLoss(focal=False, weights=(1, 5, 2), costs=(1, 5, 2), background=0.3),
    ],
    ids=["focal", "corners", "softmax"],
)


@SETTINGS
def test_matching_has_the_lowest_cost(loss: SetLoss) -> None:
    logits, boxes, labels, objects = problem(loss.focal, loss.corners)
    pairs = loss.match(logits, boxes, labels, objects)
    for layer, image in itertools.product(range(3), range(2)):
        expected = match_by_brute_force(loss, logits[layer, image], boxes[layer, image], labels[image], objects[image])
        assert pairs[layer, image].tolist() == expected


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Compute the focal loss by the formula that detectors commonly use."""
    entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    p = logits.sigmoid()
    return torch.where(positive, 0.25 * (1 - p) ** 2.0, 0.75 * p**2.0) * entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("focal", [True, False], ids=["focal", "softmax"])
def test_class_cost_equals_the_cost_gathered_from_all_classes(focal: bool, dtype: torch.dtype) -> None:
    """Results are bitwise equal, although for the focal loss relops computes only the costs of the objects' classes."""
    logits = 20 * torch.randn(3, 2, 17, 91, dtype=dtype)
    labels = torch.randint(-1, 90, (2, 13))
    positive = torch.ones_like(logits, dtype=torch.bool)
    cost = focal_loss(logits, positive) - focal_loss(logits, ~positive) if focal else -logits.softmax(-1)
    expected = cost.gather(3, labels.clamp(min=0)[None, :, None].expand(3, 2, 17, 13))
    with LargestResult() as largest:
        actual = SetLoss(focal=focal).class_cost(logits, labels)
    assert torch.equal(actual, expected)
    if focal:
        assert largest.numel == actual.numel()


class LargestResult(TorchDispatchMode):
    """A dispatch mode that records the number of elements of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        self.numel = max(self.numel, *(x.numel() for x in tree_leaves(results)))
        return results


def test_focal_losses_equal_the_usual_formula_bitwise() -> None:
    logits = 20 * torch.randn(1000)
    positive = torch.rand(1000) < 0.5
    assert torch.equal(torch.where(positive, *focal_losses(logits)), focal_loss(logits, positive))


@SETTINGS
def test_losses_by_hand(loss: SetLoss) -> None:
    logits, boxes, labels, objects = problem(loss.focal, loss.corners)
    C, count = logits.shape[-1], 5
    expected = []
    for layer in range(3):
        classes = distance = overlap = weights = 0.0
        for image in range(2):
            predictions = logits[layer, image], boxes[layer, image]
            pairs = match_by_brute_force(loss, *predictions, labels[image], objects[image])
            label_of = {q: labels[image, t].item() for t, q in enumerate(pairs) if q >= 0}
            for q in range(5):
                if loss.focal:
                    for c in range(C):
                        classes += focal_terms(predictions[0][q, c].sigmoid().item())[label_of.get(q) != c] / count
                else:
                    label = label_of.get(q, C - 1)
                    weight = 1.0 if q in label_of else loss.background
                    classes -= weight * predictions[0][q].log_softmax(0)[label].item()
                    weights += weight
            for t, q in enumerate(pairs):
                if q >= 0:
                    l1, not_overlapping = box_costs(predictions[1][q], objects[image, t], loss.corners)
                    distance, overlap = distance + l1 / count, overlap + not_overlapping / count
        classes = classes if loss.focal else classes / weights
        expected.append([w * x for w, x in zip(loss.weights, (classes, distance, overlap))])
    losses = loss(logits, boxes, labels, objects)
    assert [losses[x].item() for x in ("classes", "boxes", "giou")] == pytest.approx(expected[2])
    assert losses["auxiliary"].item() == pytest.approx(sum(map(sum, expected[:2])))
    assert losses.keys() == {"classes", "boxes", "giou", "auxiliary"}
    assert loss(logits[:1], boxes[:1], labels, objects).keys() == {"classes", "boxes", "giou"}


@SETTINGS
def test_all_predictions_are_background_without_objects(loss: SetLoss) -> None:
    logits, boxes, labels, objects = problem(loss.focal, loss.corners)
    logits.requires_grad_(), boxes.requires_grad_()
    losses = loss(logits, boxes, torch.full_like(labels, -1), torch.full_like(objects, math.nan))
    assert losses["boxes"] == losses["giou"] == 0
    sum(losses.values()).backward()
    assert boxes.grad.abs().sum() == 0 and logits.grad.isfinite().all()
    assert (logits.grad > 0).all() if loss.focal else (logits.grad[..., -1] < 0).all()


def test_more_objects_than_predictions() -> None:
    """Some objects remain unmatched.

    A prediction with a NaN is never matched and does not affect the other predictions.
    """
    loss = SetLoss()
    logits, boxes, labels, objects = problem(True, False)
    pairs = loss.match(logits[:, :, :2], boxes[:, :, :2], labels, objects)
    assert ((pairs >= 0).sum(2) == 2).all()
    boxes[:, :, 0] = math.nan
    pairs = loss.match(logits, boxes, labels, objects)
    assert ((pairs > 0) == (labels >= 0)).all()


def test_number_of_objects_is_the_mean_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mean_over_processes(torch.tensor(0)) == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(9))
    assert mean_over_processes(torch.tensor(3)) == 3


class FixedDetector(SetDetector):
    def __init__(self, prediction: SetPrediction, loss: SetLoss, max_count: int) -> None:
        super().__init__(loss, max_count)
        self.prediction = prediction

    def predict(self, images: Tensor, sizes: Tensor) -> SetPrediction:
        return self.prediction


def test_detections_by_hand() -> None:
    """With a sigmoid, every pair of a prediction and a class may be a detection.

    With a softmax, a prediction gives one detection, of its best class. Boxes are relative to the image without its
    padding.
    """
    logits = torch.tensor([[[[3.0, 1.0, -9.0], [2.0, -1.0, 0.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.5], [0.9, 0.2, 0.4, 0.4]]]])
    images, sizes = torch.zeros(1, 3, 64, 64), torch.tensor([[40.0, 50.0]])
    first, second = [20.0, 10, 30, 30], [35.0, 0, 50, 16]
    found = FixedDetector(SetPrediction(logits, boxes), SetLoss(), 3).eval()(images, sizes)
    assert found.labels.tolist() == [[0, 0, 1]]
    torch.testing.assert_close(found.boxes, torch.tensor([[first, second, first]]))
    torch.testing.assert_close(found.scores, torch.tensor([[3.0, 2, 1]]).sigmoid())

    found = FixedDetector(SetPrediction(logits.flip(-1), boxes), SetLoss(focal=False), 3).eval()(images, sizes)
    assert found.labels.tolist() == [[1, 0]]
    torch.testing.assert_close(found.boxes, torch.tensor([[first, second]]))
    torch.testing.assert_close(found.scores[0], logits.flip(-1)[0, 0].softmax(-1)[[0, 1], [1, 0]])


def test_centers_and_corners() -> None:
    box = torch.tensor([0.1, 0.2, 0.5, 0.4])
    torch.testing.assert_close(centers_of(box), torch.tensor([0.3, 0.3, 0.4, 0.2]))
    torch.testing.assert_close(corners_of(centers_of(box)), box)


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_positions_equal_those_of_a_mask(offset: float) -> None:
    """Compare with DETR's formula, which uses a padding mask that is resized to the map.

    Positions in the padding may differ, because attention ignores padding.
    """
    sizes = torch.tensor([[96.0, 128.0], [70.0, 100.0]])
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 70:] = mask[1, :, 100:] = True
    for shape in ((12, 16), (3, 4), (2, 2)):
        extent = extent_of((96, 128), sizes, shape)
        resized = F.interpolate(mask[None].float(), size=shape)[0].bool()
        assert torch.equal(extent.padding, resized)
        valid = ~resized
        torch.testing.assert_close(extent.ratio[:, 0], valid[:, 0].float().mean(1))
        torch.testing.assert_close(extent.ratio[:, 1], valid[:, :, 0].float().mean(1))

        y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
        y = (y + offset) / (y[:, -1:] + 1e-6) * 2 * math.pi
        x = (x + offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        expected = torch.empty(2, *shape, 24)
        for half, position in enumerate((y, x)):
            for i in range(6):
                angle = position / 10000 ** (2 * i / 12)
                expected[..., 12 * half + 2 * i], expected[..., 12 * half + 2 * i + 1] = angle.sin(), angle.cos()
        torch.testing.assert_close(sine_positions(extent, 24, offset)[valid], expected[valid])
