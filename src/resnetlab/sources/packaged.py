"""Data sets that come with a package: scikit-learn's digits, and torchvision's classification data sets by name."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnetlab.errors import ResNetLabError
from resnetlab.files import existing_parent, locked
from resnetlab.sources.dataset import Dataset, Images, Split
from resnetlab.sources.download import cache, cannot_get, roots
from resnetlab.sources.images import ArrayImages, FileImages
from resnetlab.sources.splits import hold_out


def digits(*, split_seed: int = 0) -> Dataset:
    """Return scikit-learn's handwritten digits: 1,797 grey images of 8×8, a fifth of them held out for testing.

    They are half of the test part of UCI's "Optical Recognition of Handwritten Digits" and lie in the package.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]  # 0..16 → 0..255, (N, 8, 8, 1)
    labels = found.target.astype(np.int64)
    whole = Split(images=ArrayImages(pixels, "digits"), labels=labels, classes=tuple(str(i) for i in range(10)))
    kept, held = hold_out(labels, 0.2, split_seed, whole.classes)
    return Dataset(
        name="digits",
        train=whole.select(kept),
        test=whole.select(held),
        channels=1,
        mirrors=False,
        origin="scikit-learn",
        notes=(f"{len(held):,} of {len(whole):,} images are held out for testing (seed {split_seed}).",),
    )


class Packaged(NamedTuple):
    """A data set of torchvision's: its class there, and the arguments that select each split."""

    kind: str
    train: dict[str, Any] = {"split": "train"}  # noqa: RUF012 - never changed
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = {"split": "test"}  # noqa: RUF012
    mirrors: bool = True


_FLAG: dict[str, Any] = {"train": {"train": True}, "test": {"train": False}}
_THREE: dict[str, Any] = {"val": {"split": "val"}}
PACKAGED = {
    "mnist": Packaged("MNIST", **_FLAG, mirrors=False),
    "fashion-mnist": Packaged("FashionMNIST", **_FLAG),
    "kmnist": Packaged("KMNIST", **_FLAG, mirrors=False),
    "usps": Packaged("USPS", **_FLAG, mirrors=False),
    "svhn": Packaged("SVHN", mirrors=False),
    "stl10": Packaged("STL10"),
    "flowers102": Packaged("Flowers102", **_THREE),
    "oxford-iiit-pet": Packaged("OxfordIIITPet", train={"split": "trainval"}),
    "food101": Packaged("Food101"),
    "gtsrb": Packaged("GTSRB", mirrors=False),  # turn left, turn right
    "dtd": Packaged("DTD", **_THREE),
    "fgvc-aircraft": Packaged("FGVCAircraft", **_THREE),
    "country211": Packaged("Country211", val={"split": "valid"}),
    "imagenette": Packaged("Imagenette", test={"split": "val"}),
    "eurosat": Packaged("EuroSAT", train={}, test=None),
}


ARCHIVES = (".gz", ".tgz", ".zip", ".tar", ".bz2", ".xz")
"""How the names of files end that torchvision downloads and unpacks."""
Make = Callable[..., Any]
"""A class of torchvision's data sets."""
Wanted = Mapping[str, Mapping[str, Any]]
"""The arguments that select each split."""


def find_packaged(name: str) -> Dataset:
    """Return a data set of torchvision's, from where it lies or downloaded by torchvision into our cache.

    Raises:
        ResNetLabError: It is nowhere and cannot be downloaded; the message says where it was looked for.
    """
    from torchvision import datasets

    row = PACKAGED[name]
    make = getattr(datasets, row.kind)
    rows = {"train": row.train, "val": row.val, "test": row.test}
    wanted = {split: arguments for split, arguments in rows.items() if arguments is not None}
    home = cache() / name
    unfinished = home.with_name(f".{name}.unfinished")
    for folder in (folder for root in roots() for folder in (root, root / name)):
        if folder == home and (unfinished.exists() or os.access(existing_parent(home.parent), os.W_OK)):
            continue  # another process may be unpacking there: not without the lock
        if found := _there(make, wanted, folder):
            return _convert(name, row, found, folder)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home.with_name(f".{name}.lock"), wait=True):
            found = _fetch(make, wanted, home, unfinished)
    except Exception as error:  # torchvision lets through whatever its download and unpacking raise
        raise cannot_get(name, roots(), f"torchvision.datasets.{row.kind}(download=True)", error) from error
    return _convert(name, row, found, home)


