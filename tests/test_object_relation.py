"""Tests of nn.ObjectRelation: comparison with the released code, and known properties."""

from __future__ import annotations

import pytest
import torch
from helpers.relation_networks import (
    assert_same,
    pair_embedding,
    random_parameters,
    relation,
    relation_shapes,
    relation_state,
)
from torch import Tensor

import relops

GEOMETRIES = ["paper", "official"]


def draw_boxes(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    corners, sides = torch.rand(2, *shape, 2, dtype=dtype)
    return torch.cat([300 * corners, 300 * corners + 8 + 100 * sides], -1)


def small(geometry: str = "paper", dtype: torch.dtype = torch.float64, device: str = "cpu") -> relops.nn.ObjectRelation:
    """Build a small module with random parameters, all of which affect the result visibly."""
    module = relops.nn.ObjectRelation(12, heads=3, head_dim=5, geometry=geometry).double()
    module.load_state_dict(relation_state(random_parameters(relation_shapes(12, 3, 5))))
    return module.to(device, dtype)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("num_keys", [9, 6])
def test_released_parameters_give_the_released_result(geometry: str, num_keys: int, device: str) -> None:
    """Compare the output and the gradients. Only the first num_keys objects are keys, and all objects are queries."""
    p = {name: x.requires_grad_() for name, x in random_parameters(relation_shapes(12, 3, 5)).items()}
    features, boxes = torch.randn(9, 12, dtype=torch.float64, requires_grad=True), draw_boxes(9)
    expected = features + relation(features, pair_embedding(boxes, num_keys, geometry), p, heads=3)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()

    module = relops.nn.ObjectRelation(12, heads=3, head_dim=5, geometry=geometry).double()
    module.load_state_dict(relation_state({name: x.detach() for name, x in p.items()}))
    module.to(device)
    x = features.detach().to(device).requires_grad_()
    mask = torch.arange(9, device=device) >= num_keys
    output = module(x, boxes.to(device), None if num_keys == 9 else mask)
    (output * weights.to(device)).sum().backward()
    assert_same(output, expected)
    assert_same(x.grad, features.grad, "features")
    for name, grad in relation_state({name: x.grad for name, x in p.items()}).items():
        if name == "key.bias":  # zero up to rounding: this bias adds the same value to all logits of a query
            assert grad.abs().max() < 1e-12 > module.key.bias.grad.abs().max()
        else:
            assert_same(module.get_parameter(name).grad, grad, name)


def test_head_of_the_paper(device: str) -> None:
    """Compare two modules that process the same boxes with the released code.

    The released code computes the embedding of the pairs of boxes once for both modules. In relops, each module
    computes the geometry itself.
    """
    torch.manual_seed(1)
    fc = [torch.nn.Linear(width, 12).double() for width in (20, 12)]
    p = random_parameters(relation_shapes(12, 3, 5, index=1) | relation_shapes(12, 3, 5, index=2))
    regions, boxes = torch.randn(7, 20, dtype=torch.float64), draw_boxes(7)
    embedding, x = pair_embedding(boxes, 7, "paper"), regions
    for i in (1, 2):
        x = fc[i - 1](x)
        x = (x + relation(x, embedding, p, heads=3, index=i)).relu()

    y, boxes = regions.to(device), boxes.to(device)
    for i in (1, 2):
        module = relops.nn.ObjectRelation(12, heads=3, head_dim=5).double()
        module.load_state_dict(relation_state(p, index=i))
        y = module.to(device)(fc[i - 1].to(device)(y), boxes).relu()
    assert_same(y, x)


def test_initial_parameters_equal_the_paper() -> None:
    module = relops.nn.ObjectRelation()
    released = random_parameters(relation_shapes(1024, 16, 64))
    state = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    assert state == {name: tuple(x.shape) for name, x in relation_state(released).items()}
    assert sum(x.numel() for x in module.parameters()) == 3 * (1024 * 1024 + 1024) + 16 * 64 + 16
    for name, x in module.state_dict().items():
        if name.endswith("bias"):
            assert (x == (0.1 if name == "geometry.bias" else 0)).all()
        else:
            assert x.mean().abs() < 0.002 and x.std().item() == pytest.approx(0.01, rel=0.1)


def test_equal_weights_give_the_mean(device: str) -> None:
    """If appearance and geometry have no effect, relation features are the mean of the projected features."""
    module = small(device=device)
    with torch.no_grad():
        module.query.weight.zero_()
        module.query.bias.zero_()
        module.geometry.weight.zero_()
        module.geometry.bias.fill_(2.0)
    features = torch.randn(2, 5, 12, dtype=torch.float64, device=device)
    expected = features + module.value(features).mean(1, keepdim=True)
    assert_same(module(features, draw_boxes(2, 5).to(device)), expected)


def test_permuted_objects_have_permuted_outputs(device: str) -> None:
    module, features, boxes = small(device=device), torch.randn(8, 12, device=device).double(), draw_boxes(8).to(device)
    order = torch.randperm(8, device=device)
    assert_same(module(features[order], boxes[order]), module(features, boxes)[order])


def test_padding_is_ignored(device: str) -> None:
    """Compare a padded batch with calls for one image each. One of these calls has padding but no batch dimension."""
    module = small(device=device)
    features, boxes = torch.randn(2, 9, 12, device=device).double(), draw_boxes(2, 9).to(device)
    mask = torch.arange(9, device=device) >= torch.tensor([[9], [4]], device=device)
    batch = module(features, boxes, mask)
    assert_same(batch[0], module(features[0], boxes[0]))
    assert_same(batch[1, :4], module(features[1, :4], boxes[1, :4]))
    assert_same(module(features[1], boxes[1], mask[1]), batch[1])


def test_output_equals_features_if_all_keys_are_masked(device: str) -> None:
    module, features = small(device=device), torch.randn(3, 12, dtype=torch.float64, device=device)
    output = module(features, draw_boxes(3).to(device), torch.ones(3, dtype=torch.bool, device=device))
    assert torch.equal(output, features)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 4)])
