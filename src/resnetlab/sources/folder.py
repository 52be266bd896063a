"""A folder of class folders, with or without train, val and test folders above them."""

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from resnetlab.errors import ResNetLabError
from resnetlab.sources.dataset import Dataset, Split
from resnetlab.sources.images import FileImages, is_image_name, printable

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Folder names of each split, in any case."""
CLUTTER = ("__macosx", "thumbs.db", "desktop.ini")
"""What systems leave behind, besides hidden files."""

Classes = dict[str, list[Path]]
"""Class name → its files."""


def read_folder(root: Path) -> Dataset:
    """Read a folder of class folders. Nothing is written, and no image is opened.

    A class is the topmost folder; what lies in folders below it belongs to it. The classes are those of train, sorted
    by name; the folders of the other splits are matched to them by name.

    Raises:
        ResNetLabError: There are no classes, or val or test has a class that train lacks.
    """
    lister = _Lister()
    roots = _split_folders(root)
    found = {split: lister.classes(folder) for split, folder in roots.items()}
    everything = found.pop("train")
    lister.remarks += [f'The folder "{name}" has no images and is left out.' for name, p in everything.items() if not p]
    train = {name: paths for name, paths in everything.items() if paths}
    if not train:
        raise ResNetLabError(
            f"{printable(root)} has no images in class folders. Expected is a folder for each class, for example "
            f"{printable(root)}/cat/1.jpg and {printable(root)}/dog/2.jpg, or such folders inside train, val and "
            f"test. {' '.join(lister.notes())}".rstrip()
        )
    classes = tuple(sorted(train))
    splits = {"train": _split(train, classes)}
    for name, other in found.items():
        if strange := sorted(k for k, paths in other.items() if paths and k not in train):
            raise ResNetLabError(
                f"{printable(roots[name])} has images of {_names(strange)}, which train does not have. Rename or "
                f"remove them; train has {_names(classes)}."
            )
        if missing := [k for k in classes if not other.get(k)]:
            lister.remarks.append(f"{name} has no images of {_names(missing)}.")
        if any(other.values()):
            splits[name] = _split(other, classes)
        else:
            lister.remarks.append(f"{name} has no images and is left out.")
    return Dataset(
        name=printable(root.resolve().name),
        origin=printable(root),
        notes=lister.notes(),
        train=splits["train"],
        val=splits.get("val"),
        test=splits.get("test"),
    )


def _split(files: Classes, classes: tuple[str, ...]) -> Split:
    counts = [len(files.get(name, ())) for name in classes]
    paths = [path for name in classes for path in files.get(name, ())]
    return Split(images=FileImages(paths), labels=np.repeat(np.arange(len(classes)), counts), classes=classes)


def _names(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(f'"{name}"' for name in names[:10]) + more


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split; the root is train's when it has no split folders.

    A folder called "train" that has no folders in it, beside other folders, is a class (of vehicles, say).
    """
    inside = sorted(entry.name for entry in _entries(root) if _is_folder(entry))
    found = {split: [name for name in inside if name.lower() in names] for split, names in SPLITS.items()}
    others = [name for name in inside if not any(name in names for names in found.values()) and not is_clutter(name)]
    is_class = all(not any(_is_folder(e) for e in _entries(root / name)) for names in found.values() for name in names)
    if not any(found.values()) or (is_class and others):
        return {"train": root}
    for names in found.values():
        if len(names) > 1:
            raise ResNetLabError(f"{printable(root)} has {_names(names)}, which mean the same split. Keep one.")
    if not found["train"]:
        have = _names([name for names in found.values() for name in names])
        raise ResNetLabError(f'{printable(root)} has {have} but no "train" folder.')
    return {split: root / names[0] for split, names in found.items() if names}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that systems leave behind."""
    return name.startswith(".") or name.lower() in CLUTTER


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise ResNetLabError(f"Cannot list {printable(folder)}: {error.strerror}.") from error


class _Lister:
    """Lists class folders and counts what it passes over, each folder once and each file once a class."""

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()
        self.remarks: list[str] = []
        self._seen: set[tuple[int, int]] = set()

    def classes(self, root: Path) -> Classes:
        """Return the files of every folder in ``root``; names that differ only in Unicode form are one class."""
        self._seen.add(_identity(root))
        folders = []
        for entry in sorted(_entries(root), key=lambda e: e.name):
            if is_clutter(entry.name):
                self.passed["hidden or system file or folder"] += 1
            elif not _is_folder(entry):
                self.passed["file outside the class folders"] += 1
            elif (identity := _identity(Path(entry.path))) not in self._seen:
                self._seen.add(identity)  # all the classes first, so that a link from one into another ends
                folders.append(Path(entry.path))
            else:
                self.passed["link to a folder that was listed"] += 1
        found: Classes = {}
        for folder in folders:
            name = unicodedata.normalize("NFC", printable(folder.name))
            found.setdefault(name, []).extend(self._files(folder))
        folded = Counter(name.casefold() for name in found)
        if twins := sorted(name for name in found if folded[name.casefold()] > 1):
            self.remarks.append(f"Classes that differ in upper and lower case only: {_names(twins)}.")
        return found

    def _files(self, top: Path) -> list[Path]:
        """Return the image files in and below a folder, sorted; linked ones too."""
        files: list[str] = []
        seen: set[tuple[int, int]] = set()
        folders = [str(top)]
        while folders:
            folder = folders.pop()
            device = os.stat(folder).st_dev
            for entry in sorted(_entries(Path(folder)), key=lambda e: e.name):
                if is_clutter(entry.name):
                    self.passed["hidden or system file or folder"] += 1
                elif _is_folder(entry):
                    if (identity := _identity(Path(entry.path))) in self._seen:
                        self.passed["link to a folder that was listed"] += 1
                    else:
                        self._seen.add(identity)
                        folders.append(entry.path)
                elif reason := self._unfit(entry, device, seen):
                    self.passed[reason] += 1
                else:
                    files.append(entry.path)
        return [Path(path) for path in sorted(files)]

    def _unfit(self, entry: os.DirEntry[str], device: int, seen: set[tuple[int, int]]) -> str:
        """Say why a file is not taken, or nothing when it is. Asks the system about links only: it is fast."""
        if not is_image_name(entry.name):
            return "file of another kind"
        identity = (device, entry.inode())
        if entry.is_symlink():
            try:
                target = os.stat(entry.path)
            except OSError:
                return "broken link"
            if not stat.S_ISREG(target.st_mode):
                return "pipe, socket or device"
            identity = (target.st_dev, target.st_ino)
        elif not entry.is_file():
            return "pipe, socket or device"
        if identity in seen:
            return "second link to the same file"
        seen.add(identity)
        return ""

    def notes(self) -> tuple[str, ...]:
        """Return the remarks, and what was passed over, with counts."""
        passed = ", ".join(f"{count:,} × {what}" for what, count in sorted(self.passed.items()))
        return (*self.remarks, *([f"Passed over: {passed}."] if passed else []))


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
