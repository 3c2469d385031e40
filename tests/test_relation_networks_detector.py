"""The Relation Networks detector: its head step by step, who sees whom, and that nothing is suppressed."""

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
from test_detectors import Given
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
    with torch.no_grad():  # far enough from where training begins that everything shows
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
    """Of two images, the second with fewer."""
    torch.manual_seed(2)
    boxes = torch.rand(2, P, 2).repeat(1, 1, 2) * 50
    boxes[..., 2:] += 15 + 20 * torch.rand(2, P, 2)
    valid = torch.arange(P) < torch.tensor([[P], [P - 2]])
    return Proposals(torch.where(valid[..., None], boxes, 0), valid.float(), valid)


class OfCoordinates(nn.Module):
    """Region features that depend on the box alone, in place of pooling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.randn(4, width)

    def forward(self, _: object, rois: Tensor) -> Tensor:
        return (rois[:, 1:] / 50) @ self.weight.to(rois)


def heads_on_coordinates(**options: object) -> nn.Module:
    heads = small(**options).roi_heads
    heads.box_roi_pool = OfCoordinates(heads.box_head.fc6.in_features)
    return heads


# ---- The head ----


def test_head_step_by_step() -> None:
    """Against embeddings of all pairs, image by image: two modules behind fc6, one behind fc7. The last region is no
    key, as ground truth is, and padding is nothing at all."""
    heads = heads_on_coordinates(relations=(2, 1)).double()
    head = heads.box_head
    p = random_parameters({k: x for i in (1, 2, 3) for k, x in relation_shapes(HIDDEN, HEADS, 2, index=i).items()})
    for i, module in enumerate([*head.fc6_relations, *head.fc7_relations], 1):
        module.load_state_dict(relation_state(p, index=i))
    found = some_proposals(7)
    boxes, valid = found.boxes.double(), found.valid.clone()
    valid[1, 6], boxes[1, 6] = True, torch.tensor([10.0, 10, 60, 40]).double()  # padding lies between
    features, logits, deltas = heads.predict_all([], boxes, valid, 6)
    for n in range(2):
        there, num_keys = valid[n].nonzero().squeeze(1), int(valid[n, :6].sum())
        embedding = pair_embedding(boxes[n, there], num_keys, "paper")
        x = head.fc6(heads.box_roi_pool([], torch.cat([boxes[n, :, :1], boxes[n]], 1)[there]))
        for i in (1, 2):
            x = x + relation(x, embedding, p, HEADS, index=i)
        x = head.fc7(x.relu())
        x = (x + relation(x, embedding, p, HEADS, index=3)).relu()
        assert_same(features[n, there], x, "features")
        assert_same(logits[n, there], heads.box_predictor.cls_score(x), "scores")
        assert_same(deltas[n, there], heads.box_predictor.bbox_pred(x), "deltas")


def test_constants() -> None:
    """Of the published head: 16 relations with queries and keys of 64, 3.15 million parameters a module."""
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


def test_ground_truth_tells_proposals_nothing() -> None:
    """What is known of proposals in training is what is known of them at inference."""
    heads, proposals = heads_on_coordinates(), some_proposals()
    targets = batch()[2]
    seen: list[Tensor] = []
    heads.box_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    heads.losses([], proposals, SIZES, targets)
    heads.detect([], proposals, SIZES)
    in_training, at_inference = seen
    assert in_training.shape[1] == 9 and at_inference.shape[1] == 6
    # Products of 9 rows and of 6 are rounded differently; what the objects would tell is 1e-3 and more, see below.
    torch.testing.assert_close(in_training[:, :6][proposals.valid], at_inference[proposals.valid], rtol=1e-4, atol=1e-5)
    # The other way round it does: an object's own region sees the proposals.
    moved = proposals._replace(boxes=proposals.boxes + 5 * proposals.valid[..., None])
    heads.losses([], moved, SIZES, targets)
    assert (seen[2][:, 6] - in_training[:, 6]).abs().max() > 1e-3
    # And so would proposals see the object, were it not for the mask.
    boxes, valid = torch.cat([proposals.boxes, targets.boxes], 1), torch.cat([proposals.valid, targets.labels >= 0], 1)
    unmasked = heads.predict_all([], boxes, valid, 9)[0]
    assert (unmasked[:, :6] - at_inference)[proposals.valid].abs().max() > 1e-3


def test_padding_does_not_matter() -> None:
    """Neither how much there is nor what its numbers are, for losses and detections."""
    heads, few = heads_on_coordinates(), some_proposals()
    targets = batch()[2]
    padded = Proposals(*(torch.cat([x, x.new_zeros(2, 3, *x.shape[2:])], 1) for x in few))
    padded.boxes[~padded.valid] = math.nan
    losses, padded_losses = (heads.losses([], x, SIZES, targets) for x in (few, padded))
    for name, loss in losses.items():
        assert loss > 0
        torch.testing.assert_close(padded_losses[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    found, padded_found = (heads.detect([], x, SIZES) for x in (few, padded))
    num = found.labels.shape[1]  # of 6 proposals and 3 classes there are at most 18
    assert num == 18 and (found.labels >= 0).sum() > 5
    for x, y in zip(found[:3], padded_found[:3]):
        torch.testing.assert_close(x, y[:, :num], rtol=1e-4, atol=1e-4)
    assert (padded_found.labels[:, num:] == -1).all() and not padded_found.scores[:, num:].any()


# ---- Its twin ----


@pytest.mark.parametrize("num_samples", [1000, 3])
def test_without_relations_it_is_faster_rcnn(num_samples: int) -> None:
    """Of the same weights, but for the hardest regions being those that losses are of."""
    model = small(relations=(0, 0), duplicate_removal=False, num_samples=num_samples)
    twin = relops.models.faster_rcnn_fpn(
        3, backbone="resnet18-gn-16", channels=16, hidden=HIDDEN, sizes=(16, 32, 64, 128, 256)
    )
    state = model.state_dict()
    for kind in ("weight", "bias"):  # of every class the same deltas
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
        each = heads.region_losses(logits, deltas, samples, targets, None, heads.WEIGHTS)
        of_classes, of_boxes = (x.view(samples.classes.shape) for x in each)
        kept = []
        for n in range(2):
            there = (samples.classes[n] >= 0).nonzero().squeeze(1)
            kept.append(n * len(samples.classes[n]) + there[(of_classes + of_boxes)[n, there].argsort()[-num_samples:]])
        kept = torch.cat(kept)
        assert len(kept) == 6 if num_samples == 3 else len(kept) > 60
        expected_losses |= {"classes": of_classes.flatten()[kept].mean(), "boxes": of_boxes.flatten()[kept].mean()}
    assert losses.keys() == expected_losses.keys() and losses["boxes"] > 0
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-4, atol=1e-5, msg=name)


# ---- Duplicate removal ----


class Calls(TorchDispatchMode):
    """Names of the ops of this package that run."""

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
        ({}, 1),  # the RPN's
        ({"proposal_nms": None, "duplicate_removal": False}, 1),  # of classes
    ],
    ids=["none", "proposals", "classes"],
)
def test_nothing_is_suppressed(name: str, options: dict, count: int) -> None:
    model = small(name, **options).eval()
    images, sizes, targets = batch()
    with torch.no_grad(), Calls() as calls:
        found = model(images, sizes)
    assert (found.labels >= 0).any()
    assert sum("nms" in x for x in calls.names) == count
    assert any("relation_attention" in x for x in calls.names)
    with torch.no_grad(), Calls() as calls:
        model.train()(images, sizes, targets)
    assert sum("nms" in x for x in calls.names) == (0 if options.get("proposal_nms", 0.7) is None else 1)


def test_proposals_without_suppression() -> None:
    """The best by score of all levels, without what is no box or has no score."""
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
    """Every class of every proposal, by final score: s0 times the mean of s1, of those with s0 above .01."""
    heads = small(relations=(0, 0)).roi_heads
    heads.box_roi_pool = OfCoordinates(heads.box_head.fc6.in_features)
    boxes = torch.tensor([[[10.0, 10, 50, 50], [10, 10, 50, 50], [60, 10, 90, 50], [0, 0, 0, 0]]])
    probabilities = torch.tensor([[[0.1, 0.8, 0.095, 0.005], [0.2, 0.7, 0.05, 0.05], [0.39, 0.009, 0.6, 0.001]]])
    logits, deltas = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    logits[:, :3], deltas[0, 2, 0] = probabilities.log(), 10 * 0.5  # half a width to the right, and clipped
    heads.box_predictor = Given(logits, deltas)
    with torch.no_grad():
        heads.duplicate_removal.logit.weight.zero_()
        heads.duplicate_removal.logit.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).logit())
    heads.max_detections = 6
    valid = torch.tensor([[1, 1, 1, 0]]).bool()
    found = heads.detect([], Proposals(boxes, valid.float(), valid), torch.tensor([[60.0, 80]]))
    # Both copies of the first box are kept: that one is a duplicate is for the network to say.
    assert found.labels[0].tolist() in ([0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 1])
    torch.testing.assert_close(found.scores[0], 0.3 * torch.tensor([0.8, 0.7, 0.6, 0.095, 0.05, 0.05]))
    torch.testing.assert_close(
        found.boxes[0, :4], torch.tensor([[10.0, 10, 50, 50], [10, 10, 50, 50], [75, 10, 80, 50], [10, 10, 50, 50]])
    )
    heads.max_detections = 100
    found = heads.detect([], Proposals(boxes, valid.float(), valid), torch.tensor([[60.0, 80]]))
    assert found.labels.shape == (1, 12) and (found.labels >= 0).sum() == 6
    assert not found.boxes[0, 6:].any() and not found.scores[0, 6:].any()


def test_duplicate_removal_teaches_the_rest() -> None:
    """Class scores through s0, features and backbone, but neither boxes nor the RPN."""
    model = small()
    model(*batch())["duplicates"].backward()
    heads = model.roi_heads
    assert heads.box_predictor.cls_score.weight.grad.any()
    assert heads.box_head.fc6.weight.grad.any() and model.backbone.body.conv1.weight.grad.any()
    assert heads.box_predictor.bbox_pred.weight.grad is None
    assert all(p.grad is None for p in model.rpn.parameters())


def test_duplicate_removal_learns_from_refined_proposals_alone() -> None:
    """Not from the regions of ground truth: their class scores get no gradient by its loss."""
    heads, proposals = heads_on_coordinates(), some_proposals()
    targets = batch()[2]
    seen: list[tuple] = []
    heads.duplicate_removal.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs))
    logits, deltas = torch.randn(2, 9, 4, requires_grad=True), 0.5 * torch.randn(2, 9, 4)
    heads.box_predictor = Given(logits, deltas)
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


def test_adamw_lets_queries_and_keys_learn_at_a_tenth_of_the_rate() -> None:
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
