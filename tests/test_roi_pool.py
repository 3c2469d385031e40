"""Tests of the values and gradients of roi_pool without its twin. test_regions.py tests all region ops."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DTYPES
from helpers.regions import as_rows, box_dtype
from torch import Tensor

import relops

pytestmark = pytest.mark.quick

in_both_formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)


def numbered(H: int, W: int, device: str) -> Tensor:
    """Return a map of two channels, whose values at pixel (y,x) are 10 y + x and -(10 y + x).

    The maximum of the first channel identifies the last pixel of a bin, and that of the second channel the first pixel.
    """
    image = 10.0 * torch.arange(H)[:, None] + torch.arange(W)
    return torch.stack([image, -image])[None].to(device)


# A box, an output size, and for each bin (y, x) of its first pixel and (y, x) of its last pixel on a map of 8 x 9.
BINS = {
    "both ends are included": ((2, 1, 4, 5), (1, 1), [(1, 2, 5, 4)]),
    "x is the first coordinate": ((1, 0, 2, 7), (1, 1), [(0, 1, 7, 2)]),
    "rounded to the nearest": ((1.6, 0.4, 3.4, 2.49), (1, 1), [(0, 2, 2, 3)]),
    "halves away from zero": ((0.5, 2.5, 3.5, 4.5), (1, 1), [(3, 1, 5, 4)]),
    "a little less than a half": ((0.49999997, 0, 1, 0), (1, 1), [(0, 0, 0, 1)]),
    "negative halves away from zero": (
        (-0.5, -0.5, 1, 1),
        (2, 2),
        [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1)],
    ),
    "bins that divide": ((0, 0, 3, 3), (2, 2), [(0, 0, 1, 1), (0, 2, 1, 3), (2, 0, 3, 1), (2, 2, 3, 3)]),
    "bins that overlap": ((0, 0, 2, 0), (1, 2), [(0, 0, 0, 1), (0, 1, 0, 2)]),
    "more bins than pixels": ((4, 2, 4, 2), (1, 3), [(2, 4, 2, 4)] * 3),
    "inverted: one pixel": ((4, 3, 1, 1), (1, 1), [(3, 4, 3, 4)]),
    "beyond the border: only pixels on the map": ((5, 6, 20, 20), (1, 1), [(6, 5, 7, 8)]),
    "beyond two borders": ((-9, -9, 20, 20), (1, 1), [(0, 0, 7, 8)]),
}


@pytest.mark.parametrize(("box", "output_size", "bins"), BINS.values(), ids=BINS.keys())
@in_both_formats
def test_pixels_of_bins(
    box: tuple[float, ...],
    output_size: tuple[int, int],
    bins: list[tuple[int, ...]],
    memory_format: torch.memory_format,
    device: str,
) -> None:
    image = numbered(8, 9, device).to(memory_format=memory_format)
    output = relops.roi_pool(image, as_rows(box, dtype=torch.float32, device=device), output_size)
    assert output[0, 0].flatten().tolist() == [10 * y + x for _, _, y, x in bins]
    assert output[0, 1].flatten().tolist() == [-(10 * y + x) for y, x, _, _ in bins]


def test_bins_outside_are_zero(device: str) -> None:
    image = (numbered(8, 9, device) - 1000).requires_grad_()
    boxes = as_rows((20, 0, 30, 5), (-30, 0, -20, 5), (0, 8, 5, 9), (6, 0, 11, 0), dtype=torch.float32, device=device)
    output = relops.roi_pool(image, boxes, (1, 2))
    assert not output[:3].any()
    assert output[3, 0].tolist() == [[8 - 1000, 0]]
    output.sum().backward()
    assert image.grad.sum() == 2  # one bin is on the map, and there are two channels


@in_both_formats
@pytest.mark.parametrize("C", [1, 5, 40])
@pytest.mark.parametrize("columns", [3, 40])
def test_gradient_of_a_tie_goes_to_the_first(
    memory_format: torch.memory_format, C: int, columns: int, device: str
) -> None:
    """Check that pixels are ordered by rows, so that (1, 2) comes before (2, 0)."""
    image = torch.zeros(1, C, 4, columns, device=device)
    image[..., 1, 2] = image[..., 2, 0] = image[..., 3, 1] = 7
    image = image.to(memory_format=memory_format).requires_grad_()
    boxes = as_rows((0, 0, columns - 1, 3), dtype=torch.float32, device=device)
    relops.roi_pool(image, boxes, 1).sum().backward()
    assert image.grad.nonzero().tolist() == [[0, c, 1, 2] for c in range(C)]


def test_gradients_of_bins_and_boxes_add_up(device: str) -> None:
    image = numbered(4, 6, device).requires_grad_()
    boxes = as_rows((0, 0, 4, 0), (0, 0, 2, 0), (2, 0, 2, 0), dtype=torch.float32, device=device)
    output = relops.roi_pool(image, boxes, (1, 2))
    assert output[:, 0, 0].tolist() == [[2, 4], [1, 2], [2, 2]]  # the last pixel of each bin is its maximum
    output[:, 0].backward(torch.tensor([[[1.0, 2]], [[4, 8]], [[16, 32]]], device=device))
    assert image.grad[0, 0, 0].tolist() == [0, 4, 1 + 8 + 16 + 32, 0, 2, 0]
    assert not image.grad[0, 1].any()


@in_both_formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 40])
def test_nan_features_are_ignored(
    memory_format: torch.memory_format, dtype: torch.dtype, columns: int, device: str
) -> None:
    image = torch.full((1, 3, 2, columns), -5.0, dtype=dtype, device=device)
    image[..., 0, 0] = image[..., 1, 2] = math.nan
    image[..., 1, 1] = -2
    image = image.to(memory_format=memory_format).requires_grad_()
    boxes = as_rows((0, 0, columns - 1, 1), (0, 0, 0, 1), dtype=box_dtype(dtype), device=device)
    output = relops.roi_pool(image, boxes, 1)
    assert output.flatten(1).tolist() == [[-2] * 3, [-5] * 3]
    output.sum().backward()
    assert image.grad.nonzero()[:, 2:].tolist() == [[1, 0], [1, 1]] * 3


@in_both_formats
def test_infinite_features(memory_format: torch.memory_format, device: str) -> None:
    """Check that a maximum of -inf has no gradient, as in torchvision."""
    image = torch.full((1, 2, 2, 3), -math.inf, device=device)
    image[:, 1, 0, 1] = math.inf
    image = image.to(memory_format=memory_format).requires_grad_()
    output = relops.roi_pool(image, as_rows((0, 0, 2, 1), dtype=torch.float32, device=device), 1)
    assert output.flatten().tolist() == [-math.inf, math.inf]
    output.backward(torch.ones_like(output))
    assert image.grad.nonzero().tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_is_a_feature(dtype: torch.dtype, device: str) -> None:
    """Check that the maximum over the whole map equals a feature exactly and is not rounded again."""
    image = torch.randn(2, 5, 9, 70, dtype=torch.float64).to(device, dtype)
    boxes = as_rows((0, 0, 69, 8), image=1, dtype=box_dtype(dtype), device=device)
    assert torch.equal(relops.roi_pool(image, boxes, 1)[0, :, 0, 0], image[1].amax((1, 2)))


@in_both_formats
@pytest.mark.parametrize("W", [1, 7, 8, 9, 16, 17, 33, 64, 65, 200])
def test_every_width_of_a_bin(memory_format: torch.memory_format, W: int, device: str) -> None:
    """Compare with slices of the map. Small integers give many ties, whose gradients go to the first pixel."""
    image = torch.randint(0, 4, (1, 3, 6, W)).float().to(device).to(memory_format=memory_format).requires_grad_()
    ends = torch.randint(0, W, (20, 2)).sort(1).values
    boxes = [(x1, k % 3, x2, 2 + k % 4) for k, (x1, x2) in enumerate(ends.tolist())]
    output = relops.roi_pool(image, as_rows(*boxes, dtype=torch.float32, device=device), 1)
    output.sum().backward()
    grad = torch.zeros_like(image)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        values, pixels = image.detach()[0, :, y1 : y2 + 1, x1 : x2 + 1].flatten(1).max(1)
        assert output[k, :, 0, 0].tolist() == values.tolist()
        for c, pixel in enumerate(pixels.tolist()):
            grad[0, c, y1 + pixel // (x2 - x1 + 1), x1 + pixel % (x2 - x1 + 1)] += 1
    assert torch.equal(image.grad, grad)
