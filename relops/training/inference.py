"""What is done with a detector that is trained, or being trained: evaluation, detection, proposals."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from relops import models
from relops.models.structures import Detections
from relops.training import checkpoint
from relops.training._files import written
from relops.training._images import PixelRange
from relops.training.data import Batch, DetectionData, Sample, Transformed, collate, prepare
from relops.training.distributed import World
from relops.training.evaluation import Evaluator
from relops.training.plots import draw_detections

DRAWN = 640  # pixels that the longer side of a small image is enlarged to, at most


def build(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """`models.build`, with errors that name what was asked for."""
    if name not in models.DETECTORS:
        raise ValueError(f"model must be one of {', '.join(sorted(models.DETECTORS))}, got {name!r}")
    try:
        inspect.signature(models.DETECTORS[name]).bind(num_classes, **options)
        hints = typing.get_type_hints(models.DETECTORS[name])
        for option, value in options.items():
            hint = hints.get(option, object)
            if typing.get_origin(hint) in (None, types.UnionType) and not isinstance(value, hint):
                if not (isinstance(value, int) and isinstance(float(value), hint)):
                    raise ValueError(f"{option} must be {getattr(hint, '__name__', hint)}, got {value!r}")
        return models.build(name, num_classes, **options)
    except Exception as error:  # a module raises anything, given a number or a string that is not one of its own
        raise ValueError(f"options of model {name}: {str(error).partition(chr(10))[0]}") from error


@dataclass
class Detector:
    """A model, and what it takes to use it: the name and options it is built by, the names of its classes, the sizes
    that images are brought to, the data it was trained on with their files of annotations, where these were named, and
    the range of values of images whose pixels are not bytes, where the data had such images."""

    model: nn.Module
    name: str
    options: dict[str, Any]
    classes: list[str]
    min_size: int
    max_size: int
    data: str
    train_annotations: str | None = None
    test_annotations: str | None = None
    pixel_range: PixelRange | None = None

    def save(self, path: Path) -> None:
        others = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain_range = self.pixel_range and tuple(self.pixel_range)
        checkpoint.save(path, others | {"model": self.model.state_dict(), "pixel_range": plain_range})

    @property
    def uses_proposals(self) -> bool:
        return self.model.uses_proposals


def load_detector(path: Path, device: torch.device) -> Detector:
    """From a run's folder, of which model.pt is taken, or last.pt if the run is not at its end; or from such a file."""
    places = [path / "model.pt", path / "last.pt"] if os.path.isdir(path) else [path]
    there = list(filter(os.path.exists, places))
    if not there:
        raise FileNotFoundError(f"{path}: must be a run's folder, or a file model.pt or last.pt of one, got none")
    path = there[0]
    stored = checkpoint.load(path, "model", "classes")
    weights = stored["model"]
    if "config" in stored:
        checkpoint.check_keys(path, stored["config"], "model")
        weights = stored.get("average") or weights
        stored |= stored["config"] | {"name": stored["config"]["model"]}
    fields = [field for field in dataclasses.fields(Detector) if field.name != "model"]
    checkpoint.check_keys(path, stored, *(field.name for field in fields if field.default is dataclasses.MISSING))
    model = build(stored["name"], len(stored["classes"]), stored["options"])
    for phase in range(stored.get("phase", -1) + 1):
        model.start_phase(phase)
    checkpoint.load_weights(path, model, weights)
    if stored.get("pixel_range") is not None:
        stored["pixel_range"] = PixelRange(*stored["pixel_range"])
    return Detector(
        model.to(device).eval(), **{field.name: stored[field.name] for field in fields if field.name in stored}
    )


