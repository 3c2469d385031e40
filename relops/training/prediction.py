"""Running a detector on images: detections, drawings and proposals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from relops.models import Detections
from relops.models.detectors.base import BaseDetector
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.parts.masks import paste_masks
from relops.training._files import written
from relops.training.data import Batch, DetectionData, Sample, Transformed, collate, prepare
from relops.training.data.batches import load_batches
from relops.training.data.sampler import batches_in_order
from relops.training.detector import Detector
from relops.training.errors import UsageError
from relops.training.plots import draw_detections

DRAWN_SIZE = 640  # small images are drawn enlarged, with at most this many pixels on the longer side


@torch.no_grad()
def predict(model: BaseDetector, batch: Batch) -> Detections:
    """Return the detections of a model, which must be in evaluation mode and on the device of the batch."""
    targets = (batch.targets,) if model.uses_proposals else ()
    detections: Detections = model(batch.images, batch.sizes, *targets)
    return detections


@dataclass
class Objects:
    """The D objects that were detected in an image, in order of descending score.

    Attributes:
        boxes: [D,4] x1, y1, x2, y2 in pixels of the image.
        labels, scores: [D].
        masks: [D,H,W] bool, or None if the model has no masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None


def detect(detector: Detector, sample: Sample, threshold: float) -> Objects:
    """Detect the objects in an image, and return those whose score is at least the threshold."""
    batch = collate([prepare(sample, detector.min_size, detector.max_size)])
    found = predict(detector.model, batch.to(detector.device))
    keep = ((found.labels[0] >= 0) & (found.scores[0] >= threshold)).cpu()
    boxes, scores, labels = (x[0].float().cpu()[keep].numpy() for x in (found.boxes, found.scores, found.labels))
    boxes = boxes / batch.scales[0].flip(0).repeat(2).numpy()
    masks = None
    if found.masks is not None:
        size = sample.image.shape[:2]
        masks = paste_masks(found.masks[0].float().cpu()[keep], torch.from_numpy(boxes), size).numpy()
    return Objects(boxes, labels.astype(np.int64), scores, masks)


def draw(detector: Detector, sample: Sample, found: Objects, path: Path) -> None:
    """Draw the objects that were detected in an image, and write the drawing to a file."""
    # Small images are enlarged, because the font size of the class names is fixed.
    factor = max(1, DRAWN_SIZE // max(sample.image.shape[:2]))
    image, masks = sample.image.repeat(factor, 0).repeat(factor, 1), found.masks
    if masks is not None:
        masks = masks.repeat(factor, 1).repeat(factor, 2)
    drawn = draw_detections(image, factor * found.boxes, found.labels, found.scores, detector.classes, masks)
    with written(path) as file:
        drawn.save(file, "png")


def draw_examples(detector: Detector, data: DetectionData, folder: Path, count: int) -> None:
    """Detect the objects in the first `count` images, and write the drawings to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    detector.model.eval()
    for index in range(min(count, len(data))):
        draw(detector, data[index], detect(detector, data[index], 0.5), folder / f"{index}.png")


def proposing_model(detector: Detector) -> TwoStageDetector:
    """Return the model of a detector, or raise UsageError if it does not generate proposals."""
    model = detector.model
    if model.uses_proposals or not isinstance(model, TwoStageDetector):
        raise UsageError(f"model {detector.name} does not generate proposals")
    return model


@torch.no_grad()
def propose(
    detector: Detector, data: DetectionData, count: int, batch_size: int, workers: int
) -> dict[int, np.ndarray]:
    """Compute the proposals of a detector for all images of a data set.

    Args:
        detector: a detector that generates proposals.
        data: the images.
        count: the maximum number of proposals per image.
        batch_size: the number of images per batch.
        workers: the number of processes that load images.

    Returns:
        A dict that maps the id of each image to its proposals [P,4], in pixels of the image and in order of descending
        score.

    Raises:
        UsageError: If the detector does not generate proposals.
    """
    model = proposing_model(detector)
    batches = batches_in_order(range(len(data)), batch_size)
    images = Transformed(data, detector.min_size, detector.max_size)
    proposals = {}
    for batch in load_batches(images, batches, workers, detector.device):
        found = model.propose(batch.images.to(detector.device), batch.sizes.to(detector.device), count)
        boxes = found[0].float().cpu() / batch.scales.flip(1).repeat(1, 2)[:, None]
        for image_id, of_image in zip(batch.image_ids.tolist(), boxes):
            padding = (of_image == 0).all(1)
            proposals[image_id] = of_image[~padding].numpy()
    return proposals
