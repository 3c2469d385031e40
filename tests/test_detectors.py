"""Tests of the detectors. Parts are compared with values computed by hand, and batches with single images."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

import relops
from relops.models import Detections, Targets
from relops.models.backbones.build import make_body
from relops.models.backbones.hyper import HyperBackbone
from relops.models.backbones.pyramid import FeaturePyramid
from relops.models.parts.anchors import Anchors, centered_anchors, paper_anchors
from relops.models.parts.box_coding import decode_boxes, encode_boxes
from relops.models.parts.masks import paste_masks
from relops.models.parts.roi_heads import RoIHeads
from relops.models.parts.rpn import RPN, Proposals, RPNHead
from relops.models.parts.sampling import sample_candidates

SMALL = {
    "fast_rcnn": {"hidden": 32, "roi": "align"},
    "faster_rcnn": {"channels": 32, "hidden": 32},
    "faster_rcnn_fpn": {"channels": 32, "hidden": 32, "sizes": (16, 32, 64, 128, 256)},
    "mask_rcnn": {"channels": 32, "hidden": 32, "sizes": (16, 32, 64, 128, 256)},
    "cascade_rcnn": {"channels": 32, "hidden": 32, "sizes": (16, 32, 64, 128, 256)},
    "r_fcn": {"channels": 32, "hidden": 32},
    "hypernet": {"hidden": 32, "sizes": (32, 64)},
    "relation_networks": {"channels": 32, "hidden": 32},
    "relation_networks_fpn": {"channels": 32, "hidden": 32, "sizes": (16, 32, 64, 128, 256)},
    "sparse_rcnn": {"channels": 32, "hidden": 32, "proposals": 12, "stages": 2, "iou_attention": True},
    "deformable_detr": {"channels": 32, "hidden": 32, "queries": 20, "encoder_layers": 1, "decoder_layers": 2},
    "detr": {"channels": 32, "hidden": 32, "queries": 20, "encoder_layers": 1, "decoder_layers": 2},
}
BACKBONE = "resnet18-gn-16"


def small(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return relops.models.build(name, 3, backbone=BACKBONE, **SMALL[name] | options)


def batch(device: str = "cpu") -> tuple[Tensor, Tensor, Targets]:
    """Return two images of different sizes, with 3 and 1 objects."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 96, 128)
    images[1, :, 80:] = images[1, :, :, 100:] = 0
    sizes = torch.tensor([[96.0, 128.0], [80.0, 100.0]])
    boxes = torch.tensor([[[8.0, 8, 60, 50], [70, 20, 120, 90], [5, 60, 45, 92]], [[20, 10, 90, 70], *[[0] * 4] * 2]])
    labels = torch.tensor([[0, 1, 2], [1, -1, -1]])
    masks = torch.zeros(2, 3, 96, 128, dtype=torch.bool)
    for n, t in ((0, 0), (0, 1), (0, 2), (1, 0)):
        x1, y1, x2, y2 = boxes[n, t].int().tolist()
        masks[n, t, y1:y2, x1:x2] = True
    proposals = torch.cat([boxes + torch.tensor([3.0, -2, 5, 4]), torch.rand(2, 20, 2).repeat(1, 1, 2) * 40], 1)
    proposals[:, 3:, 2:] += 30
    proposals[1, 1:3] = 0
    targets = Targets(boxes, labels, masks, proposals)
    return images.to(device), sizes.to(device), Targets(*(x.to(device) for x in targets))


# ---- Boxes ----


def test_paper_anchors() -> None:
    """The nine anchors equal those of the released code, in which the second corner is the last pixel of the box."""
    inclusive = torch.tensor(paper_anchors()) - torch.tensor([0.0, 0, 1, 1])
    assert inclusive.tolist() == [
        [-84, -40, 99, 55],
        [-176, -88, 191, 103],
        [-360, -184, 375, 199],
        [-56, -56, 71, 71],
        [-120, -120, 135, 135],
        [-248, -248, 263, 263],
        [-36, -80, 51, 95],
        [-80, -168, 95, 183],
        [-168, -344, 183, 359],
    ]


def test_anchors_are_centered_on_their_pixels() -> None:
    anchors = Anchors([centered_anchors(32), centered_anchors(64)], [4, 8])
    fine, coarse = anchors([(2, 3), (1, 2)])
    assert fine.shape == (18, 4) and coarse.shape == (6, 4)
    assert fine[3 * (1 * 3 + 2)].tolist() == [8 - 23, 4 - 11, 8 + 23, 4 + 11]  # row 1, column 2, ratio 1/2
    assert coarse[4].tolist() == [8 - 32, -32, 8 + 32, 32]


def test_box_coding_by_hand() -> None:
    anchor, box = torch.tensor([10.0, 10, 30, 50]), torch.tensor([15.0, 10, 55, 30])
    deltas = encode_boxes(box, anchor, (10, 5))
    expected = [10 * (35 - 20) / 20, 10 * (20 - 30) / 40, 5 * math.log(2), 5 * math.log(0.5)]
    torch.testing.assert_close(deltas, torch.tensor(expected))
    torch.testing.assert_close(decode_boxes(deltas, anchor, (10, 5)), box)


def test_decoded_sizes_are_bounded() -> None:
    box = decode_boxes(torch.tensor([0.0, 0, 100, 100]), torch.tensor([0.0, 0, 16, 16]), (1, 1))
    torch.testing.assert_close(box, torch.tensor([8.0 - 500, 8 - 500, 8 + 500, 8 + 500]))


def test_counts_and_order_of_samples(device: str) -> None:
    torch.manual_seed(0)
    positive = torch.zeros(3, 100, dtype=torch.bool, device=device)
    negative = torch.zeros_like(positive)
    positive[0, :40], negative[0, 40:] = True, True  # more positives than requested
    positive[1, :3], negative[1, 50:] = True, True  # too few positives: negatives replace them
    positive[2, :2], negative[2, 90:93] = True, True  # too few of both kinds
    index, is_positive, valid = sample_candidates(positive, negative, 16, 8)
    assert is_positive.sum(1).tolist() == [8, 3, 2] and valid.sum(1).tolist() == [16, 16, 5]
    assert positive.gather(1, index)[is_positive].all() and negative.gather(1, index)[valid & ~is_positive].all()
    for image_index, image_valid in zip(index, valid):
        assert len(image_index[image_valid].unique()) == image_valid.sum()
    assert not is_positive.float().diff(dim=1).gt(0).any()  # positives come first


