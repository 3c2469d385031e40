"""Tests of nn.DuplicateRemoval: comparison with the released code, and a test that the module learns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from conftest import needs_cuda
from helpers.relation_networks import (
    assert_same,
    correct_ranks,
    random_parameters,
    removal_loss,
    removal_shapes,
    removal_state,
    remove_duplicates,
)
from torch import Tensor

import relops

CHANNELS, HEADS, THRESHOLDS = 10, 3, (0.5, 0.7)
SHAPES = removal_shapes(CHANNELS, rank_dim=8, hidden=12, heads=HEADS, head_dim=5, thresholds=len(THRESHOLDS))


def small(device: str, p: dict[str, Tensor] | None = None, **options: object) -> relops.nn.DuplicateRemoval:
    """Build a small module with random parameters, all of which affect the result visibly."""
    options = {"first_n": 6, "score_threshold": 0.2} | options
    module = relops.nn.DuplicateRemoval(
        CHANNELS, thresholds=THRESHOLDS, rank_dim=8, hidden_dim=12, heads=HEADS, head_dim=5, **options
    ).double()
    module.load_state_dict(removal_state(random_parameters(SHAPES) if p is None else p))
    return module.to(device)


def draw(B: int = 2, K: int = 11, C: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """Return features, scores and overlapping boxes. Many scores are equal, and some are below the threshold."""
    features = torch.randn(B, K, CHANNELS, dtype=dtype)
    scores = torch.randint(1, 10, (B, K, C)).to(dtype) / 10
    corners, sides = torch.rand(2, B, K, 2, dtype=dtype)
    boxes = torch.cat([30 * corners, 30 * corners + 40 + 20 * sides], -1)
    return [x.to(device) for x in (features, scores, boxes)]


def draw_objects(boxes: Tensor, G: int = 5, C: int = 4) -> tuple[Tensor, Tensor]:
    """Return objects of random classes, each close to one of the boxes. One object per image is padding."""
    gt_boxes = boxes[:, :G] + 4 * torch.randn_like(boxes[:, :G])
    labels = torch.randint(C, gt_boxes.shape[:2], device=boxes.device)
    labels[:, 1] = -1
    return gt_boxes, labels


def requiring_grad(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


# ---- The definition ----


@pytest.mark.parametrize("geometry", ["paper", "official"])
@pytest.mark.parametrize("per_class", [False, True], ids=["", "boxes per class"])
@pytest.mark.parametrize("options", [{}, {"first_n": 30, "score_threshold": 0.0}], ids=["pruned", "all"])
def test_released_parameters_give_the_released_result(
    geometry: str, per_class: bool, options: dict, device: str
) -> None:
    """Scores, the loss and all gradients agree."""
    B, C = 2, 4
    p = {name: x.requires_grad_() for name, x in random_parameters(SHAPES).items()}
    features, scores, boxes = draw(B, C=C)
    gt_boxes, gt_labels = draw_objects(boxes)
    if per_class:
        boxes = boxes[:, :, None] + 3 * torch.randn(*boxes.shape[:2], C, 4, dtype=boxes.dtype)
    class_boxes = boxes if per_class else boxes[:, :, None].expand(-1, -1, C, -1)
    features, scores = requiring_grad(features, scores)
    removal = small(device, {name: x.detach() for name, x in p.items()}, geometry=geometry, **options)
    x, s = requiring_grad(features.to(device), scores.to(device))
    detections = removal(x, s, boxes.to(device))

    expected_loss, found = torch.zeros((), dtype=torch.float64), 0
    for b in range(B):
        slow = remove_duplicates(
            features[b], scores[b], class_boxes[b], p, HEADS, removal.first_n, removal.score_threshold, geometry
        )
        for c, (best, s0, s1) in enumerate(slow):
            n = len(best)
            assert detections.indices[b, c].tolist() == best + [-1] * (detections.indices.shape[-1] - n)
            assert_same(detections.scores[b, c, :n], s0)
            assert_same(detections.logits[b, c, :n].sigmoid(), s1)
            assert_same(detections.boxes[b, c, :n], class_boxes[b, best, c])
            for padding in (detections.scores, detections.logits, detections.boxes):
                assert not padding[b, c, n:].any()
            final = torch.zeros(features.shape[1], dtype=torch.float64)
            final[best] = (s0[:, None] * s1).mean(1).detach()
            assert_same(detections.final_scores[b, :, c], final)

            objects = gt_boxes[b, gt_labels[b] == c].tolist()
            right = [correct_ranks(class_boxes[b, best, c].tolist(), objects, threshold) for threshold in THRESHOLDS]
            expected_loss = expected_loss + removal_loss(s0, s1, right, positive_weight=4.0)
            found += sum(map(len, right))
    assert found > 8
    expected_loss = expected_loss / (removal.first_n * len(THRESHOLDS)) / B
    expected_loss.backward()

    loss = removal.loss(detections, gt_boxes.to(device), gt_labels.to(device))
    loss.backward()
    assert_same(loss, expected_loss)
    assert_same(x.grad, features.grad, "features")
    assert_same(s.grad, scores.grad, "scores")
    assert scores.grad.any()
    for name, grad in removal_state({name: x.grad for name, x in p.items()}).items():
        if name == "relation.key.bias":  # zero up to rounding: this bias adds the same value to all logits of a query
            assert grad.abs().max() < 1e-12 > removal.relation.key.bias.grad.abs().max()
        else:
            assert_same(removal.get_parameter(name).grad, grad, name)


def test_initial_parameters_equal_the_released_code() -> None:
    released = random_parameters(removal_shapes(1024, rank_dim=1024, hidden=128, heads=16, head_dim=64, thresholds=5))
    removal = relops.nn.DuplicateRemoval()
    removal.load_state_dict(removal_state(released))
    removal.reset_parameters()
    for name, x in removal.state_dict().items():
        if name.endswith("weight"):
            assert x.mean().abs() < 0.002 and x.std().item() == pytest.approx(0.01, rel=0.1)
        else:
            constant = {"logit.bias": -3.0, "relation.geometry.bias": 0.1}.get(name, 0.0)
            assert torch.equal(x, torch.full_like(x, constant))


def test_boxes_receive_no_gradient(device: str) -> None:
    removal = small(device)
    features, scores, boxes = requiring_grad(*draw(device=device))
    detections = removal(features, scores, boxes)
    removal.loss(detections, *draw_objects(boxes.detach())).backward()
    assert boxes.grad is None and not detections.boxes.requires_grad
    assert features.grad.any() and scores.grad.any()
    assert detections.final_scores.requires_grad


# ---- Order and padding ----


def test_permuted_objects_have_permuted_final_scores(device: str) -> None:
    """All scores differ, because equal scores are ranked by index."""
    removal = small(device)
    features, _, boxes = draw(device=device)
    scores = torch.rand(2, 11, 4, dtype=torch.float64, device=device)
    order = torch.randperm(11, device=device)
    permuted = removal(features[:, order], scores[:, order], boxes[:, order]).final_scores
    assert_same(permuted, removal(features, scores, boxes).final_scores[:, order])


def test_equal_scores_are_ranked_by_index(device: str) -> None:
    features, scores, boxes = draw(1, 40, 2, device=device)
    indices = small(device, first_n=40)(features, torch.full_like(scores, 0.5), boxes).indices
    assert torch.equal(indices, torch.arange(40, device=device).expand(1, 2, 40))


def test_padding_is_ignored(device: str) -> None:
    """A padded image in a batch of two gives the same result as the image alone, whatever the padding contains."""
    removal = small(device)
    features, scores, boxes = draw(2, 9, device=device)
    unpadded = removal(features[:1, :5], scores[:1, :5], boxes[:1, :5])
    junk = torch.arange(9, device=device) >= torch.tensor([[5], [9]], device=device)
    features = features.masked_fill(junk[..., None], 1e6)
    scores = scores.masked_fill(junk[..., None], 1.0)
    batch = removal(features, scores, boxes.masked_fill(junk[..., None], -7.0), junk)
    n = unpadded.indices.shape[-1]
    for name, x, expected in zip(unpadded._fields, batch, unpadded):
        cut = x[:1, :5] if name == "final_scores" else x[:1, :, :n]
        assert_same(cut, expected, name)
    assert not batch.final_scores[0, 5:].any() and (batch.indices[0, :, n:] == -1).all()
    gt_boxes, gt_labels = draw_objects(boxes)
    together = removal.loss(batch, gt_boxes, gt_labels)
    one_by_one = [
        removal.loss(removal(*(x[b : b + 1] for x in (features, scores, boxes, junk))), gt_boxes[[b]], gt_labels[[b]])
        for b in range(2)
    ]
    assert_same(together, torch.stack(one_by_one).mean())


def test_invalid_scores_and_boxes_are_left_out(device: str) -> None:
    removal = small(device)
    features, scores, boxes = draw(1, 8, device=device)
    scores[0, 2, 1], boxes[0, 4, 3], boxes[0, 5, 0], boxes[0, 6, 2] = math.nan, math.inf, math.nan, -9.0
    features, scores = requiring_grad(features, scores)
    detections = removal(features, scores, boxes)
    assert not detections.final_scores[0, [4, 5, 6]].any() and not detections.final_scores[0, 2, 1]
    assert detections.final_scores.isfinite().all() and detections.final_scores.any()
    removal.loss(detections, *draw_objects(boxes[:, [0, 1, 2, 3, 7]])).backward()
    for x in (features, *removal.parameters()):
        assert x.grad.isfinite().all()


def test_classes_without_detections(device: str) -> None:
    """Test one class without detections between two others, and then only classes without detections."""
    removal = small(device)
    features, scores, boxes = draw(1, 7, 3, device=device)
    full = removal(features, scores, boxes)
    scores[..., 1] = 0.1
    detections = removal(features, scores, boxes)
    assert (detections.indices[:, 1] == -1).all() and not detections.final_scores[..., 1].any()
    for x, expected in zip(detections[1:], full[1:]):
        assert_same(x[:, [0, 2]], expected[:, [0, 2]])
    gt_boxes, gt_labels = boxes[:, :2], torch.tensor([[1, 1]], device=device)
    assert not removal.targets(detections, gt_boxes, gt_labels).any()

    empty = removal(features, torch.zeros_like(scores), boxes)
    assert not empty.final_scores.any() and (empty.indices == -1).all()
    loss = removal.loss(empty, gt_boxes, gt_labels)
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in removal.parameters())


def test_skipped_detections_cost_nothing_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The relation module batches classes that have similar numbers of detections, and skips empty classes."""
    removal = small("cpu", first_n=9)
    features, scores, boxes = draw(1, 9, 5)
    scores = torch.zeros_like(scores)
    for c, count in enumerate((0, 3, 9, 2, 0)):
        scores[0, -count or 9 :, c] = 0.9
    seen = []

    def recording_attention(query: Tensor, *arguments: Tensor, **options: object) -> Tensor:
        seen.append(query.shape[:2])
        return relops.relation_attention(query, *arguments, **options)

    monkeypatch.setattr("relops.nn.object_relation.relation_attention", recording_attention)
    detections = removal(features, scores, boxes)
    assert seen == [(2, 3), (1, 9)]
    assert (detections.indices >= 0).sum(-1).tolist() == [[0, 3, 9, 2, 0]]


