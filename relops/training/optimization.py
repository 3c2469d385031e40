"""Optimizers, learning rates and averages of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from relops.models.detectors.base import BaseDetector
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
    """Make an optimizer of the parameters that require a gradient.

    Vectors, which are biases and scales, do not decay. Parameters of a `body`, the network that a backbone is made of,
    have a learning rate of lr * backbone_lr. With adamw, whose first steps are as large whatever the gradient, those of
    modules named in `slower` have a tenth of lr.
    """
    slowed = set(slower) if kind == "adamw" else set()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            modules = name.split(".")
            rate = lr * (backbone_lr if "body" in modules else 0.1 if slowed.intersection(modules) else 1.0)
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
    """Return the factor of the learning rate in the `iteration`-th iteration of `total`.

    It rises linearly over the first `warmup` iterations, and falls by half a cosine to 0, or to a tenth after each
    milestone. As a function of the iteration alone it has no state to store.
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
    """An exponential moving average of a model's weights and buffers, in `model`, which is a copy.

    The first averages are over fewer steps than `decay` stands for, so that the initial weights do not linger.
    """

    def __init__(self, model: BaseDetector, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Take a step into account, before which there were `steps`."""
        weight = 1.0 - min(self.decay, (1 + steps) / (10 + steps))
        averages, weights = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in weights.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in floating], [weights[name] for name in floating], weight)
        for name in weights.keys() - floating:
            averages[name].copy_(weights[name])
