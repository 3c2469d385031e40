"""Tests that every region op must pass. test_<op>.py contains further tests of the values of an op."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import grad_like
from cases.regions import Regions
from conftest import DTYPES, assert_matches, run_python, why_no_cuda
from helpers.regions import REGION_OPS, Region, as_rows, assert_inverted_boxes_match_the_twin, box_dtype, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import relops
from relops import reference
from relops.reference._regions import split_boxes

on_ops = pytest.mark.parametrize("region", REGION_OPS.values(), ids=REGION_OPS.keys())
on_single_level_ops = pytest.mark.parametrize(
    "region", [region for region in REGION_OPS.values() if region.levels == 1], ids=lambda region: region.name
)
on_ops_with_box_gradient = pytest.mark.parametrize(
    "region", [region for region in REGION_OPS.values() if region.box_gradient], ids=lambda region: region.name
)


def draw(
    region: Region, case: Regions, device: str, dtype: torch.dtype = torch.float64, inside: bool = False
) -> tuple[list[Tensor], Tensor]:
    features, boxes = region.features(case), random_boxes(case, inside)
    return [x.to(device, dtype) for x in features], boxes.to(device, box_dtype(dtype))


# ---- Independent facts ----


@on_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_map_is_returned(region: Region, dtype: torch.dtype, device: str) -> None:
    """Set each image to a constant.

    Check that the output of a box is the constant of the image that its batch index selects.
    """
    case = Regions(N=3, K=20, output_size=(2, 3))
    features, boxes = draw(region, case, device, dtype, inside=True)
    features = [torch.ones_like(x) * torch.tensor([0.5, 2.0, -3.0]).to(x).view(3, 1, 1, 1) for x in features]
    constant = features[0][boxes[:, 0].long(), :1, :1, :1].expand(-1, case.C, 2, 3)
    torch.testing.assert_close(region(features, boxes, case), constant)


@on_ops
def test_moving_map_and_boxes_together_keeps_the_output(region: Region, device: str) -> None:
    """Move a map by whole pixels within a larger map of zeros, and move the boxes by the same distance."""
    case = Regions(H=40, W=44, C=2)
    features, boxes = draw(region, case, device, inside=True)
    coarsest = 2 ** (region.levels - 1)
    dx, dy = 2 * coarsest, coarsest
    moved = [F.pad(x, (dx >> level, 3, dy >> level, 2)) for level, x in enumerate(features)]
    shift = torch.tensor([0, dx, dy, dx, dy], device=device) / case.spatial_scale
    expected = region.run(features, boxes, case)
    actual = region.run(moved, boxes + shift, case)
    assert_matches(actual["output"], expected["output"])
    if region.box_gradient:
        assert_matches(actual["boxes"], expected["boxes"])
    for level, x in enumerate(features):
        grad = actual[f"input {level}"][:, :, dy >> level :, dx >> level :][:, :, : x.shape[2], : x.shape[3]]
        assert_matches(grad, expected[f"input {level}"])


@on_ops
def test_list_of_boxes(region: Region, device: str) -> None:
    case = Regions(N=3, K=10)
    features, boxes = draw(region, case, device)
    boxes[:, 0] = torch.tensor([0.0] * 4 + [2.0] * 6)  # none in image 1
    boxes.requires_grad_(region.box_gradient)
    boxes_of_images = [boxes[boxes[:, 0] == n, 1:] for n in range(3)]
    expected, actual = region(features, boxes, case), region(features, boxes_of_images, case)
    assert torch.equal(actual, expected)
    if region.box_gradient:
        grad = grad_like(expected)
        (expected,) = torch.autograd.grad(expected, boxes, grad)
        (actual,) = torch.autograd.grad(actual, boxes, grad)
        torch.testing.assert_close(actual, expected)


@on_ops
def test_output_size_of_one_number_is_square(region: Region, device: str) -> None:
    case = Regions(output_size=(3, 3))
    features, boxes = draw(region, case, device)
    function = functools.partial(getattr(relops, region.name), features if region.levels > 1 else features[0], boxes)
    options = case.options(region.name)
    assert torch.equal(function(**options | {"output_size": 3}), function(**options))


@on_single_level_ops
def test_spatial_scale(region: Region, device: str) -> None:
    """Check that boxes in map pixels at scale 1 are equivalent to boxes in image pixels at scale 1/4."""
    case = Regions()
    features, boxes = draw(region, case, device)
    map_boxes = torch.cat([boxes[:, :1], boxes[:, 1:] / 4], 1)
    actual = region(features, map_boxes, Regions(spatial_scale=1.0))
    assert torch.equal(actual, region(features, boxes, case))


# ---- Against the twin ----

SHAPES = {
    "typical": Regions(),
    "one pixel": Regions(H=1, W=1, C=2, spatial_scale=1.0),
    "one row": Regions(H=1, W=70, C=5, output_size=(1, 4)),
    "one column": Regions(H=70, W=1, C=5, output_size=(4, 1)),
    "wide": Regions(H=3, W=150, C=5, output_size=(2, 7), spatial_scale=0.5),
    "tall": Regions(H=150, W=3, C=1, output_size=(7, 2), spatial_scale=0.5),
    "14 x 14": Regions(H=9, W=11, C=16, K=5, output_size=(14, 14)),
    "17 columns": Regions(C=3, output_size=(3, 17), K=12),
    "40 channels": Regions(C=40, N=1, output_size=(2, 2)),
    "boxes of many images": Regions(N=5, K=30, H=8, W=9),
    "one bin": Regions(H=30, W=20, C=4, output_size=(1, 1)),
    "odd scale": Regions(spatial_scale=0.0625 * 1.5),
}
# Outputs with more bins, or bins with more pixels, than the kernels process at once.
LARGE = {
    "parts of rows": Regions(H=5, W=6, C=17, N=1, K=4, output_size=(2, 1100)),
    "many rows": Regions(H=6, W=5, C=17, N=1, K=4, output_size=(50, 41)),
    "large bin": Regions(H=70, W=90, C=20, K=4, output_size=(1, 1)),
}


def variants(region: Region, case: Regions) -> list[Regions]:
    if region.levels > 1:  # multi_scale_roi_align needs scales that are powers of 1/2
        case = replace(case, spatial_scale=2.0 ** round(math.log2(case.spatial_scale)))
    return [replace(case, **options) for options in region.options]


@on_ops
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_shapes(region: Region, case: Regions, dtype: torch.dtype, device: str) -> None:
    for variant in variants(region, case):
        region.assert_matches_twin(*draw(region, variant, device, dtype), variant)


@on_ops
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["typical", "wide", "14 x 14", "40 channels"])
def test_16_bit(region: Region, name: str, dtype: torch.dtype, device: str) -> None:
    """Check that float32 sums are rounded only once, and that boxes stay float32.

    In "wide", 16-bit boxes would be off by a pixel.
    """
    for variant in variants(region, SHAPES[name])[:1]:
        region.assert_matches_twin(*draw(region, variant, device, dtype), variant)


@on_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["typical", "17 columns", "14 x 14", "one row", "40 channels"])
def test_channels_last(region: Region, name: str, dtype: torch.dtype, device: str) -> None:
    """Check that channels_last inputs give channels_last outputs and gradients, with the right values."""
    (variant, *_) = variants(region, SHAPES[name])
    features, boxes = draw(region, variant, device, dtype)
    features = [x.to(memory_format=torch.channels_last) for x in features]
    actual = region.run(features, boxes, variant)
    for result, expected in region.run_twin(features, boxes, variant).items():
        assert_matches(actual[result], expected, result)
        if result != "boxes":
            assert actual[result].is_contiguous(memory_format=torch.channels_last), result


@on_ops
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_outputs_and_bins(region: Region, case: Regions, layout: torch.memory_format, device: str) -> None:
    for variant in variants(region, case):
        features, boxes = draw(region, variant, device)
        region.assert_matches_twin([x.to(memory_format=layout) for x in features], boxes, variant)


MEMORY = """
import os, resource
import torch
from cases.regions import Regions
from helpers.regions import REGION_OPS

