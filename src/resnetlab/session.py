"""One training run, from a DATA string to a complete run directory: plan it, train it, score it, draw it."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from resnetlab import (
    bundle,
    checkpoint,
    divergence,
    easy,
    evaluate,
    failures,
    loader,
    loggers,
    models,
    moved,
    rundir,
    runtime,
    sources,
    stopping,
    training,
)
from resnetlab.config import (
    LEAST_SIZE,
    MOST_SIZE,
    ModelConfig,
    Recipe,
    early,
    early_flag,
    early_number,
    override,
    parse,
)
from resnetlab.console import Display, epoch_line, tell
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.loader import Prepared
from resnetlab.metrics import Predictions, Scorecard, StepRecord, TimingRecord, score
from resnetlab.predict import predict_store
from resnetlab.recipes import Facts, recipe
from resnetlab.runtime import Runtime
from resnetlab.sources.dataset import Dataset, Split
from resnetlab.sources.images import printable
from resnetlab.training import EpochEnd, Training
from resnetlab.views import view

OF_THE_DATA = ("num_classes", "in_channels", "image_size")
"""Settings of a network that the data decides."""
SLOW_EPOCH = 20.0
"""Seconds. Epochs that take longer are drawn at once, so that there is something to look at meanwhile."""


class Interrupted(ResNetLabError):
    """The user, or the system, asked the run to stop; it was saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that is ready to start: everything is resolved, read and checked."""

    data: str
    dataset: Dataset
    recipe: Recipe
    prepared: Prepared
    runtime: Runtime


def plan(
    data: str,
    model: str | None,
    recipe_name: str,
    settings: Sequence[str],
    display: Display,
    *,
    seed: int | None = None,
) -> Plan:
    """Find the data, choose the recipe for it, apply the settings, and read every image once.

    Raises:
        UsageError: A name or a setting is wrong.
        ResNetLabError: The data cannot be used; nothing was written.
    """
    model = early(settings, "model.name") or model  # the setting is the later of the two, and so counts
    if model is not None:
        model = models.canonical(model)
    dataset = sources.load(
        data,
        skip_broken=early_flag(settings, "data.skip_broken"),
        split_seed=early_number(settings, "data.split_seed") or 0,
        progress=_reader(display, "listing"),
    )
    height, width = loader.typical_shape(dataset.train)
    facts = Facts(
        images=len(dataset.train),
        size=min(height, width),
        mirrors=dataset.mirrors,
        model=model,
        epochs=early_number(settings, "epochs"),
        read_at=early_number(settings, "data.size", LEAST_SIZE, MOST_SIZE),
        gpu=runtime.choose_device(early(settings, "device") or "auto").type != "cpu",
    )
    chosen = override(recipe(recipe_name, facts), [*settings, *([f"seed={seed}"] if seed is not None else [])])
    found = resolve(sources.settled(data), dataset, chosen, display)
    for field_name in OF_THE_DATA:
        given, is_so = early(settings, f"model.{field_name}"), getattr(found.recipe.model, field_name)
        if given is not None and given != str(is_so):
            raise UsageError(f"model.{field_name} is what the data has, {is_so}, and cannot be set to {given}.")
    return found


def resolve(data: str, dataset: Dataset, chosen: Recipe, display: Display, precision: str | None = None) -> Plan:
    """Prepare the images for a recipe, and fill in what the network takes from them.

    ``precision`` is by default the recipe's.
    """
    machine = runtime.setup(chosen.device, precision or chosen.precision, deterministic=chosen.deterministic)
    if machine.world_size > 1 and chosen.batch_size < loader.LEAST * machine.world_size:
        raise UsageError(
            f"batch_size={chosen.batch_size} is too small for {machine.world_size} processes: each needs "
            f"{loader.LEAST} images or more of every batch."
        )
    view(chosen.views)  # a wrong name is said before the images are read
    models.resolve(chosen.model)
    dataset = replace(dataset, test=loader.test_split(chosen.data, dataset))
    prepared = loader.prepare(chosen.data, dataset, display.reading)
    dataset = replace(dataset, test=prepared.test)
    facts = (len(dataset.train.classes), prepared.preprocess.channels, prepared.preprocess.size)
    of_the_data = dict(zip(OF_THE_DATA, facts, strict=True))
    network = models.resolve(ModelConfig(**{**chosen.model.model_dump(exclude_unset=True), **of_the_data}))
    for size in (prepared.preprocess.size, *(size for _, size in chosen.data.growth)):
        models.cost(network, size)  # images that are too small for it are refused here
    chosen = chosen.model_copy(update={"model": network})
    if models.ARCHITECTURES[network.name].mirrors_alike and not dataset.mirrors:
        said = f"{network.name} takes an image and its mirror image for the same, which these are not: try fast-medium."
        prepared = replace(prepared, notes=(*prepared.notes, said))
    if data != printable(data):
        said = f"{printable(data)} is not UTF-8, which no run can keep: to evaluate it, name this place again."
        prepared = replace(prepared, notes=(*prepared.notes, said))
    return Plan(data=data, dataset=dataset, recipe=chosen, prepared=prepared, runtime=machine)


def _reader(display: Display, what: str) -> Any:
    return lambda *step: display.reading(step[0], step[1], step[2]) if len(step) == 3 else display.reading(what, *step)


@dataclass(kw_only=True)
class Session:
    """A plan with a directory: trains until the end or a signal, keeping the directory whole at all times."""

    plan: Plan
    path: Path
    display: Display
    logger: str | None = None
    watch_test: bool = False
    """Also score the test split after every epoch, for the eye alone (the tutorial prints it)."""
    debug_batch: bool = False
    """Watch the gradients too, and keep the batch on which the run diverges."""
    timing: list[TimingRecord] = field(default_factory=list)
    stop: int = 0
    """The signal that asked to stop, or 0; that of any process, once they have agreed."""

    def run(self) -> dict[str, Scorecard]:
        """Train from wherever the directory is, then score and draw.

        Returns:
            Scores by split: ``test`` where there is one, and ``val``.

        Raises:
            Interrupted: A signal came; the run is saved and can be resumed, or is finished.
            Diverged: The loss became NaN; checkpoints are of before.
        """
        if not self.plan.runtime.is_main:
            with self._signals():
                return self._train_and_score()
        with rundir.locked(self.path), self._signals():
            return self._train_and_score()

    def _train_and_score(self) -> dict[str, Scorecard]:
        try:
            t = training.start(self.plan.recipe, self.plan.prepared, self.plan.runtime)
            t.watch_gradients = self.debug_batch
            size = self.plan.prepared.preprocess.size
            view(self.plan.recipe.views, t.model, size)  # said before hours of training, not after
            self._begin(t)
        except ResNetLabError:
            if self.plan.runtime.is_main:
                rundir.discard(self.path)  # where nothing has come to lie in it
            raise
        with failures.explained(t, self.path, self._log):
            self._train(t)
            scores = self._finish(t)
        if self._agreed_stop():  # while it scored: whoever runs several is to begin no other
            raise Interrupted(f"Stopped when the run was finished; all is saved in {self.path}.", self.stop)
        return scores

    def _begin(self, t: Training) -> None:
        """Restore the newest checkpoint, or write down what is about to run."""
        saved = checkpoint.load_newest(self.path / rundir.CHECKPOINTS, self._say)
        if saved is not None:
            training.restore(t, saved)
            kept = rundir.read_rows(self.path / rundir.TIMING, TimingRecord)
            self.timing = [row for row in kept if row.epoch <= len(t.history)]
            self._say(f"Going on after step {t.step} (epoch {len(t.history) + 1}).")
        elif self.plan.runtime.is_main:
            weights = sum(p.numel() * p.element_size() for p in t.model.parameters())
            rundir.probe(self.path, 12 * weights + (8 << 20))  # two checkpoints of up to five copies, and the bundle
            rundir.write_json(self.path / rundir.CONFIG, describe(self.plan))
            rundir.write_json(self.path / rundir.SPLITS, manifest(self.plan))
        for line in header(self.plan, self.path):
            self._say(line)

    def _train(self, t: Training) -> None:
        main = self.plan.runtime.is_main
        tracker = loggers.start(self.logger, self.path, self.plan.recipe) if self.logger and main else None
        saved = time.monotonic()
        for event in training.run(t):
            if isinstance(event, StepRecord):
                self.display.step(event, self.plan.recipe.epochs, t.schedule(t.step - 1))
                if self._agreed_stop():
                    self._save(t)
                    self._draw()
                    self.plan.runtime.share("saved")  # torchrun ends all of them as soon as one has ended
                    raise self._interrupted(t)
                if time.monotonic() - saved < 60 * self.plan.recipe.checkpoint_minutes:
                    continue
            else:
                self._end_epoch(t, event)
                if tracker and not self._reported(tracker, event):
                    tracker = None
            self._save(t)
            saved = time.monotonic()
            if isinstance(event, EpochEnd):  # the processes' clocks differ: not after a save inside an epoch
                self._heed(t)

    def _reported(self, tracker: loggers.Report, event: EpochEnd) -> bool:
        """Tell a tracker of an epoch. One that fails is left, and the run goes on: its own files hold everything."""
        try:
            tracker(event.record, event.timing)
        except Exception as error:  # a stranger's code, that talks to a network
            self._say(f"note: reporting to {self.logger} failed and is left off ({error}).")
            return False
        return True

    def _end_epoch(self, t: Training, event: EpochEnd) -> None:
        line = epoch_line(event.record, event.timing, self.plan.recipe.epochs, event.is_best and self._chooses)
        if self.watch_test and self.plan.dataset.test:
            watched = score(self._predict_test(t))
            line += f"  test loss {watched.loss:.4f}  test accuracy {watched.top1:.2%}"
        self._say(line)
        self.timing.append(event.timing)
        if not self.plan.runtime.is_main:
            return
        if event.is_best:
            bundle.save(self.path, training.result_weights(t), self._card(t.best_epoch, {}))
        rundir.write_rows(self.path / rundir.METRICS, t.history)
        rundir.write_rows(self.path / rundir.TIMING, self.timing)
        if event.timing.train_seconds > SLOW_EPOCH:
            self._draw()

    @property
    def _chooses(self) -> bool:
        return self.plan.recipe.keep == "best"

    def _save(self, t: Training) -> None:
        if self.plan.runtime.is_main:
            checkpoint.save(self.path / rundir.CHECKPOINTS, training.checkpoint(t))

    def _card(self, epoch: int, scores: dict[str, Any]) -> bundle.Card:
        plan = self.plan
        return bundle.Card(
            model=plan.recipe.model,
            classes=plan.dataset.train.classes,
            preprocess=plan.prepared.preprocess,
            recipe=plan.recipe,
            data=describe(plan)["data"],
            metrics=scores,
            epoch=epoch,
            versions=runtime.versions(),
        )

    def _finish(self, t: Training) -> dict[str, Scorecard]:
        """Score the result on validation and test, write it all down, draw the pictures."""
        predictions = {}
        models.load_state(t.result, training.result_weights(t), "the result")
        for views in dict.fromkeys(("single", self.plan.recipe.views)):
            self._heed(t)
            name = "" if views == "single" else f"-{views}"
            if self.plan.prepared.val:
                predictions[f"val{name}"] = predict_store(t.result, self.plan.prepared.val, self._exact, views=views)
                self._heed(t)
            if self.plan.dataset.test:
                predictions[f"test{name}"] = self._predict_test(t, views)
        scores = {split: score(p) for split, p in predictions.items()}
        if self.plan.runtime.is_main:
            brief = {split: s.brief() for split, s in scores.items()}
            bundle.save(self.path, training.result_weights(t), self._card(t.best_epoch, brief))
            self._draw(scores)
            rundir.write_json(self.path / rundir.SCORES, {k: s.to_dict() for k, s in scores.items()})  # now it is done
        for line in summary(scores, t.best_epoch, self.path):
            self._say(line)
        return scores

    def _predict_test(self, t: Training, views: str = "single") -> Predictions:
        """Score the network in training on the test split; nothing is chosen by it."""
        assert self.plan.dataset.test is not None
        held = bundle.Bundle(model=t.result, card=self._card(t.best_epoch, {}), path=self.path)
        return evaluate.predict_split(
            held,
            self.plan.dataset.test,
            self._exact,
            views=views,
            skip_broken=self.plan.recipe.data.skip_broken,
            progress=self.display.reading,
        )

    @property
    def _exact(self) -> Runtime:
        """The runtime that final scores are measured with: fp32, as `evaluate` will measure them again."""
        return replace(self.plan.runtime, precision=runtime.Precision("fp32", self.plan.runtime.device))

    def _draw(self, scores: dict[str, Scorecard] | None = None) -> None:
        if self.plan.runtime.is_main and (self.path / rundir.METRICS).is_file():
            from resnetlab import report  # matplotlib: half a second, not before the first step

            data = rundir.read_run(self.path)
            if scores:
                split = "test" if "test" in scores else "val"
                data = replace(data, score=scores[split], score_split=split)
            for name, plot in report.PLOTS.items():
                if name != "confusion" or data.score:
                    report.save(plot(data), self.path / f"{name}.png")

    def _say(self, line: str) -> None:
        if self.plan.runtime.is_main:
            self.display.line(line)
            self._log(line)

    def _log(self, line: str) -> None:
        if self.plan.runtime.is_main:
            rundir.Log(self.path)(line)

    def _heed(self, t: Training) -> None:
        """Stop here if that was asked for; all is saved already."""
        if self._agreed_stop():
            raise self._interrupted(t)

    def _agreed_stop(self) -> bool:
        """Whether any process was asked to stop; all must stop after the same step."""
        if self.plan.runtime.world_size == 1:
            return bool(self.stop)
        asked = int(max(self.plan.runtime.each(self.stop)))
        self.stop = asked or self.stop  # a signal may have come meanwhile, which is for the next time
        return bool(asked)

    def _interrupted(self, t: Training) -> Interrupted:
        done = len(t.history) == self.plan.recipe.epochs
        where = "the last scoring" if done else f"epoch {len(t.history) + 1}, step {t.step}"
        several = ", in as many processes," if self.plan.runtime.world_size > 1 else ""
        resume = f"resnetlab train --resume {quote(str(self.path))}"
        message = f"Stopped in {where}; all is saved. Go on{several} with: {resume}"
        self._log(message)
        return Interrupted(message, self.stop)

    def _signals(self) -> contextlib.AbstractContextManager[None]:
        """Note a request to stop, which is heeded after the step."""

        def note(number: int) -> None:
            if not self.stop:  # else another process was asked, and this one is stopping already
                self.stop = number
                tell(self.display.line, "Stopping after this step; once more stops at once.")

        return stopping.noted(note)


def load_plan(path: Path, display: Display) -> Plan:
    """Make the plan of an existing run again, from its ``config.json``.

    Raises:
        ResNetLabError: The run cannot be read, or its data is not what it was.
    """
    config = rundir.read_json(path / rundir.CONFIG)
    if config.get("members"):
        raise ResNetLabError(f"{path} was combined from other runs; there is no training in it to go on with.")
    try:
        data, before = config["data"]["source"], config["data"]
        chosen = parse(Recipe, _json(config["recipe"]), str(path / rundir.CONFIG))
    except (KeyError, TypeError) as error:
        raise ResNetLabError(f"{path / rundir.CONFIG} is not as ResNetLab writes it ({error}).") from error
    dataset = sources.load_again(
        data, str(path), skip_broken=chosen.data.skip_broken, split_seed=chosen.data.split_seed
    )
    found = resolve(data, dataset, chosen, display, _precision(config, chosen))
    _refuse_other_steps(config, found)
    _say_what_differs(config, found, display)
    now = describe(found)["data"]
    changed = [key for key in ("classes", "train", "val", "test") if now[key] != before[key]]
    if changed:
        raise ResNetLabError(
            f"The data at {data} has changed since {path} was trained on it "
            f"({', '.join(f'{k}: {_short(before[k])} then, {_short(now[k])} now' for k in changed)})."
        )
    if (path / rundir.SPLITS).is_file():
        recorded, there = rundir.read_json(path / rundir.SPLITS), _splits(found)
        if not moved.agree(recorded, there, fewer=False):  # an image may be scored that was trained on
            new = moved.newcomer(recorded, there)
            which = f"{printable(new)} is new" if new else "images lie in other splits"
            raise ResNetLabError(f"The data at {data} has changed since {path} was trained on it: {which}.")
    return found


def _precision(config: dict[str, Any], chosen: Recipe) -> str:
    """Return the precision to go on in: on the same machine the run's own, whatever would be chosen by now."""
    same = str(config.get("machine")).startswith(runtime.processor(runtime.choose_device(chosen.device)))
    return str(config.get("precision", "auto")) if same and chosen.precision == "auto" else chosen.precision


