"""Dtype conversions under autocast, which casts some arguments of an op to 16 bits and leaves others unchanged."""

from __future__ import annotations

import functools
from typing import Any, overload

import torch
from torch import Tensor

from relops._dtypes import FEATURE_DTYPES, compute_dtype


def is_autocasting(tensor: Tensor) -> bool:
    """Return whether autocast is enabled on the device of the tensor. For meta tensors, return False."""
    # torch.is_autocast_enabled raises an error for the meta device.
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


@overload
def coordinates_under_autocast(features: Tensor, *coordinates: Tensor) -> list[Tensor]: ...


@overload
def coordinates_under_autocast(features: Tensor, *coordinates: Tensor | None) -> list[Tensor | None]: ...


def coordinates_under_autocast(features: Tensor, *coordinates: Tensor | None) -> list[Any]:
    """Under autocast, convert coordinates whose dtype the op would reject to the compute dtype of the features."""
    if not (isinstance(features, Tensor) and is_autocasting(features)):
        return list(coordinates)
    wide = compute_dtype(features.dtype)
    return [
        c.to(wide) if isinstance(c, Tensor) and c.is_floating_point() and c.dtype not in (features.dtype, wide) else c
        for c in coordinates
    ]


def promote_under_autocast(*features: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, convert all features to one dtype, the result of torch.promote_types."""
    if not all(isinstance(x, Tensor) and x.dtype in FEATURE_DTYPES for x in features):
        return features
    if not is_autocasting(features[0]):
        return features
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in features))
    return tuple(x.to(dtype) for x in features)


def parameters_under_autocast(features: Tensor, *parameters: Tensor | None) -> list[Any]:
    """Under autocast, convert parameters to the dtype of the features."""
    if not (isinstance(features, Tensor) and features.dtype in FEATURE_DTYPES and is_autocasting(features)):
        return list(parameters)
    return [p.to(features.dtype) if isinstance(p, Tensor) and p.dtype in FEATURE_DTYPES else p for p in parameters]
