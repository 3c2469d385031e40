"""DETR (Carion et al., End-to-End Object Detection with Transformers, https://arxiv.org/abs/2005.12872). Names of
parameters are those of the released code, of which a state_dict loads through `load_detr`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from relops._dtypes import to_compute_dtype
from relops.models.backbones.base import Backbone
from relops.models.backbones.build import make_body
from relops.models.backbones.stages import StageBackbone
from relops.models.detectors.set_based import SetDetector
from relops.models.parts.set_prediction import SetLoss, SetPrediction
from relops.models.parts.transformer import MLP, FeedForward, Layers, extent_of, sine_positions, xavier_weights


class EncoderLayer(FeedForward):
    """Appendix A.3, encoder: every pixel asks every other. Positions count in queries and keys, not in values."""

    def __init__(self, channels: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__(channels, hidden, dropout)
        self.self_attn = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        query = x + positions
        told = self.self_attn(query, query, x, key_padding_mask=padding, need_weights=False)[0]
        return self.norm2(self.feed_forward(self.norm1(x + self.dropout(told))))


class DecoderLayer(FeedForward):
    """Appendix A.3, decoder: queries ask each other, then every pixel of the encoder's output."""

    def __init__(self, channels: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__(channels, hidden, dropout)
        self.self_attn = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(channels)
        self.multihead_attn = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
        query = x + positions
        x = self.norm1(x + self.dropout(self.self_attn(query, query, x, need_weights=False)[0]))
        told = self.multihead_attn(x + positions, keys, memory, key_padding_mask=padding, need_weights=False)[0]
        return self.norm3(self.feed_forward(self.norm2(x + self.dropout(told))))


class Decoder(Layers):
    """Layers, and the normalization of what each gives to the heads."""

    def __init__(self, layers: Iterable[nn.Module], channels: int) -> None:
        super().__init__(layers)
        self.norm = nn.LayerNorm(channels)


class Transformer(nn.Module):
    """The parameters between the map and the heads. Normalization follows each residual sum."""

    def __init__(
        self, channels: int, hidden: int, encoder_layers: int, decoder_layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.channels = channels
        sizes = channels, hidden, heads, dropout
        self.encoder = Layers(EncoderLayer(*sizes) for _ in range(encoder_layers))
        self.decoder = Decoder((DecoderLayer(*sizes) for _ in range(decoder_layers)), channels)
        xavier_weights(self)


class DETR(SetDetector):
    """See `detr`. `backbone` gives one map."""

    def __init__(self, num_classes: int, backbone: Backbone, transformer: Transformer, queries: int) -> None:
        # Appendix A.4: weights and costs of classes, L1 and GIoU; section 3.1: the background counts a tenth.
        super().__init__(SetLoss(focal=False, weights=(1.0, 5.0, 2.0), costs=(1.0, 5.0, 2.0), background=0.1))
        self.backbone, self.transformer = backbone, transformer
        channels = transformer.channels
        self.input_proj = nn.Conv2d(backbone.channels[0], channels, 1)
        self.query_embed = nn.Embedding(queries, channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.bbox_embed = MLP(channels, 4, 3)

    def predict(self, images: Tensor, sizes: Tensor) -> SetPrediction:
        # Section 3.2, encoder: of the pixels of a map of fewer channels, with a fixed encoding of where they are.
        x = self.input_proj(self.backbone(images)[0])
        extent = extent_of(images.shape, sizes, x.shape)
        positions = sine_positions(extent, x.shape[1], 0.0).flatten(1, 2).to(x.dtype)
        padding = extent.padding.flatten(1)
        x = x.flatten(2).transpose(1, 2)
        for layer in self.transformer.encoder.layers:
            x = layer(x, positions, padding)

        # Decoder: all objects at once, of queries that differ by a learned encoding only.
        keys = x + positions
        object_queries = self.query_embed.weight.expand(images.shape[0], -1, -1)
        query, outputs = torch.zeros_like(object_queries), []
        for layer in self.transformer.decoder.layers:
            query = layer(query, object_queries, x, keys, padding)
            outputs.append(query)

        # Prediction feed-forward networks, shared by all layers, and so is the normalization before them.
        states = self.transformer.decoder.norm(torch.stack(outputs if self.training else outputs[-1:]))
        return SetPrediction(self.class_embed(states), to_compute_dtype(self.bbox_embed(states)).sigmoid())


def detr(
    num_classes: int,
    *,
    backbone: str = "resnet50-frozen",
    channels: int = 256,
    hidden: int = 2048,
    queries: int = 100,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    dropout: float = 0.1,
    stride: int = 32,
    frozen_stages: int = 0,
) -> DETR:
    """DETR, with 8 heads.

    Args:
        num_classes: without the background. The released models for COCO have 91.
        backbone: a ResNet or LR-Net, as in `make_body`.
        channels: of the transformer; divisible by 8.
        hidden: of the layers' feed-forward networks.
        queries: predictions an image.
        encoder_layers, decoder_layers: how many.
        dropout: in the transformer.
        stride: of the map: 32, or, for small images, 16 or 8, with fewer stages.
        frozen_stages: of the backbone, not trained (the released code: 1).
    """
    if stride not in (8, 16, 32):
        raise ValueError(f"relops.models: stride must be 32, 16 or 8, got {stride}")
    if channels % 8:
        raise ValueError(f"relops.models: channels of detr must be divisible by 8, got {channels}")
    stages = stride.bit_length() - 2
    maps = StageBackbone(make_body(backbone, frozen_stages, stages=stages), [stages - 1])
    transformer = Transformer(channels, hidden, encoder_layers, decoder_layers, heads=8, dropout=dropout)
    return DETR(num_classes, maps, transformer, queries)
