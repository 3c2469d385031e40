"""The dynamic instance interaction module of Sparse R-CNN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._autocast import is_autocasting
from relops._checks import check_device, check_features, check_shape, check_size


class DynamicConv(nn.Module):
    """The dynamic instance interaction of Sparse R-CNN (https://arxiv.org/abs/2011.12450, section 3 and figure 4).

    The module computes the weights of two 1x1 convolutions from the feature of each proposal. The convolutions filter
    the region of the proposal, and the result is reduced to a vector. For the feature f [C] of a proposal and its
    region x [P,C] with P = size^2 positions, the computation is::

        first [C,D], second [D,C] = dynamic_layer(f)
        x = relu(norm1(x @ first))       [P,D]
        x = relu(norm2(x @ second))      [P,C]
        y = relu(norm3(out_layer(x)))    [C]

    norm1, norm2 and norm3 are layer normalizations. Processing R regions takes R * (4 C^2 D + 4 P C D + 2 P C^2)
    operations. The three terms are the costs of computing the filters in dynamic_layer, of the filtering itself, and of
    out_layer. With the default sizes, the filtering costs the least.

    The parameters of the released code can be loaded unchanged.

    Args:
        channels: Width C of the features and regions.
        dim_dynamic: Width D between the two filters.
        size: Height and width of the regions.

    Raises:
        TypeError: If an argument is not an int.
        ValueError: If an argument is not in the range from 1 to 65536.

    Example:
        >>> import torch, relops
        >>> interaction = relops.nn.DynamicConv(channels=64, dim_dynamic=16)
        >>> features, regions = torch.randn(10, 64), torch.randn(10, 64, 7, 7)
        >>> out = interaction(features, regions)
        >>> out.shape
        torch.Size([10, 64])
    """

    def __init__(self, channels: int = 256, dim_dynamic: int = 64, size: int = 7) -> None:
        super().__init__()
        for name, number in (("channels", channels), ("dim_dynamic", dim_dynamic), ("size", size)):
            check_size("nn.DynamicConv", name, number, 2**16)
        self.channels, self.dim_dynamic, self.size = channels, dim_dynamic, size
        self.dynamic_layer = nn.Linear(channels, 2 * channels * dim_dynamic)
        self.norm1 = nn.LayerNorm(dim_dynamic)
        self.norm2 = nn.LayerNorm(channels)
        self.out_layer = nn.Linear(channels * size**2, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters as the released code does.

        Weights are drawn from Xavier's uniform distribution. Biases and normalizations keep the defaults of torch.
        """
        for layer in (self.dynamic_layer, self.out_layer):
            layer.reset_parameters()
            nn.init.xavier_uniform_(layer.weight)
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.reset_parameters()

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        """Filter each region with the convolutions of its proposal.

        Args:
            features: Features [R,C] of the proposals, of dtype float64, float32, float16 or bfloat16.
            regions: Regions [R,C,size,size], pooled from the boxes of the proposals, in the dtype of `features`. Under
                autocast, they may have any of the dtypes that `features` can have. channels_last inputs are read
                without a copy.

        Returns:
            A tensor [R,C].

        Gradients:
            Gradients flow to `features`, `regions` and all parameters.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device.
        """
        self._check(features, regions)
        first, second = self.dynamic_layer(features).chunk(2, 1)
        x = regions.flatten(2).transpose(1, 2)  # a view, because bmm can read both memory orders
        x = F.relu(self.norm1(torch.bmm(x, first.unflatten(1, (self.channels, self.dim_dynamic)))), inplace=True)
        x = F.relu(self.norm2(torch.bmm(x, second.unflatten(1, (self.dim_dynamic, self.channels)))), inplace=True)
        return F.relu(self.norm3(self.out_layer(x.flatten(1))), inplace=True)

    def _check(self, features: Tensor, regions: Tensor) -> None:
        name = "nn.DynamicConv"
        check_features(name, "features", features)
        check_features(name, "regions", regions)
        check_device(name, "regions", regions, "features", features)
        if regions.dtype != features.dtype and not is_autocasting(features):
            raise TypeError(
                f"relops.{name}: regions must be {features.dtype}, the dtype of features, got {regions.dtype}"
            )
        if features.dim() != 2 or features.shape[1] != self.channels:
            raise ValueError(
                f"relops.{name}: features must be [R,C] with C = {self.channels}, got shape {list(features.shape)}"
            )
        check_shape(name, "regions", regions, "[R,C,size,size]", *features.shape, self.size, self.size)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, dim_dynamic={self.dim_dynamic}, size={self.size}"
