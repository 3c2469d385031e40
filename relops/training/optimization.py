"""Optimizers, learning rate schedules and weight averages."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from relops.models.detectors.base import BaseDetector
from relops.nn.deform_conv2d import DeformConvWithOffsets
from relops.training.errors import UsageError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step")


def make_optimizer(
    model: nn.Module,
    kind: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    backbone_lr: float,
    slower: Sequence[str] = (),
) -> torch.optim.Optimizer:
    """Create an optimizer for the parameters that require a gradient.

    The learning rate of the offset convolutions of modulated deformable convolutions is multiplied by 0.1, as in
    Deformable ConvNets v2 (https://arxiv.org/abs/1811.11168). That of deformable convolutions without masks is
    multiplied by 0.1 only if `kind` is "adamw".

    Args:
        model: the model.
        kind: "sgd" or "adamw".
        lr: the learning rate.
        weight_decay: the weight decay of all parameters except vectors (biases and scales).
        momentum: the momentum of sgd.
        backbone_lr: the factor by which the learning rate of the backbone is multiplied. The network of the backbone is
            the module named `body`.
        slower: names of modules whose learning rate is multiplied by 0.1 if `kind` is "adamw". The first steps of adamw
            would otherwise be too large, because their size does not depend on the size of the gradient.

    Raises:
        UsageError: If no parameter requires a gradient.
    """
    slowed: set[Tensor] = set()
    for name, module in model.named_modules():
        if kind == "adamw" and name.split(".")[-1] in slower:
            slowed.update(module.parameters())
        if isinstance(module, DeformConvWithOffsets) and (kind == "adamw" or module.modulated):
            slowed.update(module.conv_offset.parameters())
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = lr * (backbone_lr if "body" in name.split(".") else 1.0) * (0.1 if parameter in slowed else 1.0)
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise UsageError("the model must have parameters that require a gradient, got none")
    parameters = [
        {"params": group, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), group in groups.items()
    ]
    return torch.optim.AdamW(parameters) if kind == "adamw" else torch.optim.SGD(parameters, momentum=momentum)


def lr_factor(kind: str, iteration: int, total: int, warmup: int, milestones: Sequence[float]) -> float:
    """Return the factor by which the learning rate is multiplied in iteration number `iteration` of `total`.

    The factor rises linearly in the first `warmup` iterations. For "cosine", it is also multiplied by half a cosine
    wave, which falls from 1 to 0 over the run. For "step", the factor is divided by 10 at each milestone (a fraction
    of the run). The factor does not depend on earlier iterations, so a checkpoint need not store a schedule state.
    """
    rise = min(1.0, (iteration + 1) / (warmup + 1))
    progress = iteration / total
    if kind == "cosine":
        return rise * 0.5 * (1.0 + math.cos(math.pi * progress))
    return rise * 0.1 ** sum(progress >= milestone for milestone in milestones)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class WeightAverage:
    """An exponential moving average of the weights and buffers of a model.

    The first updates use a smaller decay, so that the initial weights do not dominate the average.

    Args:
        model: the model, which is copied.
        decay: the weight of the previous average in each update.

    Attributes:
        model: the copy that holds the averages.
    """

    def __init__(self, model: BaseDetector, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Update the average with the weights of `model`. `steps` is the number of earlier updates."""
        weight = 1.0 - min(self.decay, (1 + steps) / (10 + steps))
        averages, weights = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in weights.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in floating], [weights[name] for name in floating], weight)
        for name in weights.keys() - floating:
            averages[name].copy_(weights[name])
