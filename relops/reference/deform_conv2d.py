"""Deformable convolution (https://arxiv.org/abs/1703.06211, https://arxiv.org/abs/1811.11168) by gathering pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from relops.reference._dtypes import compute_dtype


def deform_conv2d(
    input: Tensor,  # [N,C,H,W]
    offset: Tensor,  # [N,2*G*kh*kw,Ho,Wo]
    weight: Tensor,  # [Co,C/groups,kh,kw]
    bias: Tensor | None = None,  # [Co]
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,  # [N,G*kh*kw,Ho,Wo]
) -> Tensor:  # [N,Co,Ho,Wo]
    """Compute a convolution whose kernel elements, or taps, sample the input at offsets from their regular positions.

    For tap t in row i and column j of the kernel, and the offset group g of channel c, the result is::

        y = stride_h * ho - padding_h + dilation_h * i + dy[n,g,t,ho,wo]
        x = stride_w * wo - padding_w + dilation_w * j + dx[n,g,t,ho,wo]
        output[n,o,ho,wo] = bias[o] + sum over c, t of weight[o,c,t] * mask[n,g,t,ho,wo] * sample(input[n,c], y, x)

    The sum extends over the channels c of the group of output channel o. Samples are bilinear. Pixels outside of the
    map are zero, and so is the sample of a non-finite position.

    `input` is [N,C,H,W], `offset` [N,2*G*kh*kw,Ho,Wo] with (dy, dx) of each tap, `weight` [Co,C/groups,kh,kw], `bias`
    [Co], `mask` [N,G*kh*kw,Ho,Wo], and the result [N,Co,Ho,Wo]. For 16-bit inputs, all computations use float32.
    """
    N, C, H, W = input.shape
    Co, group_inputs, kh, kw = weight.shape
    Ho, Wo = offset.shape[2:]
    taps = kh * kw
    G, groups = offset.shape[1] // (2 * taps), C // group_inputs if C else 1
    dtype = compute_dtype(input)

    dy, dx = offset.to(dtype).reshape(N, G, kh, kw, 2, Ho, Wo).unbind(4)  # [N,G,kh,kw,Ho,Wo]
    sizes = zip((kh, kw), (Ho, Wo), _pair(stride), _pair(padding), _pair(dilation))
    rows, columns = (_tap_positions(*axis, device=input.device) for axis in sizes)  # [kh,Ho], [kw,Wo]
    y, x = dy + rows.reshape(kh, 1, Ho, 1), dx + columns.reshape(kw, 1, Wo)
    samples = _sample(input.to(dtype).reshape(N, G, C // G, H, W), y.flatten(2), x.flatten(2))
    samples = samples.reshape(N, G, C // G, taps, Ho, Wo)
    if mask is not None:
        samples = samples * mask.to(dtype).reshape(N, G, 1, taps, Ho, Wo)

    matrix = weight.to(dtype).reshape(groups, Co // groups, group_inputs * taps)
    output = matrix @ samples.reshape(N, groups, group_inputs * taps, Ho * Wo)
    output = output.reshape(N, Co, Ho, Wo)
    if bias is not None:
        output = output + bias.to(dtype).reshape(Co, 1, 1)
    return output.to(input.dtype)


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


def _tap_positions(
    taps: int, outputs: int, stride: int, padding: int, dilation: int, *, device: torch.device
) -> Tensor:  # [taps,outputs]
    """Return the positions of the taps of all outputs on one axis, without offsets."""
    origins = stride * torch.arange(outputs, device=device) - padding
    return origins + dilation * torch.arange(taps, device=device).unsqueeze(1)


def _sample(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return the bilinear samples [N,G,C,S] of maps [N,G,C,H,W] at positions [N,G,S] in pixels."""
    N, G, C, H, W = maps.shape
    # A position from which no pixel of the map contributes becomes -2. This also stops its gradient. With two rows and
    # columns of zeros before the map and one after it, the four pixels around every position exist.
    y = torch.where((y > -1) & (y < H), y, -2)
    x = torch.where((x > -1) & (x < W), x, -2)
    padded = F.pad(maps, (2, 1, 2, 1)).flatten(3)
    top, left = y.floor(), x.floor()
    y_fraction, x_fraction = y - top, x - left
    first = (top.long() + 2) * (W + 3) + left.long() + 2

    def pixels(index: Tensor) -> Tensor:
        return padded.gather(3, index.unsqueeze(2).expand(N, G, C, -1))

    def between(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
        fraction = fraction.unsqueeze(2)
        return (1 - fraction) * a + fraction * b

    upper = between(pixels(first), pixels(first + 1), x_fraction)
    lower = between(pixels(first + W + 3), pixels(first + W + 4), x_fraction)
    return between(upper, lower, y_fraction)
