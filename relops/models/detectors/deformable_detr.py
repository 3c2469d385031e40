"""Deformable DETR (Zhu et al., https://arxiv.org/abs/2010.04159): DETR whose attention looks at a few points of each
level of a pyramid, with iterative bounding box refinement and two stages. Names of parameters are those of the released
code, of which a state_dict loads through `load_detr`."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._dtypes import compute_dtype, to_compute_dtype
from relops.models.backbones.base import Backbone
from relops.models.backbones.build import make_body
from relops.models.backbones.stages import StageBackbone
from relops.models.detectors.set_based import SetDetector
from relops.models.initialization import zero_bias
from relops.models.parts.padding import gather_rows
from relops.models.parts.set_prediction import SetLoss, SetPrediction, set_prior
from relops.models.parts.transformer import (
    MLP,
    Extent,
    FeedForward,
    Layers,
    extent_of,
    sine_positions,
    sinusoid,
    xavier_weights,
)
from relops.nn.ms_deform_attn import MSDeformAttn

Shapes = list[tuple[int, int]]


def inverse_sigmoid(x: Tensor) -> Tensor:
    return torch.logit(x, eps=1e-5)


class EncoderLayer(FeedForward):
    """Section 4.1, encoder: every pixel of every level asks a few points of each level around itself."""

    def __init__(self, channels: int, hidden: int, levels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__(channels, hidden, dropout)
        self.self_attn = MSDeformAttn(channels, levels, heads, points)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, shapes: Shapes, padding: Tensor) -> Tensor:
        told = self.self_attn(x + positions, references, x, shapes, input_padding_mask=padding)
        return self.norm2(self.feed_forward(self.norm1(x + self.dropout(told))))


class DecoderLayer(FeedForward):
    """Section 4.1, decoder: queries ask each other, then a few points of the maps around their reference."""

    def __init__(self, channels: int, hidden: int, levels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__(channels, hidden, dropout)
        self.cross_attn = MSDeformAttn(channels, levels, heads, points)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attn = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(
        self, x: Tensor, positions: Tensor, references: Tensor, memory: Tensor, shapes: Shapes, padding: Tensor
    ) -> Tensor:
        query = x + positions
        x = self.norm2(x + self.dropout(self.self_attn(query, query, x, need_weights=False)[0]))
        told = self.cross_attn(x + positions, references, memory, shapes, input_padding_mask=padding)
        return self.norm3(self.feed_forward(self.norm1(x + self.dropout(told))))


class DeformableTransformer(nn.Module):
    """The parameters between the maps and the heads."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        encoder_layers: int,
        decoder_layers: int,
        levels: int,
        two_stage: bool,
        heads: int,
        points: int,
        dropout: float,
    ) -> None:
        super().__init__()
        sizes = channels, hidden, levels, heads, points, dropout
        self.encoder = Layers([EncoderLayer(*sizes) for _ in range(encoder_layers)])
        self.decoder = Layers([DecoderLayer(*sizes) for _ in range(decoder_layers)])
        self.level_embed = nn.Parameter(torch.empty(levels, channels))
        if two_stage:
            self.enc_output = nn.Linear(channels, channels)
            self.enc_output_norm = nn.LayerNorm(channels)
            self.pos_trans = nn.Linear(2 * channels, 2 * channels)
            self.pos_trans_norm = nn.LayerNorm(2 * channels)
        else:
            self.reference_points = nn.Linear(channels, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the released code."""
        xavier_weights(self)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if hasattr(self, "reference_points"):
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)


class DeformableDETR(SetDetector):
    """See `deformable_detr`. `backbone` gives maps from fine to coarse."""

    slower = ("sampling_offsets", "reference_points")  # learn at a tenth of the rate (section 5)

    def __init__(
        self, num_classes: int, backbone: Backbone, transformer: DeformableTransformer, queries: int, refine: bool
    ) -> None:
        super().__init__(SetLoss())
        self.backbone, self.transformer, self.refine, self.queries = backbone, transformer, refine, queries
        levels, channels = transformer.level_embed.shape
        self.two_stage = not hasattr(transformer, "reference_points")

        def projection(in_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2)
            nn.init.xavier_uniform_(conv.weight)
            zero_bias(conv)
            return nn.Sequential(conv, nn.GroupNorm(32, channels))

        # Section 4.1: one level more than the backbone has comes of its last map, further ones of that level.
        self.input_proj = nn.ModuleList(projection(c, 1, 1) for c in backbone.channels)
        for i in range(levels - len(backbone.channels)):
            self.input_proj.append(projection(backbone.channels[-1] if i == 0 else channels, 3, 2))
        if not self.two_stage:
            self.query_embed = nn.Embedding(queries, 2 * channels)

        count = len(transformer.decoder.layers)
        classifier, regressor = nn.Linear(channels, num_classes), MLP(channels, 4, 3)
        set_prior(classifier)
        for parameter in regressor.layers[-1].parameters():
            nn.init.zeros_(parameter)
        # Without refinement one, by as many names as the released code has.
        heads: list[list[nn.Module]] = [[classifier] * count, [regressor] * count]
        if refine:
            heads = [[copy.deepcopy(x) for x in (head[0], *head)][: count + self.two_stage] for head in heads]
        self.class_embed, self.bbox_embed = (nn.ModuleList(head) for head in heads)
        if not self.two_stage:  # boxes begin at about an eighth of the image
            nn.init.constant_(self.bbox_embed[0].get_parameter("layers.2.bias")[2:], -2.0)

    def predict(self, images: Tensor, sizes: Tensor) -> SetPrediction:
        levels = self.levels(self.backbone(images))
        shapes = [(x.shape[2], x.shape[3]) for x in levels]
        extents = [extent_of(images.shape, sizes, shape) for shape in shapes]
        padding = torch.cat([x.padding.flatten(1) for x in extents], 1)
        ratios = torch.stack([x.ratio for x in extents], 1).to(compute_dtype(levels[0].dtype))  # [N,L,2]
        centers = [_centers(x) for x in extents]
        memory = self.encode(levels, extents, shapes, padding, torch.cat(centers, 1)[:, :, None] * ratios[:, None])

        first, N = None, images.shape[0]
        if self.two_stage:
            first, query, positions, references = self.propose(memory, centers, padding)
        else:
            positions, query = self.query_embed.weight.expand(N, -1, -1).chunk(2, -1)
            references = to_compute_dtype(self.transformer.reference_points(positions)).sigmoid()
        logits, boxes = [], []
        for i, layer in enumerate(self.transformer.decoder.layers):
            seen = references[:, :, None] * ratios.repeat(1, 1, references.shape[-1] // 2)[:, None]
            query = layer(query, positions, seen, memory, shapes, padding)
            # Iterative bounding box refinement (section 4.2, appendix A.4): each layer's boxes are the next one's
            # references. To a point nothing is added but the center.
            moved = to_compute_dtype(self.bbox_embed[i](query))
            at = inverse_sigmoid(references)
            boxes.append((moved + F.pad(at, (0, 4 - at.shape[-1]))).sigmoid())
            logits.append(self.class_embed[i](query))
            if self.refine:
                references = boxes[-1].detach()
        if not self.training:
            logits, boxes = logits[-1:], boxes[-1:]
        return SetPrediction(torch.stack(logits), torch.stack(boxes), first)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """The multi-scale feature maps (section 4.1), [N,C,h,w] each, from those of the backbone."""
        levels = [project(x) for project, x in zip(self.input_proj, maps)]
        for project in self.input_proj[len(maps) :]:
            levels.append(project(maps[-1] if len(levels) == len(maps) else levels[-1]))
        return levels

    def encode(
        self, levels: list[Tensor], extents: list[Extent], shapes: Shapes, padding: Tensor, references: Tensor
    ) -> Tensor:
        """[N,S,C] of S = all pixels of all levels, whose references [N,S,L,2] are where they lie."""
        x = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)
        of_levels = zip(extents, self.transformer.level_embed)
        positions = torch.cat(
            [sine_positions(extent, x.shape[-1], -0.5).flatten(1, 2) + embed for extent, embed in of_levels], 1
        ).to(x.dtype)
        for layer in self.transformer.encoder.layers:
            x = layer(x, positions, references, shapes, padding)
        return x

    def propose(
        self, memory: Tensor, centers: list[Tensor], padding: Tensor
    ) -> tuple[SetPrediction, Tensor, Tensor, Tensor]:
        """Two stages (section 4.2, appendix A.4): each pixel of the encoder's output is a region proposal, and the
        best become the decoder's queries. What is learned, contents and positions [N,Q,C], and references [N,Q,4]."""
        transformer = self.transformer
        size = [torch.full_like(x, 0.05 * 2**level) for level, x in enumerate(centers)]
        anchors = torch.cat([torch.cat(centers, 1), torch.cat(size, 1)], -1)
        left_out = (padding | ((anchors <= 0.01) | (anchors >= 0.99)).any(-1))[..., None]
        x = transformer.enc_output_norm(transformer.enc_output(memory.masked_fill(left_out, 0.0)))
        logits = self.class_embed[-1](x)
        anchors = torch.logit(anchors).masked_fill(left_out, math.inf)
        moved = to_compute_dtype(self.bbox_embed[-1](x)) + anchors
        best = logits[..., 0].topk(min(self.queries, logits.shape[1]), 1).indices
        references = gather_rows(moved, best).detach().sigmoid()
        embedded = sinusoid(references * (2 * math.pi), memory.shape[-1] // 2).flatten(-2)
        positions, query = transformer.pos_trans_norm(transformer.pos_trans(embedded.to(memory.dtype))).chunk(2, -1)
        return SetPrediction(logits[None], moved.sigmoid()[None]), query, positions, references


def _centers(extent: Extent) -> Tensor:
    """[N,h * w,2] (x,y) of the pixels of a map, as fractions of the image."""
    y, x = ((torch.arange(there.shape[1], device=there.device) + 0.5) / there.sum(1, keepdim=True) for there in extent)
    return torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1).flatten(1, 2)


def deformable_detr(
    num_classes: int,
    *,
    backbone: str = "resnet50-frozen",
    channels: int = 256,
    hidden: int = 1024,
    queries: int = 300,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    levels: int = 4,
    refine: bool = False,
    two_stage: bool = False,
    dropout: float = 0.1,
    frozen_stages: int = 0,
) -> DeformableDETR:
    """Deformable DETR, with 8 heads and 4 points a level.

    Args:
        num_classes: there is no background. The released models for COCO have 91.
        backbone: a ResNet or LR-Net, as in `make_body`.
        channels: of the transformer; divisible by 32.
        hidden: of the layers' feed-forward networks.
        queries: predictions an image.
        encoder_layers, decoder_layers: how many.
        levels: of the pyramid. 1: the backbone's last map, single-scale deformable attention; 2 and 3: its last maps;
            from 4 on, those and coarser ones.
        refine: iterative bounding box refinement.
        two_stage: the queries are the encoder's proposals; needs refine.
        dropout: in the transformer.
        frozen_stages: of the backbone, not trained.
    """
    if two_stage and not refine:
        raise ValueError("relops.models: two_stage needs refine")
    if channels % 32:
        raise ValueError(f"relops.models: channels of deformable_detr must be divisible by 32, got {channels}")
    if levels < 1:
        raise ValueError(f"relops.models: levels of deformable_detr must be at least 1, got {levels}")
    body = make_body(backbone, frozen_stages)
    maps = StageBackbone(body, range(len(body.channels))[-min(levels, 3) :])
    transformer = DeformableTransformer(
        channels, hidden, encoder_layers, decoder_layers, levels, two_stage, heads=8, points=4, dropout=dropout
    )
    return DeformableDETR(num_classes, maps, transformer, queries, refine)
