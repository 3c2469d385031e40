"""Test cases for deform_conv2d."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bad, Inputs, Op, bad_options, change, put, to_other_device


@dataclass(frozen=True)
class Convolution:
    """The sizes and options of a sample. The letters have the same meaning as in relops.deform_conv2d.

    Offsets are at least 0.1 pixels away from whole numbers, at which the derivatives of samples jump. Offsets are
    multiples of 1/64 pixel, so that float32 represents all positions exactly. Outputs have a variance of about 1.
    """

    N: int = 2
    C: int = 6
    Co: int = 4
    groups: int = 1
    G: int = 1
    H: int = 7
    W: int = 9
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    spread: float = 1.5  # the standard deviation of the offsets in pixels
    bias: bool = True
    mask: bool = True
    channels_last: bool = False

    def deform_conv2d(self, generator: torch.Generator) -> Inputs:
        def as_map(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        axes = zip((self.H, self.W), self.kernel, self.stride, self.padding, self.dilation)
        Ho, Wo = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)
        kh, kw = self.kernel
        group_inputs, taps = self.C // self.groups, kh * kw
        offsets = self.N, 2 * self.G * taps, Ho, Wo
        return {
            "input": as_map(normal(self.N, self.C, self.H, self.W)),
            "offset": as_map((self.spread * normal(*offsets)).round() + (7 + 51 * uniform(*offsets)).floor() / 64),
            "weight": as_map(normal(self.Co, group_inputs, kh, kw) / max(group_inputs * taps, 1) ** 0.5),
            "bias": normal(self.Co) if self.bias else None,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "mask": as_map(0.5 + uniform(self.N, self.G * taps, Ho, Wo)) if self.mask else None,
        }


CONVOLUTIONS = {
    "typical": Convolution(),
    "one": Convolution(N=1, C=1, Co=1, H=1, W=1, kernel=(1, 1), padding=(0, 0)),
    "v1": Convolution(C=8, Co=16, W=21, mask=False),
    "groups": Convolution(C=12, Co=8, groups=4, bias=False),
    "offset groups": Convolution(C=12, G=3, mask=False, bias=False),
    "crossing groups": Convolution(C=12, Co=10, groups=2, G=3, channels_last=True),  # no group contains another one
    "depthwise": Convolution(C=8, Co=16, groups=8, G=2, H=5),
    "strided": Convolution(H=11, W=14, C=16, Co=8, stride=(2, 2), channels_last=True),
    "dilated": Convolution(H=9, W=12, padding=(2, 2), dilation=(2, 2), mask=False, channels_last=True),
    "no padding": Convolution(W=13, padding=(0, 0), bias=False),
    "even": Convolution(C=5, kernel=(2, 4), stride=(2, 1), padding=(1, 3), dilation=(3, 2)),
    "point": Convolution(C=9, Co=7, G=3, W=17, kernel=(1, 1), padding=(0, 0)),
    "wide kernel": Convolution(N=1, C=3, H=8, kernel=(7, 7), padding=(3, 3), mask=False),
    "column": Convolution(C=2, Co=3, kernel=(5, 1), padding=(0, 2)),
    "many channels": Convolution(N=1, C=40, Co=37, H=6, W=11),
    "many pixels": Convolution(C=3, Co=5, H=13, W=41, stride=(1, 2)),
    "leaving the map": Convolution(C=4, spread=6.0, channels_last=True),
}
CONVOLUTIONS_EMPTY = {
    "N": Convolution(N=0, G=2),
    "C": Convolution(C=0, bias=False),
    "Co": Convolution(Co=0, channels_last=True),
    "H": Convolution(H=0, padding=(2, 0), bias=False),  # all outputs are in the padding
    "W": Convolution(W=0, padding=(1, 2), bias=False, mask=False, channels_last=True),
}


def convolutions_growing(k: int) -> Convolution:
    """Return sample `k` of the series. For k = 0 all sizes differ."""
    return Convolution(N=2 + k, C=10 + 2 * k, Co=8 + 2 * k, groups=2, G=2, H=7 + 2 * k, W=11 + 3 * k, stride=(2, 2))


def raw_convolution(inputs: Inputs) -> Inputs:
    return inputs | {"allow_tf32": False}


def bad_convolutions() -> Iterator[Bad]:
    """Yield changes that make the sample "typical" invalid.

    This sample has N = 2, C = 6, Co = 4, G = 1, H = Ho = 7, W = Wo = 9, a kernel of 3 x 3 and the dtype float32.
    """
    offset, mask = r"offset must be \[N,2\*G\*kh\*kw,Ho,Wo\]", r"mask must be \[N,G\*kh\*kw,Ho,Wo\] = \[2,9,7,9\]"
    weight = r"weight must be \[Co,C/groups,kh,kw\]"
    for name in ("input", "offset", "weight", "bias", "mask"):
        yield Bad(f"{name} not a tensor", put(name, [1.0]), TypeError, f"{name} must be a Tensor, got list")
        yield Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be .*float.*got torch.int64")
    for name in ("offset", "weight", "bias", "mask"):
        yield Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64")
        yield Bad(f"{name} narrower", change(name, Tensor.half), TypeError, f"{name} must be .*got torch.float16")
        yield Bad(
            f"{name} on another device",
            change(name, to_other_device),
            ValueError,
            f"{name} must be on the device of input.*",
        )
    for name in ("offset", "weight"):
        yield Bad(f"{name} None", put(name, None), TypeError, f"{name} must be a Tensor, got NoneType")

    yield Bad("input 3-D", change("input", lambda x: x[0]), ValueError, r"input must be \[N,C,H,W\], got .*\[6, 7, 9\]")
    yield Bad("input batch", change("input", lambda x: x[:1]), ValueError, rf"{offset} = \[1,18,7,9\], got .*\[2, 18")
    yield Bad(
        "input short", change("input", lambda x: x[:, :, 1:]), ValueError, rf"{offset} = \[2,18,6,9\], got .*7, 9"
    )
    yield Bad(
        "input too large",
        change("input", lambda x: x[..., :1].expand(-1, -1, -1, 2**24 + 1)),
        ValueError,
        "input must have H and W of at most 16777216, got shape .*16777217",
    )
    yield Bad("no channels", change("input", lambda x: x[:, :0]), ValueError, f"{weight} .*divides C = 0 and Co, got")

    yield Bad("weight 3-D", change("weight", lambda x: x[0]), ValueError, rf"{weight}, got shape \[6, 3, 3\]")
    yield Bad("weight empty", change("weight", lambda x: x[..., :0]), ValueError, "weight must .* 1 x 1 to .*3, 0")
    yield Bad("weight inputs", change("weight", lambda x: x[:, :4]), ValueError, f"{weight} .*C = 6.*got .*4, 4, 3, 3")
    yield Bad("weight no inputs", change("weight", lambda x: x[:, :0]), ValueError, f"{weight} .*C = 6.*got .*4, 0, 3")
    yield Bad(
        "weight outputs", change("weight", lambda x: x[:3, :3]), ValueError, f"{weight} .*C = 6.*got .*3, 3, 3, 3"
    )
    yield Bad("weight large", put("dilation", (1, 6)), ValueError, r"weight must .*fits .*3 x 3 with dilation \(1, 6\)")
    yield Bad("weight large without padding", put("padding", 0), ValueError, r"offset must be .* \[2,18,5,7\], got")
    yield Bad(
        "bias short", change("bias", lambda x: x[1:]), ValueError, r"bias must be \[Co\] = \[4\], got shape \[3\]"
    )
    yield Bad("bias 2-D", change("bias", lambda x: x[None]), ValueError, r"bias must be \[Co\] = \[4\], got .*\[1, 4\]")

    yield Bad("offset 3-D", change("offset", lambda x: x[0]), ValueError, rf"{offset}, got shape \[18, 7, 9\]")
    yield Bad("offset batch", change("offset", lambda x: x[:1]), ValueError, rf"{offset} = \[2,18,7,9\], got .*\[1, 18")
    yield Bad("offset short", change("offset", lambda x: x[:, :, 1:]), ValueError, rf"{offset} = .*got .*18, 6, 9\]")
    yield Bad("offset narrow", change("offset", lambda x: x[..., 1:]), ValueError, rf"{offset} = .*got .*18, 7, 8\]")
    rule = rf"{offset} with 2\*kh\*kw = 18 and .*divides C = 6, got"
    yield Bad("offset channels", change("offset", lambda x: x[:, 1:]), ValueError, rf"{rule} shape \[2, 17, 7, 9\]")
    yield Bad("offset empty", change("offset", lambda x: x[:, :0]), ValueError, rf"{rule} shape \[2, 0, 7, 9\]")
    yield Bad("offset groups", change("offset", lambda x: x.repeat(1, 4, 1, 1)), ValueError, rf"{rule} shape \[2, 72")
    yield Bad("mask 3-D", change("mask", lambda x: x[0]), ValueError, rf"{mask}, got shape \[9, 7, 9\]")
    yield Bad("mask batch", change("mask", lambda x: x[:1]), ValueError, rf"{mask}, got shape \[1, 9, 7, 9\]")
    yield Bad("mask groups", change("mask", lambda x: x.repeat(1, 2, 1, 1)), ValueError, rf"{mask}, got .*\[2, 18, 7")
    yield Bad("mask short", change("mask", lambda x: x[:, :, 1:]), ValueError, rf"{mask}, got shape \[2, 9, 6, 9\]")
    yield Bad("mask of offsets", lambda x: x | {"mask": x["offset"]}, ValueError, rf"{mask}, got shape \[2, 18, 7, 9\]")

    yield from bad_options("stride", ValueError, 0, -1, 2**25, (1, 0), (1,), (1, 1, 1))
    yield from bad_options("padding", ValueError, -1, 2**25, (0, -1), (1, 1, 1))
    yield from bad_options("dilation", ValueError, 0, -1, 2**25, (0, 1), ())
    for name in ("stride", "padding", "dilation"):
        yield from bad_options(name, TypeError, 2.5, "3", None, (1, None), (1, 1.5))
        yield from bad_options(name, TypeError, True, harmless=True)


DEFORM_CONV2D = Op(
    name="deform_conv2d",
    samples={key: case.deform_conv2d for key, case in CONVOLUTIONS.items()},
    empty={key: case.deform_conv2d for key, case in CONVOLUTIONS_EMPTY.items()},
    growing=lambda k: convolutions_growing(k).deform_conv2d,
    features=("input", "weight", "bias"),
    coordinates=("offset", "mask"),
    differentiable=("input", "offset", "weight", "bias", "mask"),
    vmapped=("input", "offset", "mask"),
    bad=tuple(bad_convolutions()),
    raw=raw_convolution,
)
OPS = [DEFORM_CONV2D]
