"""Layer responses (figure 7): how much each layer's output varies, after batch norm, before ReLU and addition."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab import api, evaluate, rundir, runtime
from resnetlab.bundle import Bundle
from resnetlab.lab.budget import start_as_identity
from resnetlab.lab.judges import percent
from resnetlab.lab.records import HUES, Chart, Finding, Plan, Series, Sheet, Verdict
from resnetlab.lab.runner import RUNS
from resnetlab.runtime import Runtime
from resnetlab.sources.dataset import Split
from resnetlab.sources.splits import subset

IMAGES = 1000
"""Images that the responses are measured over, of the test split, or of the validation split where there is none."""


def measure(plan: Plan, path: Path) -> Finding:
    """Measure the trained networks of a plan and hold the paper's two claims against them.

    Raises:
        ResNetLabError: A run is damaged, or its data is gone.
    """
    found: dict[str, list[list[float]]] = {}
    count = 0
    for run in plan.runs:
        directory = path / RUNS / run.label
        if rundir.is_finished(directory):
            opened = api.load(directory)
            split = opened.split()
            split = split.select(subset(split.labels, min(IMAGES, len(split)), 0))
            count = len(split)
            found.setdefault(run.arm, []).append(deviations(opened.bundle, split, runtime.setup(precision="fp32")))
    means = {name: _mean(seeds) for name, seeds in found.items()}
    rows = [
        (name, len(values), sum(values) / len(values), min(values), max(values), len(found[name]))
        for name, values in means.items()
    ]
    kind = "test" if plan.facts is None or plan.facts.test else "validation"
    sheet = Sheet(
        name="responses",
        title="Standard deviation of the responses",
        columns=("network", "layers", "mean", "smallest", "largest", "seeds"),
        rows=tuple(rows),
        caption=f"Of each 3×3 layer's output over {count:,} {kind} images, after batch norm and before ReLU or "
        "addition; means over the seeds.",
        forms=dict.fromkeys(("mean", "smallest", "largest"), ".3f"),
    )
    each = tuple((name, i + 1, value) for name, values in means.items() for i, value in enumerate(values))
    layers = Sheet(name="layers", title="", columns=("network", "layer", "deviation"), rows=each)
    return Finding(charts=_charts(means), sheets=(sheet, layers), verdicts=verdicts(means), words=_words(plan))


def _words(plan: Plan) -> tuple[str, ...]:
    """Say what the start of the networks has to do with it."""
    if not start_as_identity(plan.runs):
        return ()
    return (
        "The residual blocks of these networks started as the identity, so that every second response of theirs was 0 "
        "at first: a part of what makes them small here is that start. Networks trained with model.zero_init=false do "
        "not have it.",
    )


def deviations(bundle: Bundle, split: Split, machine: Runtime) -> list[float]:
    """Return the standard deviation of each 3×3 layer's normalised output over a split, from the first layer on."""
    sums: list[list[float]] = []
    with ExitStack() as hooks:
        for module in _norms(bundle.model):
            place: list[float] = [0.0, 0.0, 0.0]
            sums.append(place)
            hooks.callback(module.register_forward_hook(_adder(place)).remove)
        evaluate.predict_split(bundle, split, machine)
    return [max(0.0, square / n - (total / n) ** 2) ** 0.5 for total, square, n in sums if n]


def _norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch norms of 3×3 convolutions, in order; those of projections are no layers of their own."""
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    return [module for name, module in named if "downsample" not in name]


def _adder(place: list[float]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        wide = output.detach().cpu().to(torch.float64)
        place[0] += float(wide.sum())
        place[1] += float((wide * wide).sum())
        place[2] += wide.numel()

    return hook


def verdicts(means: dict[str, list[float]]) -> tuple[Verdict, ...]:
    """Hold both claims against the mean deviations."""
    level = {name: sum(values) / len(values) for name, values in means.items()}
    pairs = [("plain-20", "ResNet-20"), ("plain-56", "ResNet-56")]
    found = [_smaller(level, small, large) for large, small in pairs if {large, small} <= level.keys()]
    if {"ResNet-20", "ResNet-56"} <= level.keys():
        found.append(_smaller(level, "ResNet-56", "ResNet-20"))
    if {"plain-56", "ResNet-56"} <= means.keys():
        pairs_of = list(zip(means["ResNet-56"], means["plain-56"], strict=False))
        share = sum(a < b for a, b in pairs_of) / len(pairs_of)
        words = f"{percent(share)} of the layers"
        claim = "Layer for layer, ResNet-56 responds less than plain-56 in most layers."
        found.append(Verdict(claim=claim, held=share > 0.5, why=words + "."))
    return tuple(found)


def _smaller(level: dict[str, float], small: str, large: str) -> Verdict:
    return Verdict(
        claim=f"{small} responds less than {large}, on average over its layers.",
        held=level[small] < level[large],
        why=f"{level[small]:.3f} against {level[large]:.3f}.",
    )


def _charts(means: dict[str, list[float]]) -> tuple[Chart, ...]:
    longest = max((len(values) for values in means.values()), default=0)

    def series(order: Any) -> tuple[Series, ...]:
        return tuple(
            Series(name=name, colour=i % HUES, y=(*order(values), *[None] * (longest - len(values))))
            for i, (name, values) in enumerate(means.items())
        )

    shared: dict[str, Any] = {"label": "standard deviation", "x": tuple(range(1, longest + 1)), "form": "number"}
    return (
        Chart(title="Responses by layer, in order", unit="layer", series=series(list), **shared),
        Chart(
            title="Responses by layer, sorted",
            unit="place",
            series=series(lambda values: sorted(values, reverse=True)),
            **shared,
        ),
    )


def _mean(seeds: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*seeds, strict=True)]
