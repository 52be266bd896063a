"""Small encoded images, decoded once and kept in our cache: 60,000 JPEGs of 32×32 pixels are 3 s of a core each run."""

import contextlib
import hashlib
import math
import mmap
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from resnetlab.errors import ResNetLabError
from resnetlab.files import STRAY_AFTER, cache, write_atomic
from resnetlab.sources.dataset import Images, Pixels, Progress
from resnetlab.sources.images import ArrayImages, BrokenImage, EncodedImages
from resnetlab.threads import cores

SMALL = 64
"""Pixels a side up to which images are kept."""
FEWEST = 5_000
"""Images of the largest split from which on they are worth files; so many more are worth one more process."""
MOST = 1 << 30
"""Bytes of pixels up to which a table is kept, and that all files may take together; those not used for longest go."""
KEEPING = "keep decoded images"
"""The thread that writes a file beside the first steps of training; Python ends only after it."""


def decoded(images: Images, progress: Progress | None = None) -> Images:
    """Return the same images in memory where they are not too many, in a table, and all of one small shape.

    The file's name is the SHA-256 of all that is decoded and of the decoder's version, so another table, or a changed
    one, cannot be mistaken for it; a file whose own checksum is wrong is written anew. Images of which one cannot be
    read come back as they are, for the caller to refuse.

    Args:
        images: Of any kind; what is not to be kept is returned. Whether they are enough (`FEWEST`), the caller says.
        progress: Is told how many are done.
    """
    if not isinstance(images, EncodedImages) or not len(images):
        return images
    shape = _small(images, 0)
    if shape is None or _small(images, len(images) - 1) != shape:
        return images
    if math.prod(shape) * images.channels * len(images) > MOST:
        return images
    place = cache() / "decoded" / f"{_key(images)}.safetensors"
    pixels = _kept(place)
    if pixels is None:
        pixels = _decode(images, shape, progress)
        if pixels is None:
            return images
        threading.Thread(target=_keep, args=(place, pixels), name=KEEPING).start()  # beside the first steps
    return ArrayImages(pixels, images.name)


def _small(images: EncodedImages, row: int) -> tuple[int, int] | None:
    """Return an image's height and width by its header; None where it is no small image."""
    try:
        height, width = images.shape(row)
    except BrokenImage:
        return None
    return (height, width) if max(height, width) <= SMALL else None


def _decode(images: EncodedImages, shape: tuple[int, int], progress: Progress | None) -> Pixels | None:
    """Return all images (N, H, W, C) uint8, decoded by a process for each core.

    None where one is broken or of another shape, or no process can be had: then the caller reads them otherwise.
    Threads wait for Python's lock: for 50,000 JPEGs of 32×32 pixels two took 2.5 s, one 2.7 s, two processes 1.3 s
    (Zen 4, docs/log.md). Where processes cannot be forked safely (not Linux), one decodes them all.
    """
    count = len(images)
    most = cores() if sys.platform == "linux" else 1
    first, *others = np.array_split(np.arange(count), max(1, min(most, count // FEWEST)))
    tell = (lambda done: progress(done * count // len(first), count)) if progress else None
    children: list[int] = []
    try:
        shared = mmap.mmap(-1, count * math.prod(shape) * images.channels)
        pixels: Pixels = np.frombuffer(shared, np.uint8).reshape(count, *shape, images.channels)
        for rows in others:
            children.append(_fork(images, rows, pixels))
        good = _fill(images, first, pixels, tell)
        while good and children:
            good = os.waitpid(children[0], 0)[1] == 0
            del children[0]
    except OSError:  # no more memory or processes are allowed
        return None
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # somebody else has waited for it
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    return pixels if good else None


def _fork(images: EncodedImages, rows: NDArray[np.int64], pixels: Pixels) -> int:
    """Return the number of a process that fills these rows and ends with 0, or with 1 where it could not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child only decodes, and waits for none
        child = os.fork()
    if child == 0:
        good = False
        try:
            good = _fill(images, rows, pixels)
        finally:
            os._exit(not good)
    return child


def _fill(
    images: EncodedImages, rows: NDArray[np.int64], pixels: Pixels, tell: Callable[[int], None] | None = None
) -> bool:
    """Decode images into their rows; False at the first that is broken or of another shape."""
    for done, row in enumerate(rows.tolist(), start=1):
        try:
            image = images.read(row)
        except BrokenImage:
            return False
        if image.shape != pixels.shape[1:]:
            return False
        pixels[row] = image
        if tell and (done % 500 == 0 or done == len(rows)):
            tell(done)
    return True


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
        with contextlib.suppress(OSError):  # another user's file
            os.utime(place)
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    return pixels


def _keep(place: Path, pixels: Pixels) -> None:
    """Write the file and make room for it; without room for it, the next run decodes again."""
    with contextlib.suppress(ResNetLabError, OSError, SafetensorError):
        place.parent.mkdir(parents=True, exist_ok=True)
        for stray in place.parent.glob(".*.tmp"):  # what a killed process was writing
            if time.time() - stray.stat().st_mtime > STRAY_AFTER:
                stray.unlink(missing_ok=True)
        known = {"sha256": hashlib.sha256(pixels.data).hexdigest()}
        write_atomic(place, lambda path: save_file({"pixels": pixels}, path, metadata=known))
        files = sorted(place.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        sizes = np.cumsum([file.stat().st_size for file in files])
        for file in (f for f, size in zip(files[1:], sizes[1:], strict=True) if size > MOST):
            file.unlink(missing_ok=True)
