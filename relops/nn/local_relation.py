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
    """A convolution whose weights are computed, per pixel, from what is in its window (Hu et al., Local Relation
    Networks for Image Recognition, 2019).

    1x1 convolutions make a query and a key of one number per pixel and group of channels. Their similarity and a prior
    on where in the window a pixel lies give, by a softmax over the window, the weights by which the group's channels
    are averaged (`relops.local_relation`). The values are the input itself; a 1x1 convolution of all channels follows.

    Args:
        channels: C, of input and output.
        kernel_size: k; windows are k x k.
        stride: pixels from an output to the next.
        dilation: pixels from a tap to the next.
        channels_per_group: m; there are G = ceil(C / m) groups of ceil(C / G) channels, of which the last may have
            fewer.
        prior: "network": two 1x1 convolutions with a ReLU between them, 2 -> hidden -> G channels, of the positions of
            taps; "table": a parameter [G,k,k], zeros at first; "none".
        hidden: channels between the two.
        similarity: "squared_difference", "absolute_difference" or "product" of query and key.
        border: taps outside the map leave the softmax ("mask"), or have key 0 and value 0 ("zero").
        bias: of the output convolution; a normalization that follows makes it useless.

    The position of a tap, which the paper leaves open, is its offset (x, y) from the center in taps, divided by
    max(k // 2, 1): from -1 to 1 for an odd k, short of 1 for an even one, whatever the dilation.

    Input [N,C,H,W], output [N,C,ceil(H / stride),ceil(W / stride)]; channels_last stays so.

    Example:
        >>> layer = relops.nn.LocalRelation(64)
        >>> layer(torch.randn(2, 64, 56, 56))  # [2,64,56,56]
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
        for name, number, most in (
            ("channels", channels, 2**31),
            ("kernel_size", kernel_size, MAX_KERNEL_SIZE),
            ("stride", stride, MAX_STEP),
            ("dilation", dilation, MAX_STEP),
            ("channels_per_group", channels_per_group, 2**31),
            ("hidden", hidden, 2**31),
        ):
            check_size(NAME, name, number, most)
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
        """[G,k,k]: what is added to the similarities of each group."""
        return self.prior(self.positions)[0] if isinstance(self.prior, nn.Module) else self.prior

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f'channels_per_group={self.channels_per_group}, similarity="{self.similarity}", border="{self.border}"'
        )


def tap_positions(kernel_size: int) -> Tensor:
    """[1,2,k,k]: of every tap the offset (x, y) from the center, divided by max(k // 2, 1)."""
    steps = (torch.arange(kernel_size) - kernel_size // 2) / max(kernel_size // 2, 1)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y])[None]
