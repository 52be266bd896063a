"""Images: the one decoder that training, prediction and serving share, and the three places where images lie.

Nothing here guesses: an image is decoded whole and upright, or `BrokenImage` says why not, in plain words.
"""

import io
import math
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from resnetlab.errors import ResNetLabError
from resnetlab.sources.dataset import Header, Images, Pixels, Progress, Split
from resnetlab.threads import cores

USUAL_SCANS, MAX_SCANS, MAX_SCANNED = 10, 100, 10**9
"""How often a JPEG goes over its image where it loads progressively, how often it may, and how many pixels it may go
over in all. An empty scan is ten bytes, and takes the decoder 3 ns a pixel that nobody can interrupt."""
MAX_PIXELS = 50_000_000
"""Largest image that is decoded (150 MB as RGB). Read from the header: a PNG of 15 kB can claim 121 Mpx."""
MAX_BYTES = 2**29
"""Largest file that is read, in bytes; more than 50 Mpx need in any of the formats."""
FORMATS: dict[str, tuple[bytes, Callable[..., ImageFile.ImageFile]]] = {
    "JPEG": (rb"\xff\xd8\xff", JpegImagePlugin.jpeg_factory),
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    "WEBP": (rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
    "BMP": (rb"BM", BmpImagePlugin.BmpImageFile),
    "GIF": (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    "TIFF": (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", TiffImagePlugin.TiffImageFile),
    "PPM": (rb"P[56]\s", PpmImagePlugin.PpmImageFile),  # GTSRB comes as PPM
}
"""The formats that are read and how their first bytes look (a regular expression); no other part of Pillow is run."""

EXTENSIONS = frozenset(("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"))
"""Extensions that are looked at when folders are listed, in any case."""
T = TypeVar("T")


class BrokenImage(ResNetLabError):
    """An image that cannot be read: which, why, and its position where it is known."""

    def __init__(self, name: str, reason: str, index: int = -1) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.index = name, reason, index


def decode(source: bytes | Path, *, channels: int, name: str = "", at_least: tuple[int, int] | None = None) -> Pixels:
    """Decode an image: upright, (H, W, channels) uint8. Its content decides the format, not its name.

    - Transparency is laid on white; the first frame of several is taken; CMYK becomes RGB, RGB becomes grey by
      ITU-R 601 (what Pillow does).
    - 16-bit grey is divided by 257 (12-bit TIFF by 4095 / 255). Float: up to 1 it is times 255, up to 255 as it is,
      beyond that divided by 257; the image's largest value decides. Values outside are clipped, NaN is black.

    Args:
        source: The encoded bytes, or a file.
        channels: 1 for grey, 3 for RGB.
        name: What errors call it; by default the file's path.
        at_least: See `Images.read`.

    Raises:
        BrokenImage: It is not an image, damaged, cut off, too large, or not a regular file.
    """
    name = name or (printable(source) if isinstance(source, Path) else "image")
    data = b""
    _silence_pillow()
    try:
        data = source if isinstance(source, bytes) else _read(source)
        _check_scans(data)
        if (plain := _plain_jpeg(data, channels, at_least)) is not None:
            return plain
        with _open(io.BytesIO(data)) as image:
            turn = _orientation(image)  # before load: a PNG's late EXIF is not in the header, so it counts nowhere
            if at_least:
                height, width = at_least if turn < 5 else at_least[::-1]
                image.draft(None, (max(width, 1), max(height, 1)))
            if image.format == "PNG":
                _check_png(data)
            return _upright(_to_uint8(image, channels), turn)
    except (BrokenImage, MemoryError):
        raise
    except _Unreadable as error:
        raise BrokenImage(name, str(error)) from None
    except Exception as error:  # Pillow raises a dozen kinds on damaged files: OSError, SyntaxError, struct.error, ...
        raise BrokenImage(name, _explain(error)) from error


def read_header(source: bytes | Path, name: str = "") -> Header:
    """Return what an image says about itself, without decoding it.

    Raises:
        BrokenImage: There is no header that can be read, or the image is too large.
    """
    if isinstance(source, bytes) and (frame := _frame(source)):
        return frame
    name = name or (printable(source) if isinstance(source, Path) else "image")
    _silence_pillow()
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else _regular(source) as stream, _open(stream) as image:
            width, height = image.size if _orientation(image) < 5 else image.size[::-1]
            return Header("JPEG" if image.format == "MPO" else str(image.format), image.mode, height, width)
    except _Unreadable as error:
        raise BrokenImage(name, str(error)) from None
    except Exception as error:
        raise BrokenImage(name, _explain(error)) from error


class _Unreadable(Exception):
    """Why an image is refused, in plain words."""


def _silence_pillow() -> None:
    """Ignore Pillow's warnings on damaged metadata: what matters is raised. Idempotent, and safe between threads."""
    if not any(item[3] is _PILLOW for item in warnings.filters):
        warnings.filters.insert(0, ("ignore", None, UserWarning, _PILLOW, 0))  # type: ignore[attr-defined]


_PILLOW = re.compile(r"PIL\.")


def _regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe would hang for ever and a device never end, so only regular files."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _Unreadable("not a regular file")
    return open(path, "rb")


def _read(path: Path) -> bytes:
    with _regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise _Unreadable(f"the file is too large: {size / 2**20:,.0f} MiB, the limit is {MAX_BYTES >> 20} MiB")
        return file.read()


def _open(stream: BinaryIO) -> ImageFile.ImageFile:
    """Read the header with the one plugin that its first bytes name, and hold its size against `MAX_PIXELS`.

    `Image.open` with ``formats=`` would do the same, but warns about large images before their size can be seen, and
    does not say their height and width.
    """
    start = stream.read(512)
    stream.seek(0)
    opener = next((o for magic, o in FORMATS.values() if re.match(magic, start, re.DOTALL)), None)
    if opener is None:
        raise _Unreadable(_not_an_image(start))
    image = opener(stream, "")
    width, height = max(image.size, _tile(image), key=math.prod)
    if width * height > MAX_PIXELS:
        size = f"{width:,} × {height:,} pixels"
        raise _Unreadable(f"the image is too large: {size}, the limit is {MAX_PIXELS / 1e6:.0f} million in all")
    return image


def _tile(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Return the width and height of a TIFF's tiles, which are decoded whole, however small the image; else zeros."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0, 0
    width, height = (image.tag_v2.get(tag, 0) for tag in (322, 323))
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)


def _not_an_image(start: bytes) -> str:
    """Say what a file is instead of an image, from its first bytes."""
    if not start:
        return "the file is empty (0 bytes)"
    if start[4:8] == b"ftyp":
        return "HEIC, AVIF and videos are not read; convert it to JPEG or PNG"
    if start.startswith(b"%PDF") or b"<svg" in start:
        return "PDF and SVG are not read; convert it to JPEG or PNG"
    if not any(byte < 9 for byte in start):
        return "it holds text, not an image"
    return "not an image in a format that is read (JPEG, PNG, WebP, BMP, GIF, TIFF)"


def _explain(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    cut = ("truncated", "not enough", "unexpected end", "eof", "unpack", "index out of range", "before loading")
    if isinstance(error, struct.error | IndexError | EOFError) or any(word in text.lower() for word in cut):
        return f"the file is cut off ({text})"
    return f"the file is damaged ({text})"


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG that would hold its decoder for long."""
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if scans > MAX_SCANS:
        raise _Unreadable(f"it is a JPEG of more than {MAX_SCANS} scans")
    if scans > USUAL_SCANS:
        header = read_header(data)
        if scans * header.width * header.height > MAX_SCANNED:
            size = f"{header.width:,} × {header.height:,} pixels"
            raise _Unreadable(f"it is a JPEG of {scans} scans, which is too many for {size}")


def _check_png(data: bytes) -> None:
    """Hold every chunk up to the end against its CRC; Pillow checks those of the header only.

    Of 66 single bit flips in the pixel data of a small PNG, Pillow read 11 as other pixels without a word.
    """
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length
        if struct.unpack_from(">I", data, at - 4)[0] != zlib.crc32(data[at - 8 - length : at - 4]):
            raise _Unreadable(f"the file is damaged (bad checksum in {kind!r})")


def _frame(data: bytes) -> Header | None:
    """Read the header of a JPEG that has no EXIF or other application data, in 5 µs; None: ask Pillow."""
    at = 2
    while data.startswith(b"\xff\xd8\xff") and at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, at)
        if marker in (0xC0, 0xC1, 0xC2):  # the frame: precision, height, width, components
            bits, height, width, parts = struct.unpack_from(">BHHB", data, at + 4)
            if bits != 8 or parts not in (1, 3) or not 0 < width * height <= MAX_PIXELS:
                return None
            return Header("JPEG", "L" if parts == 1 else "RGB", height, width)
        if marker not in (0xE0, 0xDB, 0xC4, 0xDD, 0xFE):  # JFIF, tables, comments
            return None
        at += 2 + length
    return None


def _plain_jpeg(data: bytes, channels: int, at_least: tuple[int, int] | None) -> Pixels | None:
    """Decode such a JPEG past Pillow's parser; None sends it the long way, which can halve it, and knows what is wrong.

    It is the same decoder with the same result, in 80 instead of 170 µs for a 32×32 JPEG (Pillow 13, one core).
    """
    if (frame := _frame(data)) is None:
        return None
    if at_least and frame.height >= 2 * max(at_least[0], 1) and frame.width >= 2 * max(at_least[1], 1):
        return None
    try:
        image = Image.frombytes(frame.mode, (frame.width, frame.height), data, "jpeg", frame.mode, "")
    except Exception:
        return None
    return _pixels(image, channels)


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8. Pillow turns TIFF by itself; unreadable EXIF is none."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        turn = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return turn if turn in range(1, 9) else 1


def _to_uint8(image: ImageFile.ImageFile, channels: int) -> Pixels:
    """Decode to (H, W, channels)."""
    if image.mode == "F" or image.mode.startswith("I"):
        grey: Pixels = np.repeat(_scale(image)[..., None], channels, axis=2)
        return grey
    image.load()
    flat: Image.Image = image
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")
    return _pixels(flat, channels)


def _pixels(image: Image.Image, channels: int) -> Pixels:
    mode = "L" if channels == 1 else "RGB"
    pixels: Pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(image.height, image.width, channels)


def _scale(image: ImageFile.ImageFile) -> Pixels:
    """Bring wide grey values to 0..255 by the rule that `decode` states: (H, W)."""
    values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0).astype(np.float32)
    peak = float(values.max())
    factor = 1 / 257
    if image.mode == "F":
        factor = 255.0 if peak <= 1 else 1.0 if peak <= 255 else factor
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(258, (16,))[0]
        factor = 255 / 4095 if bits == 12 else 255 / (2**32 - 1) if peak > 65535 else factor
        if image.tag_v2.get(262) == 0:  # white is zero
            values = 65535 - values
    scaled: Pixels = np.rint(np.clip(values * factor, 0, 255)).astype(np.uint8)
    return scaled


def _upright(pixels: Pixels, turn: int) -> Pixels:
    """Undo EXIF orientation ``turn``: which way the camera was held."""
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def is_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image and is not hidden (``._x.jpg`` is macOS's, not a picture)."""
    return name.rpartition(".")[2].lower() in EXTENSIONS and not name.startswith(".")


def printable(path: Path | str) -> str:
    r"""Return a path as text that every terminal and JSON file takes: a byte that is not UTF-8 becomes ``\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory."""

    pixels: NDArray[np.uint8]
    """(N, H, W, C)"""
    where: str | Callable[[int], str]
    """What they came from, for their names; or a function that names the image of a number."""
    rows: NDArray[np.int64] | None = None
    """(N,), their numbers there."""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Pixels:
        return self.read(index)

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> Pixels:
        """Return one image."""
        image: Pixels = self.pixels[index]
        return image

    def header(self, index: int) -> Header:
        """Return mode and size."""
        height, width, channels = self.pixels[index].shape
        return Header("array", "L" if channels == 1 else "RGB", height, width)

    def shape(self, index: int) -> tuple[int, int]:
        """Return height and width."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def name(self, index: int) -> str:
        """Return for example ``test_batch image 17``."""
        row = index if self.rows is None else int(self.rows[index])
        return self.where(row) if callable(self.where) else f"{self.where} image {row}"

    def with_channels(self, channels: int) -> "ArrayImages":
        """Return the same images, grey (ITU-R 601 luma, as Pillow does it) or in three channels."""
        if self.pixels.shape[3] == channels:
            return self
        if channels == 3:
            return replace(self, pixels=self.pixels.repeat(3, axis=3))
        luma = self.pixels @ np.array([[299], [587], [114]]) // 1000
        return replace(self, pixels=luma.astype(np.uint8))

    def select(self, indices: Sequence[int]) -> "ArrayImages":
        """Return the images at ``indices``."""
        rows = np.arange(len(self)) if self.rows is None else self.rows
        picked = np.asarray(indices, dtype=np.int64)
        return ArrayImages(self.pixels[picked], self.where, rows[picked])


@dataclass(frozen=True)
class _Encoded:
    """What encoded images share: `source` and `name` say where the bytes are."""

    channels: int = field(default=3, kw_only=True)

    def source(self, index: int) -> bytes | Path:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Pixels:
        return self.read(index)

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> Pixels:
        """Decode one image; see `Images.read`."""
        try:
            return decode(self.source(index), channels=self.channels, at_least=at_least)
        except BrokenImage as error:
            raise BrokenImage(self.name(index), error.reason, index) from error

    def header(self, index: int) -> Header:
        """Read the header of one image."""
        try:
            return read_header(self.source(index))
        except BrokenImage as error:
            raise BrokenImage(self.name(index), error.reason, index) from error

    def shape(self, index: int) -> tuple[int, int]:
        """Return height and width from the header."""
        return self.header(index)[2:]

    def with_channels(self, channels: int) -> Self:
        """Return the same images, decoded to one channel or to three."""
        return replace(self, channels=channels)


@dataclass(frozen=True)
class FileImages(_Encoded):
    """Images in files, opened when they are read."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> Path:
        """Return the file."""
        return self.paths[index]

    def name(self, index: int) -> str:
        """Return the file's path."""
        return printable(self.paths[index])

    def select(self, indices: Sequence[int]) -> "FileImages":
        """Return the images at ``indices``."""
        return FileImages([self.paths[i] for i in indices], channels=self.channels)


@dataclass(frozen=True)
class EncodedImages(_Encoded):
    """Encoded images in memory: a list of bytes, or anything like one (a column of a table)."""

    encoded: Sequence[bytes]
    where: Callable[[int], str]
    """Names the image at a position of ``encoded``."""
    rows: Sequence[int] | None = None
    """Which of ``encoded``; None: all."""

    def __len__(self) -> int:
        return len(self.encoded if self.rows is None else self.rows)

    def source(self, index: int) -> bytes:
        """Return the encoded bytes."""
        return self.encoded[index if self.rows is None else self.rows[index]]

    def name(self, index: int) -> str:
        """Return for example ``train.parquet row 17 (truck/0394.jpg)``."""
        return self.where(index if self.rows is None else self.rows[index])

    def select(self, indices: Sequence[int]) -> "EncodedImages":
        """Return the images at ``indices``, sharing the bytes."""
        rows = indices if self.rows is None else [self.rows[i] for i in indices]
        return EncodedImages(self.encoded, self.where, rows, channels=self.channels)


def all_grey(images: Images) -> bool:
    """Whether no header shows colour. One that cannot be read says nothing; reading stops at the first colour."""
    for i in range(len(images)):
        try:
            if not images.header(i).is_grey:
                return False
        except BrokenImage:
            continue
    return True


def scan(
    images: Images,
    function: Callable[[int, Pixels], T],
    *,
    at_least: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> tuple[list[T], list[BrokenImage]]:
    """Decode every image, on all cores, and apply ``function(index, pixels)`` to it in the decoding thread.

    Args:
        images: What to decode.
        function: Must be safe to call from several threads at once.
        at_least: Let JPEGs be decoded smaller, down to this height and width (see `Images.read`).
        progress: Is told how many are done.

    Returns:
        The function's results for the images that could be read, in order, and the others, with their ``index``.
    """
    stop = threading.Event()
    threads = cores()
    step = max(1, min(64, len(images) // (4 * threads)))  # a few milliseconds of small images at a time

    def part(start: int) -> list[T | BrokenImage]:
        found: list[T | BrokenImage] = []
        for i in range(start, min(start + step, len(images))):
            if stop.is_set():
                break
            try:
                found.append(function(i, images.read(i, at_least)))
            except BrokenImage as error:
                error.index = i
                found.append(error)
        return found

    results: list[T] = []
    broken: list[BrokenImage] = []
    with ThreadPoolExecutor(threads) as pool:
        try:
            for start, found in zip(
                range(0, len(images), step), pool.map(part, range(0, len(images), step)), strict=True
            ):
                broken += [item for item in found if isinstance(item, BrokenImage)]
                results += [item for item in found if not isinstance(item, BrokenImage)]
                if progress:
                    progress(min(start + step, len(images)), len(images))
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results, broken


def refuse_or_drop(split: Split, broken: Sequence[BrokenImage], skip_broken: bool) -> Split:
    """Return the split without its broken images, or refuse it.

    Raises:
        ResNetLabError: There are broken images and ``skip_broken`` is off, or nothing else is left.
    """
    if not broken:
        return split
    if not skip_broken:
        raise refusal(broken, len(split))
    if len(broken) == len(split):
        raise ResNetLabError(f"{_counted(broken, len(split))}None is left.")
    return split.select(np.setdiff1d(np.arange(len(split)), [error.index for error in broken]))


def refusal(broken: Sequence[BrokenImage], total: int) -> ResNetLabError:
    """Return the error that names the broken ones of so many images, of one split or of several."""
    return ResNetLabError(f"{_counted(broken, total)}Repair or remove them, or leave them out with --skip-broken.")


def _counted(broken: Sequence[BrokenImage], total: int) -> str:
    shown = "".join(f"\n  {error}" for error in broken[:10])
    more = f"\n  and {len(broken) - 10:,} more" if len(broken) > 10 else ""
    return f"{len(broken):,} of {total:,} images cannot be read:{shown}{more}\n"
