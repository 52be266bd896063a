"""The records that every data source returns: images that are decoded when asked for, a split, a data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""One image: (H, W, C), RGB or grey, 0 to 255."""

Progress = Callable[[int, int], None]
"""Is told now and then how much is done and how much there is (images, or bytes)."""


class Header(NamedTuple):
    """What an image says about itself before it is decoded."""

    format: str
    """``JPEG``, ``PNG``, ...; ``array`` when it lies in memory."""
    mode: str
    """Pillow's name for the kind of pixel: ``L``, ``RGB``, ``P``, ``I;16``, ..."""
    height: int
    """In pixels, upright (after EXIF orientation)."""
    width: int

    @property
    def is_grey(self) -> bool:
        """Whether the pixels have no colour."""
        return self.mode in ("1", "L", "LA", "La", "F") or self.mode.startswith("I")


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

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> Pixels:
        """Decode one image as indexing does, but a JPEG perhaps at 1/2, 1/4 or 1/8 of its size, which is faster.

        Args:
            index: Which.
            at_least: Height and width in pixels that neither side may fall below. None: full size.

        Raises:
            BrokenImage: It cannot be read.
        """
        ...

    def header(self, index: int) -> Header:
        """Return format, mode and size without decoding the image.

        Raises:
            BrokenImage: The header cannot be read.
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

    def with_channels(self, channels: int) -> "Images":
        """Return the same images with one channel (grey) or three (RGB)."""
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
