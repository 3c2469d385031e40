"""Tests of the options of Deformable DETR against formulas of the paper. test_detectors_transformers.py compares whole
models with transformers."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relops.models import Targets, build
from relops.models.detectors.deformable_detr import DeformableDETR, inverse_sigmoid

SIZES = torch.tensor([[96.0, 128.0], [80.0, 100.0]])


def small(**options: object) -> DeformableDETR:
    torch.manual_seed(0)
    sizes = {"backbone": "resnet18-gn-16", "channels": 32, "hidden": 32, "encoder_layers": 1, "decoder_layers": 3}
    return build("deformable_detr", 3, queries=10, **sizes | options)


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 96, 128)


@pytest.mark.parametrize("levels, strides", [(1, [32]), (2, [16, 32]), (3, [8, 16, 32]), (5, [8, 16, 32, 64, 128])])
def test_strides_of_levels(levels: int, strides: list[int]) -> None:
    model = small(levels=levels)
    maps = model.levels(model.backbone(images()))
    assert [tuple(x.shape) for x in maps] == [(2, 32, math.ceil(96 / s), math.ceil(128 / s)) for s in strides]


def test_encoder_layer_with_one_level_equals_the_single_scale_formula() -> None:
    """Compare with equation 2: every pixel samples K points of its own map bilinearly.

    Linear layers compute the weights A_mqk and the offsets Delta p_mqk from the query.
    """
    model = small(levels=1).eval()
    layer = model.transformer.encoder.layers[0]
    attention = layer.self_attn
    torch.nn.init.normal_(attention.attention_weights.weight)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.3)
    (x,) = model.levels(model.backbone(images()))
    (N, C, h, w), M, K = x.shape, 8, 4
    z = x.flatten(2).transpose(1, 2)
    y, column = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    p = torch.stack([column, y], -1).view(1, h * w, 1, 1, 2)  # pixel centers, in pixels
    A = attention.attention_weights(z).view(N, h * w, M, K).softmax(-1)
    locations = p + attention.sampling_offsets(z).view(N, h * w, M, K, 2)
    value = attention.value_proj(z).view(N, h, w, M, C // M).permute(0, 3, 4, 1, 2).flatten(0, 1)
    grid = (2 * locations / torch.tensor([w, h]) - 1).transpose(1, 2).flatten(0, 1)
    sampled = F.grid_sample(value, grid, align_corners=False).view(N, M, C // M, h * w, K)
    expected = attention.output_proj(torch.einsum("nmcqk,nqmk->nqmc", sampled, A).flatten(2))

    reference = (p.view(1, h * w, 1, 2) / torch.tensor([w, h])).expand(N, -1, -1, -1)
    torch.testing.assert_close(attention(z, reference, z, [(h, w)]), expected, rtol=1e-4, atol=1e-5)
    padding = torch.zeros(N, h * w, dtype=torch.bool)
    found = layer(z, torch.zeros_like(z), reference, [(h, w)], padding)
    torch.testing.assert_close(found, layer.norm2(layer.feed_forward(layer.norm1(z + expected))), rtol=1e-4, atol=1e-5)


def test_initial_boxes_are_an_eighth_of_the_image_and_centered_on_their_references() -> None:
    model = small(refine=True).train()
    references = model.transformer.reference_points(model.query_embed.weight.chunk(2, -1)[0]).sigmoid()
    boxes = model.predict(images(), SIZES).boxes
    assert boxes.shape == (3, 2, 10, 4)
    torch.testing.assert_close(boxes[..., :2], references.expand(3, 2, -1, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes[..., 2:], torch.full((3, 2, 10, 2), 1 / (1 + math.exp(2))))


def test_refinement_updates_the_detached_box_of_the_previous_layer() -> None:
    """The box of layer d is sigmoid(delta + inverse_sigmoid(box of layer d - 1)), as section 4.2 of the paper defines.
    No gradient flows to the box of layer d - 1."""
    model = small(refine=True, dropout=0.0).train()
    for head in model.bbox_embed:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    deltas = []
    for head in model.bbox_embed:
        head.register_forward_hook(lambda _, __, output: deltas.append(output))
    boxes = model.predict(images(), SIZES).boxes
    for i in (1, 2):
        torch.testing.assert_close(boxes[i], (deltas[i] + inverse_sigmoid(boxes[i - 1])).sigmoid())
    assert torch.autograd.grad(boxes[2].sum(), deltas[1], retain_graph=True)[0].abs().sum() == 0
    assert torch.autograd.grad(boxes[2].sum(), deltas[2])[0].abs().sum() > 0


def test_without_refinement_all_layers_share_heads_and_references() -> None:
    model = small().eval()
    assert len({id(x) for x in model.bbox_embed}) == len({id(x) for x in model.class_embed}) == 1
    torch.nn.init.normal_(model.bbox_embed[0].layers[-1].weight, std=0.5)
    seen = []
    for layer in model.transformer.decoder.layers:
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    model.predict(images(), SIZES)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]) and seen[0].shape == (2, 10, 4, 2)
    # Reference points are relative to the padded maps. The second image covers 13 of 16 columns and 10 of 12 rows.
    assert (seen[0][1] / seen[0][0])[:, 0].tolist() == [pytest.approx([13 / 16, 10 / 12])] * 10


def test_two_stage_queries_are_the_pixels_with_the_best_scores() -> None:
    model = small(refine=True, two_stage=True).eval()
    torch.nn.init.normal_(model.bbox_embed[-1].layers[-1].weight, std=0.1)
    seen = []
    model.transformer.decoder.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    first = model.predict(images(), SIZES).first
    S = 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2
    assert first.logits.shape == (1, 2, S, 3) and first.boxes.shape == (1, 2, S, 4)
    best = first.logits[0, ..., 0].argsort(1, descending=True)[:, :10]
    chosen = first.boxes[0].gather(1, best[..., None].expand(-1, -1, 4))
    ratios = torch.tensor([[1, 1, 1, 1], [13 / 16, 10 / 12, 13 / 16, 10 / 12]])
    torch.testing.assert_close(seen[0][:, :, 0], chosen * ratios[:, None])
    # If all deltas are zero, each pixel proposes a square around its center. The side of the square doubles with each
    # level.
    torch.nn.init.zeros_(model.bbox_embed[-1].layers[-1].weight)
    boxes = model.predict(images(), SIZES).first.boxes[0, 0]
    torch.testing.assert_close(boxes[12 * 16 - 18], torch.tensor([14.5 / 16, 10.5 / 12, 0.05, 0.05]))
    torch.testing.assert_close(boxes[12 * 16 + 9], torch.tensor([1.5 / 8, 1.5 / 6, 0.1, 0.1]))


def test_encoder_loss_does_not_depend_on_classes() -> None:
    model = small(refine=True, two_stage=True).train()
    boxes = torch.tensor([[[8.0, 8, 60, 50]], [[20.0, 10, 90, 70]]])
    losses = [
        {name: loss.detach() for name, loss in model(images(), SIZES, Targets(boxes, torch.full((2, 1), c))).items()}
        for c in (0, 2)
        if torch.manual_seed(2)
    ]
    assert losses[0]["encoder"] == losses[1]["encoder"] and losses[0]["classes"] != losses[1]["classes"]


def test_export_with_any_number_of_images() -> None:
    model = small(refine=True, two_stage=True, decoder_layers=2).eval()
    count = torch.export.Dim("N", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images(), SIZES), dynamic_shapes=({0: count}, {0: count}))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        three = torch.randn(3, 3, 96, 128), torch.tensor([[96.0, 128.0], [50.0, 60.0], [96.0, 70.0]])
        for found, expected in zip(loaded(*three)[:3], model(*three)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"two_stage": True}, "two_stage of deformable_detr requires refine=True"),
        ({"channels": 40}, "divisible by 32, got 40"),
        ({"levels": 0}, "at least 1, got 0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("deformable_detr", 3, backbone="resnet18-gn-16", **options)
