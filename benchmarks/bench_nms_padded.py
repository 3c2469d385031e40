"""Benchmarks of nms_padded: boxes of proposals.py for two images, and for eight images with 80 classes.

torchvision has no such op, so the peer calls torchvision's batched_nms for each image and pads the results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, Bench
from benchmarks.proposals import images
from benchmarks.regions import torchvision_ops
from relops import reference


def image_by_image(
    batched_nms: Callable[..., Tensor],
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    idxs: Tensor,
    score_threshold: float,
) -> tuple[Tensor, Tensor]:
    keep = idxs.new_full((len(boxes), max_output), -1)
    count = idxs.new_zeros(len(boxes))
    for b in range(len(boxes)):
        candidates = (scores[b] > score_threshold).nonzero()[:, 0]
        kept = batched_nms(boxes[b, candidates], scores[b, candidates], idxs[b, candidates], iou_threshold)[:max_output]
        keep[b, : len(kept)] = candidates[kept]
        count[b] = len(kept)
    return keep, count


def row(
    name: str, B: int, K: int, classes: int, iou_threshold: float, max_output: int, device: str, **options: object
) -> Bench:
    def make_inputs(generator: torch.Generator) -> tuple:
        boxes, scores, idxs = images(B, K, generator, classes)
        return boxes, scores, iou_threshold, max_output, idxs, 0.05

    theirs = torchvision_ops()
    return Bench(
        op="nms_padded",
        shape=f"{name} {B}x{K} C={classes} IoU {iou_threshold} to {max_output}",
        dtype=torch.float32,
        device=device,
        direction=FORWARD,
        make_inputs=make_inputs,
        relops=relops.nms_padded,
        pytorch=reference.nms_padded,
        peers={} if theirs is None else {"torchvision loop": functools.partial(image_by_image, theirs.batched_nms)},
        selection=True,
        **options,
    )


def benches(device: str) -> list[Bench]:
    return [
        row("RPN", 2, 2000, 1, 0.7, 1000, device, quick=True),
        row("detections", 8, 5000, 80, 0.5, 300, device),
    ]