def _there(make: Make, wanted: Wanted, folder: Path) -> dict[str, Any] | None:
    """Return torchvision's objects for what lies in a folder; None: it is not there, or not all of it."""
    with contextlib.suppress(RuntimeError, OSError, ValueError):
        if folder.is_dir():
            return {split: make(root=folder, **arguments) for split, arguments in wanted.items()}
    return None


def _fetch(make: Make, wanted: Wanted, home: Path, unfinished: Path) -> dict[str, Any]:
    """Let torchvision download what is not in ``home``, and unpack it there.

    It takes a folder that was being unpacked when its process ended for all of the data. So a file ``unfinished`` lies
    beside it meanwhile; where one was left, all but the archives, whose sums torchvision knows, is unpacked anew.
    """
    if not unfinished.exists() and (found := _there(make, wanted, home)):
        return found  # by another process, for which this one has waited
    unpacked = [file for file in home.rglob("*") if file.is_file() and not file.name.endswith(ARCHIVES)]
    if unfinished.exists():
        for file in unpacked:
            file.unlink()
        for folder, _, _ in os.walk(home, topdown=False):
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(folder)
        home.mkdir(exist_ok=True)
    elif not unpacked:  # what somebody has put there is not ours to clear away
        unfinished.touch()
    found = {split: make(root=home, download=True, **arguments) for split, arguments in wanted.items()}
    unfinished.unlink(missing_ok=True)
    return found


def _convert(name: str, row: Packaged, found: dict[str, Any], folder: Path) -> Dataset:
    """Turn torchvision's objects into our records."""
    read = {split: _images(data, f"{row.kind} {split}") for split, data in found.items()}
    named = getattr(found["train"], "classes", None) or range(max(int(y.max()) for _, y in read.values()) + 1)
    classes = tuple(_class(item) for item in named)
    splits = {s: Split(images=images, labels=labels, classes=classes) for s, (images, labels) in read.items()}
    for split, (_, labels) in read.items():
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ResNetLabError(f"{folder}: {split} of {name} has labels outside 0 to {len(classes) - 1}.")
    return Dataset(
        name=name,
        train=splits["train"],
        val=splits.get("val"),
        test=splits.get("test"),
        mirrors=row.mirrors,
        origin=str(folder),
    )


def _class(name: object) -> str:
    """Return a class's name: ImageNet's first synonym, MNIST's "0" of "0 - zero"."""
    text = str(name[0] if isinstance(name, tuple) else name)
    return text[0] if text[1:4] == " - " else text


def _images(data: Any, called: str) -> tuple[Images, np.ndarray[Any, np.dtype[np.int64]]]:
    """Take images and labels out of a torchvision data set without decoding any: arrays in memory, or files.

    Images of an array are named after what it is ``called``: no two splits alike, as names tell their images apart.
    torchvision has no one interface for this: arrays are ``data``, files are ``samples``, ``_samples``, or
    ``_image_files`` and ``_images`` beside ``_labels``.
    """
    if hasattr(data, "data") and not isinstance(data.data, list):
        pixels = np.asarray(data.data)
        if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
            pixels = pixels.transpose(0, 2, 3, 1)  # (N, C, H, W) → (N, H, W, C)
        labels = data.targets if hasattr(data, "targets") else data.labels
        pixels = pixels if pixels.ndim == 4 else pixels[..., None]
        return ArrayImages(np.ascontiguousarray(pixels), called), np.asarray(labels, dtype=np.int64)
    samples: Sequence[tuple[Any, Any]] | None = getattr(data, "samples", None) or getattr(data, "_samples", None)
    if samples is None:
        files = getattr(data, "_image_files", None) or data._images
        samples = list(zip(files, data._labels, strict=True))
    paths = [Path(path) for path, _ in samples]
    return FileImages(paths), np.array([int(label) for _, label in samples], dtype=np.int64)
