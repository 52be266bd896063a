"""The images that a person names to have them predicted: files, folders, patterns, standard input."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.sources.images import FORMATS, BrokenImage, decode, is_image_name, printable

Found = tuple[str, Path | bytes]
"""What to call an image, and where it is: a file, or its bytes."""


def _nobody(text: str) -> None:
    """Nobody is told."""


def gather(words: Sequence[str], stdin: BinaryIO, warn: Callable[[str], None] = _nobody) -> list[Found]:
    """Return the images that words name, in order, those of a folder sorted by name.

    Args:
        words: Files, folders (searched through, hidden ones passed over), patterns (``**`` too), or ``-`` for standard
            input.
        stdin: Holds one image, or text with a path a line.
        warn: Is told what is left out below a named folder: what cannot be listed, links to folders, other files.

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
        elif os.path.isdir(word):
            files = _inside(path, warn)
            if not files:
                raise ResNetLabError(f"There are no images in the folder {_short(word)}.")
            found += [(printable(p), p) for p in files]
        elif os.path.exists(word):
            found.append((printable(word), path))
        elif matches := [m for m in sorted(glob.glob(word, recursive=True)) if os.path.isfile(m)]:
            found += [(printable(m), Path(m)) for m in matches]
        else:
            raise ResNetLabError(f"There is no image {_short(word)}.")
    return found


def read(
    found: Sequence[Found], channels: int, keep: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = np.asarray
) -> tuple[list[tuple[str, NDArray[np.uint8]]], list[BrokenImage]]:
    """Decode what `gather` found.

    Args:
        found: Names and places.
        channels: 1 or 3.
        keep: What is kept of an image's pixels (H, W, C): a thousand photographs do not fit in memory.

    Returns:
        Names with what is kept of their pixels, uint8, and an error for each image that cannot be read.
    """
    good: list[tuple[str, NDArray[np.uint8]]] = []
    broken: list[BrokenImage] = []
    for name, source in found:
        try:
            good.append((name, keep(decode(source, channels=channels, name=name))))
        except BrokenImage as error:
            broken.append(error)
    return good, broken


def _inside(top: Path, warn: Callable[[str], None]) -> list[Path]:
    """Return the images in and below a folder, sorted; hidden folders (``.ipynb_checkpoints``) are passed over."""

    def closed(error: OSError) -> None:
        if error.filename == str(top):
            raise ResNetLabError(f"Cannot list the folder {_short(str(top))}: {error.strerror}.") from error
        name = printable(Path(error.filename))
        warn(f"the folder {name} cannot be listed ({error.strerror}); its images are left out.")

    found: list[Path] = []
    passed: Counter[str] = Counter()
    for folder, inner, names in os.walk(top, onerror=closed):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "__MACOSX")
        passed["link to a folder"] += sum(os.path.islink(os.path.join(folder, name)) for name in inner)
        for name in names:
            if is_image_name(name) and os.path.isfile(os.path.join(folder, name)):
                found.append(Path(folder, name))
            elif not name.startswith("."):
                passed["broken link or device" if is_image_name(name) else "file of another kind"] += 1
    if said := ", ".join(f"{count:,} × {what}" for what, count in sorted(passed.items()) if count):
        warn(f"passed over in {printable(top)}: {said}.")
    return sorted(found)


def _from_stdin(content: bytes) -> list[Found]:
    """Tell an image from a list of paths: no path holds a zero byte, and a list's first path does not look like one."""
    lines = [os.fsdecode(line) for line in content.splitlines() if line.strip()]
    if not lines:
        raise ResNetLabError("Standard input is empty; it should hold an image, or a path a line.")
    missing = [line for line in lines if not os.path.isfile(line)] if b"\0" not in content else lines
    looks_like_one = any(re.match(magic, content, re.DOTALL) for magic, _ in FORMATS.values())
    if b"\0" in content or (looks_like_one and lines[0] in missing):
        return [("standard input", content)]
    if missing:
        raise ResNetLabError(f"There is no image {_short(missing[0])} (from standard input).")
    return [(printable(line), Path(line)) for line in lines]


def _short(word: str) -> str:
    """Return at most 200 characters of what was taken for a path: it may be anything."""
    text = printable(word)
    return text if len(text) <= 200 else f"{text[:200]}…"
