"""Proposals of the images of a data set, in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relops.training._files import written
from relops.training.data.samples import Annotation, DetectionData, Sample
from relops.training.errors import UsageError


class _WithProposals(DetectionData):
    """Data whose samples also have the proposals of their image, by its id."""

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
    """Return the same data with the proposals of a file of `save_proposals`, which must have all its images."""
    try:
        with np.load(file) as content:
            image_ids, counts, boxes = (content[name] for name in ("image_ids", "counts", "boxes"))
    except Exception as error:  # zip files can be broken in many ways
        raise UsageError(f"{file}: the file must be one that save_proposals wrote: {error}") from error
    shapes_fit = image_ids.shape == counts.shape == (len(image_ids),) and boxes.shape == (counts.sum(), 4)
    if not shapes_fit or (counts < 0).any() or not np.isfinite(boxes).all():
        raise UsageError(f"{file}: the file must be one that save_proposals wrote: its arrays do not fit together")
    stored = dict(zip(map(str, image_ids.tolist()), np.split(boxes, np.cumsum(counts)[:-1])))
    proposals = {}
    for annotation in data.annotations():
        if str(annotation.own_id) not in stored:
            raise UsageError(f"{file}: proposals are missing of image {annotation.own_id}, {annotation.file}")
        proposals[annotation.image_id] = stored[str(annotation.own_id)]
    return _WithProposals(data, proposals)
