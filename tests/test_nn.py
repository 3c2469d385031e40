"""Tests of the modules in relops.nn."""

from __future__ import annotations

import copy
import io
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OPS, Op
from conftest import TRACING_MODES, assert_matches
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import relops
from relops import reference

LEVELS = [(9, 13), (5, 7), (3, 4), (2, 2)]
S = sum(h * w for h, w in LEVELS)
REGION_OPS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "prroi_pool")

# ---- All modules ----


def detections_to_rank(B: int = 2, K: int = 9, C: int = 3) -> tuple[Tensor, ...]:
    corner, size = torch.rand(2, B, K, 2) * 50
    return torch.randn(B, K, 16), torch.rand(B, K, C).square(), torch.cat([corner, corner + size], -1)


# Each function returns an instance of a module and arguments for its forward method.
MODULES: dict[str, Callable[[], tuple[torch.nn.Module, tuple[Any, ...]]]] = {
    "DeformConv2d": lambda: (
        relops.nn.DeformConv2d(4, 6, (3, 2), stride=(2, 1), padding=1, groups=2),
        (torch.randn(2, 4, 7, 8), torch.randn(2, 24, 4, 9), torch.rand(2, 12, 4, 9)),
    ),
    "ModulatedDeformConv2d": lambda: (modulated_layer(4, 6, 3, padding=1), (torch.randn(2, 4, 7, 8),)),
    "DuplicateRemoval": lambda: (
        relops.nn.DuplicateRemoval(16, first_n=5, rank_dim=8, hidden_dim=12, heads=3, head_dim=4, score_threshold=0.1),
        detections_to_rank(),
    ),
    "DynamicConv": lambda: (relops.nn.DynamicConv(8, 6, 3), (torch.randn(5, 8), torch.randn(5, 8, 3, 3))),
    "LocalRelation": lambda: (relops.nn.LocalRelation(11, 3, stride=2), (torch.randn(2, 11, 7, 8),)),
    "MSDeformAttn": lambda: (
        relops.nn.MSDeformAttn(24, 4, 3, 2),
        (torch.randn(2, 5, 24), torch.rand(2, 5, 4, 2), torch.randn(2, S, 24), LEVELS),
    ),
    "MSDeformAttn of tensors": lambda: (
        relops.nn.MSDeformAttn(24, 4, 3, 2),
        (
            *(torch.randn(2, 5, 24), torch.rand(2, 5, 4, 4), torch.randn(2, S, 24), torch.tensor(LEVELS)),
            *(torch.tensor([0, 117, 152, 164]), torch.rand(2, S) < 0.3),
        ),
    ),
    "MultiScaleDeformableAttention": lambda: (
        relops.nn.MultiScaleDeformableAttention(),
        (
            *(torch.randn(2, S, 3, 8), torch.tensor(LEVELS), LEVELS, torch.tensor([0, 117, 152, 164])),
            *(torch.rand(2, 5, 3, 4, 2, 2), torch.rand(2, 5, 3, 4, 2), 64),
        ),
    ),
    "MultiScaleRoIAlign": lambda: (multi_scale_module(), (maps(), LARGE_BOXES, IMAGES)),
    "ObjectRelation": lambda: (
        relops.nn.ObjectRelation(16, 4, 6),
        (detections_to_rank()[0], detections_to_rank()[2]),
    ),
} | {name: lambda name=name: (REGION_MODULES[name], region_arguments(name)[1:]) for name in REGION_OPS}


# One tracing mode per module is enough, because test_contract.py traces the ops in every mode. The modes take turns.
TRACED = [(name, mode) for i, name in enumerate(MODULES) for mode in ("plain", TRACING_MODES[i % len(TRACING_MODES)])]


