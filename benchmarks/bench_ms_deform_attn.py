"""Benchmarks of ms_deform_attn and ms_deform_attn_fused: encoders, decoders, and the encoder in transformers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, FORWARD_BACKWARD, Bench, Contender, Model, Skipped, deterministic
from relops import reference
from relops._dtypes import compute_dtype

Levels = tuple[tuple[int, int], ...]

ENCODER: Levels = ((100, 152), (50, 76), (25, 38), (13, 19))  # an image of 800 x 1216 at strides 8 to 64
PAPER: Levels = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800 x 1333
PHOTOGRAPH: Levels = ((100, 134), (50, 67), (25, 34), (13, 17))  # 800 x 1066
BEVFORMER: Levels = ((116, 200), (58, 100), (29, 50), (15, 25))
LOCAL_SPREAD = 2.0  # standard deviation of the offsets in "local" rows, in pixels


@dataclass(frozen=True)
class Case:
    """The sizes of one row. If Q is None, there is one query per pixel, as in an encoder."""

    name: str
    levels: Levels
    Q: int | None = None
    N: int = 1
    M: int = 8
    D: int = 32
    P: int = 4
    local: bool = False  # whether locations lie around the pixel of the query, as in a real encoder; otherwise uniform
    boxes: bool = False  # whether the fused op gets reference boxes instead of reference points

    @property
    def S(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def queries(self) -> int:
        return self.S if self.Q is None else self.Q

    @property
    def label(self) -> str:
        (h, w), (h_last, w_last) = self.levels[0], self.levels[-1]
        batch = f" N{self.N}" if self.N != 1 else ""
        queries = "S" if self.Q is None else str(self.Q)
        return f"{self.name}{batch} {h}x{w}..{h_last}x{w_last} Q={queries} M{self.M} D{self.D} P{self.P}"

    def model(self, dtype: torch.dtype, coordinate_bytes: int, reference_bytes: int, direction: str) -> Model:
        """Return the compulsory work.

        A sample reads D values at each of four pixels, so the forward pass needs 4 * D multiply-adds per sample. The
        backward pass needs this number for the gradient of value, and once more for the gradients of the location and
        the weight.
        """
        size = dtype.itemsize
        rows = self.N * self.queries * self.M
        samples = rows * len(self.levels) * self.P
        value = self.N * self.S * self.M * self.D * size
        gathered = samples * 4 * self.D * size
        read = min(value, gathered) + 3 * samples * coordinate_bytes + reference_bytes
        output = rows * self.D * size
        flops = samples * 4 * self.D * 2
        if direction == FORWARD:
            return Model(read + output, flops, gathered)
        written = value + 3 * samples * coordinate_bytes + reference_bytes
        return Model(read + output + output + read + written, 3 * flops, 2 * gathered)


def pixel_centers(levels: Levels, device: str) -> Tensor:
    """Return the centers of all pixels of the pyramid [S,2] as (x,y) in [0,1]."""
    centers = []
    for h, w in levels:
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        centers.append(torch.stack([(x + 0.5) / w, (y + 0.5) / h], -1).view(-1, 2))
    return torch.cat(centers)


def sizes_xy(levels: Levels, device: str) -> Tensor:
    """Return the sizes of the levels [L,1,2] as (W,H), which broadcast against [...,L,P,2]."""
    return torch.tensor(levels, dtype=torch.float32, device=device).flip(-1)[:, None]


def draw_points(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return normalized reference points [N,Q,2] and sampling locations [N,Q,M,L,P,2] in float32.

    The gradient with respect to a location is discontinuous where the four pixels around it change, and a comparison
    with float64 would measure the direction of rounding there instead of the op. The locations are therefore at least
    1/20 pixel away from such positions.
    """
    device = generator.device.type
    N, Q, M, L, P = case.N, case.queries, case.M, len(case.levels), case.P
    if case.Q is None:
        points = pixel_centers(case.levels, device).expand(N, Q, 2)
    else:
        points = torch.rand(N, Q, 2, generator=generator, device=device)
    sizes = sizes_xy(case.levels, device)
    if case.local:
        offsets = torch.randn(N, Q, M, L, P, 2, generator=generator, device=device) * LOCAL_SPREAD
        pixels = points[:, :, None, None, None] * sizes - 0.5 + offsets
    else:
        pixels = torch.rand(N, Q, M, L, P, 2, generator=generator, device=device) * sizes - 0.5
    corner = pixels.floor()
    pixels = corner + 0.05 + 0.9 * (pixels - corner)
    return points, (pixels + 0.5) / sizes