def _refuse_other_steps(config: dict[str, Any], plan: Plan) -> None:
    """Refuse another number of processes where an epoch would have other steps: a place in it would not be the same."""
    train, chosen, now = len(plan.prepared.train), plan.recipe, plan.runtime.world_size
    before = int(config.get("processes", now))
    counts = [loader.steps_per_epoch(train, chosen.batch_size, chosen.data.drop_last, n) for n in (before, now)]
    if counts[0] != counts[1]:
        raise ResNetLabError(
            f"The run was begun in {before} processes, with {counts[0]} steps an epoch; in {now} it has {counts[1]}: "
            f"a last batch of so few images is left out in the larger number. Go on in {before}."
        )


def _say_what_differs(config: dict[str, Any], plan: Plan, display: Display) -> None:
    """Say where the rest of a run will be computed otherwise than its beginning, so that it cannot end to the bit."""
    differs = {
        "precision": (plan.runtime.precision.name, "rounding will differ"),
        "convolutions": (plan.runtime.convolutions, "rounding will differ"),
        "processes": (plan.runtime.world_size, "the run will end otherwise, as each norm sees other images"),
    }
    for what, (value, so) in differs.items():
        if config.get(what, value) != value and plan.runtime.is_main:
            display.line(f"note: {what}: {config[what]} when the run began, now {value}; {so}.")