@pytest.mark.parametrize(("B", "K", "C", "G"), [(2, 0, 3, 2), (0, 4, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0), (2, 2, 3, 1)])
def test_empty_and_short_inputs(B: int, K: int, C: int, G: int, device: str) -> None:
    removal = small(device)
    features, scores, boxes = draw(B, K, C, device=device)
    detections = removal(features, scores, boxes)
    n = min(K, 6)
    shapes = [(B, K, C), (B, C, n), (B, C, n, 4), (B, C, n), (B, C, n, 2)]
    assert [tuple(x.shape) for x in detections] == shapes
    gt_boxes = torch.rand(B, G, 4, dtype=torch.float64, device=device)
    loss = removal.loss(detections, gt_boxes, torch.zeros(B, G, dtype=torch.int64, device=device))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in removal.parameters())


# ---- Targets ----


def detections_of_one_class(
    boxes: list, scores: list[float], device: str
) -> relops.nn.duplicate_removal.RankedDetections:
    removal = small(device)
    features = torch.zeros(1, len(boxes), CHANNELS, dtype=torch.float64, device=device)
    scores = torch.tensor(scores, dtype=torch.float64, device=device)[None, :, None]
    return removal(features, scores, torch.tensor([boxes], dtype=torch.float64, device=device))


@pytest.mark.parametrize(
    ("boxes", "scores", "objects", "right"),
    [
        # Among the boxes that overlap the object enough, the one with the highest score is correct. The first box does
        # not reach the higher threshold.
        ([[0, 0, 10, 6], [0, 0, 10, 8], [0, 0, 10, 10]], [0.9, 0.8, 0.7], [[0, 0, 10, 10]], [[0], [1]]),
        # An IoU equal to the threshold is not enough.
        ([[0, 0, 10, 5]], [0.9], [[0, 0, 10, 10]], [[], []]),
        # The first box overlaps both objects but is matched only to the second object, with which its IoU is higher.
        ([[0, 0, 10, 10], [0, 0, 10, 7.5]], [0.9, 0.8], [[0, 0, 10, 6], [0, 0, 10, 9]], [[0], [0]]),
        # All boxes are matched to the first of two equal objects.
        ([[0, 0, 10, 10], [0, 0, 10, 9]], [0.9, 0.8], [[0, 0, 10, 10]] * 2, [[0], [0]]),
        # Among boxes with equal scores, the one with the lower index is correct.
        ([[0, 0, 10, 8], [0, 0, 10, 10]], [0.5, 0.5], [[0, 0, 10, 10]], [[0], [0]]),
        ([[0, 0, 10, 10]], [0.9], [[50, 50, 60, 60]], [[], []]),
    ],
)
def test_targets_by_hand(boxes: list, scores: list[float], objects: list, right: list, device: str) -> None:
    detections = detections_of_one_class(boxes, scores, device)
    removal = small(device)
    gt_boxes = torch.tensor([objects], dtype=torch.float64, device=device)
    targets = removal.targets(detections, gt_boxes, torch.zeros(1, len(objects), dtype=torch.int64, device=device))
    found = [targets[0, 0, :, e].nonzero()[:, 0].tolist() for e in range(2)]
    assert found == right
    other_class = removal.targets(detections, gt_boxes, torch.full((1, len(objects)), 1, device=device))
    assert not other_class.any()


