"""Sample inputs of every op: the one list that contract tests and benchmarks draw on.

An op that is added to OPS gets all of test_contract.py, one that is added to SELECTIONS all of
test_contract_selection.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import relops
from relops import reference

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
# Arguments by name, in the order of the signature; a list of tensors one by one, for Op.assemble to join.
Inputs = dict[str, Any]
# Draws them in float64 on the CPU, so that every device and dtype is given the same numbers.
Sample = Callable[[torch.Generator], Inputs]


@dataclass(frozen=True)
class Bad:
    """A change to valid inputs, and the error that must name the argument and what was got."""

    id: str
    change: Callable[[Inputs], Inputs]
    error: type[Exception] | tuple[type[Exception], ...]
    message: str
    harmless: bool = False  # the kernels make something of it


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    samples: Mapping[str, Sample]
    empty: Mapping[str, Sample]
    growing: Callable[[int], Sample]  # the k-th size of a series whose sizes all differ, without lists of sizes
    vmapped: tuple[str, ...]  # arguments that torch.vmap may map
    bad: tuple[Bad, ...]
    assemble: Callable[[Inputs], Inputs] = dict  # gives the arguments of relops.<name>
    raw: Callable[[Inputs], Inputs] = dict  # gives those of torch.ops.relops.<name>
    wide_output: bool = False  # float32 for 16-bit features

    def output_dtype(self, features: torch.dtype) -> torch.dtype:
        return torch.promote_types(features, torch.float32) if self.wide_output else features

    @property
    def function(self) -> Callable[..., Any]:
        return self.of_inputs(getattr(relops, self.name))

    @property
    def reference(self) -> Callable[..., Any]:
        return self.of_inputs(getattr(reference, self.name))

    def of_inputs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        assemble = self.assemble
        if assemble is dict:
            return function

        @functools.wraps(function)
        def assembled(**inputs: Any) -> Any:
            return function(**assemble(inputs))

        return assembled

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.relops, self.name).default


def drawn(sample: Sample, device: str, seed: int = 0) -> Inputs:
    inputs = sample(torch.Generator().manual_seed(seed))
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


@dataclass(frozen=True, kw_only=True)
class Op(Case):
    """A differentiable op with one output."""

    features: tuple[str, ...]  # arguments of the tested dtype
    coordinates: tuple[str, ...]  # arguments that stay float32 beside 16-bit features
    differentiable: tuple[str, ...]
    # How many times further than sums the rounding of what is inside may take it from the twin, of the largest value.
    noise: float = 1.0

    def draw(self, sample: Sample, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
        return self.cast(drawn(sample, device, seed), dtype, torch.promote_types(dtype, torch.float32))

    def cast(self, inputs: Inputs, features: torch.dtype, coordinates: torch.dtype) -> Inputs:
        dtypes = dict.fromkeys(self.features, features) | dict.fromkeys(self.coordinates, coordinates)
        return {name: x.to(dtypes[name]) if name in dtypes and x is not None else x for name, x in inputs.items()}

    def wanted(self, inputs: Inputs) -> tuple[str, ...]:
        """What gradients there are to: an optional argument may be None."""
        return tuple(name for name in self.differentiable if inputs[name] is not None)

    def run(
        self,
        inputs: Inputs,
        function: Callable[..., Tensor] | None = None,
        grad_output: Tensor | None = None,
        wanted: tuple[str, ...] | None = None,
    ) -> dict[str, Tensor]:
        """The output, under its name, and the gradients, under those of their arguments."""
        wanted = self.wanted(inputs) if wanted is None else wanted
        inputs = {name: x.detach().requires_grad_() if name in wanted else x for name, x in inputs.items()}
        output = (function or self.function)(**inputs)
        if wanted:
            output.backward(grad_like(output) if grad_output is None else grad_output)
        return {"output": output.detach()} | {name: inputs[name].grad for name in wanted}

    def run_raw(self, inputs: Inputs) -> Tensor:
        """The output of torch.ops.relops.<name>, whose further outputs are for its backward."""
        outputs = self.overload(*self.raw(inputs).values())
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    def run_twin(self, inputs: Inputs) -> dict[str, Tensor]:
        """The same by the twin, in float64."""
        return self.run(self.cast(inputs, torch.float64, torch.float64), self.reference)


@dataclass(frozen=True, kw_only=True)
class Selection(Case):
    """An op that selects: its outputs are indices, equal to the twin's, and perhaps numbers; none has a gradient."""

    floats: tuple[str, ...]  # arguments of any floating dtype, each
    widened: bool = True  # where these are of 16 bits, before kernels are given them
    # Of outputs, what is equal to the twin's but for rounding of the numbers among it.
    comparable: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple
    waits: Callable[[Inputs], bool] = lambda inputs: False  # for the device: where sizes of outputs depend on values

    def draw(
        self, sample: Sample, device: str = "cpu", dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
        seed: int = 0,
    ) -> Inputs:  # fmt: skip
        """`dtype`: of all floats, or of each."""
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * len(self.floats)
        inputs = drawn(sample, device, seed)
        return inputs | {name: inputs[name].to(dtype) for name, dtype in zip(self.floats, dtypes)}

    def run(self, inputs: Inputs, function: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        outputs = (function or self.function)(**inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def run_twin(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.run(inputs, self.reference)


def grad_like(output: Tensor) -> Tensor:
    """A gradient of the output that is the same numbers in every dtype."""
    steps = torch.arange(output.numel(), device=output.device) * 37 % 17 - 8
    return (steps / 8).to(output.dtype).view(output.shape)


# ---- Multi-scale deformable attention ----


@dataclass(frozen=True)
class DeformAttn:
    """Sizes and kinds of arguments of a sample; letters as in relops.ms_deform_attn."""

    levels: tuple[tuple[int, int], ...] = ((6, 4), (3, 2))
    N: int = 2
    Q: int = 5
    M: int = 3
    D: int = 8
    P: int = 4
    shapes: str = "list"  # spatial_shapes: "list" or "tensor", on the CPU
    starts: str | None = None  # level_start_index: None, "in order", or "reversed": the last level is stored first
    boxes: bool = False  # from here on fused only
    mask: bool = False

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
        """Inside and up to two pixels outside, away from pixel centers, where the gradient jumps."""
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
    # Rows as they lie, on the CPU: few queries over a large pyramid, D whole vectors.
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
    """At k = 0 no two sizes are equal: the compiler would take equal ones to be always so."""
    return DeformAttn(
        levels=((4 + k, 7 + 2 * k), (2 + k, 3 + 3 * k)), N=3 + k, Q=10 + 7 * k, M=5 + k, D=8 + 3 * k, shapes="tensor",
        starts="in order", mask=True,
    )  # fmt: skip


def shapes_as_tensor(inputs: Inputs) -> Inputs:
    return inputs | {"spatial_shapes": torch.as_tensor(inputs["spatial_shapes"])}


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("cpu" if tensor.is_cuda else "meta")


def change(name: str, f: Callable[[Any], Any]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: inputs | {name: f(inputs[name])}


def put(name: str, value: Any) -> Callable[[Inputs], Inputs]:
    return change(name, lambda _: value)


def bad_deform_attn(locations: str, weights: str) -> tuple[Bad, ...]:
    """Of "typical": levels (6,4) and (3,2), S = 30, N = 2, Q = 5, M = 3, D = 8, P = 4, float32."""
    shapes, starts = "spatial_shapes", "level_start_index"
    coordinates = [
        bad
        for name, letters in ((locations, r"\[N,Q,M,L,P,2\]"), (weights, r"\[N,Q,M,L,P\]"))
        for bad in (
            Bad(f"{name} no tensor", put(name, 3), TypeError, f"{name} must be a Tensor, got int"),
            Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be .*float32.*got torch.int64"),
            Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64"),
            Bad(f"{name} narrower", change(name, Tensor.bfloat16), TypeError, f"{name} must be .*got torch.bfloat16"),
            Bad(
                f"{name} elsewhere", change(name, elsewhere), ValueError, f"{name} must be on the device of value.*got"
            ),
            Bad(f"{name} batch", change(name, lambda x: x[:1]), ValueError, rf"{name} must be {letters}.*got.*\[1, 5"),
            Bad(f"{name} heads", change(name, lambda x: x[:, :, :2]), ValueError, rf"{name} must be {letters}.*got"),
            Bad(f"{name} flat", change(name, lambda x: x.flatten(3)), ValueError, rf"{name} must be {letters}.*got"),
        )
    ]
    return (
        Bad("value no tensor", put("value", [1.0]), TypeError, "value must be a Tensor, got list"),
        Bad("value int", change("value", Tensor.int), TypeError, "value must be float64.*got torch.int32"),
        Bad("value 3-D", change("value", lambda x: x.flatten(2)), ValueError,
            r"value must be \[N,S,M,D\].*\[2, 30, 24\]"),
        *coordinates,
        Bad(f"{locations} of 3", change(locations, lambda x: x.repeat_interleave(2, -1)[..., :3]), ValueError,
            rf"{locations} must be .*got .*4, 3\]"),
        Bad(f"{weights} queries", change(weights, lambda x: x[:, :4]), ValueError,
            rf"{weights} must be .*got .*\[2, 4, 3"),
        Bad("no points", lambda x: x | {locations: x[locations][..., :0, :], weights: x[weights][..., :0]}, ValueError,
            "at least one level and one point, got L = 2, P = 0"),
        Bad("shapes sum", put(shapes, [(6, 4), (3, 3)]), ValueError, "spatial_shapes must add up to S = 30.*= 33"),
        Bad("shapes negative", put(shapes, [(-6, -4), (3, 2)]), ValueError, r"spatial_shapes must .*\(-6, -4\)"),
        Bad("shapes too many", put(shapes, [(6, 4), (3, 2), (0, 0)]), ValueError,
            r"spatial_shapes must be \[L,2\].*\[3, 2\]"),
        Bad("shapes empty", put(shapes, []), ValueError, r"spatial_shapes must be \[L,2\] = \[2,2\], got"),
        Bad("shapes None", put(shapes, None), TypeError, "spatial_shapes must be .*got None"),
        Bad("shapes triples", put(shapes, [(6, 4, 1), (3, 2, 1)]), TypeError, r"spatial_shapes must be .*\(6, 4, 1\)"),
        Bad("shapes fractions", put(shapes, [(6.5, 4), (3, 2)]), TypeError, r"spatial_shapes must be .*\(6.5, 4\)"),
        Bad("shapes beyond int64", put(shapes, [(2**70, 1), (3, 2)]), (TypeError, ValueError),
            "spatial_shapes must .*got"),
        Bad("shapes int32", put(shapes, torch.tensor([[6, 4], [3, 2]], dtype=torch.int32)), TypeError,
            "spatial_shapes must be int64, got torch.int32"),
        Bad("shapes overflow", put(shapes, torch.tensor([[2**62, 4], [6, 5]])), ValueError,
            "spatial_shapes must add up"),
        Bad("shapes elsewhere", put(shapes, torch.tensor([[6, 4], [3, 2]], device="meta")), ValueError,
            "spatial_shapes must be on the device of value.*got meta"),
        Bad("starts past the end", put(starts, torch.tensor([0, 25])), ValueError,
            "level_start_index must .*S = 30, got 25 for level 1 of 3 x 2"),
        Bad("starts negative", put(starts, torch.tensor([-1, 24])), ValueError, "level_start_index must .*got -1"),
        Bad("starts overflow", put(starts, torch.tensor([0, 2**63 - 1])), ValueError,
            "level_start_index must .*got 9223"),
        Bad("starts no tensor", put(starts, [0, 24]), TypeError, "level_start_index must be a Tensor, got list"),
        Bad("starts int32", put(starts, torch.tensor([0, 24], dtype=torch.int32)), TypeError,
            "level_start_index must be int64, got torch.int32"),
        Bad("starts too few", put(starts, torch.tensor([0])), ValueError,
            r"level_start_index must be \[L\] = \[2\].*\[1\]"),
        Bad("starts elsewhere", put(starts, torch.tensor([0, 24], device="meta")), ValueError,
            "level_start_index must be on the device of value.*got meta"),
    )  # fmt: skip


def bad_fused() -> tuple[Bad, ...]:
    points, mask = "reference_points", "value_mask"
    return (
        *bad_deform_attn("sampling_offsets", "attention_logits"),
        Bad("reference no tensor", put(points, None), TypeError, "reference_points must be a Tensor, got NoneType"),
        Bad("reference int", change(points, Tensor.long), TypeError, "reference_points must be .*got torch.int64"),
        Bad("reference wider", change(points, Tensor.double), TypeError,
            "reference_points must be .*got torch.float64"),
        Bad("reference of 3", change(points, lambda x: torch.cat([x, x], -1)[..., :3]), ValueError,
            r"reference_points must be \[N,Q,L,2/4\] = \[2,5,2,2/4\], got shape \[2, 5, 2, 3\]"),
        Bad("reference queries", change(points, lambda x: x[:, 1:]), ValueError,
            r"reference_points must .*\[2, 4, 2, 2\]"),
        Bad("reference elsewhere", change(points, elsewhere), ValueError,
            "reference_points must be on the device.*got"),
        Bad("mask no tensor", put(mask, True), TypeError, "value_mask must be a Tensor, got bool"),
        Bad("mask uint8", put(mask, torch.zeros(2, 30, dtype=torch.uint8)), TypeError,
            "value_mask must be bool.*got torch.uint8"),
        Bad("mask elsewhere", put(mask, torch.zeros(2, 30, dtype=torch.bool, device="meta")), ValueError,
            "value_mask must be on the device of value.*got meta"),
        Bad("mask shape", lambda x: x | {mask: torch.zeros_like(x["value"][:, 6:, 0, 0]).bool()}, ValueError,
            r"value_mask must be \[N,S\] = \[2,30\], got shape \[2, 24\]"),
    )  # fmt: skip


# ---- Regions ----


@dataclass(frozen=True)
class Regions:
    """Sizes and kinds of arguments of a sample; letters as in relops.roi_align.

    Boxes are drawn again until rounding, of theirs to whatever dtype or of the arithmetic, decides nothing: how many
    samples, between which pixels or whether on the map, which pixels, which level.
    """

    N: int = 2
    C: int = 5  # of the output
    H: int = 9
    W: int = 12
    K: int = 7
    PH: int = 3
    PW: int = 2
    scale: float = 0.5
    sampling_ratio: int = -1
    aligned: bool = False
    channels_last: bool = False
    canonical_box_size: float = 3.0  # of the second level; multi-scale only
    levels: int = 1  # each of half the size of the one before

    @property
    def finest(self) -> int:
        return round(-math.log2(self.scale))

    def arguments(self, features: Inputs, boxes: Tensor, *options: str) -> Inputs:
        everything = {
            "spatial_scale": self.scale,
            "spatial_scales": [self.scale / 2**level for level in range(self.levels)],
            "sampling_ratio": self.sampling_ratio,
            "aligned": self.aligned,
            "canonical_box_size": self.canonical_box_size,
            "canonical_level": self.finest + 1,
        }
        wanted = {name: everything[name] for name in options}
        return features | {"boxes": boxes, "output_size": (self.PH, self.PW)} | wanted

    def map(self, generator: torch.Generator, channels: int, level: int = 0, distinct: bool = False) -> Tensor:
        shape = (self.N, channels, -(-self.H // 2**level), -(-self.W // 2**level))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if distinct:  # in every dtype, for maxima without ties
            x = (x.flatten(2).argsort(-1).view(shape) - self.H * self.W // 2).double() / 64
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def boxes(self, generator: torch.Generator, decides: Callable[[Tensor], Tensor]) -> Tensor:
        """Of every size, inside, across the border and outside."""
        M = 100 * self.K + 1
        width_height = torch.tensor([self.W, self.H], dtype=torch.float64).clamp(min=1)
        center, extent = torch.rand(2, M, 2, generator=generator, dtype=torch.float64)
        center, half = (1.2 * center - 0.1) * width_height, 0.03 * 12**extent * width_height
        index = torch.randint(max(self.N, 1), (M, 1), generator=generator)
        boxes = torch.cat([index, (center - half) / self.scale, (center + half) / self.scale], 1)
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        steady = ~torch.stack([decides(boxes.to(dtype).double()) for dtype in dtypes]).any(0)
        kept = boxes[steady][: self.K]
        assert len(kept) == self.K
        return kept

    def sampled_decides(self, aligned: bool) -> Callable[[Tensor], Tensor]:
        def decides(boxes: Tensor) -> Tensor:
            scale, found = torch.full((len(boxes), 1), self.scale, dtype=torch.float64), False
            if self.levels > 1:
                side = ((boxes[:, 3:4] - boxes[:, 1:2]) * (boxes[:, 4:5] - boxes[:, 2:3])).sqrt()
                level = self.finest + 1 + (side / self.canonical_box_size).log2()
                scale = 2.0 ** -level.floor().clamp(self.finest, self.finest + self.levels - 1)
                found = near_whole(level)
            for first, last, bins in ((1, 3, self.PW), (2, 4, self.PH)):
                begin, end = boxes[:, [first]] * scale, boxes[:, [last]] * scale
                length = end - begin
                if not aligned:
                    found = found | ((length - 1).abs() < 1e-2)
                    length = length.clamp(min=1)
                bin = length / bins
                if self.sampling_ratio > 0:
                    grid = torch.full_like(bin, self.sampling_ratio)
                else:
                    grid = bin.ceil()
                    found = found | (near_whole(bin) & (length != 1))  # which widened boxes have in every dtype
                step = torch.arange(bins * int(grid.max()))
                position = begin - (0.5 if aligned else 0) + (step + 0.5) * bin / grid
                found = found | (near_whole(position) & (step < bins * grid)).any(1, keepdim=True)
            return found[:, 0]

        return decides

    def rounded_decides(self, last_included: bool) -> Callable[[Tensor], Tensor]:
        def decides(boxes: Tensor) -> Tensor:
            found = near_whole(boxes[:, 1:] * self.scale + 0.5).any(1)
            corners = (boxes * self.scale).round()
            for first, last, bins in ((1, 3, self.PW), (2, 4, self.PH)):
                length = (corners[:, [last]] - corners[:, [first]] + last_included).clamp(min=1).long()
                edges = torch.arange(bins + 1) * length  # in units of 1 / bins
                for dtype in (torch.float32, torch.float64):
                    at = torch.arange(bins + 1) * (length.to(dtype) / bins)
                    found |= ((at.floor() != edges // bins) | (at.ceil() != -(-edges // bins))).any(1)
            return found

        return decides

    def roi_align(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.sampled_decides(self.aligned))
        features = {"input": self.map(generator, self.C)}
        return self.arguments(features, boxes, "spatial_scale", "sampling_ratio", "aligned")

    def ps_roi_align(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.sampled_decides(True))
        features = {"input": self.map(generator, self.C * self.PH * self.PW)}
        return self.arguments(features, boxes, "spatial_scale", "sampling_ratio")

    def multi_scale_roi_align(self, generator: torch.Generator) -> Inputs:
        case = replace(self, levels=3)
        boxes = case.boxes(generator, case.sampled_decides(self.aligned))
        features = {f"level{level}": case.map(generator, self.C, level) for level in range(3)}
        return case.arguments(
            features, boxes, "spatial_scales", "sampling_ratio", "aligned", "canonical_box_size", "canonical_level"
        )

    def roi_pool(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.rounded_decides(last_included=True))
        return self.arguments({"input": self.map(generator, self.C, distinct=True)}, boxes, "spatial_scale")

    def ps_roi_pool(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, self.rounded_decides(last_included=False))
        features = {"input": self.map(generator, self.C * self.PH * self.PW)}
        return self.arguments(features, boxes, "spatial_scale")

    def prroi_pool(self, generator: torch.Generator) -> Inputs:
        boxes = self.boxes(generator, lambda boxes: torch.zeros(len(boxes), dtype=torch.bool))
        return self.arguments({"input": self.map(generator, self.C)}, boxes, "spatial_scale")


def near_whole(x: Tensor) -> Tensor:
    return (x - x.round()).abs() < 1e-3


def join_levels(inputs: Inputs) -> Inputs:
    levels = [x for name, x in inputs.items() if name.startswith("level")]
    return {"inputs": levels} | {name: x for name, x in inputs.items() if not name.startswith("level")}


REGIONS = {
    "typical": Regions(),
    "smallest": Regions(N=1, C=1, H=1, W=1, K=1, PH=1, PW=1, scale=1.0),
    "fixed grid": Regions(
        N=3, C=16, H=17, W=21, K=12, PH=4, PW=5, scale=0.25, sampling_ratio=2, aligned=True, canonical_box_size=10.0
    ),
    "channels_last": Regions(C=40, K=9, sampling_ratio=2, channels_last=True),
    "channels_last odd": Regions(
        N=1, H=13, K=30, PH=2, PW=7, scale=0.125, aligned=True, channels_last=True, canonical_box_size=14.0
    ),
}
REGIONS_EMPTY = {
    "N": Regions(N=0, K=0),
    "K": Regions(K=0, channels_last=True),
    "C": Regions(C=0),
    "H": Regions(H=0, sampling_ratio=2),
    "W": Regions(W=0, channels_last=True),
}


def regions_growing(k: int) -> Regions:
    """At k = 0 no two sizes are equal, nor one to the 5 columns of the boxes."""
    return Regions(N=4 + k, C=8 + 3 * k, H=22 + 4 * k, W=26 + 8 * k, K=9 + 2 * k, canonical_box_size=7.0)


def bad_options(name: str, error: type[Exception], *values: Any, harmless: bool = False) -> Iterator[Bad]:
    for value in values:
        message = rf"{name}(\[0\])? must be .*got .*{re.escape(repr(value))}"
        yield Bad(f"{name} {value!r}", put(name, value), error, message, harmless)


def bad_numbers(name: str, rule: str, *values: Any) -> Iterator[Bad]:
    """The kernels compute with any."""
    for value in values:
        error = ValueError if type(value) in (float, int) else TypeError
        message = rf"{name} must be a number {rule}, got {re.escape(repr(value))}"
        yield Bad(f"{name} {value!r}", put(name, value), error, message, harmless=True)


def bad_regions(features: str, *more: Bad) -> tuple[Bad, ...]:
    """Of "typical": N = 2, K = 7, PH = 3, PW = 2, float32."""
    first = r"inputs\[0\]" if features == "level0" else features

    def split(f: Callable[[Tensor], Any]) -> Callable[[Inputs], Inputs]:
        return change("boxes", lambda x: [x[:3, 1:], f(x[3:, 1:])])

    return (
        Bad(f"{features} no tensor", put(features, [1.0]), TypeError, f"{first} must be a Tensor, got list"),
        Bad(f"{features} int", change(features, Tensor.int), TypeError, f"{first} must be float64.*got torch.int32"),
        Bad(f"{features} 3-D", change(features, lambda x: x[0]), ValueError, rf"{first} must be \[N,C,H,W\], got "),
        Bad("boxes no tensor", put("boxes", 3), TypeError, r"boxes must be a Tensor \[K,5\] or a list.*got int"),
        Bad("boxes int", change("boxes", Tensor.long), TypeError, "boxes must be .*float32.*got torch.int64"),
        Bad("boxes wider", change("boxes", Tensor.double), TypeError, "boxes must be .*got torch.float64"),
        Bad("boxes narrower", change("boxes", Tensor.bfloat16), TypeError, "boxes must be .*got torch.bfloat16"),
        Bad("boxes elsewhere", change("boxes", elsewhere), ValueError, "boxes must be on the device of input.*got"),
        Bad("boxes of 4", change("boxes", lambda x: x[:, 1:]), ValueError, r"boxes must be \[K,5\].*got .*\[7, 4\]"),
        # What torchvision raises there, and its users catch.
        Bad("boxes of 4, asserted", change("boxes", lambda x: x[:, 1:]), AssertionError, r"boxes must be \[K,5\]"),
        Bad("boxes 1-D", change("boxes", lambda x: x[0]), ValueError, r"boxes must be \[K,5\].*got shape \[5\]"),
        Bad("list short", change("boxes", lambda x: [x[:, 1:]]), ValueError,
            "boxes must be a list of N = 2 Tensors.*got 1"),
        Bad("list no tensor", split(Tensor.tolist), TypeError, r"boxes\[1\] must be a Tensor, got list"),
        Bad("list wider", split(Tensor.double), TypeError, r"boxes\[1\] must be .*got torch.float64"),
        Bad("list of 3", split(lambda x: x[:, 1:]), AssertionError, r"boxes\[1\] must be \[Ki,4\].*\[4, 3\]"),
        *bad_options("output_size", ValueError, 0, (3, -1), (3,), (1, 2, 3)),
        *bad_options("output_size", TypeError, "3", 2.5, (3, 2.5), None),
        *more,
    )  # fmt: skip


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
    Bad("no list", lambda x: x | {"inputs": x["level0"]}, TypeError, "inputs must be a list of Tensors.*got Tensor"),
    Bad("no levels", lambda x: {name: x[name] for name in x if "level" not in name[:5]}, ValueError,
        "inputs must hold at least one level, got none"),
    Bad("level elsewhere", change("level1", elsewhere), ValueError, r"inputs\[1\] must be on the device of .*got"),
    Bad("level batch", change("level2", lambda x: x[:1]), ValueError,
        r"inputs\[2\] must be \[N,C,Hl,Wl\] with N, C = 2, 5 .*got shape \[1, 5, 3, 3\]"),
    Bad("level wider", change("level1", Tensor.double), TypeError, r"inputs\[1\] must be torch.float32.*got .*float64"),
    Bad("scales too few", put("spatial_scales", [0.5, 0.25]), ValueError, "spatial_scales must .* 3 levels .*got 2"),
    Bad("scales no list", put("spatial_scales", 0.5), TypeError, "spatial_scales must be a list of floats, got float"),
    *bad_options("spatial_scales", ValueError, [0.5, 0.25, 0.25], [0.3, 0.15, 0.075], harmless=True),
    Bad("scales negative", put("spatial_scales", [-0.5, -0.25, -0.125]), ValueError,
        r"spatial_scales\[0\] must be a finite positive number, got -0.5"),
    *bad_options("canonical_box_size", ValueError, 0.0, math.nan, harmless=True),
    *bad_options("canonical_level", TypeError, 3.5),
)  # fmt: skip


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


# ---- IoU ----


@dataclass(frozen=True)
class BoxPairs:
    """Sizes and kinds of arguments of a sample; letters as in relops.box_iou.

    Coordinates of a and of b never meet, in no dtype: there the gradient jumps.
    """

    A: int = 7
    B: int = 5
    N: int | None = None
    inverted: bool = False  # some, in one direction or both
    spread: float = 8.0  # of centers; boxes are up to 10 wide

    def arguments(self, generator: torch.Generator) -> Inputs:
        """Multiples of 1/2, and 1/8 or 3/8: exact in 16 bits."""
        batch = () if self.N is None else (self.N,)
        a, b = (self.boxes(generator, (*batch, K, 1), offset) for K, offset in ((self.A, 0.125), (self.B, 0.375)))
        return {"a": a, "b": b}

    def boxes(self, generator: torch.Generator, shape: tuple[int, ...], offset: float) -> Tensor:
        def whole(high: float) -> Tensor:
            return torch.rand(*shape[:-1], 2, generator=generator, dtype=torch.float64).mul(high).floor()

        corner, size = whole(self.spread), whole(10) + 1
        if self.inverted:
            size = size * (whole(4) > 0).double().mul(2).sub(1)
        return torch.cat([corner, corner + size], -1) / 2 + offset


BOX_PAIRS = {
    "typical": BoxPairs(),
    "one pair": BoxPairs(A=1, B=1, spread=2.0),
    "batch": BoxPairs(N=3, A=9, B=18),
    "many columns": BoxPairs(A=4, B=139),
    "many rows": BoxPairs(A=139, B=3),
    "one column": BoxPairs(N=2, A=21, B=1),
    "inverted": BoxPairs(A=12, B=20, inverted=True),
    "apart": BoxPairs(A=6, B=8, spread=50.0),
}
BOX_PAIRS_EMPTY = {
    "A": BoxPairs(A=0),
    "B": BoxPairs(B=0),
    "A and B": BoxPairs(A=0, B=0),
    "N": BoxPairs(N=0),
    "B of a batch": BoxPairs(N=2, B=0),
}
# Of "typical": A = 7, B = 5, float32.
BAD_BOX_PAIRS = (
    Bad("a no tensor", put("a", [[0.0, 0.0, 1.0, 1.0]]), TypeError, "a must be a Tensor, got list"),
    Bad("b no tensor", put("b", None), TypeError, "b must be a Tensor, got NoneType"),
    Bad("a complex", change("a", Tensor.cfloat), TypeError, "a must be float64.*got torch.complex64"),
    Bad("b bool", change("b", Tensor.bool), TypeError, "b must be float64.*or integer, got torch.bool"),
    Bad("a of 5", change("a", lambda x: x[:, [0, 0, 1, 2, 3]]), ValueError,
        r"a must be \[A,4\] or \[N,A,4\], got shape \[7, 5\]"),
    Bad("a 1-D", change("a", lambda x: x[0]), ValueError, r"a must be \[A,4\] or \[N,A,4\], got shape \[4\]"),
    Bad("b 4-D", change("b", lambda x: x[None, None]), ValueError, r"b must be \[B,4\] or \[N,B,4\], got .*1, 5, 4\]"),
    Bad("b of 3", change("b", lambda x: x[:, 1:]), ValueError, r"b must be \[B,4\] or \[N,B,4\], got shape \[5, 3\]"),
    Bad("b wider", change("b", Tensor.double), TypeError, "b must be .*float32 where a is torch.float32, .*float64"),
    Bad("a wider", change("a", Tensor.double), TypeError, "b must be float64 where a is torch.float64, got .*float32"),
    Bad("b elsewhere", change("b", elsewhere), ValueError, "b must be on the device of a.*got"),
    Bad("a alone batched", change("a", lambda x: x[None]), ValueError,
        r"b must be \[N,B,4\] with the N of a, 1, got shape \[5, 4\]"),
    Bad("b alone batched", change("b", lambda x: x[None]), ValueError,
        r"b must be \[B,4\] as a is \[A,4\], got shape \[1, 5, 4\]"),
    Bad("batches differ", lambda x: {"a": x["a"].expand(2, -1, -1), "b": x["b"].expand(3, -1, -1)}, ValueError,
        r"b must be \[N,B,4\] with the N of a, 2, got shape \[3, 5, 4\]"),
)  # fmt: skip


def box_pairs_growing(k: int) -> BoxPairs:
    """At k = 0 no two sizes are equal, nor one to the 4 coordinates."""
    return BoxPairs(N=3 + k, A=7 + 2 * k, B=10 + 3 * k)


def box_pair_op(name: str) -> Op:
    return Op(
        name=name,
        samples={key: case.arguments for key, case in BOX_PAIRS.items()},
        empty={key: case.arguments for key, case in BOX_PAIRS_EMPTY.items()},
        growing=lambda k: box_pairs_growing(k).arguments,
        features=("a", "b"),
        coordinates=(),
        differentiable=("a", "b"),
        vmapped=("a", "b"),
        bad=BAD_BOX_PAIRS,
        wide_output=True,
    )


# ---- Relations ----


@dataclass(frozen=True)
class Relations:
    """Sizes and kinds of arguments of a sample; letters as in relops.relation_attention.

    Coordinates are whole numbers, and boxes odd numbers of pixels wide, so that distances are exact in float32 and far
    from the 1e-3 of a side where the gradient jumps. It jumps too where b is 1e-6, which hardly any is near.
    """

    N: int = 2
    Q: int = 6
    K: int = 9
    M: int = 3
    D: int = 8
    Dv: int = 8
    bias: float | None = 1.0  # the mean of geometry_bias
    clamped: bool = False  # the last head: b is negative for all pairs
    same_boxes: bool = False  # of queries and keys
    mask: str | None = None  # None, "some" keys, or "all" of image 0 and some of the others
    options: tuple[tuple[str, Any], ...] = ()

    def relation_attention(self, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def boxes(count: int) -> Tensor:
            center, half = torch.rand(2, self.N, count, 2, generator=generator, dtype=torch.float64)
            center, half = (800 * center).floor(), (5 + 145 * half).floor()
            return torch.cat([center - half, center + half], -1)

        weight, bias, mask = 0.1 * normal(self.M, 64), None, None
        if self.bias is None:
            weight[:, 47] += 4  # the slowest cosine of log wq / wk, which is never small
        else:
            bias = self.bias + 0.3 * normal(self.M)
            bias[self.M - self.clamped :] = -10
        if self.mask is not None:
            mask = torch.rand(self.N, self.K, generator=generator) < 0.4
            mask[: 1 if self.mask == "all" else 0] = True
        query_boxes = boxes(self.Q)
        return {
            "query": normal(self.N, self.Q, self.M, self.D),
            "key": normal(self.N, self.K, self.M, self.D),
            "value": normal(self.N, self.K, self.M, self.Dv),
            "query_boxes": query_boxes,
            "key_boxes": query_boxes.clone() if self.same_boxes else boxes(self.K),
            "geometry_weight": weight,
            "geometry_bias": bias,
            "key_mask": mask,
            "geometry": "paper",
            "wavelength": 1000.0,
            "scale": None,
        } | dict(self.options)


RELATIONS = {
    "typical": Relations(mask="some"),
    "one": Relations(N=1, Q=1, K=2, M=1, D=1, Dv=1),
    "official": Relations(Q=9, D=16, Dv=16, same_boxes=True, options=(("geometry", "official"),)),
    "no bias": Relations(Q=4, K=20, D=5, Dv=7, bias=None),
    "image masked": Relations(N=3, K=12, M=2, D=12, Dv=3, clamped=True, mask="all"),
    "one head": Relations(Q=17, K=33, M=1, D=64, Dv=64),
    "many": Relations(Q=40, K=135, M=2, D=32, Dv=32, bias=3.0, mask="some"),
    "numbers": Relations(N=1, D=33, Dv=65, clamped=True, options=(("wavelength", 10000.0), ("scale", -0.3))),
    "no features": Relations(D=0, mask="all", options=(("geometry", "official"), ("wavelength", 50.0))),
}
RELATIONS_EMPTY = {
    "N": Relations(N=0, mask="some"),
    "Q": Relations(Q=0),
    "K": Relations(K=0),
    "K masked": Relations(K=0, mask="all"),
    "M": Relations(M=0, mask="some"),
    "Dv": Relations(Dv=0),
    "everything masked": Relations(N=1, mask="all"),
}


def relations_growing(k: int) -> Relations:
    """At k = 0 no two sizes are equal."""
    return Relations(N=3 + k, Q=11 + 3 * k, K=17 + 5 * k, M=5 + k, D=8 + k, Dv=23 + 2 * k, mask="some")


def raw_relations(inputs: Inputs) -> Inputs:
    return inputs | {"allow_tf32": False}


def bad_relations() -> Iterator[Bad]:
    """Of "typical": N = 2, Q = 6, K = 9, M = 3, D = 8, Dv = 8, float32."""
    for name, letters in (("query", r"\[N,Q,M,D\]"), ("key", r"\[N,K,M,D\]"), ("value", r"\[N,K,M,Dv\]")):
        rule = "float64" if name == "query" else "torch.float32, the dtype of query"
        yield Bad(f"{name} no tensor", put(name, [1.0]), TypeError, f"{name} must be a Tensor, got list")
        yield Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be {rule}.*got torch.int64")
        yield Bad(f"{name} 3-D", change(name, lambda x: x[0]), ValueError, rf"{name} must be {letters}, got .*, 3, 8\]")
    for name in ("key", "value"):
        yield Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64")
        yield Bad(f"{name} elsewhere", change(name, elsewhere), ValueError, f"{name} must be on the device of query.*")
        yield Bad(f"{name} batch", change(name, lambda x: x[:1]), ValueError, rf"{name} must be .*got shape \[1, 9, 3")
        yield Bad(
            f"{name} heads", change(name, lambda x: x[:, :, 1:]), ValueError, rf"{name} must be .*got .*9, 2, 8\]"
        )
    yield Bad(
        "key narrow", change("key", lambda x: x[..., 1:]), ValueError, r"key must be .*= \[2,9,3,8\], got .*3, 7\]"
    )
    yield Bad(
        "value short", change("value", lambda x: x[:, 1:]), ValueError, r"value must be .*\[2,9,3,8\], got .*8, 3, 8"
    )
    for name, letters in (
        ("query_boxes", r"\[N,Q,4\] = \[2,6,4\]"),
        ("key_boxes", r"\[N,K,4\] = \[2,9,4\]"),
        ("geometry_weight", r"\[M,64\] = \[3,64\]"),
        ("geometry_bias", r"\[M\] = \[3\]"),
    ):
        yield Bad(f"{name} no tensor", put(name, 3), TypeError, f"{name} must be a Tensor, got int")
        yield Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be .*float32.*got torch.int64")
        yield Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64")
        yield Bad(f"{name} narrower", change(name, Tensor.half), TypeError, f"{name} must be .*got torch.float16")
        yield Bad(f"{name} elsewhere", change(name, elsewhere), ValueError, f"{name} must be on the device of query")
        yield Bad(f"{name} short", change(name, lambda x: x[1:]), ValueError, f"{name} must be {letters}, got shape")
        yield Bad(f"{name} narrow", change(name, lambda x: x[..., 1:]), ValueError, f"{name} must be {letters}, got")
        yield Bad(f"{name} another dimension", change(name, lambda x: x[None]), ValueError, f"{name} must be {letters}")
    yield Bad("weight None", put("geometry_weight", None), TypeError, "geometry_weight must be a Tensor, got NoneType")
    mask = "key_mask"
    yield Bad("mask no tensor", put(mask, True), TypeError, "key_mask must be a Tensor, got bool")
    yield Bad("mask uint8", change(mask, Tensor.byte), TypeError, "key_mask must be bool .*got torch.uint8")
    yield Bad("mask elsewhere", change(mask, elsewhere), ValueError, "key_mask must be on the device of query.*got")
    yield Bad("mask short", change(mask, lambda x: x[:, 1:]), ValueError, r"key_mask must be \[N,K\] = \[2,9\], got")
    yield Bad("mask flat", change(mask, lambda x: x[0]), ValueError, r"key_mask must be \[N,K\] = \[2,9\], got .*\[9\]")
    yield from bad_options("geometry", ValueError, "query", None, 1, harmless=True)
    yield from bad_numbers("wavelength", "positive and finite", 0.0, -1.0, math.nan, math.inf, True)
    yield from bad_numbers("scale", "finite, or None", math.nan, math.inf, True)
    for name in ("wavelength", "scale"):
        yield Bad(f"{name} str", put(name, "1"), TypeError, f"{name} must be a number.*got '1'")


# ---- Local relation ----


@dataclass(frozen=True)
class Windows:
    """Sizes and kinds of arguments of a sample; letters as in relops.local_relation."""

    N: int = 2
    C: int = 7
    G: int = 3
    H: int = 6
    W: int = 9
    k: int = 3
    stride: int = 1
    dilation: int = 1
    similarity: str = "squared_difference"
    border: str = "mask"
    prior: bool = True
    channels_last: bool = False

    def local_relation(self, generator: torch.Generator) -> Inputs:
        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.contiguous(memory_format=torch.channels_last) if self.channels_last and len(shape) == 4 else x

        query = draw(self.N, self.G, -(-self.H // self.stride), -(-self.W // self.stride))
        key = draw(self.N, self.G, self.H, self.W)
        if self.similarity == "absolute_difference":  # apart in every dtype, because the gradient jumps where they meet
            query, key = (2 * query).round() / 2, (2 * key).round() / 2 + 0.25
        return {
            "query": query,
            "key": key,
            "value": draw(self.N, self.C, self.H, self.W),
            "prior": draw(self.G, self.k, self.k) if self.prior else None,
            "kernel_size": self.k,
            "stride": self.stride,
            "dilation": self.dilation,
            "similarity": self.similarity,
            "border": self.border,
        }


WINDOWS = {
    "typical": Windows(),
    "one": Windows(N=1, C=1, G=1, H=1, W=1, k=1, prior=False),
    "even": Windows(k=4, G=2, C=6, similarity="absolute_difference", border="zero"),
    "product": Windows(k=5, G=1, C=12, W=21, similarity="product", channels_last=True),
    "strided": Windows(k=3, H=7, W=19, C=16, G=2, stride=2, dilation=2, border="zero", channels_last=True),
    "far": Windows(H=11, W=13, k=4, stride=3, dilation=2, similarity="product", prior=False),
    "gaps": Windows(H=9, W=10, k=2, G=4, stride=4, similarity="absolute_difference", channels_last=True),
    "wide window": Windows(N=1, C=3, G=2, H=8, W=5, k=15, border="zero"),
    "beyond the map": Windows(N=1, H=4, W=5, k=5, dilation=3, similarity="product", border="zero"),
    "ragged": Windows(N=1, C=6, G=5, W=40),  # three groups of two channels, two of none
    "wide groups": Windows(N=1, C=20, G=1, H=12, W=17, similarity="product"),
}
WINDOWS_EMPTY = {
    "N": Windows(N=0),
    "C": Windows(C=0),
    "G": Windows(C=0, G=0),
    "H": Windows(H=0, stride=2),
    "W": Windows(W=0, channels_last=True),
}


def windows_growing(k: int) -> Windows:
    """At k = 0 no two sizes are equal."""
    return Windows(N=2 + k, C=23 + 3 * k, G=5 + k, H=7 + 2 * k, W=11 + 3 * k, k=3, stride=2)


def bad_windows() -> Iterator[Bad]:
    """Of "typical": N = 2, C = 7, G = 3, H = 6, W = 9, k = 3, float32."""
    for name, letters in (("query", r"\[N,G,Ho,Wo\]"), ("key", r"\[N,G,H,W\]"), ("value", r"\[N,C,H,W\]")):
        rule = "float64" if name == "value" else "torch.float32, the dtype of value"
        yield Bad(f"{name} no tensor", put(name, [1.0]), TypeError, f"{name} must be a Tensor, got list")
        yield Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be {rule}.*got torch.int64")
        yield Bad(f"{name} 3-D", change(name, lambda x: x[0]), ValueError, rf"{name} must be {letters}, got .*, 6, 9\]")
    for name in ("query", "key"):
        yield Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64")
        yield Bad(f"{name} elsewhere", change(name, elsewhere), ValueError, f"{name} must be on the device of value.*")
        yield Bad(f"{name} batch", change(name, lambda x: x[:1]), ValueError, rf"{name} must be .*got shape \[1, 3")
        yield Bad(f"{name} short", change(name, lambda x: x[:, :, 1:]), ValueError, rf"{name} must be .*got .*3, 5, 9")
        yield Bad(f"{name} narrow", change(name, lambda x: x[..., 1:]), ValueError, rf"{name} must be .*got .*3, 6, 8")
    yield Bad(
        "query groups", change("query", lambda x: x[:, 1:]), ValueError, r"query must be .*= \[2,3,6,9\], got .*2, 2, 6"
    )
    yield Bad(
        "no groups", lambda x: x | {"query": x["query"][:, :0], "key": x["key"][:, :0], "prior": x["prior"][:0]},
        ValueError, "key must have at least one group for the C = 7 channels of value, got G = 0",
    )  # fmt: skip
    prior = r"prior must be \[G,k,k\] = \[3,3,3\]"
    yield Bad("prior no tensor", put("prior", 3), TypeError, "prior must be a Tensor, got int")
    yield Bad("prior int", change("prior", Tensor.long), TypeError, "prior must be .*float32.*got torch.int64")
    yield Bad("prior wider", change("prior", Tensor.double), TypeError, "prior must be .*got torch.float64")
    yield Bad("prior narrower", change("prior", Tensor.half), TypeError, "prior must be .*got torch.float16")
    yield Bad("prior elsewhere", change("prior", elsewhere), ValueError, "prior must be on the device of value")
    yield Bad("prior groups", change("prior", lambda x: x[1:]), ValueError, rf"{prior}, got shape \[2, 3, 3\]")
    yield Bad("prior flat", change("prior", lambda x: x.flatten(1)), ValueError, rf"{prior}, got shape \[3, 9\]")
    yield Bad("prior of another window", put("kernel_size", 5), ValueError, r"prior must be .*\[3,5,5\], got")
    yield from bad_options("kernel_size", ValueError, 0, -3, 64)
    yield from bad_options("stride", ValueError, 0, -1, 2**25)
    yield from bad_options("dilation", ValueError, 0, -1, 2**25)
    for name in ("kernel_size", "stride", "dilation"):
        yield from bad_options(name, TypeError, 2.5, "3", None, (3, 3))
        yield Bad(
            f"{name} True", put(name, True), TypeError, f"{name} must be an int from 1 to .*got True", harmless=True
        )
    yield from bad_options("similarity", ValueError, "cosine", "", None, 1)
    yield from bad_options("border", ValueError, "reflect", None, True, harmless=True)


# ---- Ranks ----


@dataclass(frozen=True)
class Ranks:
    """Numbers up to 100, of which 16-bit dtypes have fractions."""

    shape: tuple[int, ...] = (3, 7)
    dim: int = 16
    wavelength: float = 1000.0

    def rank_embedding(self, generator: torch.Generator) -> Inputs:
        ranks = 100 * torch.rand(self.shape, generator=generator, dtype=torch.float64)
        return {"ranks": ranks, "dim": self.dim, "wavelength": self.wavelength}


RANKS = {
    "typical": Ranks(),
    "one": Ranks((1,), dim=2),
    "odd": Ranks((2, 1, 5), dim=46, wavelength=10000.0),
    "wide": Ranks((5,), dim=1024),
    "many": Ranks((700,), dim=6, wavelength=0.5),
}
RANKS_EMPTY = {"all": Ranks((0,)), "some": Ranks((3, 0, 2))}
# Of "typical": 3 x 7, float32.
BAD_RANKS = (
    Bad("ranks no tensor", put("ranks", [1, 2]), TypeError, "ranks must be a Tensor, got list"),
    Bad("ranks bool", change("ranks", Tensor.bool), TypeError, "ranks must be of an integer dtype.*got torch.bool"),
    Bad("ranks complex", change("ranks", Tensor.cfloat), TypeError, "ranks must be .*got torch.complex64"),
    *bad_options("dim", ValueError, 0, 1, 17, -2),
    *bad_options("dim", TypeError, 2.5, "16", None),
    Bad("dim True", put("dim", True), TypeError, "dim must be an int, got True"),
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
    box_pair_op("box_iou"),
    box_pair_op("generalized_box_iou"),
    Op(
        name="relation_attention",
        samples={key: case.relation_attention for key, case in RELATIONS.items()},
        empty={key: case.relation_attention for key, case in RELATIONS_EMPTY.items()},
        growing=lambda k: relations_growing(k).relation_attention,
        features=("query", "key", "value"),
        coordinates=("query_boxes", "key_boxes", "geometry_weight", "geometry_bias"),
        differentiable=(
            "query",
            "key",
            "value",
            "query_boxes",
            "key_boxes",
            "geometry_weight",
            "geometry_bias",
        ),
        vmapped=("query", "key", "value", "query_boxes", "key_boxes", "key_mask"),
        bad=tuple(bad_relations()),
        raw=raw_relations,
        # Angles reach 100 log(1e-3) = -691 radians, which float32 rounds by up to 3e-5; relative errors of the twin
        # itself in float32 reach 3.1e-5.
        noise=2.0,
    ),
    Op(
        name="local_relation",
        samples={key: case.local_relation for key, case in WINDOWS.items()},
        empty={key: case.local_relation for key, case in WINDOWS_EMPTY.items()},
        growing=lambda k: windows_growing(k).local_relation,
        features=("query", "key", "value"),
        coordinates=("prior",),
        differentiable=("query", "key", "value", "prior"),
        vmapped=("query", "key", "value"),
        bad=tuple(bad_windows()),
    ),
    Op(
        name="rank_embedding",
        samples={key: case.rank_embedding for key, case in RANKS.items()},
        empty={key: case.rank_embedding for key, case in RANKS_EMPTY.items()},
        growing=lambda k: Ranks((5 + k, 7 + 2 * k), dim=12).rank_embedding,
        features=("ranks",),
        coordinates=(),
        differentiable=("ranks",),
        vmapped=("ranks",),
        bad=(*BAD_RANKS, *bad_numbers("wavelength", "positive and finite", 0.0, -1.0, math.nan, math.inf, True)),
    ),
]
PLAIN, FUSED = (next(op for op in OPS if op.name == name) for name in ("ms_deform_attn", "ms_deform_attn_fused"))


# ---- Suppression ----


@dataclass(frozen=True)
class Suppression:
    """Sizes and kinds of a sample; letters as in relops.nms_padded."""

    K: int = 40
    B: int | None = None
    classes: int | None = None  # None: no idxs, for ops that can do without
    kind: str = "grid"  # of boxes and scores: "grid", "anywhere" or "degenerate"
    iou_threshold: float = 1 / 3
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.K,) if self.B is None else (self.B, self.K)

    def boxes(self, generator: torch.Generator) -> Tensor:
        """On a grid there are duplicates, and IoU that equal the threshold."""
        corner, extent = torch.rand(2, *self.shape, 2, generator=generator, dtype=torch.float64)
        if self.kind == "anywhere":
            return torch.cat([100 * corner, 100 * corner + 60 * extent], -1)
        corner, extent = (9 * corner).floor() - 4, (6 * extent).floor() + 1
        boxes = torch.cat([corner, corner + extent], -1)
        if self.kind == "degenerate":
            odd = [
                [math.nan, 0.0, 3.0, 3.0], [0.0, 0.0, math.inf, 3.0], [-math.inf, 0.0, 3.0, 3.0],
                [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [3.0, 0.0, 0.0, 3.0], [3.0, 3.0, 0.0, 0.0],
                [-1e30, -1e30, 1e30, 1e30], [0.0, 0.0, 1e30, 1e30], [-1e4, -1e4, 1e4, 1e4],
            ]  # fmt: skip
            places = torch.randperm(self.K, generator=generator)[: 2 * len(odd)]
            boxes[..., places, :] = torch.tensor(odd + odd, dtype=torch.float64)[: len(places)]
        return boxes

    def scores(self, generator: torch.Generator) -> Tensor:
        """On a grid, ties."""
        scores = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.kind != "anywhere":
            scores = (16 * scores).floor() / 16
        if self.kind == "degenerate":
            odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, math.nan, -1.0])
            places = torch.randperm(self.K, generator=generator)[: len(odd)]
            scores[..., places] = odd.double()[: len(places)]
        return scores

    def idxs(self, generator: torch.Generator) -> Tensor | None:
        if self.classes is None:
            return None
        ids = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 2**32, 5])
        return ids[torch.randint(self.classes, self.shape, generator=generator)]

    def nms(self, generator: torch.Generator) -> Inputs:
        boxes, scores = self.boxes(generator), self.scores(generator)
        return {"boxes": boxes, "scores": scores, "iou_threshold": self.iou_threshold}

    def batched_nms(self, generator: torch.Generator) -> Inputs:
        boxes, scores = self.boxes(generator), self.scores(generator)
        idxs = replace(self, classes=self.classes or 1).idxs(generator)
        return {"boxes": boxes, "scores": scores, "idxs": idxs, "iou_threshold": self.iou_threshold}

    def nms_padded(self, generator: torch.Generator) -> Inputs:
        options = {"max_output": 12, "idxs": self.idxs(generator), "score_threshold": None} | dict(self.options)
        return self.nms(generator) | options

    def soft_nms(self, generator: torch.Generator) -> Inputs:
        options = {
            "method": "gaussian",
            "iou_threshold": self.iou_threshold,
            "sigma": 0.5,
            "score_threshold": 1e-3,
            "idxs": self.idxs(generator),
        }
        scores = self.scores(generator)
        scores[scores == math.inf] = 2.0  # which a product cannot lower
        return {"boxes": self.boxes(generator), "scores": scores} | options | dict(self.options)


SUPPRESSION = {
    "typical": Suppression(),
    "one": Suppression(K=1),
    "anywhere": Suppression(K=150, kind="anywhere", iou_threshold=0.3),
    "classes": Suppression(K=150, classes=6),
    "degenerate": Suppression(K=60, kind="degenerate", classes=2, iou_threshold=0.0),
}
SUPPRESSION_BATCHED = SUPPRESSION | {
    "batch": Suppression(K=70, B=3, classes=2),
    "batch of one": Suppression(B=1, kind="anywhere"),
    "batch degenerate": Suppression(K=30, B=2, kind="degenerate", iou_threshold=0.5),
}
NMS_PADDED = SUPPRESSION_BATCHED | {
    "more than there are": Suppression(K=9, B=2, options=(("max_output", 20),)),
    "none wanted": Suppression(options=(("max_output", 0),)),
    "score threshold": Suppression(B=2, options=(("score_threshold", 0.5), ("max_output", 40))),
}
SOFT_NMS = SUPPRESSION_BATCHED | {
    "linear": Suppression(K=70, classes=2, options=(("method", "linear"),)),
    "linear batch": Suppression(B=2, kind="degenerate", options=(("method", "linear"), ("score_threshold", 0.25))),
}
SUPPRESSION_EMPTY = {"K": Suppression(K=0)}
SUPPRESSION_EMPTY_BATCHED = SUPPRESSION_EMPTY | {
    "K of a batch": Suppression(K=0, B=2, classes=1),
    "B": Suppression(B=0, classes=1),
}


def suppression_growing(k: int, B: int | None) -> Suppression:
    return Suppression(K=11 + 13 * k, B=None if B is None else B + k, classes=6, kind="anywhere")


def bad_suppression(letters: str, *more: Bad) -> tuple[Bad, ...]:
    """Of "typical": K = 40, float32, no batch."""
    return (
        Bad("boxes no tensor", put("boxes", [1.0]), TypeError, "boxes must be a Tensor, got list"),
        Bad("boxes bool", change("boxes", Tensor.bool), TypeError, "boxes must be float64.*or integer, got torch.bool"),
        Bad("boxes complex", change("boxes", Tensor.cfloat), TypeError, "boxes must be float64.*got torch.complex64"),
        Bad("boxes 1-D", change("boxes", lambda x: x[0]), ValueError, rf"boxes must be {letters}, got shape \[4\]"),
        Bad("boxes 4-D", change("boxes", lambda x: x[None, None]), ValueError, rf"boxes must be {letters}, got shape"),
        Bad("boxes of 5", change("boxes", lambda x: x[:, [0, 0, 1, 2, 3]]), ValueError,
            rf"boxes must be {letters}, got shape \[40, 5\]"),
        Bad("scores no tensor", put("scores", None), TypeError, "scores must be a Tensor, got NoneType"),
        Bad("scores int", change("scores", Tensor.long), TypeError, "scores must be float64.*got torch.int64"),
        Bad("scores too few", change("scores", lambda x: x[1:]), ValueError,
            r"scores must be \[K\] = \[40\], got shape \[39\]"),
        Bad("scores too many", change("scores", lambda x: torch.cat([x, x])), ValueError,
            r"scores must be \[K\] = \[40\], got shape \[80\]"),
        Bad("scores 2-D", change("scores", lambda x: x[:, None]), ValueError, r"scores must be .*got shape \[40, 1\]"),
        Bad("scores elsewhere", change("scores", elsewhere), ValueError, "scores must be on the device of boxes.*got"),
        *bad_numbers("iou_threshold", r"in \[0,1\]", -0.1, 1.1, math.nan, math.inf, 2, True),
        Bad("iou_threshold str", put("iou_threshold", "0.5"), TypeError, "iou_threshold must be a number.*got '0.5'"),
        *more,
    )  # fmt: skip


BAD_IDXS = (
    Bad("idxs no tensor", put("idxs", 3), TypeError, "idxs must be a Tensor, got int"),
    Bad("idxs float", lambda x: x | {"idxs": x["scores"]}, TypeError, "idxs must be of an integer.*got torch.float32"),
    Bad("idxs bool", lambda x: x | {"idxs": x["scores"] > 0}, TypeError, "idxs must be of an integer.*torch.bool"),
    Bad("idxs too few", lambda x: x | {"idxs": x["scores"][1:].long()}, ValueError, r"idxs must be .*got shape \[39\]"),
    Bad("idxs elsewhere", lambda x: x | {"idxs": elsewhere(x["scores"].long())}, ValueError,
        "idxs must be on the device of boxes.*got"),
)  # fmt: skip
BAD_BATCH = (
    Bad("batch of boxes only", change("boxes", lambda x: x[None]), ValueError,
        r"scores must be \[B,K\] = \[1,40\], got shape \[40\]"),
    Bad("batch of another size", lambda x: x | {"boxes": x["boxes"][None], "scores": x["scores"].expand(2, -1)},
        ValueError, r"scores must be \[B,K\] = \[1,40\], got shape \[2, 40\]"),
)  # fmt: skip
BAD_PADDED = (
    *BAD_IDXS,
    *BAD_BATCH,
    *bad_options("max_output", ValueError, -1),
    *bad_options("max_output", TypeError, 2.5, "3", None),
    *bad_options("max_output", TypeError, True, harmless=True),
    *bad_numbers("score_threshold", "or None", math.nan, True),
)
BAD_SOFT = (
    *BAD_IDXS,
    *BAD_BATCH,
    *bad_options("method", ValueError, "hard", ""),
    *bad_options("method", ValueError, None, 3),
    *bad_numbers("sigma", "positive and finite", 0.0, -1.0, math.nan, math.inf, True),
    *bad_numbers("score_threshold", "finite and at least 0", -0.1, math.nan, math.inf, True),
)


def by_index(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of soft_nms, whose order rounding decides where scores decay to nearly the same."""
    order = outputs[0].argsort(dim=-1, stable=True)
    return tuple(x.gather(-1, order) for x in outputs)


def suppression_op(
    name: str,
    samples: Mapping[str, Suppression],
    empty: Mapping[str, Suppression],
    bad: tuple[Bad, ...],
    B: int | None = None,
    **others: Any,
) -> Selection:
    return Selection(
        name=name,
        samples={key: getattr(case, name) for key, case in samples.items()},
        empty={key: getattr(case, name) for key, case in empty.items()},
        growing=lambda k: getattr(suppression_growing(k, B), name),
        floats=("boxes", "scores"),
        bad=bad,
        **others,
    )


# ---- Linear assignment ----


@dataclass(frozen=True)
class Assignment:
    """Sizes and kinds of a sample; letters as in relops.linear_sum_assignment."""

    R: int = 7
    C: int = 5
    B: int | None = None
    padded: bool = False
    forbidden: float | None = None  # the cost of half of the pairs, and of all pairs of a row and of a column
    maximize: bool = False

    def problem(self, r: int, c: int, generator: torch.Generator) -> Tensor:
        """Integers exact in every dtype, for which one assignment is the best: it alone gains all that rows and columns
        are worth, and takes no pair that costs more."""
        rows, cols = (torch.randperm(size, generator=generator)[: min(r, c)] for size in (r, c))
        worth = torch.zeros(r, 1, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
        for x, paired in zip(worth, (rows, cols)):
            x[paired] = torch.randint(60, x[paired].shape, generator=generator).double()
        more = torch.randint(1, 60, (r, c), generator=generator).double()
        if self.forbidden is not None:
            more[torch.rand(r, c, generator=generator) < 0.5] = self.forbidden
        more[rows, cols] = 0.0
        if self.forbidden is not None:
            more[rows[:1]] = more[:, cols[:1]] = self.forbidden
        return more - worth[0] - worth[1]

    def linear_sum_assignment(self, generator: torch.Generator) -> Inputs:
        limits, B = (self.R, self.C), 1 if self.B is None else self.B
        sizes = [torch.randint(x + 1, (B,), generator=generator) if self.padded else None for x in limits]
        cost = torch.full((B, *limits), -200.0, dtype=torch.float64)  # padding would be the best to take
        for b in range(B):
            r, c = (limit if x is None else int(x[b]) for x, limit in zip(sizes, limits))
            cost[b, :r, :c] = self.problem(r, c, generator)
        cost = -cost if self.maximize else cost
        return {
            "cost": cost[0] if self.B is None else cost,
            "num_rows": sizes[0],
            "num_cols": sizes[1],
            "maximize": self.maximize,
        }


ASSIGNMENT = {
    "typical": Assignment(),
    "one": Assignment(R=1, C=1),
    "wide": Assignment(R=13, C=40, forbidden=math.nan),
    "tall": Assignment(R=40, C=13, forbidden=-math.inf, maximize=True),
    "square": Assignment(R=33, C=33),
    "padded": Assignment(R=12, C=10, padded=True),
    "batch": Assignment(R=9, C=12, B=4, padded=True, forbidden=math.inf),
    "batch of one": Assignment(R=6, C=8, B=1),
    "batch maximize": Assignment(R=70, C=40, B=3, padded=True, maximize=True),
}
ASSIGNMENT_EMPTY = {
    f"{name}{'' if B is None else ' of a batch'}": Assignment(R=R, C=C, B=B, padded=padded)
    for name, R, C, padded in (("R", 0, 4, True), ("C", 3, 0, False), ("R and C", 0, 0, True))
    for B in (None, 2)
} | {"B": Assignment(B=0), "B padded": Assignment(B=0, padded=True)}


def bad_sizes(what: str, name: str, sizes: Any, error: type[Exception], message: str, B: int | None = None) -> Bad:
    def changed(inputs: Inputs) -> Inputs:
        cost = inputs["cost"] if B is None else inputs["cost"].expand(B, -1, -1)
        return inputs | {"cost": cost, name: sizes.to(cost.device) if isinstance(sizes, Tensor) else sizes}

    return Bad(f"{name} {what}", changed, error, f"{name} must be {message}")


# Of "typical": R = 7, C = 5, float32, no batch.
BAD_ASSIGNMENT = (
    Bad("cost no tensor", put("cost", [[1.0]]), TypeError, "cost must be a Tensor, got list"),
    Bad("cost complex", change("cost", Tensor.cfloat), TypeError, "cost must be float64.*or integer.*torch.complex64"),
    Bad("cost 1-D", change("cost", lambda x: x[0]), ValueError, r"cost must be \[B,R,C\] or \[R,C\], got shape \[5\]"),
    Bad("cost 4-D", change("cost", lambda x: x[None, None]), ValueError, r"cost must be .*got shape \[1, 1, 7, 5\]"),
    Bad("num_rows elsewhere", lambda x: x | {"num_rows": elsewhere(x["cost"][0, :1].long())}, ValueError,
        "num_rows must be on the device of cost.*got"),
    bad_sizes("float", "num_rows", torch.ones(1), TypeError, "int64 or int32, got torch.float32"),
    bad_sizes("too many", "num_rows", torch.ones(2).long(), ValueError, r"\[\] or \[1\], got shape \[2\]"),
    bad_sizes("none", "num_cols", torch.ones(0).long(), ValueError, r"\[\] or \[1\], got shape \[0\]"),
    bad_sizes("bool", "num_cols", True, TypeError, "a Tensor .* an int or None, got True"),
    bad_sizes("of a batch", "num_rows", torch.ones(3).long(), ValueError, r"\[B\] = \[2\], got shape \[3\]", B=2),
    bad_sizes("0-D", "num_rows", torch.ones(()).long(), ValueError, r"\[B\] = \[2\], got shape \[\]", B=2),
    bad_sizes("2-D", "num_cols", torch.ones(2, 1).long(), ValueError, r"\[B\] = .*got shape \[2, 1\]", B=2),
    bad_sizes("int", "num_rows", 3, TypeError, "a Tensor .* a list of ints or None, got 3", B=2),
    bad_sizes("floats", "num_rows", [1.0, 2.0], TypeError, r"a Tensor .*got \[1.0, 2.0\]", B=2),
    bad_sizes("too few ints", "num_cols", [1], ValueError, r"\[B\] = \[2\], got 1 ints", B=2),
    bad_sizes("too large", "num_rows", [7, 8], ValueError, r"in \[0,R\] = \[0,7\], got 8 for problem 1", B=2),
    bad_sizes("negative", "num_cols", [-1, 0], ValueError, r"in \[0,C\] = \[0,5\], got -1 for problem 0", B=2),
    *bad_options("maximize", TypeError, 1, harmless=True),
)  # fmt: skip


# ---- The ops that select ----

one_image = r"\[K,4\]"
images = r"\[K,4\] or \[B,K,4\]"
SELECTIONS = [
    suppression_op("nms", SUPPRESSION, SUPPRESSION_EMPTY, bad_suppression(one_image), vmapped=(), waits=lambda x: True),
    suppression_op(
        "batched_nms", SUPPRESSION, SUPPRESSION_EMPTY, bad_suppression(one_image, *BAD_IDXS), vmapped=(),
        waits=lambda x: True,
    ),
    suppression_op(
        "nms_padded", NMS_PADDED, SUPPRESSION_EMPTY_BATCHED, bad_suppression(images, *BAD_PADDED), B=3,
        vmapped=("boxes", "scores", "idxs"),
    ),
    suppression_op(
        "soft_nms", SOFT_NMS, SUPPRESSION_EMPTY_BATCHED, bad_suppression(images, *BAD_SOFT), B=3, vmapped=(),
        waits=lambda x: x["boxes"].dim() == 2, comparable=by_index,
    ),
    Selection(
        name="linear_sum_assignment",
        samples={key: case.linear_sum_assignment for key, case in ASSIGNMENT.items()},
        empty={key: case.linear_sum_assignment for key, case in ASSIGNMENT_EMPTY.items()},
        growing=lambda k: Assignment(R=9 + 4 * k, C=6 + 3 * k, B=3 + k, padded=True).linear_sum_assignment,
        floats=("cost",),
        widened=False,
        vmapped=("cost", "num_rows", "num_cols"),
        bad=BAD_ASSIGNMENT,
    ),
]  # fmt: skip