def draw_value(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = (case.N, case.S, case.M, case.D)
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def draw_logits(case: Case, generator: torch.Generator) -> Tensor:
    shape = (case.N, case.queries, case.M, len(case.levels), case.P)
    return torch.randn(shape, generator=generator, device=generator.device)


def unfused_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """Return random arguments of ms_deform_attn.

    Locations and weights are float32 if value is 16-bit, as the op recommends.
    """
    _, locations = draw_points(case, generator)
    weights = draw_logits(case, generator).flatten(-2).softmax(-1).unflatten(-1, (len(case.levels), case.P))
    wide_dtype = compute_dtype(dtype)
    return draw_value(case, dtype, generator), case.levels, None, locations.to(wide_dtype), weights.to(wide_dtype)


def fused_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """Return random arguments of ms_deform_attn_fused.

    Offsets and logits have the dtype of value, because in a network they come from linear layers. Reference points are
    float32 if value is 16-bit.
    """
    points, locations = draw_points(case, generator)
    points = points[:, :, None].expand(-1, -1, len(case.levels), -1)  # [N,Q,L,2]
    offsets = locations - points[:, :, None, :, None]
    if case.boxes:
        wh = torch.rand(points.shape, generator=generator, device=points.device) * 0.4 + 0.1
        offsets = offsets / wh[:, :, None, :, None] * (2 * case.P)
        points = torch.cat([points, wh], -1)
    else:
        offsets = offsets * sizes_xy(case.levels, generator.device.type)
    return (
        draw_value(case, dtype, generator),
        case.levels,
        None,
        points.to(compute_dtype(dtype)).contiguous(),
        offsets.to(dtype),
        draw_logits(case, generator).to(dtype),
    )


def locations_of(levels: Levels, points: Tensor, offsets: Tensor) -> Tensor:
    points, P = points[:, :, None, :, None], offsets.shape[4]
    if points.shape[-1] == 2:
        return points + offsets / sizes_xy(levels, offsets.device.type)
    return points[..., :2] + offsets / P * points[..., 2:] * 0.5


def relops_unfused(value: Tensor, levels: Levels, starts: None, points: Tensor, offsets: Tensor, logits: Tensor):
    """Compute the fused op with `relops.ms_deform_attn` and PyTorch functions. The fused op should be faster."""
    wide_dtype = compute_dtype(value.dtype)
    weights = logits.to(wide_dtype).flatten(-2).softmax(-1).view(logits.shape)
    return relops.ms_deform_attn(value, levels, starts, locations_of(levels, points, offsets.to(wide_dtype)), weights)


def deformops_peers(fused: bool) -> dict[str, Callable]:
    """Return a peer that calls the default CUDA backend of https://pypi.org/project/deformops, if it is installed."""
    if importlib.util.find_spec("deformops") is None:
        return {}
    from deformops.registry import msda

    @functools.cache
    def level_tensors(levels: Levels) -> tuple[Tensor, Tensor]:
        shapes = torch.tensor(levels, device="cuda")
        areas = shapes.prod(-1)
        return shapes, areas.cumsum(0) - areas

    def unfused(value: Tensor, levels: Levels, starts: None, locations: Tensor, weights: Tensor) -> Tensor:
        return msda(value, *level_tensors(levels), locations, weights).view(*locations.shape[:2], -1)

    def softmax_fused(
        value: Tensor, levels: Levels, starts: None, points: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        locations = locations_of(levels, points, offsets.to(points.dtype))
        return msda(value, *level_tensors(levels), locations, logits, method="softmax").view(*offsets.shape[:2], -1)

    return {"deformops": softmax_fused if fused else unfused}


def make(case: Case, device: str, dtype: torch.dtype, direction: str, fused: bool = False, **options) -> Bench:
    peers = {}
    if fused:
        peers["relops unfused"] = relops_unfused
        references = case.N * case.queries * len(case.levels) * (4 if case.boxes else 2) * compute_dtype(dtype).itemsize
        model = case.model(dtype, dtype.itemsize, references, direction)
    else:
        model = case.model(dtype, compute_dtype(dtype).itemsize, 0, direction)
    if device == "cuda":
        if dtype != torch.float64:
            peers |= deformops_peers(fused)
        if direction == FORWARD_BACKWARD:
            op = relops.ms_deform_attn_fused if fused else relops.ms_deform_attn
            peers["relops deterministic"] = Contender(op, deterministic)
    return Bench(
        op="ms_deform_attn_fused" if fused else "ms_deform_attn",
        shape=case.label,
        dtype=dtype,
        device=device,
        direction=direction,
        make_inputs=functools.partial(fused_inputs if fused else unfused_inputs, case, dtype),
        relops=relops.ms_deform_attn_fused if fused else relops.ms_deform_attn,
        pytorch=reference.ms_deform_attn_fused if fused else reference.ms_deform_attn,
        model=model,
        peers=peers,
        **options,
    )


# ---- The encoder of Deformable DETR in Hugging Face transformers ----


@functools.cache
def transformers_encoders(layers: int, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return two encoders with the same weights: the original, and one in which relops replaces the sampling."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as modeling

    # The configuration names a default backbone, which is never built and therefore not downloaded.
    config = DeformableDetrConfig(encoder_layers=layers, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    torch.manual_seed(0)
    plain = modeling.DeformableDetrEncoder(config).to(device).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            # The initial weights are zero, so all locations would lie exactly at pixel centers, where the gradient is
            # discontinuous.
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                parameter.normal_(std=0.05)
    swapped = modeling.DeformableDetrEncoder(config).to(device).eval()
    swapped.load_state_dict(plain.state_dict())
    replaced = 0
    for module in swapped.modules():
        if type(module).__name__ == "MultiScaleDeformableAttention":
            module.__class__ = relops.nn.MultiScaleDeformableAttention
            replaced += 1
    assert replaced == layers, f"relops replaced the sampling of {replaced} out of {layers} layers"
    return plain, swapped


def transformers_bench(device: str, layers: int, direction: str, min_rounds: int) -> Bench | Skipped:
    op, shape = "ms_deform_attn", f"transformers encoder, {layers} layers, 800x1066"
    if importlib.util.find_spec("transformers") is None:
        return Skipped(op, shape, "transformers is not installed")
    levels, width = PHOTOGRAPH, 256
    S = sum(h * w for h, w in levels)
    names: Sequence[str] = ()

    # The weights are inputs, so their gradients are compared, and float64 inputs make the encoder compute in float64.
    def make_inputs(generator: torch.Generator) -> tuple:
        nonlocal names
        plain, _ = transformers_encoders(layers, device)
        names = [name for name, _ in plain.named_parameters()]
        features, positions = (torch.randn(1, S, width, generator=generator, device=device) for _ in range(2))
        return (features, positions, *(parameter.detach() for parameter in plain.parameters()))

    def call(which: int, features: Tensor, positions: Tensor, *weights: Tensor) -> Tensor:
        shapes = torch.tensor(levels, device=device)
        arguments = {
            "inputs_embeds": features,
            "attention_mask": torch.ones(1, S, dtype=torch.bool, device=device),
            "spatial_position_embeddings": positions,
            "spatial_shapes": shapes,
            "spatial_shapes_list": list(levels),
            "level_start_index": shapes.prod(-1).cumsum(0) - shapes.prod(-1),
            "valid_ratios": torch.ones(1, len(levels), 2, dtype=features.dtype, device=device),
        }
        module = transformers_encoders(layers, device)[which]
        return torch.func.functional_call(module, dict(zip(names, weights)), (), arguments).last_hidden_state

    return Bench(
        op=op,
        shape=shape,
        dtype=torch.float32,
        device=device,
        direction=direction,
        make_inputs=make_inputs,
        relops=functools.partial(call, 1),
        pytorch=functools.partial(call, 0),
        # Rounding to float32 moves a few of the millions of locations and ReLU inputs across a discontinuity. This
        # alone changes some gradients by 2e-3. The recorded error of PyTorch in float32 shows the same effect.
        tolerance=1e-2,
        min_rounds=min_rounds,
    )


def benches(device: str) -> list[Bench | Skipped]:
    encoder, decoder = Case("encoder", ENCODER), Case("decoder", ENCODER, Q=300)
    local = replace(encoder, name="encoder local", local=True)
    boxes = replace(decoder, name="decoder boxes", local=True, boxes=True)
    f32 = torch.float32

    def target(ratio: float) -> float | None:
        return ratio if device == "cpu" else None  # on CUDA, the targets are ratios to peers, not to PyTorch

    rows: list[Bench | Skipped] = [
        make(encoder, device, f32, FORWARD, target=target(20), quick=True, compiled=True),
        make(encoder, device, f32, FORWARD_BACKWARD, target=target(10), quick=True, compiled=True),
        make(decoder, device, f32, FORWARD, target=target(3), quick=True, compiled=True),
        make(decoder, device, f32, FORWARD_BACKWARD),
        make(encoder, device, torch.bfloat16, FORWARD, quick=True),
        make(encoder, device, torch.bfloat16, FORWARD_BACKWARD),
        make(encoder, device, torch.float16, FORWARD),
        make(encoder, device, torch.float16, FORWARD_BACKWARD),
        make(encoder, device, torch.float64, FORWARD),
        make(encoder, device, torch.float64, FORWARD_BACKWARD),
        make(local, device, f32, FORWARD),
        make(local, device, f32, FORWARD_BACKWARD),
        make(local, device, torch.bfloat16, FORWARD),
    ]
    if device == "cuda":
        paper = Case("encoder", PAPER, N=2)
        bevformer = Case("BEVFormer", BEVFORMER, Q=10000, N=6, P=8)  # each of 6 cameras sees a part of 40,000 queries
        graph = replace(decoder, name="decoder, CUDA graph")
        rows += [
            make(graph, device, f32, FORWARD, graph=True),
            make(graph, device, torch.bfloat16, FORWARD, graph=True),
            make(paper, device, f32, FORWARD),
            make(paper, device, f32, FORWARD_BACKWARD),
            make(paper, device, torch.bfloat16, FORWARD),
            make(paper, device, torch.bfloat16, FORWARD_BACKWARD),
            make(bevformer, device, f32, FORWARD),
            make(bevformer, device, f32, FORWARD_BACKWARD),
        ]
    # To verify the backward pass, the float64 twin needs 2 GB per layer, so the CPU runs fewer layers.
    rows += [
        transformers_bench(device, 6, FORWARD, min_rounds=5),
        transformers_bench(device, 6 if device == "cuda" else 2, FORWARD_BACKWARD, min_rounds=5),
    ]
    rows += [
        make(encoder, device, f32, FORWARD, fused=True, target=target(20), quick=True, compiled=True),
        make(encoder, device, f32, FORWARD_BACKWARD, fused=True, compiled=True),
        make(local, device, f32, FORWARD, fused=True),
        make(local, device, f32, FORWARD_BACKWARD, fused=True),
        make(local, device, torch.bfloat16, FORWARD, fused=True),
        make(local, device, torch.bfloat16, FORWARD_BACKWARD, fused=True),
        make(boxes, device, f32, FORWARD, fused=True),
        make(boxes, device, f32, FORWARD_BACKWARD, fused=True),
    ]
    return rows
