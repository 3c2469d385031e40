"""Argument checks of ops, modules and models. Every message names the op, the argument, the rule and the value."""

from __future__ import annotations

import math
import sys
from typing import TypeGuard

import torch
from torch import Tensor

from relops._dtypes import FEATURE_DTYPES, compute_dtype

MIN_POSITIVE, MAX_FINITE = math.ulp(0.0), sys.float_info.max


def is_int(x: object) -> TypeGuard[int]:
    """Return whether x is an int or a symbolic int of a traced graph. A bool is rejected as a probable mistake."""
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def is_real(x: object) -> TypeGuard[float]:
    """Return whether x is a number or a symbolic float of a traced graph. A bool does not count as a number."""
    return isinstance(x, (float, int, torch.SymFloat)) and not isinstance(x, bool)


def check_number(op: str, name: str, number: object, rule: str, low: float, high: float) -> None:
    """Check that a number is in [low,high]. NaN is rejected. The message contains `rule`."""
    if not is_real(number) or not low <= number <= high:
        raise (ValueError if is_real(number) else TypeError)(f"relops.{op}: {name} must be {rule}, got {number!r}")


def check_size(op: str, name: str, number: object, max_size: int) -> None:
    if not is_int(number) or not 1 <= number <= max_size:
        raise (ValueError if is_int(number) else TypeError)(
            f"relops.{op}: {name} must be an int from 1 to {max_size}, got {number!r}"
        )


def checked_pair(op: str, name: str, sizes: object, min_size: int, max_size: int) -> tuple[int, int]:
    """Check an int or a pair of ints and return it as a pair."""
    pair = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes, sizes)
    if len(pair) == 2:
        first, second = pair
        if is_int(first) and is_int(second) and min_size <= first <= max_size and min_size <= second <= max_size:
            return first, second
    raise (ValueError if all(is_int(size) for size in pair) else TypeError)(
        f"relops.{op}: {name} must be an int from {min_size} to {max_size} or a pair of such ints, got {sizes!r}"
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


def check_features_or_integers(op: str, name: str, tensor: Tensor) -> None:
    check_tensor(op, name, tensor)
    if tensor.dtype not in FEATURE_DTYPES and (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    ):
        raise TypeError(
            f"relops.{op}: {name} must be float64, float32, float16, bfloat16 or integer, got {tensor.dtype}"
        )


def check_features_like(op: str, name: str, tensor: Tensor, letters: str, features_name: str, features: Tensor) -> None:
    """Check that the tensor has the same dtype, device and number of dimensions as the features."""
    check_like(op, name, tensor, features_name, features)
    if tensor.dim() != features.dim():
        raise ValueError(f"relops.{op}: {name} must be {letters}, got shape {list(tensor.shape)}")


def check_like(op: str, name: str, tensor: Tensor, features_name: str, features: Tensor) -> None:
    """Check that the tensor has the same dtype and device as the features."""
    check_tensor(op, name, tensor)
    if tensor.dtype != features.dtype:
        raise TypeError(
            f"relops.{op}: {name} must be {features.dtype}, the dtype of {features_name}, got {tensor.dtype}"
        )
    check_device(op, name, tensor, features_name, features)


def check_coordinates(op: str, name: str, tensor: Tensor, features_name: str, features: Tensor) -> None:
    """Check that coordinates have the device of the features, and the dtype or compute dtype of the features."""
    check_tensor(op, name, tensor)
    allowed = {features.dtype, compute_dtype(features.dtype)}
    if tensor.dtype not in allowed:
        words = " or ".join(sorted(str(dtype) for dtype in allowed))
        raise TypeError(
            f"relops.{op}: {name} must be {words} when {features_name} is {features.dtype}, got {tensor.dtype}"
        )
    check_device(op, name, tensor, features_name, features)


def check_device(op: str, name: str, tensor: Tensor, features_name: str, features: Tensor) -> None:
    if tensor.device != features.device:
        raise ValueError(
            f"relops.{op}: {name} must be on the device of {features_name}, {features.device}, got {tensor.device}"
        )


def check_shape(op: str, name: str, tensor: Tensor, letters: str, *expected: int | tuple[int, ...]) -> None:
    """Check a shape. For each dimension in `letters`, `expected` has the size, or a tuple of the allowed sizes."""
    ok = tensor.dim() == len(expected) and all(
        size in sizes if isinstance(sizes, tuple) else size == sizes for size, sizes in zip(tensor.shape, expected)
    )
    if not ok:
        words = ["/".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes) for sizes in expected]
        raise ValueError(f"relops.{op}: {name} must be {letters} = [{','.join(words)}], got shape {list(tensor.shape)}")


def check_mask(op: str, name: str, mask: Tensor, letters: str, *shape: int, meaning: str = "") -> None:
    """Check the dtype and the shape of a mask. The message contains `meaning`, which explains the value True."""
    check_tensor(op, name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"relops.{op}: {name} must be bool{meaning}, got {mask.dtype}")
    check_shape(op, name, mask, letters, *shape)


def check_integers(op: str, name: str, tensor: Tensor) -> None:
    check_tensor(op, name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"relops.{op}: {name} must be of an integer dtype, got {tensor.dtype}")
