"""What the twins of the region ops share.

Every op but roi_pool is a weighted mean that factors into one over rows and one over columns. Per axis an op is thus
given by its taps: for bin p of box k, the pixels it reads and their weights, padded to one length T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from relops.reference._dtypes import compute_dtype

Taps = tuple[Tensor, Tensor]  # pixels [K,P,T] int64, weights [K,P,T]

CHUNK = 2**24  # taps held at once, products of those of the two axes: bounds the memory


def pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    return (output_size, output_size) if isinstance(output_size, int) else (output_size[0], output_size[1])


def box_rows(boxes: Tensor | Sequence[Tensor]) -> Tensor:  # [K,5]
    """A list holds the boxes [Ki,4] of each image."""
    if isinstance(boxes, Tensor):
        return boxes
    return torch.cat([F.pad(of_image, (1, 0), value=n) for n, of_image in enumerate(boxes)])


def split_boxes(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Image of each box [K], its x1, y1, x2, y2 [K,4], and whether these are finite [K].

    Where they are not, they are replaced by 0 before any arithmetic: a NaN would come back in the gradients.
    """
    boxes = box_rows(boxes)
    index = boxes[:, 0].detach().to(compute_dtype(input))
    # Within 2^-10 of an integer it is that; else its fraction is dropped.
    batch = torch.where((index - index.round()).abs() <= 2**-10, index.round(), index.trunc())
    outside = ~((batch >= 0) & (batch < len(input)))
    if outside.any():
        raise IndexError(f"boxes: a batch index must be in [0,{len(input)}), got {index[outside][0].item()}")
    finite = boxes[:, 1:].isfinite().all(1)
    return batch.long(), torch.where(finite[:, None], boxes[:, 1:].to(compute_dtype(input)), 0), finite


def drop_boxes(taps: Taps, kept: Tensor) -> Taps:
    """Weights of 0 where not kept [K]."""
    return taps[0], taps[1] * kept[:, None, None]


def numbers(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=like.dtype, device=like.device)


def longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


# ---- Taps of one axis: boxes that begin at start [K] and are size [K] long, in P bins, on a map of n pixels ----


def sampled_taps(start: Tensor, size: Tensor, P: int, sampling_ratio: int, n: int) -> Taps:
    """The mean of linearly interpolated samples, those more than a pixel outside the map counting as 0."""
    bins = size[:, None] / P  # [K,1]
    edges = start[:, None] + numbers(P, start) * bins  # [K,P]
    if sampling_ratio > 0:
        grid = torch.full_like(bins, sampling_ratio)
        sample = numbers(sampling_ratio, start)  # [S]
    else:
        grid = bins.detach().ceil()
        # Samples are more than half a pixel apart: of a box far larger than the map, those on the map are enough.
        spacing = torch.where(grid > 0, bins.detach() / grid, 1)
        first = ((-1 - edges.detach()) / spacing - 0.5).floor().clamp(min=0)
        sample = first[..., None] + numbers(longest(grid.clamp(0, 2 * n + 6)), start)  # [K,P,S]
    bins, grid = bins[..., None], grid[..., None]
    positions = edges[..., None] + (sample + 0.5) * bins / torch.where(grid > 0, grid, 1)  # [K,P,S]
    counts = (sample < grid) & (positions >= -1) & (positions <= n)

    # Beyond the centers of the outer pixels the surface is flat.
    positions = limited((positions > 0) & (positions < n - 1), positions, 0, max(n - 1, 0))
    low = positions.detach().floor()
    fraction = positions - low
    pixels = torch.cat([low, (low + 1).clamp(max=max(n - 1, 0))], -1).long()
    weights = torch.cat([1 - fraction, fraction], -1) * torch.where(counts, 1 / grid, 0).repeat(1, 1, 2)
    return (pixels, weights) if sampling_ratio > 0 else merged(pixels, weights, n)


def limited(moves: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """x clamped, with a gradient where it moves: at the limits, that of torch.clamp changes with the version."""
    return torch.where(moves, x, x.detach().clamp(low, high))


def merged(pixels: Tensor, weights: Tensor, n: int) -> Taps:
    """Neighboring samples share pixels: each is to be read once."""
    first = pixels.amin(-1, keepdim=True) if pixels.shape[-1] else pixels.new_zeros(*pixels.shape[:2], 1)
    T = longest(pixels - first) + 1
    weights = weights.new_zeros(*pixels.shape[:2], T).scatter_add(-1, pixels - first, weights)
    return (first + numbers(T, pixels)).clamp(max=max(n - 1, 0)), weights


def rounded(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero as C rounds; torch.round takes halves to even."""
    whole = x.trunc()
    return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0)


def whole_bins(start: Tensor, size: Tensor, P: int, limit: int) -> tuple[Tensor, Tensor]:
    """The pixels [first, end) of each bin, both [K,P] and in [0,limit]; bins overlap where P does not divide size."""
    bins = size[:, None] / P
    first = (numbers(P, bins) * bins).floor() + start[:, None]
    end = ((numbers(P, bins) + 1) * bins).ceil() + start[:, None]
    return first.clamp(0, limit).long(), end.clamp(0, limit).long()


# ---- Pooling ----


def pool(input: Tensor, batch: Tensor, y: Taps, x: Taps, position_sensitive: bool = False) -> Tensor:  # [K,C,PH,PW]
    """Every bin is a weighted sum of pixels, which are rows of C numbers: an embedding bag.

    Position-sensitive: output channel c of bin b reads input channel c * bins + b; a pixel then has a row for each bin.
    """
    N, C, H, W = input.shape
    (rows, row_weights), (columns, column_weights) = y, x
    K, PH, TY = rows.shape
    _, PW, TX = columns.shape
    bins = PH * PW if position_sensitive else 1
    table = input.to(compute_dtype(input)).unflatten(1, (C // bins, bins)).permute(0, 3, 4, 2, 1)  # [N,H,W,bins,C/bins]
    table = table.reshape(N * H * W * bins, C // bins)
    own = numbers(bins, batch).view(PH, PW, 1, 1) if position_sensitive else 0

    output = []
    for k in numbers(K, batch).split(max(1, CHUNK // max(1, PH * PW * TY * TX))):
        pixels = (batch[k, None, None] * H + rows[k])[:, :, None, :, None] * W + columns[k][:, None, :, None]
        weights = row_weights[k][:, :, None, :, None] * column_weights[k][:, None, :, None]  # [k,PH,PW,TY,TX]
        output.append(weighted_rows(table, (pixels * bins + own).flatten(3), weights.flatten(3)))
    return torch.cat(output).permute(0, 3, 1, 2).to(input.dtype)


def weighted_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums of rows of table [R,C], at the places `rows` [...,T], times their weights: [...,C]."""
    if not table.numel() or not rows.numel():  # an embedding bag wants something in it
        return weights.sum(-1, keepdim=True) * table.sum(0)
    bags = rows.flatten(0, -2), weights.flatten(0, -2)
    return F.embedding_bag(bags[0], table, mode="sum", per_sample_weights=bags[1]).view(*rows.shape[:-1], -1)
