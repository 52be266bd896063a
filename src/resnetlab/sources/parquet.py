"""Parquet tables of encoded images, as Hugging Face publishes them. Nothing is unpickled."""

import bisect
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resnetlab.errors import ResNetLabError
from resnetlab.sources.dataset import Dataset, Split
from resnetlab.sources.folder import is_clutter
from resnetlab.sources.images import BrokenImage, EncodedImages, printable, read_header

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLIT = re.compile(r"(?:^|[-_.])(train|val|valid|validation|test)(?:ing)?(?=[-_.]|$)", re.IGNORECASE)
IMAGES = ("image", "img", "picture", "photo")
LABELS = ("label", "labels", "fine_label", "coarse_label")
"""Columns that are preferred when several could be meant, in this order."""


class _Table(NamedTuple):
    """One split as it lies in its files."""

    images: "_Column"
    where: Callable[[int], str]
    labels: NDArray[np.int64]
    """(N,), positions in ``names``."""
    names: tuple[str, ...]
    usable: NDArray[np.bool_]
    """(N,), whether the row has an image and a label."""


def read_parquet(path: Path, *, skip_broken: bool = False) -> Dataset:
    """Read one parquet file, or a folder of them whose names say train, validation or test.

    The encoded images are held in memory. The image column is found by its type (a struct with ``bytes``, or binary),
    the label column by its name or by being the only one that could be. Class names come from the ``huggingface``
    part of the schema, from text labels, or are the numbers.

    Args:
        path: The file or folder.
        skip_broken: Leave out rows without an image or a label instead of refusing.

    Raises:
        ResNetLabError: A file is not parquet, columns or rows are missing, or labels do not fit the classes.
    """
    found = group(path)
    if "train" not in found:
        raise ResNetLabError(f"{printable(path)} has parquet files of {' and '.join(found)}, but none of train.")
    for split, files in found.items():
        if len(folders := {file.parent for file in files}) > 1:
            listed = ", ".join(sorted(printable(folder) for folder in folders))
            raise ResNetLabError(f"{split} files lie in several folders, which could be versions: {listed}. Name one.")
    often = Counter(file.name for files in found.values() for file in files)  # train/0.parquet beside test/0.parquet
    tables = {
        split: _read(files, [printable(f.relative_to(path) if often[f.name] > 1 else f.name) for f in files], split)
        for split, files in found.items()
    }
    classes = tables["train"].names
    if classes == _digits(10) and _is_cifar10(path, tables["train"]):
        classes = CIFAR10
        tables = {split: table._replace(names=CIFAR10) for split, table in tables.items()}
    if not len(tables["train"].labels):
        raise ResNetLabError(f"{printable(path)} has no rows to train on.")
    notes: list[str] = []
    splits: dict[str, Split] = {}
    for split, table in tables.items():
        if not len(table.labels):
            notes.append(f"{split} has no rows and is left out.")
        elif split != "train" and (table.labels == -1).all():
            notes.append(f"{split} has no labels (all are -1) and is left out.")
        else:
            splits[split] = _split(table, split, classes, skip_broken, notes)
    return Dataset(
        name=printable(path.resolve().stem if path.is_file() else path.resolve().name),
        train=splits["train"],
        val=splits.get("val"),
        test=splits.get("test"),
        origin=printable(path),
        notes=tuple(notes),
    )


def group(path: Path) -> dict[str, list[Path]]:
    """Sort the files into splits by their names, or the folders that they are in, but for hidden and system files."""
    if path.is_file():
        return {"train": [path]}
    found: dict[str, list[Path]] = {}
    for file in sorted(file for file in path.rglob("*.parquet") if file.is_file()):  # folders may be called so too
        *folders, last = parts = file.relative_to(path).parts
        if any(map(is_clutter, parts)):
            continue
        found_in = [SPLIT.search(last), *(SPLIT.match(folder) for folder in reversed(folders))]
        name = next((match[1].lower() for match in found_in if match), "train")
        found.setdefault("val" if name.startswith("val") else name, []).append(file)
    return found


def _read(files: Sequence[Path], called: Sequence[str], split: str) -> _Table:
    """Read the image and label columns of one split; its images are named after what its files are called."""
    try:
        schema = pq.read_schema(files[0])
        image, label = _columns(schema, files[0])
        tables = [pq.ParquetFile(file).read([image, label]) for file in files]  # read_table would import pandas
        table = pa.concat_tables(tables)
    except (pa.ArrowException, OSError) as error:
        listed = ", ".join(printable(file) for file in files)
        raise ResNetLabError(f"Cannot read {listed} as parquet: {error}") from error
    images, paths = table[image], None
    if pa.types.is_struct(images.type):
        fields = [images.type.field(i).name for i in range(images.type.num_fields)]
        paths = pc.struct_field(images, "path") if "path" in fields else None
        images = pc.struct_field(images, "bytes")
    labels, names = _labels(table[label], _class_names(schema, label), f"{split}, column {label}")
    usable = np.array(pc.and_(images.is_valid(), table[label].is_valid()).to_pylist(), dtype=np.bool_)
    starts = [0, *itertools.accumulate(len(part) for part in tables)]

    def where(row: int) -> str:
        file = bisect.bisect_right(starts, row) - 1
        path = paths[row].as_py() if paths is not None else None
        return f"{called[file]} row {row - starts[file]}" + (f" ({path})" if path else "")

    return _Table(_Column(images), where, labels, names, usable)