def describe(plan: Plan) -> dict[str, Any]:
    """Return what ``config.json`` holds: the data, the recipe in full, and how it came about."""
    dataset, prepared = plan.dataset, plan.prepared
    return {
        "data": {
            "source": plan.data,
            "name": dataset.name,
            "classes": list(dataset.train.classes),
            "train": len(prepared.train),
            "val": len(prepared.val) if prepared.val else 0,
            "test": len(dataset.test) if dataset.test else 0,
            "notes": list(prepared.notes),
        },
        "recipe": plan.recipe.model_dump(mode="json"),
        "preprocess": prepared.preprocess.model_dump(mode="json"),
        "versions": runtime.versions(),
        "machine": runtime.machine(plan.runtime.device),
        "precision": plan.runtime.precision.name,
        "convolutions": plan.runtime.convolutions,
        "processes": plan.runtime.world_size,
        "command": rundir.typed(),
    }


def manifest(plan: Plan) -> dict[str, list[str]]:
    """Return what ``splits.json`` holds: the name of every image of every split."""
    return {name: moved.names(split) for name, split in _splits(plan).items()}


def _splits(plan: Plan) -> dict[str, Split]:
    """Return the splits that there are."""
    val = plan.prepared.val.split if plan.prepared.val else None
    splits = {"train": plan.prepared.train.split, "val": val, "test": plan.dataset.test}
    return {name: split for name, split in splits.items() if split is not None}


