"""Code shared by the twins of the region ops.

Every region op except roi_pool computes weighted means. The weight of a pixel is the product of a row weight and a
column weight, so the code handles the two axes separately. The taps of an axis are the pixels that bin p of box k reads
along the axis, and the weights of these pixels. All bins have the same number T of taps, including padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from relops.reference._dtypes import compute_dtype

Taps = tuple[Tensor, Tensor]  # pixels [K,P,T] int64, weights [K,P,T]

CHUNK = 2**24  # the maximum number of (row tap, column tap) pairs in memory at once


def size_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    return (output_size, output_size) if isinstance(output_size, int) else (output_size[0], output_size[1])


def box_rows(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """Return boxes as rows [K,5]. If `boxes` is a list, it has a tensor [Ki,4] for each image."""
    if isinstance(boxes, Tensor):
        return boxes
    return torch.cat([F.pad(image_boxes, (1, 0), value=n) for n, image_boxes in enumerate(boxes)])


def split_boxes(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the batch indices [K], the corners [K,4], and a mask [K] of the boxes whose corners are all finite.

    The corners of a non-finite box are replaced by 0 before any arithmetic, because a NaN would propagate to the
    gradients.
    """
    boxes = box_rows(boxes)
    index = boxes[:, 0].detach().to(compute_dtype(input))
    # A batch index within 2^-10 of an integer is rounded. Any other batch index is truncated.
    batch = torch.where((index - index.round()).abs() <= 2**-10, index.round(), index.trunc())
    outside = ~((batch >= 0) & (batch < len(input)))
    if outside.any():
        raise IndexError(f"boxes: a batch index must be in [0,{len(input)}), got {index[outside][0].item()}")
    finite = boxes[:, 1:].isfinite().all(1)
    return batch.long(), torch.where(finite[:, None], boxes[:, 1:].to(compute_dtype(input)), 0), finite


def zero_boxes(taps: Taps, finite: Tensor) -> Taps:  # finite: bool [K]
    """Set the weights of all non-finite boxes to 0."""
    return taps[0], taps[1] * finite[:, None, None]


def arange_like(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=like.dtype, device=like.device)