class _Column(Sequence[bytes]):
    """A column of binary values as a sequence of bytes; the table's memory is shared."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[int(index)].as_py()


def _columns(schema: pa.Schema, file: Path) -> tuple[str, str]:
    """Find the image and the label column."""
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary)
    is_text = (pa.types.is_string, pa.types.is_large_string)
    images, whole, text = [], [], []
    for field in schema:
        inner = field.type.field("bytes").type if _has_bytes(field.type) else field.type
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if any(test(inner) for test in is_bytes):
            images.append(field.name)
        elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            whole.append(field.name)
        elif any(test(kind) for test in is_text):
            text.append(field.name)
    image = next((name for name in IMAGES if name in images), images[0] if len(images) == 1 else None)
    others = whole + text
    label = next((name for name in LABELS if name in others), others[0] if len(others) == 1 else None)
    if image is None or label is None:
        lacking = "image column (a struct with bytes, or binary)" if image is None else "label column"
        there = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ResNetLabError(
            f"{printable(file)} has no {lacking}, or several that could be it. It has {there}. "
            f'Call the right one "{IMAGES[0] if image is None else LABELS[0]}".'
        )
    return image, label


def _has_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Return the names in the schema's ``huggingface`` metadata, or none."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(str(name) for name in (names.values() if isinstance(names, dict) else names))
    except (KeyError, TypeError, ValueError):
        return ()


def _labels(column: pa.ChunkedArray, names: tuple[str, ...], where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return labels as positions in class names; a null is -1."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not pa.types.is_integer(column.type) and not pa.types.is_boolean(column.type):
        names = tuple(sorted(pc.unique(column).drop_null().to_pylist()))
        column = pc.index_in(column, pa.array(names, column.type))
    try:
        column = column.cast(pa.int64())
    except pa.ArrowInvalid as error:  # uint64 from 2⁶³ on
        raise ResNetLabError(f"{where}: {error}. Labels count the classes from 0.") from error
    numbers = column.to_pylist()  # a list, as pyarrow imports pandas to make an array: half a second
    labels = np.array([-1 if number is None else number for number in numbers], dtype=np.int64)
    if not names:
        top = int(labels.max(initial=0))
        if top >= max(len(labels), 2):
            raise ResNetLabError(f"{where}: the label {top} is larger than the number of images; are they identifiers?")
        names = _digits(top + 1)
    if labels.max(initial=0) >= len(names):
        raise ResNetLabError(f"{where}: the label {labels.max()} is out of range, there are {len(names)} classes.")
    return labels, names


def _digits(count: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(count))


def is_named(path: Path, name: str) -> bool:
    """Whether a file or a folder is called after a data set, as cifar10-hf is, or lies in one that has its very name.

    ``CIFAR-10`` and ``datasets--uoft-cs--cifar10`` are ``cifar10``; what lies in my-cifar10-project can be anything.
    """
    for place in (path.absolute(), path.resolve()):
        *above, last = (re.sub(r"[-_ ]", "", part.lower().rpartition("--")[2]) for part in place.parts)
        if name in last or name in above:
            return True
    return False


def _is_cifar10(path: Path, train: _Table) -> bool:
    """Whether this is CIFAR-10 without its class names: by the name of a folder, 10 labels and 32×32 images."""
    try:
        return is_named(path, "cifar10") and read_header(train.images[0])[2:] == (32, 32)
    except (BrokenImage, TypeError, IndexError):
        return False


def _split(table: _Table, split: str, classes: tuple[str, ...], skip_broken: bool, notes: list[str]) -> Split:
    """Match the labels to the classes of train by name, where they are not the same list."""
    bad = np.flatnonzero(~table.usable)
    if len(bad) and not skip_broken:
        first = ", ".join(table.where(int(row)) for row in bad[:10])
        raise ResNetLabError(
            f"{len(bad):,} of {len(table.usable):,} rows of {split} have no image or no label: {first}. "
            "Leave them out with --skip-broken."
        )
    if len(bad):
        notes.append(f"{len(bad):,} rows of {split} have no image or no label and are left out.")
    rows = np.flatnonzero(table.usable)
    labels = table.labels[rows]
    if labels.min(initial=0) < 0:
        raise ResNetLabError(
            f"{split}, {table.where(int(rows[labels.argmin()]))}: the label {labels.min()} is negative."
        )
    same = table.names == classes  # then two classes may have one name, as ImageNet's cranes do
    double = next((name for names in (classes, table.names) for name, n in Counter(names).items() if n > 1), None)
    if double is not None and not same:
        raise ResNetLabError(
            f'Two classes are called "{double}", so the classes of {split}, which has another list of them than train, '
            "cannot be told by their names. Give both files the same list, or each class a name of its own."
        )
    place = {name: i for i, name in enumerate(classes)}
    strange = [table.names[i] for i in np.unique(labels) if table.names[i] not in place]
    if strange:
        raise ResNetLabError(f"{split} has images of {', '.join(strange[:10])}, which train does not have.")
    to = np.array([i if same else place.get(name, -1) for i, name in enumerate(table.names)], dtype=np.int64)
    images = EncodedImages(table.images, table.where, rows.tolist())
    return Split(images=images, labels=to[labels] if len(labels) else labels, classes=classes)
