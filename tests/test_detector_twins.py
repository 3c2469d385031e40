"""Tests of benchmarks/detector_twins.py: the twin of a detector gives equal results and calls no op of relops."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy")

import relops
from benchmarks import detector_twins, harness
from benchmarks.bench_linear_sum_assignment import scipy_loop
from benchmarks.bench_local_relation import shifted
from relops import reference
from relops.models import Targets

SIZE = (64, 96)


def test_every_op_has_a_twin() -> None:
    ops = set(relops.__all__) - {"models", "nn", "ops", "reference"}
    assert ops == set(detector_twins.TWINS)


def test_ops_are_restored_after_an_error() -> None:
    heads, removal = (sys.modules[f"relops.{name}"] for name in ("models.parts.roi_heads", "nn.duplicate_removal"))
    with pytest.raises(ZeroDivisionError), detector_twins.twins():
        assert heads.nms_padded is reference.nms_padded and removal.box_iou is reference.box_iou
        raise ZeroDivisionError
    assert heads.nms_padded is relops.nms_padded and removal.box_iou is relops.box_iou


@pytest.mark.parametrize("name", detector_twins.CASES)
def test_twins_agree(name: str, device: str) -> None:
    case = detector_twins.CASES[name]
    run, _ = detector_twins.training(name, case.training, SIZE, device)

    def check(found: tuple, expected: tuple) -> float:
        return detector_twins.distance_of_gradients(case.gradient_bound, found, expected)

    _, calls = detector_twins.verify(name, run, check)
    assert {
        "relation_networks_fpn": {"nms_padded", "multi_scale_roi_align", "relation_attention", "rank_embedding"},
        "sparse_rcnn": {"multi_scale_roi_align", "generalized_box_iou", "linear_sum_assignment"},
        "deformable_detr": {"ms_deform_attn_fused", "_ms_deform_attn_fused_backward", "linear_sum_assignment"},
        "detr": {"generalized_box_iou", "linear_sum_assignment"},
        "faster_rcnn": {"nms_padded", "roi_align", "local_relation", "_local_relation_backward"},
        "faster_rcnn_fpn": {"nms_padded", "multi_scale_roi_align", "_multi_scale_roi_align_backward", "box_iou"},
    }[name] <= calls.keys()
    if case.detection is not None:
        run, _ = detector_twins.detection(name, case.training, SIZE, device)
        detector_twins.verify(name, run, detector_twins.distance_of_detections)


@pytest.mark.parametrize("name", ["sparse_rcnn", "faster_rcnn"])
def test_gradients_in_float64(name: str, device: str) -> None:
    """Compare in float64, because the float32 error bounds of these detectors are very loose."""
    torch.manual_seed(0)
    model = relops.models.build(name, 3, **detector_twins.CASES[name].training)
    model = detector_twins.diversify_outputs(model).train().to(device, torch.float64)
    images = torch.rand(2, 3, *SIZE, dtype=torch.float64, device=device)
    boxes = torch.tensor([[[5.0, 5, 40, 50], [50, 10, 90, 60]]], dtype=torch.float64, device=device).repeat(2, 1, 1)
    targets = Targets(boxes, torch.tensor([[0, 2], [1, 1]], device=device))

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return torch.autograd.grad(sum(model(images, None, targets).values()), tuple(model.parameters()))

    found = run()
    with detector_twins.twins():
        expected = run()
    assert harness.relative_rms_error(*([torch.cat([x.flatten() for x in side])] for side in (found, expected))) < 1e-9


def test_twin_that_calls_an_op_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(detector_twins.TWINS, "generalized_box_iou", relops.generalized_box_iou)
    run, _ = detector_twins.training("detr", detector_twins.CASES["detr"].training, SIZE, "cpu")
    with pytest.raises(harness.VerificationError, match=r"its twin ran .*generalized_box_iou"):
        detector_twins.verify("detr", run, lambda found, expected: 0.0)


def test_different_detections_are_rejected() -> None:
    case = detector_twins.CASES["faster_rcnn_fpn"]
    run, _ = detector_twins.detection("faster_rcnn_fpn", case.training, SIZE, "cpu")
    found = run()
    detector_twins.distance_of_detections(found, found)
    moved = found._replace(boxes=found.boxes + 1)
    with pytest.raises(harness.VerificationError, match="detections differ"):
        detector_twins.distance_of_detections(found, moved)
    labeled = found._replace(labels=torch.where(found.labels >= 0, found.labels + 1, -1))
    with pytest.raises(harness.VerificationError, match="detections differ"):
        detector_twins.distance_of_detections(found, labeled)


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("channels, groups, k", [(6, 3, 3), (10, 4, 4)])
def test_local_relation_of_shifted_maps(channels: int, groups: int, k: int, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, groups, -(-11 // stride), -(-9 // stride), dtype=torch.float64)
    key, value = (torch.randn(2, c, 11, 9, dtype=torch.float64) for c in (groups, channels))
    arguments = query, key, value, torch.randn(groups, k, k, dtype=torch.float64)
    options = {"kernel_size": k, "stride": stride, "dilation": dilation}
    torch.testing.assert_close(shifted(*arguments, **options), reference.local_relation(*arguments, **options))


def test_linear_sum_assignment_of_scipy_loop() -> None:
    torch.manual_seed(0)
    for shape in ((3, 7, 4), (3, 4, 7)):
        cost = torch.rand(shape)
        for found, expected in zip(scipy_loop(cost), reference.linear_sum_assignment(cost)):
            assert torch.equal(found, expected)
