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
"""Images of a split that are looked at, spread evenly over it: about twenty seconds on two cores for small images."""
BITS, GREYS = 6, 7.5
"""Two images look alike if their difference hashes differ in at most so many of 64 places, and their 16 × 16 thumbnails
by so many of 255 grey levels, root mean square. The hash alone takes any two images of little detail for the same."""
SHOWN = 12
"""Pairs on the page."""


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
    exact_pairs = similar_pairs = 0
    at = {digest: i for i, digest in reversed(list(enumerate(train.digests)))}
    for name, other in looks.items():
        if name == "train":
            continue
        exact = [(at[digest], i) for i, digest in enumerate(other.digests) if digest in at]
        same = np.array(sorted({j for _, j in exact}), dtype=np.int64)
        close: list[tuple[float, int, int]] = []
        for first, second, apart in analysis.near(
            (train.hashes, train.greys), (other.hashes, other.greys), BITS, GREYS
        ):
            new = np.flatnonzero(~np.isin(second, same))
            similar_pairs += len(new)
            new = new[np.argsort(apart[new], kind="stable")[:SHOWN]]
            close += zip(apart[new].tolist(), first[new].tolist(), second[new].tolist(), strict=True)
            close = sorted(close)[:SHOWN]
        exact_pairs += len(exact)
        found += [(0.0, True, name, i, j) for i, j in exact[:SHOWN]]
        found += [(d, False, name, i, j) for d, i, j in close]
    found.sort(key=lambda pair: (not pair[1], pair[0]))
    compared = {name: len(look.rows) for name, look in looks.items()}
    return Copies(
        compared=compared,
        left_out=sum(len(split) for split in splits.values()) - sum(compared.values()),
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
