"""DETR (Carion et al., End-to-End Object Detection with Transformers, https://arxiv.org/abs/2005.12872).

Parameters have the same names as in the released code, and `load_detr` loads a state_dict of the released code.
"""

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
    """An encoder layer (appendix A.3), in which every pixel attends to all pixels.

    Positional encodings are added to queries and keys, but not to values.
    """

    def __init__(self, channels: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__(channels, hidden, dropout)
        self.self_attn = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        query = x + positions
        attended = self.self_attn(query, query, x, key_padding_mask=padding, need_weights=False)[0]
        return self.norm2(self.feed_forward(self.norm1(x + self.dropout(attended))))


class DecoderLayer(FeedForward):
    """A decoder layer (appendix A.3), in which queries attend to each other and then to the encoder's output."""

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
        attended = self.multihead_attn(x + positions, keys, memory, key_padding_mask=padding, need_weights=False)[0]
        return self.norm3(self.feed_forward(self.norm2(x + self.dropout(attended))))


class Decoder(Layers):
    """The decoder layers, and the normalization of their outputs before the prediction heads."""

    def __init__(self, layers: Iterable[nn.Module], channels: int) -> None:
        super().__init__(layers)
        self.norm = nn.LayerNorm(channels)


class Transformer(nn.Module):
    """The encoder and the decoder. Each residual sum is followed by a normalization."""

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
    """The DETR detector.

    Args:
        num_classes: The number of object classes, without the background.
        backbone: A backbone with one map.
        transformer: The encoder and the decoder.
        queries: The number of object queries.
    """

    def __init__(self, num_classes: int, backbone: Backbone, transformer: Transformer, queries: int) -> None:
        # The weights of the class, L1 and GIoU terms in the loss and in the matching cost are from appendix A.4. The
        # weight of the background class is from section 3.1.
        super().__init__(SetLoss(focal=False, weights=(1.0, 5.0, 2.0), costs=(1.0, 5.0, 2.0), background=0.1))
        self.backbone, self.transformer = backbone, transformer
        channels = transformer.channels
        self.input_proj = nn.Conv2d(backbone.channels[0], channels, 1)
        self.query_embed = nn.Embedding(queries, channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.bbox_embed = MLP(channels, 4, 3)

    def predict(self, images: Tensor, sizes: Tensor) -> SetPrediction:
        # Encoder (section 3.2): a 1x1 convolution reduces the number of channels, and the positional encoding is fixed.
        x = self.input_proj(self.backbone(images)[0])
        extent = extent_of(images.shape, sizes, x.shape)
        positions = sine_positions(extent, x.shape[1], 0.0).flatten(1, 2).to(x.dtype)
        padding = extent.padding.flatten(1)
        x = x.flatten(2).transpose(1, 2)
        for layer in self.transformer.encoder.layers:
            x = layer(x, positions, padding)

        # Decoder: all objects are decoded in parallel, from queries that differ only in their learned positional
        # encodings.
        keys = x + positions
        object_queries = self.query_embed.weight.expand(images.shape[0], -1, -1)
        query, outputs = torch.zeros_like(object_queries), []
        for layer in self.transformer.decoder.layers:
            query = layer(query, object_queries, x, keys, padding)
            outputs.append(query)

        # All layers share the final normalization and the prediction heads.
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
    """Build DETR: a transformer that predicts a set of objects from learned queries.

    The transformer of the detector (Carion et al., https://arxiv.org/abs/2005.12872) has 8 attention heads. `load_detr`
    loads the weights of the released code and of Hugging Face transformers.

    Args:
        num_classes: Number of object classes, without the background. The released models for COCO have 91 classes.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26" or "lr_net50".
            ResNets accept a suffix that selects the normalization: "-bn" (batch normalization), "-frozen" (batch
            normalization with constant statistics and weights) or "-gn" (group normalization). After the normalization,
            a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2" (modulated deformable
            convolutions in all stages except the first). A number at the end of any name sets the width, that is, the
            number of channels of the stem (64 by default), as in "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the transformer, divisible by 8.
        hidden: Width of the feed-forward networks of the transformer.
        queries: Number of object queries, which is the number of predictions per image.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        dropout: Dropout probability in the transformer.
        stride: Stride of the feature map in pixels: 32, as published, or 16 or 8 for small images. With 16 or 8, the
            backbone has fewer stages.
        frozen_stages: Number of backbone stages that are not trained, counted from the input. The released code uses 1.

    Returns:
        A `DETR`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses "classes",
        "boxes" and "giou" of the last decoder layer. With more than one decoder layer, there is also the loss
        "auxiliary", the sum of the losses of all other layers. In evaluation mode, `detector(images, sizes)` returns
        `Detections` with at most min(queries, 100) objects per image. `images` is [N,3,H,W], `sizes` is [N,2] with the
        height and width of each image without padding (None if there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, or if group normalization does not support its width.
        ValueError: If `stride` is not 32, 16 or 8.
        ValueError: If `channels` is not divisible by 8.
        ValueError: If `dropout` is not between 0 and 1.

    Example:
        >>> import torch, relops
        >>> model = relops.models.detr(
        ...     3, backbone="resnet18", channels=32, hidden=64, queries=10, encoder_layers=1, decoder_layers=2
        ... )
        >>> images = torch.rand(1, 3, 64, 64)
        >>> targets = relops.models.Targets(torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]]))
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['auxiliary', 'boxes', 'classes', 'giou']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images)
        >>> detections.boxes.shape
        torch.Size([1, 10, 4])
    """
    if stride not in (8, 16, 32):
        raise ValueError(f"relops.models: stride must be 32, 16 or 8, got {stride}")
    if channels % 8:
        raise ValueError(f"relops.models: channels of detr must be divisible by 8, got {channels}")
    stages = stride.bit_length() - 2
    maps = StageBackbone(make_body(backbone, frozen_stages, stages=stages), [stages - 1])
    transformer = Transformer(channels, hidden, encoder_layers, decoder_layers, heads=8, dropout=dropout)
    return DETR(num_classes, maps, transformer, queries)
