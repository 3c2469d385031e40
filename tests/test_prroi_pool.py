"""Tests of the values and gradients of prroi_pool without its twin. test_regions.py tests all region ops."""

from __future__ import annotations

import pytest
import torch
from cases.regions import Regions
from conftest import assert_matches
from helpers.regions import as_rows, random_boxes
from torch import Tensor

import relops

pytestmark = pytest.mark.quick


def surface(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Interpolate an image [...,H,W] linearly at the rows y [Y] and columns x [X], and return [...,Y,X].

    The interpolated surface falls to zero within one pixel outside of the image.
    """

    def hats(t: Tensor, n: int) -> Tensor:
        return (1 - (t[:, None] - torch.arange(n, device=t.device)).abs()).clamp(min=0)

    return hats(y, image.shape[-2]) @ image @ hats(x, image.shape[-1]).T


# A box on a map that has a single pixel, whose value is 1, and the mean over the box of the surface hat(y) hat(x),
# where hat(t) = max(0, 1 - |t|).
ONE_PIXEL = {
    "the whole hat": ((-1, -1, 1, 1), 1 / 4),
    "wider than the hat": ((-2, -3, 2, 3), 1 / 4 / 6),
    "a quadrant": ((0, 0, 1, 1), 1 / 4),
    "the opposite quadrant": ((-1, -1, 0, 0), 1 / 4),
    "half of the hat in x": ((0, -1, 0.5, 1), 3 / 4 / 2),
    "outside of the hat": ((1, 1, 2, 2), 0.0),
    "the outer half of the hat": ((0.5, -0.5, 1, 0.5), 1 / 4 * 3 / 4),
    "tiny": ((0.25, 0.5, 0.25 + 2**-20, 0.5 + 2**-20), 3 / 8),
    "without area": ((0, 0, 0, 0), 0.0),
    "without width": ((0, -1, 0, 1), 0.0),
    "inverted": ((1, 1, -1, -1), 0.0),
    "inverted in y": ((-1, 1, 1, -1), 0.0),
}


@pytest.mark.parametrize(("box", "expected"), ONE_PIXEL.values(), ids=ONE_PIXEL.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_pixel(box: tuple[float, ...], expected: float, dtype: torch.dtype, device: str) -> None:
    image = torch.ones(1, 1, 1, 1, dtype=dtype, device=device, requires_grad=True)
    output = relops.prroi_pool(image, as_rows(box, dtype=dtype, device=device), 1)
    assert output.item() == pytest.approx(expected, rel=1e-5)
    output.backward()
    assert image.grad.item() == pytest.approx(expected, rel=1e-5)


def test_linear_ramp_is_exact(device: str) -> None:
    """Check the mean of 3x - 2y + 1 over a bin, which is the value at the bin's center, and its gradient."""
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(24), indexing="ij")
    image = (3.0 * columns - 2.0 * rows + 1).double().to(device)[None, None]
    scale, PH, PW = 0.5, 3, 2
    # The bins of the second box end on pixel centers. The surface has kinks there, but its integral is smooth.
    for x1, y1, x2, y2 in ((5.2, 7.7, 31.4, 22.9), (4, 2, 28, 26), (5.2, 7.7, 5.9, 7.8)):
        boxes = as_rows((x1, y1, x2, y2), device=device).requires_grad_()
        output = relops.prroi_pool(image, boxes, (PH, PW), scale)
        for ph in range(PH):
            for pw in range(PW):
                along_y, along_x = (ph + 0.5) / PH, (pw + 0.5) / PW
                y, x = scale * (y1 + along_y * (y2 - y1)), scale * (x1 + along_x * (x2 - x1))
                assert output[0, 0, ph, pw].item() == pytest.approx(3 * x - 2 * y + 1, abs=1e-11)
                (grad,) = torch.autograd.grad(output[0, 0, ph, pw], boxes, retain_graph=True)
                slopes = [0, 3 * (1 - along_x), -2 * (1 - along_y), 3 * along_x, -2 * along_y]
                assert grad[0].tolist() == pytest.approx([scale * slope for slope in slopes], abs=1e-10)