def peak():  # in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def grown(results, step):
    before = peak()
    results.extend(step())
    return peak() - before - sum(x.numel() * x.element_size() for x in results) // 1024

torch.set_num_threads(1)
for region in REGION_OPS.values():
    for layout in (torch.contiguous_format, torch.channels_last):
        for C, side, H in ((2, 2048, 40), (32, 512, 40), (2, 1, 1500)):
            if region.position_sensitive:
                C, side, H = 1, min(side, 256), 8 if side > 1 else H
            case = Regions(H, H, C, 1, 1, (side, side), 1.0)
            features = [x.bfloat16().to(memory_format=layout).requires_grad_() for x in region.features(case)]
            boxes = torch.tensor([[0.0, 0.0, 0.0, H, H]])
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
                continue
            few = Regions(8, 8, 16, 1, 1, (2, 2), 1.0)
            region.run(region.features(few), boxes.double(), few)  # the first call loads libraries
            outputs, grads = [], []
            forward = grown(outputs, lambda: [region(features, boxes.requires_grad_(region.box_gradient), case)])
            grad = torch.ones_like(outputs[0])
            leaves = features + [boxes] * region.box_gradient
            backward = grown(grads, lambda: torch.autograd.grad(outputs[0], leaves, grad, allow_unused=True))
            sums = sum(4 * x.numel() // 1024 for x in features)  # 16-bit gradients are summed in float32
            print(region.name, layout, C, side, forward, backward - sums, sep=",", flush=True)
            os._exit(0)
"""


def test_memory_does_not_grow_with_the_output() -> None:
    """Check that a thread needs only a few MB, not counting inputs, results and float32 sums of gradients.

    The memory must not grow with the number of bins or with the number of pixels in a bin.
    """
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KB only on Linux")
    # With this threshold, freed memory is returned to the system at once, so later allocations raise the resident size.
    process = run_python(MEMORY, MALLOC_MMAP_THRESHOLD_="65536")
    assert process.returncode == 0, process.stderr
    lines = [line.split(",") for line in process.stdout.splitlines()]
    assert len(lines) == len(REGION_OPS) * 6
    assert not [line for line in lines if max(map(int, line[-2:])) > 4 << 10]


@on_ops
def test_gradients_of_some_inputs_only(region: Region, device: str) -> None:
    case = Regions(**region.options[0])
    features, boxes = draw(region, case, device)
    expected = region.run(features, boxes, case)
    leaves = [x.clone().requires_grad_() for x in features]
    output = region(leaves, boxes, case)
    output.backward(grad_like(output))
    assert all(torch.equal(x.grad, expected[name]) for x, name in zip(leaves, input_names(region)))

    leaf = boxes.clone().requires_grad_()
    if region.box_gradient:
        output = region(features, leaf, case)
        output.backward(grad_like(output))
        assert torch.equal(leaf.grad, expected["boxes"])


def input_names(region: Region) -> list[str]:
    return [f"input {level}" for level in range(region.levels)]


@on_ops_with_box_gradient
def test_gradient_of_batch_index_is_zero(region: Region, device: str) -> None:
    case = Regions(**region.options[0])
    grad = region.run(*draw(region, case, device, inside=True), case)["boxes"]
    assert not grad[:, 0].any()
    assert grad[:, 1:].any(1).all()


@on_ops
def test_gradcheck(region: Region, device: str, deterministic: None) -> None:
    """Check the gradients of all columns of boxes.

    The gradient of the batch index is zero, because small changes of it have no effect.
    """
    for options in region.options:
        case = Regions(N=3, H=5, W=6, C=2, K=5, output_size=(2, 3), **options)
        features, boxes = draw(region, case, device)
        boxes[:3, 0] = torch.arange(3)
        leaves = (boxes.requires_grad_(region.box_gradient), *(x.requires_grad_() for x in features))
        assert torch.autograd.gradcheck(
            lambda boxes, *features, case=case: region(features, boxes, case), leaves, fast_mode=True
        )


# ---- The batch index ----

NEAR = 2.0**-10


@on_ops
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_batch_index_is_rounded_near_an_integer(region: Region, dtype: torch.dtype, device: str) -> None:
    """Check that a batch index is rounded if it is near an integer, and truncated otherwise, also under vmap.

    vmap is a special case, because it joins its entries into one batch and thus changes the batch indices.
    """
    images = {
        0: (-1e-6, -0.0, 0.7, -0.7, 1 - 2 * NEAR, NEAR, -NEAR, 2 * NEAR, -1 + 2 * NEAR),
        1: (0.999999, 1.000001, 1 - NEAR, 1 + NEAR, 1.5, 2 - 2 * NEAR),
        2: (1.9999, 2.25, 3 - 2 * NEAR),
    }
    case = Regions(N=3, K=sum(map(len, images.values())))
    features, boxes = draw(region, case, device, dtype)
    boxes[:, 0] = torch.tensor([image for image, indices in images.items() for _ in indices])
    fractional = boxes.clone()
    fractional[:, 0] = torch.tensor([index for indices in images.values() for index in indices])
    expected = region.run(features, boxes, case)
    for name, x in region.run(features, fractional, case).items():
        assert torch.equal(x, expected[name]), name
    twins = [region.run_twin(features, x, case)["output"] for x in (fractional, boxes)]
    assert torch.equal(*twins)

    stacked = [torch.stack([x, 2 * x]) for x in features], torch.stack([fractional, fractional.flip(0)])
    mapped = torch.vmap(lambda features, boxes: region(features, boxes, case))(*stacked)
    looped = [region([x[b] for x in stacked[0]], stacked[1][b], case) for b in range(2)]
    assert torch.equal(mapped, torch.stack(looped))


INDICES = st.one_of(
    st.floats(-0.875, 2.875), st.builds(lambda n, distance: n + distance, st.integers(0, 2), st.floats(-2e-3, 2e-3))
)


@on_ops
@settings(max_examples=50, deadline=None)
@given(indices=st.lists(INDICES, min_size=1, max_size=9))
def test_any_batch_index_selects_the_image_of_the_twin(region: Region, indices: list[float]) -> None:
    case = Regions(N=3, K=len(indices))
    features, boxes = draw(region, case, "cpu")
    boxes[:, 0] = torch.tensor(indices, dtype=torch.float64)
    images = split_boxes(features[0], boxes)[0]
    whole = torch.cat([images[:, None], boxes[:, 1:]], 1)
    assert torch.equal(region(features, boxes, case), region(features, whole, case))


# ---- Degenerate boxes ----

NOT_FINITE = [math.nan, math.inf, -math.inf]


@on_ops
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_non_finite_coordinate(
    region: Region, bad: float, dtype: torch.dtype, memory_format: torch.memory_format, device: str
) -> None:
    """Check that a box with a non-finite coordinate gives zeros, gets a zero gradient and affects no other box."""
    case = Regions(K=14, **region.options[0])
    features, boxes = draw(region, case, device, dtype)
    features = [x.to(memory_format=memory_format) for x in features]
    not_finite = boxes.clone()
    replaced = torch.tensor([0, 2, 5, 6, 13], device=device)
    for k, column in zip(replaced.tolist(), (1, 2, 3, 4, slice(1, 5))):
        not_finite[k, column] = bad
    actual = region.run(features, not_finite, case)
    grad = grad_like(actual["output"])
    expected = region.run_twin(features, boxes, case, grad.index_fill(0, replaced, 0))
    expected["output"][replaced] = 0
    for name, x in expected.items():
        assert_matches(actual[name], x, name)


@on_ops
@pytest.mark.parametrize("index", [-1.0, 2.0, 1e9, -1.5, NEAR - 1, 2 - NEAR, math.nan, math.inf, -math.inf])
def test_batch_index_out_of_range_is_an_error_or_gives_nan(region: Region, index: float, device: str) -> None:
    """Check for an error on the CPU and for NaN on CUDA.

    The host could check CUDA tensors only by waiting for the device.
    """
    case = Regions()
    features, boxes = draw(region, case, device, torch.float32)
    valid = boxes.clone()
    boxes[3, 0] = index
    if device == "cpu":
        with pytest.raises(IndexError, match="boxes"):
            region(features, boxes, case)
        return
    actual = region(features, boxes, case)
    assert actual[3].isnan().all()
    others = [k for k in range(case.K) if k != 3]
    assert torch.equal(actual[others], region(features, valid, case)[others])


@on_ops
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e9, 1e18, 1e30, 3e38])
def test_huge_boxes_give_finite_results(region: Region, size: float, dtype: torch.dtype, device: str) -> None:
    case = Regions()
    boxes = as_rows(
        (0, 0, size, size),
        (-size, -size, size, size),
        (size, size, 2 * size, 2 * size),
        (size, size, -size, -size),
        (-size, 3, size, 9),
        (5, -size, 6, size),
        (size, 0, size, 9),
        (0, 0, -size, size),
        image=1,
        dtype=dtype,
        device=device,
    )
    features = [x.to(device, dtype) for x in region.features(case)]
    results = region.run(features, boxes, case)
    assert all(x.isfinite().all() for x in results.values())
    assert not results["input 0"][0].any()


@pytest.mark.parametrize("sampling_ratio", [5, 100])
def test_inverted_boxes_far_larger_than_the_map(sampling_ratio: int, device: str) -> None:
    """Only some samples of a bin are on the map, and their positions descend."""
    assert_inverted_boxes_match_the_twin(sampling_ratio, device)


@on_ops
def test_no_boxes(region: Region, device: str) -> None:
    case = Regions(K=0)
    features, boxes = draw(region, case, device, torch.float32)
    results = region.run(features, boxes, case)
    assert results["output"].shape == (0, 3, 3, 2)
    assert not any(results[name].any() for name in input_names(region))
    assert region(features, [boxes[:, 1:]] * 2, case).shape == (0, 3, 3, 2)


# ---- Random search ----

# Coordinates for maps up to 9 x 9: on borders, on pixel centers, outside by half a pixel, by one pixel and by far, and
# non-finite.
COORDINATES = st.one_of(
    st.integers(-8, 44).map(lambda i: i / 4),
    st.floats(-3, 12, width=32),
    st.sampled_from([-1.0, 0.0, 1e-30, 0.5, 9.0, 100.0, -1e4, 1e9, -1e9, 1e30, *NOT_FINITE]),
)


@st.composite
def random_cases(draw_from: st.DrawFn) -> tuple[Regions, list[list[float]], int, int]:
    sizes = st.integers(1, 9)
    case = Regions(
        H=draw_from(sizes),
        W=draw_from(sizes),
        C=draw_from(st.integers(1, 3)),
        N=draw_from(st.integers(1, 3)),
        output_size=(draw_from(st.integers(1, 5)), draw_from(st.integers(1, 5))),
        spatial_scale=draw_from(st.sampled_from([1.0, 0.5, 2.0])),
    )
    boxes = draw_from(st.lists(st.lists(COORDINATES, min_size=4, max_size=4), min_size=1, max_size=8))
    return case, boxes, draw_from(st.integers(0, 5)), draw_from(st.integers(0, 2**31))


@on_ops
@settings(max_examples=60, deadline=None, derandomize=True)
@given(search=random_cases())
def test_random_search(region: Region, search: tuple[Regions, list[list[float]], int, int]) -> None:
    case, corners, option, seed = search
    options = region.options[option % len(region.options)]
    case = replace(case, K=len(corners), **options)
    for device in ["cpu"] if why_no_cuda() else ["cpu", "cuda"]:
        torch.manual_seed(seed)
        boxes = torch.cat([torch.randint(case.N, (case.K, 1)), torch.tensor(corners, dtype=torch.float64)], 1)
        compare_where_smooth(region, [x.to(device) for x in region.features(case)], boxes.to(device), case)


def compare_where_smooth(region: Region, features: list[Tensor], boxes: Tensor, case: Regions) -> None:
    """Compare with the twin, except for boxes whose result jumps if the box moves by a tiny distance.

    For such a box, a rounding error may decide whether a sample on the border counts, or on which side of a pixel
    center a sample lies.
    """
    expected = region.run(features, boxes, case, reference)
    stable = torch.ones(case.K, dtype=torch.bool, device=boxes.device)
    stable_gradient = stable
    size = torch.where(boxes[:, 1:].isfinite(), boxes[:, 1:].abs(), 0)
    if not region.whole_pixels:
        # Boxes are moved by at least a few units in the last place of their coordinates.
        step = 1e-9 + 4 * torch.finfo(boxes.dtype).eps * size
        for sign in (1, -1):
            moved = torch.cat([boxes[:, :1], boxes[:, 1:] + sign * step], 1)
            nearby = region.run(features, moved, case, reference)
            stable = stable & (nearby["output"] - expected["output"]).abs().flatten(1).amax(1).lt(1e-6)
            stable_gradient = stable_gradient & (nearby["boxes"] - expected["boxes"]).abs().amax(1).lt(1e-6)
    # The sample positions of a box that is 1e9 pixels wide are accurate only to 1e-7 pixels, so its tolerance cannot be
    # 1e-9. Much larger boxes need no such tolerance, because none of their samples lies on the map.
    far = ((size > 1e6) & (size < 1e15)).any(1)
    for compared, tolerance in ((~far, 1e-9), (torch.ones_like(far), 1e-5)):
        grad = grad_like(expected["output"]) * (stable & compared)[:, None, None, None]
        expected = region.run(features, boxes, case, reference, grad)
        actual = region.run(features, boxes, case, grad_output=grad)
        for name, x in expected.items():
            rows = {"output": stable & compared, "boxes": stable & stable_gradient & compared}.get(name, slice(None))
            torch.testing.assert_close(
                actual[name][rows],
                x[rows],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )
