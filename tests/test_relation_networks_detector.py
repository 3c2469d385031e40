"""Tests of the Relation Networks detectors: the head step by step, the key mask, and the number of calls of NMS."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.relation_networks import (
    assert_same,
    pair_embedding,
    random_parameters,
    relation,
    relation_shapes,
    relation_state,
)
from test_detectors import FixedPredictor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import relops
from relops.models import Targets
from relops.models.detectors.relation_networks import HEADS
from relops.models.parts.padding import as_rows
from relops.models.parts.rpn import Proposals
from relops.training.optimization import make_optimizer

HIDDEN = 32
SIZES = torch.tensor([[96.0, 128.0], [80.0, 100.0]])


def small(name: str = "relation_networks_fpn", **options: object) -> nn.Module:
    torch.manual_seed(0)
    pyramid = {"sizes": (16, 32, 64, 128, 256)} if name.endswith("_fpn") else {}
    options = {"backbone": "resnet18-gn-16", "channels": 16, "hidden": HIDDEN, **pyramid, "proposals": 40} | options
    model = getattr(relops.models, name)(3, **options)
    with torch.no_grad():  # large random weights, all of which affect the result
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("weight") and "roi_heads" in parameter_name:
                parameter.normal_(0, 0.03 if "bbox_pred" in parameter_name else 0.2)
    return model


def batch() -> tuple[Tensor, Tensor, Targets]:
    torch.manual_seed(1)
    images = torch.randn(2, 3, 96, 128)
    images[1, :, 80:] = images[1, :, :, 100:] = 0
    boxes = torch.tensor([[[8.0, 8, 60, 50], [70, 20, 120, 90], [5, 60, 45, 92]], [[20, 10, 90, 70], *[[0] * 4] * 2]])
    return images, SIZES, Targets(boxes, torch.tensor([[0, 1, 2], [1, -1, -1]]))


def some_proposals(P: int = 6) -> Proposals:
    """Return proposals for two images. The second image has two fewer than the first."""
    torch.manual_seed(2)
    boxes = torch.rand(2, P, 2).repeat(1, 1, 2) * 50
    boxes[..., 2:] += 15 + 20 * torch.rand(2, P, 2)
    valid = torch.arange(P) < torch.tensor([[P], [P - 2]])
    return Proposals(torch.where(valid[..., None], boxes, 0), valid.float(), valid)


class CoordinateFeatures(nn.Module):
    """A replacement for pooling. The features of a region depend only on the coordinates of its box."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.randn(4, width)

    def forward(self, _: object, rois: Tensor) -> Tensor:
        return (rois[:, 1:] / 50) @ self.weight.to(rois)


def heads_on_coordinates(**options: object) -> nn.Module:
    heads = small(**options).roi_heads
    heads.box_roi_pool = CoordinateFeatures(heads.box_head.fc6.in_features)
    return heads


# ---- The head ----


def test_head_step_by_step() -> None:
    """Compare with an implementation that embeds all pairs of regions, one image at a time.

    Two relation modules follow fc6 and one follows fc7. The last region is only a query, like a ground-truth box.
    Padding is neither a query nor a key.
    """
    heads = heads_on_coordinates(relations=(2, 1)).double()
    head = heads.box_head
    p = random_parameters({k: x for i in (1, 2, 3) for k, x in relation_shapes(HIDDEN, HEADS, 2, index=i).items()})
    for i, module in enumerate([*head.fc6_relations, *head.fc7_relations], 1):
        module.load_state_dict(relation_state(p, index=i))
    found = some_proposals(7)
    boxes, valid = found.boxes.double(), found.valid.clone()
    valid[1, 6], boxes[1, 6] = True, torch.tensor([10.0, 10, 60, 40]).double()  # padding lies between valid regions
    features, logits, deltas = heads.predict_all([], boxes, valid, 6)
    for n in range(2):
        valid_rows, num_keys = valid[n].nonzero().squeeze(1), int(valid[n, :6].sum())
        embedding = pair_embedding(boxes[n, valid_rows], num_keys, "paper")
        x = head.fc6(heads.box_roi_pool([], torch.cat([boxes[n, :, :1], boxes[n]], 1)[valid_rows]))
        for i in (1, 2):
            x = x + relation(x, embedding, p, HEADS, index=i)
        x = head.fc7(x.relu())
        x = (x + relation(x, embedding, p, HEADS, index=3)).relu()
        assert_same(features[n, valid_rows], x, "features")
        assert_same(logits[n, valid_rows], heads.box_predictor.cls_score(x), "scores")
        assert_same(deltas[n, valid_rows], heads.box_predictor.bbox_pred(x), "deltas")


def test_sizes_equal_those_of_the_published_head() -> None:
    """The published head has 16 relations with queries and keys of width 64, and 3.15 million parameters per module."""
    with torch.device("meta"):
        model = relops.models.relation_networks_fpn(80, relations=(2, 0))
        plain = relops.models.relation_networks(80, duplicate_removal=False, relations=(0, 1))
        unsuppressed = relops.models.relation_networks_fpn(80, proposals=200, proposal_nms=None)
    first, second = model.roi_heads.box_head.fc6_relations
    assert (first.channels, first.heads, first.head_dim, second.head_dim) == (1024, 16, 64, 64)
    assert sum(x.numel() for x in first.parameters()) == 3 * (1024 * 1024 + 1024) + 16 * 64 + 16
    assert not len(model.roi_heads.box_head.fc7_relations) and not len(plain.roi_heads.box_head.fc6_relations)
    removal = model.roi_heads.duplicate_removal
    assert (removal.first_n, removal.thresholds) == (150, (0.5, 0.6, 0.7, 0.8, 0.9))
    assert unsuppressed.roi_heads.duplicate_removal.first_n == 200
    assert model.rpn.post_nms == plain.rpn.post_nms == (300, 300) and plain.roi_heads.duplicate_removal is None
    with pytest.raises(ValueError, match="channels must be divisible by heads, got 40, 16"):
        small(hidden=40)


def test_ground_truth_does_not_affect_proposals() -> None:
    """Proposals get the same features in training and at inference, although training adds objects as regions."""
    heads, proposals = heads_on_coordinates(), some_proposals()
    targets = batch()[2]
    seen: list[Tensor] = []
    heads.box_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    heads.losses([], proposals, SIZES, targets)
    heads.detect([], proposals, SIZES)
    in_training, at_inference = seen
    assert in_training.shape[1] == 9 and at_inference.shape[1] == 6
    # The tolerance allows for different rounding in matrix products of 9 and of 6 rows. Without the key mask, the
    # objects would change the features by more than 1e-3, as the last assertion shows.
    torch.testing.assert_close(in_training[:, :6][proposals.valid], at_inference[proposals.valid], rtol=1e-4, atol=1e-5)
    # Conversely, the region of an object does depend on the proposals.
    moved = proposals._replace(boxes=proposals.boxes + 5 * proposals.valid[..., None])
    heads.losses([], moved, SIZES, targets)
    assert (seen[2][:, 6] - in_training[:, 6]).abs().max() > 1e-3
    # Without the key mask, the features of proposals would depend on the objects.
    boxes, valid = torch.cat([proposals.boxes, targets.boxes], 1), torch.cat([proposals.valid, targets.labels >= 0], 1)
    unmasked = heads.predict_all([], boxes, valid, 9)[0]
    assert (unmasked[:, :6] - at_inference)[proposals.valid].abs().max() > 1e-3


def test_padding_is_ignored() -> None:
    """Losses and detections do not depend on the amount of padding or on the values in it."""
    heads, few = heads_on_coordinates(), some_proposals()
    targets = batch()[2]
    padded = Proposals(*(torch.cat([x, x.new_zeros(2, 3, *x.shape[2:])], 1) for x in few))
    padded.boxes[~padded.valid] = math.nan
    losses, padded_losses = (heads.losses([], x, SIZES, targets) for x in (few, padded))
    for name, loss in losses.items():
        assert loss > 0
        torch.testing.assert_close(padded_losses[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    found, padded_found = (heads.detect([], x, SIZES) for x in (few, padded))
    num = found.labels.shape[1]  # at most one detection per proposal and class: 6 x 3
    assert num == 18 and (found.labels >= 0).sum() > 5
    for x, y in zip(found[:3], padded_found[:3]):
        torch.testing.assert_close(x, y[:, :num], rtol=1e-4, atol=1e-4)
    assert (padded_found.labels[:, num:] == -1).all() and not padded_found.scores[:, num:].any()


# ---- Comparison with Faster R-CNN ----


@pytest.mark.parametrize("num_samples", [1000, 3])
def test_detector_without_relations_equals_faster_rcnn(num_samples: int) -> None:
    """With the same weights, the detections equal those of Faster R-CNN.

    The losses equal those of Faster R-CNN if it computes them for the hardest regions only.
    """
    model = small(relations=(0, 0), duplicate_removal=False, num_samples=num_samples)
    twin = relops.models.faster_rcnn_fpn(
        3, backbone="resnet18-gn-16", channels=16, hidden=HIDDEN, sizes=(16, 32, 64, 128, 256)
    )
    state = model.state_dict()
    for kind in ("weight", "bias"):  # Faster R-CNN has separate deltas per class; make them equal
        name = f"roi_heads.box_predictor.bbox_pred.{kind}"
        state[name] = torch.cat([state[name]] * 4)
    twin.load_state_dict(state)
    twin.rpn.post_nms = (40, 40)
    twin.roi_heads.score_threshold, twin.roi_heads.beta = 0.01, 1.0

    images, sizes, targets = batch()
    with torch.no_grad():
        found, expected = (x.eval()(images, sizes) for x in (model, twin))
        assert (found.labels >= 0).sum() > 20
        for x, y in zip(found[:3], expected[:3]):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)

        torch.manual_seed(3)
        losses = model.train()(images, sizes, targets)
        torch.manual_seed(3)
        maps = twin.train().backbone(images)
        proposals, expected_losses = twin.rpn(maps, sizes, targets)
        heads, samples = twin.roi_heads, twin.roi_heads.regions(proposals, targets)
        logits, deltas = heads.predict(maps, as_rows(samples.boxes))
        losses_of_regions = heads.region_losses(logits, deltas, samples, targets, None, heads.WEIGHTS)
        class_losses, box_losses = (x.view(samples.classes.shape) for x in losses_of_regions)
        kept = []
        for n in range(2):
            valid = (samples.classes[n] >= 0).nonzero().squeeze(1)
            hardest = (class_losses + box_losses)[n, valid].argsort()[-num_samples:]
            kept.append(n * len(samples.classes[n]) + valid[hardest])
        kept = torch.cat(kept)
        assert len(kept) == 6 if num_samples == 3 else len(kept) > 60
        expected_losses |= {"classes": class_losses.flatten()[kept].mean(), "boxes": box_losses.flatten()[kept].mean()}
    assert losses.keys() == expected_losses.keys() and losses["boxes"] > 0
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-4, atol=1e-5, msg=name)


