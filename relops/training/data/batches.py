"""Batches of padded images, and the worker processes that load them."""

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

DIVISOR = 32  # H and W of a batch are multiples of this number, the coarsest stride of a feature pyramid


class Batch(NamedTuple):
    """A batch of images and their objects.

    Attributes:
        images: [N,3,H,W] float32, normalized with MEAN and STD, and padded with zeros on the right and at the bottom. H
            and W are multiples of 32.
        sizes: [N,2] float32 (height, width) of the images without padding.
        targets: the objects of the images, without those that are ignored.
        image_ids: [N] int64.
        scales: [N,2] float32, the height and width in `sizes` divided by the height and width of the original image.
    """

    images: Tensor
    sizes: Tensor
    targets: Targets
    image_ids: Tensor
    scales: Tensor

    def to(self, device: torch.device | str, *, channels_last: bool = False) -> Batch:
        """Copy the batch to a device. The copy is asynchronous if the batch is in pinned memory.

        Args:
            device: the target device.
            channels_last: convert the images to the channels_last memory format.
        """
        targets = Targets._make(x if x is None else x.to(device, non_blocking=True) for x in self.targets)
        images, sizes, image_ids, scales = (
            x.to(device, non_blocking=True) for x in (self.images, self.sizes, self.image_ids, self.scales)
        )
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return Batch(images, sizes, targets, image_ids, scales)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad N samples to the same size, and combine them into a batch.

    H and W of the batch are the largest height and width of the samples, rounded up to multiples of 32.
    """
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
    """Return a loader that yields batches in a given order.

    Args:
        data: the images.
        indices: for each batch, the (epoch, index) pairs of its images.
        workers: the number of worker processes, or 0 to load the images in this process.
        device: the device of the model. If it is a GPU, batches are placed in pinned memory.
    """
    return DataLoader(
        data,
        batch_sampler=indices,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_group,
    )


def _leave_group(_: int) -> None:
    """Remove a worker from the process group of the training process.

    Terminals, `timeout` and torchrun send a signal to all processes of a group, but the training process still needs
    its workers until it has saved a checkpoint. Each worker sends tensors from a thread, which would print a traceback
    if the training process ended while receiving a tensor. The exception hook is disabled to suppress this traceback.
    """
    os.setpgid(0, 0)
    sys.excepthook = lambda *_: None
