"""Files with proposals for the images of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relops.training._files import written
from relops.training.data.samples import Annotation, DetectionData, Sample
from relops.training.errors import UsageError


class _WithProposals(DetectionData):
    """A data set that adds proposals to the samples of another data set.

    Args:
        data: the other data set.
        proposals: a dict that maps the id of each image to its proposals [P,4].
    """

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
    """Write proposals to a file that `with_proposals` reads.

    Args:
        file: the path of the file.
        proposals: a dict that maps the id of each image in the data set to [P,4] boxes in pixels of the original image.
    """
    boxes = [np.asarray(b, np.float32).reshape(-1, 4) for b in proposals.values()]
    with written(Path(file)) as stream:
        np.savez(
            stream,
            image_ids=np.array(list(proposals)),
            counts=np.array([len(b) for b in boxes], np.int64),
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        )


def with_proposals(data: DetectionData, file: str) -> DetectionData:
    """Return a data set with the proposals from a file that `save_proposals` wrote.

    Raises:
        UsageError: If the file cannot be read, or if it lacks the proposals of an image.
    """
    try:
        with np.load(file) as content:
            image_ids, counts, boxes = (content[name] for name in ("image_ids", "counts", "boxes"))
    except Exception as error:  # numpy raises various exceptions for broken zip files
        raise UsageError(f"{file}: the file must have been written by save_proposals: {error}") from error
    shapes_fit = image_ids.shape == counts.shape == (len(image_ids),) and boxes.shape == (counts.sum(), 4)
    if not shapes_fit or (counts < 0).any() or not np.isfinite(boxes).all():
        raise UsageError(f"{file}: the file must have been written by save_proposals: its arrays are inconsistent")
    stored = dict(zip(map(str, image_ids.tolist()), np.split(boxes, np.cumsum(counts)[:-1])))
    proposals = {}
    for annotation in data.annotations():
        if str(annotation.own_id) not in stored:
            raise UsageError(f"{file}: the proposals of image {annotation.own_id}, {annotation.file}, are missing")
        proposals[annotation.image_id] = stored[str(annotation.own_id)]
    return _WithProposals(data, proposals)
