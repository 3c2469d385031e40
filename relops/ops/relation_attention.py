"""Attention among boxes, weighted by features and geometry (https://arxiv.org/abs/1711.11575)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relops._autocast import coordinates_under_autocast, promote_under_autocast
from relops._checks import (
    MAX_FINITE,
    MIN_POSITIVE,
    check_choice,
    check_coordinates,
    check_device,
    check_features,
    check_features_like,
    check_mask,
    check_number,
    check_shape,
)
from relops._dtypes import compute_dtype
from relops._library import check_device_has_kernels
from relops.ops._autograd import fresh_gradients, only_needed, register_differentiable
from relops.ops._tf32 import tf32_allowed
from relops.ops._vmap import mapped_first

GEOMETRIES = ("paper", "official")
EMBEDDING = 64  # 8 sines and 8 cosines of each of 4 coordinates


def relation_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_boxes: Tensor,
    key_boxes: Tensor,
    geometry_weight: Tensor,
    geometry_bias: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    geometry: str = "paper",
    wavelength: float = 1000.0,
    scale: float | None = None,
) -> Tensor:
    """Compute multi-head attention among boxes, with weights that depend on features and relative geometry.

    The output is a weighted sum over the keys k::

        b[n,q,m,k] = geometry_weight[m] . e(q, k) + geometry_bias[m]
        logit[n,q,m,k] = log(max(b[n,q,m,k], 1e-6)) + scale * query[n,q,m] . key[n,k,m]
        output[n,q,m] = sum over k of (softmax over k of logit[n,q,m,k]) * value[n,k,m]

    The embedding e(q, k) has 64 numbers, 16 for each of these four coordinates in turn: the sines and then the cosines
    of ``coordinate * 100 / wavelength^(j / 8)`` for j from 0 to 7::

        log(max(|dx| / w, 1e-3)), log(max(|dy| / h, 1e-3)), log(wq / wk), log(hq / hk)

    The differences between the centers of the two boxes are dx and dy. The width of a box is x2 - x1 + 1, and its
    height is y2 - y1 + 1. The query's box has width wq and height hq, and the key's box has width wk and height hk. The
    divisors w and h are the width and height of either the key's box or the query's box, as selected by `geometry`. The
    definition follows Relation Networks for Object Detection (https://arxiv.org/abs/1711.11575, eq. 2 to 5). Neither
    the forward nor the backward pass stores the embeddings of all pairs in memory.

    Args:
        query: A tensor [N,Q,M,D] of dtype float64, float32, float16 or bfloat16.
        key: A tensor [N,K,M,D] in the dtype of `query`.
        value: A tensor [N,K,M,Dv] in the dtype of `query`.
        query_boxes: A tensor [N,Q,4] with rows (x1, y1, x2, y2) in pixels, in the dtype of `query`. If `query` has 16
            bits, float32 is also allowed and is recommended, because bfloat16 coordinates can be wrong by several
            pixels. Boxes are processed in at least float32 precision.
        key_boxes: A tensor [N,K,4] with rows (x1, y1, x2, y2) in pixels, in the dtype of `query`. If `query` has 16
            bits, float32 is also allowed.
        geometry_weight: A tensor [M,64] in the dtype of `query`. If `query` has a 16-bit dtype, float32 is also
            allowed.
        geometry_bias: A tensor [M] in the dtype of `query`. If `query` has a 16-bit dtype, float32 is also allowed. If
            None, the bias is 0.
        key_mask: A bool tensor [N,K] that is True for keys to ignore. Such a key has no influence on the output,
            whatever values its features and box have. If None, no key is ignored.
        geometry: "paper" divides dx and dy by the size of the key's box, as in eq. 5. "official" divides them by the
            size of the query's box, as in the code that the authors released.
        wavelength: A finite positive number.
        scale: A finite number, or None for ``1 / sqrt(D)``.

    Returns:
        A tensor [N,Q,M,Dv] in the dtype of `query`. If `query` has a 16-bit dtype, sums are computed in float32. If K
        is 0 or all keys of an image are masked, all outputs of this image are zero. The logarithms are undefined for a
        box with a non-finite coordinate, or with a width or height that is not positive. Such a box in `query_boxes`
        makes the output of its query NaN. Such a box in `key_boxes` makes all outputs of its image NaN, unless its key
        is masked.

    Gradients:
        Gradients flow to `query`, `key`, `value`, `query_boxes`, `key_boxes`, `geometry_weight` and `geometry_bias`.
        Only the gradients that are needed are computed. No gradient flows through a maximum that is equal to its
        constant. If ``b <= 1e-6``, the logit has no gradient with respect to `geometry_weight`, `geometry_bias` and the
        boxes. If ``|dx| / w <= 1e-3`` or ``|dy| / h <= 1e-3``, no gradient flows through that coordinate. The gradients
        of masked keys, and of queries whose keys are all masked, are zero. Second derivatives and forward-mode AD raise
        a RuntimeError. The gradients are bit-identical from run to run.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, `geometry` is unknown, or a number is out of its
            range.

    Example:
        >>> import torch, relops
        >>> x, corner = torch.randn(1, 30, 4, 16), torch.rand(1, 30, 2) * 800
        >>> boxes, weight = torch.cat([corner, corner + 50], -1), torch.randn(4, 64) * 0.1
        >>> out = relops.relation_attention(x, x, x, boxes, boxes, weight, torch.ones(4))
        >>> out.shape
        torch.Size([1, 30, 4, 16])
    """
    op = "relation_attention"
    query, key, value = promote_under_autocast(query, key, value)
    check_features(op, "query", query)
    if query.dim() != 4:
        raise ValueError(f"relops.{op}: query must be [N,Q,M,D], got shape {list(query.shape)}")
    N, Q, M, D = query.shape
    check_features_like(op, "key", key, "[N,K,M,D]", "query", query)
    check_features_like(op, "value", value, "[N,K,M,Dv]", "query", query)
    K = key.shape[1]
    check_shape(op, "key", key, "[N,K,M,D]", N, K, M, D)
    check_shape(op, "value", value, "[N,K,M,Dv]", N, K, M, value.shape[3])

    query_boxes, key_boxes, geometry_weight = coordinates_under_autocast(query, query_boxes, key_boxes, geometry_weight)
    (geometry_bias,) = coordinates_under_autocast(query, geometry_bias)
    for name, x, letters, shape in (
        ("query_boxes", query_boxes, "[N,Q,4]", (N, Q, 4)),
        ("key_boxes", key_boxes, "[N,K,4]", (N, K, 4)),
        ("geometry_weight", geometry_weight, "[M,64]", (M, EMBEDDING)),
    ):
        check_coordinates(op, name, x, "query", query)
        check_shape(op, name, x, letters, *shape)
    if geometry_bias is not None:
        check_coordinates(op, "geometry_bias", geometry_bias, "query", query)
        check_shape(op, "geometry_bias", geometry_bias, "[M]", M)
    if key_mask is not None:
        check_mask(op, "key_mask", key_mask, "[N,K]", N, K, meaning=" (True = ignore)")
        check_device(op, "key_mask", key_mask, "query", query)
    check_choice(op, "geometry", geometry, GEOMETRIES)
    check_number(op, "wavelength", wavelength, "a finite positive number", MIN_POSITIVE, MAX_FINITE)
    if scale is not None:
        check_number(op, "scale", scale, "a finite number or None", -MAX_FINITE, MAX_FINITE)
    check_device_has_kernels(op, query.device)

    wide = compute_dtype(query.dtype)
    output, _ = torch.ops.relops.relation_attention(
        query,
        key,
        value,
        query_boxes.to(wide),
        key_boxes.to(wide),
        geometry_weight.to(wide),
        None if geometry_bias is None else geometry_bias.to(wide),
        key_mask,
        geometry,
        wavelength,
        scale,
        query.is_cuda and tf32_allowed(),
    )
    return output


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:3], value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))


def _fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, weight = args[:6]
    return fresh_gradients((*tensors, weight, weight[:, 0]), args[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.settings = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # logsumexp has no gradient


def _backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 12
    needs_grad = list(ctx.needs_input_grad[:7])
    grads = torch.ops.relops._relation_attention_backward(grad_output, *ctx.saved_tensors, *ctx.settings, needs_grad)
    return *only_needed(grads, needs_grad), *(None,) * 5


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Fold the vmapped dimension into N."""
    for i, name in ((5, "geometry_weight"), (6, "geometry_bias")):
        if in_dims[i] is not None:
            raise ValueError(f"relops.relation_attention: vmap over {name} is not supported")
    folded = [
        x if i in (5, 6) or not isinstance(x, Tensor) else mapped_first(x, dim, info.batch_size).flatten(0, 1)
        for i, (x, dim) in enumerate(zip(args, in_dims))
    ]
    outputs = torch.ops.relops.relation_attention(*folded)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)


register_differentiable("relation_attention", _fake, _fake_backward, _setup_context, _backward)
torch.library.register_vmap("relops::relation_attention", _vmap)
