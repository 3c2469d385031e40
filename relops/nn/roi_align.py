"""The RoIAlign module."""

import torch
from torch import Tensor, nn

from relops._annotations import Boxes, BroadcastingList2
from relops.ops.roi_align import roi_align

torch.fx.wrap("roi_align")


class RoIAlign(nn.Module):
    """RoIAlign (Mask R-CNN, https://arxiv.org/abs/1703.06870) with fixed options.

    Each box is divided into PH x PW equal bins, and the value of a bin is the mean of bilinear samples on a grid. The
    module calls `relops.roi_align` and can replace torchvision's module of the same name.

    Args:
        output_size: Height and width (PH,PW) of the output, or one int for both.
        spatial_scale: Number of pixels of the feature map per pixel of the image.
        sampling_ratio: Number of samples per bin along each axis, at most 65536. If it is not positive, the size of the
            bin in pixels, rounded up, is used.
        aligned: If True, boxes are shifted by half a pixel, so that the center of pixel 0 is at 0.5, and boxes smaller
            than a pixel keep their size. If False, boxes are not shifted, and boxes smaller than a pixel are widened to
            one pixel.

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
        """Compute RoIAlign of each box.

        Args:
            input: Feature map [N,C,H,W] of dtype float64, float32, float16 or bfloat16. channels_last inputs are read
                without a copy.
            rois: Boxes in pixels of the image: a tensor [K,5] of rows (batch index, x1, y1, x2, y2), or a list of N
                tensors [Ki,4] of rows (x1, y1, x2, y2), one tensor per image. They have the dtype of `input`. With a
                16-bit `input` they may also be float32, which is recommended, because bfloat16 coordinates near 200
                have a resolution of only one pixel.

        Returns:
            A tensor [K,C,PH,PW] in the dtype of `input`, channels_last if `input` is. The output of a box with a
            non-finite coordinate is zero.

        Gradients:
            Gradients flow to `input`, and to `rois` if they require them.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device, or if a number is out of its range. For boxes of
                the wrong shape, the error is also an AssertionError.
            IndexError: If a batch index is outside of [0,N) and the tensors are on the CPU. On CUDA, this check would
                require a synchronization, so the output of the box is NaN instead.
        """
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned})"
        )
