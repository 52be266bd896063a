"""Which images a finished run is scored on: a split of its own data, exactly as it was made, or other data."""

from dataclasses import dataclass
from functools import partial

from resnetlab import loader, moved, rundir, sources
from resnetlab.bundle import Bundle
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.sources.dataset import Dataset, Split

SPLITS = ("test", "val", "train")
"""In the order in which the first that there is gets scored."""
AUTO, ALL = "auto", "all"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Images to score."""

    split: Split
    skip_broken: bool
    """Whether those that cannot be read are left out, as asked or as the run left them out."""
    notes: tuple[str, ...] = ()
    """What a person should know of the choice."""


@dataclass(frozen=True, kw_only=True)
class Divided:
    """What there is to choose from."""

    dataset: Dataset
    splits: dict[str, Split]
    divided: bool = False
    """Whether these are the run's own splits: that "train" was trained on is then no news."""
    trained: frozenset[str] = frozenset()
    """Images that the run seems to have been trained on, by their names."""
    note: str = ""


def choose(bundle: Bundle, run: str, data: str | None, split: str, *, skip_broken: bool = False) -> Chosen:
    """Return a split of DATA.

    Data that is the run's own (by its path, or by the names of its images where it has moved) is divided as the run
    divided it. Other data is taken as it is: nothing is held back from it.

    Args:
        bundle: The network, with its run's files beside it if they are there.
        run: What an error calls the run.
        data: What `train` accepts; None: the run's own.
        split: ``test``, ``val``, ``train``, ``auto`` (the first of these that there is), or ``all``: data in one piece,
            whole.
        skip_broken: Leave out the rows of another table that have no image or label.

    Raises:
        UsageError: No run has such a split, or the run does not say what it was trained on.
        ResNetLabError: The data has no such split, or cannot be read.
    """
    if split not in (*SPLITS, AUTO, ALL):
        raise UsageError(
            f'There is no split "{split}". Splits are {", ".join(SPLITS)}; {ALL} is data in one piece, whole.'
        )
    source = bundle.card.data.get("source")
    if data is None and not source:
        raise UsageError(f"{run} does not say what it was trained on. Name the DATA to evaluate.")
    own = data is None or sources.settled(data) == source
    kept = skip_broken or (own and bundle.card.recipe.data.skip_broken)
    if own and split != ALL:
        there = divide(bundle, run)
    else:
        there = _other(bundle, str(data or source), kept, whole=split == ALL)
    if split == AUTO:
        split = next(name for name in SPLITS if name in there.splits)
    if split not in there.splits:
        several = " is in splits already; name one of them." if split == ALL else f" has no {split} split."
        raise ResNetLabError(f"{there.dataset.name}{several}")
    found = there.splits[split]
    notes = (f"{there.note} {len(found):,} images are scored." if there.note else "", trained_on(there, split))
    return Chosen(split=found, skip_broken=kept, notes=tuple(note for note in notes if note))


def trained_on(there: Divided, split: str) -> str:
    """Say how many images of a split the network seems to have been trained on, where it should not have been."""
    found = there.splits[split]
    seen = 0 if split == "train" and there.divided else sum(name in there.trained for name in moved.names(found))
    known = (
        f"{seen:,} of the {len(found):,} images scored are named as images that the network was trained on. Where they "
        "are the same, the score is too good."
    )
    return known if seen else ""


def divide(bundle: Bundle, run: str, data: str | None = None) -> Divided:
    """Divide the run's own data as the run did; what it wrote down of its splits decides where the data has changed.

    Args:
        bundle: The network, with its run's files beside it if they are there.
        run: What an error calls the run.
        data: Where its data lies now; None: where it lay.

    Raises:
        ResNetLabError: The data is not there, or cannot be read.
    """
    config, source = bundle.card.recipe.data, data or str(bundle.card.data["source"])
    load = partial(sources.load_again, run=run) if data is None else sources.load
    dataset = load(source, skip_broken=config.skip_broken, split_seed=config.split_seed)
    train, val, _ = loader.split(config, dataset)
    made = {"train": train, "val": val, "test": loader.test_split(config, dataset)}
    splits = {name: part for name, part in made.items() if part is not None}
    before = recorded(bundle)
    joint = "runs" in bundle.card.data  # several networks were trained on more than the first one's images, perhaps
    own = {name: rows for name, rows in before.items() if name != "train" or not joint}
    if moved.agree(own, splits, fewer=config.skip_broken):
        trained = frozenset(before.get("train", ())) if joint else frozenset()
        return Divided(dataset=dataset, splits=splits, divided=True, trained=trained)
    found = moved.recognise(before, sources.load(source, skip_broken=config.skip_broken, hold_out_test=False))
    if found.splits:
        note = f"{dataset.name} has changed since the run, but the images of its splits are all there."
        return Divided(dataset=dataset, splits=found.splits, divided=True, note=note)
    note = f"{dataset.name} has changed since the run: images of its splits are gone."
    return Divided(dataset=dataset, splits=splits, divided=True, trained=found.trained, note=note)


def _other(bundle: Bundle, data: str, skip_broken: bool, *, whole: bool) -> Divided:
    """Return other data as it is, or divided as the run was where its images are all there."""
    dataset = sources.load(data, skip_broken=skip_broken, hold_out_test=False)
    there = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    splits = {name: part for name, part in there.items() if part is not None}
    found = moved.recognise(recorded(bundle), dataset)
    if whole:
        everything = {ALL: dataset.train} if len(splits) == 1 else {}
        return Divided(dataset=dataset, splits=everything, trained=found.trained)
    if found.trained and len(found.splits) > 1:
        note = (
            f"{dataset.name} has the images that the run was trained and tested on: it is divided as the run divided "
            f"it. --split {ALL} scores it whole."
        )
        return Divided(dataset=dataset, splits=found.splits, divided=True, note=note)
    return Divided(dataset=dataset, splits=splits, trained=found.trained)


def recorded(bundle: Bundle) -> dict[str, list[str]]:
    """Return the names of the images of each split that the run wrote down; none where the bundle lies alone."""
    path = bundle.path.parent / rundir.SPLITS
    found = rundir.read_json(path) if path.is_file() else {}
    lists = found.items() if isinstance(found, dict) else ()
    return {split: [str(name) for name in rows] for split, rows in lists if split in SPLITS and isinstance(rows, list)}
