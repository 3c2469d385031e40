"""The base class of all detectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relops.models.backbones.base import Backbone
from relops.models.structures import Targets


class BaseDetector(nn.Module):
    """The interface that training and detection rely on.

    In training mode `detector(images, sizes, targets)` gives losses, to be added; in evaluation mode
    `detector(images, sizes)` gives Detections. Nothing in it waits for a CUDA device, but where a detector says so.

    Inputs:
        images: [N,3,H,W], normalized as the backbone wants them, padded to the right and below.
        sizes: [N,2] height and width of each image without its padding, in pixels; None: there is none.
        targets: Targets; needed for training only. Boxes without an extent, or not finite, are as if absent.
    """

    phases: tuple[tuple[str, float], ...] = (("", 1.0),)  # of training, with their shares of the iterations
    uses_proposals = False  # of Targets
    uses_masks = False
    slower: tuple[str, ...] = ()  # names of modules that AdamW lets learn at a tenth of the rate

    backbone: Backbone

    def start_phase(self, phase: int) -> None:
        """Prepare the training of a phase. A detector with a single phase has nothing to prepare."""

    def checked_sizes(self, images: Tensor, sizes: Tensor | None) -> Tensor:
        """Return `sizes`, or the sizes of the images if it is None. Raise ValueError for shapes that do not fit."""
        name = f"relops.models.{type(self).__name__}"
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"{name}: images must be [N,3,H,W], got {list(images.shape)}")
        N = images.shape[0]  # len() would make it a constant in torch.export
        if sizes is None:
            height, width = (torch.full((N,), n, device=images.device) for n in images.shape[-2:])
            sizes = torch.stack([height, width], 1).float()
        if sizes.shape != (N, 2):
            raise ValueError(f"{name}: sizes must be [N,2] with N = {N}, got {list(sizes.shape)}")
        return sizes

    def checked_targets(self, images: Tensor, targets: Targets | None) -> Targets:
        """Return the targets, with boxes without an extent marked as padding. Raise ValueError for shapes that do not
        fit."""
        name, N = f"relops.models.{type(self).__name__}", images.shape[0]
        if targets is None:
            raise ValueError(f"{name}: targets must be given in training, got None (eval() is for inference)")
        T = targets.labels.shape[-1]
        if targets.labels.shape != (N, T) or targets.boxes.shape != (N, T, 4) or T == 0:
            raise ValueError(
                f"{name}: targets must have boxes [N,T,4] and labels [N,T] with N = {N} and T > 0, got "
                f"{list(targets.boxes.shape)} and {list(targets.labels.shape)}"
            )
        real = (targets.boxes[..., 2:] > targets.boxes[..., :2]).all(-1) & targets.boxes.isfinite().all(-1)
        return targets._replace(labels=targets.labels.masked_fill(~real, -1))
