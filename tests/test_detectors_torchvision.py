"""Tests that the detectors of relops give the same detections and losses as torchvision if they have its weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import relops
from relops.models import Targets

torchvision = pytest.importorskip("torchvision")
detection = torchvision.models.detection


def randomize_heads(model: torch.nn.Module) -> torch.nn.Module:
    """Randomize the heads, so that the model makes many detections of several classes. All scores of a new model are
    equal."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cls_score" in name or "cls_logits" in name:
                parameter.normal_(0, 0.3)
            elif "bbox_pred" in name:
                parameter.normal_(0, 0.02)
            elif name.endswith("bn3.weight"):
                parameter.fill_(0.3)  # keeps the sums of the residual blocks small
    return model.eval()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    torch.manual_seed(0)
    coarse = [torch.rand(1, 3, 12, 16), torch.rand(1, 3, 16, 12)]
    return [torch.nn.functional.interpolate(x, scale_factor=16, mode="bicubic")[0].clamp(0, 1) for x in coarse]


PAIRS = {
    "faster_rcnn": (detection.fasterrcnn_resnet50_fpn, relops.models.faster_rcnn_fpn),
    "mask_rcnn": (detection.maskrcnn_resnet50_fpn, relops.models.mask_rcnn),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs, ours = PAIRS[request.param]
    torch.manual_seed(3)
    options = {"rpn_post_nms_top_n_train": 60, "rpn_post_nms_top_n_test": 60, "min_size": 160, "max_size": 256}
    theirs = randomize_heads(theirs(weights=None, weights_backbone=None, num_classes=8, **options))
    ours = ours(7)
    ours.rpn.post_nms = (60, 60)
    relops.models.load_torchvision(ours, theirs.state_dict())
    return theirs, ours.eval()


def test_same_detections(pair: tuple[torch.nn.Module, torch.nn.Module], images: list[Tensor]) -> None:
    theirs, ours = pair
    their_masks = []  # recorded before torchvision rounds the boxes to whole pixels and pastes the masks into the image
    hook = theirs.roi_heads.register_forward_hook(
        lambda _module, _inputs, output: their_masks.extend(x.get("masks") for x in output[0])
    )
    with torch.no_grad():
        expected = theirs(images)
        hook.remove()
        batch, sizes, _ = relops.models.batch_images(images, 160, 256)
        masks = ours(batch, sizes).masks
    actual = relops.models.detect(ours, images, 160, 256)
    for i, (a, e) in enumerate(zip(actual, expected)):
        assert len(e["labels"]) > 20 and len(e["labels"].unique()) > 2
        assert len(a["labels"]) == len(e["labels"])
        # Pair each detection of torchvision with one of relops, because the order of equal scores may differ.
        distance = (a["boxes"][None] - e["boxes"][:, None]).abs().amax(2)
        distance, index = (distance + 100 * (a["labels"] != (e["labels"] - 1)[:, None])).min(1)
        assert distance.max() < 0.02 and len(index.unique()) == len(index)
        a = {name: value[index] for name, value in a.items()}
        torch.testing.assert_close(a["scores"], e["scores"], rtol=1e-3, atol=1e-5)
        if masks is not None:
            torch.testing.assert_close(masks[i][index], their_masks[i][:, 0], rtol=0, atol=1e-3)


def test_old_parameter_names_load(pair: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    """Checkpoints from before torchvision 0.14, such as fasterrcnn_resnet50_fpn_coco-258fb6c6.pth, use old names."""
    theirs, ours = pair
    old = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("rpn.head.conv.0.0", "rpn.head.conv")
        for i in range(4):
            for block in ("inner_blocks", "layer_blocks"):
                name = name.replace(f"{block}.{i}.0.", f"{block}.{i}.")
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        old[name] = value
    assert set(old) != set(theirs.state_dict())
    relops.models.load_torchvision(ours, old, norm_eps=0.0)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert ours.backbone.body.bn1.eps == 0
    relops.models.load_torchvision(ours, old, norm_eps=1e-5)


def test_same_losses(pair: tuple[torch.nn.Module, torch.nn.Module], images: list[Tensor]) -> None:
    """Sample all candidates, so that the losses do not depend on random numbers."""
    theirs, ours = pair
    boxes = torch.tensor([[[20.0, 30, 90, 120], [100, 40, 180, 170]], [[10, 10, 100, 150], [60, 100, 140, 230]]])
    labels = torch.tensor([[1, 4], [0, 6]])
    masks = torch.zeros(2, 2, 256, 256, dtype=torch.bool)
    targets = []
    for n, image in enumerate(images):
        for t, (x1, y1, x2, y2) in enumerate(boxes[n].int().tolist()):
            masks[n, t, y1:y2, x1:x2] = True
        image_masks = masks[n, :, : image.shape[1], : image.shape[2]]
        targets.append({"boxes": boxes[n], "labels": labels[n] + 1, "masks": image_masks.to(torch.uint8)})
    sampler = theirs.rpn.fg_bg_sampler
    before = sampler.batch_size_per_image, theirs.roi_heads.fg_bg_sampler.batch_size_per_image
    theirs.transform.min_size, theirs.transform.max_size = (192,), 256  # keeps the sizes of both images
    sampler.batch_size_per_image = theirs.roi_heads.fg_bg_sampler.batch_size_per_image = 100000
    ours.rpn.num_samples = ours.roi_heads.num_samples = 100000
    try:
        torch.manual_seed(0)
        theirs.train().backbone.eval()  # torchvision uses nn.BatchNorm2d if no weights are given
        expected = theirs(images, targets)
        batch, sizes, scales = relops.models.batch_images(images, 192, 256)
        assert (scales == 1).all()
        actual = ours.train()(batch, sizes, Targets(boxes, labels, masks))
    finally:
        sampler.batch_size_per_image, theirs.roi_heads.fg_bg_sampler.batch_size_per_image = before
        theirs.transform.min_size, theirs.transform.max_size = (160,), 256
        ours.rpn.num_samples, ours.roi_heads.num_samples = before
        theirs.eval(), ours.eval()
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_boxes": "loss_rpn_box_reg",
        "classes": "loss_classifier",
        "boxes": "loss_box_reg",
        "masks": "loss_mask",
    }
    for name, value in actual.items():
        assert value.item() == pytest.approx(expected[names[name]].item(), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "vgg16"])
def test_backbone(name: str) -> None:
    """torchvision's state_dict loads without changes, and the classifier gives the same output as torchvision's."""
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    ours = getattr(relops.models, name)().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_frozen_backbone() -> None:
    theirs = torchvision.models.resnet18(weights=None)
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    ours = relops.models.resnet18(norm="frozen")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x))