def test_no_objects(shape: tuple[int, ...], device: str) -> None:
    module = small(device=device)
    features = torch.zeros(*shape, 12, dtype=torch.float64, device=device, requires_grad=True)
    output = module(features, torch.zeros(*shape, 4, dtype=torch.float64, device=device))
    assert output.shape == features.shape
    output.sum().backward()
    assert features.grad.shape == features.shape
    assert all(not p.grad.any() for p in module.parameters())


def test_boxes_stay_exact_under_autocast(device: str) -> None:
    """The boxes are so far from the origin that rounding to 16 bits would leave only a few distinct boxes."""
    module = small(dtype=torch.float32, device=device)
    features = torch.randn(1, 20, 12, device=device)
    boxes = draw_boxes(1, 20, dtype=torch.float32).to(device) / 50 + 3000
    exact = module(features, boxes)
    with torch.autocast(device, torch.bfloat16):
        output = module(features, boxes)
        rounded = module(features, boxes.bfloat16().float())

    def error(x: Tensor) -> Tensor:
        return (x - exact).square().mean().sqrt() / exact.square().mean().sqrt()

    assert error(output) < 0.02 < error(rounded)


def test_bfloat16_module_with_float32_boxes(device: str) -> None:
    module = small(dtype=torch.float32, device=device)
    features, boxes = torch.randn(1, 20, 12, device=device), draw_boxes(1, 20, dtype=torch.float32).to(device)
    exact = module(features, boxes)
    output = module.bfloat16()(features.bfloat16(), boxes)
    assert output.dtype == torch.bfloat16
    assert (output - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


def test_compiles(fresh_compiler: None, device: str) -> None:
    module, features, boxes = small(device=device), torch.randn(2, 6, 12, device=device).double(), draw_boxes(2, 6)
    mask = torch.rand(2, 6, device=device) < 0.3
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(features, boxes.to(device), mask), module(features, boxes.to(device), mask), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, torch.zeros(3, 4)), TypeError, "features must be a Tensor, got NoneType"),
        ((torch.zeros(3, 12).int(), torch.zeros(3, 4)), TypeError, "features must be float64.*got torch.int32"),
        ((torch.zeros(12), torch.zeros(4)), ValueError, r"features must be \[N,K,C\] or \[K,C\].*got shape \[12\]"),
        ((torch.zeros(3, 8), torch.zeros(3, 4)), ValueError, r"with C = 12, got shape \[3, 8\]"),
        ((torch.zeros(3, 12), torch.zeros(2, 4)), ValueError, r"boxes must be \[K,4\] = \[3,4\], got shape \[2, 4\]"),
        ((torch.zeros(2, 3, 12), torch.zeros(3, 4)), ValueError, r"boxes must be \[N,K,4\] = \[2,3,4\], got shape"),
        ((torch.zeros(3, 12), torch.zeros(3, 4), torch.zeros(3)), TypeError, "key_mask must be bool, got"),
        ((torch.zeros(3, 12), torch.zeros(3, 4), torch.zeros(4) > 0), ValueError, r"key_mask must be \[K\] = \[3\]"),
    ],
)
def test_bad_input(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"relops.nn.ObjectRelation: .*{message}"):
        relops.nn.ObjectRelation(12, heads=3)(*arguments)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="channels must be divisible by heads, got 30, 16"):
        relops.nn.ObjectRelation(30)
    with pytest.raises(ValueError, match='geometry must be "paper" or "official", got \'other\''):
        relops.nn.ObjectRelation(geometry="other")


def test_repr_shows_the_options() -> None:
    assert 'channels=12, heads=3, head_dim=5, geometry="paper"' in repr(relops.nn.ObjectRelation(12, 3, 5))
