"""Random boxes, scores and classes for the benchmarks of suppression.

The boxes are drawn for an image of 800 x 1216 pixels. Every round draws new boxes of one of two kinds.

"uniform" boxes are drawn as for most published timings. The upper left corner is uniform over the image, the sides are
uniform between 1 and 200 pixels, and the score is uniform. At an IoU threshold of 0.5, about 840 of 1000 boxes are
kept. This fraction is far larger than for the boxes of a detector.

"proposals" resemble the boxes that a region proposal network or a dense detector passes to suppression:

- There is one object per 100 boxes, and there are at least 8 objects. The center of an object is uniform over the
  image, the square root of its area is log-uniform between 16 and 512 pixels, the logarithm of its aspect ratio is
  uniform between -log 2 and log 2, and its class c (out of C) has a probability proportional to 1 / (c + 1).
- A quarter of the boxes are background. Each of them is drawn like an object, and its score is 0.3 times the square of
  a uniform number.
- Each of the remaining boxes belongs to a randomly chosen object. The offset of the box center from the object center,
  divided by the sides of the object, is normal with a standard deviation of 0.1. The logarithms of the ratios of the
  box's sides to the object's sides have the same distribution. The score is exp(-d^2) times a uniform number between
  0.7 and 1, where d^2 is the sum of the squares of these four numbers (two offsets, two logarithms), divided by 0.04.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.regions import IMAGE


def uniform(K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return uniform boxes [K,4] and their scores [K]."""
    device = generator.device
    positions, sides = torch.rand(2, K, 2, generator=generator, device=device)
    corners = positions * torch.tensor(IMAGE, device=device).flip(0)
    boxes = torch.cat([corners, corners + 1 + 199 * sides], 1)
    return boxes, torch.rand(K, generator=generator, device=device)


def proposals(K: int, generator: torch.Generator, classes: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return proposals [K,4], their scores [K] and their classes [K] (int64)."""
    device, objects, background = generator.device, max(8, K // 100), K // 4

    def draw_objects(count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the centers, sides and classes of random objects."""
        centers, shapes = torch.rand(2, count, 2, generator=generator, device=device)
        side = 16 * 32 ** shapes[:, :1]
        stretch = 2 ** (shapes[:, 1:] - 0.5)
        class_weights = 1 / torch.arange(1, classes + 1, device=device)
        idxs = torch.multinomial(class_weights, count, replacement=True, generator=generator)
        return (
            centers * torch.tensor(IMAGE, device=device).flip(0),
            side * torch.cat([stretch, 1 / stretch], 1),
            idxs,
        )

    center, side, idxs = draw_objects(objects)
    owner = torch.randint(objects, (K - background,), generator=generator, device=device)
    deviation = 0.1 * torch.randn(K - background, 4, generator=generator, device=device)
    background_center, background_side, background_idxs = draw_objects(background)
    centers = torch.cat([center[owner] + deviation[:, :2] * side[owner], background_center])
    sides = torch.cat([side[owner] * deviation[:, 2:].exp(), background_side])
    noise = torch.rand(K, generator=generator, device=device)
    object_scores = (0.7 + 0.3 * noise[background:]) * (-deviation.square().sum(1) / 0.04).exp()
    scores = torch.cat([object_scores, 0.3 * noise[:background].square()])
    order = torch.randperm(K, generator=generator, device=device)
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], 1)
    return boxes[order], scores[order], torch.cat([idxs[owner], background_idxs])[order]


def images(B: int, K: int, generator: torch.Generator, classes: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return the proposals of B images [B,K,4], their scores [B,K] and their classes [B,K] (int64)."""
    boxes, scores, idxs = zip(*(proposals(K, generator, classes) for _ in range(B)))
    return torch.stack(boxes), torch.stack(scores), torch.stack(idxs)
