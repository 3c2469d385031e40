"""The order in which images are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from relops.training.errors import UsageError


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """A sampler that yields an endless sequence of batches. A batch is a list of (epoch, index) pairs.

    In each epoch, the batches of all ranks contain every image once, in a new random order. Images that do not fill a
    batch on every rank are left out. If aspect ratios are given, wide images (width >= height) and tall images are put
    into separate batches. The remaining wide and tall images form at most one mixed batch per epoch. If, for example,
    the tall images were too few for a batch, they would never be used without the mixed batch.

    Args:
        length: the number of images.
        batch_size: the number of images in a batch of one rank.
        seed: the random seed, which must not be negative.
        rank: the rank of this process.
        world_size: the number of processes.
        aspect_ratios: width / height of every image, or None to mix wide and tall images.

    Raises:
        UsageError: If there are fewer images than one batch of all ranks needs.
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
        """Yield the batches of this rank, starting with the given iteration.

        Each batch depends only on its iteration and the constructor's arguments.
        """
        epoch, first = divmod(first_iteration, self.batches_per_epoch)
        while True:
            for batch in self._epoch(epoch)[first:]:
                own = batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                yield [(epoch, int(index)) for index in own]
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int) -> np.ndarray:
        """Return the image indices of an epoch as [batches_per_epoch, batch_size * world_size]."""
        size, rng = self._global_batch, np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self._wide))
        kinds = [order[self._wide[order]], order[~self._wide[order]]]
        whole = [len(kind) // size * size for kind in kinds]
        rest = np.concatenate([kind[n:] for kind, n in zip(kinds, whole)])
        parts = [kind[:n] for kind, n in zip(kinds, whole)] + [rest[: len(rest) // size * size]]
        batches = np.concatenate(parts).reshape(-1, size)
        return batches[rng.permutation(len(batches))]


def batches_in_order(indices: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
    """Return batches of (0, index) in the given order. The last batch may have fewer than `size` entries."""
    return [[(0, index) for index in indices[i : i + size]] for i in range(0, len(indices), size)]
