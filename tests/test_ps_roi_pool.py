"""Tests of the values and gradients of ps_roi_pool without its twin. test_regions.py tests all region ops."""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPES
from helpers.regions import as_rows, box_dtype

import relops

pytestmark = pytest.mark.quick

PH, PW, CHANNELS = 2, 3, 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_bin_has_its_own_channel(dtype: torch.dtype, memory_format: torch.memory_format, device: str) -> None:
    """Use a map whose channel i is filled with the number i. Check that the gradient of a bin stays in its channel."""
    image = torch.arange(CHANNELS * PH * PW).to(device, dtype).view(1, -1, 1, 1).expand(1, -1, 8, 9)
    image = image.contiguous(memory_format=memory_format).requires_grad_()
    boxes = as_rows((1, 1, 7, 5), dtype=box_dtype(dtype), device=device)
    output = relops.ps_roi_pool(image, boxes, (PH, PW))
    expected = torch.arange(CHANNELS * PH * PW).view(1, CHANNELS, PH, PW)
    assert torch.equal(output.detach().cpu(), expected.to(dtype))
    output.backward(expected.to(device, dtype))
    # A bin has 2 x 2 pixels, and each of them gets a quarter of the gradient.
    assert torch.equal(image.grad.sum((0, 2, 3)).cpu(), expected.flatten().to(dtype))
    assert torch.equal(image.grad.amax((0, 2, 3)).cpu(), expected.flatten().to(dtype) / 4)


# A box, an output size, and (first row, end row, first column, end column) of each bin on a map of 8 x 9, or None for
# an empty bin.
BINS = {
    "the end is not included": ((2, 1, 4, 5), (1, 1), [(1, 5, 2, 4)]),
    "x is the first coordinate": ((1, 0, 2, 7), (1, 1), [(0, 7, 1, 2)]),
    "rounded, halves away from zero": ((0.5, 2.5, 3.4, 4.6), (1, 1), [(3, 5, 1, 3)]),
    "bins that overlap": ((0, 0, 3, 1), (1, 2), [(0, 1, 0, 2), (0, 1, 1, 3)]),
    "without area: one pixel": ((4, 2, 4, 2), (1, 1), [(2, 3, 4, 5)]),
    "inverted: one pixel": ((4, 3, 1, 1), (1, 1), [(3, 4, 4, 5)]),
    "the last row and column are left out": ((0, 0, 9, 8), (1, 1), [(0, 7, 0, 8)]),
    "nothing but the last column": ((8, 0, 9, 5), (1, 1), [None]),
    "beyond the border": ((-20, -20, 20, 20), (2, 1), [None, (0, 7, 0, 8)]),
    "outside": ((20, 20, 30, 30), (1, 1), [None]),
}


@pytest.mark.parametrize(("box", "output_size", "bins"), BINS.values(), ids=BINS.keys())
def test_mean_of_the_pixels_of_bins(
    box: tuple[float, ...], output_size: tuple[int, int], bins: list[tuple[int, ...] | None], device: str
) -> None:
    image = torch.randn(1, len(bins), 8, 9, dtype=torch.float64, device=device, requires_grad=True)
    output = relops.ps_roi_pool(image, as_rows(box, device=device), output_size)
    weights = torch.zeros_like(image)
    for channel, pixels in enumerate(bins):
        if pixels is not None:
            top, bottom, left, right = pixels
            weights[0, channel, top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
    torch.testing.assert_close(output.flatten(), (weights * image).sum((0, 2, 3)))
    output.sum().backward()  # unlike torchvision, relops clips bins in the backward pass, too
    torch.testing.assert_close(image.grad, weights)