@pytest.mark.parametrize(("name", "tracing_mode"), TRACED)
def test_fake_tensors_and_make_fx(name: str, tracing_mode: str) -> None:
    """Compute outputs and gradients of parameters and inputs, with fake tensors or with a traced graph."""
    module, arguments = MODULES[name]()
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    leaves, spec = tree_flatten((state, arguments))
    tensor_indices = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        tensors = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
        new_leaves = list(leaves)
        for i, x in zip(tensor_indices, tensors):
            new_leaves[i] = x
        outputs = tree_leaves(torch.func.functional_call(module, *tree_unflatten(new_leaves, spec)))
        needs_grad = [x for x in tensors if x.requires_grad]
        total = sum(x.sum() for x in outputs if x.requires_grad)
        grads = torch.autograd.grad(total, needs_grad, allow_unused=True)
        return [*outputs, *(x for x in grads if x is not None)]

    tensors = [leaves[i] for i in tensor_indices]
    expected = run(tensors)
    if tracing_mode == "plain":
        with FakeTensorMode() as mode:
            actual = run([mode.from_tensor(x) for x in tensors])
        assert [(x.shape, x.dtype) for x in actual] == [(x.shape, x.dtype) for x in expected]
    else:
        actual = make_fx(run, tracing_mode=tracing_mode)(tensors)(tensors)
        torch.testing.assert_close(actual, expected)


def test_every_module_is_traced() -> None:
    tested = {type(make()[0]).__name__ for make in MODULES.values()}
    assert tested == set(relops.nn.__all__) - {"RankedDetections"}


# ---- Deformable convolution ----

# Arguments for 8 input channels and 6 output channels.
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "all arguments": {
        **{"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2},
        "bias": False,
    },
}

on_convolutions = pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def modulated_layer(*args: Any, **options: Any) -> relops.nn.ModulatedDeformConv2d:
    """Return a layer whose offsets and masks differ from pixel to pixel."""
    layer = relops.nn.ModulatedDeformConv2d(*args, **options)
    for parameter in layer.conv_offset.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@on_convolutions
def test_deform_conv2d_equals_torchvision(options: dict[str, Any], device: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(1)
    ours = relops.nn.DeformConv2d(8, 6, **options)
    torch.manual_seed(1)
    theirs = torchvision.ops.DeformConv2d(8, 6, **options)
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)

    ours, theirs = ours.to(device, torch.float64), theirs.to(device, torch.float64)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64, device=device, requires_grad=True)
    out_size = F.conv2d(x, theirs.weight, None, theirs.stride, theirs.padding, theirs.dilation, theirs.groups).shape[2:]
    taps = math.prod(theirs.kernel_size)
    offset = torch.randn(2, 4 * taps, *out_size, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.rand(2, 2 * taps, *out_size, dtype=torch.float64, device=device, requires_grad=True)
    for inputs in ((x, offset), (x, offset, mask)):
        results = []
        for layer in (ours, theirs):
            output = layer(*inputs)
            grads = torch.autograd.grad(output.square().sum(), [*inputs, *layer.parameters()])
            results.append([output, *grads])
        torch.testing.assert_close(*results)


@on_convolutions
@pytest.mark.parametrize("deform_groups", [1, 4])
def test_modulated_layer_equals_the_definition_of_mmcv(
    options: dict[str, Any], deform_groups: int, device: str
) -> None:
    layer = modulated_layer(8, 6, **options, deform_groups=deform_groups).to(device, torch.float64)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64, device=device, requires_grad=True)

    def definition(x: Tensor) -> Tensor:
        """Compute the layer as ModulatedDeformConv2dPack of mmcv does."""
        conv, sizes = layer.conv_offset, (layer.stride, layer.padding, layer.dilation)
        o1, o2, mask = F.conv2d(x, conv.weight, conv.bias, *sizes).chunk(3, dim=1)
        return reference.deform_conv2d(x, torch.cat([o1, o2], 1), layer.weight, layer.bias, *sizes, mask.sigmoid())

    results = []
    for f in (layer, definition):
        output = f(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results)


