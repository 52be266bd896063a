"""The images that a person names to have them predicted: files, folders, patterns, standard input."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.sources.images import BrokenImage, decode, is_image_name

Found = tuple[str, Path | bytes]
"""What to call an image, and where it is: a file, or its bytes."""


def gather(words: Sequence[str], stdin: BinaryIO) -> list[Found]:
    """Return the images that words name, in order, those of a folder sorted by name.

    Args:
        words: Files, folders (searched through), patterns (``**`` too), or ``-`` for standard input.
        stdin: Holds one image, or text with a path a line.

    Raises:
        UsageError: No words.
        ResNetLabError: A word names nothing, or a folder holds no images.
    """
    if not words:
        raise UsageError("Name at least one image: a file, a folder, a pattern such as 'photos/*.jpg', or -.")
    found: list[Found] = []
    for word in words:
        path = Path(word)
        if word == "-":
            found += _from_stdin(stdin.read())
        elif path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if is_image_name(p.name) and p.is_file()]
            if not files:
                raise ResNetLabError(f"There are no images in the folder {word}.")
            found += [(str(p), p) for p in files]
        elif path.exists():
            found.append((word, path))
        elif matches := sorted(glob.glob(word, recursive=True)):
            found += [(m, Path(m)) for m in matches if Path(m).is_file()]
        else:
            raise ResNetLabError(f"There is no image {word}.")
    return found


def read(found: Sequence[Found], channels: int) -> tuple[list[tuple[str, NDArray[np.uint8]]], list[BrokenImage]]:
    """Decode what `gather` found.

    Returns:
        Names with pixels (H, W, C) uint8, and an error for each image that cannot be read.
    """
    good: list[tuple[str, NDArray[np.uint8]]] = []
    broken: list[BrokenImage] = []
    for name, source in found:
        try:
            good.append((name, decode(source, channels=channels)))
        except BrokenImage as error:
            broken.append(error)
    return good, broken


def _from_stdin(content: bytes) -> list[Found]:
    """Tell an image from a list of paths: a text of existing files is a list."""
    try:
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        return [("standard input", content)]
    if not lines:
        raise ResNetLabError("Standard input is empty; it should hold an image, or a path a line.")
    missing = [line for line in lines if not Path(line).is_file()]
    if missing:
        raise ResNetLabError(f"There is no image {missing[0]} (from standard input).")
    return [(line, Path(line)) for line in lines]
