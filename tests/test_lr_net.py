"""Tests of nn.LocalRelation and of LR-Net, a network that consists of such layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_matches, run_python
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import relops
from relops import reference
from relops.nn.local_relation import PRIORS, tap_positions


def layer(device: str = "cpu", dtype: torch.dtype = torch.float64, **options: object) -> relops.nn.LocalRelation:
    options = {"channels": 20, "kernel_size": 3} | options
    module = relops.nn.LocalRelation(**options).to(device, dtype)
    if isinstance(module.prior, nn.Parameter):
        nn.init.normal_(module.prior)
    return module


# ---- The layer ----


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "dilation": 2}, {"similarity": "product", "border": "zero"}, {"channels_per_group": 1}],
    ids=["plain", "strided", "product", "depthwise"],
)
def test_layer_equals_its_definition(prior: str, options: dict, device: str) -> None:
    module = layer(device, prior=prior, **options)
    x = torch.randn(2, 20, 9, 11, device=device, dtype=torch.float64, requires_grad=True)
    output = module(x)
    m = options.get("channels_per_group", 8)
    assert module.groups == -(-20 // m)

    q = F.conv2d(x, module.query.weight, module.query.bias)[:, :, :: module.stride, :: module.stride]
    k = F.conv2d(x, module.key.weight, module.key.bias)
    table = None
    if prior == "table":
        table = module.prior
    elif prior == "network":
        first, second = module.prior[0], module.prior[2]
        position = tap_positions(3)[0].to(x).flatten(1)
        hidden = (first.weight.flatten(1) @ position + first.bias[:, None]).relu()
        table = (second.weight.flatten(1) @ hidden + second.bias[:, None]).view(-1, 3, 3)
    options = {name: options[name] for name in options if name != "channels_per_group"}
    y = reference.local_relation(q, k, x, table, kernel_size=3, **options)
    expected = F.conv2d(y, module.output.weight, module.output.bias)
    assert_matches(output, expected.cpu())
    needs_grad = [x, *module.parameters()]
    grad = torch.randn_like(output)
    for actual, reference_grad in zip(
        torch.autograd.grad(output, needs_grad, grad), torch.autograd.grad(expected, needs_grad, grad)
    ):
        torch.testing.assert_close(actual, reference_grad, rtol=1e-9, atol=1e-11)


def test_positions() -> None:
    """Positions are (x, y) in row-major order. The positions of an even window do not reach 1."""
    third = tap_positions(3)
    assert third.shape == (1, 2, 3, 3)
    assert third[0, 0].tolist() == [[-1, 0, 1]] * 3 and third[0, 1].tolist() == [[-1] * 3, [0] * 3, [1] * 3]
    assert tap_positions(4)[0, 0, 0].tolist() == [-1, -0.5, 0, 0.5]
    assert not tap_positions(1).any()


def test_state_dict_contains_only_parameters() -> None:
    names = ["query.weight", "query.bias", "key.weight", "key.bias", "prior.0.weight", "prior.0.bias"]
    assert set(layer().state_dict()) == {*names, "prior.2.weight", "prior.2.bias", "output.weight", "output.bias"}
    assert layer(prior="table").state_dict()["prior"].shape == (3, 3, 3)
    assert "prior" not in layer(prior="none").state_dict()


def test_layer_with_kernel_size_one_equals_its_output_convolution(device: str) -> None:
    module = layer(device, kernel_size=1)
    x = torch.randn(1, 20, 5, 6, device=device, dtype=torch.float64)
    assert_matches(module(x), module.output(x).detach().cpu())


def test_weights_depend_on_the_content(device: str) -> None:
    """Unlike a convolution, the layer can average within regions without mixing values across their edges."""
    module = layer(device, channels=8, kernel_size=5, prior="none")
    nn.init.zeros_(module.query.bias), nn.init.zeros_(module.key.bias)
    for conv in (module.query, module.key):
        nn.init.zeros_(conv.weight)
        conv.weight.data[:, 0] = 100.0  # the first channel identifies the region
    nn.init.dirac_(module.output.weight), nn.init.zeros_(module.output.bias)
    region = (torch.arange(12, device=device) >= 5).double().expand(9, 12)
    x = torch.cat([region[None], region.expand(7, 9, 12) * 10 + 0.1 * torch.randn(7, 9, 12, device=device)])[None]
    output = module(x)[0, 1:]
    assert (output[..., :5].abs() < 0.5).all() and ((output[..., 5:] - 10).abs() < 0.5).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_in_training(autocast: bool, device: str, fresh_compiler: None) -> None:
    """The compiled layer keeps the channels_last format, and all its parameters get gradients, also under autocast."""
    module = layer(device, torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 20, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        expected, actual = module(x), compiled(x)
    assert actual.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected)
    actual.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be an int from 1"),
        ({"kernel_size": 64}, ValueError, "kernel_size must be an int from 1 to 63, got 64"),
        ({"stride": 1.5}, TypeError, "stride must be an int .*got 1.5"),
        ({"channels_per_group": 0}, ValueError, "channels_per_group must be .*got 0"),
        ({"prior": "learned"}, ValueError, 'prior must be "network", "table" or "none", got \'learned\''),
        ({"similarity": "cosine"}, ValueError, "similarity must be .*got 'cosine'"),
        ({"border": "pad"}, ValueError, 'border must be "mask" or "zero", got \'pad\''),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"relops.nn.LocalRelation: {message}"):
        layer(**options)


def test_bad_input() -> None:
    module = layer()
    with pytest.raises(
        ValueError, match=r"LocalRelation: input must be \[N,C,H,W\] with C = 20, got shape \[1, 8, 4, 4\]"
    ):
        module(torch.zeros(1, 8, 4, 4))
    with pytest.raises(TypeError, match="LocalRelation: input must be float64"):
        module(torch.zeros(1, 20, 4, 4, dtype=torch.int64))


# ---- The networks ----


@pytest.mark.parametrize(
    ("make", "parameters", "multiply_adds"),
    [(relops.models.lr_net26, 14.7e6, 2.6e9), (relops.models.lr_net50, 23.3e6, 4.3e9)],
    ids=["26", "50"],
)
def test_sizes_match_the_paper(make, parameters: float, multiply_adds: float) -> None:
    """The sizes for 224 x 224 images differ by at most 1.5 % from the paper's.

    The count of multiply-adds includes convolutions, the aggregation of values, and the classifier.
    """

    def aggregation(query, key, value, prior, kernel_size, *settings, out_shape, **_):
        return 2 * kernel_size**2 * out_shape.numel()

    with torch.device("meta"):
        network, image = make().eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.relops.local_relation: aggregation}) as counter:
        output = network(image)
    assert output.shape == (1, 1000)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.015)
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.015)


def test_shapes_of_stage_maps() -> None:
    network = relops.models.LRNet((1, 2), (12, 20), 7, stem_channels=8, kernel_size=3).eval()
    maps = network.stage_maps(torch.randn(2, 3, 33, 50))
    assert [list(x.shape) for x in maps] == [[2, 32, 9, 13], [2, 64, 5, 7]] and network.channels == [32, 64]
    assert network(torch.randn(2, 3, 33, 50)).shape == (2, 7)
    with pytest.raises(ValueError, match="blocks and widths must have one number for each stage"):
        relops.models.LRNet((1, 2), (12,))


def small() -> relops.models.LRNet:
    return relops.models.LRNet((1, 1), (16, 24), 4, in_channels=1, stem_channels=16, kernel_size=5, expansion=2)


def test_gradients_reach_every_parameter(device: str) -> None:
    network = small().to(device)
    for name, parameter in network.named_parameters():
        if name.endswith("bn3.weight"):  # with its initial value, zero, the layers of the block would get no gradients
            nn.init.ones_(parameter)
    network(torch.randn(8, 1, 32, 32, device=device)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def draw_bars(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images [count,1,16,16] that contain a bright bar, and the directions of the bars, numbered from 0 to 3."""
    images = 0.3 * torch.randn(count, 1, 16, 16, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    center = torch.randint(3, 13, (count, 2, 1), generator=generator)
    direction = torch.tensor([[0, 1], [1, 0], [1, 1], [1, -1]])[labels, :, None]
    y, x = ((center + direction * torch.arange(-3, 4)) % 16).unbind(1)  # [count,7]
    images[torch.arange(count)[:, None], 0, y, x] += 2.0
    return images, labels


def test_lr_net_learns_the_direction_of_a_bar(device: str) -> None:
    """The network must compare pixels, because a single pixel does not show the direction of a bar."""
    generator = torch.Generator().manual_seed(0)
    network = small().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(150):
        images, labels = (x.to(device) for x in draw_bars(64, generator))
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = (x.to(device) for x in draw_bars(400, generator))
    with torch.no_grad():
        accuracy = (network.eval()(images).argmax(1) == labels).double().mean().item()
    assert accuracy > 0.9


def test_digits_command_names_the_missing_package() -> None:
    """Without scikit-learn, the command explains how to install it."""
    done = run_python(
        "import sys; sys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None; sys.path.insert(0, '..');"
        "from benchmarks.lr_net_digits import digits; digits()"
    )
    assert done.returncode == 1 and "pip install -e '.[bench]'" in done.stderr
