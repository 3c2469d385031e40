"""Tests of Sparse R-CNN and nn.DynamicConv: comparison with step-by-step implementations, and released weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relops
from relops import reference
from relops.models import Targets
from relops.models.detectors.sparse_rcnn import SparseRCNN, initial_boxes, log_iou

# ---- nn.DynamicConv ----


def dynamic_conv_by_sums(module: relops.nn.DynamicConv, features: Tensor, regions: Tensor) -> Tensor:
    """Compute DynamicConv layer by layer, with separate axes for the rows and columns of a region."""
    R, C, S, _ = regions.shape
    D = module.dim_dynamic

    def normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        x = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return (x * norm.weight + norm.bias).clamp(min=0)

    filters = torch.einsum("rc,fc->rf", features, module.dynamic_layer.weight) + module.dynamic_layer.bias
    first, second = filters[:, : C * D].reshape(R, C, D), filters[:, C * D :].reshape(R, D, C)
    x = normalized(torch.einsum("rcyx,rcd->ryxd", regions, first), module.norm1)
    x = normalized(torch.einsum("ryxd,rdc->ryxc", x, second), module.norm2)
    weight = module.out_layer.weight.view(C, S, S, C)
    return normalized(torch.einsum("ryxc,oyxc->ro", x, weight) + module.out_layer.bias, module.norm3)


def dynamic_conv(device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[relops.nn.DynamicConv, list[Tensor]]:
    """Return a module whose norms have random parameters, and inputs for 5 proposals."""
    module = relops.nn.DynamicConv(12, 4, 3).to(device, dtype)
    for norm in (module.norm1, module.norm2, module.norm3):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    shapes = (5, 12), (5, 12, 3, 3)
    return module, [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_dynamic_conv_equals_its_definition(layout: torch.memory_format, device: str) -> None:
    module, (features, regions) = dynamic_conv(device)
    regions = regions.detach().contiguous(memory_format=layout).requires_grad_()
    actual, expected = module(features, regions), dynamic_conv_by_sums(module, features, regions)
    torch.testing.assert_close(actual, expected)
    needs_grad, grad = [features, regions, *module.parameters()], torch.randn_like(actual)
    for a, e in zip(torch.autograd.grad(actual, needs_grad, grad), torch.autograd.grad(expected, needs_grad, grad)):
        torch.testing.assert_close(a, e)


def test_dynamic_conv_without_proposals(device: str) -> None:
    module, inputs = dynamic_conv(device)
    features, regions = (x[:0].detach().requires_grad_() for x in inputs)
    output = module(features, regions)
    assert output.shape == (0, 12)
    output.sum().backward()
    assert regions.grad.shape == regions.shape and not module.out_layer.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dynamic_conv_in_16_bits(dtype: torch.dtype, device: str) -> None:
    """Test a 16-bit module, and a float32 module under autocast with 16-bit regions."""
    module, (features, regions) = dynamic_conv(device, torch.float32)
    expected = module(features, regions)
    with torch.autocast(device, dtype):
        torch.testing.assert_close(module(features, regions.to(dtype)).float(), expected, rtol=0.05, atol=0.1)
    actual = module.to(dtype)(features.to(dtype), regions.to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.1)


def test_dynamic_conv_has_the_released_parameters() -> None:
    assert {name: tuple(x.shape) for name, x in relops.nn.DynamicConv().state_dict().items()} == {
        "dynamic_layer.weight": (2 * 256 * 64, 256),
        "dynamic_layer.bias": (2 * 256 * 64,),
        "norm1.weight": (64,),
        "norm1.bias": (64,),
        "norm2.weight": (256,),
        "norm2.bias": (256,),
        "out_layer.weight": (256, 12544),
        "out_layer.bias": (256,),
        "norm3.weight": (256,),
        "norm3.bias": (256,),
    }


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((5, 9), (5, 12, 3, 3)), "dd", r"features must be \[R,C\] with C = 12, got shape \[5, 9\]"),
        (((1, 5, 12), (5, 12, 3, 3)), "dd", r"features must be \[R,C\] with C = 12"),
        (
            ((5, 12), (4, 12, 3, 3)),
            "dd",
            r"regions must be .* = \[5,12,3,3\], got shape \[4, 12, 3, 3\]",
        ),
        (((5, 12), (5, 12, 9)), "dd", r"regions must be \[R,C,size,size\]"),
        (((5, 12), (5, 12, 3, 3)), "df", "regions must be torch.float64, the dtype of features, got torch.float32"),
    ],
)
def test_dynamic_conv_rejects_bad_inputs(shapes: tuple, dtypes: str, message: str) -> None:
    module, _ = dynamic_conv()
    inputs = [torch.randn(shape, dtype={"d": torch.float64, "f": torch.float32}[d]) for shape, d in zip(shapes, dtypes)]
    with pytest.raises((ValueError, TypeError), match="relops.nn.DynamicConv: " + message):
        module(*inputs)


def test_dynamic_conv_rejects_bad_sizes() -> None:
    with pytest.raises(ValueError, match=r"relops\.nn\.DynamicConv: size must be an int from 1"):
        relops.nn.DynamicConv(size=0)


# ---- Proposals ----


def model(**options: object) -> SparseRCNN:
    torch.manual_seed(0)
    small = {"backbone": "resnet18-gn-16", "channels": 32, "hidden": 48, "proposals": 10, "stages": 3, "init": "random"}
    return relops.models.sparse_rcnn(3, **small | options)


def batch() -> tuple[Tensor, Tensor, Targets]:
    """Return two images, the second of which is padded."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, 192, 256)
    images[1, :, 160:] = images[1, :, :, 200:] = 0
    boxes = torch.tensor([[[8.0, 8, 60, 50], [70, 20, 240, 180]], [[20, 10, 90, 70], [0, 0, 0, 0]]])
    return images, torch.tensor([[192.0, 256], [160, 200]]), Targets(boxes, torch.tensor([[0, 2], [1, -1]]))