@on_convolutions
def test_modulated_layer_begins_as_half_of_a_convolution(options: dict[str, Any], device: str) -> None:
    layer = relops.nn.ModulatedDeformConv2d(8, 6, **options, deform_groups=2).to(device)
    names = {"weight", "conv_offset.weight", "conv_offset.bias"} | ({"bias"} if options.get("bias", True) else set())
    assert layer.state_dict().keys() == names
    taps = math.prod(layer.kernel_size)
    assert layer.conv_offset.weight.shape == (2 * 3 * taps, 8, *layer.kernel_size)
    bound = (8 * taps) ** -0.5  # mmcv does not divide the number of channels by the number of groups
    assert 0.9 * bound < layer.weight.abs().max() <= bound
    if layer.bias is not None:
        assert not layer.bias.any()
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 8, 9, 7, device=device)
    expected = F.conv2d(x, 0.5 * layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    torch.testing.assert_close(layer(x), expected)


def test_order_of_offsets_and_masks() -> None:
    """In torchvision and in mmcv, an offset group has pairs (dy, dx) of one tap after another."""
    x = torch.randn(1, 4, 12, 12)
    group, i, j, dy, dx = 1, 2, 0, 1, -2
    logits = torch.full((2, 3, 3), 1.0)
    logits[group, i, j] = 0.0
    offset = torch.randn(2, 3, 3, 2)
    offset[group, i, j] = torch.tensor([dy, dx])
    layer = relops.nn.ModulatedDeformConv2d(4, 1, 3, padding=1, deform_groups=2, bias=False)
    plain = relops.nn.DeformConv2d(4, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.conv_offset.bias.copy_(torch.cat([offset.flatten(), logits.flatten()]))
        layer.weight.zero_()
        layer.weight[0, 3, i, j] = 1  # channel 3 belongs to the second offset group
        plain.weight.copy_(layer.weight)
    shifted = x.roll((-(i - 1 + dy), -(j - 1 + dx)), dims=(2, 3))[:, 3:]
    inner = (..., slice(4, -4), slice(4, -4))  # roll also moves pixels across the border
    torch.testing.assert_close(layer(x)[inner], 0.5 * shifted[inner])
    offsets, masks = (
        y.view(1, -1, 1, 1).expand(-1, -1, 12, 12) for y in (offset.flatten(), logits.sigmoid().flatten())
    )
    torch.testing.assert_close(plain(x, offsets)[inner], shifted[inner])
    torch.testing.assert_close(plain(x, offsets, masks)[inner], 0.5 * shifted[inner])


def early_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".conv_offset.", "_offset."): x for name, x in state_dict.items()}


def test_modulated_layer_loads_early_files() -> None:
    """Early versions of DCNv2 and mmcv store the offset convolution of the layer `conv2` as `conv2_offset`."""

    def network() -> torch.nn.Module:
        block = OrderedDict(conv2=modulated_layer(4, 4, 3, padding=1), conv2_norm=torch.nn.BatchNorm2d(4))
        return torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(block), modulated_layer(4, 2, 1))

    saved = network()
    state = early_keys(saved.state_dict())
    assert "1.conv2_offset.weight" in state and "2_offset.bias" in state
    stream = io.BytesIO()
    torch.save(network(), stream)
    stream.seek(0)
    for loaded in (network(), copy.deepcopy(network()), torch.load(stream, weights_only=False)):
        before = dict(state)
        loaded.load_state_dict(state)
        torch.testing.assert_close(dict(loaded.state_dict()), dict(saved.state_dict()), rtol=0, atol=0)
        assert state.keys() == before.keys()
        loaded.load_state_dict(saved.state_dict())  # the current names still work
        with pytest.raises(RuntimeError, match=r'Missing key.*"2\.conv_offset\.bias"'):
            loaded.load_state_dict({name: x for name, x in state.items() if name != "2_offset.bias"})


def test_layer_named_like_an_early_offset_convolution_is_kept() -> None:
    layers = OrderedDict(a=modulated_layer(4, 4, 3), a_offset=torch.nn.Conv2d(4, 2, 1))
    network = torch.nn.Sequential(layers)
    state = {name: torch.randn_like(x) for name, x in network.state_dict().items()}
    network.load_state_dict(state)
    torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)
    incomplete = {name: x for name, x in state.items() if not name.startswith("a.conv_offset")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"a\.conv_offset\.weight"'):
        network.load_state_dict(incomplete)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_modulated_layer_in_16_bits(dtype: torch.dtype, autocast: bool, device: str) -> None:
    """The result has the dtype of other convolutions and is as accurate as they are."""
    layer, x = modulated_layer(16, 8, 3, padding=1).to(device), torch.randn(2, 16, 9, 8, device=device)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.02)
    exact = layer(x)
    if autocast:
        with torch.autocast(device, dtype):
            output = layer(x)
            assert layer(x.to(dtype)).dtype == dtype
    else:
        output = layer.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    assert (output - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()
    output.sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in layer.parameters())


