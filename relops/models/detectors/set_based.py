"""The base class of detectors that predict a set of objects."""

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
    """A detector that predicts a set of objects. Subclasses provide `predict` and a `backbone`.

    Args:
        loss: The function that matches predictions to objects and computes the losses. Its attributes `focal` and
            `corners` also define the format of scores and boxes.
        max_detections: The maximum number of detections per image.
    """

    def __init__(self, loss: SetLoss, max_detections: int = 100) -> None:
        super().__init__()
        self.set_loss = loss
        self.max_detections = max_detections

    def predict(self, images: Tensor, sizes: Tensor) -> SetPrediction:
        """Return the predictions of the decoder layers.

        Args:
            images: [N,3,H,W], normalized as the backbone requires and padded on the right and at the bottom.
            sizes: [N,2], the height and width of each image in pixels, without its padding.
        """
        raise NotImplementedError

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor] | Detections:
        """Return the losses in training mode and the detections in evaluation mode.

        Args:
            images: [N,3,H,W], normalized as the backbone requires and padded on the right and at the bottom.
            sizes: [N,2], the height and width of each image in pixels, without its padding, or None if there is no
                padding.
            targets: The ground truth, which is required in training mode and ignored in evaluation mode.

        Returns:
            In training mode, a dict of scalar losses, whose sum is the training loss. In evaluation mode, `Detections`.

        Raises:
            ValueError: If `images`, `sizes` or `targets` has an invalid shape, or if `targets` is missing in training
                mode.
        """
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
            labels = targets.labels.clamp(max=0)  # the first stage does not distinguish classes
            first_losses = self.set_loss(prediction.first.logits, prediction.first.boxes, labels, objects)
            losses["encoder"] = functools.reduce(torch.add, first_losses.values())
        return losses

    def detections(self, logits: Tensor, boxes: Tensor, sizes: Tensor) -> Detections:
        """Return the detections with the highest scores.

        With the focal loss, all classes of all predictions compete. Without the focal loss, only the best class of each
        prediction competes.

        Args:
            logits: [N,Q,C].
            boxes: [N,Q,4], as fractions of the image without its padding.
            sizes: [N,2], the height and width of each image in pixels, without its padding.
        """
        logits, boxes = to_compute_dtype(logits), to_compute_dtype(boxes)
        if self.set_loss.focal:
            C = logits.shape[-1]
            scores, index = logits.sigmoid().flatten(1).topk(min(self.max_detections, logits[0].numel()), 1)
            index, labels = index // C, index % C
        else:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, index = scores.topk(min(self.max_detections, logits.shape[1]), 1)
            labels = labels.gather(1, index)
        boxes = self.set_loss.as_corners(gather_rows(boxes, index)) * image_extent(sizes)
        return Detections(clip_boxes(boxes, sizes), scores, labels)