def test_sampling_is_uniform() -> None:
    torch.manual_seed(0)
    positive = torch.zeros(2000, 20, dtype=torch.bool)
    positive[:, :10] = True
    index, is_positive, _ = sample_candidates(positive, ~positive, 8, 4)
    counts = index.flatten().bincount(minlength=20)
    assert is_positive.sum() == 2000 * 4
    assert (counts - 800).abs().max() < 120  # more than five standard deviations


# ---- RPN ----


def rpn(**options: object) -> RPN:
    torch.manual_seed(0)
    anchors = Anchors([[[-16.0, -16, 16, 16], [-8, -8, 8, 8]]], [16])
    return RPN(RPNHead(8, 8, 2), anchors, **options)


def test_rpn_targets_by_hand() -> None:
    """The anchors are squares of 32 and 16 pixels, centered on (16 x, 16 y)."""
    targets = Targets(torch.tensor([[[33.0, 32, 65, 64], [0.0, 0, 6, 6], [0, 0, 0, 0]]]), torch.tensor([[0, 1, -1]]))
    anchors = torch.cat(rpn().anchors([(6, 8)]))
    positive, negative, matched = rpn().targets(anchors, torch.tensor([[96.0, 128.0]]), targets)
    iou = relops.box_iou(targets.boxes[0], anchors)
    first = 2 * (3 * 8 + 3)  # the large anchor centered on (48, 48): IoU 31 / 33
    assert iou[0, first] > 0.7 and positive[0, first] and matched[0, first] == 0
    corner = iou[1].argmax()  # the second object's best anchor is positive although its IoU is below 0.7
    assert iou[1, corner] < 0.3 and positive[0, corner] and matched[0, corner] == 1
    assert positive.sum() == 2
    between = ((iou[0] >= 0.3) & (iou[0] < 0.7)).nonzero().flatten()
    assert len(between) > 0 and not negative[0, between].any() and not positive[0, between].any()
    assert negative.sum() == ((iou < 0.3).all(0) & ~positive[0]).sum()


def test_rpn_ties_are_positive_and_anchors_outside_the_image_are_ignored() -> None:
    targets = Targets(torch.tensor([[[40.0, 40, 56, 56]]]), torch.tensor([[0]]))
    sizes = torch.tensor([[96.0, 128.0]])
    anchors = torch.tensor([[32.0, 40, 56, 56], [40.0, 40, 64, 56], [-1.0, 0, 20, 20], [80, 80, 96, 97], [0, 0, 9, 9]])
    positive, negative, _ = rpn(ignore_outside=True).targets(anchors, sizes, targets)
    assert positive[0].tolist() == [True, True, False, False, False]  # both have the largest IoU
    # The third and fourth anchors are ignored because they cross the left and the bottom edge of the image.
    assert negative[0].tolist() == [False, False, False, False, True]
    _, negative, _ = rpn().targets(anchors, sizes, targets)
    assert negative[0].tolist() == [False, False, True, True, True]


def test_rpn_has_no_positive_anchors_without_objects() -> None:
    targets = Targets(torch.zeros(1, 1, 4), torch.full((1, 1), -1))
    maps = [torch.randn(1, 8, 6, 8)]
    proposals, losses = rpn()(maps, torch.tensor([[96.0, 128.0]]), targets)
    assert losses["rpn_boxes"] == 0 and losses["rpn_objectness"] > 0
    assert proposals.valid.any()


def test_softmax_of_two_scores_is_the_sigmoid_of_their_difference() -> None:
    """Check that the cross entropy of the two scores equals the binary cross entropy of their difference."""
    torch.manual_seed(0)
    head = RPNHead(8, 8, 2, two_way=True)
    x = torch.randn(1, 8, 3, 4)
    logits, _ = head([x], [])
    scores = head.cls_logits(head.conv(x)).view(1, 2, 2, 3, 4)  # background, object; anchor; row; column
    two = scores.permute(0, 3, 4, 2, 1).reshape(-1, 2)
    labels = torch.randint(2, (len(two),))
    torch.testing.assert_close(
        F.binary_cross_entropy_with_logits(logits[0].flatten(), labels.float()), F.cross_entropy(two, labels)
    )
    assert head.cls_logits.out_channels == 4 and RPNHead(8, 8, 2).cls_logits.out_channels == 2


def test_balance_and_normalization_of_the_rpn_loss() -> None:
    maps, sizes = [torch.randn(1, 8, 6, 8)], torch.tensor([[96.0, 128.0]])
    targets = Targets(torch.tensor([[[33.0, 32, 65, 64]]]), torch.tensor([[0]]))

    def loss(**options: object) -> float:
        module = rpn(**options)
        torch.manual_seed(0)
        return module(maps, sizes, targets)[1]["rpn_boxes"].item()

    plain = loss(num_samples=32)
    # `balance` divides the loss by the number of positions on the map, 48, instead of the number of samples. The only
    # positive anchor is always sampled.
    assert loss(num_samples=32, balance=10.0) == pytest.approx(10 * plain * 32 / 48)
    assert loss(num_samples=16, balance=10.0) == pytest.approx(10 * plain * 32 / 48)


