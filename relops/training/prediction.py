"""What a detector finds in images, as detections, objects, drawings or proposals."""

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

DRAWN = 640  # pixels that the longer side of a small image is enlarged to, at most


@torch.no_grad()
def predict(model: BaseDetector, batch: Batch) -> Detections:
    """Return the detections of a model in evaluation mode, on its device."""
    targets = (batch.targets,) if model.uses_proposals else ()
    detections: Detections = model(batch.images, batch.sizes, *targets)
    return detections


@dataclass
class Objects:
    """The D objects found in an image, by descending score, in pixels of the image.

    Attributes:
        boxes: [D,4].
        labels, scores: [D].
        masks: [D,H,W] bool, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None


def detect(detector: Detector, sample: Sample, threshold: float) -> Objects:
    """Return the objects with a score of at least the threshold."""
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
    """Write a picture of an image with the objects found in it."""
    # Names have one size of letters: small images are enlarged.
    factor = max(1, DRAWN // max(sample.image.shape[:2]))
    image, masks = sample.image.repeat(factor, 0).repeat(factor, 1), found.masks
    if masks is not None:
        masks = masks.repeat(factor, 1).repeat(factor, 2)
    drawn = draw_detections(image, factor * found.boxes, found.labels, found.scores, detector.classes, masks)
    with written(path) as file:
        drawn.save(file, "png")


def draw_examples(detector: Detector, data: DetectionData, folder: Path, count: int) -> None:
    """Write pictures of the first `count` images, and of the objects found in them, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    detector.model.eval()
    for index in range(min(count, len(data))):
        draw(detector, data[index], detect(detector, data[index], 0.5), folder / f"{index}.png")


def proposing_model(detector: Detector) -> TwoStageDetector:
    """Return the model of a detector. One that makes no proposals is a UsageError."""
    model = detector.model
    if model.uses_proposals or not isinstance(model, TwoStageDetector):
        raise UsageError(f"model {detector.name} makes no proposals")
    return model


@torch.no_grad()
def propose(
    detector: Detector, data: DetectionData, count: int, batch_size: int, workers: int
) -> dict[int, np.ndarray]:
    """Return up to `count` proposals [P,4] of each image, in pixels of the image, best first, by the image's id."""
    model = proposing_model(detector)
    batches = batches_in_order(range(len(data)), batch_size)
    images = Transformed(data, detector.min_size, detector.max_size)
    proposals = {}
    for batch in load_batches(images, batches, workers, detector.device):
        found = model.propose(batch.images.to(detector.device), batch.sizes.to(detector.device), max_proposals=count)
        boxes = found[0].float().cpu() / batch.scales.flip(1).repeat(1, 2)[:, None]
        for image_id, of_image in zip(batch.image_ids.tolist(), boxes):
            padding = (of_image == 0).all(1)
            proposals[image_id] = of_image[~padding].numpy()
    return proposals
