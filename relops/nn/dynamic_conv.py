"""The dynamic instance interaction of Sparse R-CNN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._autocast import is_autocasting
from relops._checks import check_device, check_features, check_shape, check_size


class DynamicConv(nn.Module):
    """Each region is filtered by two 1x1 convolutions made of its proposal's feature, and becomes a vector
    (Sun et al., Sparse R-CNN, https://arxiv.org/abs/2011.12450, section 3 and figure 4).

    Of a proposal's feature f [C] and its region x [P,C], P = size^2 positions:

        first [C,D], second [D,C] = dynamic_layer(f)
        x = relu(norm1(x @ first))       [P,D]
        x = relu(norm2(x @ second))      [P,C]
        y = relu(norm3(out_layer(x)))    [C]

    Norms are layer normalizations. Of the R * (4 C^2 D + 4 P C D + 2 P C^2) operations the first term is that of
    dynamic_layer, which makes the filters, and the last that of out_layer: filtering is the least of the work.

    Args:
        channels: width C of features and regions.
        dim_dynamic: width D between the two filters.
        size: height and width of the regions.

    The parameters of the released code fit as they are; its initialization is that of `reset_parameters`.

    Example:
        >>> interaction = relops.nn.DynamicConv()
        >>> features, regions = torch.randn(100, 256), torch.randn(100, 256, 7, 7)
        >>> interaction(features, regions)  # [100,256]
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
        """Weights are uniform by Xavier; biases and norms as torch has them."""
        for layer in (self.dynamic_layer, self.out_layer):
            layer.reset_parameters()
            nn.init.xavier_uniform_(layer.weight)
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.reset_parameters()

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        """
        Args:
            features: [R,C] of the proposals, float64, float32, float16 or bfloat16.
            regions: [R,C,size,size], what RoI Align gives of each proposal's box, in the dtype of features (under
                autocast in any). Those that are channels_last are read as they lie.

        Returns:
            [R,C]; gradients to both and to all parameters.

        Raises:
            TypeError, ValueError: dtypes, devices or shapes that do not go together.
        """
        self._check(features, regions)
        first, second = self.dynamic_layer(features).chunk(2, 1)
        x = regions.flatten(2).transpose(1, 2)  # a view; products read either order
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
