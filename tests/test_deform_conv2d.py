"""Tests of the values and gradients of deform_conv2d, a convolution whose taps sample at offsets."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Inputs, grad_like
from cases.deform_conv import CONVOLUTIONS, Convolution
from cases.deform_conv import DEFORM_CONV2D as OP
from conftest import (
    DTYPES,
    assert_matches,
    assert_matches_twin,
    determinism,
    needs_cuda,
    resident_growth,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import relops

cases = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def draw(case: Convolution, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Inputs:
    return OP.draw(case.deform_conv2d, device, dtype)


def options(inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in ("stride", "padding", "dilation")}


# ---- The definition, written out ----


def by_loops(inputs: Inputs) -> Tensor:
    """Compute the definition with plain arithmetic on lists."""
    (N, C, H, W), (Co, group_inputs, kh, kw) = inputs["input"].shape, inputs["weight"].shape
    (Ho, Wo), taps = inputs["offset"].shape[2:], kh * kw
    G, groups = inputs["offset"].shape[1] // (2 * taps), C // group_inputs
    maps, offset, weight = (inputs[name].tolist() for name in ("input", "offset", "weight"))
    mask = inputs["mask"].tolist() if inputs["mask"] is not None else None
    bias = inputs["bias"].tolist() if inputs["bias"] is not None else [0.0] * Co
    stride, padding, dilation = options(inputs).values()

    def sample(image: list[list[float]], y: float, x: float) -> float:
        top, left = math.floor(y), math.floor(x)
        return sum(
            (1 - abs(y - row)) * (1 - abs(x - column)) * image[row][column]
            for row, column in itertools.product((top, top + 1), (left, left + 1))
            if 0 <= row < H and 0 <= column < W
        )

    output = torch.zeros(N, Co, Ho, Wo, dtype=torch.float64)
    for n, o, ho, wo in itertools.product(range(N), range(Co), range(Ho), range(Wo)):
        total = bias[o]
        first = o // (Co // groups) * group_inputs  # the first channel of the group of o
        for c, t in itertools.product(range(group_inputs), range(taps)):
            tap = (first + c) // (C // G) * taps + t
            y = stride[0] * ho - padding[0] + dilation[0] * (t // kw) + offset[n][2 * tap][ho][wo]
            x = stride[1] * wo - padding[1] + dilation[1] * (t % kw) + offset[n][2 * tap + 1][ho][wo]
            factor = 1.0 if mask is None else mask[n][tap][ho][wo]
            total += weight[o][c][t // kw][t % kw] * factor * sample(maps[n][first + c], y, x)
        output[n, o, ho, wo] = total
    return output


@cases
def test_definition(case: Convolution, device: str) -> None:
    inputs = draw(replace(case, N=1, H=min(case.H, 8), W=min(case.W, 11)), device)
    expected = by_loops(inputs)
    assert_matches(OP.run(inputs)["output"], expected)
    assert_matches(OP.reference(**inputs), expected, "twin")


def test_by_hand(device: str) -> None:
    """Sample a map of 2 x 2 pixels at its center, above its first row, beside its last column and far outside."""
    image = torch.tensor([[1.0, 2.0], [4.0, 8.0]], device=device).view(1, 1, 2, 2)
    offset = torch.tensor(
        [[0.5, 0.5], [-0.25, 0.0], [0.0, 0.75], [-3.0, 0.0]], device=device
    )  # (dy, dx) of each output
    offset = offset.T.reshape(1, 2, 2, 2)
    mask = torch.tensor([1.0, 2.0, 1.0, 1.0], device=device).view(1, 1, 2, 2)
    weight, bias = torch.full((1, 1, 1, 1), 10.0, device=device), torch.tensor([0.5], device=device)
    output = relops.deform_conv2d(image, offset, weight, bias, mask=mask)
    # Outputs (0,1), (1,0) and (1,1) begin at the pixels with the values 2, 4 and 8.
    samples = [(1 + 2 + 4 + 8) / 4, 2 * 0.75 * 2, 0.25 * 4 + 0.75 * 8, 0.0]
    assert output.flatten().tolist() == [10 * x + 0.5 for x in samples]


# ---- Identities ----


def undeformed(case: Convolution, device: str) -> Inputs:
    inputs = draw(case, device)
    return inputs | {"offset": torch.zeros_like(inputs["offset"]), "mask": None}


PLAIN = [
    Convolution(),
    Convolution(stride=(2, 1), padding=(0, 3)),
    Convolution(H=15, W=18, dilation=(2, 3), padding=(2, 3)),
    Convolution(C=12, Co=6, groups=3, G=2),
    Convolution(C=12, Co=24, groups=12, G=12, stride=(1, 2)),
    Convolution(C=9, kernel=(1, 1), padding=(0, 0), stride=(3, 2), bias=False),
    Convolution(H=12, kernel=(4, 2), padding=(2, 1), dilation=(3, 1)),
    Convolution(N=1, C=40, Co=37, H=20, W=33, kernel=(5, 5), padding=(2, 2)),
    Convolution(C=3, H=4, W=5, padding=(6, 7)),
]


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_offsets_it_is_a_convolution(case: Convolution, dtype: torch.dtype, device: str) -> None:
    inputs = OP.cast(undeformed(case, device), dtype, dtype)
    exact = OP.cast(inputs, torch.float64, torch.float64)

    def convolution(**inputs: Tensor) -> Tensor:
        groups = inputs["input"].shape[1] // inputs["weight"].shape[1]
        return F.conv2d(inputs["input"], inputs["weight"], inputs["bias"], **options(inputs), groups=groups)

    needs_grad = tuple(name for name in OP.needs_grad(inputs) if name != "offset")
    expected = OP.run(exact, convolution, needs_grad=needs_grad)
    for name, x in OP.run(inputs, needs_grad=needs_grad).items():
        assert_matches(x, expected[name], name)


@pytest.mark.parametrize("case", PLAIN)
def test_equal_whole_offsets_shift_the_map(case: Convolution, device: str) -> None:
    inputs = undeformed(case, device)
    given = {"stride": case.stride, "dilation": case.dilation, "groups": case.groups}
    (above, left), margin = case.padding, 60
    padded = F.pad(inputs["input"], (margin,) * 4)
    for dy, dx in [(1, -2), (-3, 2), (0, 4), (50, 0)]:
        inputs["offset"][:, 0::2], inputs["offset"][:, 1::2] = dy, dx
        top, bottom, first, last = margin + dy - above, margin + dy + above, margin + dx - left, margin + dx + left
        shifted = padded[:, :, top : bottom + case.H, first : last + case.W]
        expected = F.conv2d(shifted, inputs["weight"], inputs["bias"], **given)
        assert_matches(OP.function(**inputs), expected.cpu(), str((dy, dx)))


def test_whole_offsets_of_taps_change_the_dilation(device: str) -> None:
    """Check which channels of `offset` belong to a tap and which of them are vertical."""
    inputs = undeformed(Convolution(H=12, W=17, kernel=(3, 4), padding=(4, 9), dilation=(1, 2)), device)
    inputs["stride"] = (1, 1)
    expected = F.conv2d(inputs["input"], inputs["weight"], inputs["bias"], padding=(4, 9), dilation=(4, 7))
    offset = inputs["offset"].new_zeros(2, 3, 4, 2, *expected.shape[2:])
    for i, j in itertools.product(range(3), range(4)):
        offset[:, i, j, 0], offset[:, i, j, 1] = 3 * i, 5 * j
    # The dilated kernel is larger, so it has fewer outputs. The stride of 1 leaves the positions of the first outputs.
    inputs["offset"] = F.pad(offset.flatten(1, 3), (0, 15, 0, 6))
    output = OP.function(**inputs)
    assert_matches(output[:, :, : expected.shape[2], : expected.shape[3]], expected.cpu())


@pytest.mark.parametrize("masked", [False, True])
def test_ramps_are_sampled_exactly(masked: bool, device: str) -> None:
    """Check samples and gradients of the maps y + 10 x and -y, which bilinear interpolation reproduces."""
    H, W = 12, 15
    inputs = draw(Convolution(N=1, C=2, Co=1, H=H, W=W, G=2, padding=(0, 0), mask=masked, bias=False), device)
    y, x = torch.meshgrid(*(torch.arange(size, dtype=torch.float64, device=device) for size in (H, W)), indexing="ij")
    inputs["input"] = torch.stack([y + 10 * x, -y])[None]
    pixels = torch.stack([y, x])
    shape = 2, 9, 2, H - 2, W - 2  # offset groups, taps, (y, x), Ho, Wo
    origins = torch.stack([pixels[:, i : i + H - 2, j : j + W - 2] for i in range(3) for j in range(3)])
    positions = torch.rand(shape, dtype=torch.float64, device=device) * pixels[:, -1:, -1:]
    inputs["offset"] = (positions - origins).view(inputs["offset"].shape)
    results = OP.run(inputs, grad_output=torch.ones(1, 1, H - 2, W - 2, dtype=torch.float64, device=device))

    mask = inputs["mask"].view(2, 9, H - 2, W - 2) if masked else 1.0
    factors = inputs["weight"].view(2, 9, 1, 1) * mask
    samples = torch.stack([positions[0, :, 0] + 10 * positions[0, :, 1], -positions[1, :, 0]])
    assert_matches(results["output"], (factors * samples).sum((0, 1)).expand(1, 1, -1, -1))
    slopes = torch.tensor([[1.0, 10.0], [-1.0, 0.0]], dtype=torch.float64, device=device).view(2, 1, 2, 1, 1)
    expected = (slopes * factors.unsqueeze(2)).expand(shape)
    assert_matches(results["offset"].view(shape), expected, "offset", noise=100.0)
    if masked:
        assert_matches(results["mask"].view(samples.shape), inputs["weight"].view(2, 9, 1, 1) * samples, "mask")


def test_point_kernels_equal_grid_sample(device: str) -> None:
    """Compare with grid_sample at positions in and around the map. The channels are those of the input."""
    inputs = draw(Convolution(C=5, Co=5, H=9, W=14, kernel=(1, 1), padding=(0, 0), spread=4.0, bias=False), device)
    inputs |= {"weight": torch.eye(5, dtype=torch.float64, device=device).view(5, 5, 1, 1), "mask": None}

    def grid_sample(**inputs: Tensor) -> Tensor:
        image, (dy, dx) = inputs["input"], inputs["offset"].unbind(1)
        H, W = image.shape[2:]
        y = torch.arange(H, device=device).view(H, 1) + dy
        x = torch.arange(W, device=device) + dx
        grid = torch.stack([2 * x / (W - 1) - 1, 2 * y / (H - 1) - 1], -1)
        return F.grid_sample(image, grid, align_corners=True)

    needs_grad = ("input", "offset")
    expected = OP.run(inputs, grid_sample, needs_grad=needs_grad)
    for name, x in OP.run(inputs, needs_grad=needs_grad).items():
        assert_matches(x, expected[name].cpu(), name, noise=100.0)


@cases
def test_mask_of_ones_is_v1(case: Convolution, device: str) -> None:
    inputs = draw(replace(case, mask=False), device, torch.float32)
    shape = list(inputs["offset"].shape)
    shape[1] //= 2
    expected = OP.run(inputs)
    results = OP.run(inputs | {"mask": torch.ones(shape, device=device)})
    for name, x in expected.items():
        assert_matches(results[name], x.double().cpu(), name)


@cases
def test_mask_of_zeros_gives_the_bias(case: Convolution, device: str) -> None:
    inputs = draw(replace(case, mask=True), device)
    unmasked = OP.run(inputs | {"mask": torch.ones_like(inputs["mask"])})
    results = OP.run(inputs | {"mask": torch.zeros_like(inputs["mask"])})
    bias = torch.zeros(case.Co) if inputs["bias"] is None else inputs["bias"].cpu()
    assert torch.equal(results["output"].cpu(), bias.view(-1, 1, 1).expand(results["output"].shape).to(torch.float64))
    assert not any(results[name].any() for name in ("input", "offset", "weight"))
    assert_matches(results["mask"], unmasked["mask"].cpu(), "mask")


# ---- Groups ----


@pytest.mark.parametrize(("C", "Co", "groups", "G"), [(12, 8, 4, 3), (12, 8, 2, 12), (64, 64, 32, 1), (30, 5, 5, 6)])
def test_groups_are_separate_convolutions(C: int, Co: int, groups: int, G: int, device: str) -> None:
    """Compare with one call per input channel, each with its channel of the weight and its offset group."""
    case = Convolution(N=1, C=C, Co=Co, groups=groups, G=G, bias=False)
    inputs = draw(case, device)
    whole = OP.run(inputs)
    grad_output = grad_like(whole["output"])
    sums = {name: torch.zeros_like(whole[name]) for name in ("output", "offset", "mask")}
    for c in range(C):
        group, offset_group = c // (C // groups), c // (C // G)
        outputs = slice(group * (Co // groups), (group + 1) * (Co // groups))
        offsets, masks = (slice(offset_group * n, (offset_group + 1) * n) for n in (18, 9))
        index = c % (C // groups)
        one = inputs | {
            "input": inputs["input"][:, c : c + 1],
            "weight": inputs["weight"][outputs, index : index + 1],
            "offset": inputs["offset"][:, offsets],
            "mask": inputs["mask"][:, masks],
        }
        alone = OP.run(one, grad_output=grad_output[:, outputs])
        assert_matches(whole["input"][:, c : c + 1], alone["input"].cpu(), f"input {c}", noise=10.0)
        assert_matches(whole["weight"][outputs, index : index + 1], alone["weight"].cpu(), f"weight {c}", noise=10.0)
        for name, channels in (("output", outputs), ("offset", offsets), ("mask", masks)):
            sums[name][:, channels] += alone[name]
    for name, expected in sums.items():
        assert_matches(whole[name], expected.cpu(), name, noise=10.0)


def test_offset_groups_move_their_channels(device: str) -> None:
    """Check that offset group g moves the channels of range g of C / G channels, and no other channel."""
    G, C = 3, 12
    inputs = draw(Convolution(N=1, C=C, Co=C, groups=C, G=G), device)  # output c depends on channel c only
    output = OP.function(**inputs)
    for g in range(G):
        for name, count in (("offset", 18), ("mask", 9)):
            changed = inputs[name].clone()
            changed[:, g * count : (g + 1) * count] *= 0.5
            difference = (OP.function(**inputs | {name: changed}) - output).abs().amax((0, 2, 3))
            assert (difference != 0).tolist() == [c // (C // G) == g for c in range(C)]


# ---- Published examples ----

# The examples of the tests of mmcv (tests/test_ops/test_deform_conv.py and test_modulated_deform_conv.py). A
# convolution computes the offsets, so the gradients of its parameters are those of the offsets.
EXAMPLE = [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [3.0, 5.0, 2.0]]
EXAMPLE_OFFSET_WEIGHT = [
    *([0.1, 0.4, 0.6, 0.1], [0.3, 0.2, 0.1, 0.3], [0.5, 0.5, 0.2, 0.8], [0.8, 0.3, 0.9, 0.1]),
    *([0.3, 0.1, 0.2, 0.5], [0.3, 0.7, 0.5, 0.3], [0.6, 0.2, 0.5, 0.3], [0.4, 0.1, 0.8, 0.4]),
]
EXAMPLE_OFFSET_WEIGHT_GRAD = [
    *([1.44, 2.88, 0.0, 1.44], [-0.72, -1.44, 0.0, -0.72], [0.0] * 4, [0.0] * 4),
    *([-0.1, -0.2, 0.0, -0.1], [-0.08, -0.16, 0.0, -0.08], [-0.54, -1.08, 0.0, -0.54], [-0.54, -1.08, 0.0, -0.54]),
]
MODULATED_WEIGHT_GRAD = [
    *([-7.0, -4.0, 0.0, 0.0], [-9.0, 7.5, -6.0, 5.0], [-4.0, -7.0, 0.0, 0.0], [-7.5, -9.0, -5.0, -6.0]),
    *([-7.0, -4.0, -7.0, -4.0], [-6.0, 5.0, -9.0, 7.5], [-4.0, -7.0, -4.0, -7.0], [-5.0, -6.0, -7.5, -9.0]),
    *([10.5, 6.0, 7.0, 4.0], [6.0, 10.5, 4.0, 7.0], [7.0, 4.0, 10.5, 6.0], [4.0, 7.0, 6.0, 10.5]),
]


@pytest.mark.parametrize("N", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_example_of_mmcv(N: int, dtype: torch.dtype, device: str) -> None:
    def leaf(numbers: list, *shape: int) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device).view(shape).requires_grad_()

    image = leaf([EXAMPLE] * N, N, 1, 3, 3)
    offset_weight, offset_bias = (
        leaf(EXAMPLE_OFFSET_WEIGHT, 8, 1, 2, 2),
        leaf([0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7], 8),
    )
    weight = leaf([0.4, 0.2, 0.1, 0.9], 1, 1, 2, 2)
    output = relops.deform_conv2d(image, F.conv2d(image, offset_weight, offset_bias), weight)
    output.sum().backward()

    def check(actual: Tensor, expected: list) -> None:
        assert actual is not None
        expected = torch.tensor(expected, dtype=torch.float64).flatten()
        torch.testing.assert_close(actual.detach().double().cpu().flatten(), expected, rtol=1e-3, atol=1e-5)

    for n in range(N):
        check(output[n], [1.65, 0.0, 0.0, 0.0])
        check(image.grad[n], [-0.666, 0.204, 0.0, 0.03, -0.416, 0.012, 0.0, 0.252, 0.129])
    check(offset_weight.grad / N, EXAMPLE_OFFSET_WEIGHT_GRAD)
    check(offset_bias.grad / N, [1.44, -0.72, 0.0, 0.0, -0.1, -0.08, -0.54, -0.54])
    check(weight.grad / N, [3.62, 0.0, 0.4, 0.18])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulated_example_of_mmcv(dtype: torch.dtype, device: str) -> None:
    """Check derivatives at whole positions. The offsets are zero, and all masks are the sigmoid of 0.

    All numbers of this example are exact in all dtypes.
    """
    image = torch.tensor([[1.0, 2.0, 3.0]] * 3, dtype=dtype, device=device).view(1, 1, 3, 3).requires_grad_()
    parameters = torch.zeros(12, 1, 2, 2, dtype=dtype, device=device), torch.zeros(12, dtype=dtype, device=device)
    offset_weight, offset_bias = (x.requires_grad_() for x in parameters)
    weight = torch.ones(1, 1, 2, 2, dtype=dtype, device=device).requires_grad_()
    offset, logit = F.conv2d(image, offset_weight, offset_bias, padding=1).split([8, 4], 1)
    output = relops.deform_conv2d(image, offset, weight, padding=1, mask=logit.sigmoid())
    output.sum().backward()

    rows = [[0.5, 1.5, 2.5, 1.5], [1.0, 3.0, 5.0, 3.0]]
    assert output[0, 0].tolist() == [rows[0], rows[1], rows[1], rows[0]]
    assert image.grad.flatten().tolist() == [2.0] * 9
    assert weight.grad.flatten().tolist() == [9.0] * 4
    assert offset_weight.grad.flatten(1).tolist() == MODULATED_WEIGHT_GRAD
    assert offset_bias.grad.tolist() == [-3.0, -1.5] * 4 + [4.5] * 4


# ---- torchvision ----


def by_torchvision(**inputs: Tensor) -> Tensor:
    return pytest.importorskip("torchvision").ops.deform_conv2d(**inputs)


# Derivatives with respect to x of float32 samples are imprecise in torchvision, because it sums many products.
TORCHVISION_TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-4)]


def check_torchvision(inputs: Inputs, tolerance: float) -> None:
    expected = OP.run(inputs, by_torchvision)
    for name, x in OP.run(inputs).items():
        atol = tolerance * max(expected[name].abs().max().item() if x.numel() else 0.0, 1.0)
        torch.testing.assert_close(x, expected[name], rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), TORCHVISION_TOLERANCES)
def test_equals_torchvision(case: Convolution, dtype: torch.dtype, tolerance: float, device: str) -> None:
    check_torchvision(draw(case, device, dtype), tolerance)


def permuted(x: Tensor, *order: int) -> Tensor:
    """Return a copy of x whose memory has the dimensions in the given order."""
    inverse = [order.index(i) for i in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("N", [0, 1, 33])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("is_permuted", [False, True])
def test_configuration_of_torchvision(N: int, mask: bool, is_permuted: bool, device: str) -> None:
    """Compare in the configuration of torchvision's own tests, and check its gradients with gradcheck."""
    case = Convolution(N=N, C=6, Co=2, groups=2, G=3, H=5, W=4, kernel=(3, 2), mask=mask)
    inputs = draw(replace(case, stride=(2, 1), padding=(1, 0), dilation=(2, 1)), device)
    if is_permuted:
        orders = {"input": (0, 1, 3, 2), "offset": (1, 3, 0, 2), "weight": (3, 2, 0, 1), "mask": (1, 3, 0, 2)}
        inputs |= {name: permuted(inputs[name], *order) for name, order in orders.items() if inputs[name] is not None}
    check_torchvision(inputs, 1e-10)
    names = OP.needs_grad(inputs)
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *x: OP.function(**inputs | dict(zip(names, x))), leaves, fast_mode=True)


