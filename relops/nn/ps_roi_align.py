"""The module of position-sensitive RoIAlign."""

import torch
from torch import Tensor, nn

from relops._annotations import Boxes, BroadcastingList2
from relops.ops.ps_roi_align import ps_roi_align

torch.fx.wrap("ps_roi_align")


class PSRoIAlign(nn.Module):
    """`relops.ps_roi_align` with its options fixed; the arguments are those of torchvision's module of this name."""

    def __init__(self, output_size: BroadcastingList2[int], spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """input [N,C,H,W] and rois [K,5], or a list of N tensors [Ki,4], to [K,C/(PH*PW),PH,PW]."""
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio})"
        )