def test_targets_equal_those_of_a_loop(device: str) -> None:
    removal = small(device, first_n=25)
    for seed in range(20):
        torch.manual_seed(seed)
        features, scores, boxes = draw(2, 30, 3, device=device)
        boxes, gt = boxes.round(), boxes[:, 10:18].round()
        gt_labels = torch.randint(-1, 3, (2, 8), device=device)
        detections = removal(features, scores, boxes)
        targets = removal.targets(detections, gt, gt_labels.int())
        for b, c in itertools.product(range(2), range(3)):
            n = (detections.indices[b, c] >= 0).sum()
            objects = gt[b, gt_labels[b] == c].tolist()
            for e, threshold in enumerate(THRESHOLDS):
                right = correct_ranks(detections.boxes[b, c, :n].tolist(), objects, threshold)
                assert set(targets[b, c, :, e].nonzero()[:, 0].tolist()) == right


# ---- The loss for extreme scores ----


def make_detections(scores: Tensor, logits: Tensor) -> relops.nn.duplicate_removal.RankedDetections:
    n = len(scores)
    boxes = torch.tensor([0.0, 0.0, 9.0, 9.0]).expand(1, 1, n, 4).to(scores.device)
    indices = torch.arange(n, device=scores.device)[None, None]
    return relops.nn.RankedDetections(scores[None, :, None], indices, boxes, scores[None, None], logits[None, None])


