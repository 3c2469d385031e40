"""Test cases for ms_deform_attn and ms_deform_attn_fused: pyramids of feature maps, and sampling points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bad, Inputs, Op, change, put, to_other_device


@dataclass(frozen=True)
class DeformAttn:
    """The sizes and options of a sample. The letters have the same meaning as in relops.ms_deform_attn."""

    levels: tuple[tuple[int, int], ...] = ((6, 4), (3, 2))
    N: int = 2
    Q: int = 5
    M: int = 3
    D: int = 8
    P: int = 4
    shapes: str = "list"  # spatial_shapes: "list" or "tensor", on the CPU
    starts: str | None = None  # level_start_index: None, "in order", or "reversed" (the last level is stored first)
    boxes: bool = False  # fused op only: the reference points are boxes
    mask: bool = False  # fused op only: value_mask is given

    @property
    def S(self) -> int:
        return sum(h * w for h, w in self.levels)

    def pyramid(self, generator: torch.Generator) -> Inputs:
        sizes = [h * w for h, w in self.levels]
        starts = {
            None: None,
            "in order": [sum(sizes[:level]) for level in range(len(sizes))],
            "reversed": [sum(sizes[level + 1 :]) for level in range(len(sizes))],
        }[self.starts]
        return {
            "value": torch.randn(self.N, self.S, self.M, self.D, generator=generator, dtype=torch.float64),
            "spatial_shapes": list(self.levels) if self.shapes == "list" else torch.tensor(self.levels),
            "level_start_index": None if starts is None else torch.tensor(starts),
        }

    @property
    def sizes_xy(self) -> Tensor:  # [L,1,2]
        return torch.tensor(self.levels, dtype=torch.float64).flip(-1)[:, None].clamp(min=1)

    def locations(self, generator: torch.Generator) -> Tensor:
        """Return random points that lie inside the maps or up to two pixels outside.

        No point is near a pixel center, where the gradient jumps.
        """
        shape = (self.N, self.Q, self.M, len(self.levels), self.P, 2)
        corner, fraction = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        pixel = (corner * (self.sizes_xy + 3)).floor() - 2 + 0.15 + 0.7 * fraction
        return (pixel + 0.5) / self.sizes_xy

    def logits(self, generator: torch.Generator) -> Tensor:
        shape = (self.N, self.Q, self.M, len(self.levels), self.P)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def plain(self, generator: torch.Generator) -> Inputs:
        logits = self.logits(generator)
        return self.pyramid(generator) | {
            "sampling_locations": self.locations(generator),
            "attention_weights": logits.flatten(-2).softmax(-1).view(logits.shape),
        }

    def fused(self, generator: torch.Generator) -> Inputs:
        points, extents = torch.rand(2, self.N, self.Q, len(self.levels), 2, generator=generator, dtype=torch.float64)
        offsets = self.locations(generator) - points[:, :, None, :, None]
        if self.boxes:
            extents = 0.2 + 0.4 * extents
            offsets = offsets / extents[:, :, None, :, None] * (2 * self.P)
            points = torch.cat([points, extents], -1)
        else:
            offsets = offsets * self.sizes_xy
        mask = torch.rand(self.N, self.S, generator=generator) < 0.3 if self.mask else None
        return self.pyramid(generator) | {
            "reference_points": points,
            "sampling_offsets": offsets,
            "attention_logits": self.logits(generator),
            "value_mask": mask,
        }


DEFORM_ATTN = {
    "typical": DeformAttn(),
    "shapes tensor": DeformAttn(shapes="tensor", starts="in order", boxes=True, mask=True),
    "smallest": DeformAttn(levels=((1, 1),), N=1, Q=1, M=1, D=1, P=1, boxes=True),
    "odd": DeformAttn(levels=((5, 7), (1, 1), (3, 2)), N=3, M=2, D=5, P=5, starts="in order", mask=True),
    "levels reversed": DeformAttn(levels=((4, 6), (2, 3), (1, 1)), starts="reversed", shapes="tensor", mask=True),
    "D30": DeformAttn(D=30, boxes=True, P=2),
    "D71": DeformAttn(N=1, M=2, D=71, mask=True),
    # For these sizes, the CPU kernels read value without a copy: there are few queries, the pyramid is large, and D is
    # a multiple of the vector size.
    "few queries": DeformAttn(levels=((12, 10), (6, 5)), Q=2, D=32, P=1, mask=True),
    "many queries": DeformAttn(levels=((3, 5),), Q=150, M=1, D=16, P=3, boxes=True),
}
DEFORM_ATTN_EMPTY = {
    "N": DeformAttn(N=0, mask=True),
    "Q": DeformAttn(Q=0, boxes=True),
    "M": DeformAttn(M=0),
    "D": DeformAttn(D=0),
    "S": DeformAttn(levels=((0, 0), (0, 3)), shapes="tensor", mask=True),
}


def deform_attn_growing(k: int) -> DeformAttn:
    """Return sample `k` of the series.

    For k = 0 all sizes differ, because the compiler assumes that equal sizes stay equal.
    """
    return DeformAttn(
        levels=((4 + k, 7 + 2 * k), (2 + k, 3 + 3 * k)),
        N=3 + k,
        Q=10 + 7 * k,
        M=5 + k,
        D=8 + 3 * k,
        shapes="tensor",
        starts="in order",
        mask=True,
    )


def shapes_as_tensor(inputs: Inputs) -> Inputs:
    return inputs | {"spatial_shapes": torch.as_tensor(inputs["spatial_shapes"])}


def bad_deform_attn(locations: str, weights: str) -> tuple[Bad, ...]:
    """Return changes that make the sample "typical" invalid.

    This sample is float32 and has levels (6,4) and (3,2), S = 30, N = 2, Q = 5, M = 3, D = 8 and P = 4.
    """
    shapes, starts = "spatial_shapes", "level_start_index"
    coordinates = [
        bad
        for name, letters in ((locations, r"\[N,Q,M,L,P,2\]"), (weights, r"\[N,Q,M,L,P\]"))
        for bad in (
            Bad(f"{name} not a tensor", put(name, 3), TypeError, f"{name} must be a Tensor, got int"),
            Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be .*float32.*got torch.int64"),
            Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64"),
            Bad(f"{name} narrower", change(name, Tensor.bfloat16), TypeError, f"{name} must be .*got torch.bfloat16"),
            Bad(
                f"{name} on another device",
                change(name, to_other_device),
                ValueError,
                f"{name} must be on the device of value.*got",
            ),
            Bad(f"{name} batch", change(name, lambda x: x[:1]), ValueError, rf"{name} must be {letters}.*got.*\[1, 5"),
            Bad(f"{name} heads", change(name, lambda x: x[:, :, :2]), ValueError, rf"{name} must be {letters}.*got"),
            Bad(f"{name} flat", change(name, lambda x: x.flatten(3)), ValueError, rf"{name} must be {letters}.*got"),
        )
    ]
    return (
        Bad("value not a tensor", put("value", [1.0]), TypeError, "value must be a Tensor, got list"),
        Bad("value int", change("value", Tensor.int), TypeError, "value must be float64.*got torch.int32"),
        Bad(
            "value 3-D",
            change("value", lambda x: x.flatten(2)),
            ValueError,
            r"value must be \[N,S,M,D\].*\[2, 30, 24\]",
        ),
        *coordinates,
        Bad(
            f"{locations} of 3",
            change(locations, lambda x: x.repeat_interleave(2, -1)[..., :3]),
            ValueError,
            rf"{locations} must be .*got .*4, 3\]",
        ),
        Bad(
            f"{weights} queries",
            change(weights, lambda x: x[:, :4]),
            ValueError,
            rf"{weights} must be .*got .*\[2, 4, 3",
        ),
        Bad(
            "no points",
            lambda x: x | {locations: x[locations][..., :0, :], weights: x[weights][..., :0]},
            ValueError,
            "at least one level and one point, got L = 2, P = 0",
        ),
        Bad("shapes sum", put(shapes, [(6, 4), (3, 3)]), ValueError, "spatial_shapes must add up to S = 30.*= 33"),
        Bad("shapes negative", put(shapes, [(-6, -4), (3, 2)]), ValueError, r"spatial_shapes must .*\(-6, -4\)"),
        Bad(
            "shapes too many",
            put(shapes, [(6, 4), (3, 2), (0, 0)]),
            ValueError,
            r"spatial_shapes must be \[L,2\].*\[3, 2\]",
        ),
        Bad("shapes empty", put(shapes, []), ValueError, r"spatial_shapes must be \[L,2\] = \[2,2\], got"),
        Bad("shapes None", put(shapes, None), TypeError, "spatial_shapes must be .*got None"),
        Bad("shapes triples", put(shapes, [(6, 4, 1), (3, 2, 1)]), TypeError, r"spatial_shapes must be .*\(6, 4, 1\)"),
        Bad("shapes fractions", put(shapes, [(6.5, 4), (3, 2)]), TypeError, r"spatial_shapes must be .*\(6.5, 4\)"),
        Bad(
            "shapes beyond int64",
            put(shapes, [(2**70, 1), (3, 2)]),
            (TypeError, ValueError),
            "spatial_shapes must .*got",
        ),
        Bad(
            "shapes int32",
            put(shapes, torch.tensor([[6, 4], [3, 2]], dtype=torch.int32)),
            TypeError,
            "spatial_shapes must be int64, got torch.int32",
        ),
        Bad(
            "shapes overflow", put(shapes, torch.tensor([[2**62, 4], [6, 5]])), ValueError, "spatial_shapes must add up"
        ),
        Bad(
            "shapes on another device",
            put(shapes, torch.tensor([[6, 4], [3, 2]], device="meta")),
            ValueError,
            "spatial_shapes must be on the device of value.*got meta",
        ),
        Bad(
            "starts past the end",
            put(starts, torch.tensor([0, 25])),
            ValueError,
            "level_start_index must .*S = 30, got 25 for level 1 of 3 x 2",
        ),
        Bad("starts negative", put(starts, torch.tensor([-1, 24])), ValueError, "level_start_index must .*got -1"),
        Bad(
            "starts overflow",
            put(starts, torch.tensor([0, 2**63 - 1])),
            ValueError,
            "level_start_index must .*got 9223",
        ),
        Bad("starts not a tensor", put(starts, [0, 24]), TypeError, "level_start_index must be a Tensor, got list"),
        Bad(
            "starts int32",
            put(starts, torch.tensor([0, 24], dtype=torch.int32)),
            TypeError,
            "level_start_index must be int64, got torch.int32",
        ),
        Bad(
            "starts too few",
            put(starts, torch.tensor([0])),
            ValueError,
            r"level_start_index must be \[L\] = \[2\].*\[1\]",
        ),
        Bad(
            "starts on another device",
            put(starts, torch.tensor([0, 24], device="meta")),
            ValueError,
            "level_start_index must be on the device of value.*got meta",
        ),
    )


def bad_fused() -> tuple[Bad, ...]:
    points, mask = "reference_points", "value_mask"
    return (
        *bad_deform_attn("sampling_offsets", "attention_logits"),
        Bad("reference not a tensor", put(points, None), TypeError, "reference_points must be a Tensor, got NoneType"),
        Bad("reference int", change(points, Tensor.long), TypeError, "reference_points must be .*got torch.int64"),
        Bad(
            "reference wider", change(points, Tensor.double), TypeError, "reference_points must be .*got torch.float64"
        ),
        Bad(
            "reference of 3",
            change(points, lambda x: torch.cat([x, x], -1)[..., :3]),
            ValueError,
            r"reference_points must be \[N,Q,L,2/4\] = \[2,5,2,2/4\], got shape \[2, 5, 2, 3\]",
        ),
        Bad(
            "reference queries",
            change(points, lambda x: x[:, 1:]),
            ValueError,
            r"reference_points must .*\[2, 4, 2, 2\]",
        ),
        Bad(
            "reference on another device",
            change(points, to_other_device),
            ValueError,
            "reference_points must be on the device.*got",
        ),
        Bad("mask not a tensor", put(mask, True), TypeError, "value_mask must be a Tensor, got bool"),
        Bad(
            "mask uint8",
            put(mask, torch.zeros(2, 30, dtype=torch.uint8)),
            TypeError,
            "value_mask must be bool.*got torch.uint8",
        ),
        Bad(
            "mask on another device",
            put(mask, torch.zeros(2, 30, dtype=torch.bool, device="meta")),
            ValueError,
            "value_mask must be on the device of value.*got meta",
        ),
        Bad(
            "mask shape",
            lambda x: x | {mask: torch.zeros_like(x["value"][:, 6:, 0, 0]).bool()},
            ValueError,
            r"value_mask must be \[N,S\] = \[2,30\], got shape \[2, 24\]",
        ),
    )


OPS = [
    Op(
        name="ms_deform_attn",
        samples={name: case.plain for name, case in DEFORM_ATTN.items()},
        empty={name: case.plain for name, case in DEFORM_ATTN_EMPTY.items()},
        growing=lambda k: deform_attn_growing(k).plain,
        features=("value",),
        coordinates=("sampling_locations", "attention_weights"),
        differentiable=("value", "sampling_locations", "attention_weights"),
        vmapped=("value", "sampling_locations", "attention_weights"),
        bad=bad_deform_attn("sampling_locations", "attention_weights"),
        raw=shapes_as_tensor,
    ),
    Op(
        name="ms_deform_attn_fused",
        samples={name: case.fused for name, case in DEFORM_ATTN.items()},
        empty={name: case.fused for name, case in DEFORM_ATTN_EMPTY.items()},
        growing=lambda k: deform_attn_growing(k).fused,
        features=("value",),
        coordinates=("reference_points", "sampling_offsets", "attention_logits"),
        differentiable=("value", "reference_points", "sampling_offsets", "attention_logits"),
        vmapped=("value", "reference_points", "sampling_offsets", "attention_logits", "value_mask"),
        bad=bad_fused(),
        raw=shapes_as_tensor,
    ),
]
PLAIN, FUSED = OPS
