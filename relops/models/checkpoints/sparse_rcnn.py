"""Loading of weights of Sparse R-CNN that the released code trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from relops.models.checkpoints.renaming import Rules, renamed
from relops.models.detectors.sparse_rcnn import SparseRCNN

RENAMES: Rules = (
    (r"^backbone\.bottom_up\.stem\.", lambda m: "backbone.body."),
    (r"^backbone\.bottom_up\.res(\d)\.", lambda m: f"backbone.body.layer{int(m[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", lambda m: f".bn{m[1]}."),
    (r"\.shortcut\.norm\.", lambda m: ".downsample.1."),
    (r"\.shortcut\.", lambda m: ".downsample.0."),
    (r"^backbone\.fpn_lateral(\d)\.", lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 2}.0."),
    (r"^backbone\.fpn_output(\d)\.", lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 2}.0."),
)  # of detectron2's pyramids


def load_sparse_rcnn(model: SparseRCNN, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state_dict of the released code, whose backbone has detectron2's names; all others are ours.

    Images are to be as `batch_images` makes them: RGB, by the mean and standard deviation that the released code has.

    Args:
        model: `sparse_rcnn` of as many classes, proposals and stages, on resnet50-frozen or resnet101-frozen.
        state_dict: what the released files hold.

    Raises:
        RuntimeError: a parameter that is missing, or left over, or of another shape.

    Example:
        >>> model = relops.models.sparse_rcnn(80)
        >>> relops.models.load_sparse_rcnn(model, torch.load("r50_100pro_3x_model.pth"))
    """
    model.load_state_dict(renamed(state_dict, RENAMES))
