"""Draw the figures for the pages on ops. `python docs/draw_figures.py` writes docs/images/*.svg."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE = "#1f5f99", "#e08a3c"
pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "relops", "font.size": 10}


def grid(axes: pyplot.Axes, height: int, width: int, title: str) -> None:
    """Draw the pixels of a map, with pixel centers at integers."""
    for x in range(width + 1):
        axes.plot([x - 0.5, x - 0.5], [-0.5, height - 0.5], color="#c0c0c0", linewidth=0.8)
    for y in range(height + 1):
        axes.plot([-0.5, width - 0.5], [y - 0.5, y - 0.5], color="#c0c0c0", linewidth=0.8)
    axes.set(xlim=(-0.7, width - 0.3), ylim=(height - 0.3, -0.7), aspect="equal", title=title)
    axes.axis("off")


def save(figure: pyplot.Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def roi_align() -> None:
    """Draw how roi_align and roi_pool divide the same box into 2 x 2 bins."""
    figure, (align, pool) = pyplot.subplots(1, 2, figsize=(8, 3))
    x1, y1, x2, y2 = 1.3, 0.8, 6.1, 4.2
    grid(align, 6, 8, "roi_align: mean of bilinear samples")
    align.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=BLUE, linewidth=2))
    align.plot([(x1 + x2) / 2] * 2, [y1, y2], color=BLUE)
    align.plot([x1, x2], [(y1 + y2) / 2] * 2, color=BLUE)
    steps = (np.arange(4) + 0.5) / 4
    x, y = np.meshgrid(x1 + steps * (x2 - x1), y1 + steps * (y2 - y1))
    align.scatter(x, y, color=ORANGE, zorder=3)
    grid(pool, 6, 8, "roi_pool: maximum over whole pixels")
    for left, right in ((1, 4), (4, 7)):
        for top, bottom in ((1, 3), (3, 5)):
            corner = left - 0.5, top - 0.5
            size = right - left, bottom - top
            pool.add_patch(Rectangle(corner, *size, facecolor=BLUE, alpha=0.15))
            pool.add_patch(Rectangle(corner, *size, fill=False, edgecolor=BLUE, linewidth=2))
    pool.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=ORANGE, linestyle="--"))
    save(figure, "roi_align")


def ms_deform_attn() -> None:
    """Draw a query that samples four points on each of three levels."""
    figure, levels = pyplot.subplots(1, 3, figsize=(8, 2.6))
    generator = np.random.default_rng(1)
    for axes, (height, width), number in zip(levels, ((8, 12), (4, 6), (2, 3)), range(3)):
        grid(axes, height, width, f"level {number}: {height} x {width}")
        center = np.array([0.45 * width - 0.5, 0.5 * height - 0.5])
        points = center + generator.normal(0, 0.16, (4, 2)) * (width, height)
        for (x, y), weight in zip(points, generator.uniform(20, 120, 4)):
            axes.plot([center[0], x], [center[1], y], color=BLUE, linewidth=0.8)
            axes.scatter(x, y, s=weight, color=ORANGE, zorder=3)
        axes.scatter(*center, marker="x", color=BLUE, zorder=4)
    figure.text(0.5, -0.02, "x: reference point of the query; dots: sampling points, larger = more weight", ha="center")
    save(figure, "ms_deform_attn")


def local_relation() -> None:
    """Draw the weights of a 5 x 5 window, which come from the similarity of the query and the keys and from a prior."""
    generator = np.random.default_rng(3)
    y, x = np.mgrid[-2:3, -2:3]
    similarity = -((0.5 * x + 0.2 * generator.normal(size=(5, 5))) ** 2)
    prior = -0.2 * (x**2 + y**2)
    weights = np.exp(similarity + prior)
    figure, panels = pyplot.subplots(1, 3, figsize=(8, 2.6))
    titles = ("similarity of query and keys", "+ prior on position", "softmax: weights of the mean")
    for axes, values, title in zip(panels, (similarity, prior, weights / weights.sum()), titles):
        axes.imshow(values, cmap="Blues")
        axes.add_patch(Rectangle((1.5, 1.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2))
        axes.set_title(title)
        axes.axis("off")
    save(figure, "local_relation")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    roi_align()
    ms_deform_attn()
    local_relation()