def test_gradient_of_an_edge_is_the_mean_along_it(device: str) -> None:
    """Check the Leibniz rule.

    With respect to x2, the derivative of the integral over the box is the integral along the edge at x2. The derivative
    of the mean is therefore the mean along this edge minus the mean over the box, divided by x2 - x1.
    """
    image = torch.randn(1, 1, 6, 7, dtype=torch.float64, device=device)
    n = 20000
    for x1, y1, x2, y2 in ((1.3, 0.6, 4.2, 3.9), (-0.4, 1.0, 3.0, 5.7)):
        boxes = as_rows((x1, y1, x2, y2), device=device).requires_grad_()
        output = relops.prroi_pool(image, boxes, 1)
        (grad,) = torch.autograd.grad(output.sum(), boxes)
        y = y1 + (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n * (y2 - y1)
        along = surface(image[0, 0], y, torch.tensor([x1, x2], dtype=torch.float64, device=device)).mean(0)
        expected = torch.stack([output.view(()) - along[0], along[1] - output.view(())]) / (x2 - x1)
        torch.testing.assert_close(grad[0, [1, 3]], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("output_size", [(1, 1), (2, 3), (7, 7)])
def test_numerical_integral(output_size: tuple[int, int], device: str) -> None:
    case = Regions(H=6, W=9, C=2, N=1, K=8)
    image = torch.randn(1, case.C, case.H, case.W, dtype=torch.float64, device=device)
    boxes = random_boxes(case).to(device)[:7]
    PH, PW = output_size
    fine = 840  # a multiple of the number of bins
    steps = (torch.arange(fine, dtype=torch.float64, device=device) + 0.5) / fine
    output = relops.prroi_pool(image, boxes, output_size, case.spatial_scale)
    for box, actual in zip(boxes[:, 1:] * case.spatial_scale, output):
        x1, y1, x2, y2 = box
        samples = surface(image[0], y1 + steps * (y2 - y1), x1 + steps * (x2 - x1))
        expected = samples.view(case.C, PH, fine // PH, PW, fine // PW).mean((2, 4))
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


def test_mean_of_the_bins_is_the_mean_of_the_box(device: str) -> None:
    case = Regions(H=20, W=30, N=2, K=16)
    image = torch.randn(2, 5, 20, 30, dtype=torch.float64, device=device)
    boxes = random_boxes(case).to(device)
    whole = relops.prroi_pool(image, boxes, 1, case.spatial_scale)
    for output_size in ((2, 2), (5, 17), (14, 14)):
        bins = relops.prroi_pool(image, boxes, output_size, case.spatial_scale)
        assert_matches(bins.mean((2, 3), keepdim=True), whole)


def test_thin_boxes_far_from_the_origin_keep_their_precision(device: str) -> None:
    """Check that cancellation loses no precision for float32 boxes that are 1/256 pixel wide and close to x = 1000."""
    image = torch.randn(1, 3, 2, 1100, dtype=torch.float64, device=device)
    x = 1000.25 + torch.arange(20, dtype=torch.float64) / 64
    boxes = torch.stack([x * 0, x, x * 0 + 0.25, x + 1 / 256, x * 0 + 0.5], 1).to(device)
    expected = relops.prroi_pool(image.float().double(), boxes, 1)
    center = torch.stack(
        [surface(image[0].float().double(), boxes[k, [2]] + 0.125, boxes[k, [1]] + 1 / 512) for k in range(20)]
    )
    torch.testing.assert_close(expected, center)
    assert_matches(relops.prroi_pool(image.float(), boxes.float(), 1), expected)


def test_gradcheck_where_bins_end_on_pixels(device: str, deterministic: None) -> None:
    """Check that the integral is smooth even if bins end on pixel centers, where the surface has kinks."""
    image = torch.randn(1, 2, 6, 7, dtype=torch.float64, device=device, requires_grad=True)
    corners = torch.tensor(
        [[1.0, 1, 4, 5], [0, 0, 6, 5], [-1, 2, 7, 6], [2.5, 2, 3, 2.5]],
        dtype=torch.float64,
        device=device,
        requires_grad=True,
    )
    images = torch.zeros(4, 1, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda image, corners: relops.prroi_pool(image, torch.cat([images, corners], 1), (2, 3)), (image, corners)
    )
