"""Reading of images, and the pixel range of grayscale images with more than 8 bits per pixel."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relops.training._optional import require
from relops.training.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SAMPLE_SIZE = 64  # maximum number of images from which the pixel range of a data set is determined
# The maximum pixel values that cameras and programs usually write. If the largest pixel value in the images is between
# 1 and 16, none of these maxima is likely, and the largest pixel value is used instead.
INTEGER_MAXIMA = (1, 255, 1023, 4095, 16383, 65535)
FLOAT_MAXIMA = (1, 255, 65535)
TOLERANCE = 0.02  # resampled floats may lie outside of the range by up to this fraction of its maximum
MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE, BITS_PER_SAMPLE, GDAL_NODATA = 281, 341, 258, 42113  # TIFF tags


class PixelRange(NamedTuple):
    """The pixel values that are mapped to 0 and 255 in grayscale images with more than 8 bits per pixel."""

    low: float
    high: float

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Scale values to uint8. Values outside the range are clipped, and NaN is replaced by 0 before scaling."""
        scaled = (np.nan_to_num(values.astype(np.float64), posinf=self.high) - self.low) * (
            255 / (self.high - self.low)
        )
        return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def is_image(name: str) -> bool:
    """Return whether a file name is the name of an image. Files like "._a.jpg", which macOS creates, are not images."""
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("._")


def is_deep(image: Image) -> bool:
    """Return whether an image is grayscale with more than 8 bits per pixel (integers or floats)."""
    return image.mode.startswith(("I", "F"))


def read_image(file: str, pixel_range: PixelRange | None = None) -> np.ndarray:
    """Read an image as [H,W,3] uint8 RGB.

    Args:
        file: the path of the image.
        pixel_range: the pixel values that are mapped to 0 and 255 in grayscale images with more than 8 bits per pixel.
            None means that the range is determined from this image only.

    Raises:
        UsageError: If the file is missing or cannot be read completely. The message names the file.
    """
    with _opened(file) as image:
        if is_deep(image):
            pixel_range = pixel_range or _extremes(image).usual_range()
            image = require("PIL.Image", "pillow").fromarray(pixel_range.to_bytes(np.asarray(image)))
        return np.array(image.convert("RGB"))


def image_size(file: str) -> tuple[int, int]:
    """Read the header of an image file, and return (height, width)."""
    with _opened(file) as image:
        return image.height, image.width


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Image]:
    """Open an image, and raise any error in the `with` block again as a UsageError that names the file."""
    pil = require("PIL.Image", "pillow")
    try:
        with pil.open(file) as image:
            yield image
    except Exception as error:  # PIL's plugins raise various exceptions for broken files
        raise UsageError(f"{file}: the file must be an image, but it cannot be read as one: {error}") from error


class _Extremes(NamedTuple):
    """The minimum and maximum pixel values of images.

    `stated` is the maximum possible value according to the TIFF tags, or 0 if the tags do not contain it. `is_float`
    says whether the pixels are floats.
    """

    low: float
    high: float
    stated: float
    is_float: bool

    def usual_range(self) -> PixelRange:
        """Return the range up to `stated` or, if that is unknown, the smallest usual range that contains all values.

        If there are negative values, no usual range contains them, and the range from the minimum to the maximum is
        returned.
        """
        if self.low < -TOLERANCE * self.high:
            return PixelRange(self.low, max(self.high, self.low + 1))
        if self.stated >= self.high > 0:
            return PixelRange(0.0, self.stated)
        if self.is_float and 0 < self.high < 0.05:
            return PixelRange(0.0, self.high)
        maxima = FLOAT_MAXIMA if self.is_float else INTEGER_MAXIMA
        tolerance = TOLERANCE if self.is_float else 0.0
        usual = next((maximum for maximum in maxima if maximum * (1 + tolerance) >= self.high), self.high)
        return PixelRange(0.0, float(self.high if 1 + tolerance < self.high < 16 else usual))


def _extremes(image: Image) -> _Extremes:
    values = np.asarray(image)
    missing = getattr(image, "tag_v2", {}).get(GDAL_NODATA, "nan")
    with contextlib.suppress(ValueError, AttributeError):
        values = values[values != float(missing.strip("\0 "))]
    values = values[np.abs(values) < 1e30]  # exclude NaN, infinities and huge values that mark missing pixels
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    return _Extremes(low, high, _stated_maximum(image), image.mode.startswith("F"))


def _stated_maximum(image: Image) -> float:
    """Return the maximum pixel value according to the tags of a TIFF file, or 0 if the tags do not contain it.

    The value 65535 is ignored, because many programs write it without examining the pixels.
    """
    tags = getattr(image, "tag_v2", {})
    for tag in (MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE):
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, (int, float)) and 0 < value < 65535:
            return float(value)
    bits = tags.get(BITS_PER_SAMPLE, (0,))[0]
    return float(2**bits - 1) if 8 < bits < 16 else 0.0


def common_range(files: Sequence[str]) -> PixelRange | None:
    """Determine a common pixel range for all grayscale images with more than 8 bits per pixel, and warn about it.

    At most SAMPLE_SIZE files are examined. If they contain no such image, None is returned. Only the upper 8 bits of
    color images with 16 bits per channel are read, so a warning is also given if these upper 8 bits have small values.
    Broken files are skipped, because reading them later raises an error.
    """
    pil = require("PIL.Image", "pillow")
    deep: dict[str, _Extremes] = {}
    colors: dict[str, int] = {}
    for file in files[:: -(-len(files) // SAMPLE_SIZE) or 1]:
        try:
            with pil.open(file) as image:
                if is_deep(image):
                    deep[file] = _extremes(image)
                elif _has_wide_colors(image):
                    colors[file] = int(np.asarray(image).max())
        except Exception:
            continue
    if colors and max(colors.values()) < 64:
        warnings.warn(
            f"{next(iter(colors))}: images have 16 bits per color channel, but only the upper 8 bits are read, and "
            f"these are at most {max(colors.values())} of 255. Store such images with 8 bits per color channel",
            stacklevel=2,
        )
    if not deep:
        return None
    lows, highs, stated, is_float = zip(*deep.values())
    result = _Extremes(min(lows), max(highs), max(stated), any(is_float)).usual_range()
    warnings.warn(
        f"{next(iter(deep))}: pixels have more than 8 bits, so values from {result.low:g} to {result.high:g} are "
        "scaled to the range from 0 to 255 in all images of this data set",
        stacklevel=2,
    )
    return result


def _has_wide_colors(image: Image) -> bool:
    # The last item of a PIL tile is the raw mode (the layout of the bytes) or a tuple that begins with the raw mode.
    tile = getattr(image, "tile", None)  # only images that were opened from files have this attribute
    raw_mode = tile[0][3] if tile else ""
    raw_mode = raw_mode[0] if isinstance(raw_mode, tuple) and raw_mode else raw_mode
    return isinstance(raw_mode, str) and ";16" in raw_mode
