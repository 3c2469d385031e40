"""Batches of padded images, and the processes that load them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from relops.models import Targets
from relops.models.inference import MEAN, STD
from relops.training.data.samples import Sample
from relops.training.data.transforms import Transformed

DIVISOR = 32  # of the sizes of batches: the coarsest stride of a pyramid


class Batch(NamedTuple):
    """Images and their objects.

    Attributes:
        images: [N,3,H,W] float32, less MEAN and divided by STD, with zeros at the right and below; H and W are
            multiples of 32.
        sizes: [N,2] float32 (height, width) of the images within.
        targets: objects, without those to ignore.
        image_ids: [N] int64.
        scales: [N,2] float32 (y, x), pixels of the images per pixel of the original ones.
    """

    images: Tensor
    sizes: Tensor
    targets: Targets
    image_ids: Tensor
    scales: Tensor

    def to(self, device: torch.device | str, *, channels_last: bool = False) -> Batch:
        """Copy to a device without waiting for it, as pinned memory allows.

        Args:
            device: where to.
            channels_last: whether the images get that memory format.
        """
        targets = Targets._make(x if x is None else x.to(device, non_blocking=True) for x in self.targets)
        images, sizes, image_ids, scales = (
            x.to(device, non_blocking=True) for x in (self.images, self.sizes, self.image_ids, self.scales)
        )
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return Batch(images, sizes, targets, image_ids, scales)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad N samples to one batch, whose H and W are those of the largest, rounded up."""
    N = len(samples)
    sizes = np.array([sample.image.shape[:2] for sample in samples])
    H, W = (-(-int(side) // DIVISOR) * DIVISOR for side in sizes.max(0))
    kept = [~sample.ignore for sample in samples]
    T = max(1, *(int(keep.sum()) for keep in kept))
    images = torch.zeros(N, 3, H, W)
    boxes, labels = torch.zeros(N, T, 4), torch.full((N, T), -1)
    masks = torch.zeros(N, T, H, W, dtype=torch.bool) if any(s.masks is not None for s in samples) else None
    counts = [len(sample.proposals) for sample in samples if sample.proposals is not None]
    proposals = torch.zeros(N, max(1, *counts), 4) if counts else None

    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    for n, (sample, keep) in enumerate(zip(samples, kept)):
        (h, w), t = sizes[n], int(keep.sum())
        images[n, :, :h, :w] = (torch.from_numpy(sample.image).permute(2, 0, 1) - mean) / std
        boxes[n, :t], labels[n, :t] = torch.from_numpy(sample.boxes[keep]), torch.from_numpy(sample.labels[keep])
        if masks is not None and sample.masks is not None:
            masks[n, :t, :h, :w] = torch.from_numpy(sample.masks[keep])
        if proposals is not None and sample.proposals is not None:
            proposals[n, : len(sample.proposals)] = torch.from_numpy(sample.proposals)
    scales = sizes / np.array([sample.original_size for sample in samples])
    return Batch(
        images,
        torch.from_numpy(sizes).float(),
        Targets(boxes, labels, masks, proposals),
        torch.tensor([sample.image_id for sample in samples]),
        torch.from_numpy(scales).float(),
    )


def load_batches(
    data: Transformed, indices: Iterable[list[tuple[int, int]]], workers: int, device: torch.device
) -> DataLoader[Batch]:
    """Load batches of the images with these (epoch, index), in their order, in `workers` other processes."""
    return DataLoader(
        data,
        batch_sampler=indices,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_group,
    )


def _leave_group(_: int) -> None:
    """Take a worker out of the process group of the process that trains.

    Terminals, timeout and torchrun signal all processes of a group, and the one that trains still needs its data then.
    Where that one is interrupted while it takes a tensor, the thread that hands it over has nothing to report.
    """
    os.setpgid(0, 0)
    sys.excepthook = lambda *_: None
