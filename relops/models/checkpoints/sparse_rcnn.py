"""Loading of Sparse R-CNN weights that were trained with the released code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from relops.models.checkpoints.renaming import Rules, rename_parameters
from relops.models.detectors.sparse_rcnn import SparseRCNN

# These rules translate the parameter names of detectron2's feature pyramid.
BACKBONE_RULES: Rules = (
    (r"^backbone\.bottom_up\.stem\.", lambda m: "backbone.body."),
    (r"^backbone\.bottom_up\.res(\d)\.", lambda m: f"backbone.body.layer{int(m[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", lambda m: f".bn{m[1]}."),
    (r"\.shortcut\.norm\.", lambda m: ".downsample.1."),
    (r"\.shortcut\.", lambda m: ".downsample.0."),
    (r"^backbone\.fpn_lateral(\d)\.", lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 2}.0."),
    (r"^backbone\.fpn_output(\d)\.", lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 2}.0."),
)


def load_sparse_rcnn(model: SparseRCNN, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state_dict of Sparse R-CNN (https://arxiv.org/abs/2011.12450) from the released code.

    The backbone parameters of the released code have the names of detectron2, which are translated. All other parameter
    names are the same in relops. The images must be RGB and normalized as in `relops.models.batch_images`, which uses
    the mean and standard deviation of the released code. The released weights are loaded as follows::

        model = relops.models.sparse_rcnn(80)
        relops.models.load_sparse_rcnn(model, torch.load("r50_100pro_3x_model.pth"))

    Args:
        model: Detector built by `relops.models.sparse_rcnn` with the same number of classes, proposals and stages. The
            backbone must be "resnet50-frozen" or "resnet101-frozen".
        state_dict: Parameters of the released code. A state_dict of relops is also accepted.

    Raises:
        RuntimeError: If a parameter is missing, unexpected or of the wrong shape.

    Example:
        >>> import torch, relops
        >>> options = dict(backbone="resnet18-frozen-8", channels=16, hidden=32, proposals=10, stages=2)
        >>> model, trained = relops.models.sparse_rcnn(3, **options), relops.models.sparse_rcnn(3, **options)
        >>> relops.models.load_sparse_rcnn(model, trained.state_dict())
        >>> torch.equal(model.init_proposal_features.weight, trained.init_proposal_features.weight)
        True
    """
    model.load_state_dict(rename_parameters(state_dict, BACKBONE_RULES))
