"""The module of RoI max pooling."""

import torch
from torch import Tensor, nn

from relops._annotations import Boxes, BroadcastingList2
from relops.ops.roi_pool import roi_pool

torch.fx.wrap("roi_pool")


class RoIPool(nn.Module):
    """`relops.roi_pool` with its options fixed; the arguments are those of torchvision's module of this name."""

    def __init__(self, output_size: BroadcastingList2[int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """input [N,C,H,W] and rois [K,5], or a list of N tensors [Ki,4], to [K,C,PH,PW]."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale})"
