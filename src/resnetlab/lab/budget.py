"""What fits into a time: measure the networks, climb a ladder of ever fuller experiments, say what was cut.

The arithmetic is here and pure; how fast the networks are is asked of a function (`speed.measure`).
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from resnetlab.config import Recipe, early_flag, override
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.lab.records import Arm, Experiment, Facts, Plan, Request, Run, Rung, Scale
from resnetlab.recipes import Facts as RecipeFacts
from resnetlab.recipes import recipe

LADDER = (
    Rung(size=0.5, width=0.5, images=5_000, test=2_000),
    Rung(size=0.5, width=0.5, images=10_000, test=5_000),
    Rung(size=0.5, width=1.0, images=20_000, test=5_000),
    Rung(size=1.0, width=1.0),
)
"""From the least to the whole. Half the size costs a quarter of the time, half the width somewhat more than half."""
SMALL_BATCH, BATCH = 64, 128
"""Images in an iteration on all rungs but the last, and on the last (the paper's): more iterations for the same time;
batch norm sees 64 images in both, as the paper's two GPUs shared a batch."""
SMALLEST = 16
"""Pixels a side below which no image is made smaller."""
SHORT_START = "model.zero_init=true"
"""What a cut experiment sets for its residual networks: blocks start as the identity (Goyal et al. 2017). Otherwise a
deep one spends the first thousand iterations catching up. Training error of half the width on 5,000 images of CIFAR-10
at 16 px, batch 64, rate 0.1, one seed: with it after 936 iterations ResNet-56 56.2 %, ResNet-20 57.9 %; without it
after 702 iterations 73.9 % and 58.0 % (plain-56 83.6 %, plain-20 65.9 %), and after 2,340 still 54.4 % and 44.1 %. At a
rate of 0.03 without it, after 936 iterations: 57.5 % and 54.6 %."""
HELD_OUT = 0.1
"""Share of the training images that are held back, for the curve of errors on images not trained on."""
START, READ, EVAL = 12.0, 0.0006, 2.5
"""Seconds a run takes to start, score and draw; seconds to read an image; how much faster than training an image is
scored. Rough, and rather too long than too short."""
RESERVE = 0.12
"""Share of the time that is not planned: machines have other things to do."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a network trains, with as many others beside it as there will be."""

    seconds: float
    """An optimiser step."""
    memory: int = 0
    """Bytes at the peak."""


Measure = Callable[[Sequence[Run]], list[Speed]]
"""Measures each run's network a few steps long."""


def seconds_of(budget: str) -> float | None:
    """Return the seconds of ``30m``, ``2h``, ``90s`` or ``1d``; None for ``full``: no limit.

    Raises:
        UsageError: It is none of these.
    """
    if budget == "full":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", budget.strip().lower())
    if not found or float(found[1]) == 0:
        raise UsageError(f'"{budget}" is not a budget. Budgets look like 30m, 2h or full.')
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[found[2]]


def plan(experiment: Experiment, request: Request, facts: Facts, measure: Measure, jobs: int) -> Plan:
    """Decide what is trained: the fullest rung on which the time is enough for the experiment's least iterations.

    Raises:
        UsageError: A setting is wrong, or the budget is none.
        ResNetLabError: Not even the lowest rung fits into the time; the message says what would.
    """
    seconds = seconds_of(request.budget)
    by_hand = _by_hand(experiment, request, facts)
    arms = [arm for arm in experiment.arms if seconds is None or not arm.model.endswith("1202")]
    left_out = [arm.name for arm in experiment.arms if arm not in arms]
    if seconds is None or "epochs" in by_hand:
        rung = Rung() if seconds is None else LADDER[0]
        scale = _scale(experiment, rung, facts, by_hand, short=seconds is not None)
        if "epochs" not in by_hand:
            scale = _longer(scale, math.ceil(experiment.iterations / steps_an_epoch(scale)))
        runs = _runs(experiment, arms, request, facts, scale)
        speeds = [] if "epochs" in by_hand else measure(runs[: len(arms)])
    else:
        scale, speeds = _climb(experiment, arms, request, facts, measure, jobs, seconds, by_hand)
        runs = _runs(experiment, arms, request, facts, scale)
    total = 0.0
    if speeds:
        each = [run_seconds(scale, speed) for speed in speeds] * request.seeds
        runs = [run.model_copy(update={"seconds": s}) for run, s in zip(runs, each, strict=True)]
        total = makespan(each, jobs)
    return Plan(
        request=request,
        facts=facts,
        scale=scale,
        jobs=jobs,
        runs=tuple(runs),
        seconds=total,
        words=tuple(_words(experiment, request, facts, scale, runs, left_out)),
    )


def _climb(
    experiment: Experiment,
    arms: Sequence[Arm],
    request: Request,
    facts: Facts,
    measure: Measure,
    jobs: int,
    seconds: float,
    by_hand: dict[str, Any],
) -> tuple[Scale, list[Speed]]:
    """Try the rungs from the lowest on, as long as the next can be expected to fit."""
    begun = time.monotonic()
    best: tuple[Scale, list[Speed]] | None = None
    measured: dict[tuple[Run, ...], list[Speed]] = {}
    for rung in LADDER:
        scale = _scale(experiment, rung, facts, by_hand, short=True)
        if best is not None and _too_far(best[0], scale, experiment.least):
            break
        runs = tuple(run.model_copy(update={"seed": 0}) for run in _runs(experiment, arms, request, facts, scale))
        sample = runs[: len(arms)]
        key = tuple(run.model_copy(update={"settings": _network(run.settings)}) for run in sample)
        if key not in measured:
            measured[key] = measure(sample)
        speeds = measured[key]
        left = seconds * (1 - RESERVE) - (time.monotonic() - begun)
        epochs = longest(scale, speeds, request.seeds, jobs, left)
        most = math.ceil(experiment.iterations / steps_an_epoch(scale))
        longer = _longer(scale, min(epochs, most))
        if best is None and epochs == 0:
            least = makespan([run_seconds(_longer(scale, 1), s) for s in speeds] * request.seeds, jobs)
            raise ResNetLabError(
                f"{experiment.name} does not fit into {request.budget} here: its smallest version, one epoch on "
                f"{scale.images:,} images, takes about {_time(least / (1 - RESERVE) + 10)}. Give a longer --budget, "
                "fewer --seeds, or more --jobs."
            )
        if best is not None and longer.iterations < experiment.least:
            break
        best = (longer, speeds)
    assert best is not None
    return best


def _too_far(now: Scale, up: Scale, least: int) -> bool:
    """Whether the next rung cannot be expected to leave enough iterations, so that it is not even measured."""
    dearer = (up.size / now.size) ** 2 * (up.width / now.width) * (up.batch / now.batch)
    return now.iterations / dearer < 0.7 * least


def run_seconds(scale: Scale, speed: Speed) -> float:
    """Return what a run takes: to start, to read, to train, to score."""
    watched = round(scale.held_out * scale.images) + scale.val
    scoring = speed.seconds / scale.batch / EVAL
    epoch = steps_an_epoch(scale) * speed.seconds + watched * scoring
    read = READ * (scale.images + scale.val + scale.test)
    return START + read + scale.epochs * epoch + (watched + scale.test) * scoring


def longest(scale: Scale, speeds: Sequence[Speed], seeds: int, jobs: int, seconds: float) -> int:
    """Return the most epochs with which all runs end in time, the same for each; 0: not even one."""
    low, high = 0, 1
    while _fits(scale, high, speeds, seeds, jobs, seconds) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(scale, middle, speeds, seeds, jobs, seconds) else (low, middle)
    return low


def _fits(scale: Scale, epochs: int, speeds: Sequence[Speed], seeds: int, jobs: int, seconds: float) -> bool:
    times = [run_seconds(_longer(scale, epochs), speed) for speed in speeds] * seeds
    return makespan(times, jobs) <= seconds


def makespan(times: Sequence[float], jobs: int) -> float:
    """Return when the last run ends, if they start in this order, the plan's, and ``jobs`` go at a time."""
    lanes = [0.0] * max(1, jobs)
    for seconds in times:
        lanes[lanes.index(min(lanes))] += seconds
    return max(lanes)


def steps_an_epoch(scale: Scale) -> int:
    """Return the iterations in an epoch of the images that are not held back, as `loader.steps_per_epoch` does."""
    whole, rest = divmod(scale.images - round(scale.held_out * scale.images), scale.batch)
    return max(1, whole + (rest > 1 and not scale.drop_last))


def _longer(scale: Scale, epochs: int) -> Scale:
    epochs = max(1, epochs)
    return scale.model_copy(update={"epochs": epochs, "iterations": epochs * steps_an_epoch(scale)})


def _by_hand(experiment: Experiment, request: Request, facts: Facts) -> dict[str, Any]:
    """Return what the user set of what the budget would choose; every setting is checked on the way."""
    chosen = override(_recipe(experiment, facts), [*experiment.settings, *request.settings])
    keys = {
        "epochs": chosen.epochs,
        "batch": chosen.batch_size,
        "drop_last": chosen.data.drop_last,
        "size": chosen.data.size or facts.size,
        "images": min(chosen.data.limit or facts.train, facts.train),
        "test": min(chosen.data.limit_test or facts.test, facts.test),
        "width": chosen.model.width,
        "short": False,
        "held_out": 0.0 if facts.val else chosen.data.val,
        "val": facts.val if chosen.data.val else 0,
    }
    names = {"batch": "batch_size", "size": "data.size", "images": "data.limit", "test": "data.limit_test"}
    given = {s.partition("=")[0] for s in request.settings}
    if "seed" in given or "model.name" in given:
        raise UsageError("An experiment chooses networks and seeds itself: --seeds N says how many seeds.")
    _check_apart(experiment.arms, given)
    if not (facts.test or chosen.data.val):
        raise UsageError("data.val=0 leaves nothing to score: the data has no test split. Leave out data.val=0.")
    names |= {"width": "model.width", "held_out": "data.val", "val": "data.val", "drop_last": "data.drop_last"}
    names |= {"short": "model.zero_init"}
    return {key: value for key, value in keys.items() if names.get(key, key) in given}


def _check_apart(arms: Sequence[Arm], given: set[str]) -> None:
    """Refuse to set for all what only some can have, or what sets one apart; a width is multiplied instead."""
    for arm in arms:
        if both := (given & {s.partition("=")[0] for s in arm.settings}) - {"model.width"}:
            raise UsageError(f"{min(both)} is what sets {arm.name} apart from the others: leave it out.")
    plain = [arm.name for arm in arms if arm.model.startswith("plain")]
    if plain and "model.shortcut" in given:
        raise UsageError(f"{plain[0]} is a plain network: it has no shortcuts. Leave out model.shortcut.")


def _recipe(experiment: Experiment, facts: Facts) -> Recipe:
    return recipe(experiment.recipe, RecipeFacts(images=facts.train, size=facts.size, mirrors=False))


def _scale(experiment: Experiment, rung: Rung, facts: Facts, by_hand: dict[str, Any], *, short: bool) -> Scale:
    """Fill a rung in for the data, one epoch long; what the user set holds."""
    size = max(min(facts.size, SMALLEST), round(facts.size * rung.size), experiment.needs)
    chosen = Scale(
        size=size,
        width=rung.width,
        images=min(facts.train, rung.images or facts.train),
        held_out=0.0 if facts.val else HELD_OUT,
        val=facts.val,
        test=min(facts.test, rung.test or facts.test),
        batch=BATCH if rung == Rung() else SMALL_BATCH,
        short=short,
        epochs=1,
        iterations=1,
    )
    chosen = chosen.model_copy(update=by_hand)
    return _longer(chosen, chosen.epochs)


def _runs(experiment: Experiment, arms: Sequence[Arm], request: Request, facts: Facts, scale: Scale) -> list[Run]:
    """List every run, seed by seed, so that a lab that is stopped early has whole comparisons."""
    others = [s for s in request.settings if not s.startswith("model.width=")]  # the scale has it
    return [
        Run(
            label=f"{_file_name(arm.name)}-seed{seed}",
            arm=arm.name,
            model=arm.model,
            seed=seed,
            settings=(*experiment.settings, *_settings(arm, facts, scale), *others),
        )
        for seed in range(request.seeds)
        for arm in arms
    ]


def _settings(arm: Arm, facts: Facts, scale: Scale) -> list[str]:
    """Return an arm's settings at a scale; a width of its own is multiplied with the scale's."""
    settings = [f"epochs={scale.epochs}", f"batch_size={scale.batch}", f"data.size={scale.size}"]
    if scale.images < facts.train:
        settings.append(f"data.limit={scale.images}")
    if scale.test < facts.test:
        settings.append(f"data.limit_test={scale.test}")
    if scale.size < facts.size:  # the recipe's crops are meant for images of their own size
        settings.append(f"data.augment=crop:{max(1, scale.size // 8)}{',flip' if facts.mirrors else ''}")
    own = {key: value for key, _, value in (s.partition("=") for s in arm.settings)}
    if arm.narrows and scale.width != 1:
        own["model.width"] = f"{scale.width * float(own.get('model.width', 1)):g}"
    if scale.short and _residual(arm):
        settings.append(SHORT_START)
    return [*settings, *(f"{key}={value}" for key, value in own.items())]


def _residual(arm: Arm) -> bool:
    return arm.model.startswith(("resnet", "resnext"))


def _network(settings: Sequence[str]) -> tuple[str, ...]:
    """Return the settings that decide how long a step takes."""
    return tuple(s for s in settings if s.startswith(("model.", "batch_size=", "data.size=", "data.augment=")))


def start_as_identity(runs: Sequence[Run]) -> bool:
    """Whether the residual blocks of any of these do: as the budget has it (`SHORT_START`), or as it was asked for."""
    return any(early_flag(run.settings, "model.zero_init") for run in runs)


def _words(
    experiment: Experiment, request: Request, facts: Facts, scale: Scale, runs: Sequence[Run], left_out: Sequence[str]
) -> list[str]:
    """Say in sentences what was cut from the full experiment."""
    words = _of_the_data(facts)
    if left_out:
        words.append(f"{', '.join(left_out)} is trained with --budget full only.")
    if scale.size < facts.size:
        words.append(f"Images of {scale.size} × {scale.size} pixels instead of {facts.size} × {facts.size}.")
    if scale.size > facts.size:
        words.append(f"Images enlarged to {scale.size} × {scale.size} pixels, the least that all networks take.")
    if scale.width != 1 and any(arm.narrows for arm in experiment.arms):
        words.append(f"Residual and plain networks with {scale.width:g} times the channels.")
    if scale.images < facts.train:
        words.append(f"{scale.images:,} of {facts.train:,} training images.")
    if scale.test < facts.test:
        words.append(f"Scored on {scale.test:,} of {facts.test:,} test images.")
    share = scale.iterations * scale.batch / (experiment.iterations * BATCH)
    if scale.iterations < experiment.iterations:
        words.append(
            f"{scale.iterations:,} iterations of {scale.batch} images ({scale.epochs:,} epochs) instead of "
            f"{experiment.iterations:,} of {BATCH}: {share:.2%} of the images. The learning rate falls at the same "
            "shares of the run, and every network gets the same iterations."
        )
    if start_as_identity(runs):
        words.append(
            "Residual blocks start as the identity (the last batch norm of each at 0), which the paper’s did not: in a "
            "short run the deep ones would not catch up otherwise. Plain networks have no such start."
        )
    if scale.iterations < experiment.least:
        words.append(
            f"That is less than the {experiment.least:,} iterations from which on this experiment is worth its name: "
            "take the figures as a trial of the machinery."
        )
    if request.seeds < 3:
        words.append(f"{request.seeds} {'seeds' if request.seeds > 1 else 'seed'}; five would give an honest interval.")
    return words


def _of_the_data(facts: Facts) -> list[str]:
    words = []
    if re.sub("[^a-z0-9]", "", facts.name.lower()) != "cifar10":
        words.append(f"The data is {facts.name}, the paper’s is CIFAR-10: its error rates are of other images.")
    if not facts.test:
        words.append("The data has no test split: its validation split stands in for it.")
    return words


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _time(seconds: float) -> str:
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
