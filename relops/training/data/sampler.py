"""The order in which images are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from relops.training.errors import UsageError


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index). An epoch has every image once, in an order of its own, over all ranks.

    What would be the last, incomplete batch of an epoch is left out. With aspect ratios, wide images (width >= height)
    and tall ones share no batch, but for one an epoch of those that are left over: otherwise, a kind of which there is
    less than a batch would never be seen.

    Args:
        length: of the data.
        batch_size: images of a batch on one rank.
        seed: not negative.
        rank, world_size: which part of the batches of all ranks, and of how many.
        aspect_ratios: width / height of every image.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        aspect_ratios: Sequence[float] | None = None,
    ) -> None:
        self.batch_size, self.seed, self.rank = batch_size, seed, rank
        self._global_batch = batch_size * world_size
        if length < self._global_batch:
            raise UsageError(
                f"batch_size * world_size must be at most {length}, the number of images, got "
                f"{batch_size} * {world_size}"
            )
        self._wide = np.ones(length, bool) if aspect_ratios is None else np.asarray(aspect_ratios) >= 1

    @property
    def batches_per_epoch(self) -> int:
        return len(self._wide) // self._global_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches(0)

    def batches(self, first_iteration: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches from any iteration on, which depend on nothing but the seed and the rank."""
        epoch, first = divmod(first_iteration, self.batches_per_epoch)
        while True:
            for batch in self._epoch(epoch)[first:]:
                own = batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                yield [(epoch, int(index)) for index in own]
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int) -> np.ndarray:
        """[batches_per_epoch, images of all ranks] indices."""
        size, rng = self._global_batch, np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self._wide))
        kinds = [order[self._wide[order]], order[~self._wide[order]]]
        whole = [len(kind) // size * size for kind in kinds]
        left = np.concatenate([kind[n:] for kind, n in zip(kinds, whole)])
        parts = [kind[:n] for kind, n in zip(kinds, whole)] + [left[: len(left) // size * size]]
        batches = np.concatenate(parts).reshape(-1, size)
        return batches[rng.permutation(len(batches))]


def batches_in_order(indices: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
    """Return batches of (0, index), in the order of the indices; the last one may have fewer than `size`."""
    return [[(0, index) for index in indices[i : i + size]] for i in range(0, len(indices), size)]