def test_layers_for_deformable_convolution_can_be_copied() -> None:
    for name in ("DeformConv2d", "ModulatedDeformConv2d"):
        module, arguments = MODULES[name]()
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        expected = module(*arguments)
        for copied in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
            assert torch.equal(copied(*arguments), expected)


def test_deform_conv2d_can_be_traced() -> None:
    module, arguments = MODULES["DeformConv2d"]()
    traced = torch.fx.symbolic_trace(module)
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 1
    assert torch.equal(traced(*arguments), module(*arguments))


@pytest.mark.parametrize("name", ["DeformConv2d", "ModulatedDeformConv2d"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be an int from 1 to 2147483648, got 0"),
        ({"out_channels": 2.0}, TypeError, "out_channels must be an int from 1 to 2147483648, got 2.0"),
        ({"groups": 3}, ValueError, "in_channels must be divisible by groups, got 4, 3"),
        ({"groups": 4}, ValueError, "out_channels must be divisible by groups, got 6, 4"),
        ({"kernel_size": (3, 0)}, ValueError, r"kernel_size must be an int from 1 .* got \(3, 0\)"),
        ({"stride": (1, 1, 1)}, ValueError, r"stride must be an int from 1 .* got \(1, 1, 1\)"),
        ({"padding": "same"}, TypeError, "padding must be an int from 0 .* got 'same'"),
        ({"dilation": True}, TypeError, "dilation must be an int from 1 .* got True"),
    ],
)
def test_bad_arguments_of_deformable_convolutions(name: str, options: dict, error: type, message: str) -> None:
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options
    with pytest.raises(error, match=rf"^relops\.nn\.{name}: {message}"):
        getattr(relops.nn, name)(**arguments)


