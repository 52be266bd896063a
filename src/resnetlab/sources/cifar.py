"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the original python batches, and finding or fetching them."""

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnetlab.errors import ResNetLabError
from resnetlab.sources.archive import unpack
from resnetlab.sources.dataset import Dataset, Progress, Split
from resnetlab.sources.download import cache, cannot_get, download, roots
from resnetlab.sources.images import ArrayImages, printable
from resnetlab.sources.parquet import CIFAR10, group, is_named, read_parquet

MIRROR = "https://www.cs.toronto.edu/~kriz/"


class _Kind(NamedTuple):
    """One of the two data sets, as it is published."""

    name: str
    folder: str
    archive: str
    md5: str
    """As torchvision states it too."""
    train: tuple[str, ...]
    test: str
    meta: str
    labels: bytes
    names: bytes
    classes: int


KINDS = (
    _Kind(
        name="cifar10",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels=b"labels",
        names=b"label_names",
        classes=10,
    ),
    _Kind(
        name="cifar100",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=("train",),
        test="test",
        meta="meta",
        labels=b"fine_labels",
        names=b"fine_label_names",
        classes=100,
    ),
)


def holds_batches(folder: Path) -> bool:
    """Whether a folder is one of the original ones."""
    return any(_holds(folder, kind) for kind in KINDS)


def _holds(folder: Path, kind: _Kind) -> bool:
    return all((folder / name).is_file() for name in (*kind.train, kind.test, kind.meta))


def read_batches(folder: Path) -> Dataset:
    """Read ``cifar-10-batches-py`` or ``cifar-100-python``, without running anything that a pickle may hold.

    Raises:
        ResNetLabError: A batch is damaged, hostile, or its shapes or labels are not those of the data set.
    """
    kind = next(kind for kind in KINDS if _holds(folder, kind))
    names = _unpickle(folder / kind.meta).get(kind.names)
    if not isinstance(names, list) or len(names) != kind.classes or not all(isinstance(n, bytes) for n in names):
        raise ResNetLabError(f"{printable(folder / kind.meta)} does not hold {kind.classes} class names.")
    classes = tuple(name.decode("utf-8", "backslashreplace") for name in names)
    return Dataset(
        name=kind.name,
        train=_split(folder, kind, kind.train, classes),
        test=_split(folder, kind, (kind.test,), classes),
        origin=printable(folder),
    )


def _split(folder: Path, kind: _Kind, files: tuple[str, ...], classes: tuple[str, ...]) -> Split:
    pixels, labels = [], []
    for name in files:
        batch = _unpickle(folder / name)
        data, listed = batch.get(b"data"), batch.get(kind.labels)
        whole = isinstance(listed, list) and all(type(label) is int and abs(label) < 2**63 for label in listed)
        numbers = np.array(listed if whole else [], dtype=np.int64)
        if not isinstance(data, _Array) or data.value.shape != (numbers.size, 3072) or numbers.size == 0:
            raise ResNetLabError(f"{printable(folder / name)} is not a CIFAR batch: images (N, 3072) and N labels.")
        if numbers.min() < 0 or numbers.max() >= kind.classes:
            raise ResNetLabError(f"{printable(folder / name)} has labels outside 0 to {kind.classes - 1}.")
        planes = batch[b"data"].value.reshape(-1, 3, 32, 32)
        pixels.append(planes.transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
        labels.append(numbers)
    images = ArrayImages(np.concatenate(pixels), "test" if files == (kind.test,) else "train")
    return Split(images=images, labels=np.concatenate(labels), classes=classes)


def _unpickle(path: Path) -> dict[bytes, Any]:
    """Read a pickled dictionary of numbers, text and arrays of bytes; anything else in it is refused, not run."""
    try:
        with open(path, "rb") as file:
            content = _Plain(file, encoding="bytes").load()
    except Exception as error:  # damaged pickles raise whatever their opcodes stumble over
        raise ResNetLabError(f"{printable(path)} is not a CIFAR batch: {error}") from error
    if not isinstance(content, dict):
        raise ResNetLabError(f"{printable(path)} is not a CIFAR batch: it holds no dictionary.")
    return content


class _Array:
    """Stands in for a numpy array of bytes while it is unpickled, so that numpy itself runs nothing a file says."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        self.value: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_Dtype", bool, bytes]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.code not in ("u1", b"u1"):
            raise pickle.UnpicklingError("refused an array of anything but bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands in for a numpy dtype."""

    def __init__(self, code: object, align: object, copy: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Take no byte order: bytes have none."""


def _latin1(text: str, encoding: str) -> bytes:
    """Stand in for `_codecs.encode`, which Python 3 writes for bytes in protocol 2: latin-1 and nothing else."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): "ndarray",  # is only named, never called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Plain(pickle.Unpickler):
    """An unpickler that knows the four names in a CIFAR batch."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which was refused; nothing of it was run")
        return _ALLOWED[module, name]


def find_cifar(name: str, *, progress: Progress | None = None) -> Dataset:
    """Find CIFAR-10 or CIFAR-100 on this machine, in any of its forms, or download it into our cache.

    Raises:
        ResNetLabError: It is nowhere and cannot be fetched; the message says where it was looked for.
    """
    kind = next(kind for kind in KINDS if kind.name == name)
    for place, read in _candidates(kind, progress):
        if place.exists():
            dataset = read(place)
            if dataset and len(dataset.train.classes) == kind.classes:
                return dataset
    url = os.environ.get("RESNETLAB_MIRROR", MIRROR).rstrip("/") + f"/{kind.archive}"
    archive = cache() / kind.archive
    try:
        download(url, archive, kind.md5, progress)
    except OSError as error:
        raise cannot_get(name, [*roots(), _hub()], url, error) from error
    return read_batches(unpack(archive, progress))


def _candidates(kind: _Kind, progress: Progress | None) -> Iterator[tuple[Path, Callable[[Path], Dataset | None]]]:
    """Yield the places where the data set may lie, and how to read it there."""
    for root in roots():
        for folder in (root, root / kind.name, root / kind.folder):
            yield folder, partial(_read_folder, kind)
            yield folder / kind.archive, partial(_read_archive, kind, progress)
    for snapshot in sorted(_hub().glob(f"datasets--*{kind.name}/snapshots/*")):
        yield snapshot, partial(_read_folder, kind)


def _hub() -> Path:
    """Return the folder where Hugging Face's libraries keep what they download."""
    home = Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def _read_folder(kind: _Kind, folder: Path) -> Dataset | None:
    """Read the batches or the parquet files in a folder that is named after the data set, when they are whole."""
    if _holds(folder, kind):
        return read_batches(folder)
    named = kind.name in re.sub(r"[-_ ]", "", printable(folder.absolute()).lower())
    if not named or not {"train", "test"} <= set(group(folder)):
        return None
    try:
        dataset = read_parquet(folder)
    except ResNetLabError:
        if is_named(folder, kind.name):
            raise
        return None  # what lies below "my-cifar10-project" can be anything
    return None if kind.name == "cifar10" and set(dataset.train.classes) != set(CIFAR10) else dataset


def _read_archive(kind: _Kind, progress: Progress | None, archive: Path) -> Dataset | None:
    """Unpack the original archive, if it is that."""
    with open(archive, "rb") as file:
        genuine = hashlib.file_digest(file, "md5").hexdigest() == kind.md5
    return read_batches(unpack(archive, progress)) if genuine else None
