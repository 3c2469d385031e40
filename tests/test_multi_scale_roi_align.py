"""Tests of the values and gradients of multi_scale_roi_align without its twin. See test_regions.py for other tests."""

from __future__ import annotations

import pytest
import torch
from cases import grad_like
from cases.regions import Regions
from conftest import assert_matches
from helpers.regions import as_rows, random_boxes
from torch import Tensor

import relops

pytestmark = pytest.mark.quick

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def pyramid(device: str, C: int = 2, N: int = 1, size: int = 1024, levels: int = 4) -> list[Tensor]:
    """Return the pyramid of an image of size x size. The map of level l is filled with the number l."""
    return [
        torch.full((N, C, size >> level + 2, size >> level + 2), float(level), device=device) for level in range(levels)
    ]


def levels_of(sizes: list[tuple[float, float]], device: str, **options: float) -> list[float]:
    boxes = as_rows(*[(10, 10, 10 + width, 10 + height) for width, height in sizes], dtype=torch.float32, device=device)
    return relops.multi_scale_roi_align(pyramid(device), boxes, 1, SCALES, **options)[:, 0, 0, 0].tolist()


def test_boundaries_of_levels(device: str) -> None:
    """Check equation 1 of Feature Pyramid Networks.

    Boxes of 224 x 224 pixels are on level 4, the third level of this pyramid. Boxes of half the side are one level
    lower.
    """
    sizes = [1, 56, 111.99, 112, 223.9, 224, 447.9, 448, 900]
    assert levels_of([(size, size) for size in sizes], device) == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_size_just_below_a_boundary_is_on_the_upper_level(dtype: torch.dtype, device: str) -> None:
    """Check that 1e-6 is added to the level before it is rounded down."""
    boxes = as_rows((0, 0, 223.99994, 223.99994), (0, 0, 223.9997, 223.9997), dtype=dtype, device=device)
    features = [x.to(dtype) for x in pyramid(device)]
    assert relops.multi_scale_roi_align(features, boxes, 1, SCALES)[:, 0, 0, 0].tolist() == [2, 1]


def test_level_depends_on_the_area(device: str) -> None:
    assert levels_of([(448, 112), (112, 448), (14, 900), (56, 224), (56, 223)], device) == [2, 2, 1, 1, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"canonical_box_size": 112.0}, [1, 2, 3]),
        ({"canonical_level": 5}, [1, 2, 3]),
        ({"canonical_level": 2}, [0, 0, 0]),
    ],
    ids=str,
)
def test_canonical_box(options: dict[str, float], expected: list[int], device: str) -> None:
    assert levels_of([(64, 64), (112, 112), (224, 224)], device, **options) == expected


def test_boxes_without_area_are_on_the_finest_level(device: str) -> None:
    boxes = as_rows((10, 10, 10, 90), (90, 10, 10, 90), (90, 90, 90, 90), dtype=torch.float32, device=device)
    features = [x + 5 for x in pyramid(device)]
    assert relops.multi_scale_roi_align(features, boxes, 1, SCALES)[:, 0, 0, 0].tolist() == [5, 5, 5]


def test_box_inverted_on_both_axes_has_an_area(device: str) -> None:
    """Check that the area is the product of the two negative sides, as in torchvision."""
    boxes = as_rows((250, 250, 20, 20), dtype=torch.float32, device=device)
    assert relops.multi_scale_roi_align(pyramid(device), boxes, 1, SCALES)[0, 0, 0, 0].item() == 2


def test_boxes_beyond_the_pyramid_are_on_its_outer_levels(device: str) -> None:
    """Check a pyramid whose finest level is level 4, with the scale 1/16.

    Boxes that are too small for this level are also on it.
    """
    sizes = [(20, 20), (230, 230), (500, 500), (1000, 1000)]
    boxes = as_rows(*[(0, 0, *size) for size in sizes], dtype=torch.float32, device=device)
    features = pyramid(device, levels=2)
    output = relops.multi_scale_roi_align(features, boxes, 1, [1 / 16, 1 / 32])
    assert output[:, 0, 0, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_roi_align_on_each_level(aligned: bool, ratio: int, memory_format: torch.memory_format, device: str) -> None:
    """Compare outputs and gradients with roi_align on the level of each box. Every level has boxes."""
    size, C = 400, 5
    features = [torch.randn(2, C, size >> level + 2, size >> level + 2, dtype=torch.float64) for level in range(4)]
    features = [x.to(device).to(memory_format=memory_format).requires_grad_() for x in features]
    sides = torch.tensor([40.0, 90, 130, 200, 250, 300, 470, 500], dtype=torch.float64)
    boxes = random_boxes(Regions(H=size, W=size, K=8, spatial_scale=1.0), inside=True)
    boxes[:, 3:] = boxes[:, 1:3] + torch.stack([sides * 0.9, sides / 0.9], 1)
    level_of = [0, 0, 1, 1, 2, 2, 3, 3]
    boxes = boxes.to(device).requires_grad_()
    arguments = {"output_size": (3, 7), "sampling_ratio": ratio, "aligned": aligned}
    actual = relops.multi_scale_roi_align(features, boxes, spatial_scales=SCALES, **arguments)
    expected = torch.cat(
        [
            relops.roi_align(features[level], boxes[k : k + 1], spatial_scale=SCALES[level], **arguments)
            for k, level in enumerate(level_of)
        ]
    )
    assert_matches(actual, expected)
    grad = grad_like(actual)
    leaves = (*features, boxes)
    for x, y in zip(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        assert x.any()
        assert_matches(x, y, "gradient")


def test_gradient_of_some_levels(device: str) -> None:
    """Check that a level that requires no gradient gets None, and that a level without boxes gets zeros."""
    features = pyramid(device)
    boxes = as_rows((10, 10, 200, 200), (10, 10, 100, 100), dtype=torch.float32, device=device)  # levels 1 and 0
    for level in (1, 3):
        features[level].requires_grad_()
    relops.multi_scale_roi_align(features, boxes, 2, SCALES).sum().backward()
    assert features[0].grad is None and features[2].grad is None
    assert features[1].grad.sum().item() == pytest.approx(2 * 4, rel=1e-6)  # two channels of 2 x 2 bins
    assert features[3].grad.shape == features[3].shape and not features[3].grad.any()


def test_levels_are_computed_in_float32_for_16_bit_features(device: str) -> None:
    """Check boxes with a side of 223.9, which bfloat16 would round to 224, so they would be on the next level."""
    boxes = as_rows((0, 0, 223.9, 223.9), dtype=torch.float32, device=device)
    features = [x.bfloat16() for x in pyramid(device)]
    assert relops.multi_scale_roi_align(features, boxes, 1, SCALES)[0, 0, 0, 0].item() == 1
