"""Argument checks of ops, modules and models: each error names the op, the argument, the rule and what was got."""

from __future__ import annotations

import math
import sys
from typing import TypeGuard

import torch
from torch import Tensor

from relops._dtypes import FEATURE_DTYPES, compute_dtype

SMALLEST, LARGEST = math.ulp(0.0), sys.float_info.max  # of positive and finite numbers


def is_int(x: object) -> TypeGuard[int]:
    """Return whether x is an int, or stands for one in a graph. A bool is likely misplaced."""
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def is_real(x: object) -> TypeGuard[float]:
    """Return whether x is a number, or stands for one in a graph. A bool is not."""
    return isinstance(x, (float, int, torch.SymFloat)) and not isinstance(x, bool)


def check_number(op: str, name: str, number: object, rule: str, low: float, high: float) -> None:
    """Check that a number is in [low,high], which `rule` says in words. NaN never is."""
    if not is_real(number) or not low <= number <= high:
        raise (ValueError if is_real(number) else TypeError)(
            f"relops.{op}: {name} must be a number {rule}, got {number!r}"
        )


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


def check_features_or_integers(op: str, name: str, tensor: Tensor) -> None:
    check_tensor(op, name, tensor)
    if tensor.dtype not in FEATURE_DTYPES and (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    ):
        raise TypeError(
            f"relops.{op}: {name} must be float64, float32, float16, bfloat16 or integer, got {tensor.dtype}"
        )


def check_features_like(op: str, name: str, tensor: Tensor, letters: str, features_name: str, features: Tensor) -> None:
    """Check what the tensor shares with the features: dtype, device and number of dimensions."""
    check_tensor(op, name, tensor)
    if tensor.dtype != features.dtype:
        raise TypeError(
            f"relops.{op}: {name} must be {features.dtype}, the dtype of {features_name}, got {tensor.dtype}"
        )
    check_device(op, name, tensor, features_name, features)
    if tensor.dim() != features.dim():
        raise ValueError(f"relops.{op}: {name} must be {letters}, got shape {list(tensor.shape)}")


def check_coordinates(op: str, name: str, tensor: Tensor, features_name: str, features: Tensor) -> None:
    """Check that coordinates have the dtype of the features, or are float32 beside 16-bit ones, on one device."""
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
    """Check a shape. `expected` holds a size, or several allowed ones, for each dimension of `letters`."""
    ok = tensor.dim() == len(expected) and all(
        size in want if isinstance(want, tuple) else size == want for size, want in zip(tensor.shape, expected)
    )
    if not ok:
        words = ["/".join(map(str, want)) if isinstance(want, tuple) else str(want) for want in expected]
        raise ValueError(f"relops.{op}: {name} must be {letters} = [{','.join(words)}], got shape {list(tensor.shape)}")


def check_mask(op: str, name: str, mask: Tensor, letters: str, *shape: int, meaning: str = "") -> None:
    """Check dtype and shape of a mask. `meaning` says in the message what True means."""
    check_tensor(op, name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"relops.{op}: {name} must be bool{meaning}, got {mask.dtype}")
    check_shape(op, name, mask, letters, *shape)


def check_integers(op: str, name: str, tensor: Tensor) -> None:
    check_tensor(op, name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"relops.{op}: {name} must be of an integer dtype, got {tensor.dtype}")
