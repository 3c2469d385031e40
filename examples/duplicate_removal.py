"""Learn to remove duplicate detections in crowded scenes, and compare the result with non-maximum suppression."""

import torch
from torch import Tensor

import relops

torch.manual_seed(0)
OBJECTS, COPIES, CHANNELS = 8, 6, 32  # objects per scene, detections per object, feature width


def scenes(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features, scores and boxes of the detections in `count` scenes, and the boxes of the objects.

    Two pairs of objects overlap with an IoU of about 0.8, and their detections are precise. The other four objects are
    far apart, and their detections are imprecise. Therefore no IoU threshold separates duplicates from neighbors. The
    features separate them, because all detections of an object have similar features.
    """
    x = torch.tensor([0.0, 8, 100, 108, 200, 300, 400, 500]) + 4 * torch.rand(count, OBJECTS)
    objects = torch.stack([x, torch.zeros_like(x), x + 60, torch.full_like(x, 100.0)], -1)
    spread = torch.tensor([1.0, 1, 1, 1, 7, 7, 7, 7]).repeat_interleave(COPIES)[:, None]
    boxes = objects.repeat_interleave(COPIES, 1) + spread * torch.randn(count, OBJECTS * COPIES, 4)
    features = torch.randn(count, OBJECTS, CHANNELS).repeat_interleave(COPIES, 1)
    return features + 0.1 * torch.randn_like(features), 0.5 + 0.5 * torch.rand(boxes[..., :1].shape), boxes, objects


def found(scores: Tensor) -> float:
    """Return the fraction of objects that have a detection among the `OBJECTS` best detections of their scene."""
    owners = scores.topk(OBJECTS, 1).indices // COPIES
    return torch.zeros(len(scores), OBJECTS).scatter_(1, owners, 1.0).mean().item()


removal = relops.nn.DuplicateRemoval(CHANNELS, hidden_dim=64, heads=4, head_dim=16, rank_dim=64, thresholds=(0.5,))
slow = [*removal.relation.query.parameters(), *removal.relation.key.parameters()]  # see relops.nn.ObjectRelation
others = [parameter for parameter in removal.parameters() if all(parameter is not x for x in slow)]
optimizer = torch.optim.AdamW([{"params": slow, "lr": 1e-3}, {"params": others, "lr": 1e-2}])
for step in range(1501):
    features, scores, boxes, objects = scenes(16)
    loss = removal.loss(removal(features, scores, boxes), objects, torch.zeros(16, OBJECTS, dtype=torch.int64))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 300 == 0:
        print(f"step {step:4}  loss {loss.item():.3f}")

features, scores, boxes, _ = scenes(200)
for threshold in (0.5, 0.7, 0.9):
    keep, count = relops.nms_padded(boxes, scores[..., 0], threshold, OBJECTS)
    kept = torch.zeros(200, OBJECTS * COPIES + 1).scatter_(1, keep % (OBJECTS * COPIES + 1), 1.0)[:, :-1]
    print(f"nms with a threshold of {threshold}: {found(scores[..., 0] * kept):.1%} of the objects found")
with torch.no_grad():
    print(f"learned duplicate removal: {found(removal(features, scores, boxes).final_scores[..., 0]):.1%}")
