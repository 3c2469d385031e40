"""Tests of the values and gradients of ps_roi_align without its twin. test_regions.py tests all region ops."""

from __future__ import annotations

import pytest
import torch
from cases.regions import Regions
from conftest import DTYPES, assert_matches
from helpers.regions import as_rows, box_dtype, random_boxes
from torch import Tensor

import relops

pytestmark = pytest.mark.quick

PH, PW, CHANNELS = 2, 3, 4


def own_channels(pooled: Tensor) -> Tensor:
    """Select bin (ph,pw) of channel (c * PH + ph) * PW + pw of a tensor [K,C,PH,PW], for every c, ph and pw."""
    by_channel = pooled.unflatten(1, (-1, PH, PW))
    rows = [torch.stack([by_channel[:, :, ph, pw, ph, pw] for pw in range(PW)], -1) for ph in range(PH)]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bin_has_its_own_channel(dtype: torch.dtype, device: str) -> None:
    """Use a map whose channel i is filled with the number i."""
    image = torch.arange(CHANNELS * PH * PW).to(device, dtype).view(1, -1, 1, 1).expand(1, -1, 8, 9)
    boxes = as_rows((1, 1, 7, 6), dtype=box_dtype(dtype), device=device)
    output = relops.ps_roi_align(image, boxes, (PH, PW))
    expected = torch.arange(CHANNELS * PH * PW).view(1, CHANNELS, PH, PW)
    torch.testing.assert_close(output.cpu(), expected.to(dtype))


@pytest.mark.parametrize("ratio", [1, 2, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_equals_roi_align_of_each_channel(ratio: int, memory_format: torch.memory_format, device: str) -> None:
    """Compare outputs and gradients with aligned roi_align, of which one bin per channel is selected."""
    case = Regions(H=9, W=13, K=18)
    image = torch.randn(case.N, CHANNELS * PH * PW, case.H, case.W, dtype=torch.float64, device=device)
    image = image.to(memory_format=memory_format).requires_grad_()
    boxes = random_boxes(case).to(device).requires_grad_()
    arguments = (image, boxes, (PH, PW), case.spatial_scale, ratio)
    expected = own_channels(relops.roi_align(*arguments, aligned=True))
    actual = relops.ps_roi_align(*arguments)
    assert_matches(actual, expected)
    grad = torch.randn(expected.shape, dtype=torch.float64, device=device)
    for x, y in zip(
        torch.autograd.grad(actual, (image, boxes), grad), torch.autograd.grad(expected, (image, boxes), grad)
    ):
        assert_matches(x, y, "gradient")


@pytest.mark.parametrize(
    "box",
    [(3, 3, 3, 3), (3, 2, 3, 6), (5, 5, 2, 2), (5, 2, 2, 6), (2, 6, 5, 2)],
    ids=["a point", "a line", "inverted", "inverted in x", "inverted in y"],
)
def test_bins_without_samples_are_zero(box: tuple[float, ...], device: str) -> None:
    """Check boxes in which adaptive sampling places no samples. torchvision computes 0 / 0 for them."""
    image = torch.randn(1, PH * PW, 8, 9, device=device, requires_grad=True)
    boxes = as_rows(box, dtype=torch.float32, device=device).requires_grad_()
    output = relops.ps_roi_align(image, boxes, (PH, PW))
    assert not output.any()
    output.sum().backward()
    assert not image.grad.any() and not boxes.grad.any()
