"""From several runs to a new one: combine the networks, score the result where that is fair, and write it down."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from resnetlab import bundle, chosen, ensemble, evaluate, loader, rundir, runtime
from resnetlab.augment import pipeline
from resnetlab.bundle import Bundle
from resnetlab.console import Display
from resnetlab.errors import ResNetLabError
from resnetlab.metrics import Predictions, Scorecard, score
from resnetlab.runtime import Runtime
from resnetlab.sources import copies
from resnetlab.sources.dataset import Split


@dataclass(kw_only=True)
class Assembly:
    """Trained networks, and the data that each was trained on."""

    bundles: Sequence[Bundle]
    splits: Sequence[Callable[[str], Split]]
    """For each network, returns the split of a name exactly as its run made it, or raises ResNetLabError."""
    machine: Runtime
    display: Display

    def make(self, how: str, path: Path) -> dict[str, Scorecard]:
        """Combine the networks into a run directory.

        Args:
            how: A row of `ensemble.RULES`.
            path: The new run's directory, empty.

        Returns:
            The scores of the result by split, and by split and views where the first network's recipe has views.

        Raises:
            ResNetLabError: The networks do not go together, or a rule needs data that is not there.
        """
        made = ensemble.combine(
            self.bundles, how, ensemble.Material(val=self._predict_val, batches=self._training_batches)
        )
        for line in self._members(made):
            self.display.line(line)
        splits, looks = self._fair_splits(), dict.fromkeys(("single", made.card.recipe.views))
        predictions = {
            name if views == "single" else f"{name}-{views}": self._predict(made, split, views)
            for views in looks
            for name, split in splits.items()
        }
        scores = {name: score(p) for name, p in predictions.items()}
        card = made.card.model_copy(update={"metrics": {name: s.brief() for name, s in scores.items()}})
        bundle.save(path, made.model.state_dict(), card)
        rundir.write_json(path / rundir.SCORES, {name: s.to_dict() for name, s in scores.items()})
        scored = {name: list(predictions[name].names) for name in splits}
        rundir.write_json(path / rundir.SPLITS, {"train": self._trained_on(), **scored})
        rundir.write_json(path / rundir.CONFIG, self._config(made, how))
        if scores:
            from resnetlab import report  # matplotlib: not while a training run starts

            report.save(report.confusion(rundir.read_run(path)), path / "confusion.png")
        for line in self._results(scores, how, path):
            self.display.line(line)
            rundir.Log(path)(line)
        return scores

    def _trained_on(self) -> list[str]:
        """Return the names of the images that any of the networks was trained on, of the first run's data."""
        source = self.bundles[0].card.data.get("source")
        alike = [one for one in self.bundles if one.card.data.get("source") == source]
        return list(dict.fromkeys(name for one in alike for name in chosen.recorded(one).get("train", ())))

    def _members(self, made: Bundle) -> Iterator[str]:
        """Say what was combined."""
        weights = [member.weight for member in made.card.members] or [1 / len(self.bundles)] * len(self.bundles)
        for one, weight in zip(self.bundles, weights, strict=True):
            known = "  ".join(f"{name} top-1 {s['top1']:.2%}" for name, s in one.card.metrics.items())
            yield f"member  {one.path.parent}: {one.card.model.name}, weight {weight:.3f}  {known}"

    def _results(self, scores: dict[str, Scorecard], how: str, path: Path) -> Iterator[str]:
        """Say what came of it, beside the best of the members."""
        worse = False
        for name, s in scores.items():
            low, high = s.top1_interval
            known = [one.card.metrics[name] for one in self.bundles if name in one.card.metrics]
            same = len(known) == len(self.bundles) and all(one["n"] == s.n for one in known)  # of the same images
            alone = [one["top1"] for one in known] if same else []
            beside = f"  [best member {max(alone):.2%}, mean {sum(alone) / len(alone):.2%}]" if alone else ""
            worse |= bool(alone) and s.top1 < sum(alone) / len(alone)
            fitted = " (the weights were fitted on it)" if how == "weighted" and name.startswith("val") else ""
            yield (
                f"{name:<5} top-1 {s.top1:.2%} (95 % interval {low:.2%} to {high:.2%}, n = {s.n:,})  "
                f"top-5 {s.top5:.2%}  loss {s.loss:.4f}  calibration error {s.calibration_error:.4f}{beside}{fitted}"
            )
        if worse and how == "soup":
            yield (
                "note: the mean of the weights is worse than the networks it is of. It helps those that started from "
                "the same trained weights; for runs of different seeds take --combine probabilities."
            )
        yield f"saved {path}"
        yield f"next  resnetlab evaluate {path}    resnetlab predict {path} IMAGE..."

    def _config(self, made: Bundle, how: str) -> dict[str, Any]:
        """Return what ``config.json`` holds: the first run's data and recipe, and the members."""
        weights = [member.weight for member in made.card.members]
        return {
            "data": made.card.data,
            "recipe": made.card.recipe.model_dump(mode="json"),
            "preprocess": made.card.preprocess.model_dump(mode="json"),
            "versions": runtime.versions(),
            "machine": runtime.machine(self.machine.device),
            "precision": self.machine.precision.name,
            "convolutions": self.machine.convolutions,
            "command": rundir.typed(),
            "combine": how,
            "members": [
                {
                    "run": str(one.path),
                    "model": one.card.model.name,
                    "weight": weights[number] if weights else 1 / len(self.bundles),
                    "scores": one.card.metrics,
                }
                for number, one in enumerate(self.bundles)
            ],
        }

    def _fair_splits(self) -> dict[str, Split]:
        """Return the splits of which no member has seen an image in training; say what is left out, and why."""
        fair = {}
        for name in ("val", "test"):
            try:
                split = self.splits[0](name)
            except ResNetLabError as error:
                self.display.line(f"note: not scored on {name}: {error}")
                continue
            known = [str(self.bundles[n].path) for n in range(1, len(self.bundles)) if self._may_have_seen(n, split)]
            if known:
                self.display.line(
                    f"note: not scored on {name}: {', '.join(known)} may have been trained on images of it."
                )
            else:
                fair[name] = split
        return fair

    def _may_have_seen(self, other: int, split: Split) -> bool:
        """Whether images of the first run's split were among those that another run was trained on."""
        if _split_by(self.bundles[other]) == _split_by(self.bundles[0]):
            return False
        try:
            trained, own = self.splits[other]("train"), self.splits[0]("train")
        except ResNetLabError:
            return True
        names = {trained.images.name(i) for i in range(len(trained))}
        if any(split.images.name(i) in names for i in range(len(split))):
            return True
        elsewhere = copies.shared(split, trained)  # the same images may lie in two places
        return len(np.setdiff1d(elsewhere, copies.shared(split, own))) > 0  # but for doubles within the data

    def _predict(self, one: Bundle, split: Split, views: str = "single") -> Predictions:
        return evaluate.predict_split(
            one,
            split,
            self.machine,
            views=views,
            skip_broken=one.card.recipe.data.skip_broken,
            progress=self.display.reading,
        )

    def _predict_val(self) -> list[Predictions]:
        fair = self._fair_splits()
        if "val" not in fair:
            raise ResNetLabError(
                "Weights are fitted on a validation split that none of the runs was trained on, and these runs have "
                "none in common. Combine them by probabilities instead."
            )
        return [self._predict(one, fair["val"]) for one in self.bundles]

    def _training_batches(self) -> Iterable[Tensor]:
        """Read the training images of the first run, and return one epoch of them, as it was trained on."""
        card = self.bundles[0].card
        store = loader.read(
            self.splits[0]("train"), card.preprocess, card.recipe.data, "training images", self.display.reading
        )[0]
        batches = loader.TrainLoader(
            store=store,
            pipeline=pipeline(card.recipe.data.augment),
            batch_size=card.recipe.batch_size,
            drop_last=True,  # a rest of few images would count as much as a batch
            seed=card.recipe.seed,
            runtime=self.machine,
        )
        return (batch.images for batch in batches.epoch(1))


def _split_by(one: Bundle) -> tuple[object, ...]:
    """Return what a run's splits depend on, and its training images: the data may have grown since another run."""
    config, trained = one.card.recipe.data, chosen.recorded(one).get("train")
    return one.card.data.get("source"), config.val, config.split_seed, config.limit, trained


@contextlib.contextmanager
def new_directory(out: str | Path | None, name: str) -> Iterator[Path]:
    """Make a run directory, and take it away again where nothing came to lie in it."""
    path = rundir.create(out, name)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            path.rmdir()
