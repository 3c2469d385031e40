"""nn.DuplicateRemoval of one image: 300 objects, 80 classes, the 100 best of each; all, and those of a score over 0.01.

The module is the same on either side, with `relops.relation_attention` or its twin in it. Boxes are those of
proposals.py. An object has its score in its own class; of the rest, 9/10 go to the background, and 1/10 to the other
classes, in proportion to exp(2 x) with a normal x, so that a few hundred pairs of object and class are over 0.01.

Greedy suppression, one call of `relops.nms` a class, is timed beside for information: it computes something else, and a
lot less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, Bench
from benchmarks.proposals import images
from relops import reference

K, CLASSES, CHANNELS = 300, 80, 1024


@functools.cache
def removal(score_threshold: float, device: str) -> relops.nn.DuplicateRemoval:
    torch.manual_seed(0)
    return relops.nn.DuplicateRemoval(score_threshold=score_threshold).to(device)


def make_inputs(module: Callable[[], torch.nn.Module], generator: torch.Generator) -> tuple:
    """Weights are inputs, so that float64 is a matter of casting."""
    boxes, own, classes = images(1, K, generator, CLASSES)
    features = torch.randn(1, K, CHANNELS, generator=generator, device=boxes.device).relu()
    others = (2 * torch.randn(1, K, CLASSES, generator=generator, device=boxes.device)).softmax(-1)
    scores = (0.1 * (1 - own[..., None]) * others).scatter(-1, classes[..., None], own[..., None])
    return (features, scores, boxes, *(p.detach() for p in module().parameters()))


def learned(
    module: Callable[[], torch.nn.Module],
    attention: Callable,
    features: Tensor,
    scores: Tensor,
    boxes: Tensor,
    *weights,
) -> Tensor:
    names = [name for name, _ in module().named_parameters()]
    with mock.patch("relops.nn.object_relation.relation_attention", attention):
        arguments = (features, scores, boxes)
        return torch.func.functional_call(module(), dict(zip(names, weights)), arguments).final_scores


def greedy(threshold: float, features: Tensor, scores: Tensor, boxes: Tensor, *weights: Tensor) -> Tensor:
    final = torch.zeros_like(scores)
    for c in range(CLASSES):
        of_class = (scores[0, :, c] > threshold).nonzero()[:, 0]
        kept = of_class[relops.nms(boxes[0, of_class], scores[0, of_class, c], 0.5)]
        final[0, kept, c] = scores[0, kept, c]
    return final


def benches(device: str) -> list[Bench]:
    rows = []
    for name, threshold in (("all", 0.0), ("over 0.01", 0.01)):
        module = functools.partial(removal, threshold, device)
        row = functools.partial(
            Bench,
            op="duplicate_removal",
            dtype=torch.float32,
            device=device,
            direction=FORWARD,
            make_inputs=functools.partial(make_inputs, module),
            relops=functools.partial(learned, module, relops.relation_attention),
            pytorch=functools.partial(learned, module, reference.relation_attention),
        )
        shape = f"{name} 1x{K} C={CLASSES} first 100"
        rows += [
            row(shape=shape, quick=threshold > 0),
            # Nothing is compared here: the row above has verified the network, and suppression gives other scores.
            row(
                shape=f"{shape}, beside nms",
                peers={"relops.nms of each class": functools.partial(greedy, threshold)},
                comparable=lambda outputs: (),
            ),
        ]
    return rows
