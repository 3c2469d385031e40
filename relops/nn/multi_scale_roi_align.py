"""The module for RoIAlign on a feature pyramid."""

import torch
from torch import Tensor, nn

from relops._annotations import BroadcastingList2
from relops.ops.multi_scale_roi_align import multi_scale_roi_align

torch.fx.wrap("_pool")


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign on a pyramid of feature maps (Feature Pyramid Networks, https://arxiv.org/abs/1612.03144).

    Each box is pooled from the level that fits its size. The module can replace torchvision's module of the same name.
    It calls `relops.multi_scale_roi_align`, which needs one kernel launch for all levels and does not wait for the
    device. Every call infers the scales of the levels from the sizes of the maps, whereas torchvision's module keeps
    the scales of its first call.

    Args:
        featmap_names: Keys of the feature maps to pool from. The maps are used in the order of the input dict, which
            must list them from fine to coarse.
        output_size: Height and width (PH,PW) of the output, or one int for both.
        sampling_ratio: Number of samples along each axis of a bin, at most 65536. If it is not positive, the number of
            samples along an axis is the size of the bin in pixels of the level, rounded up.
        canonical_scale: Side length, in pixels of the image, of a square box that is assigned to `canonical_level`.
        canonical_level: Level of a square box of side length `canonical_scale`. Level 4 has a scale of 1/16.

    Example:
        >>> import torch, relops
        >>> pool = relops.nn.MultiScaleRoIAlign(["p3", "p4"], output_size=7, sampling_ratio=2)
        >>> maps = {"p3": torch.randn(1, 256, 64, 64), "p4": torch.randn(1, 256, 32, 32)}
        >>> boxes = [torch.tensor([[10.0, 10.0, 300.0, 200.0]])]
        >>> out = pool(maps, boxes, image_shapes=[(512, 512)])
        >>> out.shape
        torch.Size([1, 256, 7, 7])
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
        """Apply RoIAlign to each box, on the level that fits the size of the box.

        Args:
            x: Feature maps [N,C,Hl,Wl] by name, all of dtype float64, float32, float16 or bfloat16.
            boxes: Boxes in pixels of the images: N tensors [Ki,4] of rows (x1, y1, x2, y2). Their dtype is that of the
                maps, or float32 if the maps have a 16-bit dtype. float32 is recommended.
            image_shapes: Height and width of each image before it was padded to the size of the batch.

        Returns:
            A tensor [K,C,PH,PW] in the dtype of the maps.

        Gradients:
            Gradients flow to the maps, and to `boxes` if they require them. The choice of the level is not
            differentiated.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If `image_shapes` is empty, if an argument has the wrong shape or device, or if the scale of a
                level is not half the scale of the previous level. The error for boxes of a wrong shape is also an
                AssertionError, as in torchvision.
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
    """Compute `MultiScaleRoIAlign.forward` in one function, which torch.fx records as one node."""
    if len(image_shapes) == 0:
        raise ValueError(
            "relops.nn.MultiScaleRoIAlign: image_shapes must contain at least one (height, width), got none"
        )
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
    """Return the power of two nearest to size / image_size.

    Only comparisons are used, because a compiler can turn them into guards.
    """
    root = 2.0**0.5
    scale = 1.0
    while size * root < image_size * scale:
        scale /= 2
    while size > image_size * scale * root:
        scale *= 2
    return scale
