"""What is in a data set and what is wrong with it: counts, sizes, colours, broken and doubled images."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from resnetlab.sources.dataset import Dataset, Header, Images, Pixels, Progress, Split
from resnetlab.sources.images import BrokenImage, scan

FEW = 10
"""Training images below which a class counts as very small."""
IMBALANCE = 10
"""How many times more images the largest class may have than the smallest before it is remarked on."""
LONG = 4.0
"""Ratio of the sides from which an image counts as extreme: most of it is cropped away."""
ENORMOUS = 20_000_000
"""Pixels from which an image is slow to decode (0.35 s for a 20 Mpx JPEG on one core) for no gain."""
SUFFIXES = {
    "JPEG": {"jpg", "jpeg", "jfif"},
    "PNG": {"png"},
    "WEBP": {"webp"},
    "BMP": {"bmp"},
    "GIF": {"gif"},
    "TIFF": {"tif", "tiff"},
}


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel over all pixels, in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SplitSurvey:
    """One split."""

    name: str
    images: int
    broken: int
    per_class: tuple[int, ...]
    """Images of each class, broken ones too, in the order of the classes."""
    smallest: tuple[int, int]
    """Least height and least width, in pixels."""
    median: tuple[int, int]
    largest: tuple[int, int]
    kinds: dict[str, int]
    """Format and mode, such as ``JPEG RGB`` → images."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A whole data set."""

    name: str
    origin: str
    channels: int
    classes: tuple[str, ...]
    splits: tuple[SplitSurvey, ...]
    statistics: ChannelStatistics
    """Of the training images."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain lists, numbers and text, for JSON."""
        return asdict(self)


class _Look(NamedTuple):
    """What one decoded image showed."""

    row: int
    header: Header
    digest: bytes
    """SHA-256 of its size and pixels, so that copies in other formats are found too (lossless ones)."""
    sums: tuple[float, ...]
    squares: tuple[float, ...]


def survey(dataset: Dataset, progress: Progress | None = None) -> Survey:
    """Decode every image once and describe what was found."""
    splits = dict(_splits(dataset))
    seen: dict[str, tuple[list[_Look], list[BrokenImage]]] = {
        name: scan(split.images, lambda i, p, images=split.images: _look(images, i, p), progress=progress)  # type: ignore[misc]
        for name, split in splits.items()
    }
    problems = [f"{name}: {error}" for name, (_, broken) in seen.items() for error in broken]
    problems += _class_problems(splits)
    problems += _image_problems(splits, {name: looks for name, (looks, _) in seen.items()})
    problems += _copies(splits, {name: looks for name, (looks, _) in seen.items()})
    return Survey(
        name=dataset.name,
        origin=dataset.origin,
        channels=dataset.channels,
        classes=dataset.train.classes,
        splits=tuple(_describe(name, splits[name], looks, len(broken)) for name, (looks, broken) in seen.items()),
        statistics=_pool(seen["train"][0], dataset.channels),
        problems=tuple(problems),
        notes=dataset.notes,
    )


def channel_statistics(images: Images, progress: Progress | None = None) -> ChannelStatistics:
    """Return mean and standard deviation of each channel over all pixels of the images that can be read."""
    looks, _ = scan(images, lambda i, p: _look(images, i, p, digest=False), progress=progress)
    return _pool(looks, len(looks[0].sums) if looks else 0)


def samples(dataset: Dataset, per_class: int) -> dict[str, list[Pixels]]:
    """Return some training images of each class, evenly spaced among those that can be read, for a contact sheet."""
    train = dataset.train
    found: dict[str, list[Pixels]] = {}
    for label, name in enumerate(train.classes):
        mine = np.flatnonzero(train.labels == label)
        spread = mine[np.linspace(0, max(len(mine) - 1, 0), min(per_class, len(mine))).astype(int)]
        found[name] = []
        for index in [*spread, *np.setdiff1d(mine, spread)]:
            if len(found[name]) == per_class:
                break
            try:
                found[name].append(train.images.read(int(index), (128, 128)))
            except BrokenImage:
                continue
    return found


def _splits(dataset: Dataset) -> Iterator[tuple[str, Split]]:
    for name in ("train", "val", "test"):
        if (split := getattr(dataset, name)) is not None:
            yield name, split