def max_length(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


# ---- Taps of one axis. Along it, box k begins at start[k], is size[k] long and has P bins. The map has n pixels. ----


def sampled_taps(start: Tensor, size: Tensor, P: int, sampling_ratio: int, n: int) -> Taps:
    """Return taps for the mean of linearly interpolated samples; samples more than a pixel outside of the map are 0."""
    bins = size[:, None] / P  # [K,1]
    edges = start[:, None] + arange_like(P, start) * bins  # [K,P]
    if sampling_ratio > 0:
        grid = torch.full_like(bins, sampling_ratio)
        sample = arange_like(sampling_ratio, start)  # [S]
    else:
        grid = bins.detach().ceil()
        # Samples outside of the map are not needed. Samples inside the map are more than half a pixel apart, so a bin
        # has a bounded number of them, even if the box is huge.
        spacing = torch.where(grid > 0, bins.detach() / grid, 1)
        first = ((-1 - edges.detach()) / spacing - 0.5).floor().clamp(min=0)
        sample = first[..., None] + arange_like(max_length(grid.clamp(0, 2 * n + 6)), start)  # [K,P,S]
    bins, grid = bins[..., None], grid[..., None]
    positions = edges[..., None] + (sample + 0.5) * bins / torch.where(grid > 0, grid, 1)  # [K,P,S]
    valid = (sample < grid) & (positions >= -1) & (positions <= n)

    # Beyond the centers of the outermost pixels, the interpolated surface is constant.
    positions = clamp_where((positions > 0) & (positions < n - 1), positions, 0, max(n - 1, 0))
    low = positions.detach().floor()
    fraction = positions - low
    pixels = torch.cat([low, (low + 1).clamp(max=max(n - 1, 0))], -1).long()
    weights = torch.cat([1 - fraction, fraction], -1) * torch.where(valid, 1 / grid, 0).repeat(1, 1, 2)
    return (pixels, weights) if sampling_ratio > 0 else merge_taps(pixels, weights, n)


def clamp_where(differentiable: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Clamp x. A gradient flows only to the elements for which `differentiable` is True.

    The gradient of torch.clamp at the limits is not used, because it depends on the version of torch.
    """
    return torch.where(differentiable, x, x.detach().clamp(low, high))


def merge_taps(pixels: Tensor, weights: Tensor, n: int) -> Taps:
    """Merge the taps of neighboring samples that read the same pixel, so that each pixel is read only once."""
    first = pixels.amin(-1, keepdim=True) if pixels.shape[-1] else pixels.new_zeros(*pixels.shape[:2], 1)
    T = max_length(pixels - first) + 1
    weights = weights.new_zeros(*pixels.shape[:2], T).scatter_add(-1, pixels - first, weights)
    return (first + arange_like(T, pixels)).clamp(max=max(n - 1, 0)), weights


def round_half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, and halves away from zero, as in C. (torch.round rounds halves to even.)"""
    truncated = x.trunc()
    return truncated + torch.where((x - truncated).abs() >= 0.5, x.sign(), 0)


def integer_bins(start: Tensor, size: Tensor, P: int, limit: int) -> tuple[Tensor, Tensor]:
    """Return the pixel range [first, end) of each bin as tensors first [K,P] and end [K,P], clamped to [0,limit].

    Neighboring bins overlap if the size of a bin is not an integer.
    """
    bins = size[:, None] / P
    first = (arange_like(P, bins) * bins).floor() + start[:, None]
    end = ((arange_like(P, bins) + 1) * bins).ceil() + start[:, None]
    return first.clamp(0, limit).long(), end.clamp(0, limit).long()


# ---- Pooling ----


def pool(input: Tensor, batch: Tensor, y: Taps, x: Taps, position_sensitive: bool = False) -> Tensor:
    """Compute the weighted sum of the pixels in each bin, using an embedding bag over a table of pixels.

    The result is [K,C,PH,PW], or [K,C/(PH*PW),PH,PW] if `position_sensitive` is True. Each row of the table has the C
    channels of a pixel. If `position_sensitive` is True, output channel c of bin b reads input channel c * bins + b,
    and the table has a row for each pixel and bin.
    """
    N, C, H, W = input.shape
    (rows, row_weights), (columns, column_weights) = y, x
    K, PH, TY = rows.shape
    _, PW, TX = columns.shape
    bins = PH * PW if position_sensitive else 1
    table = input.to(compute_dtype(input)).unflatten(1, (C // bins, bins)).permute(0, 3, 4, 2, 1)  # [N,H,W,bins,C/bins]
    table = table.reshape(N * H * W * bins, C // bins)
    bin_index = arange_like(bins, batch).view(PH, PW, 1, 1) if position_sensitive else 0

    output = []
    for k in arange_like(K, batch).split(max(1, CHUNK // max(1, PH * PW * TY * TX))):
        pixels = (batch[k, None, None] * H + rows[k])[:, :, None, :, None] * W + columns[k][:, None, :, None]
        weights = row_weights[k][:, :, None, :, None] * column_weights[k][:, None, :, None]  # [k,PH,PW,TY,TX]
        output.append(weighted_rows(table, (pixels * bins + bin_index).flatten(3), weights.flatten(3)))
    return torch.cat(output).permute(0, 3, 1, 2).to(input.dtype)


def weighted_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums [...,C] of the rows of a table [R,C]. `rows` and `weights` are [...,T]."""
    if not table.numel() or not rows.numel():  # embedding_bag rejects empty tensors
        return weights.sum(-1, keepdim=True) * table.sum(0)
    bags = rows.flatten(0, -2), weights.flatten(0, -2)
    return F.embedding_bag(bags[0], table, mode="sum", per_sample_weights=bags[1]).view(*rows.shape[:-1], -1)
