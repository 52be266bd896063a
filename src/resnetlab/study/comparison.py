"""Several runs on the same images: which is better, by how much, and what was done differently."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from resnetlab import analysis, study
from resnetlab.bundle import Bundle
from resnetlab.config import flat
from resnetlab.console import Display
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.metrics import Predictions, score
from resnetlab.report.records import Compared, Comparison, Duel
from resnetlab.runtime import Runtime
from resnetlab.study import origin

MOST = 8
"""Runs of a comparison: more lines cannot be told apart."""


def compare(bundles: Sequence[Bundle], runtime: Runtime, display: Display, *, data: str | None = None) -> Comparison:
    """Score runs on the test split that they share (without one, on validation), and test them in pairs.

    Raises:
        UsageError: There are fewer than two runs, or more than `MOST`.
        ResNetLabError: The runs share no split, or were not scored on the same images with the same labels.
    """
    if not 2 <= len(bundles) <= MOST:
        raise UsageError(f"A comparison takes 2 to {MOST} runs; {len(bundles)} were given.")
    names = _names([bundle.path for bundle in bundles])
    predictions = []
    for name, bundle in zip(names, bundles, strict=True):
        display.line(f"{name}: {bundle.card.model.name}, predicting")
        predictions.append(study.predict(bundle, study.read(bundle, data), runtime, display))
    split = next((s for s in ("test", "val") if all(s in found for found in predictions)), None)
    if split is None:
        raise ResNetLabError("These runs share neither a test nor a validation split, so they cannot be compared.")
    shared = [found[split] for found in predictions]
    for name, other in zip(names[1:], shared[1:], strict=True):
        _require_same(names[0], shared[0], name, other, split)
    runs = tuple(
        Compared(
            name=name,
            run=replace(study.recorded(bundle), score=score(found), score_split=split),
            origin=origin.describe(bundle),
            predictions=found,
        )
        for name, bundle, found in zip(names, bundles, shared, strict=True)
    )
    return Comparison(runs=runs, split=split, duels=_duels(shared), changed=_changed(bundles))


def _require_same(name: str, first: Predictions, other_name: str, second: Predictions, split: str) -> None:
    if set(first.classes) != set(second.classes):
        missing = sorted(set(first.classes) ^ set(second.classes))
        difference = f"they know different classes ({', '.join(missing[:5])})"
    else:
        difference = analysis.not_the_same_images(first, second)
    if difference:
        raise ResNetLabError(
            f"{name} and {other_name} cannot be compared on their {split} splits: {difference}. "
            "Runs are compared on the same images; --data names data whose test split they are all scored on."
        )


def _duels(shared: Sequence[Predictions]) -> tuple[Duel, ...]:
    pairs = list(combinations(range(len(shared)), 2))
    tests = [analysis.mcnemar(shared[i], shared[j]) for i, j in pairs]
    corrected = analysis.holm([test.p for test in tests])
    return tuple(
        Duel(first=i, second=j, test=test, p=p) for (i, j), test, p in zip(pairs, tests, corrected, strict=True)
    )


def _changed(bundles: Sequence[Bundle]) -> dict[str, tuple[object, ...]]:
    """Return the settings in which the recipes differ, and the data where that does."""
    settings = [flat(bundle.card.recipe) for bundle in bundles]
    for values, bundle in zip(settings, bundles, strict=True):
        values["DATA"] = bundle.card.data.get("name")
        values["torch"] = bundle.card.versions.get("torch")
    rows = {key: tuple(values.get(key) for values in settings) for key in settings[0]}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _names(paths: Sequence[Path]) -> list[str]:
    """Name runs by their directories, by longer paths where these are the same."""
    short = [path.absolute().parent.name for path in paths]
    if len(set(short)) == len(short):
        return short
    names = ["/".join(path.absolute().parent.parts[-2:]) for path in paths]
    return names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names, start=1)]