def _look(images: Images, index: int, pixels: Pixels, digest: bool = True) -> _Look:
    """Sum up one image; the sums are whole numbers below 2⁵³, so exact."""
    height, width, channels = pixels.shape
    flat = pixels.reshape(-1, channels)
    sums, squares = np.zeros(channels), np.zeros(channels)
    for start in range(0, len(flat), 2**18):
        block = flat[start : start + 2**18].astype(np.float64)
        ones = np.ones(len(block))
        sums += ones @ block  # three times as fast as a sum along the first axis
        squares += ones @ (block * block)
    header = images.header(index) if digest else Header("", "", height, width)
    sha = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest() if digest else b""
    return _Look(index, header, sha, tuple(sums.tolist()), tuple(squares.tolist()))


def _pool(looks: Sequence[_Look], channels: int) -> ChannelStatistics:
    if not looks:
        return ChannelStatistics(mean=(0.0,) * channels, std=(0.0,) * channels)
    pixels = sum(look.header.height * look.header.width for look in looks)
    mean = np.array([sum(column) for column in zip(*(look.sums for look in looks), strict=True)]) / pixels / 255
    square = np.array([sum(c) for c in zip(*(look.squares for look in looks), strict=True)]) / pixels / 255**2
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return ChannelStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _describe(name: str, split: Split, looks: Sequence[_Look], broken: int) -> SplitSurvey:
    sizes = np.array([look.header[2:] for look in looks] or [(0, 0)])

    def pair(values: Any) -> tuple[int, int]:
        return int(values[0]), int(values[1])

    return SplitSurvey(
        name=name,
        images=len(split),
        broken=broken,
        per_class=tuple(np.bincount(split.labels, minlength=len(split.classes)).tolist()),
        smallest=pair(sizes.min(0)),
        median=pair(np.median(sizes, 0)),
        largest=pair(sizes.max(0)),
        kinds=dict(Counter(f"{look.header.format} {look.header.mode}" for look in looks).most_common()),
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _class_problems(splits: dict[str, Split]) -> Iterator[str]:
    classes = splits["train"].classes
    for name, split in splits.items():
        counts = np.bincount(split.labels, minlength=len(classes))
        if missing := [classes[i] for i in np.flatnonzero(counts == 0)]:
            yield f"{name} has no images of {_listed(missing)}."
        if name != "train":
            continue
        if few := [f"{classes[i]} ({counts[i]})" for i in np.flatnonzero((counts > 0) & (counts < FEW))]:
            yield f"Fewer than {FEW} training images: {_listed(few)}."
        small, large = counts[counts > 0].min(), counts.max()
        if large > IMBALANCE * small:
            yield (
                f"The classes are uneven, {large / small:.0f} to 1: {classes[int(counts.argmax())]} has {large:,} "
                f"training images, {classes[int(np.where(counts > 0, counts, large).argmin())]} has {small:,}."
            )


def _image_problems(splits: dict[str, Split], seen: dict[str, list[_Look]]) -> Iterator[str]:
    """Remark on unusual headers, a line for each kind of remark."""
    found: dict[str, list[str]] = defaultdict(list)
    for split, looks in seen.items():
        images = splits[split].images
        for look in looks:
            form, _, height, width = look.header
            suffix = PurePath(images.name(look.row)).suffix[1:].lower()
            if any(suffix in s for s in SUFFIXES.values()) and suffix not in SUFFIXES.get(form, {suffix}):
                found["Content and extension differ (read by content)"].append(f"{images.name(look.row)} is {form}")
            if max(height, width) > LONG * min(height, width):
                text = f"{images.name(look.row)} ({width:,} × {height:,})"
                found[f"Sides differ more than {LONG:.0f} to 1"].append(text)
            if height * width > ENORMOUS:
                text = f"{images.name(look.row)} ({width:,} × {height:,})"
                found[f"Larger than {ENORMOUS / 1e6:.0f} million pixels, slow to decode"].append(text)
    for kind, names in found.items():
        yield f"{kind}, {len(names):,}: {_listed(names)}."


def _copies(splits: dict[str, Split], seen: dict[str, list[_Look]]) -> Iterator[str]:
    """Remark on images that are there more than once: in a split, in several, under several classes."""
    places: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for split, looks in seen.items():
        for look in looks:
            places[look.digest].append((split, look.row))
    found: dict[str, list[str]] = defaultdict(list)
    for copies in places.values():
        if len(copies) < 2:
            continue
        text = " = ".join(splits[split].images.name(index) for split, index in copies[:3])
        within = sorted({split for split, _ in copies})
        if len({int(splits[split].labels[index]) for split, index in copies}) > 1:
            found["The same image under two classes"].append(text)
        if len(within) > 1:
            found[f"The same image in {' and '.join(within)} (what is measured is partly memory)"].append(text)
        if len(within) < len(copies):
            found["The same image twice in a split"].append(text)
    for kind, names in sorted(found.items()):
        yield f"{kind}, {len(names):,}: {_listed(names)}."
