"""Small encoded images, decoded once and kept in our cache: 60,000 JPEGs of 32×32 pixels are 6 s of a core each run."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from resnetlab.errors import ResNetLabError
from resnetlab.files import cache, write_atomic
from resnetlab.sources.dataset import Images, Pixels, Progress
from resnetlab.sources.images import ArrayImages, BrokenImage, EncodedImages, scan

SMALL = 64
"""Pixels a side up to which images are kept."""
FEWEST = 5_000
"""Images from which on it is worth a file."""
MOST = 1 << 30
"""Bytes of pixels up to which a table is kept, and that all files may take together; those not used for longest go."""


def decoded(images: Images, progress: Progress | None = None) -> Images:
    """Return the same images in memory where they are many but not too many, in a table, and all of one small shape.

    The file's name is the SHA-256 of all that is decoded and of the decoder's version, so another table, or a changed
    one, cannot be mistaken for it; a file whose own checksum is wrong is written anew. Images of which one cannot be
    read come back as they are, for the caller to refuse.

    Args:
        images: Of any kind; what is not to be kept is returned.
        progress: Is told how many are done.
    """
    if not isinstance(images, EncodedImages) or len(images) < FEWEST or not _alike(images, (0, len(images) - 1)):
        return images
    height, width = images.shape(0)
    if height * width * images.channels * len(images) > MOST:
        return images
    place = cache() / "decoded" / f"{_key(images)}.safetensors"
    pixels = _kept(place)
    if pixels is None:
        if not _alike(images, range(len(images))):
            return images
        found, broken = scan(images, lambda index, pixels: pixels, progress=progress)
        if broken:
            return images
        pixels = np.stack(found)
        with contextlib.suppress(ResNetLabError, OSError):  # without room for it, the next run decodes again
            _keep(place, pixels)
    return ArrayImages(pixels, images.name)


def _alike(images: EncodedImages, rows: Sequence[int]) -> bool:
    """Whether these have one small shape, by their headers."""
    try:
        first = images.shape(rows[0])
        return max(first) <= SMALL and all(images.shape(i) == first for i in rows)
    except BrokenImage:
        return False


def _key(images: EncodedImages) -> str:
    digest = hashlib.sha256(f"{PIL.__version__} {images.channels} {len(images)}".encode())
    for i in range(len(images)):
        content = images.source(i)
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _kept(place: Path) -> Pixels | None:
    """Return the pixels (N, H, W, C) in a file; None where there is none, or not as it was written."""
    try:
        with safe_open(place, "numpy") as file:
            pixels: Pixels = file.get_tensor("pixels")
            if file.metadata()["sha256"] != hashlib.sha256(pixels.data).hexdigest():
                return None
        os.utime(place)
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    return pixels


def _keep(place: Path, pixels: Pixels) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    known = {"sha256": hashlib.sha256(pixels.data).hexdigest()}
    write_atomic(place, lambda path: save_file({"pixels": pixels}, path, metadata=known))
    files = sorted(place.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    sizes = np.cumsum([file.stat().st_size for file in files])
    for file in (f for f, size in zip(files[1:], sizes[1:], strict=True) if size > MOST):
        file.unlink(missing_ok=True)