@pytest.mark.parametrize("filter_first", [False, True])
def test_proposals_by_hand(filter_first: bool) -> None:
    """The smallest box has the highest score.

    Without `filter_first`, it is first selected as one of the best 3 and removed afterwards.
    """
    anchors = torch.tensor([[0.0, 0, 4, 4], [10, 10, 50, 50], [11, 10, 51, 50], [60, 60, 90, 90], [100, 60, 140, 96]])
    scores = torch.tensor([[5.0, 4, 3, 2, 1]])
    module = rpn(pre_nms=(3, 3), post_nms=(10, 10), min_size=5, filter_first=filter_first).eval()
    found = module.proposals(scores, torch.zeros(1, 5, 4), anchors, [5], torch.tensor([[96.0, 128.0]]), None)
    expected = [1, 3] if filter_first else [1]
    assert found.boxes[0][found.valid[0]].tolist() == anchors[expected].tolist()
    assert found.scores[0][found.valid[0]].tolist() == scores[0, expected].tolist()
    assert found.boxes.shape == (1, 10, 4) and (found.boxes[~found.valid] == 0).all()
    everything = module.proposals(scores, torch.zeros(1, 5, 4), anchors, [5], torch.tensor([[96.0, 128.0]]), 4)
    clipped = torch.tensor([100.0, 60, 128, 96])  # the last anchor, clipped to the image
    assert everything.boxes[0][everything.valid[0]].tolist() == [*anchors[[1, 3]].tolist(), clipped.tolist()]


def test_levels_do_not_suppress_each_other() -> None:
    anchors = torch.tensor([[10.0, 10, 50, 50], [11, 10, 51, 50]])
    sizes, deltas = torch.tensor([[96.0, 128.0]]), torch.zeros(1, 2, 4)
    one = rpn().proposals(torch.tensor([[2.0, 1]]), deltas, anchors, [2], sizes, None)
    two = rpn().proposals(torch.tensor([[2.0, 1]]), deltas, anchors, [1, 1], sizes, None)
    assert one.valid.sum() == 1 and two.valid.sum() == 2


def test_scores_and_deltas_that_are_not_finite_give_no_proposals() -> None:
    anchors = torch.tensor([[10.0, 10, 50, 50], [60, 10, 90, 50], [5, 60, 40, 90]])
    deltas = torch.zeros(1, 3, 4)
    deltas[0, 0, 2] = math.nan
    scores = torch.tensor([[9.0, math.nan, 1.0]])
    found = rpn().proposals(scores, deltas, anchors, [3], torch.tensor([[96.0, 128.0]]), None)
    assert found.boxes[0][found.valid[0]].tolist() == anchors[2:].tolist()


# ---- Regions ----


class FixedPredictor(nn.Module):
    """A predictor that returns the logits and deltas passed to its constructor, for any input."""

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.outputs = logits, deltas

    def forward(self, _: object) -> tuple[Tensor, Tensor]:
        return self.outputs


def heads(logits: Tensor, deltas: Tensor, **options: object) -> RoIHeads:
    class Ignore(nn.Module):
        def forward(self, *_: object) -> None:
            return None

    return RoIHeads(Ignore(), Ignore(), FixedPredictor(logits, deltas), **options)


def test_detections_by_hand() -> None:
    """Check suppression within classes, thresholds, order and padding with two overlapping regions and a third one."""
    boxes = torch.tensor([[[10.0, 10, 50, 50], [11, 10, 51, 50], [60, 10, 90, 50], [0, 0, 0, 0]]])
    probabilities = torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.7, 0.1], [0.5, 0.03, 0.47]])
    deltas = torch.zeros(3, 12)
    deltas[2, 8] = 10 * 0.5  # class 1 moves by half a width to the right and is clipped to the image
    module = heads(probabilities.log(), deltas, max_detections=5).eval()
    found = module.detect(
        [], Proposals(boxes, torch.ones(1, 4), torch.tensor([[1, 1, 1, 0]]).bool()), torch.tensor([[60.0, 100]])
    )
    # Class 1 keeps regions 2 and 0. Region 1 overlaps region 0 and has the same score, and ties go to the lower index.
    assert found.labels[0].tolist() == [0, 1, 1, -1, -1]
    torch.testing.assert_close(found.scores[0], torch.tensor([0.8, 0.47, 0.1, 0, 0]))
    torch.testing.assert_close(
        found.boxes[0, :3], torch.tensor([[10.0, 10, 50, 50], [75, 10, 100, 50], [10, 10, 50, 50]])
    )


def test_region_losses_by_hand() -> None:
    samples_boxes = torch.tensor([[[10.0, 10, 30, 30], [50, 50, 70, 90]]])
    targets = Targets(torch.tensor([[[12.0, 10, 32, 30]]]), torch.tensor([[1]]))
    logits, deltas = torch.zeros(2, 3), torch.zeros(2, 12)
    module = heads(logits, deltas, beta=1.0)
    samples = module.regions(Proposals(samples_boxes, torch.ones(1, 2), torch.ones(1, 2).bool()), targets)
    assert samples.classes.tolist() == [[2, 0, 2]]  # the third region is the object itself
    samples = samples._replace(
        boxes=samples.boxes[:, :2], classes=samples.classes[:, :2], matched=samples.matched[:, :2]
    )
    losses = module.losses_of([], samples, targets)
    assert losses["classes"].item() == pytest.approx(math.log(3))
    # dx is 10 * 2 / 20 = 1, so the loss is half of its square, divided by the number of samples, 2.
    assert losses["boxes"].item() == pytest.approx(0.5 / 2)


def test_fast_rcnn_ignores_regions_that_hardly_overlap_objects() -> None:
    targets = Targets(torch.tensor([[[0.0, 0, 40, 40]]]), torch.tensor([[0]]))
    # The IoUs with the object are 0.67, 0.33, 0.03 and 0.
    boxes = torch.tensor([[[0.0, 0, 40, 60], [0, 20, 40, 60], [0, 38, 40, 78], [60, 60, 80, 80]]])
    valid = torch.ones(1, 4).bool()
    module = small("fast_rcnn").roi_heads
    assert module.regions(Proposals(boxes, valid.float(), valid), targets).classes.tolist() == [[1, 0, -1, -1, 1]]


# ---- Detectors ----


@pytest.mark.quick
@pytest.mark.parametrize("name", SMALL)
def test_losses_and_gradients(name: str, device: str) -> None:
    """All losses are finite, and every parameter gets a finite gradient."""
    model = small(name).to(device)
    losses = model(*batch(device))
    assert all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", SMALL)
