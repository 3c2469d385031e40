"""Comparisons of outputs and gradients with torchvision, for all ops that torchvision also provides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import grad_like
from cases.regions import Regions
from helpers.regions import REGION_OPS, Region, random_boxes
from helpers.suppression import clustered
from torch import Tensor

import relops

torchvision = pytest.importorskip("torchvision")

float64_and_float32 = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
CASES = {
    "7 x 7": Regions(H=24, W=33, C=4, K=40, output_size=(7, 7)),
    "14 x 14": Regions(H=24, W=33, C=2, K=20, output_size=(14, 14), spatial_scale=0.5),
    "one bin": Regions(H=9, W=70, C=5, N=3, K=30, output_size=(1, 1), spatial_scale=0.0625),
    "17 columns": Regions(H=12, W=12, C=1, N=1, K=30, output_size=(3, 17), spatial_scale=1.0),
}
REGION_OPTIONS = [
    pytest.param(region, options, id=f"{name} {options}")
    for name, region in REGION_OPS.items()
    if hasattr(torchvision.ops, name)
    for options in region.options
]


def with_gradient(f: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    leaf = image.clone().requires_grad_()
    output = f(leaf)
    # Where torchvision computes 0 / 0, relops returns 0.
    output = torch.where(output.isnan(), 0, output)
    return output.detach(), torch.autograd.grad(output, leaf, grad_like(output))[0]


@float64_and_float32
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("region", "options"), REGION_OPTIONS)
def test_region(region: Region, options: dict, case: Regions, dtype: torch.dtype, device: str) -> None:
    (image,) = (x.to(device, dtype) for x in region.features(case))
    boxes = random_boxes(case).to(device, dtype)
    if options.get("sampling_ratio") == -1:
        # For inverted boxes torchvision would compute more samples than memory can hold.
        boxes[:, 1:] = torch.cat([boxes[:, 1:3].minimum(boxes[:, 3:]), boxes[:, 1:3].maximum(boxes[:, 3:])], 1)

    options = replace(case, **options).options(region.name)

    def by(module: object) -> Callable[[Tensor], Tensor]:
        return lambda x: getattr(module, region.name)(x, boxes, **options)

    actual, expected = with_gradient(by(relops), image), with_gradient(by(torchvision.ops), image)
    # torchvision computes sample positions of up to 150 pixels in the dtype of the features, so float32 is imprecise.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=tolerance * image.abs().max().item())
    if region.name != "ps_roi_pool":  # torchvision's gradient of ps_roi_pool does not match its output
        largest = expected[1].abs().max().item()
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("region", "options"), REGION_OPTIONS)
def test_fraction_of_a_batch_index(region: Region, options: dict, device: str) -> None:
    case = Regions(N=3, K=6, **options)
    features, boxes = [x.to(device) for x in region.features(case)], random_boxes(case, inside=True).to(device)
    boxes[:, 0] = torch.tensor([-0.7, -1e-6, 0.7, 1.25, 1.9, 2.9])
    torch.testing.assert_close(region(features, boxes, case), region(features, boxes, case, torchvision.ops))


@float64_and_float32
def test_multi_scale_roi_align(dtype: torch.dtype, device: str) -> None:
    size, scales = 320, [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    features = [torch.randn(2, 4, size >> level + 2, size >> level + 2, dtype=torch.float64) for level in range(4)]
    features = [x.to(device, dtype).requires_grad_() for x in features]
    boxes = random_boxes(Regions(H=size, W=size, K=45, spatial_scale=1.0)).to(device, dtype)
    # Inverted boxes are left out, because torchvision takes the square root of their area, which may be negative.
    boxes = boxes[[k for k in range(45) if k % 9 != 7]]
    boxes = boxes[boxes[:, 0].argsort(stable=True)]
    boxes_of_images = [boxes[boxes[:, 0] == n, 1:] for n in range(2)]
    pooler = torchvision.ops.MultiScaleRoIAlign([str(level) for level in range(4)], (7, 7), sampling_ratio=2)
    expected = pooler({str(level): x for level, x in enumerate(features)}, boxes_of_images, [(size, size)] * 2)
    actual = relops.multi_scale_roi_align(features, boxes, (7, 7), scales)
    grad = grad_like(actual)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    for x, y in (
        (actual, expected),
        *zip(torch.autograd.grad(actual, features, grad), torch.autograd.grad(expected, features, grad)),
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * y.abs().max().item())


@float64_and_float32
@pytest.mark.parametrize("name", ["box_iou", "generalized_box_iou"])
def test_box_iou(name: str, dtype: torch.dtype, device: str) -> None:
    corner, size = torch.rand(2, 150, 2, dtype=torch.float64)
    boxes = torch.cat([corner, corner + 0.4 * size], 1).to(device, dtype)
    actual, expected = ([x.clone().requires_grad_() for x in boxes.split([50, 100])] for _ in range(2))
    outputs = getattr(relops, name)(*actual), getattr(torchvision.ops, name)(*expected)
    assert torch.equal(*outputs)
    grad = grad_like(outputs[0])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for x, y in zip(torch.autograd.grad(outputs[0], actual, grad), torch.autograd.grad(outputs[1], expected, grad)):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["box_iou", "generalized_box_iou"])
def test_box_iou_of_integers(name: str, dtype: torch.dtype, device: str) -> None:
    """Compare boxes of `dtype` with each other and with int64 boxes.

    The dtypes of the results may differ: for 64-bit integers torchvision returns float32 and relops float64.
    """
    corner, size = torch.randint(1, 60, (2, 150, 2), device=device)
    a, b = torch.cat([corner, corner + size], 1).split([50, 100])
    for x, y in ((a.to(dtype), b), (a, b.to(dtype)), (a.to(dtype), b.to(dtype))):
        torch.testing.assert_close(getattr(relops, name)(x, y), getattr(torchvision.ops, name)(x, y), check_dtype=False)


@float64_and_float32
@pytest.mark.parametrize("name", ["box_iou", "generalized_box_iou"])
def test_box_iou_without_area(name: str, dtype: torch.dtype, device: str) -> None:
    """Compare boxes on a grid, some of which are inverted.

    Where torchvision computes 0 / 0, relops returns a number.
    """
    boxes = torch.randint(-2, 4, (150, 4)).to(device, dtype)
    actual, expected = (getattr(module, name)(boxes[:50], boxes[50:]) for module in (relops, torchvision.ops))
    assert expected.isfinite().any() and not expected.isfinite().all() and actual.isfinite().all()
    assert torch.equal(torch.where(expected.isfinite(), actual, expected).nan_to_num(), expected.nan_to_num())


@float64_and_float32
@pytest.mark.parametrize("iou_threshold", [0.2, 0.5, 0.8])
def test_nms(iou_threshold: float, dtype: torch.dtype, device: str) -> None:
    """Use positive coordinates, and IoUs that differ from the threshold by more than rounding errors."""
    boxes, scores, idxs = (x.to(device) for x in clustered([700, 500, 300, 100], boxes_per_object=12))
    boxes, scores = (boxes - boxes.min()).to(dtype), scores.to(dtype)
    expected = torchvision.ops.nms(boxes, scores, iou_threshold)
    assert torch.equal(relops.nms(boxes, scores, iou_threshold), expected)
    expected = torchvision.ops.batched_nms(boxes, scores, idxs, iou_threshold)
    assert torch.equal(relops.batched_nms(boxes, scores, idxs, iou_threshold), expected)


def test_nms_at_the_threshold() -> None:
    """Check the documented behavior of torchvision's CPU kernel for an IoU of exactly 3/10."""
    boxes, scores = torch.tensor([[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 3.0, 1.0]]), torch.tensor([0.2, 0.1])
    assert relops.nms(boxes, scores, 0.3).tolist() == [0, 1]
    assert torchvision.ops.nms(boxes, scores, 0.3).tolist() == [0]


@pytest.mark.parametrize("name", ["nms", "batched_nms"])
def test_nms_takes_the_same_arguments(name: str) -> None:
    actual, expected = (inspect.signature(getattr(module, name)).parameters for module in (relops, torchvision.ops))
    assert list(actual) == list(expected)