def test_initial_boxes_cover_the_image_or_its_center() -> None:
    assert initial_boxes("image", 3).tolist() == [[0.5, 0.5, 1, 1]] * 3
    torch.testing.assert_close(initial_boxes("center", 2), torch.tensor([[0.5, 0.5, 0.1, 0.1]] * 2))
    assert model(init="image").init_proposal_boxes.weight.tolist() == [[0.5, 0.5, 1, 1]] * 10


def test_random_initial_boxes() -> None:
    boxes = initial_boxes("random", 5000)
    assert boxes.min() > 0 and boxes.max() < 1
    logits = boxes.logit()
    assert logits.mean(0).abs().max() < 0.06 and (logits.std(0) - 1).abs().max() < 0.05
    assert not torch.equal(boxes, initial_boxes("random", 5000))


@pytest.mark.parametrize("proposals", [1, 2, 7, 80, 100])
def test_initial_boxes_of_a_grid_cover_the_image(proposals: int) -> None:
    boxes = initial_boxes("grid", proposals)
    assert boxes.shape == (proposals, 4)
    assert boxes[:, 2:].prod(1).sum().item() == pytest.approx(1)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    assert corners.min() > -1e-6 and corners.max() < 1 + 1e-6
    overlaps = relops.box_iou(corners, corners).fill_diagonal_(0)
    assert overlaps.max() < 1e-4
    assert (boxes[:, 2] / boxes[:, 3]).min() > 0.4 and (boxes[:, 2] / boxes[:, 3]).max() < 2.5


def test_first_regions_exclude_padding() -> None:
    module, seen = model(init="image", stages=1).eval(), []
    module.head.box_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    images, sizes, _ = batch()
    with torch.no_grad():
        module(images, sizes)
    assert seen[0].tolist() == [[0, 0, 0, 256, 192]] * 10 + [[1, 0, 0, 200, 160]] * 10


# ---- Stages ----


def test_decode_by_hand() -> None:
    """The deltas of the center are halved. Those of the size are not halved, but they are bounded."""
    boxes = torch.tensor([[[10.0, 20, 30, 60]] * 2])
    deltas = torch.tensor([[[1.0, -0.5, math.log(2), math.log(0.5)], [0, 0, 100, 0]]])
    stage = model().head.head_series[0]
    stage.bboxes_delta.register_forward_hook(lambda *_: deltas)
    C = stage.bboxes_delta.in_features
    _, actual, _ = stage(torch.randn(1, 2, C), torch.randn(2, C, 7, 7), boxes)
    half_width = 20 * 1e5 / 16 / 2
    expected = torch.tensor([[[10.0, 20, 50, 40], [20 - half_width, 20, 20 + half_width, 60]]])
    torch.testing.assert_close(actual, expected)


