"""Batches of padded images, and the processes that load them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from relops.models import Targets
from relops.models.inference import MEAN, STD
from relops.training.data.samples import Sample

DIVISOR = 32  # of the sizes of batches: the coarsest stride of a pyramid


class Batch(NamedTuple):
    """Images, and what is in them.

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

    def to(self, device: torch.device | str) -> Batch:
        """Copies without waiting for them, as pinned memory allows."""
        targets = Targets(*(x if x is None else x.to(device, non_blocking=True) for x in self.targets))
        images, sizes, image_ids, scales = (
            x.to(device, non_blocking=True) for x in (self.images, self.sizes, self.image_ids, self.scales)
        )
        return Batch(images, sizes, targets, image_ids, scales)


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of N samples, its H and W as large as the largest asks for."""
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
        if sample.masks is not None:
            masks[n, :t, :h, :w] = torch.from_numpy(sample.masks[keep])
        if sample.proposals is not None:
            proposals[n, : len(sample.proposals)] = torch.from_numpy(sample.proposals)
    scales = sizes / np.array([sample.original_size for sample in samples])
    return Batch(
        images,
        torch.from_numpy(sizes).float(),
        Targets(boxes, labels, masks, proposals),
        torch.tensor([sample.image_id for sample in samples]),
        torch.from_numpy(scales).float(),
    )
