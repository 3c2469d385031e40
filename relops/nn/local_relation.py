"""The local relation layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relops._checks import check_choice, check_features, check_size
from relops.ops.local_relation import BORDERS, MAX_KERNEL_SIZE, MAX_STEP, SIMILARITIES
from relops.ops.local_relation import local_relation as aggregate

NAME = "nn.LocalRelation"
PRIORS = ("network", "table", "none")


class LocalRelation(nn.Module):
    """The local relation layer (Local Relation Networks for Image Recognition, https://arxiv.org/abs/1904.11491).

    The layer resembles a convolution whose weights are computed for each pixel from the contents of the window around
    the pixel. Two 1x1 convolutions compute a query and a key, each of which is a single number per pixel and group of
    channels. A prior, which depends on the position in the window, is added to the similarity of query and key. A
    softmax over the window turns the sums into weights, and each channel of the group is averaged over the window with
    these weights (see `relops.local_relation`). The averaged values are those of the input itself, without a
    projection. Finally, a 1x1 convolution combines all channels.

    The paper does not define the position of a tap. In relops, the position is the offset (x, y) of the tap from the
    center, counted in taps and divided by max(k // 2, 1), regardless of the dilation. Positions range from -1 to 1 if k
    is odd, and stay below 1 if k is even.

    Args:
        channels: Number C of input and output channels.
        kernel_size: Side length k of the k x k windows, at most 63.
        stride: Distance between neighboring windows in pixels, at most 2^24.
        dilation: Distance between neighboring taps of a window in pixels, at most 2^24.
        channels_per_group: Number m of channels per group. There are G = ceil(C / m) groups of ceil(C / G) channels,
            except that the last group may have fewer.
        prior: "network" computes the prior from the positions of the taps with two 1x1 convolutions (2 -> hidden -> G
            channels) and a ReLU between them. "table" learns a parameter [G,k,k], which starts at zero. "none" uses no
            prior.
        hidden: Number of channels between the two convolutions of the "network" prior.
        similarity: "squared_difference" is ``-(query - key)^2``, "absolute_difference" is ``-|query - key|``, and
            "product" is ``query * key``.
        border: "mask" excludes taps outside of the map from the softmax. "zero" gives them key 0 and value 0.
        bias: If True, the output convolution has a bias. A batch normalization after the layer makes the bias
            redundant.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or if `prior`, `similarity` or `border` is unknown.

    Example:
        >>> import torch, relops
        >>> layer = relops.nn.LocalRelation(64, stride=2)
        >>> out = layer(torch.randn(2, 64, 16, 16))
        >>> out.shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        *,
        channels_per_group: int = 8,
        prior: str = "network",
        hidden: int = 32,
        similarity: str = "squared_difference",
        border: str = "mask",
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, number, max_value in (
            ("channels", channels, 2**31),
            ("kernel_size", kernel_size, MAX_KERNEL_SIZE),
            ("stride", stride, MAX_STEP),
            ("dilation", dilation, MAX_STEP),
            ("channels_per_group", channels_per_group, 2**31),
            ("hidden", hidden, 2**31),
        ):
            check_size(NAME, name, number, max_value)
        check_choice(NAME, "prior", prior, PRIORS)
        check_choice(NAME, "similarity", similarity, SIMILARITIES)
        check_choice(NAME, "border", border, BORDERS)
        self.channels, self.kernel_size, self.stride, self.dilation = channels, kernel_size, stride, dilation
        self.channels_per_group, self.similarity, self.border = channels_per_group, similarity, border
        self.groups = -(-channels // channels_per_group)
        self.query = nn.Conv2d(channels, self.groups, 1, stride)
        self.key = nn.Conv2d(channels, self.groups, 1)
        if prior == "network":
            self.prior = nn.Sequential(nn.Conv2d(2, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, self.groups, 1))
            self.register_buffer("positions", tap_positions(kernel_size), persistent=False)
        else:
            shape = (self.groups, kernel_size, kernel_size)
            self.register_parameter("prior", nn.Parameter(torch.zeros(shape)) if prior == "table" else None)
        self.output = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to a feature map.

        Args:
            input: Feature map [N,C,H,W] of dtype float64, float32, float16 or bfloat16. channels_last inputs are read
                without a copy.

        Returns:
            A tensor [N,C,ceil(H / stride),ceil(W / stride)], channels_last if `input` is.

        Raises:
            TypeError: If `input` is not a tensor or has the wrong dtype.
            ValueError: If `input` has the wrong shape.
        """
        check_features(NAME, "input", input)
        if input.dim() != 4 or input.shape[1] != self.channels:
            raise ValueError(
                f"relops.{NAME}: input must be [N,C,H,W] with C = {self.channels}, got shape {list(input.shape)}"
            )
        output = aggregate(
            self.query(input),
            self.key(input),
            input,
            self.prior_of_taps(),
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            similarity=self.similarity,
            border=self.border,
        )
        return self.output(output)

    def prior_of_taps(self) -> Tensor | None:
        """Return the prior [G,k,k] that is added to the similarities, or None if the layer has no prior."""
        return self.prior(self.positions)[0] if isinstance(self.prior, nn.Module) else self.prior

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f'channels_per_group={self.channels_per_group}, similarity="{self.similarity}", border="{self.border}"'
        )


def tap_positions(kernel_size: int) -> Tensor:
    """Return the positions [1,2,k,k] of all taps: offsets (x, y) from the center, divided by max(k // 2, 1)."""
    steps = (torch.arange(kernel_size) - kernel_size // 2) / max(kernel_size // 2, 1)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y])[None]
