"""Doubled images: training images that are found again, or nearly so, in validation or test."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnetlab import analysis
from resnetlab.console import Display
from resnetlab.report.records import Copies, Copy
from resnetlab.sources.dataset import Split
from resnetlab.sources.images import BrokenImage
from resnetlab.study import pictures

MOST = {"train": 60_000, "val": 20_000, "test": 20_000}
"""Images of a split that are looked at, spread evenly over it: about ten seconds on one core for small images."""
BITS, GREYS = 6, 6.0
"""Two images look alike if their difference hashes differ in at most so many of 64 places, and their 16 × 16 thumbnails
by so many of 255 grey levels on average. The hash alone takes any two images of little detail for the same."""
SHOWN, CHECKED = 12, 200_000
"""Pairs on the page, and pairs with like hashes whose thumbnails are compared at most."""


@dataclass(frozen=True)
class _Looks:
    """What was noted of a split's images."""

    rows: NDArray[np.int64]
    digests: list[bytes]
    hashes: NDArray[np.float32]
    """(N, 64)."""
    greys: NDArray[np.float32]
    """(N, 256), thumbnails of 16 × 16."""


def counts(split: Split, classes: Sequence[str]) -> tuple[int, ...]:
    """Count a split's images by class, in the order of ``classes``."""
    found = np.bincount(split.labels, minlength=len(split.classes))
    by_name = dict(zip(split.classes, found.tolist(), strict=True))
    return tuple(int(by_name.get(name, 0)) for name in classes)


def search(splits: dict[str, Split], display: Display) -> Copies | None:
    """Compare every training image with every validation and test image; None: there is nothing to compare."""
    if "train" not in splits or len(splits) < 2:
        return None
    looks = {name: _look(split, MOST[name], name, display) for name, split in splits.items()}
    train, found = looks["train"], []
    exact_pairs = similar_pairs = unchecked = 0
    at = {digest: i for i, digest in reversed(list(enumerate(train.digests)))}
    for name, other in looks.items():
        if name == "train":
            continue
        exact = [(at[digest], i) for i, digest in enumerate(other.digests) if digest in at]
        pairs = analysis.near(train.hashes, other.hashes, BITS)
        unchecked += max(0, len(pairs) - CHECKED)
        pairs = pairs[:CHECKED]
        apart = np.abs(train.greys[pairs[:, 0]] - other.greys[pairs[:, 1]]).mean(axis=1)
        same = {j for _, j in exact}
        close = [
            (int(i), int(j), float(d))
            for (i, j), d in zip(pairs, apart, strict=True)
            if d <= GREYS and int(j) not in same
        ]
        exact_pairs += len(exact)
        similar_pairs += len(close)
        found += [(0.0, True, name, i, j) for i, j in exact[:SHOWN]]
        found += [(d, False, name, i, j) for i, j, d in sorted(close, key=lambda pair: pair[2])[:SHOWN]]
    found.sort(key=lambda pair: (not pair[1], pair[0]))
    compared = {name: len(look.rows) for name, look in looks.items()}
    return Copies(
        compared=compared,
        left_out=sum(len(split) for split in splits.values()) - sum(compared.values()),
        unchecked=unchecked,
        exact=exact_pairs,
        similar=similar_pairs,
        shown=tuple(_copy(splits, looks, *pair) for pair in found[:SHOWN]),
    )


def _look(split: Split, most: int, name: str, display: Display) -> _Looks:
    rows, digests, hashes, greys = [], [], [], []
    chosen = np.unique(np.linspace(0, len(split) - 1, min(most, len(split))).astype(int))
    for done, row in enumerate(chosen.tolist(), start=1):
        if done % 100 == 0 or done == len(chosen):
            display.reading(f"comparing {name}", done, len(chosen))
        try:
            pixels = split.images.read(row, (32, 32))
        except BrokenImage:
            continue
        grey = pictures.pillow(pixels).convert("L")
        rows.append(row)
        digests.append(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest())
        hashes.append(np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.float32))
        greys.append(np.asarray(grey.resize((16, 16), Image.Resampling.BOX), np.float32).reshape(-1))
    return _Looks(
        np.array(rows, dtype=np.int64),
        digests,
        analysis.difference_hash(np.stack(hashes) if hashes else np.zeros((0, 8, 9), np.float32)),
        np.stack(greys) if greys else np.zeros((0, 256), np.float32),
    )


def _copy(
    splits: dict[str, Split], looks: dict[str, _Looks], difference: float, exact: bool, name: str, i: int, j: int
) -> Copy:
    one, two = int(looks["train"].rows[i]), int(looks[name].rows[j])
    train, other = splits["train"], splits[name]
    return Copy(
        first=f"train: {train.images.name(one)}",
        second=f"{name}: {other.images.name(two)}",
        first_class=train.classes[train.labels[one]],
        second_class=other.classes[other.labels[two]],
        exact=exact,
        difference=difference,
        first_picture=pictures.thumbnail(train.images.read(one, (pictures.SIDE, pictures.SIDE))),
        second_picture=pictures.thumbnail(other.images.read(two, (pictures.SIDE, pictures.SIDE))),
    )
