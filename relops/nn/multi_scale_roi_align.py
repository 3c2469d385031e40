"""The module of RoIAlign on a feature pyramid."""

import torch
from torch import Tensor, nn

from relops._annotations import BroadcastingList2
from relops.ops.multi_scale_roi_align import multi_scale_roi_align

torch.fx.wrap("_pool")


class MultiScaleRoIAlign(nn.Module):
    """`relops.multi_scale_roi_align` of a dict of feature maps, scales inferred from their sizes.

    Arguments and results are those of torchvision's module of this name, in one launch instead of one per level and
    without waiting for the device. Other than there, scales follow every call's shapes, not the first call's.

    Args:
        featmap_names: the keys of the maps to pool from; they are taken in the order of the dict, finest first.
        output_size: (PH,PW), or one int for both.
        sampling_ratio: samples per bin and axis; if not positive, the size of the bin in pixels, rounded up.
        canonical_scale: the side of a square box, in image pixels, that belongs to canonical_level.
        canonical_level: the level of such a box; 4 is the level of scale 1/16.

    Example:
        >>> pool = relops.nn.MultiScaleRoIAlign(["p3", "p4"], output_size=7, sampling_ratio=2)
        >>> maps = {"p3": torch.randn(1, 256, 64, 64), "p4": torch.randn(1, 256, 32, 32)}
        >>> pool(maps, [torch.tensor([[10.0, 10.0, 300.0, 200.0]])], [(512, 512)])
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: BroadcastingList2[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        if isinstance(output_size, int):
            output_size = (output_size, output_size)
        self.featmap_names = featmap_names
        self.sampling_ratio = sampling_ratio
        self.output_size = tuple(output_size)
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """
        Args:
            x: the feature maps by name, [N,C,Hl,Wl].
            boxes: N tensors [Ki,4] of (x1, y1, x2, y2) in image pixels.
            image_shapes: (height, width) of each image, before it was padded to those of the batch.

        Returns:
            [K,C,PH,PW].
        """
        return _pool(
            x,
            boxes,
            image_shapes,
            self.featmap_names,
            self.output_size,
            self.sampling_ratio,
            self.canonical_scale,
            self.canonical_level,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio})"
        )


def _pool(
    x: dict[str, Tensor],
    boxes: list[Tensor],
    image_shapes: list[tuple[int, int]],
    featmap_names: list[str],
    output_size: BroadcastingList2[int],
    sampling_ratio: int,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    """All of forward: one node for torch.fx."""
    if len(image_shapes) == 0:
        raise ValueError("relops.nn.MultiScaleRoIAlign: image_shapes must hold at least one (height, width), got none")
    image_height = 0
    for height, _ in image_shapes:
        image_height = max(image_height, height)
    levels: list[Tensor] = []
    scales: list[float] = []
    for name, level in x.items():
        if name in featmap_names:
            levels.append(level)
            scales.append(_scale(level.size(2), image_height))
    return multi_scale_roi_align(
        levels, boxes, output_size, scales, sampling_ratio, False, float(canonical_scale), canonical_level
    )


def _scale(size: int, image_size: int) -> float:
    """The power of two nearest to size / image_size: by comparisons alone, which a compiler can turn into guards."""
    root = 2.0**0.5
    scale = 1.0
    while size * root < image_size * scale:
        scale /= 2
    while size > image_size * scale * root:
        scale *= 2
    return scale
