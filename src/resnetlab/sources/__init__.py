"""Where images come from. DATA is one string, a name or a path; `load` makes a `Dataset` of it.

A new source is one function and a row: in `SOURCES` when it has a name, in `_read` when it is a kind of path.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from resnetlab.errors import ResNetLabError, UsageError, did_you_mean
from resnetlab.sources import copies
from resnetlab.sources.archive import is_archive, unpack
from resnetlab.sources.cifar import KINDS, find_cifar, holds_batches, read_batches
from resnetlab.sources.dataset import Dataset, Progress
from resnetlab.sources.describe import Survey, channel_statistics, samples, survey
from resnetlab.sources.download import roots as places
from resnetlab.sources.folder import read_folder
from resnetlab.sources.images import all_grey, is_image_name, printable
from resnetlab.sources.packaged import PACKAGED, digits, find_packaged
from resnetlab.sources.parquet import group, read_parquet
from resnetlab.sources.splits import TooFew, hold_out

__all__ = [
    "PACKAGED",
    "SOURCES",
    "Survey",
    "TooFew",
    "channel_statistics",
    "load",
    "load_again",
    "places",
    "samples",
    "survey",
]

TEST_SHARE = 0.1
"""Share of the images held out for testing when the data has no splits."""

Source = Callable[[Progress | None, int], Dataset]
"""Called with the progress and the seed of splits."""


def _cifar10(progress: Progress | None, split_seed: int) -> Dataset:
    return find_cifar("cifar10", progress=progress)


def _cifar100(progress: Progress | None, split_seed: int) -> Dataset:
    return find_cifar("cifar100", progress=progress)


def _digits(progress: Progress | None, split_seed: int) -> Dataset:
    return digits(split_seed=split_seed)


def _packaged(name: str) -> Source:
    return lambda progress, split_seed: find_packaged(name)


SOURCES: dict[str, Source] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    **{name: _packaged(name) for name in PACKAGED},
}


def load(
    data: str,
    *,
    skip_broken: bool = False,
    split_seed: int = 0,
    hold_out_test: bool = True,
    progress: Progress | None = None,
) -> Dataset:
    """Find what DATA names and return its splits. No image is decoded: `images.scan` finds the broken ones.

    A name from `SOURCES` goes before a path. Where the data has neither val nor test, a tenth of it, drawn from every
    class, is held out as the test split. The network is used only for a named data set that is not on this machine.

    Args:
        data: A name; a folder of class folders, of parquet, or the original CIFAR one; a parquet file; an archive.
        skip_broken: Leave out table rows without an image or label.
        split_seed: Decides which images are held out.
        hold_out_test: Make a test split where there is none; without it, data in one piece is all in ``train``.
        progress: Is told about downloads and unpacking.

    Raises:
        UsageError: There is no such data.
        ResNetLabError: It cannot be used; the message says what to do.
    """
    if name := _known(data):
        dataset = SOURCES[name](progress, split_seed)
        if os.path.exists(data):
            note = f'There is also a file or folder "{data}"; {os.path.join(".", data)} would mean it.'
            dataset = replace(dataset, notes=(*dataset.notes, note))
    else:
        dataset = _read(_existing(data), skip_broken, progress)
    if not hold_out_test:
        return _channels(dataset)
    used = np.unique(dataset.train.labels)
    if len(used) < 2:
        only = f', "{dataset.train.classes[used[0]]}"' if len(used) else ""
        hint = " If that is not a class, name the folder that holds the class folders." if os.path.isdir(data) else ""
        raise ResNetLabError(
            f"{printable(data)} has one class only{only}: at least two are needed to tell apart.{hint}"
        )
    return _channels(_with_test(dataset, split_seed))


def load_again(source: str, run: str, *, skip_broken: bool = False, split_seed: int = 0) -> Dataset:
    """Find the data that a run was trained on, as `load` does.

    Args:
        source: What the run's ``config.json`` calls it: a name or an absolute path.
        run: What an error calls the run.
        skip_broken: As `load`.
        split_seed: As `load`.

    Raises:
        ResNetLabError: It is gone, or it cannot be used.
    """
    if source not in SOURCES and not os.path.exists(source):
        raise ResNetLabError(
            f"The data of {run} is no longer at {printable(source)}. Put it there again (a link will do), or name the "
            "place where it lies now: `resnetlab evaluate RUN PLACE` finds its splits again, as does "
            "`resnetlab report RUN --data PLACE`."
        )
    return load(source, skip_broken=skip_broken, split_seed=split_seed)


def settled(data: str) -> str:
    """Return what `load` takes DATA for, wherever it is read again: a row's name, or an absolute path."""
    return _known(data) or os.path.abspath(os.path.expanduser(data))