def header(plan: Plan, path: Path) -> list[str]:
    """Return the lines that a run begins with: device, precision, model, data, recipe, directory."""
    prepared, chosen = plan.prepared, plan.recipe
    train_split = prepared.train.split
    counts = f"{len(prepared.train):,} train, {len(prepared.val) if prepared.val else 0:,} val"
    counts += f", {len(plan.dataset.test):,} test" if plan.dataset.test else ", no test split"
    cost = models.cost(chosen.model, prepared.preprocess.size)
    steps = loader.steps_per_epoch(
        len(prepared.train), chosen.batch_size, chosen.data.drop_last, plan.runtime.world_size
    )
    return [
        f"device  {runtime.machine(plan.runtime.device)}, {plan.runtime.precision.name}, "
        f"convolutions {plan.runtime.convolutions}"
        + (f", {plan.runtime.world_size} processes" if plan.runtime.world_size > 1 else "")
        + (f" (chosen by {plan.runtime.note})" if plan.runtime.note else ""),
        f"model   {chosen.model.name}: {cost.parameters:,} parameters, {cost.macs / 1e6:,.1f} M multiply-adds an image",
        f"data    {plan.dataset.name}: {len(train_split.classes)} classes, {counts}, "
        f"read at {prepared.preprocess.size} px",
        *(f"        {note}" for note in prepared.notes),
        f"recipe  {chosen.name}: {chosen.epochs} epochs of {steps} steps of "
        f"{chosen.batch_size} images, {chosen.optim.name} lr {chosen.optim.lr:g} {chosen.optim.schedule}, "
        f"augment {','.join(chosen.data.augment) or 'none'}, seed {chosen.seed}",
        f"run     {path}",
    ]


