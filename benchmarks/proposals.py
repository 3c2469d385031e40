"""What the benchmarks of suppression share: boxes, scores and classes.

Boxes lie in an image of 800 x 1216 pixels and are drawn anew each round, in one of two ways.

"uniform": upper left corners uniform over the image, sides uniform in 1 to 200 pixels, scores uniform; what is usually
timed. Of 1000 about 840 are kept at IoU 0.5, far more than of a detector's.

"proposals": what a region proposal network or a dense detector hands to suppression. There is an object for every 100
boxes and at least 8. An object has a center uniform over the image, the root of its area log-uniform in 16 to 512
pixels, the logarithm of its aspect ratio uniform in +- log 2, and a class c of C with probability in proportion to
1 / (c + 1). A quarter of the boxes are background: a box drawn like an object, and a score of 0.3 times the square of a
uniform number. Each other box belongs to an object, any with the same probability: its center is off by a normal of 0.1
of the sides, the logarithms of its sides by a normal of 0.1, and its score is exp(-d^2) times a uniform number in 0.7
to 1, d^2 being the sum of the squares of these four numbers over 0.04.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.regions import IMAGE


def uniform(K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[K,4], [K]."""
    device = generator.device
    places, sides = torch.rand(2, K, 2, generator=generator, device=device)
    corners = places * torch.tensor(IMAGE, device=device).flip(0)
    boxes = torch.cat([corners, corners + 1 + 199 * sides], 1)
    return boxes, torch.rand(K, generator=generator, device=device)


def proposals(K: int, generator: torch.Generator, classes: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """[K,4], [K] and [K] int64."""
    device, objects, background = generator.device, max(8, K // 100), K // 4

    def things(count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Centers, sides and classes."""
        centers, shapes = torch.rand(2, count, 2, generator=generator, device=device)
        side = 16 * 32 ** shapes[:, :1]
        stretch = 2 ** (shapes[:, 1:] - 0.5)
        share = 1 / torch.arange(1, classes + 1, device=device)
        of_class = torch.multinomial(share, count, replacement=True, generator=generator)
        return (
            centers * torch.tensor(IMAGE, device=device).flip(0),
            side * torch.cat([stretch, 1 / stretch], 1),
            of_class,
        )

    center, side, idxs = things(objects)
    chosen = torch.randint(objects, (K - background,), generator=generator, device=device)
    off = 0.1 * torch.randn(K - background, 4, generator=generator, device=device)
    lone_center, lone_side, lone_idxs = things(background)
    centers = torch.cat([center[chosen] + off[:, :2] * side[chosen], lone_center])
    sides = torch.cat([side[chosen] * off[:, 2:].exp(), lone_side])
    noise = torch.rand(K, generator=generator, device=device)
    near = (0.7 + 0.3 * noise[background:]) * (-off.square().sum(1) / 0.04).exp()
    scores = torch.cat([near, 0.3 * noise[:background].square()])
    order = torch.randperm(K, generator=generator, device=device)
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], 1)
    return boxes[order], scores[order], torch.cat([idxs[chosen], lone_idxs])[order]


def images(B: int, K: int, generator: torch.Generator, classes: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """[B,K,4], [B,K] and [B,K] int64."""
    boxes, scores, idxs = zip(*(proposals(K, generator, classes) for _ in range(B)))
    return torch.stack(boxes), torch.stack(scores), torch.stack(idxs)
