"""The RoIAlign module."""

import torch
from torch import Tensor, nn

from relops._annotations import Boxes, BroadcastingList2
from relops.ops.roi_align import roi_align

torch.fx.wrap("roi_align")


class RoIAlign(nn.Module):
    """A module for RoIAlign (Mask R-CNN, https://arxiv.org/abs/1703.06870).

    Each box is divided into PH x PW equal bins, and the value of a bin is the mean of bilinear samples on a regular
    grid in the bin. The module calls `relops.roi_align` and can replace torchvision's module of the same name.

    Args:
        output_size: Height and width (PH,PW) of the output, or one int for both.
        spatial_scale: Number of feature map pixels per image pixel.
        sampling_ratio: Number of samples along each axis of a bin, at most 65536. If it is not positive, the number of
            samples along an axis is the size of the bin in feature map pixels, rounded up.
        aligned: If True, boxes are shifted by half a pixel, so that the center of pixel 0 has the coordinate 0.5, and
            boxes smaller than one pixel keep their size. If False, the center of pixel 0 has the coordinate 0, and
            boxes are widened to at least one pixel of the feature map.

    Example:
        >>> import torch, relops
        >>> pool = relops.nn.RoIAlign(output_size=7, spatial_scale=1 / 4, sampling_ratio=2, aligned=True)
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> out = pool(torch.randn(1, 256, 50, 68), boxes)
        >>> out.shape
        torch.Size([1, 256, 7, 7])
    """

    def __init__(
        self, output_size: BroadcastingList2[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Apply RoIAlign to each box.

        Args:
            input: Feature map [N,C,H,W] of dtype float64, float32, float16 or bfloat16. channels_last inputs are read
                without a copy.
            rois: Boxes in pixels of the image, given as a tensor [K,5] of rows (batch index, x1, y1, x2, y2) or as a
                list of N tensors [Ki,4] of rows (x1, y1, x2, y2), one per image. Their dtype is that of `input`, or
                float32 if `input` has a 16-bit dtype. float32 is recommended, because bfloat16 coordinates near 200
                have a resolution of only one pixel.

        Returns:
            A tensor [K,C,PH,PW] in the dtype of `input`, channels_last if `input` is. The output of a box with a
            non-finite coordinate is zero.

        Gradients:
            Gradients flow to `input`, and to `rois` if they require them.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device, or if a number is out of range. The error for
                boxes of a wrong shape is also an AssertionError, as in torchvision.
            IndexError: If a batch index is outside of [0,N) and the tensors are on the CPU. On CUDA, this check would
                require a synchronization, so the output of the box is NaN instead.
        """
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned})"
        )
