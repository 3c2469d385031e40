"""Average precision of detections, as COCO and Pascal VOC define it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from relops.models import Detections
from relops.models.detectors.base import BaseDetector
from relops.models.parts.masks import paste_masks
from relops.training._optional import require
from relops.training.data import Annotation, Batch, DetectionData, Transformed
from relops.training.data.batches import load_batches
from relops.training.data.masks import checked_mask
from relops.training.data.sampler import batches_in_order
from relops.training.distributed import World
from relops.training.prediction import predict

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100")


def evaluate(
    model: BaseDetector,
    data: DetectionData,
    batch_size: int,
    min_size: int,
    max_size: int,
    world: World,
    workers: int = 0,
    amp: bool = False,
    channels_last: bool = False,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluator:
    """Detect the objects in all images, and collect the detections in every process.

    Each process detects the objects in a part of the images.

    Args:
        model: the detector, which must be on the device of this process. It is put into evaluation mode.
        data: the images and their annotations.
        batch_size: the number of images per batch in each process.
        min_size, max_size: limits of the image size in pixels, see `relops.training.data.prepare`.
        world: the processes.
        workers: the number of processes that load images for each process that runs the detector.
        amp: autocast to bfloat16.
        channels_last: convert the images to the channels_last memory format.
        before_batch: a function that is called before every batch, the same number of times in all processes. If it
            raises an exception, the evaluation ends.

    Returns:
        An evaluator with the detections of all processes.
    """
    model.eval()
    evaluator = Evaluator(data)
    indices = batches_in_order(range(world.rank, len(data), world.size), batch_size)
    batches = iter(load_batches(Transformed(data, min_size, max_size), indices, workers, world.device))
    for _ in range(0, len(range(0, len(data), world.size)), batch_size):  # rank 0 has the largest number of images
        before_batch()
        batch = next(batches, None)
        if batch is not None:
            with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
                detections = predict(model, batch.to(world.device, channels_last=channels_last))
            evaluator.add(batch, detections)
    evaluator.merge(world.gather(evaluator.state()))
    return evaluator


class _Found(NamedTuple):
    """The K detections of an image, in pixels of the original image."""

    boxes: np.ndarray  # [K,4] float32
    scores: np.ndarray  # [K] float32
    labels: np.ndarray  # [K] int64
    masks: list[dict[str, Any]] | None  # compressed RLE


class Evaluator:
    """A class that collects detections and compares them with the annotated objects.

    Images may be added in any order. If an image is added again, its new detections replace the old ones. If an image
    is not added, all of its objects count as missed.

    Args:
        data: the images and their annotations.

    Example::

        evaluator = Evaluator(data)
        for batch in loader:
            evaluator.add(batch, model(batch.images, batch.sizes))
        evaluator.summarize()["AP"]
    """

    def __init__(self, data: DetectionData) -> None:
        self._classes, self._category_ids = data.classes, data.category_ids
        self._annotations = {annotation.image_id: _finite(annotation) for annotation in data.annotations()}
        self._found: dict[int, _Found] = {}

    def add(self, batch: Batch, detections: Detections) -> None:
        """Add the detections of a batch, with coordinates in pixels of the resized images in the batch."""
        scales = batch.scales.cpu().flip(1).repeat(1, 2)[:, None]
        boxes = (detections.boxes.detach().float().cpu() / scales).numpy()
        scores, labels = (x.detach().cpu().numpy() for x in (detections.scores.float(), detections.labels))
        for n, image_id in enumerate(batch.image_ids.tolist()):
            if image_id not in self._annotations:
                raise ValueError(f"batch.image_ids must be ids of images of the evaluator's data, got {image_id}")
            kept, masks = labels[n] >= 0, None
            if detections.masks is not None:
                masks = self._encoded(detections.masks[n].detach().float().cpu(), boxes[n], kept, image_id)
            self._found[image_id] = _Found(boxes[n][kept], scores[n][kept], labels[n][kept], masks)

    def _encoded(self, masks: torch.Tensor, boxes: np.ndarray, kept: np.ndarray, image_id: int) -> list[dict[str, Any]]:
        coco, a = require("faster_coco_eval.core.mask", "faster-coco-eval"), self._annotations[image_id]
        pasted = paste_masks(masks[kept], torch.from_numpy(boxes[kept]), (a.height, a.width)).numpy()
        return [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in pasted]

    def state(self) -> list[tuple[int, _Found]]:
        """Return the added detections in a form that can be pickled and passed to `merge` in another process."""
        return list(self._found.items())

    def merge(self, others: list[list[tuple[int, _Found]]]) -> None:
        """Add the detections that other evaluators of the same data returned from their method `state`."""
        for state in others:
            self._found.update(state)

    def summarize(self) -> dict[str, float]:
        """Compute COCO's metrics with faster-coco-eval.

        The boxes of the objects are used exactly as in the annotation file, so they may extend outside the image or be
        empty. Ignored objects are treated like COCO's crowds: a detection that lies mostly inside such an object counts
        as neither correct nor wrong.

        Returns:
            A dict with AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100 and AP/<class>. Each value is
            in [0,1], or NaN if there are no objects of this size or class. If both the data and the detections have
            masks, the dict also has mask_AP, mask_AP50 and so on. In the mask metrics, detections inside the box of an
            object that has no mask count as neither correct nor wrong.
        """
        metrics = self._coco("bbox")
        with_masks = any(annotation.masks is not None for annotation in self._annotations.values())
        if with_masks and any(found.masks is not None for found in self._found.values()):
            metrics |= {f"mask_{name}": value for name, value in self._coco("segm").items()}
        return metrics

    def _coco(self, kind: str) -> dict[str, float]:
        api = require("faster_coco_eval", "faster-coco-eval")
        # Images and categories are numbered from 1, because faster-coco-eval converts ids to float64. The ids in the
        # data may be strings or integers that are too large for float64.
        numbers = {image_id: 1 + i for i, image_id in enumerate(sorted(self._annotations))}
        truth = api.COCO(self._coco_truth(numbers, masks=kind == "segm"))
        results = self._results(numbers, range(1, 1 + len(self._classes)))
        for result in results:
            result.pop("bbox" if kind == "segm" else "segmentation", None)
        evaluation = api.COCOeval_faster(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        values = dict(zip(METRICS, evaluation.stats))
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [thresholds,recalls,classes] for all areas
        for k, category in enumerate(evaluation.params.catIds):
            values[f"AP/{self._classes[category - 1]}"] = precision[:, :, k].mean()
        return {name: float(value) if value >= 0 else math.nan for name, value in values.items()}

    def _coco_truth(self, numbers: Mapping[int, int], masks: bool) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for a in self._annotations.values():
            images.append({"id": numbers[a.image_id], "height": a.height, "width": a.width})
            for i, (label, ignore) in enumerate(zip(a.labels, a.ignore)):
                item = {
                    "id": len(objects) + 1,  # starts at 1, because 0 means that a detection has no match
                    "image_id": numbers[a.image_id],
                    "category_id": 1 + int(label),
                    "bbox": _corner_and_size(a.boxes[i]),
                    "area": float(a.areas[i]),
                    "iscrowd": int(ignore),
                }
                objects.append(item | _segmentation(a, i) if masks else item)
        return {
            "images": images,
            "annotations": objects,
            "categories": [{"id": 1 + label, "name": name} for label, name in enumerate(self._classes)],
        }

    def coco_results(self) -> list[dict[str, Any]]:
        """Return the detections in COCO's results format, with the image and category ids of the annotation file."""
        return self._results({id: a.own_id for id, a in self._annotations.items()}, self._category_ids)

    def _results(self, image_ids: Mapping[int, int | str], category_ids: Sequence[int | str]) -> list[dict[str, Any]]:
        results = []
        for image_id, found in self._found.items():
            for i, (label, score) in enumerate(zip(found.labels, found.scores)):
                result = {
                    "image_id": image_ids[image_id],
                    "category_id": category_ids[label],
                    "bbox": _corner_and_size(found.boxes[i]),
                    "score": float(score),
                }
                if found.masks is not None:
                    counts = found.masks[i]["counts"]
                    result["segmentation"] = found.masks[i] | {"counts": counts.decode()}
                results.append(result)
        return results

    def voc(self, iou_threshold: float = 0.5, metric: str = "area") -> dict[str, float]:
        """Compute VOC's average precision of each class and its mean over the classes.

        The detections of a class are processed in order of descending score. Each detection is compared with the object
        of its class that has the highest IoU. If this IoU is less than `iou_threshold`, the detection is wrong.
        Otherwise, if the object is marked as difficult, the detection counts as neither correct nor wrong. If the
        object is not difficult, its first detection is correct and all later detections are wrong.

        Args:
            iou_threshold: the minimum IoU of a correct detection.
            metric: "area", the area under the monotonic precision-recall curve (VOC 2010 and later), or "11point", the
                mean precision at the recalls 0, 0.1, ..., 1 (before VOC 2010).

        Returns:
            A dict with AP/<class>, which is NaN for classes without objects, and mAP, the mean over all other classes.

        Raises:
            ValueError: If `metric` is neither "area" nor "11point".
        """
        if metric not in ("area", "11point"):
            raise ValueError(f"metric must be 'area' or '11point', got {metric!r}")
        values = {
            f"AP/{name}": self._voc_of_class(label, iou_threshold, metric) for label, name in enumerate(self._classes)
        }
        valid = [value for value in values.values() if not math.isnan(value)]
        return {"mAP": sum(valid) / len(valid) if valid else math.nan, **values}

    def _voc_of_class(self, label: int, iou_threshold: float, metric: str) -> float:
        count = sum(int(((a.labels == label) & ~a.ignore).sum()) for a in self._annotations.values())
        if count == 0:
            return math.nan
        scores, correct = [], []
        for image_id, found in self._found.items():
            of_class = found.labels == label
            order = np.argsort(-found.scores[of_class], kind="stable")
            boxes = found.boxes[of_class][order]
            verdicts = _verdicts(boxes, self._annotations[image_id], label, iou_threshold)
            scores.append(found.scores[of_class][order][verdicts >= 0])
            correct.append(verdicts[verdicts >= 0])
        if not scores:
            return 0.0
        order = np.argsort(-np.concatenate(scores), kind="stable")
        hits = np.concatenate(correct)[order].cumsum()
        recall, precision = hits / count, hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        if metric == "area":
            return float((np.diff(recall, prepend=0) * precision).sum())
        reached = np.searchsorted(recall, np.arange(11) / 10)
        return float(np.append(precision, 0)[reached].mean())


