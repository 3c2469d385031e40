"""Drawings of detections, and plots of training curves."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relops.training._optional import require
from relops.training.log import SHOWN

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    classes: Sequence[str],
    masks: np.ndarray | None = None,
) -> Image:
    """Draw boxes, class names, scores and masks over an image. Each class always has the same color.

    Args:
        image: [H,W,3] uint8 RGB.
        boxes: [D,4] x1, y1, x2, y2 in pixels of the image.
        labels: [D] integers. Detections with a negative label are not drawn.
        scores: [D].
        classes: class names, indexed by label.
        masks: [D,H,W] bool, or None to draw no masks.

    Returns:
        The drawing as a PIL image. The input image is not changed.
    """
    pil, draw = require("PIL.Image", "pillow"), require("PIL.ImageDraw", "pillow")
    shown = [d for d in np.argsort(scores, kind="stable") if labels[d] >= 0]  # highest score last
    if masks is not None:
        image = image.copy()
        for d in shown:
            image[masks[d]] = 0.5 * image[masks[d]] + 0.5 * np.array(_color(labels[d]))
    picture = pil.fromarray(image)
    pen = draw.Draw(picture)
    for d in shown:
        color, box = _color(labels[d]), [float(x) for x in boxes[d]]
        text = f"{classes[labels[d]]} {scores[d]:.2f}"
        pen.rectangle(box, outline=color, width=max(1, round(max(image.shape[:2]) / 400)))
        _, _, text_right, text_bottom = pen.textbbox((0, 0), text)
        corner = box[0], max(0.0, box[1] - text_bottom - 1)
        pen.rectangle([*corner, corner[0] + text_right + 1, corner[1] + text_bottom + 1], fill=color)
        pen.text(corner, text, fill=(0, 0, 0))
    return picture


def _color(label: int) -> tuple[int, int, int]:
    # Multiples of the golden ratio give distinct hues for any number of classes.
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1.0))
    return red, green, blue


def plot_curves(log: Sequence[dict[str, Any]], path: Path | str) -> None:
    """Plot the losses against the iteration (left) and the average precision against the training time (right).

    Args:
        log: the lines of a log in any order. Training lines have the keys "iteration", "minutes", "loss" and "losses",
            which is a dict {name: value}. Evaluation lines have "iteration", "minutes" and metrics such as "AP", "AP50"
            and "mask_AP". Values that are missing in a line are not plotted.
        path: the output file. Its extension determines the format.
    """
    figure_type = require("matplotlib.figure", "matplotlib").Figure  # unlike pyplot, Figure does not set a backend
    figure = figure_type(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)

    steps = [line for line in log if "loss" in line]
    iterations = [line["iteration"] for line in steps]
    if steps:
        total = np.array([line["loss"] for line in steps], float)
        left.plot(iterations, total, color="0.8", linewidth=1)
        left.plot(iterations, _smoothed(total), color="black", linewidth=2, label="total")
    for name in dict.fromkeys(name for line in steps for name in line.get("losses", {})):
        values = np.array([line.get("losses", {}).get(name, np.nan) for line in steps], float)
        left.plot(iterations, _smoothed(values), linewidth=1, label=name)
    left.set(xlabel="iteration", ylabel="loss")

    for name in SHOWN:
        points = [(line["minutes"], line[name]) for line in log if name in line and "minutes" in line]
        if points:
            right.plot(*zip(*points), marker="o", markersize=3, label=name)
    right.set(xlabel="minutes of training", ylabel="average precision", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return running means that ignore NaN. Each window ends at one of the values and contains 1/20 of all values."""
    window = max(1, len(values) // 20)
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([np.zeros(window), x]).cumsum() for x in (np.where(finite, values, 0), finite))
    counts = counts[window:] - counts[:-window]
    return np.where(counts > 0, (sums[window:] - sums[:-window]) / np.maximum(counts, 1), np.nan)
