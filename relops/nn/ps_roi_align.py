"""The position-sensitive RoIAlign module."""

import torch
from torch import Tensor, nn

from relops._annotations import Boxes, BroadcastingList2
from relops.ops.ps_roi_align import ps_roi_align

torch.fx.wrap("ps_roi_align")


class PSRoIAlign(nn.Module):
    """A module for position-sensitive RoIAlign (Light-Head R-CNN, https://arxiv.org/abs/1711.07264).

    Each box is divided into PH x PW equal bins. Each bin has its own input channels, and its values are the means of
    bilinear samples of these channels. The module calls `relops.ps_roi_align` and can replace torchvision's module of
    the same name.

    Args:
        output_size: Height and width (PH,PW) of the output, or one int for both.
        spatial_scale: Number of feature map pixels per image pixel.
        sampling_ratio: Number of samples along each axis of a bin, at most 65536. If it is not positive, the number of
            samples along an axis is the size of the bin in feature map pixels, rounded up.

    Example:
        >>> import torch, relops
        >>> pool = relops.nn.PSRoIAlign(output_size=7, spatial_scale=1 / 4, sampling_ratio=2)
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> out = pool(torch.randn(1, 10 * 7 * 7, 50, 68), boxes)
        >>> out.shape
        torch.Size([1, 10, 7, 7])
    """

    def __init__(self, output_size: BroadcastingList2[int], spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Apply position-sensitive RoIAlign to each box.

        Args:
            input: Feature map [N,C,H,W] with C divisible by PH * PW, of dtype float64, float32, float16 or bfloat16.
                channels_last inputs are read without a copy.
            rois: Boxes in pixels of the image, given as a tensor [K,5] of rows (batch index, x1, y1, x2, y2) or as a
                list of N tensors [Ki,4] of rows (x1, y1, x2, y2), one per image. Their dtype is that of `input`, or
                float32 if `input` has a 16-bit dtype. float32 is recommended, because bfloat16 coordinates near 200
                have a resolution of only one pixel.

        Returns:
            A tensor [K,C/(PH*PW),PH,PW] in the dtype of `input`, channels_last if `input` is. The output of a box with
            a non-finite coordinate is zero.

        Gradients:
            Gradients flow to `input`, and to `rois` if they require them.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device, if a number is out of range, or if PH * PW
                does not divide C. The error for boxes of a wrong shape is also an AssertionError, as in torchvision.
            IndexError: If a batch index is outside of [0,N) and the tensors are on the CPU. On CUDA, this check would
                require a synchronization, so the output of the box is NaN instead.
        """
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio})"
        )
