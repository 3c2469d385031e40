"""The base class of all detectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relops.models.backbones.base import Backbone
from relops.models.structures import Targets


class BaseDetector(nn.Module):
    """The interface that all detectors share and that the training and inference code uses.

    In training mode, `detector(images, sizes, targets)` returns a dict of scalar losses, whose sum is the training
    loss. In evaluation mode, `detector(images, sizes)` returns `Detections`. Neither mode waits for a CUDA device,
    unless the documentation of the detector says otherwise. The arguments are:

    - `images`: [N,3,H,W], normalized as the backbone requires and padded on the right and at the bottom.
    - `sizes`: [N,2], the height and width of each image in pixels, without its padding. None if there is no padding.
    - `targets`: The ground truth, a `Targets`. Boxes that are not finite, or whose width or height is not positive, are
      ignored.
    """

    phases: tuple[tuple[str, float], ...] = (("", 1.0),)  # training phases: name and fraction of the iterations
    uses_proposals = False  # whether the detector needs Targets.proposals
    uses_masks = False  # whether the detector uses Targets.masks
    slower: tuple[str, ...] = ()  # names of modules whose learning rate is multiplied by 0.1 with AdamW

    backbone: Backbone

    def start_phase(self, phase: int) -> None:
        """Prepare the detector for a training phase. A detector with a single training phase has nothing to prepare.

        Args:
            phase: The index of the phase in `phases`.
        """

    def checked_sizes(self, images: Tensor, sizes: Tensor | None) -> Tensor:
        """Return `sizes`, or the height and width of the padded images if `sizes` is None.

        Raises:
            ValueError: If `images` or `sizes` has an invalid shape.
        """
        name = f"relops.models.{type(self).__name__}"
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"{name}: images must be [N,3,H,W], got {list(images.shape)}")
        N = images.shape[0]  # torch.export would turn len(images) into a constant
        if sizes is None:
            height, width = (torch.full((N,), n, device=images.device) for n in images.shape[-2:])
            sizes = torch.stack([height, width], 1).float()
        if sizes.shape != (N, 2):
            raise ValueError(f"{name}: sizes must be [N,2] with N = {N}, got {list(sizes.shape)}")
        return sizes

    def checked_targets(self, images: Tensor, targets: Targets | None) -> Targets:
        """Return the targets, with the label -1 for boxes that are not finite or lack a positive width and height.

        Raises:
            ValueError: If `targets` is None or has an invalid shape.
        """
        name, N = f"relops.models.{type(self).__name__}", images.shape[0]
        if targets is None:
            raise ValueError(f"{name}: targets must be given in training mode, got None (call eval() for inference)")
        T = targets.labels.shape[-1]
        if targets.labels.shape != (N, T) or targets.boxes.shape != (N, T, 4) or T == 0:
            raise ValueError(
                f"{name}: targets must have boxes [N,T,4] and labels [N,T] with N = {N} and T > 0, got "
                f"{list(targets.boxes.shape)} and {list(targets.labels.shape)}"
            )
        has_extent = (targets.boxes[..., 2:] > targets.boxes[..., :2]).all(-1) & targets.boxes.isfinite().all(-1)
        return targets._replace(labels=targets.labels.masked_fill(~has_extent, -1))
