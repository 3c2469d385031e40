"""Loading of weights of DETR and Deformable DETR, of the released codes and of Hugging Face transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from relops.models.checkpoints.renaming import Rules, renamed
from relops.models.detectors.deformable_detr import DeformableDETR
from relops.models.detectors.detr import DETR

# Names that transformers gives, in all of its versions, to those of the released codes.
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
    # Its own ResNet, which may be in the place of timm's.
    (r"^backbone\.body\.embedder\.embedder\.convolution\.", "backbone.body.conv1."),
    (r"^backbone\.body\.embedder\.embedder\.normalization\.", "backbone.body.bn1."),
    (r"^backbone\.body\.encoder\.stages\.(\d+)\.layers\.", lambda x: f"backbone.body.layer{int(x[1]) + 1}."),
    (r"\.layer\.(\d+)\.convolution\.", lambda x: f".conv{int(x[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda x: f".bn{int(x[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
]
# Where the released codes differ. Both decoders have self-attention first, but one has its normalization second.
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
    """Load a state_dict of DETR or Deformable DETR, in any of its variants, of the released code or of transformers.

    Args:
        model: `detr` or `deformable_detr` of the same sizes and options, on a ResNet with frozen normalization.
        state_dict: of the released code, whose checkpoints have it under "model", or of transformers'
            DetrForObjectDetection or DeformableDetrForObjectDetection of any version, also as its files have it, where
            of parameters that are shared only one is left.

    Raises:
        RuntimeError: a parameter that is missing, or left over, or of another shape, by its name in the released code
            (a body that is in `backbone.0` there is in `backbone` here).
        ValueError: a head of Deformable DETR that is there twice with different values, or heads that are one where
            the model has one a layer, or the other way round.

    Example:
        >>> model = relops.models.detr(91)
        >>> relops.models.load_detr(model, torch.load("detr-r50-e632da11.pth")["model"])
    """
    if any(name.startswith("model.") for name in state_dict):
        rules = [*TRANSFORMERS, *(DEFORMABLE_DECODER if isinstance(model, DeformableDETR) else DETR_DECODER)]
        state_dict = _with_one_projection(renamed(state_dict, rules))
    else:
        state_dict = renamed(state_dict, [(r"^backbone\.0\.body\.", "backbone.body.")])
    if isinstance(model, DeformableDETR):
        state_dict = _with_heads_of_layers(state_dict, model)
    model.load_state_dict(state_dict)


def _with_one_projection(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the projections of queries, keys and values, which torch's attention has as one."""
    for name in list(state_dict):
        if found := re.fullmatch(r"(.*_attn\.)q_proj\.(weight|bias)", name):
            three = [f"{found[1]}{x}_proj.{found[2]}" for x in "qkv"]
            if all(x in state_dict for x in three):
                state_dict[f"{found[1]}in_proj_{found[2]}"] = torch.cat([state_dict.pop(x) for x in three])
    return state_dict


def _with_heads_of_layers(state_dict: Mapping[str, Tensor], model: DeformableDETR) -> dict[str, Tensor]:
    """The heads of each layer by one name: the decoder's are the model's, and a first layer's alone are all layers'."""
    heads: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        own = re.sub(r"^transformer\.decoder\.(?=class_embed|bbox_embed)", "", name)
        if own in heads and not torch.equal(heads[own], value):
            raise ValueError(f"relops.models: {own} and transformer.decoder.{own} of state_dict must be equal")
        heads[own] = value
    for head in ("class_embed", "bbox_embed"):
        first = {name: x for name, x in heads.items() if name.startswith(f"{head}.0.")}
        if not any(name.startswith(f"{head}.1.") for name in heads):
            layers = range(1, len(getattr(model, head)))
            heads |= {_of_layer(name, i): x for name, x in first.items() for i in layers}

    of_layers = {name: x for name, x in heads.items() if re.match(r"(class|bbox)_embed\.\d", name)}
    differ = [name for name, x in of_layers.items() if not torch.equal(x, heads.get(_of_layer(name, 0), x))]
    if differ and not model.refine:
        raise ValueError(f"relops.models: {differ[0]} of state_dict must be the first layer's where refine is False")
    if not differ and model.refine and not model.two_stage and len(model.bbox_embed) > 1:
        raise ValueError("relops.models: bbox_embed of state_dict must have a head a layer where refine is True")
    return heads


def _of_layer(name: str, i: int) -> str:
    """The name of the same parameter of the head of the i-th layer."""
    return re.sub(r"\d+", str(i), name, count=1)
