"""Look at a finished run once, and write down all that its page shows: predictions, thumbnails, costs, doubles.

The page itself is drawn by `report` from what comes out of here, without the network.
"""

from dataclasses import replace

from resnetlab import chosen, evaluate, rundir
from resnetlab.bundle import Bundle
from resnetlab.chosen import Divided
from resnetlab.console import Display
from resnetlab.errors import ResNetLabError
from resnetlab.metrics import Predictions, RunData, Scorecard, score
from resnetlab.report.records import ReportData
from resnetlab.runtime import Runtime
from resnetlab.study import copies, labels, network, origin, pictures

__all__ = ["collect", "predict", "read", "recorded"]


def collect(bundle: Bundle, runtime: Runtime, display: Display, *, data: str | None = None) -> ReportData:
    """Gather what the page of a run shows.

    Args:
        bundle: The network; the files of its run lie beside it, or it is shown without them.
        runtime: Where to compute.
        display: Where progress is shown.
        data: Where the run's data lies now; None: where it lay.

    Raises:
        ResNetLabError: The run's files are damaged, or ``data`` cannot be read. Data that the run itself names and that
            is gone is not an error: what needs it is left out, and the page says so.
    """
    run = recorded(bundle)
    base = origin.describe(bundle)
    stages = network.stages(bundle, runtime)
    try:
        found = read(bundle, data)
        predictions = predict(bundle, found, runtime, display)
    except ResNetLabError as error:
        if data is not None:
            raise
        note = f"The data could not be read, so that everything with images is left out: {error}"
        return ReportData(run=run, origin=base, stages=stages, notes=(note,))
    split = "test" if "test" in predictions else "val" if "val" in predictions else ""
    said = (found.note, chosen.trained_on(found, split) if split else "")
    notes = (*filter(None, said), *_check(run, predictions.get(split), split))
    if split and run.score is None:
        run = replace(run, score=score(predictions[split]), score_split=split)
    scored = predictions.get(run.score_split)
    suspects, suspects_note = labels.suspects(scored)
    shown = found.splits.get(run.score_split)
    explained, explained_note = pictures.explain(bundle, shown, scored, runtime)
    return ReportData(
        run=run,
        origin=replace(base, command=origin.command(bundle, found.dataset)),
        predictions=scored,
        validation=predictions.get("val"),
        pictures=pictures.thumbnails(shown, scored, [s.index for s in suspects]) if shown and scored else {},
        suspects=suspects,
        suspects_note=suspects_note,
        explanations=explained,
        explanations_note=explained_note,
        stages=stages,
        balance={name: copies.counts(part, run.classes) for name, part in found.splits.items()},
        sheet=pictures.sheet(found.splits.get("train", found.dataset.train), run.classes),
        copies=copies.search(found.splits, display),
        notes=notes,
    )


def read(bundle: Bundle, data: str | None = None) -> Divided:
    """Find a run's data again and make its splits as the run made them.

    Raises:
        ResNetLabError: It is not there, or cannot be read.
    """
    if not (data or bundle.card.data.get("source")):
        raise ResNetLabError("the run does not say what it was trained on; name the data with --data")
    return chosen.divide(bundle, str(bundle.path.parent), data)


def predict(bundle: Bundle, found: Divided, runtime: Runtime, display: Display) -> dict[str, Predictions]:
    """Predict the validation and the test split, each once."""
    return {
        name: evaluate.predict_split(
            bundle,
            found.splits[name],
            runtime,
            skip_broken=bundle.card.recipe.data.skip_broken,
            progress=display.reading,
        )
        for name in ("val", "test")
        if name in found.splits
    }


def recorded(bundle: Bundle) -> RunData:
    """Read what the run's files say, or as much of it as the bundle alone knows."""
    directory, card = bundle.path.parent, bundle.card
    if rundir.is_run(directory) and (directory / rundir.CONFIG).is_file():
        return rundir.read_run(directory)
    name = card.data.get("name", "unknown data")
    return RunData(
        name=directory.absolute().name,
        title=f"{card.model.name} on {name}, recipe {card.recipe.name}",
        classes=card.classes,
        epochs=(),
    )


def _check(run: RunData, found: Predictions | None, split: str) -> tuple[str, ...]:
    """Hold the score that the run wrote down against the one that comes out now."""
    if run.score is None or found is None or split != run.score_split:
        return ()
    now: Scorecard = score(found)
    if abs(now.top1 - run.score.top1) * now.n < 1.5 and now.n == run.score.n:
        return ()
    return (
        f"Careful: the run recorded {run.score.top1:.2%} of {run.score.n:,} {split} images, but now it is "
        f"{now.top1:.2%} of {now.n:,}. The data has changed since, or the weights.",
    )
