"""Sinusoidal embedding of ranks, as the learned duplicate removal of relation networks has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relops._checks import LARGEST, SMALLEST, check_number, check_tensor, is_int
from relops._dtypes import FEATURE_DTYPES
from relops._library import check_device_has_kernels
from relops.ops._autograd import register_differentiable


def rank_embedding(ranks: Tensor, dim: int = 128, wavelength: float = 1000.0) -> Tensor:
    """Sines and cosines of ranks: what tells a network the place of an entry in an order.

    ``output[.., j] = sin(a_j)`` and ``output[.., dim / 2 + j] = cos(a_j)``, j from 0 to dim / 2 - 1, with
    ``a_j = ranks / wavelength^(2 j / dim)``. The definition is that of Relation Networks for Object Detection
    (https://arxiv.org/abs/1711.11575, section 4.3) and of Attention Is All You Need (https://arxiv.org/abs/1706.03762),
    here with all sines first.

    Args:
        ranks: [..] of any integer dtype, float64, float32, float16 or bfloat16; 0 is the first. bfloat16 has no odd
            numbers beyond 256.
        dim: even, at least 2.
        wavelength: finite and positive: the slowest sine repeats after nearly 2 pi times as many ranks.

    Returns:
        [..,dim], float32 for integers, otherwise in the dtype of ranks. Angles are float64 for every dtype, so that
        large ranks keep their place. A rank that is not finite gives NaN.

    Gradients: to ranks where they are floating point. Second derivatives and forward-mode AD raise RuntimeError.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: dim or wavelength out of its range.

    Example:
        >>> relops.rank_embedding(torch.arange(100), 128)  # [100,128]
    """
    op = "rank_embedding"
    check_tensor(op, "ranks", ranks)
    floating = ranks.dtype in FEATURE_DTYPES
    if not floating and (ranks.is_floating_point() or ranks.is_complex() or ranks.dtype == torch.bool):
        raise TypeError(
            f"relops.{op}: ranks must be of an integer dtype, float64, float32, float16 or bfloat16, got {ranks.dtype}"
        )
    if not is_int(dim):
        raise TypeError(f"relops.{op}: dim must be an int, got {dim!r}")
    if dim < 2 or dim % 2 != 0:
        raise ValueError(f"relops.{op}: dim must be even and at least 2, got {dim!r}")
    check_number(op, "wavelength", wavelength, "positive and finite", SMALLEST, LARGEST)
    check_device_has_kernels(op, ranks.device)
    return torch.ops.relops.rank_embedding(ranks if floating else ranks.to(torch.int64), dim, wavelength)


def _fake(ranks: Tensor, dim: int, wavelength: float) -> Tensor:
    return ranks.new_empty(*ranks.shape, dim, dtype=ranks.dtype if ranks.is_floating_point() else torch.float32)


def _fake_backward(grad_output: Tensor, ranks: Tensor, wavelength: float) -> Tensor:
    return torch.empty_like(ranks, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ranks, _, ctx.wavelength = inputs
    ctx.save_for_backward(ranks)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    (ranks,) = ctx.saved_tensors
    return torch.ops.relops._rank_embedding_backward(grad_output, ranks, ctx.wavelength), None, None


def _vmap(info: Any, in_dims: tuple[Any, ...], ranks: Tensor, dim: int, wavelength: float) -> tuple[Tensor, int]:
    return torch.ops.relops.rank_embedding(ranks.movedim(in_dims[0], 0), dim, wavelength), 0


register_differentiable("rank_embedding", _fake, _fake_backward, _setup_context, _backward)
torch.library.register_vmap("relops::rank_embedding", _vmap)
