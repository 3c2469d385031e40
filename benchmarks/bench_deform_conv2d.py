"""Benchmarks of deform_conv2d: layers of ResNets with deformable convolutions, and convolutions without offsets.

In the rows without offsets, deform_conv2d equals torch.nn.functional.conv2d, so these rows show the cost of sampling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, FORWARD_BACKWARD, Bench, Contender, Model, deterministic
from benchmarks.regions import torchvision_ops
from relops import reference
from relops._dtypes import compute_dtype

SPREAD = 2.0  # standard deviation of the offsets, in pixels
TAPS = 9  # kernels are 3 x 3


@dataclass(frozen=True)
class Case:
    """The sizes of one row. The stride is 1, and the padding is the dilation, so outputs are as large as inputs."""

    N: int
    C: int
    H: int
    W: int
    Co: int
    groups: int = 1
    dilation: int = 1
    mask: bool = True
    offsets: bool = True  # whether offsets are random; otherwise they are zero, and there is no mask
    channels_last: bool = False

    @property
    def label(self) -> str:
        groups = f" groups {self.groups}" if self.groups > 1 else ""
        dilation = f" d{self.dilation}" if self.dilation > 1 else ""
        version = (" v2" if self.mask else " v1") if self.offsets else " without offsets"
        layout = " channels_last" if self.channels_last else ""
        return f"{self.N}x{self.C}x{self.H}x{self.W} to {self.Co}{groups}{dilation}{version}{layout}"

    def model(self, dtype: torch.dtype, direction: str) -> Model:
        """Return the compulsory work.

        Per output and tap, the matrix product of the forward pass needs C / groups multiply-adds, and each of the C
        samples of a tap needs four. The backward pass needs two such products, for the gradients of the weight and of
        the samples. Per sample, it needs four multiply-adds for the gradient of the input, and another four for the
        gradients of the position and the mask.
        """
        pixels, size = self.N * self.H * self.W, dtype.itemsize
        offsets = pixels * TAPS * (3 if self.mask and self.offsets else 2) * compute_dtype(dtype).itemsize
        weight = self.Co * self.C // self.groups * TAPS * size
        read = pixels * self.C * size + offsets + weight
        output = pixels * self.Co * size
        product = 2 * pixels * TAPS * self.Co * self.C // self.groups
        samples = 8 * pixels * TAPS * self.C
        if direction == FORWARD:
            return Model(read + output, product + samples)
        written = read if self.offsets else read - offsets
        return Model(2 * (read + output) + written, 3 * product + (3 if self.offsets else 2) * samples)


def draw(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return random tensors: input, offset, weight and, unless the row is v1 or has no offsets, mask.

    Offsets and masks are float32 if the input is 16-bit, as the op recommends. The gradient of an offset jumps at whole
    numbers, and a comparison with float64 would measure the direction of rounding there instead of the op. Offsets are
    therefore at least 1/20 pixel away from whole numbers.
    """

    def as_map(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype, memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    wide = compute_dtype(dtype)
    offset = SPREAD * randn(case.N, 2 * TAPS, case.H, case.W)
    offset = offset.floor() + 0.05 + 0.9 * (offset - offset.floor()) if case.offsets else torch.zeros_like(offset)
    group_inputs = case.C // case.groups
    weight = randn(case.Co, group_inputs, 3, 3) / (group_inputs * TAPS) ** 0.5
    tensors = as_map(randn(case.N, case.C, case.H, case.W), dtype), as_map(offset, wide), weight.to(dtype)
    if not (case.mask and case.offsets):
        return tensors
    return *tensors, as_map(randn(case.N, TAPS, case.H, case.W).sigmoid(), wide)


def bind_options(op: Callable[..., Tensor], case: Case) -> Callable[..., Tensor]:
    def call(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        return op(input, offset, weight, padding=case.dilation, dilation=case.dilation, mask=mask)

    return call


def peers_of(
    case: Case, device: str, dtype: torch.dtype, direction: str
) -> dict[str, Callable[..., Tensor] | Contender]:
    peers: dict[str, Callable[..., Tensor] | Contender] = {}
    ops = torchvision_ops()
    if ops is not None:
        theirs = bind_options(ops.deform_conv2d, case)

        def in_float32(*inputs: Tensor) -> Tensor:
            return theirs(*(x.float() for x in inputs)).to(dtype)

        # torchvision has no bfloat16 kernels. Under autocast, it computes in float32.
        peers |= {"torchvision": theirs} if dtype.itemsize > 2 else {"torchvision in float32": in_float32}
    if not case.offsets:

        def conv2d(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(input, weight, padding=case.dilation, dilation=case.dilation, groups=case.groups)

        # By default, float32 convolutions use TF32 on CUDA, but the matrix products of relops do not.
        without_tf32 = functools.partial(torch.backends.cudnn.flags, enabled=True, allow_tf32=False)
        peers["conv2d"] = Contender(conv2d, without_tf32) if device == "cuda" else conv2d
    if device == "cuda" and direction == FORWARD_BACKWARD:
        peers["relops deterministic"] = Contender(bind_options(relops.deform_conv2d, case), deterministic)
    return peers


def make(case: Case, device: str, dtype: torch.dtype, direction: str, **options) -> Bench:
    return Bench(
        op="deform_conv2d",
        shape=case.label,
        dtype=dtype,
        device=device,
        direction=direction,
        make_inputs=functools.partial(draw, case, dtype),
        relops=bind_options(relops.deform_conv2d, case),
        pytorch=bind_options(reference.deform_conv2d, case),
        model=case.model(dtype, direction),
        peers=peers_of(case, device, dtype, direction),
        # conv2d has no gradient of offsets.
        differentiated=None if case.offsets else (0, 2),
        **options,
    )


def benches(device: str) -> list[Bench]:
    f32, both = torch.float32, (FORWARD, FORWARD_BACKWARD)
    N = {"cpu": 1, "cuda": 8}[device]
    main = Case(N, 256, 50, 76, 256)  # the third stage of a ResNet-50 for an image of 800 x 1216
    plain = replace(main, offsets=False)
    rows = [make(case, device, f32, direction, quick=True) for case in (main, plain) for direction in both]
    cases = [
        replace(main, mask=False),
        replace(main, channels_last=True),
        replace(main, groups=32),  # as in a ResNeXt
        replace(plain, groups=32),
        # The following cases are the last stage of ResNets, with a stride of 32 or dilated to a stride of 16.
        Case(2 * N, 512, 25, 38, 512),
        Case(2 * N, 512, 25, 38, 512, dilation=2),
        Case(2 * N, 512, 25, 38, 512, offsets=False),
        Case(N, 64, 200, 304, 64),
        Case(N, 64, 200, 304, 64, offsets=False),
    ]
    rows += [make(case, device, f32, direction) for case in cases for direction in both]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rows += [make(main, device, dtype, direction) for direction in both]
    rows += [make(plain, device, torch.bfloat16, direction) for direction in both]
    return rows