def test_losses_of_images_without_objects(name: str, device: str) -> None:
    images, sizes, targets = batch(device)
    none = Targets(torch.zeros_like(targets.boxes), torch.full_like(targets.labels, -1), None, targets.proposals)
    losses = small(name).to(device)(images, sizes, none)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(loss == 0 for loss_name, loss in losses.items() if "boxes" in loss_name)
    sum(losses.values()).backward()


@pytest.mark.parametrize("name", SMALL)
def test_boxes_without_extent_are_ignored(name: str) -> None:
    images, sizes, targets = batch()
    boxes, labels = targets.boxes.clone(), targets.labels.clone()
    boxes[1, 1], boxes[1, 2], labels[1, 1:] = torch.tensor([30.0, 20, 30, 40]), math.nan, 0
    model = small(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = []
    for ground_truth in (targets, targets._replace(boxes=boxes, labels=labels)):
        torch.manual_seed(0)
        losses.append(model(images, sizes, ground_truth))
    assert all(torch.equal(loss, losses[1][loss_name]) for loss_name, loss in losses[0].items())
    model.zero_grad()
    sum(losses[1].values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_float64(name: str) -> None:
    """The model, its images and sizes are float64; the targets keep the dtype of the data."""
    model = randomize_heads(small(name)).double()
    images, sizes, targets = batch()
    losses = model(images.double(), sizes.double(), targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    found = model.eval()(images.double(), sizes.double(), *((targets,) if model.uses_proposals else ()))
    assert found.boxes.dtype == found.scores.dtype == torch.float64 and (found.labels >= 0).any()


@pytest.mark.parametrize("name", SMALL)
def test_lr_net_as_backbone(name: str) -> None:
    torch.manual_seed(0)
    model = relops.models.build(name, 3, backbone="lr_net26-16", **SMALL[name])
    sum(model(*batch()).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.backbone.body.parameters())
    assert model.backbone.body.stem[3].key.weight.grad.abs().sum() > 0


def randomize_heads(model: nn.Module) -> nn.Module:
    """Randomize the heads' weights, because a newly initialized model detects almost no objects."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(x in name for x in ("cls_", "bbox_pred", "box_maps", "_embed.")):
                parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("name", SMALL)
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    model = randomize_heads(small(name)).eval()
    images, sizes, targets = batch()
    arguments = (images, sizes, targets) if model.uses_proposals else (images, sizes)
    with torch.no_grad():
        expected = model(*arguments)
        found = torch.compile(model, fullgraph=True, backend="eager")(*arguments)
    assert (expected.labels >= 0).sum() > 5 and torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_fake_tensors(name: str) -> None:
    """Run training and inference with fake tensors, which have no values."""
    inputs = batch()
    with FakeTensorMode() as mode:
        model = small(name)
        images, sizes, targets = tree_map(mode.from_tensor, inputs)
        losses = model.train()(images, sizes, targets)
        sum(losses.values()).backward()
        detections = model.eval()(images, sizes, targets)
    assert all(isinstance(loss, FakeTensor) and loss.dim() == 0 for loss in losses.values())
    assert detections.boxes.shape == (*detections.scores.shape, 4) and len(detections.labels) == 2


@pytest.mark.quick
@pytest.mark.parametrize("name", SMALL)
def test_batch_gives_the_detections_of_its_images(name: str, device: str) -> None:
    """The detections of a padded batch equal those of each image alone with the same padding."""
    model = randomize_heads(small(name)).to(device).eval()
    with torch.no_grad():
        images, sizes, targets = batch(device)
        whole = model(images, sizes, targets) if model.uses_proposals else model(images, sizes)
        assert (whole.labels >= 0).sum(1).min() > 5
        for i in range(2):
            image_targets = Targets(*(x[i : i + 1] for x in targets))
            arguments = (images[i : i + 1], sizes[i : i + 1], *((image_targets,) if model.uses_proposals else ()))
            one = model(*arguments)
            assert one.labels[0].tolist() == whole.labels[i].tolist()
            torch.testing.assert_close(one.boxes[0], whole.boxes[i], rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(one.scores[0], whole.scores[i], rtol=1e-3, atol=1e-5)
    limit = sizes.flip(1).repeat(1, 2)[:, None]
    assert (whole.boxes >= 0).all() and (whole.boxes <= limit).all()


@pytest.mark.parametrize("name", SMALL)
def test_padding_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare two ways to ignore padding rows: the CPU leaves them out, and other devices give them no weight."""
    images, sizes, targets = batch()
    model = small(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def run() -> tuple[dict[str, Tensor], Detections]:
        torch.manual_seed(1)
        losses = model.train()(images, sizes, targets)
        with torch.no_grad():
            return losses, model.eval()(images, sizes, *((targets,) if model.uses_proposals else ()))

    losses, found = run()
    monkeypatch.setattr("relops.models.parts.padding.has_values", lambda *_: False)
    padded_losses, padded_found = run()
    for loss_name in losses:
        torch.testing.assert_close(losses[loss_name], padded_losses[loss_name], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, padded_found.labels)
    torch.testing.assert_close(found.boxes, padded_found.boxes, rtol=1e-4, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("name", SMALL)
def test_no_synchronization(name: str) -> None:
    """Neither a training step nor inference synchronizes with the CUDA device."""
    images, sizes, targets = batch("cuda")
    model = small(name).to("cuda")

    def step() -> None:
        sum(model.train()(images, sizes, targets).values()).backward()
        with torch.no_grad():
            model.eval()(images, sizes, *((targets,) if model.uses_proposals else ()))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SMALL)
def test_autocast(name: str) -> None:
    """Features are bfloat16. Boxes and losses stay float32, and losses are close to those without autocast."""
    model = small(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(*batch()))
    for loss_name, loss in losses[1].items():
        assert loss.dtype == torch.float32
        if loss_name != "masks":  # this loss depends on the random choice of regions
            assert loss.item() == pytest.approx(losses[0][loss_name].item(), rel=0.2, abs=0.05), loss_name
    sum(losses[1].values()).backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        images, sizes, targets = batch()
        found = model.eval()(images, sizes, *((targets,) if model.uses_proposals else ()))
    assert found.boxes.dtype == found.scores.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"rpn_loss": "sigmoid"}, {"roi": "align"}, {"order": "top_first"}, {"balance": 10.0}, {"stride": 8}]
)
def test_faster_rcnn_options(options: dict) -> None:
    losses = small("faster_rcnn", **options)(*batch())
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("backbone", ["vgg16", "zf", "zf-gn", "resnet50-frozen-16", "resnet18-dcnv2-16", "lr_net26"])
def test_faster_rcnn_on_backbones(backbone: str) -> None:
    torch.manual_seed(0)
    model = relops.models.faster_rcnn(3, backbone=backbone, channels=16, hidden=16, frozen_stages=1)
    frozen = [p for part in model.backbone.body.parts()[:1] for module in part for p in module.parameters()]
    sum(model(*batch()).values()).backward()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_joint_gradient_equals_finite_differences() -> None:
    """Compare the gradients of the RPN's deltas with central differences in float64.

    In non-approximate joint training, the losses of the second stage depend on these deltas through decoding, clipping,
    RoI warping and regression targets.
    """
    torch.manual_seed(0)
    model = relops.models.faster_rcnn(
        2, backbone="zf", channels=4, hidden=8, training="joint", roi="align", dropout=0.0, scales=(2, 4), min_size=4
    ).double()
    images, sizes = torch.randn(1, 3, 64, 80).double(), torch.tensor([[64.0, 80.0]]).double()
    boxes = torch.tensor([[[6.0, 4, 40, 36], [30, 24, 76, 60]]]).double()
    targets = Targets(boxes, torch.tensor([[0, 1]]))
    maps = [x.detach() for x in model.backbone(images)]
    anchors = torch.cat(model.rpn.anchors([x.shape[-2:] for x in maps]))
    logits = torch.randn(1, len(anchors)).double()
    with torch.no_grad():  # larger weights, so that the losses depend on the regions
        for parameter in model.roi_heads.parameters():
            parameter.normal_(0, 0.3)

    def second_stage(deltas: Tensor) -> Tensor:
        torch.manual_seed(0)  # so that each call draws the same samples
        found = model.rpn.proposals(logits, deltas, anchors, [len(anchors)], sizes, None)
        return sum(model.roi_heads.losses(maps, found, sizes, targets).values())

    deltas = (0.1 * torch.randn(1, len(anchors), 4)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(second_stage(deltas), deltas)
    assert (gradient != 0).sum() > 40
    step, worst = 1e-6, 0.0
    for index in gradient.flatten().abs().topk(40).indices.tolist():
        change = torch.zeros_like(deltas).flatten()
        change[index] = step
        change = change.view_as(deltas)
        with torch.no_grad():
            slope = (second_stage(deltas + change) - second_stage(deltas - change)) / (2 * step)
        worst = max(worst, abs(slope.item() - gradient.flatten()[index].item()))
    assert worst < 1e-5 * gradient.abs().max().item() + 1e-8


def test_only_joint_training_passes_gradients_to_the_rpn() -> None:
    """Approximate joint training ignores the gradients that flow from the second stage through the boxes to the RPN."""
    for training in ("approximate", "joint"):
        torch.manual_seed(0)
        model = relops.models.faster_rcnn(
            3, backbone="zf", channels=8, hidden=8, training=training, roi="align", min_size=4, scales=(2, 4)
        )
        nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, 0, 0.5)
        losses = model(*batch())
        (losses["classes"] + losses["boxes"]).backward()
        gradient = model.rpn.head.bbox_pred.weight.grad
        assert (gradient is not None and gradient.abs().max() > 0) == (training == "joint")


def test_joint_training_requires_align() -> None:
    with pytest.raises(ValueError, match='roi must be "align" if training is "joint"'):
        relops.models.faster_rcnn(3, training="joint", backbone="zf")


def test_alternating_phases_train_their_parts() -> None:
    model = small("faster_rcnn", training="alternating")
    trained = [{"first_backbone", "rpn"}, {"backbone", "roi_heads"}, {"rpn"}, {"roi_heads"}]
    assert sum(fraction for _, fraction in model.phases) == pytest.approx(1)
    for phase, expected in enumerate(trained):
        model.start_phase(phase)
        model.zero_grad()
        sum(model.train()(*batch()).values()).backward()
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == expected
    # In the first two phases the proposals depend on the first backbone, and later they do not.
    images, sizes, _ = batch()
    model.eval()
    for phase, uses_first_backbone in ((1, True), (3, False)):
        model.start_phase(phase)
        with torch.no_grad():
            before = model.propose(images, sizes).boxes
            saved = {k: v.clone() for k, v in model.first_backbone.state_dict().items()}
            for parameter in model.first_backbone.parameters():
                parameter.normal_()
            changed = not torch.equal(before, model.propose(images, sizes).boxes)
            model.first_backbone.load_state_dict(saved)
        assert changed == uses_first_backbone


def test_cascade_stage_receives_the_boxes_of_the_previous_stage() -> None:
    model = small("cascade_rcnn")
    seen = []
    pool = model.roi_heads.box_roi_pool
    pool.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[1]))
    with torch.no_grad():
        # The three predictors shift boxes by 1/10, 1/20 and 1/30 of the width.
        for predictor in model.roi_heads.box_predictor:
            predictor.bbox_pred.weight.zero_()
            predictor.bbox_pred.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        images, sizes, _ = batch()
        model.eval()(images, sizes)
    assert len(seen) == 3
    for before, after, divisor in ((seen[0], seen[1], 10), (seen[1], seen[2], 20)):
        inside = (before[:, 3] < 80) & (before[:, 1] > 0)
        width = before[:, 3] - before[:, 1]
        torch.testing.assert_close(after[inside, 1], (before[:, 1] + width / divisor)[inside], rtol=1e-4, atol=1e-3)


