"""Test cases for the six region ops, from roi_align to multi_scale_roi_align: feature maps and boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .base import Bad, Inputs, Op, bad_options, change, put, to_other_device

LEVELS = 3  # the number of maps for multi_scale_roi_align; each map has half the size of the previous one
OPTIONS = {  # the arguments of each op in addition to its features, boxes and output_size
    "roi_align": ("spatial_scale", "sampling_ratio", "aligned"),
    "roi_pool": ("spatial_scale",),
    "ps_roi_align": ("spatial_scale", "sampling_ratio"),
    "ps_roi_pool": ("spatial_scale",),
    "prroi_pool": ("spatial_scale",),
    "multi_scale_roi_align": (
        "spatial_scales",
        "sampling_ratio",
        "aligned",
        "canonical_box_size",
        "canonical_level",
    ),
}


@dataclass(frozen=True)
class Regions:
    """The sizes and options of a call.

    The letters have the same meaning as in relops.roi_align, but C is the number of output channels. Contract tests use
    only boxes that are insensitive to rounding, both of the boxes (to any dtype) and in the arithmetic. Rounding must
    not change the number of samples, the pixels around a sample, whether a sample is on the map, the pixels of a bin,
    or the level of a box.
    """

    H: int = 12
    W: int = 17
    C: int = 3
    N: int = 2
    K: int = 9
    output_size: tuple[int, int] = (3, 2)
    spatial_scale: float = 0.25
    sampling_ratio: int = -1
    aligned: bool = False
    channels_last: bool = False
    canonical: float | None = None  # canonical_box_size; None: 1/6 of the side of the map

    @property
    def spatial_scales(self) -> list[float]:
        return [self.spatial_scale / 2**level for level in range(LEVELS)]

    @property
    def finest(self) -> int:
        return round(-math.log2(self.spatial_scale))

    @property
    def canonical_level(self) -> int:
        return self.finest + 1

    @property
    def canonical_box_size(self) -> float:
        sixth_of_map = math.sqrt(max(1, self.H * self.W)) / self.spatial_scale / 6
        return sixth_of_map if self.canonical is None else self.canonical

    def options(self, name: str) -> Inputs:
        return {"output_size": self.output_size} | {option: getattr(self, option) for option in OPTIONS[name]}

    def map(
        self, generator: torch.Generator | None, channels: int, level: int = 0, distinct: bool = False
    ) -> Tensor:  # float64
        shape = (self.N, channels, -(-self.H // 2**level), -(-self.W // 2**level))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if distinct:  # values that differ in every dtype, so that maxima have no ties
            x = (x.flatten(2).argsort(-1).view(shape) - self.H * self.W // 2).double() / 64
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def boxes(self, generator: torch.Generator, is_sensitive: Callable[[Tensor], Tensor]) -> Tensor:
        """Return K random boxes of many sizes: inside the map, across its border, and outside.

        A box is left out if `is_sensitive` returns True for it, because then rounding errors may change its result.
        """
        M = 100 * self.K + 1
        width_height = torch.tensor([self.W, self.H], dtype=torch.float64).clamp(min=1)
        center, extent = torch.rand(2, M, 2, generator=generator, dtype=torch.float64)
        center, half = (1.2 * center - 0.1) * width_height, 0.03 * 12**extent * width_height
        index = torch.randint(max(self.N, 1), (M, 1), generator=generator)
        boxes = torch.cat([index, (center - half) / self.spatial_scale, (center + half) / self.spatial_scale], 1)
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        stable = ~torch.stack([is_sensitive(boxes.to(dtype).double()) for dtype in dtypes]).any(0)
        kept = boxes[stable][: self.K]
        assert len(kept) == self.K
        return kept

    def sampling_sensitivity(self, aligned: bool, levels: int = 1) -> Callable[[Tensor], Tensor]:
        """Return a function that finds the boxes for which a rounding error may change the samples or the level."""

        def is_sensitive(boxes: Tensor) -> Tensor:
            scale, sensitive = torch.full((len(boxes), 1), self.spatial_scale, dtype=torch.float64), False
            if levels > 1:
                side = ((boxes[:, 3:4] - boxes[:, 1:2]) * (boxes[:, 4:5] - boxes[:, 2:3])).sqrt()
                level = self.canonical_level + (side / self.canonical_box_size).log2()
                scale = 2.0 ** -level.floor().clamp(self.finest, self.finest + levels - 1)
                sensitive = near_whole(level)
            for first, last, bins in ((1, 3, self.output_size[1]), (2, 4, self.output_size[0])):
                begin, end = boxes[:, [first]] * scale, boxes[:, [last]] * scale
                length = end - begin
                if not aligned:
                    sensitive = sensitive | ((length - 1).abs() < 1e-2)
                    length = length.clamp(min=1)
                bin = length / bins
                if self.sampling_ratio > 0:
                    grid = torch.full_like(bin, self.sampling_ratio)
                else:
                    grid = bin.ceil()
                    # If a box was widened to a length of 1, its length is exact in every dtype.
                    sensitive = sensitive | (near_whole(bin) & (length != 1))
                step = torch.arange(bins * int(grid.max()))
                position = begin - (0.5 if aligned else 0) + (step + 0.5) * bin / grid
                sensitive = sensitive | (near_whole(position) & (step < bins * grid)).any(1, keepdim=True)
            return sensitive[:, 0]

        return is_sensitive

    def bin_sensitivity(self, last_included: bool) -> Callable[[Tensor], Tensor]:
        """Return a function that finds the boxes for which a rounding error may change the set of pixels in a bin."""

        def is_sensitive(boxes: Tensor) -> Tensor:
            sensitive = near_whole(boxes[:, 1:] * self.spatial_scale + 0.5).any(1)
            corners = (boxes * self.spatial_scale).round()
            for first, last, bins in ((1, 3, self.output_size[1]), (2, 4, self.output_size[0])):
                length = (corners[:, [last]] - corners[:, [first]] + last_included).clamp(min=1).long()
                edges = torch.arange(bins + 1) * length  # in units of 1 / bins
                for dtype in (torch.float32, torch.float64):
                    rounded = torch.arange(bins + 1) * (length.to(dtype) / bins)
                    sensitive |= ((rounded.floor() != edges // bins) | (rounded.ceil() != -(-edges // bins))).any(1)
            return sensitive

        return is_sensitive

    def roi_align(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.sampling_sensitivity(self.aligned))
        return {"input": self.map(generator, self.C), "boxes": boxes} | self.options("roi_align")

    def ps_roi_align(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.sampling_sensitivity(True))
        return {"input": self.map(generator, self.bin_channels), "boxes": boxes} | self.options("ps_roi_align")

    def multi_scale_roi_align(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.sampling_sensitivity(self.aligned, LEVELS))
        features = {f"level{level}": self.map(generator, self.C, level) for level in range(LEVELS)}
        return features | {"boxes": boxes} | self.options("multi_scale_roi_align")

    def roi_pool(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.bin_sensitivity(last_included=True))
        return {"input": self.map(generator, self.C, distinct=True), "boxes": boxes} | self.options("roi_pool")

    def ps_roi_pool(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.bin_sensitivity(last_included=False))
        return {"input": self.map(generator, self.bin_channels), "boxes": boxes} | self.options("ps_roi_pool")

    def prroi_pool(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, lambda boxes: torch.zeros(len(boxes), dtype=torch.bool))
        return {"input": self.map(generator, self.C), "boxes": boxes} | self.options("prroi_pool")

    @property
    def bin_channels(self) -> int:
        """The number of channels of the maps for a position-sensitive op, in which every bin reads its own channels."""
        return self.C * math.prod(self.output_size)


def near_whole(x: Tensor) -> Tensor:
    return (x - x.round()).abs() < 1e-3


def join_levels(inputs: Inputs) -> Inputs:
    levels = [x for name, x in inputs.items() if name.startswith("level")]
    return {"inputs": levels} | {name: x for name, x in inputs.items() if not name.startswith("level")}


# All sizes of this sample differ.
TYPICAL = Regions(H=9, W=12, C=5, K=7, spatial_scale=0.5)
REGIONS = {
    "typical": TYPICAL,
    "smallest": Regions(N=1, C=1, H=1, W=1, K=1, output_size=(1, 1), spatial_scale=1.0),
    "fixed grid": Regions(N=3, C=16, H=17, W=21, K=12, output_size=(4, 5), sampling_ratio=2, aligned=True),
    "channels_last": replace(TYPICAL, C=40, K=9, sampling_ratio=2, channels_last=True),
    "channels_last odd": Regions(
        N=1, C=5, H=13, W=12, K=30, output_size=(2, 7), spatial_scale=0.125, aligned=True, channels_last=True
    ),
}
REGIONS_EMPTY = {
    "N": replace(TYPICAL, N=0, K=0),
    "K": replace(TYPICAL, K=0, channels_last=True),
    "C": replace(TYPICAL, C=0),
    "H": replace(TYPICAL, H=0, sampling_ratio=2),
    "W": replace(TYPICAL, W=0, channels_last=True),
}


def regions_growing(k: int) -> Regions:
    """Return sample `k` of the series. For k = 0 all sizes differ, and none is 5, the number of columns of the boxes.

    Float arguments are the same for all `k`, because compilers treat them as constants.
    """
    return Regions(N=4 + k, C=8 + 3 * k, H=22 + 4 * k, W=26 + 8 * k, K=9 + 2 * k, spatial_scale=0.5, canonical=7.0)


def bad_regions(features: str, *more: Bad) -> tuple[Bad, ...]:
    """Return changes that make the sample "typical" invalid.

    This sample has N = 2, K = 7, output_size = (3, 2) and dtype float32.
    """
    first = r"inputs\[0\]" if features == "level0" else features

    def split(f: Callable[[Tensor], Any]) -> Callable[[Inputs], Inputs]:
        return change("boxes", lambda x: [x[:3, 1:], f(x[3:, 1:])])

    return (
        Bad(f"{features} not a tensor", put(features, [1.0]), TypeError, f"{first} must be a Tensor, got list"),
        Bad(f"{features} int", change(features, Tensor.int), TypeError, f"{first} must be float64.*got torch.int32"),
        Bad(f"{features} 3-D", change(features, lambda x: x[0]), ValueError, rf"{first} must be \[N,C,H,W\], got "),
        Bad("boxes not a tensor", put("boxes", 3), TypeError, r"boxes must be a Tensor \[K,5\] or a list.*got int"),
        Bad("boxes int", change("boxes", Tensor.long), TypeError, "boxes must be .*float32.*got torch.int64"),
        Bad("boxes wider", change("boxes", Tensor.double), TypeError, "boxes must be .*got torch.float64"),
        Bad("boxes narrower", change("boxes", Tensor.bfloat16), TypeError, "boxes must be .*got torch.bfloat16"),
        Bad(
            "boxes on another device",
            change("boxes", to_other_device),
            ValueError,
            "boxes must be on the device of input.*got",
        ),
        Bad("boxes of 4", change("boxes", lambda x: x[:, 1:]), ValueError, r"boxes must be \[K,5\].*got .*\[7, 4\]"),
        # torchvision raises an AssertionError for boxes of this shape, and existing code may catch it.
        Bad("boxes of 4, asserted", change("boxes", lambda x: x[:, 1:]), AssertionError, r"boxes must be \[K,5\]"),
        Bad("boxes 1-D", change("boxes", lambda x: x[0]), ValueError, r"boxes must be \[K,5\].*got shape \[5\]"),
        Bad(
            "list short",
            change("boxes", lambda x: [x[:, 1:]]),
            ValueError,
            "boxes must be a list of N = 2 Tensors.*got 1",
        ),
        Bad("list not a tensor", split(Tensor.tolist), TypeError, r"boxes\[1\] must be a Tensor, got list"),
        Bad("list wider", split(Tensor.double), TypeError, r"boxes\[1\] must be .*got torch.float64"),
        Bad("list of 3", split(lambda x: x[:, 1:]), AssertionError, r"boxes\[1\] must be \[Ki,4\].*\[4, 3\]"),
        *bad_options("output_size", ValueError, 0, (3, -1), (3,), (1, 2, 3)),
        *bad_options("output_size", TypeError, "3", 2.5, (3, 2.5), None),
        *more,
    )


BAD_SCALE = (
    *bad_options("spatial_scale", ValueError, 0.0, -1.0, math.nan, math.inf),
    *bad_options("spatial_scale", TypeError, "1"),
)
BAD_RATIO = (
    *bad_options("sampling_ratio", ValueError, 65537),
    *bad_options("sampling_ratio", TypeError, 2.5),
    *bad_options("sampling_ratio", TypeError, True, harmless=True),
)
BAD_ALIGNED = tuple(bad_options("aligned", TypeError, "no"))
BAD_CHANNELS = Bad("channels", change("input", lambda x: x[:, 1:]), ValueError, "input must .* 3 x 2, .*got C = 29")
BAD_LEVELS = (
    Bad("not a list", lambda x: x | {"inputs": x["level0"]}, TypeError, "inputs must be a list of Tensors.*got Tensor"),
    Bad(
        "no levels",
        lambda x: {name: x[name] for name in x if "level" not in name[:5]},
        ValueError,
        "inputs must contain at least one level, got none",
    ),
    Bad(
        "level on another device",
        change("level1", to_other_device),
        ValueError,
        r"inputs\[1\] must be on the device of .*got",
    ),
    Bad(
        "level batch",
        change("level2", lambda x: x[:1]),
        ValueError,
        r"inputs\[2\] must be \[N,C,Hl,Wl\] with N, C = 2, 5 .*got shape \[1, 5, 3, 3\]",
    ),
    Bad("level wider", change("level1", Tensor.double), TypeError, r"inputs\[1\] must be torch.float32.*got .*float64"),
    Bad("scales too few", put("spatial_scales", [0.5, 0.25]), ValueError, "spatial_scales must .* 3 levels .*got 2"),
    Bad(
        "scales not a list", put("spatial_scales", 0.5), TypeError, "spatial_scales must be a list of floats, got float"
    ),
    *bad_options("spatial_scales", ValueError, [0.5, 0.25, 0.25], [0.3, 0.15, 0.075], harmless=True),
    Bad(
        "scales negative",
        put("spatial_scales", [-0.5, -0.25, -0.125]),
        ValueError,
        r"spatial_scales\[0\] must be a finite positive number, got -0.5",
    ),
    *bad_options("canonical_box_size", ValueError, 0.0, math.nan, harmless=True),
    *bad_options("canonical_level", TypeError, 3.5),
)


def region_op(
    name: str,
    features: tuple[str, ...],
    differentiable: tuple[str, ...],
    bad: tuple[Bad, ...],
    join: Callable[[Inputs], Inputs] = dict,
) -> Op:
    return Op(
        name=name,
        samples={key: getattr(case, name) for key, case in REGIONS.items()},
        empty={key: getattr(case, name) for key, case in REGIONS_EMPTY.items()},
        growing=lambda k: getattr(regions_growing(k), name),
        features=features,
        coordinates=("boxes",),
        differentiable=differentiable,
        vmapped=(*features, "boxes"),
        bad=bad,
        assemble=join,
        raw=join,
    )


OPS = [
    region_op("roi_align", ("input",), ("input", "boxes"), bad_regions("input", *BAD_SCALE, *BAD_RATIO, *BAD_ALIGNED)),
    region_op("roi_pool", ("input",), ("input",), bad_regions("input", *BAD_SCALE)),
    region_op(
        "ps_roi_align", ("input",), ("input", "boxes"), bad_regions("input", *BAD_SCALE, *BAD_RATIO, BAD_CHANNELS)
    ),
    region_op("ps_roi_pool", ("input",), ("input",), bad_regions("input", *BAD_SCALE, BAD_CHANNELS)),
    region_op("prroi_pool", ("input",), ("input", "boxes"), bad_regions("input", *BAD_SCALE)),
    region_op(
        "multi_scale_roi_align",
        ("level0", "level1", "level2"),
        ("level0", "level1", "level2", "boxes"),
        bad_regions("level0", *BAD_LEVELS, *BAD_RATIO, *BAD_ALIGNED),
        join_levels,
    ),
]
