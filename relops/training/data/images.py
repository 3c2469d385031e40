"""Reading images, and the range of values of those with more than 8 bits."""

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
SAMPLED = 64  # images that the range of a data set is taken from
# Largest values that cameras and programs write. Between 1 and 16 none of them is likely.
INTEGER_MAXIMA = (1, 255, 1023, 4095, 16383, 65535)
FLOAT_MAXIMA = (1, 255, 65535)
TOLERANCE = 0.02  # by which resampling leaves the range of floats
MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE, BITS_PER_SAMPLE, GDAL_NODATA = 281, 341, 258, 42113  # tags of TIFF


class PixelRange(NamedTuple):
    """The values that become 0 and 255 in images whose pixels are not bytes."""

    low: float
    high: float

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Return uint8; what is outside of the range is clipped, NaN becomes 0."""
        scaled = (np.nan_to_num(values.astype(np.float64), posinf=self.high) - self.low) * (
            255 / (self.high - self.low)
        )
        return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image; "._a.jpg" is what macOS leaves beside a.jpg."""
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("._")


def is_deep(image: Image) -> bool:
    """Whether the pixels are one integer of 16 or 32 bits, or one float."""
    return image.mode.startswith(("I", "F"))


def read_image(file: str, pixel_range: PixelRange | None = None) -> np.ndarray:
    """Return [H,W,3] uint8 RGB. A file that is not there or cannot be read whole is a UsageError that names it.

    Args:
        file: path.
        pixel_range: of an image whose pixels are not bytes; None: one that suits this image alone.
    """
    with _opened(file) as image:
        if is_deep(image):
            pixel_range = pixel_range or _extremes(image).usual_range()
            image = require("PIL.Image", "pillow").fromarray(pixel_range.to_bytes(np.asarray(image)))
        return np.array(image.convert("RGB"))


def image_size(file: str) -> tuple[int, int]:
    """Return (height, width), from the head of the file."""
    with _opened(file) as image:
        return image.height, image.width


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Image]:
    """Open an image. What goes wrong in the context is a UsageError that names the file."""
    pil = require("PIL.Image", "pillow")
    try:
        with pil.open(file) as image:
            yield image
    except Exception as error:  # of a broken file, PIL's plugins raise anything
        raise UsageError(f"{file}: the file must be an image, and cannot be read as one: {error}") from error


class _Extremes(NamedTuple):
    """The least and the largest value of images, the largest one that their files state, or 0, and their kind."""

    low: float
    high: float
    stated: float
    is_float: bool

    def usual_range(self) -> PixelRange:
        """Return what the files state, or else the smallest usual range that has the values.

        Negative values have no usual range: theirs is from the least to the largest.
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
    values = values[np.abs(values) < 1e30]  # NaN, infinities and what stands for no value are not
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    return _Extremes(low, high, _stated_maximum(image), image.mode.startswith("F"))


def _stated_maximum(image: Image) -> float:
    """Return what the tags of a TIFF say, or 0; that of all 16 bits is what programs write that do not look."""
    tags = getattr(image, "tag_v2", {})
    for tag in (MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE):
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, (int, float)) and 0 < value < 65535:
            return float(value)
    bits = tags.get(BITS_PER_SAMPLE, (0,))[0]
    return float(2**bits - 1) if 8 < bits < 16 else 0.0


def common_range(files: Sequence[str]) -> PixelRange | None:
    """Return the range of the deep ones among SAMPLED of the files, with a warning that tells it; None without any.

    Images of 16 bits a color are read by their upper 8 bits, which may be nearly none: a warning, too.
    A file that is broken is left to the one who reads it.
    """
    pil = require("PIL.Image", "pillow")
    deep: dict[str, _Extremes] = {}
    colors: dict[str, int] = {}
    for file in files[:: -(-len(files) // SAMPLED) or 1]:
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
            f"{next(iter(colors))}: images have 16 bits a color, of which the upper 8 are read, and these are at most "
            f"{max(colors.values())} of 255: store such images with 8 bits a color",
            stacklevel=2,
        )
    if not deep:
        return None
    lows, highs, stated, is_float = zip(*deep.values())
    result = _Extremes(min(lows), max(highs), max(stated), any(is_float)).usual_range()
    warnings.warn(
        f"{next(iter(deep))}: pixels are not bytes; in all images of this data set, values from {result.low:g} to "
        f"{result.high:g} are scaled to 0 to 255",
        stacklevel=2,
    )
    return result


def _has_wide_colors(image: Image) -> bool:
    # The last item of a tile is the arrangement of its bytes, alone or as the first of several things.
    tile = getattr(image, "tile", None)  # of images in files
    arrangement = tile[0][3] if tile else ""
    arrangement = arrangement[0] if isinstance(arrangement, tuple) and arrangement else arrangement
    return isinstance(arrangement, str) and ";16" in arrangement