def _known(data: str) -> str | None:
    """Return the row that DATA means: its exact name, or, where there is no such path, one like ``CIFAR-10``."""
    plain = {re.sub(r"[-_ ]", "", name): name for name in SOURCES}
    return data if data in SOURCES else None if os.path.exists(data) else plain.get(re.sub(r"[-_ ]", "", data.lower()))


def _existing(data: str) -> Path:
    """Return the path, or explain that there is none."""
    path = Path(os.path.expanduser(data))  # Path.expanduser raises where there is no such user
    if data.strip() and path.exists():
        return path
    parent = path.parent
    beside = [printable(entry.name) for entry in parent.iterdir()] if parent.is_dir() else []
    raise UsageError(
        f'There is no data set, file or folder called "{printable(data)}".'
        f"{did_you_mean(printable(path.name), [*beside, *SOURCES])} DATA is a path, or one of: "
        f"{', '.join(SOURCES)}."
    )


def _read(path: Path, skip_broken: bool, progress: Progress | None) -> Dataset:
    """Read what lies at a path, by what it is."""
    try:
        return _read_folder(path, skip_broken) if path.is_dir() else _read_file(path, skip_broken, progress)
    except OSError as error:
        raise ResNetLabError(f"Cannot read {printable(path)}: {error.strerror or error}.") from error


def _read_folder(path: Path, skip_broken: bool) -> Dataset:
    inner = next((path / kind.folder for kind in KINDS if holds_batches(path / kind.folder)), path)
    if holds_batches(inner):
        return read_batches(inner)
    if (any(path.glob("*.parquet")) or any(path.glob("*/*.parquet"))) and group(path):
        return read_parquet(path, skip_broken=skip_broken)
    try:
        return read_folder(path)
    except ResNetLabError:
        if "train" not in group(path):  # they may lie deeper; to look there takes long where there are many images
            raise
        return read_parquet(path, skip_broken=skip_broken)


def _read_file(path: Path, skip_broken: bool, progress: Progress | None) -> Dataset:
    if not path.is_file():
        raise ResNetLabError(f"{printable(path)} is neither a file nor a folder.")
    with open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if is_parquet or path.suffix.lower() == ".parquet":
        return read_parquet(path, skip_broken=skip_broken)
    if is_archive(path):
        place = unpack(path, progress)
        try:
            dataset = _read(place, skip_broken, progress)
        except ResNetLabError as error:
            raise ResNetLabError(f"{printable(path)}, unpacked: {error}") from error
        return replace(dataset, name=printable(path.name.split(".")[0]), origin=printable(path))
    hint = " It is one image; `resnetlab predict RUN IMAGE` looks at one." if is_image_name(path.name) else ""
    raise ResNetLabError(
        f"{printable(path)} is not a data set: a parquet file or an archive (zip, tar, tar.gz, tar.bz2, tar.xz) is "
        f"expected where it is a file.{hint}"
    )


def _with_test(dataset: Dataset, seed: int) -> Dataset:
    """Hold out a test split where the data came in one piece; never where it came with a validation split."""
    if dataset.test is not None:
        return dataset
    if dataset.val is not None:
        note = "There is no test split: accuracy can be measured on the validation split only."
        return replace(dataset, notes=(*dataset.notes, note))
    whole = dataset.train
    kept, held = hold_out(whole.labels, TEST_SHARE, seed, whole.classes)
    train, copied = copies.apart(whole.select(kept), test := whole.select(held))
    note = f"{len(held):,} of {len(whole):,} images, from every class, are held out for testing (seed {seed})."
    return replace(dataset, train=train, test=test, notes=(*dataset.notes, note, *([copied] if copied else [])))


def _channels(dataset: Dataset) -> Dataset:
    """Read the images as grey where all of them are."""
    splits = {name: split for name in ("train", "val", "test") if (split := getattr(dataset, name)) is not None}
    channels = 1 if all(all_grey(split.images) for split in splits.values()) else 3
    if channels == 3:
        return dataset
    grey = {name: replace(split, images=split.images.with_channels(1)) for name, split in splits.items()}
    return replace(dataset, channels=1, **grey)
