"""Reconciliation of dtypes under autocast, which makes some tensors 16 bit and leaves others as they are."""

from __future__ import annotations

import functools
from typing import Any, overload

import torch
from torch import Tensor

from relops._dtypes import FEATURE_DTYPES, compute_dtype


def is_autocasting(tensor: Tensor) -> bool:
    """Return whether autocast is on for the device of the tensor. For meta tensors torch cannot tell."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


@overload
def under_autocast(features: Tensor, *coordinates: Tensor) -> list[Tensor]: ...


@overload
def under_autocast(features: Tensor, *coordinates: Tensor | None) -> list[Tensor | None]: ...


def under_autocast(features: Tensor, *coordinates: Tensor | None) -> list[Any]:
    """Convert coordinates under autocast to a dtype that is allowed beside the features, without rounding."""
    if not (isinstance(features, Tensor) and is_autocasting(features)):
        return list(coordinates)
    wide = compute_dtype(features.dtype)
    return [
        c.to(wide) if isinstance(c, Tensor) and c.is_floating_point() and c.dtype not in (features.dtype, wide) else c
        for c in coordinates
    ]


def widest_under_autocast(*features: Tensor) -> tuple[Tensor, ...]:
    """Convert all features under autocast to the widest of their dtypes."""
    if not all(isinstance(x, Tensor) and x.dtype in FEATURE_DTYPES for x in features):
        return features
    if not is_autocasting(features[0]):
        return features
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in features))
    return tuple(x.to(dtype) for x in features)
