"""Benchmarks of nn.DuplicateRemoval on one image with 300 objects, 80 classes and the 100 best objects of each class.

One row processes all objects, and another only those with a score above 0.01. relops and PyTorch run the same module,
which calls `relops.relation_attention` or its twin. The boxes are the proposals of proposals.py, and the score of a
proposal is the probability of its own class. Of the remaining probability, 9/10 go to the background and 1/10 to the
other classes, in proportion to exp(2 x) with a normal variable x per class. As a result, a few hundred pairs of an
object and a class have a score above 0.01.

For comparison, greedy suppression with one call of `relops.nms` per class is also timed. This suppression
computes different scores and needs much less arithmetic.
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
    """Return random inputs and the weights, so that the module computes in float64 if all of them are cast."""
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
        candidates = (scores[0, :, c] > threshold).nonzero()[:, 0]
        kept = candidates[relops.nms(boxes[0, candidates], scores[0, candidates, c], 0.5)]
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
            # No outputs are compared, because suppression returns other scores. The row above verifies the module.
            row(
                shape=f"{shape}, against nms",
                peers={"relops.nms of each class": functools.partial(greedy, threshold)},
                comparable=lambda outputs: (),
            ),
        ]
    return rows
