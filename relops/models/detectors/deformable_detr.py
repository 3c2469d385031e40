"""Deformable DETR (Zhu et al., https://arxiv.org/abs/2010.04159).

Deformable DETR replaces the dense attention of DETR with attention to a few points on each level of a feature pyramid.
Options add iterative bounding box refinement and a first stage that proposes boxes. Parameters have the same names as
in the released code, and `load_detr` loads a state_dict of the released code.
"""

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
    """Clamp x to [1e-5, 1 - 1e-5] and return its logit."""
    return torch.logit(x, eps=1e-5)


class EncoderLayer(FeedForward):
    """An encoder layer (section 4.1), in which every pixel attends to a few points around itself on each level."""

    def __init__(self, channels: int, hidden: int, levels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__(channels, hidden, dropout)
        self.self_attn = MSDeformAttn(channels, levels, heads, points)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, shapes: Shapes, padding: Tensor) -> Tensor:
        attended = self.self_attn(x + positions, references, x, shapes, input_padding_mask=padding)
        return self.norm2(self.feed_forward(self.norm1(x + self.dropout(attended))))


class DecoderLayer(FeedForward):
    """A decoder layer (section 4.1), in which queries attend to each other and to points near their references."""

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
        attended = self.cross_attn(x + positions, references, memory, shapes, input_padding_mask=padding)
        return self.norm3(self.feed_forward(self.norm1(x + self.dropout(attended))))


class DeformableTransformer(nn.Module):
    """The encoder, the decoder and the layers that compute the reference points or boxes of the queries."""

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
        """Initialize the parameters as in the released code."""
        xavier_weights(self)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if hasattr(self, "reference_points"):
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)