def test_r_fcn_learns_from_the_hardest_regions() -> None:
    model = small("r_fcn", num_samples=4)
    seen: list[Tensor] = []
    original = model.roi_heads.region_losses

    def spy(*arguments: object) -> tuple[Tensor, Tensor]:
        seen.extend(original(*arguments))
        seen[0].retain_grad()
        return seen[0], seen[1]

    model.roi_heads.region_losses = spy
    model(*batch())["classes"].backward()
    entropy, distance = seen
    selected = entropy.grad != 0
    assert len(entropy) > 16 and selected.sum() == 8  # four regions in each of the two images
    torch.testing.assert_close(entropy.grad[selected], torch.full((8,), 1 / 8))
    hardness = (entropy + distance).detach()
    assert selected[hardness.argmax()] and not selected[hardness.argmin()]


def test_sizes_of_hyper_maps_and_pyramid_maps() -> None:
    for backbone, stages in (("vgg16", [0, 2, 4]), ("resnet18-gn-16", [0, 1, 2])):
        (fused,) = HyperBackbone(make_body(backbone), stages)(torch.randn(1, 3, 64, 96))
        assert fused.shape == (1, 126, 16, 24)
    maps = FeaturePyramid([4, 8], 16)([torch.randn(1, 4, 20, 28), torch.randn(1, 8, 10, 14)])
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 20, 28), (16, 10, 14), (16, 5, 7)]


