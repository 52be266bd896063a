"""What each part of a network costs: its output's shape, parameters, multiply-adds, and share of a forward pass."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from resnetlab.bundle import Bundle
from resnetlab.models.complexity import count_parts
from resnetlab.norms import NativeBatchNorm2d
from resnetlab.report.records import Stage
from resnetlab.runtime import Runtime

PASSES, BATCH, PIXELS = 5, 32, 32 * 224 * 224
"""Timed passes (the median counts), images in one, and pixels in one at most."""


def stages(bundle: Bundle, runtime: Runtime) -> tuple[Stage, ...]:
    """Measure the parts of a network in the order in which they run; parts that do nothing are left out."""
    model = runtime.place(bundle.model)
    size, channels = bundle.card.preprocess.size, bundle.card.preprocess.channels
    parts = dict(_parts(model))
    shapes: dict[str, tuple[int, ...]] = {}
    macs = count_parts(model, size, parts)
    images = torch.zeros(max(1, min(BATCH, PIXELS // size**2)), channels, size, size, device=runtime.device)
    images = images.contiguous(memory_format=torch.channels_last)
    seconds = {name: [0.0] * PASSES for name in parts}
    with torch.inference_mode(), ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_hook(_shape(shapes, name)).remove)
        model(images)
    for run in range(PASSES):
        with torch.inference_mode(), ExitStack() as hooks:
            for name, part in parts.items():
                _clock(part, runtime, seconds[name], run, hooks)
            model(images)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    total = max(sum(medians.values()), 1e-12)
    return tuple(
        Stage(
            name=name,
            kind=_kind(part),
            shape=shapes[name],
            parameters=sum(p.numel() for p in part.parameters()),
            macs=macs[name],
            share=medians[name] / total,
        )
        for name, part in ((name, parts[name]) for name in shapes)  # in the order in which they ran
    )


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the network's children; a list of networks is opened, as it does not run itself."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _parts(child, f"{prefix}{name}.")
        elif not isinstance(child, nn.Identity):
            yield f"{prefix}{name}", child


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> Callable[..., None]:
    """Return a hook that notes the shape of a part's output."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            shapes[name] = tuple(output.shape[1:])

    return hook


def _clock(part: nn.Module, runtime: Runtime, seconds: list[float], run: int, hooks: ExitStack) -> None:
    """Add the time between a part's start and end to ``seconds[run]``."""
    begun = 0.0

    def start(module: nn.Module, inputs: Any) -> None:
        nonlocal begun
        begun = _now(runtime)

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        seconds[run] += _now(runtime) - begun

    hooks.callback(part.register_forward_pre_hook(start).remove)
    hooks.callback(part.register_forward_hook(stop).remove)


def _now(runtime: Runtime) -> float:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    return time.perf_counter()


def _kind(part: nn.Module) -> str:
    """Name a part for people: its class, and for a stage its blocks."""
    if isinstance(part, nn.Sequential) and len(part):
        kinds = dict.fromkeys(type(child).__name__ for child in part)
        return f"{len(part)} × {next(iter(kinds))}" if len(kinds) == 1 else ", ".join(kinds)
    if isinstance(part, nn.Conv2d):
        return f"convolution {part.kernel_size[0]} × {part.kernel_size[1]}, stride {part.stride[0]}"
    names = {nn.BatchNorm2d: "batch norm", nn.Linear: "linear", nn.ReLU: "ReLU", nn.MaxPool2d: "max-pool"}
    names |= {NativeBatchNorm2d: "batch norm", nn.AdaptiveAvgPool2d: "average pool"}
    return names.get(type(part), type(part).__name__)
