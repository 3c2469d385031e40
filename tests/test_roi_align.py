"""Tests of the values and gradients of roi_align without its twin. test_regions.py tests all region ops."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import pytest
import torch
from helpers.regions import as_rows
from torch import Tensor

import relops

pytestmark = pytest.mark.quick


def one_pixel(y: int, x: int, device: str, H: int = 5, W: int = 6) -> Tensor:
    """Return a map that is 1 at (y,x) and 0 elsewhere, so that the output of a bin is the weight of that pixel."""
    image = torch.zeros(1, 1, H, W, device=device)
    image[..., y, x] = 1
    return image


# A pixel (y,x) of a 5 x 6 map, a box, sampling_ratio, aligned, and the weight of the pixel in the only bin.
WEIGHTS = {
    "a sample at the pixel": ((2, 3), (2, 1, 4, 3), 1, False, 1.0),
    "aligned: half a pixel up and left": ((2, 3), (2.5, 1.5, 4.5, 3.5), 1, True, 1.0),
    "between four pixels": ((2, 3), (2, 1, 3, 2), 1, False, 0.25),
    "x is the first coordinate": ((2, 3), (2.5, 1, 4, 3), 1, False, 0.75),
    "four samples around": ((2, 3), (2, 1, 4, 3), 2, False, 0.25),
    "adaptive: two by two samples": ((2, 3), (2, 1, 4, 3), -1, False, 0.25),
    "adaptive: three by three samples": ((2, 3), (1.5, 0.5, 4.5, 3.5), 0, False, 1 / 9),
    "adaptive: three by one samples": ((2, 3), (1.5, 1.5, 4.5, 2.5), -1, False, 1 / 3),
    "half a pixel outside counts as the border": ((2, 0), (-1, 1.5, 0, 2.5), 1, False, 1.0),
    "a pixel outside also counts as the border": ((0, 3), (2.5, -2, 3.5, 0), 1, False, 1.0),
    "more than a pixel outside is 0": ((0, 3), (2.5, -2.01, 3.5, 0), 1, False, 0.0),
    "after the last pixel": ((4, 5), (5, 4, 6, 5), 1, False, 1.0),
    "W itself still counts": ((2, 5), (5.5, 1.5, 6.5, 2.5), 1, False, 1.0),
    "more than W is 0": ((2, 5), (5.51, 1.5, 6.51, 2.5), 1, False, 0.0),
    "half of the samples outside": ((2, 5), (4, 1, 10, 3), 2, False, 0.25),
    "without area: a pixel wide": ((2, 3), (2.5, 1.5, 2.5, 1.5), 1, False, 1.0),
    "inverted: a pixel wide": ((2, 3), (2.5, 1.5, 0, 0), 1, False, 1.0),
    "aligned, without area: a point": ((2, 3), (3.5, 2.5, 3.5, 2.5), 1, True, 1.0),
    "aligned, inverted: sampled backwards": ((2, 3), (4.5, 3.5, 2.5, 1.5), 1, True, 1.0),
    "aligned, adaptive, inverted: no samples": ((2, 3), (4.5, 3.5, 2.5, 1.5), -1, True, 0.0),
    "aligned, adaptive, without area: no samples": ((2, 3), (3.5, 2.5, 3.5, 2.5), -1, True, 0.0),
    "aligned, adaptive, inverted in y only": ((2, 3), (2.5, 3.5, 4.5, 1.5), -1, True, 0.0),
}


@pytest.mark.parametrize(("pixel", "box", "ratio", "aligned", "expected"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weight_of_one_pixel(
    pixel: tuple[int, int], box: tuple[float, ...], ratio: int, aligned: bool, expected: float, device: str
) -> None:
    image = one_pixel(*pixel, device).requires_grad_()
    boxes = as_rows(box, dtype=torch.float32, device=device)
    output = relops.roi_align(image, boxes, 1, 1.0, ratio, aligned)
    assert output.item() == pytest.approx(expected, abs=1e-6)
    output.backward()
    assert image.grad[0, 0][pixel].item() == pytest.approx(expected, abs=1e-6)


def ramp(H: int, W: int, device: str) -> Tensor:
    """Return a map of two channels, 3x - 2y + 1 and its negative."""
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    image = 3.0 * columns - 2.0 * rows + 1
    return torch.stack([image, -image])[None].double().to(device)


@pytest.mark.parametrize("ratio", [1, 2, 5, -1])
@pytest.mark.parametrize("aligned", [False, True])
def test_linear_ramp_is_reproduced(ratio: int, aligned: bool, device: str) -> None:
    """Check that the mean of the samples, which lie symmetrically in a bin, is the value at the center of the bin."""
    image, scale, PH, PW = ramp(20, 24, device), 0.5, 2, 3
    x1, y1, x2, y2 = box = (5.2, 7.7, 31.4, 22.9)
    boxes = as_rows(box, device=device).requires_grad_()
    output = relops.roi_align(image, boxes, (PH, PW), scale, ratio, aligned)
    offset = 0.5 if aligned else 0.0
    for ph in range(PH):
        for pw in range(PW):
            along_y, along_x = (ph + 0.5) / PH, (pw + 0.5) / PW
            y, x = (y1 + along_y * (y2 - y1)) * scale - offset, (x1 + along_x * (x2 - x1)) * scale - offset
            expected = 3 * x - 2 * y + 1
            assert output[0, :, ph, pw].tolist() == pytest.approx([expected, -expected], abs=1e-12)
            (grad,) = torch.autograd.grad(output[0, 0, ph, pw], boxes, retain_graph=True)
            slopes = [0, 3 * (1 - along_x), -2 * (1 - along_y), 3 * along_x, -2 * along_y]
            assert grad[0].tolist() == pytest.approx([scale * slope for slope in slopes], abs=1e-12)


def test_gradient_of_widened_box(device: str) -> None:
    """Check a box that is narrower than a pixel.

    It is widened to one pixel, so its samples depend only on where it starts.
    """
    boxes = as_rows((5.2, 7.7, 5.3, 9.8), device=device).requires_grad_()
    relops.roi_align(ramp(20, 24, device), boxes, 1, 1.0, 2)[0, 0].sum().backward()
    assert boxes.grad[0].tolist() == pytest.approx([0, 3, -1, 0, -1], abs=1e-12)


def test_box_gradient_is_zero_across_the_border(device: str) -> None:
    """Check that the interpolated surface is flat outside of the centers of the outer pixels."""
    boxes = as_rows((-0.9, 4, -0.1, 6), (23.1, 4, 23.9, 6), device=device).requires_grad_()
    relops.roi_align(ramp(20, 24, device), boxes, 1, 1.0, 2)[:, 0].sum().backward()
    assert boxes.grad[1].tolist() == pytest.approx([0, 0, -1, 0, -1], abs=1e-12)
    # The first box is narrower than a pixel and is widened to x = -0.9 .. 0.1, so its samples at -0.65 and -0.15 are
    # left of the first pixel center.
    assert boxes.grad[0].tolist() == pytest.approx([0, 0, -1, 0, -1], abs=1e-12)


def fraction_of_samples(start: Fraction, size: Fraction, P: int, p: int, n: int) -> Fraction:
    """Return, for one axis, the exact fraction of the adaptive samples of bin p that lie on a map of n pixels."""
    grid = ceil(size / P)
    if grid <= 0:
        return Fraction(0)
    step = size / P / grid
    first = start + p * size / P + step / 2
    lowest, highest = ceil((-1 - first) / step), floor((n - first) / step)
    return Fraction(max(0, min(highest, grid - 1) - max(lowest, 0) + 1), grid)


HUGE = {
    "1e9": (0, 0, 1e9, 1e9),
    "1e9, a quarter pixel off": (0.25, 0.75, 1e9, 1e9),
    "1e9 by 10": (0, 3, 1e9, 13),
    "1e30": (0, 0, 1e30, 1e30),
    "through the map": (-5000.5, 2, 5003.25, 9),
    "next to the map": (13, 0, 1e9, 9),
    "inverted": (1e9, 1e9, 0, 0),
    "starting at 1e9": (1e9, 1e9, 2e9, 2e9),
}


@pytest.mark.parametrize("box", HUGE.values(), ids=HUGE.keys())
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_huge_box_follows_the_definition(
    box: tuple[float, ...], aligned: bool, dtype: torch.dtype, memory_format: torch.memory_format, device: str
) -> None:
    """Check that the output for a map of ones is the fraction of samples on the map, even for billions of samples."""
    H, W, PH, PW = 10, 12, 2, 2
    image = torch.ones(1, 4, H, W, dtype=dtype, device=device).to(memory_format=memory_format)
    boxes = as_rows(box, dtype=dtype, device=device)
    actual = relops.roi_align(image, boxes, (PH, PW), 1.0, -1, aligned)[0].double()
    offset = Fraction(1, 2) if aligned else 0
    x1, y1, x2, y2 = (Fraction(coordinate) - offset for coordinate in boxes[0, 1:].tolist())
    width, height = (max(size, Fraction(1)) if not aligned else size for size in (x2 - x1, y2 - y1))
    rows = [float(fraction_of_samples(y1, height, PH, p, H)) for p in range(PH)]
    columns = [float(fraction_of_samples(x1, width, PW, p, W)) for p in range(PW)]
    expected = torch.tensor([[y * x for x in columns] for y in rows], dtype=torch.float64)
    torch.testing.assert_close(
        actual.cpu(), expected.expand(4, -1, -1), rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-40
    )


def test_adaptive_number_of_samples(device: str) -> None:
    """Check that a bin of 7 pixels has 7 samples, and that a slightly larger bin has 8."""
    image = torch.zeros(1, 1, 1, 40, dtype=torch.float64, device=device)
    image[..., 3] = 1  # the samples at 2.5 and 3.5 each have a weight of 1/2 for this pixel
    boxes = as_rows((0, 0, 21, 1), (0, 0, 21 + 1e-9, 1), device=device)
    output = relops.roi_align(image, boxes, (1, 3))[:, 0, 0, 0].tolist()
    eighths = sum(max(0, 1 - abs(7 / 8 * (i + 0.5) - 3)) for i in range(8)) / 8
    assert output == pytest.approx([1 / 7, eighths], abs=1e-8)


@pytest.mark.parametrize(("aligned", "ratio"), [(False, 2), (True, 2), (False, -1), (True, -1)])
def test_gradcheck(aligned: bool, ratio: int, device: str, deterministic: None) -> None:
    image = torch.randn(2, 1, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    images = torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64, device=device)
    corners = torch.tensor(
        [[0.31, 0.47, 5.13, 4.29], [-2.2, 1.1, 3.3, 9.7], [3.17, 2.21, 3.43, 2.64]],
        dtype=torch.float64,
        device=device,
        requires_grad=True,
    )
    assert torch.autograd.gradcheck(
        lambda image, corners: relops.roi_align(image, torch.cat([images, corners], 1), (2, 3), 0.9, ratio, aligned),
        (image, corners),
    )
