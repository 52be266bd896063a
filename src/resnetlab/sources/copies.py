"""The same image in two splits: what is then measured is partly memory. Found in what is stored, without decoding."""

import hashlib
import os
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from resnetlab.sources.dataset import Images, Split
from resnetlab.sources.images import ArrayImages, EncodedImages, FileImages


def shared(split: Split, other: Split) -> NDArray[np.int64]:
    """Return the positions in ``split`` of images that are also, byte for byte, in ``other``, ascending.

    Only images are compared whose size, or in memory whose checksum, occurs in both: next to none.
    """
    return _shared(split, _marks(split.images), other, _marks(other.images))


def _shared(split: Split, mine: NDArray[np.int64], other: Split, theirs: NDArray[np.int64]) -> NDArray[np.int64]:
    common = np.intersect1d(mine[mine > 0], theirs[theirs > 0])
    known = set(_digests(other.images, np.flatnonzero(np.isin(theirs, common))))
    rows = np.flatnonzero(np.isin(mine, common))
    return np.array([row for row, digest in zip(rows, _digests(split.images, rows), strict=True) if digest in known],
                    dtype=np.int64)  # fmt: skip


def apart(train: Split, held: Split) -> tuple[Split, str | None]:
    """Return the training images without those that are also in a split held out of them, and a note that says so.

    A class keeps its images where all of them are copies.
    """
    copies = shared(train, held)
    left = np.setdiff1d(np.arange(len(train)), copies)
    lost = np.setdiff1d(np.unique(train.labels), np.unique(train.labels[left]))
    drop = copies[~np.isin(train.labels[copies], lost)]
    if not len(drop):
        return train, None
    note = f"{len(drop):,} training images are copies of images held out, and are left out (the first: "
    return train.select(np.setdiff1d(np.arange(len(train)), drop)), f"{note}{train.images.name(int(drop[0]))})."


def notes(splits: dict[str, Split | None]) -> Iterator[str]:
    """Yield a line for each two splits that share images."""
    there = [(name, split, _marks(split.images)) for name, split in splits.items() if split is not None]
    for i, (name, split, mine) in enumerate(there):
        for earlier, other, theirs in there[:i]:
            if len(copies := _shared(split, mine, other, theirs)):
                yield (
                    f"{len(copies):,} images of {name} are in {earlier} too, byte for byte (the first: "
                    f"{split.images.name(int(copies[0]))}): what is measured on them is memory."
                )


def _marks(images: Images) -> NDArray[np.int64]:
    """Return a number for each image that is the same for the same images; 0 where there is none to be told.

    It is a checksum of the pixels in memory, else the bytes that the image takes where it is stored.
    """
    if isinstance(images, ArrayImages):
        rows = np.ascontiguousarray(images.pixels).reshape(len(images), -1)
        return np.array([1 + zlib.crc32(row.data) for row in rows], dtype=np.int64)
    return np.array([_size(images, row) for row in range(len(images))], dtype=np.int64)


def _size(images: Images, row: int) -> int:
    if not isinstance(images, FileImages | EncodedImages):
        return 0
    source = images.source(row)
    try:
        return len(source) if isinstance(source, bytes) else os.stat(source).st_size
    except OSError:  # it is gone; reading the images says so
        return 0


def _digests(images: Images, rows: NDArray[np.int64]) -> Iterator[bytes]:
    """Yield the SHA-256 of each image as it is stored; nothing that occurs twice for a file that cannot be read."""
    for row in rows.tolist():
        if isinstance(images, ArrayImages):
            yield hashlib.sha256(images.pixels[row].tobytes()).digest()
        elif isinstance(images, FileImages | EncodedImages):
            source = images.source(row)
            try:
                content = source if isinstance(source, bytes) else source.read_bytes()
            except OSError:
                content = f"unreadable {id(images)} {row}".encode()
            yield hashlib.sha256(content).digest()