@pytest.mark.parametrize("right", [False, True], ids=["wrong", "right"])
def test_loss_is_finite_for_extreme_scores(right: bool, device: str) -> None:
    removal = small(device)
    far = 50 * torch.ones(1, 1, 4, device=device) * torch.tensor([0.0, 0.0, 1.0, 1.0], device=device)
    gt_boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0]]], device=device) if right else far
    gt_labels = torch.zeros(1, 1, dtype=torch.int64, device=device)
    edges = [0.0, 1e-45, 1e-30, 1e-8, 0.5, 1 - 2.0**-24, 1.0]
    for s0 in edges:
        for z in (-1e30, -1e4, -104.0, -17.0, 0.0, 17.0, 89.0, 1e4, 1e30):
            scores = torch.tensor([s0], device=device, requires_grad=True)
            logits = torch.tensor([[z, z]], device=device, requires_grad=True)
            loss = removal.loss(make_detections(scores, logits), gt_boxes, gt_labels)
            loss.backward()
            assert loss.isfinite() and loss >= 0
            assert scores.grad.abs() <= 4 * 2.0**23 / removal.first_n
            assert (logits.grad.abs() <= 4 / (2 * removal.first_n)).all()


def test_loss_is_accurate_for_extreme_scores(device: str) -> None:
    """Compare the float32 loss with its definition in float64.

    Let s0 and s1 come as close to 0 and 1 as float32 scores and logits allow: 1 - s0 * s1, if computed directly, would
    be zero or have no correct digit. The bounds of s0 are left out, because the derivative of torch.clamp at its bounds
    is 1 up to torch 2.13 and 0 from 2.14 on.
    """
    removal = small(device)
    gt_boxes, gt_labels = torch.zeros(1, 0, 4, device=device), torch.zeros(1, 0, dtype=torch.int64, device=device)
    for s0, z in itertools.product((2.0**-22, 0.01, 0.5, 0.999, 1 - 2.0**-20), (-20.0, -3.0, 0.0, 9.0, 16.0, 30.0)):
        wide = torch.tensor([s0, z]).double().requires_grad_()
        exact = -(((1 - wide[0]) + wide[0] / (1 + wide[1].exp())).log()) / removal.first_n
        exact.backward()
        scores = torch.tensor([s0], device=device, requires_grad=True)
        logits = torch.full((1, 2), z, device=device, requires_grad=True)
        loss = removal.loss(make_detections(scores, logits), gt_boxes, gt_labels)
        loss.backward()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6, abs=1e-7)
        assert scores.grad.item() == pytest.approx(wide.grad[0].item(), rel=1e-5, abs=1e-7)
        assert logits.grad.sum().item() == pytest.approx(wide.grad[1].item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype, device: str) -> None:
    """Outputs are float32.

    The loss is close to that of float32 scores, although 16 bits round some scores to 0 or 1.
    """
    removal = small(device, score_threshold=0.0).float()
    features, _, boxes = draw(dtype=torch.float32, device=device)
    confident = (80 * torch.randn(2, 11, 5, device=device)).softmax(-1)[..., 1:].to(dtype)
    assert (confident == 1).any() and (confident == 0).any()
    gt_boxes, gt_labels = draw_objects(boxes)
    exact = removal.loss(removal(features, confident.float(), boxes), gt_boxes, gt_labels)
    features, scores = requiring_grad(features, confident)
    with torch.autocast(device, dtype):
        detections = removal(features, scores, boxes)
        loss = removal.loss(detections, gt_boxes, gt_labels)
    assert detections.final_scores.dtype == detections.logits.dtype == loss.dtype == torch.float32
    loss.backward()
    for x in (features, scores, *removal.parameters()):
        assert x.grad.isfinite().all()
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)


