"""Tests of DETR and Deformable DETR against Hugging Face transformers, and of loading weights from transformers and
from the released code."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import relops
from relops.models import Targets, load_detr
from relops.models.parts.boxes import corners_of

CLASSES, CHANNELS, HIDDEN, QUERIES, ENCODER, DECODER = 7, 32, 48, 20, 2, 3
SIZES = {
    "channels": CHANNELS,
    "hidden": HIDDEN,
    "queries": QUERIES,
    "encoder_layers": ENCODER,
    "decoder_layers": DECODER,
    "dropout": 0.0,
}
VARIANTS = {
    "detr": {},
    "single_scale": {"levels": 1},
    "deformable": {},
    "refine": {"refine": True},
    "two_stage": {"refine": True, "two_stage": True},
}


def ours(variant: str, backbone: str = "resnet18-frozen-16", **sizes: int) -> nn.Module:
    build = relops.models.detr if variant == "detr" else relops.models.deformable_detr
    return build(CLASSES, backbone=backbone, **SIZES | sizes, **VARIANTS[variant])


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


def randomize(model: nn.Module) -> nn.Module:
    """Randomize all parameters, so that each of them affects the result and no two are equal."""
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.dim() > 1:
                x.normal_(0, (2 if "backbone" in name else 1) ** 0.5 * x[0].numel() ** -0.5)
            elif name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
                x.uniform_(0.5, 1.5)
            else:
                x.normal_(0, 0.2)
    return model


def theirs(transformers: ModuleType, variant: str, **options: object) -> nn.Module:
    """Build the corresponding model of transformers.

    Its backbone is transformers' ResNet unless `options` specify another. Nothing is downloaded.
    """
    torch.manual_seed(0)
    stages = ["stage4"] if variant in ("detr", "single_scale") else ["stage2", "stage3", "stage4"]
    if not options:
        body = transformers.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 32, 64, 128],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=stages,
        )
        options = {"use_timm_backbone": False, "backbone_config": body}
    options |= {
        "d_model": CHANNELS,
        "encoder_layers": ENCODER,
        "decoder_layers": DECODER,
        "encoder_ffn_dim": HIDDEN,
        "decoder_ffn_dim": HIDDEN,
        "num_queries": QUERIES,
        "num_labels": CLASSES,
        "dropout": 0.0,
    }
    if variant == "detr":
        model = transformers.DetrForObjectDetection(transformers.DetrConfig(**options))
    else:
        our_options = VARIANTS[variant]
        config = transformers.DeformableDetrConfig(
            **options,
            num_feature_levels=our_options.get("levels", 4),
            with_box_refine=our_options.get("refine", False),
            two_stage=our_options.get("two_stage", False),
            two_stage_num_proposals=QUERIES,
            class_cost=2,
            auxiliary_loss=True,
        )
        model = transformers.DeformableDetrForObjectDetection(config)
        if variant == "refine":  # unlike the released code, transformers shares one classifier between layers
            model.class_embed = nn.ModuleList(copy.deepcopy(x) for x in model.class_embed)
    return randomize(model).eval().requires_grad_()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, transformers: ModuleType) -> tuple[str, nn.Module, nn.Module]:
    model = theirs(transformers, request.param)
    loaded = ours(request.param)
    load_detr(loaded, model.state_dict())
    return request.param, model, loaded.eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels of two images of odd sizes, their sizes, and the pixel mask of transformers. The second image
    is padded."""
    torch.manual_seed(1)
    images, mask = torch.randn(2, 3, 131, 170), torch.ones(2, 131, 170)
    mask[1, 100:] = mask[1, :, 121:] = 0
    return images * mask[:, None], torch.tensor([[131.0, 170], [100, 121]]), mask


def objects(sizes: Tensor) -> tuple[Targets, list[dict[str, Tensor]]]:
    """Return the same objects as targets of relops and as labels of transformers.

    The number of objects is so large that every cost affects the assignment.
    """
    counts = 14, 9
    center, size = 0.2 + 0.6 * torch.rand(2, 14, 2), 0.1 + 0.3 * torch.rand(2, 14, 2)
    relative = torch.cat([center, size], -1)
    valid = torch.arange(14) < torch.tensor(counts)[:, None]
    labels = torch.randint(CLASSES, (2, 14)).masked_fill(~valid, -1)
    boxes = corners_of(relative) * sizes.flip(1).repeat(1, 2)[:, None] * valid[..., None]
    their_labels = [{"class_labels": labels[i, :n], "boxes": relative[i, :n]} for i, n in enumerate(counts)]
    return Targets(boxes, labels), their_labels