def test_tall_maps_that_are_not_contiguous(device: str) -> None:
    """Compare a configuration in which torchvision's CUDA kernel was once wrong: issue 2598 of pytorch/vision."""
    inputs = draw(Convolution(N=3, C=9, Co=9, H=100, W=11, bias=False), device, torch.float32)
    inputs["input"] = permuted(inputs["input"], 0, 1, 3, 2)
    inputs |= {name: permuted(inputs[name], 1, 3, 0, 2) for name in ("offset", "mask")}
    inputs["weight"] = permuted(inputs["weight"], 3, 2, 0, 1)
    check_torchvision(inputs, 1e-4)


def test_sizes_that_torchvision_rejects(device: str) -> None:
    inputs = draw(Convolution(N=2, C=6, Co=2, groups=2, G=3, H=5, W=4, kernel=(3, 2)), device)
    for name in ("offset", "mask"):
        changed = inputs | {name: inputs[name][:, :2]}
        with pytest.raises(ValueError, match=rf"{name} must be .*, got shape \[2, 2, "):
            OP.function(**changed)
        with pytest.raises(RuntimeError):
            by_torchvision(**changed)


@pytest.mark.parametrize("mask", [False, True])
def test_derivatives_at_whole_positions(mask: bool, device: str) -> None:
    """Compare derivatives with torchvision, as at the start of a training, when all offsets are zero.

    Derivatives at whole positions are those from the right. At position -1, relops returns 0, as mmcv and the released
    code of Deformable ConvNets do, but torchvision does not.
    """
    inputs = draw(Convolution(padding=(1, 1), spread=1.0, mask=mask), device)
    for offset in (torch.zeros_like(inputs["offset"]), (inputs["offset"] - 0.5).round()):
        given = inputs | {"offset": offset}
        results, expected = OP.run(given), OP.run(given, by_torchvision)
        axes = zip((3, 3), (7, 9), offset.unflatten(1, (9, 2)).unbind(2))
        starts = []
        for axis, (taps, outputs, x) in enumerate(axes):
            origin = torch.arange(outputs, device=device) - 1 + torch.arange(taps, device=device)[:, None]
            origin = origin.view(3, 1, 7, 1) if axis == 0 else origin.view(1, 3, 1, 9)
            starts.append(x == -1 - origin.expand(3, 3, 7, 9).reshape(9, 7, 9))
        at_start = torch.stack(starts, 2).flatten(1, 2)  # whether a position is -1, in the layout of offset
        assert at_start.any() and not results["offset"][at_start].any()
        assert expected["offset"][at_start].any()
        expected["offset"].masked_fill_(at_start, 0)
        for name, x in results.items():
            assert_matches(x, expected[name].cpu(), name)


