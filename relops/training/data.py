"""Data sets, and the way from them to batches.

data = open_data("voc:VOC2007", "train")
prepared = Transformed(data, min_size=600, max_size=1000, augment=True)
sampler = EpochSampler(len(data), batch_size=4, seed=0, aspect_ratios=data.aspect_ratios())
loader = DataLoader(prepared, batch_sampler=sampler.batches(first_iteration=0), collate_fn=collate)
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from relops.models.inference import MEAN, STD
from relops.models.structures import Targets
from relops.training._coco import open_coco
from relops.training._files import written
from relops.training._images import PixelRange
from relops.training._optional import require
from relops.training._samples import Annotation, DetectionData, FileData, Sample
from relops.training._shapes import ShapesData
from relops.training._voc import open_voc

__all__ = [
    "Annotation",
    "Batch",
    "DetectionData",
    "EpochSampler",
    "Sample",
    "Transformed",
    "collate",
    "open_data",
    "prepare",
    "save_proposals",
    "with_proposals",
]

DIVISOR = 32  # of the sizes of batches: the coarsest stride of a pyramid


def open_data(
    spec: str,
    split: str,
    classes: Sequence[str] | None = None,
    annotations: str | None = None,
    pixel_range: PixelRange | None = None,
) -> DetectionData:
    """Open one split of a data set.

    Args:
        spec: `voc:DIR` (see `_voc.open_voc`), `coco:DIR` (see `_coco.open_coco`), or `shapes:N` for N drawn training
            images and N // 5 test images; `shapes` is `shapes:1000`.
        split: "train" or "test".
        classes: names that labels are numbered by: those of the training data for test data. None: those that occur in
            train (VOC), or the file's categories (COCO).
        annotations: the file of annotations of a COCO data set; None: found by its name (see `_coco.open_coco`).
        pixel_range: the values that become 0 and 255 in images whose pixels are not bytes: those of the training data
            for test data. None: found in a part of the images.

    Raises:
        ValueError: naming the argument or file, the rule, and what was got.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    kind, _, where = spec.partition(":")
    if annotations is not None and kind != "coco":
        raise ValueError(f"annotations must name a file of coco:DIR, got {annotations!r} for data {spec!r}")
    if kind in ("voc", "coco") and where:
        if not os.path.isdir(where):
            raise ValueError(f"data {spec!r}: {where} must be a folder")
        if kind == "voc":
            return open_voc(where, split, classes, pixel_range)
        return open_coco(where, split, classes, annotations, pixel_range)
    if spec != "shapes" and not (kind == "shapes" and re.fullmatch("[0-9]{1,9}", where) and int(where) >= 5):
        raise ValueError(f"data must be coco:DIR, voc:DIR, shapes or shapes:N with N from 5 to 999999999, got {spec!r}")
    count = int(where or 1000)
    data = ShapesData(split, count if split == "train" else count // 5)
    if classes is not None and list(classes) != data.classes:
        raise ValueError(f"classes of {spec} must be {data.classes}, got {list(classes)}")
    return data


def warn_of_common_images(train: DetectionData, test: DetectionData) -> None:
    """Warn where images in files are both trained and evaluated on."""
    if not isinstance(train, FileData) or not isinstance(test, FileData):
        return
    trained = {os.path.realpath(a.file) for a in train.annotations()}
    common = [a.file for a in test.annotations() if os.path.realpath(a.file) in trained]
    if common:
        warnings.warn(
            f"{common[0]}: images to evaluate on should not be trained on, got {len(common)} such images of "
            f"{len(test)}",
            stacklevel=2,
        )


class _WithProposals(DetectionData):
    def __init__(self, data: DetectionData, proposals: Mapping[int, np.ndarray]) -> None:
        self._data, self._proposals = data, proposals
        self.classes, self.category_ids, self.pixel_range = data.classes, data.category_ids, data.pixel_range

    @property
    def has_masks(self) -> bool:
        return self._data.has_masks

    @has_masks.setter
    def has_masks(self, value: bool) -> None:
        self._data.has_masks = value

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        return dataclasses.replace(sample, proposals=self._proposals[sample.image_id])

    def annotations(self) -> list[Annotation]:
        return self._data.annotations()

    def check_masks(self) -> None:
        self._data.check_masks()

    def aspect_ratios(self) -> list[float]:
        return self._data.aspect_ratios()


def save_proposals(file: str, proposals: Mapping[int | str, np.ndarray]) -> None:
    """Write what `with_proposals` reads: for each image, by its own id, [P,4] boxes in pixels of the original image."""
    boxes = [np.asarray(b, np.float32).reshape(-1, 4) for b in proposals.values()]
    with written(Path(file)) as stream:
        np.savez(
            stream,
            image_ids=np.array(list(proposals)),
            counts=np.array([len(b) for b in boxes], np.int64),
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        )


def with_proposals(data: DetectionData, file: str) -> DetectionData:
    """The same data with the proposals of a file of `save_proposals`, which must have all its images."""
    try:
        with np.load(file) as content:
            image_ids, counts, boxes = (content[name] for name in ("image_ids", "counts", "boxes"))
    except Exception as error:  # zip files can be broken in many ways
        raise ValueError(f"{file}: the file must be one that save_proposals wrote: {error}") from error
    shapes_fit = image_ids.shape == counts.shape == (len(image_ids),) and boxes.shape == (counts.sum(), 4)
    if not shapes_fit or (counts < 0).any() or not np.isfinite(boxes).all():
        raise ValueError(f"{file}: the file must be one that save_proposals wrote: its arrays do not fit together")
    stored = dict(zip(map(str, image_ids.tolist()), np.split(boxes, np.cumsum(counts)[:-1])))
    proposals = {}
    for annotation in data.annotations():
        if str(annotation.own_id) not in stored:
            raise ValueError(f"{file}: proposals are missing of image {annotation.own_id}, {annotation.file}")
        proposals[annotation.image_id] = stored[str(annotation.own_id)]
    return _WithProposals(data, proposals)


def prepare(sample: Sample, min_size: int, max_size: int, *, flip: bool = False, flip_vertical: bool = False) -> Sample:
    """The sample with its shorter side resized to min_size, or its longer one to max_size if that is smaller.

    The image is interpolated bilinearly, with antialiasing where it shrinks; masks take the nearest pixel. Boxes and
    proposals are scaled by the ratio of the sizes, which are whole pixels, in each direction. Flipped after that.
    """
    pil = require("PIL.Image", "pillow")
    height, width = sample.image.shape[:2]
    scale = min(min_size / min(height, width), max_size / max(height, width))
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    image, masks = sample.image, sample.masks
    if (new_height, new_width) != (height, width):
        image = np.array(pil.fromarray(image).resize((new_width, new_height), pil.Resampling.BILINEAR))
        if masks is not None:
            rows = ((np.arange(new_height) + 0.5) * (height / new_height)).astype(int)
            columns = ((np.arange(new_width) + 0.5) * (width / new_width)).astype(int)
            masks = masks[:, rows[:, None], columns]
    horizontal, vertical = slice(None, None, -1 if flip else 1), slice(None, None, -1 if flip_vertical else 1)
    image = np.ascontiguousarray(image[vertical, horizontal])
    if masks is not None:
        masks = np.ascontiguousarray(masks[:, vertical, horizontal])

    ratio = np.array([new_width / width, new_height / height] * 2)

    def placed(boxes: np.ndarray) -> np.ndarray:
        x1, y1, x2, y2 = (boxes * ratio).clip(0, [new_width, new_height] * 2).T
        if flip:
            x1, x2 = new_width - x2, new_width - x1
        if flip_vertical:
            y1, y2 = new_height - y2, new_height - y1
        return np.stack([x1, y1, x2, y2], 1).astype(np.float32)

    return dataclasses.replace(
        sample,
        image=image,
        boxes=placed(sample.boxes),
        masks=masks,
        proposals=None if sample.proposals is None else placed(sample.proposals),
    )


class Transformed(Dataset):
    """`prepare`d samples of (epoch, index); what is flipped depends on nothing but these and the seed.

    Args:
        data: the samples.
        min_size, max_size: see `prepare`.
        augment: flip left and right half of the images.
        seed: not negative.
        vertical_flip: with augment, turn upside down half of the images too.
        cache: keep resized samples in the memory of this process; each worker of a loader has its own.
    """

    def __init__(
        self,
        data: DetectionData,
        min_size: int,
        max_size: int,
        augment: bool = False,
        seed: int = 0,
        vertical_flip: bool = False,
        cache: bool = False,
    ) -> None:
        self.data, self.min_size, self.max_size = data, min_size, max_size
        self.augment, self.seed, self.vertical_flip = augment, seed, vertical_flip
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = self._resized(index)
        horizontal, vertical = np.random.default_rng((self.seed, epoch, index)).random(2) < 0.5
        flip, flip_vertical = self.augment and horizontal, self.augment and self.vertical_flip and vertical
        if not (flip or flip_vertical):
            return sample
        height, width = sample.image.shape[:2]
        return prepare(sample, min(height, width), max(height, width), flip=flip, flip_vertical=flip_vertical)

    def _resized(self, index: int) -> Sample:
        if self._cache is None:
            return prepare(self.data[index], self.min_size, self.max_size)
        if index not in self._cache:
            self._cache[index] = prepare(self.data[index], self.min_size, self.max_size)
        return self._cache[index]


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
            raise ValueError(
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
        """From any iteration on: which batch is which depends on nothing but the seed and the rank."""
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
        batches = [kind[:n] for kind, n in zip(kinds, whole)] + [left[: len(left) // size * size]]
        batches = np.concatenate(batches).reshape(-1, size)
        return batches[rng.permutation(len(batches))]
