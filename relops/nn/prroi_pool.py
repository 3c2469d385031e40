"""The Precise RoI Pooling module."""

import torch
from torch import Tensor, nn

from relops._annotations import Boxes, BroadcastingList2
from relops.ops.prroi_pool import prroi_pool

torch.fx.wrap("prroi_pool")


class PrRoIPool(nn.Module):
    """A module for Precise RoI Pooling (IoU-Net, https://arxiv.org/abs/1807.11590).

    Each box is divided into PH x PW equal bins, and the value of a bin is the exact mean of the bilinearly interpolated
    feature map over the bin. The mean is an integral instead of an average of samples, and the gradients with respect
    to the boxes are continuous. The module calls `relops.prroi_pool`.

    Args:
        output_size: Height and width (PH,PW) of the output, or one int for both.
        spatial_scale: Number of feature map pixels per image pixel.

    Example:
        >>> import torch, relops
        >>> pool = relops.nn.PrRoIPool(output_size=7, spatial_scale=1 / 4)
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> out = pool(torch.randn(1, 256, 50, 68), boxes)
        >>> out.shape
        torch.Size([1, 256, 7, 7])
    """

    def __init__(self, output_size: BroadcastingList2[int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Compute the mean of the bilinearly interpolated feature map in each bin of each box.

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
        return prroi_pool(input, rois, self.output_size, self.spatial_scale)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale})"
