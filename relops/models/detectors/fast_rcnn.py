"""Fast R-CNN (Girshick, https://arxiv.org/abs/1504.08083), which classifies and refines given proposals."""

from __future__ import annotations

from torch import Tensor, nn

from relops._dtypes import compute_dtype
from relops.models.backbones.base import Backbone
from relops.models.detectors.faster_rcnn import single_map
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, TwoFCHead
from relops.models.parts.rpn import Proposals
from relops.models.structures import Detections, Targets


class FastRCNN(TwoStageDetector):
    """A detector that consists of only the second stage.

    The proposals are passed as `Targets.proposals`, in training and in evaluation mode. In evaluation mode, all other
    fields of the targets are ignored.
    """

    uses_proposals = True

    def __init__(self, backbone: Backbone, roi_heads: RoIHeads) -> None:
        super().__init__(backbone, nn.Identity(), roi_heads)

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor] | Detections:
        """Return the losses in training mode and the detections in evaluation mode.

        Args:
            images: [N,3,H,W], normalized as the backbone requires and padded on the right and at the bottom.
            sizes: [N,2], the height and width of each image in pixels, without its padding, or None if there is no
                padding.
            targets: The ground truth with `proposals`. In evaluation mode, only `proposals` is used.

        Returns:
            In training mode, a dict of scalar losses, whose sum is the training loss. In evaluation mode, `Detections`.

        Raises:
            ValueError: If `images`, `sizes` or `targets` has an invalid shape, or if `targets` or its `proposals` is
                missing.
        """
        sizes = self.checked_sizes(images, sizes)
        if self.training:
            targets = self.checked_targets(images, targets)
        if targets is None or targets.proposals is None:
            raise ValueError("relops.models.FastRCNN: targets.proposals must be given in both modes, got None")
        boxes = targets.proposals.to(compute_dtype(images.dtype))
        valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        proposals = Proposals(boxes, valid.float(), valid)
        maps = self.backbone(images)
        if self.training:
            return self.roi_heads.losses(maps, proposals, sizes, targets)
        return self.roi_heads.detect(maps, proposals, sizes)

    def propose(self, images: Tensor, sizes: Tensor | None = None, max_proposals: int | None = None) -> Proposals:
        """Raise TypeError, because this detector has no region proposal network."""
        raise TypeError("relops.models.FastRCNN: propose is not available, because proposals are an input")


def fast_rcnn(
    num_classes: int,
    *,
    backbone: str = "vgg16",
    hidden: int = 4096,
    roi: str = "pool",
    dropout: float = 0.5,
    num_samples: int = 64,
    frozen_stages: int = 0,
    stride: int = 16,
) -> FastRCNN:
    """Build Fast R-CNN: a head with RoI pooling that classifies and refines given proposals.

    The detector (Girshick, https://arxiv.org/abs/1504.08083) pools regions from one feature map with a stride of 16.
    The pooled features pass through two fully connected layers, from which the scores and deltas of each class are
    predicted. At most a quarter of the regions that are sampled for the losses have an IoU of at least 0.5 with an
    object, and all other sampled regions have an IoU between 0.1 and 0.5 (section 2.3).

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26", "lr_net50", "vgg16"
            or "zf". All except LR-Nets accept a suffix that selects the normalization: "-bn" (batch normalization),
            "-frozen" (batch normalization with constant statistics and weights) or "-gn" (group normalization). After
            the normalization, a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2"
            (modulated deformable convolutions in all stages except the first). For ResNets and LR-Nets, a number at the
            end of the name sets the width, that is, the number of channels of the stem (64 by default), as in
            "resnet18-gn-32" and "lr_net26-32".
        hidden: Width of the two fully connected layers of the box head.
        roi: Method that pools the features of a region: "pool" for RoI pooling, as published, or "align" for RoIAlign.
        dropout: Dropout probability after each of the two fully connected layers.
        num_samples: Number of regions per image that are sampled for the losses.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        stride: Stride of the feature map in pixels: 16, as published, or 8 for small images. "zf" supports only 16.

    Returns:
        A `FastRCNN`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses "classes"
        and "boxes". In evaluation mode, `detector(images, sizes, targets)` returns `Detections` with at most 100
        objects per image. Both modes require `targets.proposals` [N,P,4], padded with zeros. Evaluation mode ignores
        the other fields of `targets`. `images` is [N,3,H,W], `sizes` is [N,2] with the height and width of each image
        without padding (None if there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, or if group normalization does not support its width.
        ValueError: If `stride` is not 16 or 8, or if it is 8 and `backbone` is "zf".
        ValueError: If `roi` is unknown.
        ValueError: If `dropout` is not between 0 and 1.

    Example:
        >>> import torch, relops
        >>> model = relops.models.fast_rcnn(3, backbone="resnet18", hidden=64)
        >>> images = torch.rand(1, 3, 64, 64)
        >>> boxes, labels = torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]])
        >>> proposals = torch.tensor([[[6.0, 8.0, 40.0, 50.0], [30.0, 20.0, 60.0, 60.0]]])
        >>> targets = relops.models.Targets(boxes, labels, proposals=proposals)
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['boxes', 'classes']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images, None, targets)
        >>> detections.boxes.shape
        torch.Size([1, 100, 4])
    """
    maps, size = single_map(backbone, frozen_stages, stride)
    roi_heads = RoIHeads(
        RegionPool(roi, size, maps.strides),
        TwoFCHead(maps.channels[0] * size**2, hidden, dropout),
        BoxPredictor(hidden, num_classes),
        num_samples=num_samples,
        negative=(0.1, 0.5),
        beta=1.0,
        nms_threshold=0.3,
    )
    return FastRCNN(maps, roi_heads)
