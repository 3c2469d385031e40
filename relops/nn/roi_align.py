"""The module of RoIAlign."""

import torch
from torch import Tensor, nn

from relops._annotations import Boxes, BroadcastingList2
from relops.ops.roi_align import roi_align

torch.fx.wrap("roi_align")


class RoIAlign(nn.Module):
    """`relops.roi_align` with its options fixed; the arguments are those of torchvision's module of this name."""

    def __init__(
        self, output_size: BroadcastingList2[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """input [N,C,H,W] and rois [K,5], or a list of N tensors [Ki,4], to [K,C,PH,PW]."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned})"
        )