def test_options_may_be_ints_or_lists(device: str) -> None:
    inputs = draw(Convolution(H=11, stride=(2, 2), padding=(3, 3), dilation=(2, 2)), device)
    expected = OP.function(**inputs)
    for pair in (lambda x: x, lambda x: [x, x], lambda x: torch.Size([x, x])):
        given = inputs | {"stride": pair(2), "padding": pair(3), "dilation": pair(2)}
        assert torch.equal(OP.function(**given), expected)


# ---- Positions and values that are not finite ----

BAD_POSITIONS = [math.nan, math.inf, -math.inf, 1e9, -1e9, 3e38, -3e38]


@pytest.mark.parametrize("bad", BAD_POSITIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_offsets_that_are_not_finite_or_huge(bad: float, masked: bool, dtype: torch.dtype, device: str) -> None:
    """Check that such samples are zero and have no gradient, and that other samples do not change."""
    case = Convolution(C=10, Co=8, G=2, H=9, W=19, mask=masked)
    inputs = draw(case, device, dtype)
    generator = torch.Generator().manual_seed(1)
    hit = torch.rand(inputs["offset"].shape, generator=generator).to(device) < 0.2
    sampled = ~(hit[:, 0::2] | hit[:, 1::2])
    mask = torch.ones(sampled.shape, dtype=inputs["offset"].dtype, device=device) if not masked else inputs["mask"]
    expected = OP.run(inputs | {"mask": mask * sampled})
    results = OP.run(inputs | {"offset": inputs["offset"].masked_fill(hit, bad)})
    for name in ("output", "input", "weight", "bias", "offset"):
        assert_matches(results[name], expected[name].double().cpu(), name)
    assert not results["offset"][~sampled.repeat_interleave(2, 1)].any()
    if masked:
        assert not results["mask"][~sampled].any()
        assert_matches(results["mask"], (expected["mask"] * sampled).double().cpu(), "mask")


@pytest.mark.parametrize("bad", BAD_POSITIONS)
def test_all_offsets_are_not_finite_or_huge(bad: float, device: str) -> None:
    inputs = draw(Convolution(C=10, H=9, W=19), device, torch.float32)
    results = OP.run(inputs | {"offset": torch.full_like(inputs["offset"], bad)})
    assert torch.equal(results["output"], inputs["bias"].view(-1, 1, 1).expand_as(results["output"]))
    assert not any(results[name].any() for name in ("input", "offset", "weight", "mask"))


def outputs_that_read(inputs: Inputs, pixel: tuple[int, ...]) -> Tensor:
    image = torch.zeros_like(inputs["input"])
    image[pixel] = 1
    ones = {"input": image, "weight": torch.ones_like(inputs["weight"]), "mask": None, "bias": None}
    return OP.function(**inputs | ones) > 0


def pixels_read_by(inputs: Inputs, output: tuple[int, ...]) -> Tensor:
    ones = inputs | {"weight": torch.ones_like(inputs["weight"]), "mask": None}
    grad = torch.zeros_like(OP.function(**inputs))
    grad[output] = 1
    return OP.run(ones, grad_output=grad, needs_grad=("input",))["input"] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_that_are_not_finite_affect_only_their_samples(bad: float, channels_last: bool, device: str) -> None:
    case = Convolution(C=12, Co=20, groups=2, G=3, H=13, W=21, channels_last=channels_last)
    inputs = draw(case, device, torch.float32)
    clean = OP.run(inputs)
    pixel = (1, 7, 6, 9)
    affected = outputs_that_read(inputs, pixel)
    assert affected.any()
    broken = inputs["input"].clone()
    broken[pixel] = bad
    output = OP.function(**inputs | {"input": broken})
    assert torch.equal(output[~affected], clean["output"][~affected])
    assert not output[affected].isfinite().any()


def test_pixels_that_are_not_finite_in_bfloat16(device: str) -> None:
    """Check values at which the two halves of a sample could differ, into which kernels with AMX divide it."""
    inputs = draw(Convolution(N=1, C=32, Co=16, H=12, W=16), device, torch.bfloat16)
    for i, value in enumerate([math.nan, math.inf, -math.inf, 3e38]):
        inputs["input"][0, 7 * i, 5, 4 * i] = value
    expected = OP.function(**{name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()})
    assert expected.isfinite().any() and expected.isnan().any() and expected.isinf().any()
    torch.testing.assert_close(OP.function(**inputs), expected.bfloat16(), equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masks_and_gradients_that_are_not_finite_affect_only_their_samples(bad: float, device: str) -> None:
    inputs = draw(Convolution(C=12, Co=20, groups=2, G=3, H=13, W=21), device, torch.float32)
    clean = OP.run(inputs)
    broken = inputs["mask"].clone()
    broken[1, 9 + 4, 3, 5] = bad  # the center tap of the channels 4 to 7, which belong to both groups
    output = OP.function(**inputs | {"mask": broken})
    affected = torch.zeros_like(output, dtype=torch.bool)
    affected[1, :, 3, 5] = True
    assert torch.equal(output[~affected], clean["output"][~affected])
    assert not output[affected].isfinite().any()

    grad = grad_like(clean["output"])
    grad[1, 13, 3, 5] = bad  # an output of the second group, which reads the channels 6 to 11
    results = OP.run(inputs, grad_output=grad)
    for name, groups, channels in (("offset", slice(1, 3), 18), ("mask", slice(1, 3), 9)):
        affected = torch.zeros_like(inputs[name], dtype=torch.bool)
        affected[1, groups.start * channels : groups.stop * channels, 3, 5] = True
        assert torch.equal(results[name][~affected], clean[name][~affected]), name
    affected = pixels_read_by(inputs, (1, 13, 3, 5))
    assert affected.any() and torch.equal(results["input"][~affected], clean["input"][~affected])
    assert not results["input"][affected].isfinite().any()
    affected = torch.zeros_like(inputs["weight"], dtype=torch.bool)
    affected[13] = True
    assert torch.equal(results["weight"][~affected], clean["weight"][~affected])


# ---- Dtypes ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_float32_offsets_of_16_bit_maps(dtype: torch.dtype, backward: bool, device: str) -> None:
    """Check positions of more than 1000 pixels, which 16-bit numbers cannot represent."""
    inputs = draw(Convolution(N=1, C=5, Co=3, H=3, W=1500), device, dtype)
    inputs["offset"][:, 1::2] -= 700  # most positions stay on the map, because the first 700 outputs are not used
    inputs["offset"][..., :750] += 1400
    assert inputs["offset"].dtype == torch.float32 and inputs["offset"].abs().max() > 600
    if backward:
        assert_matches_twin(OP, inputs)
    else:
        assert_matches(OP.function(**inputs), OP.reference(**OP.cast(inputs, torch.float64, torch.float64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activation_decides_under_autocast(dtype: torch.dtype, device: str) -> None:
    """Check that float32 parameters do not widen the computation, and that they get float32 gradients."""
    narrow = draw(Convolution(), device, dtype)
    wide = OP.cast(narrow, torch.float32, torch.float32)

    def autocast(**inputs: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return OP.function(**inputs)

    expected = OP.run(narrow)
    actual = OP.run(wide | {"input": narrow["input"]}, autocast)
    assert actual["output"].dtype == dtype and actual["input"].dtype == dtype
    for name in ("weight", "bias", "offset", "mask"):
        assert actual[name].dtype == torch.float32, name
        assert_matches(actual[name], expected[name].double(), name, dtype)
    # A float32 activation, which a 16-bit layer did not compute, stays float32.
    actual = OP.run(narrow | {"input": wide["input"]}, autocast)
    assert actual["output"].dtype == torch.float32
    assert_matches(actual["output"], OP.run(wide)["output"].double())


def test_parameters_of_another_dtype_without_autocast(device: str) -> None:
    inputs = draw(Convolution(), device, torch.bfloat16)
    for name in ("weight", "bias"):
        with pytest.raises(TypeError, match=f"{name} must be torch.bfloat16, the dtype of input, got torch.float32"):
            OP.function(**inputs | {name: inputs[name].float()})


# ---- Layouts, threads, memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Convolution(C=20, Co=12, H=9, W=18), Convolution(C=12, groups=2, G=3, stride=(2, 1))])
def test_channels_last_is_preserved(case: Convolution, dtype: torch.dtype, device: str) -> None:
    planar = OP.run(draw(case, device, dtype))
    inputs = draw(replace(case, channels_last=True), device, dtype)
    results = OP.run(inputs)
    for name, x in results.items():
        if name in ("output", "input", "offset", "mask"):
            assert x.is_contiguous(memory_format=torch.channels_last), name
        assert_matches(x, planar[name].double().cpu(), name)
    mixed = OP.run(inputs | {"input": inputs["input"].contiguous()})
    assert mixed["output"].is_contiguous() and mixed["input"].is_contiguous()
    assert mixed["offset"].is_contiguous(memory_format=torch.channels_last)
    assert_matches(mixed["output"], planar["output"].double().cpu())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("G", [1, 2])
def test_offset_and_mask_are_slices_of_one_tensor(channels_last: bool, G: int, device: str) -> None:
    """Check the output of a single convolution, from which layers take the offsets and the logits of the masks."""
    inputs = draw(Convolution(G=G, channels_last=channels_last), device)
    joined = torch.cat([inputs["offset"], inputs["mask"]], 1)
    if channels_last:
        joined = joined.contiguous(memory_format=torch.channels_last)
    offset, mask = joined.split([18 * G, 9 * G], 1)
    expected = OP.run(inputs)
    for name, x in OP.run(inputs | {"offset": offset, "mask": mask}).items():
        assert_matches(x, expected[name].cpu(), name)


def test_transposed_rows(device: str) -> None:
    """Check maps of one column. torch regards them as contiguous whatever the stride between their columns is."""

    def transposed_row(x: Tensor) -> Tensor:
        return x.as_strided(x.shape, (x.stride(0), x.stride(1), 1, x.size(2)))

    inputs = draw(Convolution(C=20, Co=12, H=9, W=1), device)
    grad_output = grad_like(OP.function(**inputs))
    expected = raw_backward(inputs, grad_output=grad_output)
    inputs |= {name: transposed_row(inputs[name]) for name in ("input", "offset", "mask")}
    for grad, other in zip(raw_backward(inputs, grad_output=transposed_row(grad_output)), expected, strict=True):
        assert torch.equal(grad, other)


def test_maps_of_a_crop(device: str) -> None:
    """Check that samples end at the border of a crop, which is read from the larger map without a copy."""
    for channels_last in (False, True):
        inputs = draw(Convolution(spread=3.0, channels_last=channels_last), device)
        large = {name: F.pad(inputs[name], (2, 3, 1, 2), value=math.nan) for name in ("input", "offset", "mask")}
        if channels_last:
            large = {name: x.contiguous(memory_format=torch.channels_last) for name, x in large.items()}
        crop = {name: x[:, :, 1:-2, 2:-3] for name, x in large.items()}
        expected = OP.run(inputs)
        for name, x in OP.run(inputs | crop).items():
            assert_matches(x, expected[name].cpu(), name)


# In the first three samples, offsets are so large that the pixels that neighboring outputs read are far apart.
LARGE = {
    "scattered": Convolution(N=1, C=24, Co=10, H=80, W=90, spread=40.0),
    "scattered groups": Convolution(N=1, C=40, Co=8, groups=2, G=4, H=70, W=66, spread=40.0, channels_last=True),
    "scattered large kernel": Convolution(N=1, C=3, Co=2, H=90, W=70, kernel=(7, 7), padding=(3, 3), spread=50.0),
    "many channels": Convolution(N=2, C=144, Co=75, H=14, W=23),
    "many taps": Convolution(N=1, C=2, Co=3, H=21, W=25, kernel=(18, 17), padding=(9, 8), mask=False),
    "few pixels": Convolution(N=5, C=130, Co=70, H=3, W=2, groups=2),
    "wide": Convolution(N=1, C=8, Co=8, H=2, W=700, channels_last=True),
    "far apart": Convolution(N=1, C=8, Co=8, H=300, W=200, stride=(40, 30), dilation=(20, 50), mask=False),
    "depthwise": Convolution(N=2, C=70, Co=70, groups=70, H=20, W=31),
    "many parts": Convolution(N=1, C=300, Co=300, groups=300, H=5, W=6),
    "one output channel": Convolution(N=1, C=3, Co=1, H=200, W=190),
    # The sizes of the following samples allow matrix instructions in bfloat16.
    "whole tiles": Convolution(N=2, C=128, Co=96, groups=2, G=2, H=13, W=22),
    "whole tiles and many channels": Convolution(N=1, C=192, Co=16, G=3, H=11, W=9, channels_last=True, bias=False),
    "whole tiles, scattered": Convolution(N=1, C=64, Co=32, groups=2, H=80, W=90, spread=40.0),
    "whole tiles and many taps": Convolution(N=1, C=64, Co=32, H=9, W=21, kernel=(5, 11), padding=(2, 5)),
}


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_large_maps(case: Convolution, dtype: torch.dtype, device: str) -> None:
    """Check maps that the kernels divide into several tiles, ranges of channels, and ranges of taps."""
    assert_matches_twin(OP, draw(case, device, dtype))


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_results_do_not_depend_on_the_number_of_threads(case: Convolution, threads: None) -> None:
    inputs = draw(case, dtype=torch.float32)
    runs = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        runs.append(OP.run(inputs))
    for name, x in runs[0].items():
        assert all(torch.equal(x, run[name]) for run in runs[1:]), name


@pytest.mark.parametrize("backward", [False, True])
def test_memory(backward: bool) -> None:
    """Check that the samples of this map, which would take 76 MB, are not stored."""
    begin = f"""
torch.set_num_threads(1)
input, offset, mask = torch.randn(1, 64, 192, 172), torch.randn(1, 18, 192, 172), torch.rand(1, 9, 192, 172)
leaves = [t.requires_grad_({backward}) for t in (input, offset, mask, torch.randn(64, 64, 3, 3))]
def step(rows):
    cut = [t[:, :, :rows] for t in leaves[:3]]
    output = relops.deform_conv2d(cut[0], cut[1], leaves[3], padding=1, mask=cut[2])
    if {backward}:
        output.sum().backward()
"""
    maps = 192 * 172 * 4 // 1024  # the size of one channel in KB
    # The backward pass needs the gradients of the slices, and the full-size gradients to which autograd adds them.
    limit = 64 * maps + (2 * (64 + 18 + 9) * maps if backward else 0) + 8 * 1024
    assert resident_growth(begin, "step(4)", "step(192)") < limit


# ---- Kernels ----


def test_fake_kernel_of_the_backward() -> None:
    """Check the fake kernel for every combination of needed gradients, with 16-bit maps and float32 offsets."""
    for channels_last, mask in itertools.product([False, True], repeat=2):
        inputs = draw(Convolution(channels_last=channels_last, mask=mask), dtype=torch.bfloat16)
        tensors = (inputs[name] for name in ("input", "offset", "weight"))
        arguments = (
            grad_like(OP.function(**inputs)),
            *tensors,
            *options(inputs).values(),
            inputs["mask"],
            False,
            False,
        )
        backward = torch.ops.relops._deform_conv2d_backward.default
        for needs_grad in itertools.product([False, True], repeat=5):
            torch.library.opcheck(backward, (*arguments, list(needs_grad)), test_utils="test_faketensor")


def raw_backward(inputs: Inputs, **changed: object) -> tuple[Tensor, ...]:
    given = {"grad_output": grad_like(OP.function(**inputs))}
    given |= {name: x for name, x in inputs.items() if name != "bias"}
    given |= {"allow_tf32": False, "deterministic": False, "needs_grad": [True] * 5} | changed
    return torch.ops.relops._deform_conv2d_backward(**given)


def test_raw_backward_checks_its_arguments(device: str) -> None:
    inputs = draw(Convolution(), device)
    grad = grad_like(OP.function(**inputs))
    for changed in (
        {"grad_output": grad[:, 1:]},
        {"grad_output": grad[..., 1:]},
        {"grad_output": grad.float()},
        {"needs_grad": [True] * 4},
        {"offset": inputs["offset"][:, :, 1:]},
        {"offset": inputs["offset"].float()},
        {"mask": inputs["mask"][:1]},
        {"stride": [2, 1]},
        {"padding": [2**24 + 1, 1]},
    ):
        with pytest.raises(RuntimeError, match=r"relops\.deform_conv2d: "):
            raw_backward(inputs, **changed)
    assert len(raw_backward(inputs)) == 5


def test_raw_op_checks_dtypes(device: str) -> None:
    inputs = OP.raw(draw(Convolution(), device, torch.bfloat16))
    for name in ("offset", "mask"):  # the public function converts them to float32
        with pytest.raises(RuntimeError, match=f"{name} has the wrong dtype or device"):
            OP.overload(*(inputs | {name: inputs[name].bfloat16()}).values())
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=f"{name} has the wrong dtype or device"):
            OP.overload(*(inputs | {name: inputs[name].float()}).values())


def test_extreme_options(device: str) -> None:
    """Check the largest strides, paddings and dilations. All taps but one are then outside of the map."""
    inputs = draw(Convolution(N=1, H=5, W=6), device)
    size = 2**24
    first = inputs | {name: inputs[name][..., :1, :1] for name in ("offset", "mask")}
    expected = OP.run(first | {"padding": (1, 1), "stride": (5, 6)})
    for name, x in OP.run(first | {"padding": (1, 1), "stride": (size, size)}).items():
        assert_matches(x, expected[name].cpu(), name)
    # The center tap is the only one on the map.
    inputs["offset"] = inputs["offset"] % 1
    center = {"weight": inputs["weight"][..., 1:2, 1:2], "offset": inputs["offset"][:, 8:10], "padding": (0, 0)}
    expected = OP.run(inputs | center | {"mask": inputs["mask"][:, 4:5]})
    results = OP.run(inputs | {"padding": (size, size), "dilation": (size, size)})
    assert_matches(results["output"], expected["output"].cpu())
    assert_matches(results["input"], expected["input"].cpu(), "input")
    assert_matches(results["offset"][:, 8:10], expected["offset"].cpu(), "offset")
    assert not results["offset"][:, :8].any() and not results["mask"][:, 5:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_taps_that_are_far_apart(dtype: torch.dtype, device: str) -> None:
    """Check a distance between taps that is an odd number above 2^24, which float32 does not represent."""
    size = 2**24
    ramp = torch.arange(8, dtype=dtype, device=device).view(1, 1, 8, 1)
    weight = torch.tensor([0, 0, 0, 1], dtype=dtype, device=device).view(1, 1, 4, 1)
    for pixel in (2, 5):  # the last tap of the first output is at this pixel
        dilation = (size + pixel) // 3
        assert 3 * dilation == size + pixel
        offset = ramp.new_zeros(1, 8, 2, 1)
        output = relops.deform_conv2d(ramp, offset, weight, None, (size, 1), (size, 0), (dilation, 1))
        assert output.flatten().tolist() == [pixel, 0]


# ---- Random search ----


@st.composite
def random_cases(draw: st.DrawFn) -> tuple[Convolution, str, int]:
    def integers(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def pair(*choices: int) -> tuple[int, int]:
        return draw(st.tuples(st.sampled_from(choices), st.sampled_from(choices)))

    groups, G = (draw(st.sampled_from([1, 1, 2, 3, 4])) for _ in range(2))
    case = Convolution(
        N=integers(1, 3),
        C=math.lcm(groups, G) * integers(1, 5),
        Co=groups * integers(1, 12),
        groups=groups,
        G=G,
        H=integers(1, 20),
        W=integers(1, 40),
        kernel=pair(1, 2, 3, 3, 4, 6),
        stride=pair(1, 1, 2, 3, 9),
        padding=pair(0, 1, 2, 5),
        dilation=pair(1, 1, 2, 5),
        spread=draw(st.sampled_from([0.0, 1.0, 3.0, 30.0])),
        bias=draw(st.booleans()),
        mask=draw(st.booleans()),
        channels_last=draw(st.booleans()),
    )
    sizes = zip((case.H, case.W), case.kernel, case.padding, case.dilation)
    padding = (max(p, (d * (k - 1) + 2 - size) // 2) for size, k, p, d in sizes)  # the kernel fits into the map
    case = replace(case, padding=tuple(padding))
    return case, draw(st.sampled_from(["fractions", "fractions", "whole", "mixed"])), integers(0, 2**31)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(random_cases())
def test_random_search(search: tuple[Convolution, str, int]) -> None:
    case, offsets, seed = search
    generator = torch.Generator().manual_seed(seed)
    inputs = case.deform_conv2d(generator)
    if offsets != "fractions":
        inputs["offset"] = inputs["offset"].round()
    if offsets == "mixed":
        special = torch.tensor([0.0, 0.25, -1.0, 0.999999, 1e9, math.inf, -math.inf, math.nan], dtype=torch.float64)
        choice = torch.randint(32, inputs["offset"].shape, generator=generator)
        inputs["offset"] = torch.where(choice < 8, special[choice % 8], inputs["offset"])
    actual = OP.run(inputs)
    for name, expected in OP.run_twin(inputs).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-11, atol=1e-11, msg=lambda text: f"{name}: {text}")  # noqa: B023


# ---- CUDA ----


@needs_cuda
@pytest.mark.parametrize("case", [*CONVOLUTIONS.values(), *LARGE.values()], ids=[*CONVOLUTIONS, *LARGE])
def test_cuda_deterministic_backward_is_reproducible(case: Convolution) -> None:
    inputs = draw(case, "cuda", torch.float32)
    with determinism(True):
        runs = [OP.run(inputs) for _ in range(5)]
    for name, x in runs[0].items():
        assert all(torch.equal(x, run[name]) for run in runs[1:]), name


@needs_cuda
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_memory(deterministic: bool) -> None:
    """Check that a call allocates no matrix of samples, which would be nine times as large as the input."""
    inputs = draw(Convolution(N=1, C=128, Co=128, H=128, W=160), "cuda", torch.float32)
    with determinism(deterministic):
        OP.run(inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        OP.run(inputs)
    size = sum(x.numel() * 4 for x in inputs.values() if isinstance(x, Tensor))
    assert torch.cuda.max_memory_allocated() - before <= 4 * size


@needs_cuda
def test_cuda_tf32() -> None:
    """Check that products in TF32 have errors of about 2^-11, and that they are used only if they are allowed."""
    inputs = draw(Convolution(C=64, Co=64, H=30, W=41), "cuda", torch.float32)
    exact = OP.run_twin(inputs)["output"]
    errors = {}
    for allowed in (False, True):
        output = OP.overload(*(OP.raw(inputs) | {"allow_tf32": allowed}).values())
        errors[allowed] = (output.double().cpu() - exact.cpu()).abs().max().item()
    assert errors[False] < 1e-5 and errors[True] < 5e-3


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_device_that_is_not_current() -> None:
    inputs = draw(Convolution(), "cuda:1")
    with torch.cuda.device(0):
        assert_matches_twin(OP, inputs)