def _finite(annotation: Annotation) -> Annotation:
    """Replace boxes that are not finite with empty boxes, which no detection can match."""
    finite = np.isfinite(annotation.boxes).all(1)
    areas = np.where(np.isfinite(annotation.areas), annotation.areas, 0)
    return dataclasses.replace(annotation, boxes=np.where(finite[:, None], annotation.boxes, 0), areas=areas)


def _verdicts(boxes: np.ndarray, annotation: Annotation, label: int, iou_threshold: float) -> np.ndarray:
    """Return [K] int for boxes sorted by descending score: 1 if a box is correct, 0 if it is wrong, -1 if neither."""
    of_class = annotation.labels == label
    objects, ignore = annotation.boxes[of_class], annotation.ignore[of_class]
    verdicts = np.zeros(len(boxes), int)
    if len(objects) == 0:
        return verdicts
    iou, matched = _iou(boxes, objects), np.zeros(len(objects), bool)
    for k, nearest in enumerate(iou.argmax(1)):
        if iou[k, nearest] < iou_threshold:
            continue
        verdicts[k] = -1 if ignore[nearest] else not matched[nearest]
        matched[nearest] = True
    return verdicts


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU [A,B] of boxes [A,4] and [B,4]."""
    a, b = a[:, None].astype(np.float64), b[None].astype(np.float64)
    overlap = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).clip(0).prod(-1) for x in (a, b))
    union = area_a + area_b - overlap
    return np.where(overlap > 0, overlap / np.where(union > 0, union, 1), 0)


def _segmentation(a: Annotation, i: int) -> dict[str, Any]:
    """Return the dict entries that describe the mask of object `i` in COCO's format.

    An object that has no mask becomes a crowd that fills its box, so that detections inside the box are ignored.
    """
    if a.masks is not None and a.masks[i] is not None:
        empty_mask = {"size": [a.height, a.width], "counts": [a.height * a.width]}
        return {"segmentation": checked_mask(a.masks[i], a.height, a.width, a.file) or empty_mask}
    x1, y1, x2, y2 = a.boxes[i].clip(0, [a.width, a.height] * 2).tolist()
    return {"segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]], "iscrowd": 1}


def _corner_and_size(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]