# ---- Compilation and synchronization ----


def test_compiles(fresh_compiler: None, device: str) -> None:
    removal = small(device)
    features, scores, boxes = draw(device=device)
    mask = torch.rand(2, 11, device=device) < 0.2
    gt_boxes, gt_labels = draw_objects(boxes)

    def step(features: Tensor, scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        detections = removal(features, scores, boxes, mask)
        return detections.final_scores, removal.loss(detections, gt_boxes, gt_labels)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        removal.zero_grad()
        x, s = requiring_grad(features, scores)
        final, loss = function(x, s, boxes)
        loss.backward()
        results.append([final.detach(), loss.detach(), x.grad, s.grad, *(p.grad.clone() for p in removal.parameters())])
    for eager, other in zip(*results):
        torch.testing.assert_close(other, eager, rtol=1e-9, atol=1e-12)


@needs_cuda
def test_no_synchronization() -> None:
    removal = small("cuda")
    features, scores, boxes = draw(device="cuda")
    gt_boxes, gt_labels = draw_objects(boxes)
    features, scores = requiring_grad(features, scores)
    torch.cuda.set_sync_debug_mode("error")
    try:
        removal.loss(removal(features, scores, boxes), gt_boxes, gt_labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Learning ----

G, DUPLICATES = 4, 4


def scenes(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return scenes with objects of two classes. Each object is detected DUPLICATES times near its position, with
    random scores. The features of a box are its coordinates and noise."""
    labels = torch.randint(2, (count, G), generator=generator)
    centers, sides = torch.rand(2, count, G, 2, generator=generator)
    centers, sides = 20 + 160 * centers, 30 + 50 * sides
    owner = torch.arange(G).repeat_interleave(DUPLICATES)[torch.randperm(G * DUPLICATES, generator=generator)]
    noise = 0.06 * torch.randn(count, G * DUPLICATES, 4, generator=generator)
    box_centers = centers[:, owner] + noise[..., :2] * sides[:, owner]
    box_sides = sides[:, owner] * noise[..., 2:].exp()
    boxes = torch.cat([box_centers - box_sides / 2, box_centers + box_sides / 2], -1)
    score = 0.3 + 0.65 * torch.rand(count, G * DUPLICATES, 1, generator=generator)
    return {
        "features": torch.cat([boxes / 200, torch.randn(boxes.shape, generator=generator)], -1),
        "scores": torch.full((*score.shape[:2], 2), 0.005).scatter(-1, labels[:, owner, None], score),
        "boxes": boxes,
        "gt_boxes": torch.cat([centers - sides / 2, centers + sides / 2], -1),
        "gt_labels": labels,
        "owner": owner,
    }


def kept_once(kept: Tensor, owner: Tensor) -> float:
    """Return the fraction of objects for which exactly one box is kept."""
    return ((kept.float() @ torch.nn.functional.one_hot(owner, G).float()) == 1).float().mean().item()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread. For such small tensors, several threads would mostly wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_learns_to_remove_duplicates(one_thread: None) -> None:
    removal = relops.nn.DuplicateRemoval(
        8, first_n=16, thresholds=(0.5,), positive_weight=1.0, rank_dim=32, hidden_dim=32, heads=8, head_dim=8
    )
    with torch.no_grad():  # the released initialization is meant for layers 10 times as wide
        for name, p in removal.named_parameters():
            if name.endswith("weight"):
                p.mul_(10)
    generator = torch.Generator().manual_seed(0)
    test = scenes(128, generator)
    best_scores = test["scores"].amax(-1)

    def quality() -> float:
        with torch.no_grad():
            final = removal(test["features"], test["scores"], test["boxes"]).final_scores.amax(-1)
        return kept_once(final > 0.5 * best_scores, test["owner"])

    assert quality() < 0.1
    optimizer = torch.optim.Adam(removal.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    for _ in range(300):
        batch = scenes(16, generator)
        detections = removal(batch["features"], batch["scores"], batch["boxes"])
        loss = removal.loss(detections, batch["gt_boxes"], batch["gt_labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # If boxes are selected by a threshold on s0 alone, fewer than half of the objects keep exactly one box.
    assert max(kept_once(best_scores > t, test["owner"]) for t in torch.linspace(0.3, 0.95, 40)) < 0.5
    assert quality() > 0.9


# ---- Bad input ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": None}, TypeError, "features must be a Tensor, got NoneType"),
        ({"features": torch.zeros(2, 3, 7)}, ValueError, r"features must be .* with 10 channels, got shape"),
        ({"scores": torch.zeros(2, 3).long()}, TypeError, "scores must be float64.*got torch.int64"),
        ({"scores": torch.zeros(2, 4, 5)}, ValueError, r"scores must be \[B,K,C\] = \[2,3,C\], got shape \[2, 4, 5\]"),
        ({"boxes": torch.zeros(2, 3, 5)}, ValueError, r"boxes must be .*\[2,3,4\] or .*\[2,3,5,4\], got shape"),
        ({"boxes": torch.zeros(2, 3, 4, 4)}, ValueError, r"boxes must be .*got shape \[2, 3, 4, 4\]"),
        ({"padding_mask": torch.zeros(2, 3)}, TypeError, "padding_mask must be bool, got torch.float32"),
        ({"padding_mask": torch.zeros(2, 4) > 0}, ValueError, r"padding_mask must be \[B,K\] = \[2,3\], got shape"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    inputs = {"features": torch.zeros(2, 3, 10), "scores": torch.zeros(2, 3, 5), "boxes": torch.zeros(2, 3, 4)}
    with pytest.raises(error, match=f"relops.nn.DuplicateRemoval: {message}"):
        small("cpu").float()(**inputs | change)


@pytest.mark.parametrize(
    ("gt_boxes", "gt_labels", "error", "message"),
    [
        (torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), ValueError, r"gt_boxes must be \[B,G,4\] = \[2,G,4\], got"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3).long(), ValueError, r"gt_boxes must be .*got shape \[1, 3, 4\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), TypeError, "gt_labels must be of an integer dtype, got"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4).long(), ValueError, r"gt_labels must be \[B,G\] = \[2,3\], got shape"),
    ],
)
def test_bad_ground_truth(gt_boxes: Tensor, gt_labels: Tensor, error: type[Exception], message: str) -> None:
    removal = small("cpu")
    detections = removal(*draw())
    with pytest.raises(error, match=f"relops.nn.DuplicateRemoval: {message}"):
        removal.loss(detections, gt_boxes, gt_labels)


def test_repr_shows_the_options() -> None:
    assert "first_n=6, thresholds=(0.5, 0.7), score_threshold=0.2" in repr(small("cpu"))
