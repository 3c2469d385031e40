"""A test that replaces the deformable attention in a detector of Hugging Face transformers with relops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import relops

transformers = pytest.importorskip("transformers")

H, W = 480, 640


@pytest.fixture(scope="module")
def detector() -> torch.nn.Module:
    """Return a Deformable DETR with four levels. Its weights are random, so nothing is downloaded."""
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=50,
        num_feature_levels=4,
        with_box_refine=True,
        dropout=0.0,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The initial values of these weights are zero, so every location would be exactly on a pixel center, where
            # the gradient of a location jumps.
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                parameter.normal_(std=0.05)
    return model


def photographs() -> dict[str, Tensor]:
    """Return two normalized images of smooth shapes and noise. The second is padded on the right and at the bottom."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(2, 3, 12, 16, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, (H, W), mode="bicubic")
    pixels += 0.1 * torch.randn(pixels.shape, generator=generator)
    mask = torch.ones(2, H, W, dtype=torch.int64)
    mask[1, 400:] = mask[1, :, 500:] = 0
    return {"pixel_values": pixels * mask[:, None], "pixel_mask": mask}


def outputs_and_gradients(model: torch.nn.Module, device: str) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(**{name: x.to(device) for name, x in photographs().items()})
    (outputs.logits.square().mean() + outputs.pred_boxes.square().mean()).backward()
    return {
        "logits": outputs.logits.detach(),
        "boxes": outputs.pred_boxes.detach(),
        "encoder": outputs.encoder_last_hidden_state.detach(),
    } | {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ("encoder_attn" in name or "self_attn.value_proj" in name or "class" in name)
    }


def test_detector_with_replaced_modules_is_equivalent(detector: torch.nn.Module, device: str) -> None:
    detector = detector.to(device)
    modules = [module for module in detector.modules() if type(module).__name__ == "MultiScaleDeformableAttention"]
    assert len(modules) == 4
    expected = outputs_and_gradients(detector, device)
    original, calls = type(modules[0]), []
    for module in modules:
        module.__class__ = relops.nn.MultiScaleDeformableAttention
        module.register_forward_hook(lambda module, arguments, output: calls.append(output))
    try:
        actual = outputs_and_gradients(detector, device)
    finally:
        for module in modules:
            module.__class__ = original
            module._forward_hooks.clear()
    assert len(calls) == 4
    assert len(expected) > 10
    for name, x in actual.items():
        difference = (x - expected[name]).square().mean().sqrt()
        assert difference <= 1e-4 * expected[name].square().mean().sqrt(), f"{name} differs by {difference}"
