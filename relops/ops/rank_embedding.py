"""Sinusoidal embeddings of ranks (https://arxiv.org/abs/1711.11575, section 4.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relops._checks import MAX_FINITE, MIN_POSITIVE, check_number, check_tensor, is_int
from relops._dtypes import FEATURE_DTYPES
from relops._library import check_device_has_kernels
from relops.ops._autograd import register_differentiable


def rank_embedding(ranks: Tensor, dim: int = 128, wavelength: float = 1000.0) -> Tensor:
    """Embed ranks, which are positions in a ranking, as sines and cosines of several wavelengths.

    For j from 0 to ``dim / 2 - 1``, the embedding of a rank is::

        angle[j] = rank / wavelength^(2 j / dim)
        output[.., j] = sin(angle[j])
        output[.., dim / 2 + j] = cos(angle[j])

    The definition follows Relation Networks for Object Detection (https://arxiv.org/abs/1711.11575, section 4.3) and
    Attention Is All You Need (https://arxiv.org/abs/1706.03762), except that all sines precede all cosines.

    Args:
        ranks: A tensor of any shape. The dtype is an integer dtype, float64, float32, float16 or bfloat16. Ranks start
            at 0. bfloat16 cannot represent odd numbers larger than 256.
        dim: The size of an embedding, an even number of at least 2.
        wavelength: A finite positive number. The slowest sine has a period of nearly ``2 * pi * wavelength`` ranks.

    Returns:
        A tensor [..,dim], in the dtype of `ranks` if it is a floating-point dtype, and in float32 otherwise. Angles are
        always computed in float64, so that the embeddings of large ranks are accurate. The embedding of a non-finite
        rank is NaN.

    Gradients:
        Gradients flow to `ranks` if it has a floating-point dtype. Second derivatives and forward-mode AD raise a
        RuntimeError.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If `dim` or `wavelength` is out of range.

    Example:
        >>> import torch, relops
        >>> embedding = relops.rank_embedding(torch.arange(100), 128)
        >>> embedding.shape
        torch.Size([100, 128])
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
    check_number(op, "wavelength", wavelength, "a finite positive number", MIN_POSITIVE, MAX_FINITE)
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
