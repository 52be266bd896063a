"""Optimisers, learning-rate schedules as functions of the step, and the weight average."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnetlab.config import OptimConfig

LEAST_AFTER_WARMUP = 5
"""A warm-up takes at most one part in so many of a run, so that a recipe also suits a run of very few epochs."""
LEAST_BEYOND_AVERAGE = 10
"""The same for the time constant of the weight average: a longer one would still hold the first, random weights."""


def build(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimiser. Its learning rate is set before every step by `learning_rate`."""
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Split the parameters into those that decay and those that do not: biases and norms, where the recipe says so."""
    decay = [p for p in model.parameters() if p.requires_grad and (p.ndim > 1 or config.decay_norms)]
    rest = [p for p in model.parameters() if p.requires_grad and not (p.ndim > 1 or config.decay_norms)]
    groups: list[dict[str, object]] = [{"params": decay, "weight_decay": config.weight_decay}]
    return groups + ([{"params": rest, "weight_decay": 0.0}] if rest else [])


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step alone, so that a resume cannot lose its place."""

    config: OptimConfig
    steps: int
    """Optimiser steps in the whole run."""
    steps_per_epoch: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of step ``step``, from 0."""
        c = self.config
        warmup = min(round(c.warmup_epochs * self.steps_per_epoch), self.steps // LEAST_AFTER_WARMUP)
        if step < warmup:
            if c.warmup_shape == "constant":
                return c.lr * c.warmup_factor
            return c.lr * (c.warmup_factor + (1 - c.warmup_factor) * (step + 1) / warmup)
        if c.schedule == "step":  # milestones are shares of the run, warm-up included (paper, section 4.2)
            return c.lr * c.gamma ** sum(step >= round(m * self.steps) for m in c.milestones)
        progress = (step - warmup) / max(1, self.steps - warmup)
        if c.schedule == "linear":
            return c.lr * (1 - progress)
        if c.schedule == "cosine":
            return c.lr * (1 + math.cos(math.pi * progress)) / 2
        return c.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def average(model: nn.Module, epochs: float, schedule: Schedule) -> AveragedModel:
    """Start an exponential moving average of weights and batch-norm statistics.

    Args:
        model: The network that trains.
        epochs: The average's time constant; its decay a step is ``exp(-1 / (epochs * steps in an epoch))``.
        schedule: How long the run is; the time constant is at most a tenth of it.
    """
    constant = min(epochs * schedule.steps_per_epoch, schedule.steps / LEAST_BEYOND_AVERAGE)
    decay = math.exp(-1 / max(1.0, constant))
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
