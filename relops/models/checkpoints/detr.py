"""Loading of DETR and Deformable DETR weights from the released implementations and from Hugging Face transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from relops.models.checkpoints.renaming import Rules, rename_parameters
from relops.models.detectors.deformable_detr import DeformableDETR
from relops.models.detectors.detr import DETR

# These rules translate the names of all versions of transformers to those of the released implementations.
TRANSFORMERS: Rules = [
    (r"^model\.backbone\.(conv_encoder\.)?model\.", "backbone.body."),
    (r"^model\.input_proj(ection)?\.", "input_proj."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.", "transformer."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"^transformer\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"(layers\.\d+)\.(mlp\.)?fc([12])\.", r"\1.linear\3."),
    (r"_attn\.o_proj\.", "_attn.out_proj."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    # These rules are for the ResNet of transformers, which a model can use instead of timm's ResNet.
    (r"^backbone\.body\.embedder\.embedder\.convolution\.", "backbone.body.conv1."),
    (r"^backbone\.body\.embedder\.embedder\.normalization\.", "backbone.body.bn1."),
    (r"^backbone\.body\.encoder\.stages\.(\d+)\.layers\.", lambda x: f"backbone.body.layer{int(x[1]) + 1}."),
    (r"\.layer\.(\d+)\.convolution\.", lambda x: f".conv{int(x[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda x: f".bn{int(x[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
]
# The decoder layers of the released implementations have different names. The normalization after the self-attention is
# norm1 in DETR and norm2 in Deformable DETR.
DETR_DECODER: Rules = [
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".multihead_attn."),
]
DEFORMABLE_DECODER: Rules = [
    (r"\.self_attn_layer_norm\.", ".norm2."),
    (r"\.encoder_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn\.", ".cross_attn."),
]


def load_detr(model: DETR | DeformableDETR, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state_dict of DETR or Deformable DETR from the released code or from Hugging Face transformers.

    All variants of both detectors (https://arxiv.org/abs/2005.12872 and https://arxiv.org/abs/2010.04159) can be
    loaded. The released weights are loaded as follows::

        model = relops.models.detr(91)
        relops.models.load_detr(model, torch.load("detr-r50-e632da11.pth")["model"])

    Args:
        model: Detector built by `relops.models.detr` or `relops.models.deformable_detr` with the same sizes and options
            as the saved model. Its backbone must be a ResNet with frozen normalization.
        state_dict: Parameters of the released code (the entry "model" of its checkpoints), or of DetrForObjectDetection
            or DeformableDetrForObjectDetection from any version of transformers. Shared parameters may be stored only
            once, as in the files of transformers. A state_dict of relops is also accepted.

    Raises:
        RuntimeError: If a parameter is missing, unexpected or of the wrong shape. The message uses the parameter names
            of the released code, except that the backbone is called `backbone` instead of `backbone.0`.
        ValueError: If a head of Deformable DETR is stored twice with different values, or if the state_dict has one
            head for all layers and the model has one head per layer, or vice versa.

    Example:
        >>> import torch, relops
        >>> options = dict(backbone="resnet18-frozen-8", channels=16, hidden=32, encoder_layers=1, decoder_layers=1)
        >>> model, trained = relops.models.detr(3, **options), relops.models.detr(3, **options)
        >>> relops.models.load_detr(model, trained.state_dict())
        >>> torch.equal(model.class_embed.weight, trained.class_embed.weight)
        True
    """
    if any(name.startswith("model.") for name in state_dict):
        rules = [*TRANSFORMERS, *(DEFORMABLE_DECODER if isinstance(model, DeformableDETR) else DETR_DECODER)]
        state_dict = _merge_projections(rename_parameters(state_dict, rules))
    else:
        state_dict = rename_parameters(state_dict, [(r"^backbone\.0\.body\.", "backbone.body.")])
    if isinstance(model, DeformableDETR):
        state_dict = _expand_heads(state_dict, model)
    model.load_state_dict(state_dict)


def _merge_projections(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the projections of queries, keys and values, which torch's attention stores as one parameter."""
    for name in list(state_dict):
        if match := re.fullmatch(r"(.*_attn\.)q_proj\.(weight|bias)", name):
            names = [f"{match[1]}{x}_proj.{match[2]}" for x in "qkv"]
            if all(x in state_dict for x in names):
                state_dict[f"{match[1]}in_proj_{match[2]}"] = torch.cat([state_dict.pop(x) for x in names])
    return state_dict


def _expand_heads(state_dict: Mapping[str, Tensor], model: DeformableDETR) -> dict[str, Tensor]:
    """Return the state_dict with a single name for each head and a head for each layer.

    Heads that are stored inside the decoder get the names of the model's heads. If the state_dict has a head for the
    first layer only, all layers get a copy of it.
    """
    heads: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        head_name = re.sub(r"^transformer\.decoder\.(?=class_embed|bbox_embed)", "", name)
        if head_name in heads and not torch.equal(heads[head_name], value):
            raise ValueError(
                f"relops.models: {head_name} and transformer.decoder.{head_name} of state_dict must be equal"
            )
        heads[head_name] = value
    for head in ("class_embed", "bbox_embed"):
        first = {name: x for name, x in heads.items() if name.startswith(f"{head}.0.")}
        if not any(name.startswith(f"{head}.1.") for name in heads):
            layers = range(1, len(getattr(model, head)))
            heads |= {_name_in_layer(name, i): x for name, x in first.items() for i in layers}

    layer_heads = {name: x for name, x in heads.items() if re.match(r"(class|bbox)_embed\.\d", name)}
    differing = [name for name, x in layer_heads.items() if not torch.equal(x, heads.get(_name_in_layer(name, 0), x))]
    if differing and not model.refine:
        raise ValueError(
            f"relops.models: {differing[0]} of state_dict must equal that of the first layer if refine is False"
        )
    if not differing and model.refine and not model.two_stage and len(model.bbox_embed) > 1:
        raise ValueError("relops.models: bbox_embed of state_dict must have one head per layer if refine is True")
    return heads


def _name_in_layer(name: str, i: int) -> str:
    """Return the name that a head's parameter has in the i-th layer."""
    return re.sub(r"\d+", str(i), name, count=1)
