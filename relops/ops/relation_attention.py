"""Attention between boxes, weighted by their geometry: the object relation module (https://arxiv.org/abs/1711.11575)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relops._autocast import under_autocast, widest_under_autocast
from relops._checks import (
    LARGEST,
    SMALLEST,
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
    """Multi-head attention among boxes whose weights depend on features and on relative geometry.

    ``output[n,q,m] = sum over k of softmax over k(log(max(b, 1e-6)) + scale * query[n,q,m] . key[n,k,m]) value[n,k,m]``
    where ``b = geometry_weight[m] . e(q, k) + geometry_bias[m]`` and e is an embedding, of 64 numbers, of the four
    coordinates ``log max(|dx| / w, 1e-3), log max(|dy| / h, 1e-3), log(wq / wk), log(hq / hk)``: coordinate after
    coordinate, the 8 sines and then the 8 cosines of ``coordinate * 100 / wavelength^(j / 8)``. dx and dy are between
    the centers of the boxes, widths are x2 - x1 + 1, and w, h are those of the key's box or of the query's (geometry).
    The definition is that of Relation Networks for Object Detection (https://arxiv.org/abs/1711.11575, eq. 2 to 5). The
    embeddings of all pairs are never in memory, in neither direction.

    Args:
        query: [N,Q,M,D], float64, float32, float16 or bfloat16.
        key: [N,K,M,D] in the dtype of query.
        value: [N,K,M,Dv] in the dtype of query.
        query_boxes: [N,Q,4]: x1, y1, x2, y2 in pixels, in the dtype of query, or float32 beside 16-bit features
            (recommended: a bfloat16 coordinate is pixels off). Computed in float32 or better.
        key_boxes: [N,K,4], likewise.
        geometry_weight: [M,64], in the dtype of query, or float32 beside 16-bit features.
        geometry_bias: [M], likewise; None: 0.
        key_mask: [N,K] bool, True = ignore: whatever its features and box are, such a key has no influence. None: no
            key is ignored.
        geometry: what dx and dy are divided by, "paper": the size of the key's box, as eq. 5 has it; "official": that
            of the query's, as the code that its authors released does.
        wavelength: finite and positive.
        scale: finite; None: 1 / sqrt(D).

    Returns:
        [N,Q,M,Dv] in the dtype of query; sums are in float32 for 16-bit features. A query that has no key, because K is
        0 or all are masked, gets zeros. A box that is not finite, or whose width or height is not positive, has no
        logarithm: it makes NaN of the row of its query, or, as a key that is not masked, of all rows of its image.

    Gradients: to query, key, value, query_boxes, key_boxes, geometry_weight and geometry_bias; only those asked for are
    computed. None passes where a maximum above takes its constant: where b <= 1e-6 to geometry_weight, geometry_bias
    and boxes, where |dx| / w <= 1e-3 through that coordinate. Masked keys, and queries without keys, have zero
    gradient. Second derivatives and forward-mode AD raise RuntimeError. Backward is bit-identical from run to run.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: a shape, a device, an unknown geometry, a number out of its range.

    Example:
        >>> x, corner = torch.randn(1, 300, 16, 64), torch.rand(1, 300, 2) * 800
        >>> boxes, weight = torch.cat([corner, corner + 50], -1), torch.randn(16, 64) * 0.1
        >>> relops.relation_attention(x, x, x, boxes, boxes, weight, torch.ones(16))  # [1,300,16,64]
    """
    op = "relation_attention"
    query, key, value = widest_under_autocast(query, key, value)
    check_features(op, "query", query)
    if query.dim() != 4:
        raise ValueError(f"relops.{op}: query must be [N,Q,M,D], got shape {list(query.shape)}")
    N, Q, M, D = query.shape
    check_features_like(op, "key", key, "[N,K,M,D]", "query", query)
    check_features_like(op, "value", value, "[N,K,M,Dv]", "query", query)
    K = key.shape[1]
    check_shape(op, "key", key, "[N,K,M,D]", N, K, M, D)
    check_shape(op, "value", value, "[N,K,M,Dv]", N, K, M, value.shape[3])

    query_boxes, key_boxes, geometry_weight = under_autocast(query, query_boxes, key_boxes, geometry_weight)
    (geometry_bias,) = under_autocast(query, geometry_bias)
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
    check_number(op, "wavelength", wavelength, "positive and finite", SMALLEST, LARGEST)
    if scale is not None:
        check_number(op, "scale", scale, "finite, or None", -LARGEST, LARGEST)
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
        query.is_cuda and _tf32_allowed(),
    )
    return output


# The compiler cannot trace the getter, but compiles again when the setting changes.
@torch.compiler.assume_constant_result
def _tf32_allowed() -> bool:
    """Whether matrix products of float32 may be computed in TF32, by whichever of torch's settings it was said."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


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
    ctx.set_materialize_grads(False)  # of logsumexp, which has none


def _backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 12
    needs_grad = list(ctx.needs_input_grad[:7])
    grads = torch.ops.relops._relation_attention_backward(grad_output, *ctx.saved_tensors, *ctx.settings, needs_grad)
    return *only_needed(grads, needs_grad), *(None,) * 5


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Its dimension is folded into N."""
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
