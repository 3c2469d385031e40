"""The module of Precise RoI Pooling."""

import torch
from torch import Tensor, nn

from relops._annotations import Boxes, BroadcastingList2
from relops.ops.prroi_pool import prroi_pool

torch.fx.wrap("prroi_pool")


class PrRoIPool(nn.Module):
    """`relops.prroi_pool` with its options fixed; the arguments are those of `RoIPool`."""

    def __init__(self, output_size: BroadcastingList2[int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """input [N,C,H,W] and rois [K,5], or a list of N tensors [Ki,4], to [K,C,PH,PW]."""
        return prroi_pool(input, rois, self.output_size, self.spatial_scale)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale})"
