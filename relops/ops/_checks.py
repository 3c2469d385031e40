"""Argument checks shared by the ops: each error names the op, the argument, the rule and what was got."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SMALLEST, LARGEST = math.ulp(0.0), sys.float_info.max  # of positive and finite numbers
FEATURE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def compute_dtype(features: torch.dtype) -> torch.dtype:
    """The dtype in which sums and coordinates are computed: float32, or float64 for float64 features."""
    return torch.float64 if features == torch.float64 else torch.float32


def is_int(x: object) -> bool:
    """An int or what stands for one in a graph; a bool is most likely an argument in the wrong place."""
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def check_number(op: str, name: str, number: object, rule: str, low: float, high: float) -> None:
    """`rule` is "in [low,high]" in words; NaN is never in it."""
    real = isinstance(number, (float, int, torch.SymFloat)) and not isinstance(number, bool)
    if not real or not low <= number <= high:
        raise (ValueError if real else TypeError)(f"relops.{op}: {name} must be a number {rule}, got {number!r}")


def check_size(op: str, name: str, number: object, most: int) -> None:
    if not is_int(number) or not 1 <= number <= most:
        raise (ValueError if is_int(number) else TypeError)(
            f"relops.{op}: {name} must be an int from 1 to {most}, got {number!r}"
        )


def check_choice(op: str, name: str, choice: object, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        words = ", ".join(f'"{x}"' for x in choices[:-1]) + f' or "{choices[-1]}"'
        raise ValueError(f"relops.{op}: {name} must be {words}, got {choice!r}")


def check_tensor(op: str, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"relops.{op}: {name} must be a Tensor, got {type(tensor).__name__}")


def check_features(op: str, name: str, tensor: Tensor) -> None:
    check_tensor(op, name, tensor)
    if tensor.dtype not in FEATURE_DTYPES:
        raise TypeError(f"relops.{op}: {name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")


def check_features_or_integers(op: str, name: str, tensor: object) -> None:
    check_tensor(op, name, tensor)
    if tensor.dtype not in FEATURE_DTYPES and (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    ):
        raise TypeError(
            f"relops.{op}: {name} must be float64, float32, float16, bfloat16 or integer, got {tensor.dtype}"
        )


def check_features_like(op: str, name: str, tensor: Tensor, letters: str, features_name: str, features: Tensor) -> None:
    """What it shares with the features: dtype, device, number of dimensions."""
    check_tensor(op, name, tensor)
    if tensor.dtype != features.dtype:
        raise TypeError(
            f"relops.{op}: {name} must be {features.dtype}, the dtype of {features_name}, got {tensor.dtype}"
        )
    check_device(op, name, tensor, features_name, features)
    if tensor.dim() != features.dim():
        raise ValueError(f"relops.{op}: {name} must be {letters}, got shape {list(tensor.shape)}")


def check_coordinates(op: str, name: str, tensor: Tensor, features_name: str, features: Tensor) -> None:
    """Coordinates have the dtype of the features, or are float32 beside 16-bit ones; they share the device."""
    check_tensor(op, name, tensor)
    allowed = {features.dtype, compute_dtype(features.dtype)}
    if tensor.dtype not in allowed:
        words = " or ".join(sorted(str(dtype) for dtype in allowed))
        raise TypeError(
            f"relops.{op}: {name} must be {words} where {features_name} is {features.dtype}, got {tensor.dtype}"
        )
    check_device(op, name, tensor, features_name, features)


def check_device(op: str, name: str, tensor: Tensor, features_name: str, features: Tensor) -> None:
    if tensor.device != features.device:
        raise ValueError(
            f"relops.{op}: {name} must be on the device of {features_name}, {features.device}, got {tensor.device}"
        )


def check_shape(op: str, name: str, tensor: Tensor, letters: str, *expected: int | tuple[int, ...]) -> None:
    """`expected` holds a size, or several allowed ones, per dimension of `letters`."""
    ok = tensor.dim() == len(expected) and all(
        size in want if isinstance(want, tuple) else size == want for size, want in zip(tensor.shape, expected)
    )
    if not ok:
        words = ["/".join(map(str, want)) if isinstance(want, tuple) else str(want) for want in expected]
        raise ValueError(f"relops.{op}: {name} must be {letters} = [{','.join(words)}], got shape {list(tensor.shape)}")


def check_mask(op: str, name: str, mask: object, letters: str, *shape: int, meaning: str = "") -> None:
    """`meaning`: of True, in words for the message."""
    check_tensor(op, name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"relops.{op}: {name} must be bool{meaning}, got {mask.dtype}")
    check_shape(op, name, mask, letters, *shape)


def check_integers(op: str, name: str, tensor: object) -> None:
    check_tensor(op, name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"relops.{op}: {name} must be of an integer dtype, got {tensor.dtype}")


def has_values(*tensors: Tensor | None) -> bool:
    """Return whether the host may read values: fake tensors have none, and a traced graph must not depend on them."""
    if torch.compiler.is_compiling() or FakeTensor in map(type, tensors):
        return False
    if torch._C._len_torch_dispatch_stack() == 0:
        return True
    modes = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
    return all(torch._C._get_dispatch_mode(mode) is None for mode in modes)


def int_tensor(ints: Sequence[int]) -> Tensor:
    """Make an int64 tensor on the CPU. In a graph that is being traced, symbolic sizes stay symbolic."""
    if torch.SymInt in map(type, ints):
        return torch.stack([torch.scalar_tensor(x, dtype=torch.int64, device="cpu") for x in ints])
    return torch.tensor(ints, dtype=torch.int64, device="cpu")


def is_autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is; of meta tensors torch cannot tell."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def under_autocast(features: Tensor, *coordinates: Tensor) -> list[Tensor]:
    """Autocast makes some inputs 16 bit and leaves others: coordinates follow the features upwards, never down."""
    if not (isinstance(features, Tensor) and is_autocasting(features)):
        return list(coordinates)
    wide = compute_dtype(features.dtype)
    return [
        c.to(wide) if isinstance(c, Tensor) and c.is_floating_point() and c.dtype not in (features.dtype, wide) else c
        for c in coordinates
    ]


def widest_under_autocast(*features: Tensor) -> tuple[Tensor, ...]:
    """Autocast makes some features 16 bit and leaves others: all follow the widest."""
    if not all(isinstance(x, Tensor) and x.dtype in FEATURE_DTYPES for x in features):
        return features
    if not is_autocasting(features[0]):
        return features
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in features))
    return tuple(x.to(dtype) for x in features)