def test_bad_inputs_of_deformable_convolutions() -> None:
    with pytest.raises(ValueError, match="in_channels must be divisible by deform_groups, got 4, 3"):
        relops.nn.ModulatedDeformConv2d(4, 6, 3, deform_groups=3)
    layer = relops.nn.ModulatedDeformConv2d(4, 6, 3)
    for x in (torch.zeros(4, 8, 8), torch.zeros(1, 5, 8, 8)):
        with pytest.raises(ValueError, match=r"input must be \[N,C,H,W\] with C = 4, got shape"):
            layer(x)
    with pytest.raises(TypeError, match="input must be float64, float32, float16 or bfloat16, got"):
        layer(torch.zeros(1, 4, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"relops\.deform_conv2d: offset must be"):
        relops.nn.DeformConv2d(4, 6, 3)(torch.zeros(1, 4, 8, 8), torch.zeros(1, 9, 6, 6))


# ---- Deformable attention ----


def test_state_dict_has_the_layout_of_deformable_detr() -> None:
    shapes = {name: tuple(x.shape) for name, x in relops.nn.MSDeformAttn().state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (8 * 4 * 4 * 2, 256),
        "sampling_offsets.bias": (8 * 4 * 4 * 2,),
        "attention_weights.weight": (8 * 4 * 4, 256),
        "attention_weights.bias": (8 * 4 * 4,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_initial_parameters_equal_deformable_detr() -> None:
    layer = relops.nn.MSDeformAttn(d_model=64, n_levels=3, n_heads=8, n_points=4)
    # Each of the eight heads samples points in a different compass direction, at distances of 1 to 4 pixels in the
    # maximum norm.
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor([[[[p * x, p * y] for p in range(1, 5)]] * 3 for x, y in compass]).float()
    torch.testing.assert_close(layer.sampling_offsets.bias.view(8, 3, 4, 2), expected, rtol=0, atol=1e-5)
    for zero in (
        layer.sampling_offsets.weight,
        layer.attention_weights.weight,
        layer.attention_weights.bias,
        layer.value_proj.bias,
        layer.output_proj.bias,
    ):
        assert not zero.any()
    bound = (6 / (64 + 64)) ** 0.5  # Xavier uniform initialization
    for weight in (layer.value_proj.weight, layer.output_proj.weight):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_width_must_be_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="d_model must be divisible by n_heads, got 30, 8"):
        relops.nn.MSDeformAttn(d_model=30)


def step_by_step(layer: torch.nn.Module, query: Tensor, points: Tensor, pyramid: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the layer as Deformable DETR does, with linear layers, softmax and the twin of the unfused op."""
    N, Q, C = query.shape
    M, L, P = layer.n_heads, layer.n_levels, layer.n_points
    value = torch.nn.functional.linear(pyramid, layer.value_proj.weight, layer.value_proj.bias)
    if mask is not None:
        value = value.masked_fill(mask[..., None], 0.0)
    offsets = layer.sampling_offsets(query).view(N, Q, M, L, P, 2)
    weights = layer.attention_weights(query).view(N, Q, M, L * P).softmax(-1).view(N, Q, M, L, P)
    if points.shape[-1] == 2:
        normalizer = torch.tensor([(w, h) for h, w in LEVELS[:L]]).to(points)
        locations = points[:, :, None, :, None] + offsets / normalizer[None, None, None, :, None]
    else:
        locations = points[:, :, None, :, None, :2] + offsets / P * points[:, :, None, :, None, 2:] * 0.5
    sampled = reference.ms_deform_attn(value.view(N, -1, M, C // M), LEVELS[:L], None, locations, weights)
    return layer.output_proj(sampled)


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_forward_and_gradients(coordinates: int, padded: bool, device: str) -> None:
    layer = relops.nn.MSDeformAttn(d_model=48, n_levels=4, n_heads=6, n_points=3).to(device, torch.float64)
    with torch.no_grad():  # the initial weights are zero
        for linear in (layer.sampling_offsets, layer.attention_weights):
            linear.weight.normal_(std=0.1)
    query = torch.randn(2, 11, 48, dtype=torch.float64, device=device)
    pyramid = torch.randn(2, S, 48, dtype=torch.float64, device=device)
    points = torch.rand(2, 11, 4, coordinates, dtype=torch.float64, device=device)
    mask = torch.rand(2, S, device=device) < 0.3 if padded else None
    shapes = torch.tensor(LEVELS)
    starts = torch.tensor([0, 117, 152, 164])

    results = []
    for f in (
        lambda: layer(query, points, pyramid, shapes, starts, mask),
        lambda: layer(query, points, pyramid, LEVELS, input_padding_mask=mask),
        lambda: step_by_step(layer, query, points, pyramid, mask),
    ):
        layer.zero_grad()
        output = f()
        output.square().sum().backward()
        results.append({"output": output.detach()} | {name: p.grad for name, p in layer.named_parameters()})
    *ours, expected = results
    for result in ours:
        for name, x in result.items():
            assert_matches(x, expected[name], name, torch.float64)


def test_under_autocast(device: str) -> None:
    """Features are bfloat16 and reference points float32. The result is as accurate as bfloat16 linear layers allow."""
    layer = relops.nn.MSDeformAttn(d_model=64, n_heads=4).to(device)
    query, pyramid = torch.randn(1, 20, 64, device=device), torch.randn(1, S, 64, device=device)
    points = torch.rand(1, 20, 4, 2, device=device)
    exact = layer(query, points, pyramid, LEVELS)
    with torch.autocast(device, torch.bfloat16):
        output = layer(query, points, pyramid, LEVELS)
    assert output.dtype == torch.bfloat16
    assert (output - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def test_repr_shows_the_sizes() -> None:
    assert "d_model=64, n_levels=2, n_heads=4, n_points=3" in repr(relops.nn.MSDeformAttn(64, 2, 4, 3))


def test_transformers_layer_has_neither_init_nor_parameters() -> None:
    """transformers requires this of a layer that replaces one of its own layers."""
    layer = relops.nn.MultiScaleDeformableAttention
    assert "__init__" not in vars(layer)
    assert not layer().state_dict()
    assert layer.can_torch_compile and layer.has_backward


# ---- Regions ----

REGION_MODULES = {
    "roi_align": relops.nn.RoIAlign((3, 2), 0.5, 2, aligned=True),
    "roi_pool": relops.nn.RoIPool((3, 2), 0.5),
    "ps_roi_align": relops.nn.PSRoIAlign((3, 2), 0.5, -1),
    "ps_roi_pool": relops.nn.PSRoIPool((3, 2), 0.5),
    "prroi_pool": relops.nn.PrRoIPool((3, 2), 0.5),
}
BOXES = [
    torch.tensor([[1.1, 2.3, 17.4, 14.6], [0.4, 0.2, 5.3, 4.9], [-6.2, 3.3, 30.1, 9.7]]),
    torch.zeros(0, 4),
    torch.tensor([[3.2, -2.1, 9.3, 8.8]]),
]
MAP_SIZES = {"p2": (16, 24), "p3": (8, 12), "p4": (4, 6)}
IMAGES = [(60, 96), (64, 90), (62, 91)]  # padded to 64 x 96, so that the maps have scales of 1/4, 1/8 and 1/16
LARGE_BOXES = [torch.tensor([[2.1, 3.2, 13.3, 15.7], [4.4, 1.3, 40.2, 33.7]]), torch.zeros(0, 4), 7 * BOXES[2]]

on_region_modules = pytest.mark.parametrize("name", REGION_MODULES)


def region_arguments(name: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    rows = torch.cat([torch.nn.functional.pad(boxes, (1, 0), value=n) for n, boxes in enumerate(BOXES)])
    return REGION_MODULES[name], torch.randn(3, 12, 9, 12), rows


def maps() -> dict[str, Tensor]:
    return {name: torch.randn(3, 6, *size) for name, size in MAP_SIZES.items()}


def multi_scale_module() -> torch.nn.Module:
    return relops.nn.MultiScaleRoIAlign(["p2", "p3", "p4"], (3, 2), 2, canonical_scale=20, canonical_level=3)


@on_region_modules
def test_region_module_equals_its_op(name: str) -> None:
    module, x, rows = region_arguments(name)
    options = {key: getattr(module, key) for key in ("sampling_ratio", "aligned") if hasattr(module, key)}
    expected = getattr(relops, name)(x, rows, (3, 2), 0.5, **options)
    assert torch.equal(module(x, rows), expected)
    assert torch.equal(module(x, BOXES), expected)
    assert torch.equal(module(x, tuple(BOXES)), expected)


@on_region_modules
def test_batch_index_of_a_list_is_not_rounded(name: str) -> None:
    """bfloat16 cannot represent 257."""
    module = REGION_MODULES[name]
    x = torch.zeros(260, 6, 4, 4, dtype=torch.bfloat16)
    x[257] = 1
    output = module(x, [torch.tensor([[0.0, 0.0, 4.0, 4.0]], dtype=torch.bfloat16)] * 260)
    assert output[257].any() and not output[256].any() and not output[258].any()


@on_region_modules
def test_empty_batch_with_an_empty_list(name: str) -> None:
    module, x, _ = region_arguments(name)
    output = module(x[:0], [])
    assert output.shape[0] == 0 and output.shape[2:] == (3, 2)


@pytest.mark.parametrize("op", [op for op in OPS if "roi" in op.name], ids=lambda op: op.name)
def test_memory_format_is_kept(op: Op, device: str) -> None:
    for sample, memory_format in (
        ("typical", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        for name, x in op.run(op.draw(op.samples[sample], device)).items():
            assert name == "boxes" or x.is_contiguous(memory_format=memory_format), (sample, name)


@on_region_modules
def test_batch_index_is_checked_under_vmap(name: str) -> None:
    """vmap joins its entries into one batch.

    A batch index that is too large for its entry must not select an image of the next entry.
    """
    module, x, rows = region_arguments(name)
    rows[0, 0] = len(x)
    with pytest.raises(IndexError, match=f"relops.{name}: boxes must have a batch index"):
        torch.vmap(module)(torch.stack([x, x]), torch.stack([rows, rows]))


@pytest.mark.parametrize("name", ["roi_pool", "ps_roi_pool"])
def test_pooling_gives_boxes_no_gradient(name: str) -> None:
    module, x, rows = region_arguments(name)
    rows.requires_grad_()
    module(x.requires_grad_(), rows).sum().backward()
    assert rows.grad is None and x.grad is not None


def test_multi_scale_module_equals_its_op() -> None:
    x = maps()
    output = multi_scale_module()(x | {"pool": torch.randn(3, 6, 2, 3)}, LARGE_BOXES, IMAGES)
    scales = [1 / 4, 1 / 8, 1 / 16]
    expected = relops.multi_scale_roi_align(
        list(x.values()), LARGE_BOXES, (3, 2), scales, canonical_box_size=20.0, canonical_level=3
    )
    assert torch.equal(output, expected)


def test_multi_scale_module_computes_scales_in_every_call() -> None:
    """The module keeps no state. In a second call, whose images are twice as large, it halves the scales."""
    module, x = multi_scale_module(), maps()
    module(x, LARGE_BOXES, IMAGES)
    boxes = [2 * image_boxes for image_boxes in LARGE_BOXES]
    expected = relops.multi_scale_roi_align(
        list(x.values()), boxes, (3, 2), [1 / 8, 1 / 16, 1 / 32], canonical_box_size=20.0, canonical_level=3
    )
    assert torch.equal(module(x, boxes, [(128, 192)]), expected)


def test_multi_scale_module_without_images() -> None:
    with pytest.raises(ValueError, match="image_shapes must contain at least one"):
        multi_scale_module()(maps(), LARGE_BOXES, [])


def test_levels_of_several_dtypes_under_autocast() -> None:
    """Under autocast, some layers return bfloat16 levels, and others return float32 levels."""
    mixed = list(maps().values())
    mixed[1] = mixed[1].bfloat16()
    arguments = LARGE_BOXES, 3, [1 / 4, 1 / 8, 1 / 16]
    with torch.autocast("cpu", torch.bfloat16):
        output = relops.multi_scale_roi_align(mixed, *arguments)
    assert torch.equal(output, relops.multi_scale_roi_align([x.float() for x in mixed], *arguments))


@on_region_modules
def test_region_modules_can_be_scripted_and_traced(name: str) -> None:
    module, x, rows = region_arguments(name)
    expected = module(x, rows)
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(x, rows), expected)
    assert torch.equal(scripted(x, BOXES), expected)
    function = torch.jit.script(getattr(relops, name))
    assert torch.equal(function(x, BOXES, 2), getattr(relops, name)(x, rows, (2, 2)))
    traced = torch.fx.symbolic_trace(module)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "placeholder", "call_function", "output"]
    assert torch.equal(traced(x, rows), expected)
    assert torch.equal(traced(x, BOXES), expected)


def test_multi_scale_module_can_be_scripted_and_traced() -> None:
    arguments = (maps(), LARGE_BOXES, IMAGES)
    module = multi_scale_module()
    expected = module(*arguments)
    assert torch.equal(torch.jit.script(module)(*arguments), expected)
    traced = torch.fx.symbolic_trace(module)
    assert [node.op for node in traced.graph.nodes] == ["placeholder"] * 3 + ["call_function", "output"]
    assert torch.equal(traced(*arguments), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*arguments), expected)


@on_region_modules
def test_region_modules_equal_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    if name == "prroi_pool":
        pytest.skip("not in torchvision")
    module, x, rows = region_arguments(name)
    arguments = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
    theirs = getattr(torchvision.ops, type(module).__name__)(**arguments)
    assert repr(module) == repr(theirs)
    torch.testing.assert_close(module(x, rows), theirs(x, rows))


def test_multi_scale_module_equals_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    module = multi_scale_module()
    theirs = torchvision.ops.MultiScaleRoIAlign(["p2", "p3", "p4"], (3, 2), 2, canonical_scale=20, canonical_level=3)
    assert repr(module) == repr(theirs)
    x = maps()
    torch.testing.assert_close(module(x, LARGE_BOXES, IMAGES), theirs(x, LARGE_BOXES, IMAGES))
