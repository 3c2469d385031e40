"""Masks in COCO's formats, which are polygons and run-length encodings (RLE)."""

from __future__ import annotations

import contextlib
import math
from operator import mul
from typing import Any

import numpy as np

from relops.training._optional import require
from relops.training.errors import UsageError


def usable_mask(segmentation: Any, height: int, width: int) -> tuple[Any, str]:
    """Check a segmentation before it is decoded, because invalid numbers could make the decoder exhaust the memory.

    Args:
        segmentation: a list of polygons [x, y, x, y, ...] or an RLE {"size": [height, width], "counts": ...}. The
            counts are a list or COCO's compressed string.
        height, width: the size of the image in pixels.

    Returns:
        The segmentation without its unusable polygons ([] if nothing is usable), and the reason why a polygon or the
        RLE is unusable ("" if everything is usable).

    Raises:
        UsageError: If the segmentation is malformed. The message names the rule and the value.
    """
    if isinstance(segmentation, dict):
        if not run_lengths(segmentation, height, width)[1::2].any():
            return [], "an RLE of zeros"
        return {"size": [height, width], "counts": segmentation["counts"]}, ""
    if not isinstance(segmentation, list):
        raise UsageError(f"a segmentation must be a list of polygons or an RLE, got {shown(segmentation)}")
    usable, problem = [], ""
    for polygon in segmentation:
        numbers = _coordinates(polygon)
        found = _problem(numbers, height, width)
        if found:
            problem = found
        else:
            usable.append(numbers)
    return usable, problem


def _problem(numbers: list[float], height: int, width: int) -> str:
    """Return the reason why a polygon is not usable, or "" if it is usable."""
    if len(numbers) % 2:
        return f"a polygon with {len(numbers)} coordinates, which is an odd number"
    if len(numbers) < 6:
        return f"a polygon with {len(numbers) // 2} points"
    xs, ys = numbers[::2], numbers[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        return "a polygon outside the image"
    if _area(xs, ys) <= 1e-9 * (right - left + bottom - top) ** 2:
        return "a polygon without area"
    # The memory that the decoder needs is proportional to the total length of the edges. No edge is longer than
    # the width plus the height of the polygon. The exact total is computed only if the sum of these bounds exceeds the
    # limit.
    max_length = 1000 * (height + width)
    if len(xs) * (right - left + bottom - top) > max_length:
        points = np.array([xs, ys])
        if np.abs(points - np.roll(points, 1, 1)).sum() > max_length:
            return "a polygon whose total edge length exceeds 1000 times the height plus width of the image"
    return ""


def _area(xs: list[float], ys: list[float]) -> float:
    """Return the area of a polygon."""
    return abs(sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, xs[1:] + xs[:1], ys))) / 2


def _coordinates(polygon: Any) -> list[float]:
    """Return the coordinates of a polygon, or raise UsageError if they are not finite numbers."""
    if not isinstance(polygon, list):
        raise UsageError(f"a segmentation must consist of polygons that are lists of numbers, got {shown(polygon)}")
    with contextlib.suppress(TypeError, OverflowError):
        if math.isfinite(sum(polygon)):
            return polygon
    try:
        numbers = np.array(polygon, np.float64)  # this also converts numbers that are written as strings
    except (ValueError, TypeError, OverflowError):
        numbers = np.zeros((0, 0))
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise UsageError(f"a segmentation must have finite numbers as coordinates, got {shown(polygon)}")
    return numbers.tolist()


def run_lengths(rle: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Return the run lengths [R] int64 of an RLE. Runs of 0 and 1 alternate in column order, beginning with 0."""
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise UsageError(f"a segmentation must have the size of its image, {[height, width]}, got {shown(size)}")
    if isinstance(counts, (str, bytes)):
        lengths = _decompressed(counts.encode() if isinstance(counts, str) else counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        lengths = np.array(counts, object)  # with Python integers, the checks below cannot overflow
    else:
        raise UsageError(f"a segmentation must have counts that are a string or integers, got {shown(counts)}")
    if len(lengths) == 0 or lengths.min() < 0 or lengths.sum() != height * width:
        raise UsageError(
            f"a segmentation must have counts that are not negative and add up to the {height * width} pixels of its "
            f"image, got {shown(counts)}"
        )
    return lengths.astype(np.int64)


def _decompressed(text: bytes) -> np.ndarray:
    """Decode the counts string of a compressed RLE to run lengths.

    Each character holds 5 bits of a number, starting with the lowest bits. Bit 5 is set if the number continues in the
    next character. Bit 4 of the last character is the sign of the number. The first three numbers are run lengths. Each
    later number is the difference from the run length two positions before. If the string is malformed, the result is
    empty.
    """
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(~digits & 32)
    if len(digits) == 0 or (digits < 0).any() or (digits > 63).any() or len(ends) == 0 or ends[-1] != len(digits) - 1:
        return np.zeros(0, np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1])
    position = np.arange(len(digits)) - np.repeat(begins, ends - begins + 1)
    if position.max() > 6:  # no image needs numbers of more than 7 characters
        return np.zeros(0, np.int64)
    values = np.add.reduceat((digits & 31) << 5 * position, begins)
    values -= np.where(digits[ends] & 16, np.int64(1) << 5 * (position[ends] + 1), 0)
    # From the fourth value, each value is a difference from the run length two positions before.
    for first in (1, 2):
        values[first::2] = values[first::2].cumsum()
    return values


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def mask_area(segmentation: Any, height: int, width: int) -> float:
    """Return the area in pixels of a segmentation from `usable_mask`, assuming that polygons do not overlap."""
    if isinstance(segmentation, dict):
        return float(run_lengths(segmentation, height, width)[1::2].sum())
    return float(sum(_area(polygon[::2], polygon[1::2]) for polygon in segmentation))


def checked_mask(segmentation: Any, height: int, width: int, file: str) -> Any:
    """Return the usable part of a segmentation, or raise a UsageError that names the file."""
    try:
        return usable_mask(segmentation, height, width)[0]
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error


def decode_mask(segmentation: Any, height: int, width: int, file: str) -> np.ndarray:
    """Decode a segmentation to [H,W] bool, which is all False if nothing is usable. Errors name the file."""
    coco = require("faster_coco_eval.core.mask", "faster-coco-eval")
    usable = checked_mask(segmentation, height, width, file)
    if not usable:
        return np.zeros((height, width), bool)
    return coco.decode(coco.segmToRle(usable, width, height)).astype(bool)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return the uncompressed RLE of a mask [H,W]."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(ends, prepend=0, append=flat.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
