"""The records that every data source returns: images that are decoded when asked for, a split, a data set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""One image: (H, W, C), RGB or grey, 0 to 255."""


class Images(Protocol):
    """A sequence of images. They may lie in memory, in files or encoded in a table; reading one decodes it."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, index: int) -> Pixels:
        """Decode one image: (H, W, C) uint8, C = 1 or 3 alike for all.

        Raises:
            BrokenImage: It cannot be read.
        """
        ...

    def shape(self, index: int) -> tuple[int, int]:
        """Return height and width in pixels, from the header alone where there is one."""
        ...

    def name(self, index: int) -> str:
        """Say which image this is: its file, or its row in a table."""
        ...

    def select(self, indices: Sequence[int]) -> "Images":
        """Return the images at ``indices``, in that order, without decoding any."""
        ...


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images with their labels."""

    images: Images
    labels: NDArray[np.int64]
    """(N,), positions in ``classes``."""
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> "Split":
        """Return the rows at ``indices``, in that order."""
        rows = [int(i) for i in indices]
        return Split(images=self.images.select(rows), labels=self.labels[rows], classes=self.classes)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What DATA named: the splits that it came with, never mixed, and what was noticed on the way."""

    name: str
    train: Split
    val: Split | None = None
    test: Split | None = None
    channels: int = 3
    """1 when every image is grey, else 3."""
    mirrors: bool = True
    """Whether a mirrored image keeps its class; digits and letters do not."""
    origin: str = ""
    """Where it came from: the path, or the package."""
    notes: tuple[str, ...] = field(default=())
    """What the user should know: files passed over, splits made, classes missing somewhere."""