def their_losses(model: nn.Module, variant: str, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the losses of all layers under the names that transformers gives them.

    If transformers' DETR computes auxiliary losses, it passes the normalized output of each layer to the next layer,
    unlike the released code. This function therefore records the outputs of DETR's layers and computes the losses from
    them.
    """
    images, _, mask = batch()
    if variant != "detr":
        return model(pixel_values=images, pixel_mask=mask, labels=labels).loss_dict
    states = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, x: states.append(x[0] if isinstance(x, tuple) else x))
        for layer in model.model.decoder.layers
    ]
    model(pixel_values=images, pixel_mask=mask)
    for hook in hooks:
        hook.remove()
    states = model.model.decoder.layernorm(torch.stack(states))
    logits, boxes = model.class_labels_classifier(states), model.bbox_predictor(states).sigmoid()
    config = copy.deepcopy(model.config)
    config.auxiliary_loss = True
    return model.loss_function(logits[-1], labels, model.device, boxes[-1], config, logits, boxes)[1]


def test_same_predictions(pair: tuple[str, nn.Module, nn.Module]) -> None:
    """Compare the predictions of a batch with padding and of an image without padding."""
    _, model, loaded = pair
    images, sizes, mask = batch()
    with torch.no_grad():
        for n in (slice(0, 2), slice(0, 1)):
            expected = model(pixel_values=images[n], pixel_mask=mask[n])
            actual = loaded.predict(images[n], sizes[n])
            assert actual.logits.shape[0] == 1 and expected.logits.std() > 0.1 and expected.pred_boxes.std() > 0.05
            torch.testing.assert_close(actual.logits[-1], expected.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(actual.boxes[-1], expected.pred_boxes, rtol=1e-4, atol=1e-4)


def test_same_losses_and_gradients(pair: tuple[str, nn.Module, nn.Module]) -> None:
    """Compare the losses of all layers and the gradients of all parameters.

    For models with two stages, the loss of the first stage is left out, because transformers does not compute it.
    """
    variant, model, loaded = pair
    images, sizes, _ = batch()
    targets, labels = objects(sizes)
    model.zero_grad()
    loaded.train().zero_grad()
    weights = (1 if variant == "detr" else 2), 5, 2
    found = their_losses(model, variant, labels)

    def layer(suffix: str) -> list[Tensor]:
        return [w * found[x + suffix] for w, x in zip(weights, ("loss_ce", "loss_bbox", "loss_giou"))]

    expected = dict(zip(("classes", "boxes", "giou"), layer("")))
    expected["auxiliary"] = sum(sum(layer(f"_{i}")) for i in range(DECODER - 1))
    losses = loaded(images, sizes, targets)
    assert ("encoder" in losses) == (variant == "two_stage")
    losses.pop("encoder", None)
    assert losses.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(losses[name], x, rtol=1e-5, atol=1e-5)

    sum(expected.values()).backward()
    sum(losses.values()).backward()
    loaded.eval()
    gradients = {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in model.named_parameters(remove_duplicate=False)
    }
    renamed = ours(variant)
    load_detr(renamed, model.state_dict() | gradients)
    num_with_gradient = 0
    for (name, x), (_, gradient) in zip(loaded.named_parameters(), renamed.named_parameters()):
        actual = torch.zeros_like(x) if x.grad is None else x.grad
        size = gradient.square().mean().sqrt()
        assert (actual - gradient).square().mean().sqrt() <= 1e-3 * size + 1e-7, name
        num_with_gradient += bool(size > 0)
    assert num_with_gradient > 0.8 * len(list(loaded.parameters()))


def test_saved_files_load(pair: tuple[str, nn.Module, nn.Module], tmp_path: Path) -> None:
    """Saved files use older parameter names and contain each shared parameter only once."""
    variant, model, loaded = pair
    safetensors = pytest.importorskip("safetensors.torch")
    model.save_pretrained(tmp_path)
    state_dict = safetensors.load_file(tmp_path / "model.safetensors")
    from_file = ours(variant)
    load_detr(from_file, state_dict)
    for name, x in loaded.state_dict().items():
        assert torch.equal(from_file.state_dict()[name], x), name


def test_timm_backbone(transformers: ModuleType) -> None:
    """Most checkpoints of transformers have a timm backbone."""
    pytest.importorskip("timm")
    model = theirs(transformers, "detr", backbone="resnet18")
    loaded = ours("detr", "resnet18-frozen").eval()
    load_detr(loaded, model.state_dict())
    images, sizes, mask = batch()
    with torch.no_grad():
        expected, actual = model(pixel_values=images, pixel_mask=mask), loaded.predict(images, sizes)
    torch.testing.assert_close(actual.logits[-1], expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.boxes[-1], expected.pred_boxes, rtol=1e-4, atol=1e-4)


# ---- Weights of the released code, without transformers ----


def linear(name: str, out_channels: int, in_channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_channels, in_channels), f"{name}.bias": (out_channels,)}


def norm(name: str, channels: int = CHANNELS) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def attention(name: str) -> dict[str, tuple[int, ...]]:
    projections = {f"{name}.in_proj_weight": (3 * CHANNELS, CHANNELS), f"{name}.in_proj_bias": (3 * CHANNELS,)}
    return projections | linear(f"{name}.out_proj", CHANNELS, CHANNELS)


def deformable_attention(name: str, levels: int) -> dict[str, tuple[int, ...]]:
    points = 8 * levels * 4
    return (
        linear(f"{name}.sampling_offsets", 2 * points, CHANNELS)
        | linear(f"{name}.attention_weights", points, CHANNELS)
        | linear(f"{name}.value_proj", CHANNELS, CHANNELS)
        | linear(f"{name}.output_proj", CHANNELS, CHANNELS)
    )


def released_body() -> dict[str, tuple[int, ...]]:
    """Return the parameter shapes of a ResNet-18 with a quarter of the usual width, under torchvision's names."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(conv: str, bn: str, out_channels: int, in_channels: int, kernel: int) -> None:
        shapes[f"backbone.0.body.{conv}.weight"] = (out_channels, in_channels, kernel, kernel)
        for end in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone.0.body.{bn}.{end}"] = (out_channels,)

    convolution("conv1", "bn1", 16, 3, 7)
    for i, width in enumerate((16, 32, 64, 128)):
        for j in range(2):
            block, in_width = f"layer{i + 1}.{j}", width // 2 if i and not j else width
            convolution(f"{block}.conv1", f"{block}.bn1", width, in_width, 3)
            convolution(f"{block}.conv2", f"{block}.bn2", width, width, 3)
            if in_width != width:
                convolution(f"{block}.downsample.0", f"{block}.downsample.1", width, in_width, 1)
    return shapes


def box_head(name: str) -> dict[str, tuple[int, ...]]:
    widths = [CHANNELS, CHANNELS, CHANNELS, 4]
    return {k: v for i in range(3) for k, v in linear(f"{name}.layers.{i}", widths[i + 1], widths[i]).items()}


def feed_forward(name: str) -> dict[str, tuple[int, ...]]:
    return linear(f"{name}.linear1", HIDDEN, CHANNELS) | linear(f"{name}.linear2", CHANNELS, HIDDEN)


def released(variant: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in the state_dict of the released code."""
    shapes = released_body()
    options = VARIANTS[variant]
    levels = options.get("levels", 4)
    for i in range(ENCODER):
        layer = f"transformer.encoder.layers.{i}"
        name = f"{layer}.self_attn"
        shapes |= attention(name) if variant == "detr" else deformable_attention(name, levels)
        shapes |= feed_forward(layer) | norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
    for i in range(DECODER):
        layer = f"transformer.decoder.layers.{i}"
        shapes |= attention(f"{layer}.self_attn") | feed_forward(layer)
        shapes |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2") | norm(f"{layer}.norm3")
        if variant == "detr":
            shapes |= attention(f"{layer}.multihead_attn")
        else:
            shapes |= deformable_attention(f"{layer}.cross_attn", levels)
    if variant == "detr":
        shapes |= {"query_embed.weight": (QUERIES, CHANNELS), "input_proj.weight": (CHANNELS, 128, 1, 1)}
        shapes |= {"input_proj.bias": (CHANNELS,)} | norm("transformer.decoder.norm")
        return shapes | linear("class_embed", CLASSES + 1, CHANNELS) | box_head("bbox_embed")

    shapes["transformer.level_embed"] = (levels, CHANNELS)
    kernels = [(128, 1)] if levels == 1 else [(32, 1), (64, 1), (128, 1), (128, 3)]
    for i, (channels, kernel) in enumerate(kernels):
        shapes[f"input_proj.{i}.0.weight"] = (CHANNELS, channels, kernel, kernel)
        shapes |= {f"input_proj.{i}.0.bias": (CHANNELS,)} | norm(f"input_proj.{i}.1")
    two_stage = "two_stage" in options
    for i in range(DECODER + two_stage):
        shapes |= linear(f"class_embed.{i}", CLASSES, CHANNELS) | box_head(f"bbox_embed.{i}")
        if "refine" in options:
            shapes |= box_head(f"transformer.decoder.bbox_embed.{i}")
    if not two_stage:
        return (
            shapes
            | {"query_embed.weight": (QUERIES, 2 * CHANNELS)}
            | linear("transformer.reference_points", 2, CHANNELS)
        )
    for i in range(DECODER + 1):
        shapes |= linear(f"transformer.decoder.class_embed.{i}", CLASSES, CHANNELS)
    shapes |= linear("transformer.enc_output", CHANNELS, CHANNELS) | norm("transformer.enc_output_norm")
    return (
        shapes
        | linear("transformer.pos_trans", 2 * CHANNELS, 2 * CHANNELS)
        | norm("transformer.pos_trans_norm", 2 * CHANNELS)
    )


def released_state(variant: str) -> dict[str, Tensor]:
    """Return a random state_dict of the released code. If a parameter has several names, their values are equal."""
    state = {name: torch.randn(shape) for name, shape in released(variant).items()}
    for name in state:
        shared = name.removeprefix("transformer.decoder.") if "_embed" in name else name
        if variant in ("deformable", "single_scale"):
            shared = re.sub(r"^(class_embed|bbox_embed)\.\d+", r"\1.0", shared)
        state[name] = state[shared]
    return state


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_weights_load(variant: str) -> None:
    """Every entry is loaded into its parameter, and every parameter gets an entry."""
    state = released_state(variant)
    model = ours(variant)
    load_detr(model, state)
    loaded = model.state_dict()
    names = {name: name.replace("backbone.0.", "backbone.") for name in state}
    names = {name: own for name, own in names.items() if not re.match(r"transformer\.decoder\.\w+_embed", own)}
    assert set(names.values()) == set(loaded)
    for name, own in names.items():
        assert torch.equal(state[name], loaded[own]), name


@pytest.mark.parametrize("variant", ["detr", "two_stage"])
def test_errors_name_weights_that_do_not_fit(variant: str) -> None:
    state = released_state(variant)
    name = "transformer.decoder.layers.2.norm3.weight"
    model = ours(variant)
    for change, message in (
        ({name: torch.zeros(9)}, rf"size mismatch for {name}: .*\[9\]"),
        ({name.replace("2", "3"): torch.zeros(9)}, f"Unexpected key.*{name.replace('2', '3')}"),
    ):
        with pytest.raises(RuntimeError, match=message):
            load_detr(model, state | change)
    del state[name]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        load_detr(model, state)


def test_errors_name_heads_of_another_variant() -> None:
    """Names and shapes alone do not show whether all layers share one head or each layer has its own head."""
    refined, plain = released_state("refine"), released_state("deformable")
    with pytest.raises(ValueError, match=r"class_embed\.1\.weight .* equal that of the first layer if refine is False"):
        load_detr(ours("deformable"), refined)
    with pytest.raises(ValueError, match="must have one head per layer if refine is True"):
        load_detr(ours("refine"), plain)
    name = "bbox_embed.1.layers.0.bias"
    with pytest.raises(ValueError, match=rf"{name} and transformer\.decoder\.{name} .* must be equal"):
        load_detr(ours("refine"), refined | {name: torch.zeros(CHANNELS)})


@pytest.mark.parametrize(
    ("build", "options", "count"),
    [
        (relops.models.detr, {}, 41302368),
        (relops.models.deformable_detr, {}, 39847265),
        (relops.models.deformable_detr, {"levels": 1}, 33844193),
    ],
)
def test_number_of_parameters(build: object, options: dict, count: int) -> None:
    """The number of trained parameters equals what the released code logs for COCO with a ResNet-50 whose stem and
    first stage are frozen."""
    with torch.device("meta"):
        model = build(91, frozen_stages=1, **options)
    assert sum(x.numel() for x in model.parameters() if x.requires_grad) == count


def test_compiles(fresh_compiler: None) -> None:
    """Inference of the two-stage model compiles to one graph.

    This model also refines boxes. test_detectors.py tests the other variants.
    """
    model = randomize(ours("two_stage", encoder_layers=1, decoder_layers=2)).eval()
    images, sizes, _ = batch()
    with torch.no_grad():
        expected = model(images, sizes)
        actual = torch.compile(model, fullgraph=True, backend="eager")(images, sizes)
    assert torch.equal(actual.labels, expected.labels)
    torch.testing.assert_close(actual.boxes, expected.boxes)
    torch.testing.assert_close(actual.scores, expected.scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 4}, "stride must be 32, 16 or 8, got 4"),
        ({"channels": 20}, "channels of detr must be divisible by 8, got 20"),
    ],
)
def test_options_of_detr_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relops.models.detr(CLASSES, backbone="resnet18-frozen-16", **options)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_stride_of_detr(stride: int) -> None:
    model = relops.models.detr(CLASSES, backbone="resnet18-frozen-16", **SIZES, stride=stride)
    assert model.backbone(torch.zeros(1, 3, 64, 96))[0].shape[2:] == (64 // stride, 96 // stride)
