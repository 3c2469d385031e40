"""The modules of deformable attention."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_matches
from torch import Tensor

import relops
from relops import reference

LEVELS = [(9, 13), (5, 7), (3, 4), (2, 2)]
S = sum(h * w for h, w in LEVELS)


def test_state_dict_is_that_of_deformable_detr() -> None:
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


def test_initialization_is_that_of_deformable_detr() -> None:
    layer = relops.nn.MSDeformAttn(d_model=64, n_levels=3, n_heads=8, n_points=4)
    # Eight heads look into the eight directions of the compass, 1 to 4 pixels away on the unit square.
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor([[[[p * x, p * y] for p in range(1, 5)]] * 3 for x, y in compass]).float()
    torch.testing.assert_close(layer.sampling_offsets.bias.view(8, 3, 4, 2), expected, rtol=0, atol=1e-5)
    for zero in (
        layer.sampling_offsets.weight, layer.attention_weights.weight, layer.attention_weights.bias,
        layer.value_proj.bias, layer.output_proj.bias,
    ):  # fmt: skip
        assert not zero.any()
    bound = (6 / (64 + 64)) ** 0.5  # Xavier, uniform
    for weight in (layer.value_proj.weight, layer.output_proj.weight):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="d_model must be divisible by n_heads, got 30, 8"):
        relops.nn.MSDeformAttn(d_model=30)


def by_steps(layer: torch.nn.Module, query: Tensor, points: Tensor, pyramid: Tensor, mask: Tensor | None) -> Tensor:
    """The layer as Deformable DETR writes it, from linear layers, softmax and the twin of the unfused op."""
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
    with torch.no_grad():  # they begin as zeros
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
        lambda: by_steps(layer, query, points, pyramid, mask),
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
    """bfloat16 features, float32 reference points: as close to float32 as bfloat16 linear layers allow."""
    layer = relops.nn.MSDeformAttn(d_model=64, n_heads=4).to(device)
    query, pyramid = torch.randn(1, 20, 64, device=device), torch.randn(1, S, 64, device=device)
    points = torch.rand(1, 20, 4, 2, device=device)
    exact = layer(query, points, pyramid, LEVELS)
    with torch.autocast(device, torch.bfloat16):
        output = layer(query, points, pyramid, LEVELS)
    assert output.dtype == torch.bfloat16
    assert (output - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def test_repr_tells_its_sizes() -> None:
    assert "d_model=64, n_levels=2, n_heads=4, n_points=3" in repr(relops.nn.MSDeformAttn(64, 2, 4, 3))


def test_transformers_layer_has_neither_init_nor_parameters() -> None:
    """What transformers asks of a layer that it puts in place of its own."""
    layer = relops.nn.MultiScaleDeformableAttention
    assert "__init__" not in vars(layer)
    assert not layer().state_dict()
    assert layer.can_torch_compile and layer.has_backward