def loader(
    data: Transformed, batches: Iterable[Sequence[tuple[int, int]]], workers: int, device: torch.device
) -> DataLoader:
    """Of batches of indices, in their order."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_group,
    )


def _leave_group(_: int) -> None:
    """Of a worker: terminals, timeout and torchrun signal all processes of a group, and the one that trains still needs
    its data then. Where that one is interrupted while it takes a tensor, the thread that hands it over has nothing to
    report."""
    os.setpgid(0, 0)
    sys.excepthook = lambda *_: None


def on_device(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    batch = batch.to(device)
    if channels_last:
        batch = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))
    return batch


@torch.no_grad()
def run(model: nn.Module, batch: Batch) -> Detections:
    """In eval mode."""
    targets = (batch.targets,) if model.uses_proposals else ()
    return model(batch.images, batch.sizes, *targets)


def evaluate(
    model: nn.Module,
    data: DetectionData,
    batch_size: int,
    min_size: int,
    max_size: int,
    world: World,
    workers: int = 0,
    amp: bool = False,
    channels_last: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluator | None:
    """Detections of all images, of which each process takes a share, against what is in them.

    Args:
        stop: asked before every batch; where any process says yes, the result is None.
    """
    model.eval()
    evaluator = Evaluator(data)
    batches = _batches(range(world.rank, len(data), world.size), batch_size)
    loaded = iter(loader(Transformed(data, min_size, max_size), batches, workers, world.device))
    # The first process has the most images; all take part in as many decisions to stop.
    for _ in range(0, len(range(0, len(data), world.size)), batch_size):
        if world.largest(stop()):
            return None
        batch = next(loaded, None)
        if batch is not None:
            with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
                detections = run(model, on_device(batch, world.device, channels_last))
            evaluator.add(batch, detections)
    evaluator.merge(world.gather(evaluator.state()))
    return evaluator


@dataclass
class Objects:
    """What was found in an image, by descending score, in its pixels.

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
    """Objects with a score of at least the threshold."""
    batch = collate([prepare(sample, detector.min_size, detector.max_size)])
    found = run(detector.model, batch.to(next(detector.model.parameters()).device))
    keep = ((found.labels[0] >= 0) & (found.scores[0] >= threshold)).cpu()
    boxes, scores, labels = (x[0].float().cpu()[keep].numpy() for x in (found.boxes, found.scores, found.labels))
    boxes = boxes / batch.scales[0].flip(0).repeat(2).numpy()
    masks = None
    if found.masks is not None:
        from relops.models.parts.masks import paste_masks

        size = sample.image.shape[:2]
        masks = paste_masks(found.masks[0].float().cpu()[keep], torch.from_numpy(boxes), size).numpy()
    return Objects(boxes, labels.astype(np.int64), scores, masks)


def draw(detector: Detector, sample: Sample, found: Objects, path: Path) -> None:
    # Names have one size of letters: small images are enlarged.
    factor = max(1, DRAWN // max(sample.image.shape[:2]))
    image, masks = sample.image.repeat(factor, 0).repeat(factor, 1), found.masks
    if masks is not None:
        masks = masks.repeat(factor, 1).repeat(factor, 2)
    drawn = draw_detections(image, factor * found.boxes, found.labels, found.scores, detector.classes, masks)
    with written(path) as file:
        drawn.save(file, "png")


def draw_examples(detector: Detector, data: DetectionData, folder: Path, count: int) -> None:
    """Of the first images."""
    folder.mkdir(parents=True, exist_ok=True)
    detector.model.eval()
    for index in range(min(count, len(data))):
        draw(detector, data[index], detect(detector, data[index], 0.5), folder / f"{index}.png")


def image_sample(image: np.ndarray, file: str) -> Sample:
    """Of an image that nothing is known about."""
    none = np.zeros((0, 4), np.float32)
    return Sample(
        image, none, np.zeros(0, np.int64), np.zeros(0, bool), None, None, 0, file, image.shape[:2]
    )  # fmt: skip


@torch.no_grad()
def propose(
    detector: Detector, data: DetectionData, count: int, batch_size: int, workers: int
) -> dict[int, np.ndarray]:
    """Up to count proposals of each image, in its pixels, best first, by the image's id."""
    device = next(detector.model.parameters()).device
    batches = _batches(range(len(data)), batch_size)
    proposals = {}
    for batch in loader(Transformed(data, detector.min_size, detector.max_size), batches, workers, device):
        found = detector.model.propose(batch.images.to(device), batch.sizes.to(device), most=count)
        boxes = found[0].float().cpu() / batch.scales.flip(1).repeat(1, 2)[:, None]
        for image_id, of_image in zip(batch.image_ids.tolist(), boxes):
            padding = (of_image == 0).all(1)
            proposals[image_id] = of_image[~padding].numpy()
    return proposals


def _batches(indices: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
    return [[(0, index) for index in indices[i : i + size]] for i in range(0, len(indices), size)]