# ---- Duplicate removal ----


class RecordOps(TorchDispatchMode):
    """A dispatch mode that records the names of the relops ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if op.namespace == "relops":
            self.names.append(op.name())
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["relation_networks", "relation_networks_fpn"])
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"proposal_nms": None}, 0),
        ({}, 1),  # in the RPN
        ({"proposal_nms": None, "duplicate_removal": False}, 1),  # within classes
    ],
    ids=["none", "proposals", "classes"],
)
def test_number_of_suppressions(name: str, options: dict, count: int) -> None:
    model = small(name, **options).eval()
    images, sizes, targets = batch()
    with torch.no_grad(), RecordOps() as ops:
        found = model(images, sizes)
    assert (found.labels >= 0).any()
    assert sum("nms" in x for x in ops.names) == count
    assert any("relation_attention" in x for x in ops.names)
    with torch.no_grad(), RecordOps() as ops:
        model.train()(images, sizes, targets)
    assert sum("nms" in x for x in ops.names) == (0 if options.get("proposal_nms", 0.7) is None else 1)


def test_proposals_without_suppression() -> None:
    """The proposals are the boxes with the best scores among all levels.

    Boxes with a NaN coordinate or score are left out.
    """
    rpn = small(proposal_nms=None, proposals=3).rpn.eval()
    anchors = torch.tensor([[10.0, 10, 50, 50], [11, 10, 51, 50], [60, 10, 90, 50], [5, 60, 40, 90], [9, 9, 49, 49]])
    scores, deltas = torch.tensor([[1.0, 4, math.nan, 9, 3]]), torch.zeros(1, 5, 4)
    deltas[0, 3, 2] = math.nan
    found = rpn.proposals(scores, deltas, anchors, [2, 3], SIZES[:1], None)
    assert found.boxes[0].tolist() == anchors[[1, 4, 0]].tolist() and found.valid.all()
    assert found.scores.tolist() == [[4, 3, 1]]
    found = rpn.proposals(scores, deltas, anchors, [2, 3], SIZES[:1], 5)
    assert found.valid[0].tolist() == [True, True, True, False, False] and not found.boxes[0, 3:].any()


def test_detections_by_hand() -> None:
    """Each pair of a proposal and a class with s0 > 0.01 gives a detection. Its score is s0 times the mean of s1."""
    heads = small(relations=(0, 0)).roi_heads
    heads.box_roi_pool = CoordinateFeatures(heads.box_head.fc6.in_features)
    boxes = torch.tensor([[[10.0, 10, 50, 50], [10, 10, 50, 50], [60, 10, 90, 50], [0, 0, 0, 0]]])
    probabilities = torch.tensor([[[0.1, 0.8, 0.095, 0.005], [0.2, 0.7, 0.05, 0.05], [0.39, 0.009, 0.6, 0.001]]])
    logits, deltas = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    logits[:, :3], deltas[0, 2, 0] = probabilities.log(), 10 * 0.5  # half a width to the right
    heads.box_predictor = FixedPredictor(logits, deltas)
    with torch.no_grad():
        heads.duplicate_removal.logit.weight.zero_()
        heads.duplicate_removal.logit.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).logit())
    heads.max_detections = 6
    valid = torch.tensor([[1, 1, 1, 0]]).bool()
    found = heads.detect([], Proposals(boxes, valid.float(), valid), torch.tensor([[60.0, 80]]))
    # Both copies of the first box are kept, because a network with zero weights detects no duplicates.
    assert found.labels[0].tolist() in ([0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 1])
    torch.testing.assert_close(found.scores[0], 0.3 * torch.tensor([0.8, 0.7, 0.6, 0.095, 0.05, 0.05]))
    torch.testing.assert_close(
        found.boxes[0, :4], torch.tensor([[10.0, 10, 50, 50], [10, 10, 50, 50], [75, 10, 80, 50], [10, 10, 50, 50]])
    )
    heads.max_detections = 100
    found = heads.detect([], Proposals(boxes, valid.float(), valid), torch.tensor([[60.0, 80]]))
    assert found.labels.shape == (1, 12) and (found.labels >= 0).sum() == 6
    assert not found.boxes[0, 6:].any() and not found.scores[0, 6:].any()


def test_duplicate_removal_loss_trains_other_parts() -> None:
    """The loss has gradients for the class scores, the features and the backbone, but not for the boxes and the RPN."""
    model = small()
    model(*batch())["duplicates"].backward()
    heads = model.roi_heads
    assert heads.box_predictor.cls_score.weight.grad.any()
    assert heads.box_head.fc6.weight.grad.any() and model.backbone.body.conv1.weight.grad.any()
    assert heads.box_predictor.bbox_pred.weight.grad is None
    assert all(p.grad is None for p in model.rpn.parameters())


def test_duplicate_removal_learns_only_from_refined_proposals() -> None:
    """The loss of duplicate removal has no gradient for the class scores of ground-truth regions."""
    heads, proposals = heads_on_coordinates(), some_proposals()
    targets = batch()[2]
    seen: list[tuple] = []
    heads.duplicate_removal.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs))
    logits, deltas = torch.randn(2, 9, 4, requires_grad=True), 0.5 * torch.randn(2, 9, 4)
    heads.box_predictor = FixedPredictor(logits, deltas)
    heads.losses([], proposals, SIZES, targets)["duplicates"].backward()
    features, scores, boxes = seen[0]
    assert features.shape == (2, 6, HIDDEN) and boxes.shape == (2, 6, 4)
    torch.testing.assert_close(scores[0], logits[0, :6].softmax(-1)[:, 1:])
    assert not scores[1, 4:].any()
    assert ((boxes - proposals.boxes)[proposals.valid].abs() > 0.1).any()
    limit = SIZES.flip(1).repeat(1, 2)[:, None]
    assert (boxes >= 0).all() and (boxes <= limit).all()
    assert logits.grad[0, :6].any() and not logits.grad[:, 6:].any()


# ---- Whole detectors ----


def test_adamw_trains_queries_and_keys_at_a_tenth_of_the_rate() -> None:
    model = small()
    optimizer = make_optimizer(model, "adamw", 0.5, 0.0, 0.9, 1.0, model.slower)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    slow = {name.rsplit(".", 1)[0] for name, parameter in model.named_parameters() if rates[parameter] < 0.5}
    relations = ("box_head.fc6_relations.0", "box_head.fc7_relations.0", "duplicate_removal.relation")
    assert slow == {f"roi_heads.{relation}.{layer}" for relation in relations for layer in ("query", "key")}
    assert set(rates.values()) == {0.5, 0.05}
    published = make_optimizer(model, "sgd", 0.5, 0.0, 0.9, 1.0, model.slower)
    assert {group["lr"] for group in published.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relation_networks", {"proposal_nms": None}),
        ("relation_networks_fpn", {"duplicate_removal": False, "relations": (0, 2)}),
    ],
)
def test_compiles_without_graph_breaks(name: str, options: dict) -> None:
    torch._dynamo.reset()
    model = small(name, **options).eval()
    images, sizes, _ = batch()
    with torch.no_grad():
        expected = model(images, sizes)
        found = torch.compile(model, fullgraph=True, backend="eager")(images, sizes)
    assert (expected.labels >= 0).any()
    for x, y in zip(found[:3], expected[:3]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relation_networks", {"backbone": "lr_net26"}),
        ("relation_networks", {"backbone": "zf", "roi": "align"}),
        ("relation_networks", {"stride": 8, "scales": (2, 4)}),
        ("relation_networks_fpn", {"backbone": "lr_net26"}),
    ],
)
def test_backbones_and_options(name: str, options: dict) -> None:
    model = small(name, **options)
    losses = model(*batch())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
