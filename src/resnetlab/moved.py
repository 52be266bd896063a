"""Whether DATA is what a run was trained on, though it lies elsewhere now.

A run writes down the name of every image of every split. Below the folder that holds them all, those names stay what
they were when the folder moves: so the splits can be found again, and no training image is scored by mistake.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from resnetlab.sources.dataset import Dataset, Split

Names = Mapping[str, Sequence[str]]
"""What ``splits.json`` holds: the names of the images of each split."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What of a run's images is found in a data set."""

    splits: dict[str, Split]
    """The run's own splits; empty unless all their images are there."""
    trained: frozenset[str]
    """The images of the data set that are called as training images of the run, by their names there."""


def recognise(recorded: Names, dataset: Dataset) -> Moved:
    """Look for a run's images in a data set, by their names below the folder that holds them all.

    Args:
        recorded: The run's splits.
        dataset: In one piece or in splits; nothing was held out from it.
    """
    pool = {name: split for name in ("train", "val", "test") if (split := getattr(dataset, name)) is not None}
    listed = {name: names(split) for name, split in pool.items()}
    here = {
        relative: (name, row) for name, rows in _below(listed).items() for row, relative in enumerate(rows)
    }  # an image's name → its split and its place there
    before = _below(recorded)
    found = {split: _select(pool, [here.get(name, ("", 0)) for name in rows]) for split, rows in before.items()}
    whole = {split: part for split, part in found.items() if part is not None}
    rows = [here[name] for name in before.get("train", ()) if name in here]
    trained = {listed[name][row] for name, row in rows}
    if not trained and pool.keys() == {"train"}:  # perhaps one of the folders in the one that held them all
        trained = _ending(listed["train"], before.get("train", ()))
    return Moved(splits=whole if len(whole) == len(found) else {}, trained=frozenset(trained))


def agree(recorded: Names, splits: Mapping[str, Split], *, fewer: bool) -> bool:
    """Whether splits hold the images that the run recorded, and no more; ``fewer``: it may have left some out."""
    before = _below(recorded)
    now = _below({name: names(split) for name, split in splits.items() if name in recorded})
    return all(
        set(rows) <= set(now.get(name, ())) and (fewer or len(rows) == len(now[name])) for name, rows in before.items()
    )


def newcomer(recorded: Names, splits: Mapping[str, Split]) -> str:
    """Return the name of an image that no split had when they were recorded, below the folder of them all, or ""."""
    known = {name for rows in _below(recorded).values() for name in rows}
    now = _below({name: names(split) for name, split in splits.items()})
    return next((name for rows in now.values() for name in rows if name not in known), "")


def names(split: Split) -> list[str]:
    """Return the name of every image of a split."""
    return [split.images.name(i) for i in range(len(split))]


def _below(splits: Names) -> dict[str, list[str]]:
    """Return names as they are below the folder that holds all the images."""
    top = _common_folder(name for rows in splits.values() for name in rows)
    return {split: [name[len(top) :] for name in rows] for split, rows in splits.items()}


def _common_folder(every: Iterable[str]) -> str:
    """Return the longest folder that all names begin with, and the separator after it."""
    folders = [name.split(os.sep)[:-1] for name in every]
    if not folders:
        return ""
    first, last = min(folders), max(folders)
    same = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return os.sep.join([*first[:same], ""]) if same else ""


def _ending(paths: Sequence[str], ends: Sequence[str]) -> set[str]:
    """Return the paths that, written in full, end with one of ``ends``: with all of its folders."""
    known, depths = set(ends), {end.count(os.sep) + 1 for end in ends}
    return {
        path
        for path in paths
        if any(os.sep.join(os.path.abspath(path).split(os.sep)[-depth:]) in known for depth in depths)
    }


def _select(pool: Mapping[str, Split], places: Sequence[tuple[str, int]]) -> Split | None:
    """Return the images at places of one of the splits; None: they are not all in one of them."""
    parts = {name for name, _ in places}
    if len(parts) != 1 or not parts <= pool.keys():
        return None
    return pool[parts.pop()].select([row for _, row in places])
