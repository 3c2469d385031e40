"""The base class of detectors that predict a set."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from relops._dtypes import to_compute_dtype
from relops.models.detectors.base import BaseDetector
from relops.models.parts.boxes import centers_of, clip_boxes, image_extent
from relops.models.parts.padding import gather_rows
from relops.models.parts.set_prediction import SetLoss, SetPrediction
from relops.models.structures import Detections, Targets


class SetDetector(BaseDetector):
    """A detector that predicts a set: subclasses have `predict` and a `backbone`.

    Args:
        loss: how it is trained; its `focal` and `corners` also say what its scores and boxes are.
        most: the largest number of detections per image.
    """

    def __init__(self, loss: SetLoss, most: int = 100) -> None:
        super().__init__()
        self.set_loss = loss
        self.most = most

    def predict(self, images: Tensor, sizes: Tensor) -> SetPrediction:
        """Return the predictions for images [N,3,H,W], whose sizes [N,2] exclude the padding."""
        raise NotImplementedError

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor] | Detections:
        sizes = self.checked_sizes(images, sizes)
        if not self.training:
            prediction = self.predict(images, sizes)
            return self.detections(prediction.logits[-1], prediction.boxes[-1], sizes)
        targets = self.checked_targets(images, targets)
        prediction = self.predict(images, sizes)
        objects = targets.boxes / image_extent(sizes)
        objects = objects if self.set_loss.corners else centers_of(objects)
        losses = self.set_loss(prediction.logits, prediction.boxes, targets.labels, objects)
        if prediction.first is not None:
            as_one = targets.labels.clamp(max=0)
            of_first = self.set_loss(prediction.first.logits, prediction.first.boxes, as_one, objects)
            losses["encoder"] = functools.reduce(torch.add, of_first.values())
        return losses

    def detections(self, logits: Tensor, boxes: Tensor, sizes: Tensor) -> Detections:
        """Return the best detections of logits [N,Q,C] and boxes [N,Q,4]: of all classes of all predictions with focal
        loss, and otherwise of each prediction's best class."""
        logits, boxes = to_compute_dtype(logits), to_compute_dtype(boxes)
        if self.set_loss.focal:
            C = logits.shape[-1]
            scores, index = logits.sigmoid().flatten(1).topk(min(self.most, logits[0].numel()), 1)
            index, labels = index // C, index % C
        else:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, index = scores.topk(min(self.most, logits.shape[1]), 1)
            labels = labels.gather(1, index)
        boxes = self.set_loss.as_corners(gather_rows(boxes, index)) * image_extent(sizes)
        return Detections(clip_boxes(boxes, sizes), scores, labels)