def predict_step_by_step(module: SparseRCNN, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the logits of all stages, and their boxes in pixels, with plain layers, one image at a time."""
    maps = [x.double() for x in module.backbone(images)][:4]
    params = {name: p.double() for name, p in module.named_parameters()}
    logits, found = [], []
    for n, (height, width) in enumerate(sizes.tolist()):
        x, y, w, h = params["init_proposal_boxes.weight"].unbind(1)
        boxes = torch.stack([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], 1)
        f = params["init_proposal_features.weight"]
        C = f.shape[1]
        logits.append([])
        found.append([])
        for stage, head in enumerate(module.head.head_series):
            p = {k.removeprefix(f"head.head_series.{stage}."): v for k, v in params.items() if f".{stage}." in k}

            def linear(x: Tensor, name: str, p: dict[str, Tensor] = p) -> Tensor:
                return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

            def norm(x: Tensor, name: str, p: dict[str, Tensor] = p) -> Tensor:
                return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"])

            rows = torch.cat([torch.zeros(len(boxes), 1).double(), boxes], 1)
            regions = reference.multi_scale_roi_align(
                [x[n : n + 1] for x in maps], rows, 7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2, True
            )
            q, k, v = F.linear(f, p["self_attn.in_proj_weight"], p["self_attn.in_proj_bias"]).split(C, 1)
            q, k, v = (x.view(-1, 8, C // 8).transpose(0, 1) for x in (q, k, v))
            weights = (q @ k.transpose(1, 2) / math.sqrt(C // 8)).exp()
            if module.head.iou_attention:
                weights = weights * reference.box_iou(boxes, boxes).clamp(min=1e-6)
            weights = weights / weights.sum(-1, keepdim=True)
            f = norm(f + linear((weights @ v).transpose(0, 1).reshape(-1, C), "self_attn.out_proj"), "norm1")
            interaction = relops.nn.DynamicConv(C, C // 4).double()
            interaction.load_state_dict(head.inst_interact.state_dict())
            f = norm(f + dynamic_conv_by_sums(interaction, f, regions), "norm2")
            f = norm(f + linear(linear(f, "linear1").relu(), "linear2"), "norm3")
            class_features = norm(linear(f, "cls_module.0"), "cls_module.1").relu()
            box_features = f
            for i in (0, 3, 6):
                box_features = norm(linear(box_features, f"reg_module.{i}"), f"reg_module.{i + 1}").relu()
            dx, dy, dw, dh = linear(box_features, "bboxes_delta").unbind(1)
            x1, y1, x2, y2 = boxes.unbind(1)
            x, y = (x1 + x2) / 2 + dx / 2 * (x2 - x1), (y1 + y2) / 2 + dy / 2 * (y2 - y1)
            w, h = (x2 - x1) * dw.exp(), (y2 - y1) * dh.exp()
            boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
            logits[-1].append(linear(class_features, "class_logits"))
            found[-1].append(boxes)
    return torch.stack([torch.stack(x) for x in logits], 1), torch.stack([torch.stack(x) for x in found], 1)


def with_small_deltas(module: SparseRCNN) -> SparseRCNN:
    """Scale down the deltas, so that boxes stay in the image, and make the logits differ more."""
    for head in module.head.head_series:
        head.bboxes_delta.weight.data.mul_(0.2)
        nn.init.normal_(head.class_logits.weight)
    return module


@pytest.mark.parametrize("iou_attention", [False, True])
def test_stages_equal_their_definition(iou_attention: bool) -> None:
    module, (images, sizes, _) = with_small_deltas(model(iou_attention=iou_attention)), batch()
    with torch.no_grad():
        prediction = module.predict(images, sizes)
        logits, boxes = predict_step_by_step(module, images, sizes)
        boxes = boxes / torch.tensor([[256.0, 192, 256, 192], [200, 160, 200, 160]])[:, None].double()
        torch.testing.assert_close(prediction.logits.double(), logits, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(prediction.boxes.double(), boxes, rtol=1e-5, atol=1e-5)
        last = module.eval().predict(images, sizes)
    assert last.logits.shape == (1, 2, 10, 3) and last.boxes.shape == (1, 2, 10, 4)
    torch.testing.assert_close(last.logits[0], prediction.logits[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.boxes[0], prediction.boxes[2], rtol=1e-4, atol=1e-5)


def test_gradients_flow_between_stages_through_features_but_not_through_boxes() -> None:
    module = with_small_deltas(model())
    prediction = module.predict(*batch()[:2])
    first, second, _ = module.head.head_series
    needs_grad = [first.bboxes_delta.weight, module.init_proposal_boxes.weight]
    needs_grad += [first.inst_interact.dynamic_layer.weight, module.init_proposal_features.weight]
    gradients = torch.autograd.grad(prediction.boxes[0].sum(), needs_grad, retain_graph=True)
    assert all(x.abs().max() > 0 for x in gradients)
    delta_grad, initial_grad, *feature_grads = torch.autograd.grad(
        prediction.boxes[1].sum() + prediction.logits[1].sum(), needs_grad, retain_graph=True
    )
    assert not delta_grad.any() and not initial_grad.any()
    assert all(x.abs().max() > 0 for x in feature_grads)
    (pooling_grad,) = torch.autograd.grad(prediction.logits.sum(), needs_grad[1], allow_unused=True)
    assert pooling_grad is None  # no gradient flows through the pooling to the boxes
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_proposals_without_area_or_overlap_attend_only_to_themselves(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[[0.0, 0, 8, 8], [4, 0, 12, 8], [100, 100, 120, 120], [3, 3, 3, 3]]])
    bias = log_iou(boxes).to(dtype)
    weights = bias.float().softmax(-1)
    assert bias.isfinite().all() and weights.shape == (8, 4, 4)
    torch.testing.assert_close(weights[5, 0], torch.tensor([0.75, 0.25, 0, 0]), rtol=0, atol=1e-2)
    torch.testing.assert_close(weights[:, 2:], torch.eye(4)[2:].expand(8, 2, 4), rtol=0, atol=1e-4)
    module, (images, sizes, targets) = model(iou_attention=True, init="grid").to(dtype), batch()
    sum(module(images.to(dtype), sizes, targets).values()).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


def test_initial_boxes_receive_the_gradient_of_the_first_stage() -> None:
    """If all deltas are zero, the first stage returns the initial boxes and passes their gradients on unchanged."""
    module = model(stages=1)
    for parameter in module.head.head_series[0].bboxes_delta.parameters():
        nn.init.zeros_(parameter)
    images, sizes, _ = batch()
    boxes = module.predict(images, sizes).boxes[0]
    x, y, w, h = module.init_proposal_boxes.weight.unbind(1)
    torch.testing.assert_close(boxes, torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).expand(2, -1, -1))
    (gradient,) = torch.autograd.grad(boxes.sum(), module.init_proposal_boxes.weight)
    # A coordinate of a center moves both corners in each of the two images, so its gradient is 4. A width or height
    # moves the two corners in opposite directions, so its gradient is 0.
    torch.testing.assert_close(gradient, torch.tensor([[4.0, 4, 0, 0]]).expand(10, 4))


def test_initial_class_probability_is_one_percent() -> None:
    module = model()
    for head in module.head.head_series:
        torch.testing.assert_close(head.class_logits.bias.sigmoid(), torch.full((3,), 0.01))
    assert set(module(*batch())) == {"classes", "boxes", "giou", "auxiliary"}


def test_lr_net_as_backbone() -> None:
    module = model(backbone="lr_net26", channels=16, stages=1, frozen_stages=1)
    frozen = [p for x in module.backbone.body.parts()[0] for p in x.parameters()]
    sum(module(*batch()).values()).backward()
    assert frozen and all(p.grad is None for p in frozen)
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 36}, "channels must be divisible by 8, got 36"),
        ({"init": "cells"}, 'init must be "image", "center", "grid" or "random", got \'cells\''),
        ({"stages": 0}, "stages must be an int from 1"),
        ({"proposals": 0}, "proposals must be an int from 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="relops.models: " + message):
        model(**options)


# ---- Released parameters ----


def released(module: SparseRCNN, stages: int = 6) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yield the name and shape of every entry of a released state_dict (ResNet-50, 80 classes, 100 proposals), as its
    layout prescribes, and the parameter that the entry belongs to."""

    def normalized(name: str, conv: nn.Module, norm: nn.Module, *shape: int) -> Iterator:
        yield f"{name}.weight", shape, conv.weight
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.norm.{statistic}", shape[:1], getattr(norm, statistic)

    def both(name: str, layer: nn.Module, *shape: int) -> Iterator:
        yield f"{name}.weight", shape, layer.weight
        yield f"{name}.bias", shape[:1], layer.bias

    yield "init_proposal_features.weight", (100, 256), module.init_proposal_features.weight
    yield "init_proposal_boxes.weight", (100, 4), module.init_proposal_boxes.weight
    body = module.backbone.body
    yield from normalized("backbone.bottom_up.stem.conv1", body.conv1, body.bn1, 64, 3, 7, 7)
    before = 64
    layers = (body.layer1, 3), (body.layer2, 4), (body.layer3, 6), (body.layer4, 3)
    for stage, (layer, blocks) in enumerate(layers):
        inner, outer = 64 * 2**stage, 256 * 2**stage
        for i in range(blocks):
            block, name = layer[i], f"backbone.bottom_up.res{stage + 2}.{i}"
            if i == 0:
                yield from normalized(f"{name}.shortcut", *block.downsample, outer, before, 1, 1)
            yield from normalized(f"{name}.conv1", block.conv1, block.bn1, inner, before, 1, 1)
            yield from normalized(f"{name}.conv2", block.conv2, block.bn2, inner, inner, 3, 3)
            yield from normalized(f"{name}.conv3", block.conv3, block.bn3, outer, inner, 1, 1)
            before = outer
        fpn = module.backbone.fpn
        yield from both(f"backbone.fpn_lateral{stage + 2}", fpn.inner_blocks[stage][0], 256, outer, 1, 1)
        yield from both(f"backbone.fpn_output{stage + 2}", fpn.layer_blocks[stage][0], 256, 256, 3, 3)
    for i in range(stages):
        head, name = module.head.head_series[i], f"head.head_series.{i}"
        yield f"{name}.self_attn.in_proj_weight", (768, 256), head.self_attn.in_proj_weight
        yield f"{name}.self_attn.in_proj_bias", (768,), head.self_attn.in_proj_bias
        yield from both(f"{name}.self_attn.out_proj", head.self_attn.out_proj, 256, 256)
        interaction = head.inst_interact
        yield from both(f"{name}.inst_interact.dynamic_layer", interaction.dynamic_layer, 32768, 256)
        yield from both(f"{name}.inst_interact.norm1", interaction.norm1, 64)
        yield from both(f"{name}.inst_interact.norm2", interaction.norm2, 256)
        yield from both(f"{name}.inst_interact.out_layer", interaction.out_layer, 256, 12544)
        yield from both(f"{name}.inst_interact.norm3", interaction.norm3, 256)
        yield from both(f"{name}.linear1", head.linear1, 2048, 256)
        yield from both(f"{name}.linear2", head.linear2, 256, 2048)
        for norm in ("norm1", "norm2", "norm3"):
            yield from both(f"{name}.{norm}", getattr(head, norm), 256)
        for tower, depth in (("cls_module", 1), ("reg_module", 3)):
            for j in range(0, 3 * depth, 3):
                yield f"{name}.{tower}.{j}.weight", (256, 256), getattr(head, tower)[j].weight
                yield from both(f"{name}.{tower}.{j + 1}", getattr(head, tower)[j + 1], 256)
        yield from both(f"{name}.class_logits", head.class_logits, 80, 256)
        yield from both(f"{name}.bboxes_delta", head.bboxes_delta, 4, 256)


def test_released_parameters_load() -> None:
    module = relops.models.sparse_rcnn(80)
    entries = list(released(module))
    state = {name: torch.rand(shape) for name, shape, _ in entries}
    assert len(entries) == len(state) == 523
    assert sum(x.numel() for x in state.values()) == pytest.approx(106.3e6, abs=0.05e6)
    relops.models.load_sparse_rcnn(module, state)
    for name, _, parameter in entries:
        assert torch.equal(parameter, state[name]), name
    assert len({id(parameter) for *_, parameter in entries}) == len(module.state_dict()) == 523


def test_errors_name_missing_and_unexpected_parameters() -> None:
    """Error messages use the names of relops, including the names of the backbone's parameters."""
    module = relops.models.sparse_rcnn(80, stages=1)
    state = {name: torch.rand(shape) for name, shape, _ in released(module, stages=1)}
    for name, ours in (
        ("backbone.bottom_up.res3.0.shortcut.norm.bias", "backbone.body.layer2.0.downsample.1.bias"),
        ("backbone.bottom_up.stem.conv1.norm.running_var", "backbone.body.bn1.running_var"),
        ("backbone.fpn_output5.bias", "backbone.fpn.layer_blocks.3.0.bias"),
        ("head.head_series.0.cls_module.1.weight", "head.head_series.0.cls_module.1.weight"),
    ):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{ours}"'):
            relops.models.load_sparse_rcnn(module, {k: v for k, v in state.items() if k != name})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"head\.other"'):
        relops.models.load_sparse_rcnn(module, state | {"head.other": torch.rand(1)})