@pytest.mark.parametrize("name", ["resnet18-gn-16", "lr_net26-16"])
def test_dilated_body_keeps_its_stride(name: str) -> None:
    body = make_body(name, dilated=True)
    maps = body.stage_maps(torch.randn(1, 3, 64, 96))
    assert body.strides == [4, 8, 16, 16] and maps[2].shape[2:] == maps[3].shape[2:] == (4, 6)
    plain = make_body(name)
    plain.load_state_dict(body.state_dict())  # succeeds because both bodies have the same parameters


@pytest.mark.parametrize("name", ["faster_rcnn", "fast_rcnn", "r_fcn"])
@pytest.mark.parametrize("stride", [8, 16])
def test_stride(name: str, stride: int) -> None:
    model = small(name, stride=stride)
    for x in model.backbone(torch.randn(1, 3, 64, 96)):
        assert x.shape[2:] == (64 // stride, 96 // stride)
    assert all(loss.isfinite() for loss in model(*batch()).values())
    if name == "faster_rcnn":
        assert relops.models.faster_rcnn(3, backbone="vgg16", stride=stride, channels=8, hidden=8).backbone(
            torch.randn(1, 3, 64, 96)
        )[0].shape[2:] == (64 // stride, 96 // stride)


def test_pretrained_weights_of_a_classifier() -> None:
    """The weights are loaded into all stages of the detector's backbone, and those of VGG-16 also into fc6 and fc7."""
    classifier = relops.models.resnet18()
    model = relops.models.faster_rcnn(3, backbone="resnet18-frozen", channels=8, hidden=8)
    relops.models.load_backbone(model, classifier.state_dict())
    assert torch.equal(model.backbone.body.layer3[1].conv2.weight, classifier.layer3[1].conv2.weight)
    with pytest.raises(ValueError, match=r"state_dict must have conv1\.weight"):
        relops.models.load_backbone(model, {"conv2.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"conv1.weight of state_dict must be \[64, 3, 7, 7\], got \[1\]"):
        relops.models.load_backbone(model, classifier.state_dict() | {"conv1.weight": torch.zeros(1)})
    state = {name: torch.full_like(x, 0.5) for name, x in relops.models.vgg16(None).state_dict().items()}
    for name, size in (("0", (24, 25088)), ("3", (24, 24))):
        state |= {f"classifier.{name}.weight": torch.ones(size), f"classifier.{name}.bias": torch.ones(24)}
    model = relops.models.faster_rcnn(3, backbone="vgg16", channels=8, hidden=24)
    relops.models.load_backbone(model, state)
    assert (model.roi_heads.box_head.fc6.weight == 1).all() and (model.roi_heads.box_head.fc7.bias == 1).all()
    assert (model.backbone.body.features[0].weight == 0.5).all()
    model = relops.models.hypernet(3, backbone="vgg16", hidden=8)  # the head has other shapes than that of VGG-16
    relops.models.load_backbone(model, state)
    assert (model.backbone.body.features[0].weight == 0.5).all()
    model = relops.models.relation_networks(3, backbone="vgg16", channels=8, hidden=32)
    for name, size in (("0", (32, 25088)), ("3", (32, 32))):
        state |= {f"classifier.{name}.weight": torch.ones(size), f"classifier.{name}.bias": torch.ones(32)}
    relops.models.load_backbone(model, state)  # the state has no weights for relation modules
    assert (model.roi_heads.box_head.fc6.weight == 1).all() and (model.roi_heads.box_head.fc7.bias == 1).all()
    with pytest.raises(ValueError, match=r"state_dict must have conv1\.weight"):
        relops.models.load_backbone(small("detr"), state)


# ---- Deformable backbones ----


def trained(body: nn.Module) -> nn.Module:
    """Give the normalizations of a body values as after training. Initially, they would hide parts of the body."""
    with torch.no_grad():
        for name, x in body.state_dict().items():
            if name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight")):
                x.uniform_(0.3, 0.8)
            elif name.endswith("running_mean"):
                x.normal_(0, 0.1)
    return body.eval()


def assert_same_maps(body: nn.Module, other: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 96)
    for x, y in zip(body.stage_maps(images), other.stage_maps(images), strict=True):
        assert (x - y).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("version", ["dcn", "dcnv2"])
@pytest.mark.parametrize("norm", ["bn", "frozen", "gn"])
@pytest.mark.parametrize(("kind", "dilated"), [("resnet18", True), ("resnet50", False)])
def test_deformable_body_begins_as_the_plain_body(version: str, norm: str, kind: str, dilated: bool) -> None:
    plain = trained(make_body(f"{kind}-{norm}-16", dilated=dilated))
    body = make_body(f"{kind}-{norm}-{version}-16", dilated=dilated).eval()
    for x in body.parameters():
        nn.init.normal_(x)  # loading also resets the offset convolutions
    state = plain.state_dict()
    body.load_state_dict(state)
    assert_same_maps(plain, body)
    plain.load_state_dict(state)  # the call above did not change the state_dict
    assert_same_maps(plain, body)

    with torch.autocast("cpu", torch.bfloat16):
        assert all(x.isfinite().all() for x in body.stage_maps(torch.randn(1, 3, 64, 64)))
    body.train()
    body.stage_maps(torch.randn(2, 3, 64, 64))[-1].square().sum().backward()
    grads = {name: x.grad for name, x in body.named_parameters() if "conv_offset" in name}
    assert grads and all(x.any() for x in grads.values())
    if version == "dcnv2":  # one third of the outputs are masks
        assert all(x[2 * len(x) // 3 :].any() for x in grads.values())


def test_layers_that_are_deformable() -> None:
    def deformable(body: nn.Module) -> list[str]:
        return [name.removesuffix(".conv_offset") for name, _ in body.named_modules() if name.endswith("conv_offset")]

    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
    both = [f"{block}.conv{i}" for block in blocks for i in (1, 2)]
    assert deformable(make_body("resnet18-dcn-8")) == both[12:]
    assert deformable(make_body("resnet18-dcn-8", stages=3, dilated=True)) == both[8:12]
    assert deformable(make_body("resnet18-dcnv2-8")) == both[4:]
    assert deformable(make_body("resnet18-dcnv2-8", stages=3)) == both[4:12]
    assert deformable(make_body("resnet50-gn-dcn-8")) == [f"layer4.{i}.conv2" for i in range(3)]
    assert not deformable(make_body("resnet50-gn-8"))
    body = make_body("resnet50-frozen-dcn-8", dilated=True)
    layer = body.layer4[0].conv2
    assert (layer.stride, layer.dilation, layer.padding, layer.deform_groups) == ((1, 1), (2, 2), (2, 2), 4)
    assert layer.conv_offset.dilation == (2, 2) and layer.conv_offset.out_channels == 4 * 2 * 9
    layer = make_body("resnet18-dcnv2-8").layer3[0].conv1
    assert layer.stride == layer.conv_offset.stride == (2, 2) and layer.conv_offset.out_channels == 3 * 9


def test_random_weights_of_deformable_layers() -> None:
    """The initial standard deviation compensates for the masks of v2, which are initially 0.5."""
    for version, factor in (("dcn", 1), ("dcnv2", 2)):
        layer = make_body(f"resnet18-{version}-32").layer4[1].conv2
        assert not layer.conv_offset.weight.any() and not layer.conv_offset.bias.any()
        assert layer.weight.std().item() == pytest.approx(factor * (2 / (256 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("version", ["dcn", "dcnv2"])
def test_state_dict_of_a_deformable_body(version: str) -> None:
    body, other = (trained(make_body(f"resnet18-gn-{version}-16")) for _ in range(2))
    for x in body.parameters():
        nn.init.normal_(x, std=0.05)
    state = body.state_dict()
    other.load_state_dict(state)
    assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())
    early = {name.replace(".conv_offset.", "_offset."): x for name, x in state.items()}
    assert early.keys() != state.keys()
    for x in other.parameters():
        nn.init.zeros_(x)
    other.load_state_dict(early)
    assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())

    with pytest.raises(RuntimeError, match=r'Missing key.*: "layer4\.1\.conv2\.conv_offset\.bias"\. $'):
        other.load_state_dict({name: x for name, x in state.items() if name != "layer4.1.conv2.conv_offset.bias"})
    plain = {name: x for name, x in state.items() if "conv_offset" not in name}
    other.load_state_dict(plain)
    with pytest.raises(RuntimeError, match=r'Missing key.*: "layer4\.1\.conv2\.weight"'):
        other.load_state_dict({name: x for name, x in plain.items() if name != "layer4.1.conv2.weight"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*: "layer5"'):
        other.load_state_dict(plain | {"layer5": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv_offset"):
        make_body("resnet18-gn-16").load_state_dict(state)


@pytest.mark.parametrize("version", ["dcn", "dcnv2"])
def test_pretrained_weights_of_a_plain_classifier_in_a_deformable_detector(version: str) -> None:
    options = {"num_classes": 3, "channels": 16, "hidden": 16, "sizes": (16, 32, 64, 128, 256)}
    plain = relops.models.faster_rcnn_fpn(backbone="resnet18-frozen-16", **options).eval()
    model = relops.models.faster_rcnn_fpn(backbone=f"resnet18-frozen-{version}-16", **options).eval()
    classifier = trained(relops.models.resnet18(num_classes=5, width=16))
    for detector in (plain, model):
        relops.models.load_backbone(detector, classifier.state_dict())
    assert_same_maps(plain.backbone.body, model.backbone.body)
    relops.models.load_torchvision(model, trained(plain).state_dict())
    images, sizes, _ = batch()
    for x, y in zip(plain.backbone(images), model.backbone(images)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * x.abs().max().item())
    torch.testing.assert_close(plain(images, sizes), model(images, sizes), rtol=1e-4, atol=1e-3)
    # The weights of a deformable classifier keep their offsets.
    classifier = make_body(f"resnet18-bn-{version}-16")
    for x in classifier.parameters():
        nn.init.normal_(x)
    relops.models.load_backbone(model, classifier.state_dict())
    for name in ("weight", "conv_offset.weight", "conv_offset.bias"):
        name = f"layer4.1.conv2.{name}"
        assert torch.equal(model.backbone.body.state_dict()[name], classifier.state_dict()[name])
    state = {name: x for name, x in classifier.state_dict().items() if name != "layer4.0.conv1.conv_offset.bias"}
    with pytest.raises(ValueError, match=r"state_dict must have layer4\.0\.conv1\.conv_offset\.bias"):
        relops.models.load_backbone(model, state)
    # A plain network would ignore the offsets. A detector without the last stage does not need those of this stage.
    early = {name.replace(".conv_offset.", "_offset."): x for name, x in classifier.state_dict().items()}
    for state in (classifier.state_dict(), early):
        with pytest.raises(ValueError, match=r"must have deformable convolutions .*_offset\.weight for a plain"):
            relops.models.load_backbone(plain, state)
    small_model = relops.models.faster_rcnn(3, backbone=f"resnet18-bn-{version}-16", stride=8, channels=16, hidden=16)
    relops.models.load_backbone(small_model, classifier.state_dict())


@pytest.mark.parametrize("name", ["relation_networks", "r_fcn"])
def test_published_detectors_with_deformable_convolutions(name: str) -> None:
    torch.manual_seed(0)
    model = relops.models.build(name, 3, backbone="resnet101-frozen-dcn-8", frozen_stages=2, channels=16, hidden=32)
    if name == "r_fcn":
        assert model.backbone.body.layer4[0].conv2.dilation == (2, 2)
    trained(model.backbone.body)
    images, sizes, targets = batch()
    losses = model.train()(images, sizes, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    torch.optim.SGD([x for x in model.parameters() if x.requires_grad], 1e-6).step()
    offsets = [x for name, x in model.named_parameters() if "conv_offset" in name]
    assert offsets and all(x.any() for x in offsets)  # the step moved all offsets away from 0
    with torch.no_grad():
        detections = model.eval()(images, sizes)
    assert detections.boxes.isfinite().all() and (detections.labels >= 0).any()


def test_objects_without_a_mask_still_train_the_box_head() -> None:
    model = small("mask_rcnn")
    images, sizes, targets = batch()

    def losses(*without: tuple[int, int]) -> dict[str, Tensor]:
        masks = targets.masks.clone()
        for n, t in without:
            masks[n, t] = False
        torch.manual_seed(1)
        return model(images, sizes, targets._replace(masks=masks))

    whole, none = losses(), losses((0, 0), (0, 1), (0, 2), (1, 0))
    assert none["masks"] == 0 and whole["masks"] > 0
    assert all(torch.equal(none[name], whole[name]) for name in whole if name != "masks")
    sum(none.values()).backward()
    assert all((p.grad == 0).all() for p in model.roi_heads.mask_predictor.parameters())
    # The mean over all objects lies between the means over two subsets that together contain all objects.
    first, others = losses((0, 1), (0, 2), (1, 0))["masks"], losses((0, 0))["masks"]
    assert min(first, others) < whole["masks"] < max(first, others)


def test_paste_masks_fills_the_boxes() -> None:
    masks = torch.zeros(2, 28, 28)
    masks[0], masks[1, :, :14] = 1, 1  # the first mask is full, and the second covers the left half
    boxes = torch.tensor([[4.0, 6, 32, 34], [10, 10, 38, 24]])
    pasted = paste_masks(masks, boxes, (40, 50))
    expected = torch.zeros(2, 40, 50, dtype=torch.bool)
    expected[0, 6:34, 4:32] = expected[1, 10:24, 10:24] = True
    assert (pasted ^ expected).sum((1, 2)).max() == 0
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (4, 5)).shape == (0, 4, 5)
    masks = torch.rand(2, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        pasted = paste_masks(masks, boxes + 0.3, (40, 50))
    assert torch.equal(pasted, paste_masks(masks, boxes + 0.3, (40, 50)))


def test_detect_returns_boxes_in_pixels_of_the_original_image() -> None:
    """Compare an image with an enlarged copy of twice its width and height. The boxes must be twice as large, too."""
    model = small("faster_rcnn_fpn").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cls_" in name:
                parameter.normal_(0, 0.2)
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 6, 8), scale_factor=16, mode="bilinear")[0]
    large = F.interpolate(image[None], scale_factor=2, mode="nearest")[0]
    (one,), (two,) = (relops.models.detect(model, [x], 96, 128) for x in (image, large))
    assert len(one["labels"]) > 5 and one["labels"].tolist() == two["labels"].tolist()
    torch.testing.assert_close(2 * one["boxes"], two["boxes"], rtol=1e-3, atol=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 64, 64)}, r"images must be \[N,3,H,W\], got \[3, 64, 64\]"),
        ({"sizes": torch.zeros(1, 2)}, r"sizes must be \[N,2\] with N = 2, got \[1, 2\]"),
        ({"targets": None}, r"targets must be given in training"),
        (
            {"targets": Targets(torch.zeros(1, 2, 4), torch.zeros(2, 2))},
            r"boxes \[N,T,4\] and labels \[N,T\] with N = 2",
        ),
    ],
)
def test_bad_input_raises_an_error_that_names_it(change: dict, message: str) -> None:
    images, sizes, targets = batch()
    arguments = {"images": images, "sizes": sizes, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        small("faster_rcnn_fpn")(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relops.models.build("yolo", 3), "model must be one of .*faster_rcnn.*, got 'yolo'"),
        (lambda: make_body("resnet19"), "backbone must be one of .*resnet18.*, got 'resnet19'"),
        (lambda: make_body("lr_net26-bn"), "backbone must support norm, which lr_net26 does not, got 'lr_net26-bn'"),
        (lambda: make_body("vgg16-64"), "backbone must support width, which vgg16 does not, got 'vgg16-64'"),
        (lambda: make_body("vgg16-dcn"), "backbone must support deformable, which vgg16 does not, got 'vgg16-dcn'"),
        (
            lambda: make_body("resnet18-dcn-gn"),
            "followed by -bn, -frozen, -gn, then, for a ResNet, by -dcn, -dcnv2, and then, .* by -WIDTH, got",
        ),
        (lambda: relops.models.resnet18(deformable="v3"), 'deformable must be "v1" or "v2", got \'v3\''),
        (lambda: relops.models.r_fcn(3, backbone="zf"), "backbone must support dilated, stages, which zf does not"),
        (lambda: relops.models.relation_networks(3, relations=(2,)), r"relations must be two numbers, got \(2,\)"),
        (lambda: relops.models.batch_images([]), "images must contain at least one image, got none"),
        (lambda: relops.models.faster_rcnn(3, training="never"), "training must be .*, got 'never'"),
        (lambda: relops.models.faster_rcnn(3, stride=4), "stride must be 16 or 8, got 4"),
        (lambda: relops.models.faster_rcnn(3, backbone="zf", stride=8), "stride of zf must be 16, got 8"),
        (lambda: relops.models.resnet18(norm="layer"), "norm must be .*, got 'layer'"),
    ],
)
def test_unknown_option_values_raise_an_error_that_names_them(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
