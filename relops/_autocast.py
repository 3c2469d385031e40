"""What autocast asks of an op that takes several tensors: it makes some of them 16 bit and leaves the others."""

from __future__ import annotations

import functools
from typing import Any, overload

import torch
from torch import Tensor

from relops._dtypes import FEATURE_DTYPES, compute_dtype


def is_autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is; of meta tensors torch cannot tell."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


@overload
def under_autocast(features: Tensor, *coordinates: Tensor) -> list[Tensor]: ...


@overload
def under_autocast(features: Tensor, *coordinates: Tensor | None) -> list[Tensor | None]: ...


def under_autocast(features: Tensor, *coordinates: Tensor | None) -> list[Any]:
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