def summary(scores: dict[str, Scorecard], epoch: int, path: Path) -> list[str]:
    """Return the lines that a run ends with: the scores, and what to do next."""
    lines = []
    for split, s in scores.items():
        low, high = s.top1_interval
        lines.append(
            f"{split:<5} top-1 {s.top1:.2%} (95 % interval {low:.2%} to {high:.2%}, n = {s.n:,})  top-5 {s.top5:.2%}  "
            f"loss {s.loss:.4f}  calibration error {s.calibration_error:.4f}  [weights of epoch {epoch}]"
        )
    return [
        *lines,
        f"saved {path}: curves.png, confusion.png, metrics.csv, model.safetensors",
        f"next  resnetlab evaluate {quote(str(path))}    resnetlab predict {quote(str(path))} IMAGE...",
    ]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A batch on which a run diverged, computed once more."""

    found: divergence.Finding
    precision: str
    loss: float
    layers: list[divergence.LayerTrace]


def replay(path: Path, precision: str | None = None) -> Replay:
    """Compute the kept batch of a run once more, forward and back, and take down what every layer does with it.

    Raises:
        ResNetLabError: No batch was kept, or it is damaged.
    """
    found, tensors = divergence.read(path)
    config = rundir.read_json(path / rundir.CONFIG)
    try:
        chosen = parse(Recipe, _json(config["recipe"]), str(path / rundir.CONFIG))
        machine = runtime.setup(chosen.device, precision or config["precision"])
    except (KeyError, TypeError) as error:
        raise ResNetLabError(f"{path / rundir.CONFIG} is not as ResNetLab writes it ({error}).") from error
    loss, layers = training.replay(chosen, machine, tensors)
    return Replay(found=found, precision=machine.precision.name, loss=loss, layers=layers)


def dry_run(plan: Plan) -> dict[str, Any]:
    """Measure a few steps on the real network and batch size without training it, and add them up to the whole run."""
    import torch

    chosen, size = plan.recipe, plan.prepared.preprocess.size
    t = training.start(chosen, plan.prepared, plan.runtime)
    cost = models.cost(chosen.model, size)
    seconds = []
    begun = time.perf_counter()
    for _ in training.run(t):
        seconds.append(time.perf_counter() - begun)
        if len(seconds) >= 6 or max(plan.runtime.each(sum(seconds))) > 60:
            break
        begun = time.perf_counter()
    step = float(np.median(seconds[1:] or seconds)) * later_cost(chosen, size)
    began = time.perf_counter()
    images = torch.zeros(64, plan.prepared.preprocess.channels, size, size, device=plan.runtime.device)
    from resnetlab.predict import logits

    logits(t.model, [images.contiguous(memory_format=torch.channels_last)], plan.runtime)
    evaluation = (time.perf_counter() - began) / 64
    scored = len(plan.prepared.val) if plan.prepared.val else 0
    tested = len(plan.dataset.test) if plan.dataset.test else 0
    total = chosen.epochs * (step * t.loader.steps + evaluation * scored) + evaluation * tested
    return {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "steps": t.loader.steps * chosen.epochs,
        "seconds_per_step": step,
        "images_per_second": chosen.batch_size / step,
        "peak_memory_bytes": runtime.peak_memory(plan.runtime.device),
        "seconds_to_finish": total,
    }


def later_cost(chosen: Recipe, size: int) -> float:
    """Return what a step costs on average, as a multiple of the first: images grow, and easy ones are left out."""
    growth = chosen.data.growth or ((0.0, size),)
    starts = sorted({easy.FROM, *(share for share, _ in growth)})
    mean = 0.0
    for start, end in zip(starts, [*starts[1:], 1.0], strict=True):
        pixels = next(p for first, p in reversed(growth) if start >= first)
        kept = 1 - chosen.data.skip_easy if start >= easy.FROM else 1.0
        mean += (end - start) * kept * pixels**2
    return mean / growth[0][1] ** 2


def _json(value: object) -> str:
    import json

    return json.dumps(value)


def _short(value: object) -> str:
    return f"{len(value)} classes" if isinstance(value, list) else str(value)