class DeformableDETR(SetDetector):
    """The Deformable DETR detector.

    Args:
        num_classes: The number of object classes. There is no background class.
        backbone: A backbone that returns its finest map first.
        transformer: The encoder and the decoder.
        queries: The number of object queries.
        refine: Whether each decoder layer refines the boxes of the previous layer.
    """

    slower = ("sampling_offsets", "reference_points")  # learning rate times 0.1 (section 5)

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

        # As in section 4.1, the first additional level is computed from the last map of the backbone, and every other
        # additional level from the previous level.
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
        # Without refinement, all layers share one head, which is registered once per layer, as in the released code.
        heads: list[list[nn.Module]] = [[classifier] * count, [regressor] * count]
        if refine:
            heads = [[copy.deepcopy(x) for x in (head[0], *head)][: count + self.two_stage] for head in heads]
        self.class_embed, self.bbox_embed = (nn.ModuleList(head) for head in heads)
        if not self.two_stage:  # initially, a box is about an eighth as wide and high as the image
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
            level_references = references[:, :, None] * ratios.repeat(1, 1, references.shape[-1] // 2)[:, None]
            query = layer(query, positions, level_references, memory, shapes, padding)
            # In iterative bounding box refinement (section 4.2, appendix A.4), the boxes of each layer are the
            # references of the next layer. The logits of a reference box are added to all four deltas, and the logits
            # of a reference point only to the deltas of the center.
            deltas = to_compute_dtype(self.bbox_embed[i](query))
            logit = inverse_sigmoid(references)
            boxes.append((deltas + F.pad(logit, (0, 4 - logit.shape[-1]))).sigmoid())
            logits.append(self.class_embed[i](query))
            if self.refine:
                references = boxes[-1].detach()
        if not self.training:
            logits, boxes = logits[-1:], boxes[-1:]
        return SetPrediction(torch.stack(logits), torch.stack(boxes), first)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Compute the multi-scale feature maps [N,C,h,w] (section 4.1) from the maps of the backbone."""
        levels = [project(x) for project, x in zip(self.input_proj, maps)]
        for project in self.input_proj[len(maps) :]:
            levels.append(project(maps[-1] if len(levels) == len(maps) else levels[-1]))
        return levels

    def encode(
        self, levels: list[Tensor], extents: list[Extent], shapes: Shapes, padding: Tensor, references: Tensor
    ) -> Tensor:
        """Return the encoder's output [N,S,C] for the S pixels of all levels.

        Args:
            levels: The multi-scale feature maps.
            extents: For each map, the rows and columns that belong to the images.
            shapes: The height and width of each map.
            padding: [N,S] bool, True in padding.
            references: [N,S,L,2], the position (x, y) of each pixel as fractions of the width and height of each map.
        """
        x = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)
        pairs = zip(extents, self.transformer.level_embed)
        positions = torch.cat(
            [sine_positions(extent, x.shape[-1], -0.5).flatten(1, 2) + embed for extent, embed in pairs], 1
        ).to(x.dtype)
        for layer in self.transformer.encoder.layers:
            x = layer(x, positions, references, shapes, padding)
        return x

    def propose(
        self, memory: Tensor, centers: list[Tensor], padding: Tensor
    ) -> tuple[SetPrediction, Tensor, Tensor, Tensor]:
        """Compute a region proposal from each pixel of the encoder's output (section 4.2, appendix A.4).

        The proposals with the highest scores become the queries of the decoder.

        Args:
            memory: [N,S,C], the output of the encoder.
            centers: For each level, the pixel centers [N,h*w,2] as fractions of the image.
            padding: [N,S] bool, True in padding.

        Returns:
            A tuple of four: all proposals, which are needed for the loss of the first stage, and the contents [N,Q,C],
            the positional encodings [N,Q,C] and the references [N,Q,4] of the queries.
        """
        transformer = self.transformer
        size = [torch.full_like(x, 0.05 * 2**level) for level, x in enumerate(centers)]
        anchors = torch.cat([torch.cat(centers, 1), torch.cat(size, 1)], -1)
        ignored = (padding | ((anchors <= 0.01) | (anchors >= 0.99)).any(-1))[..., None]
        x = transformer.enc_output_norm(transformer.enc_output(memory.masked_fill(ignored, 0.0)))
        logits = self.class_embed[-1](x)
        anchors = torch.logit(anchors).masked_fill(ignored, math.inf)
        box_logits = to_compute_dtype(self.bbox_embed[-1](x)) + anchors
        best = logits[..., 0].topk(min(self.queries, logits.shape[1]), 1).indices
        references = gather_rows(box_logits, best).detach().sigmoid()
        embedded = sinusoid(references * (2 * math.pi), memory.shape[-1] // 2).flatten(-2)
        positions, query = transformer.pos_trans_norm(transformer.pos_trans(embedded.to(memory.dtype))).chunk(2, -1)
        return SetPrediction(logits[None], box_logits.sigmoid()[None]), query, positions, references


def _centers(extent: Extent) -> Tensor:
    """Return the pixel centers [N,h*w,2] (x, y) of a map, as fractions of the image without its padding."""
    y, x = ((torch.arange(valid.shape[1], device=valid.device) + 0.5) / valid.sum(1, keepdim=True) for valid in extent)
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
    """Build Deformable DETR: DETR with deformable attention on several feature levels.

    The transformer of the detector (Zhu et al., https://arxiv.org/abs/2010.04159) has 8 attention heads, each of which
    samples 4 points per level. `load_detr` loads the weights of the released code and of Hugging Face transformers.

    Args:
        num_classes: Number of object classes. There is no background class. The released models for COCO have 91
            classes.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26" or "lr_net50".
            ResNets accept a suffix that selects the normalization: "-bn" (batch normalization), "-frozen" (batch
            normalization with constant statistics and weights) or "-gn" (group normalization). After the normalization,
            a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2" (modulated deformable
            convolutions in all stages except the first). A number at the end of any name sets the width, that is, the
            number of channels of the stem (64 by default), as in "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the transformer, divisible by 32.
        hidden: Width of the feed-forward networks of the transformer.
        queries: Number of object queries, which is the number of predictions per image.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        levels: Number of feature levels. With 1, 2 or 3 levels, deformable attention uses the last 1, 2 or 3 maps of
            the backbone. With 4 or more, it uses the last 3 maps and additional, coarser maps.
        refine: Whether each decoder layer refines the boxes of the previous layer (iterative bounding box refinement).
        two_stage: Whether the queries are initialized from proposals of the encoder instead of being learned. It
            requires refine=True.
        dropout: Dropout probability in the transformer.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.

    Returns:
        A `DeformableDETR`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "classes", "boxes" and "giou" of the last decoder layer. With more than one decoder layer, there is also the
        loss "auxiliary", the sum of the losses of all other layers. If `two_stage` is True, there is also the loss
        "encoder" of the proposals. In evaluation mode, `detector(images, sizes)` returns `Detections` with at most 100
        objects per image. `images` is [N,3,H,W], `sizes` is [N,2] with the height and width of each image without
        padding (None if there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, or if group normalization does not support its width.
        ValueError: If `two_stage` is True and `refine` is False.
        ValueError: If `channels` is not divisible by 32.
        ValueError: If `levels` is less than 1.
        ValueError: If `dropout` is not between 0 and 1.

    Example:
        >>> import torch, relops
        >>> model = relops.models.deformable_detr(
        ...     3, backbone="resnet18", channels=32, hidden=64, encoder_layers=1, decoder_layers=2, levels=3
        ... )
        >>> images = torch.rand(1, 3, 64, 64)
        >>> targets = relops.models.Targets(torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]]))
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['auxiliary', 'boxes', 'classes', 'giou']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images)
        >>> detections.boxes.shape
        torch.Size([1, 100, 4])
    """
    if two_stage and not refine:
        raise ValueError("relops.models: two_stage of deformable_detr requires refine=True, got refine=False")
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
