"""Archives of data sets: unpacked once into our cache, whole or not at all, and nothing but plain files inside it."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from tarfile import EmptyHeaderError, InvalidHeaderError, ReadError, TruncatedHeaderError  # type: ignore[attr-defined]
from typing import IO, Any, BinaryIO

from resnetlab import files
from resnetlab.errors import ResNetLabError
from resnetlab.sources.dataset import Progress
from resnetlab.sources.download import cache
from resnetlab.sources.images import printable

MAX_BYTES = 20 * 2**30
"""The most that an archive may unpack to."""
MAX_MEMBERS = 2_000_000
MAX_RATIO = 200
"""How many times its own size an archive may unpack to, once that is more than `RATIO_FROM`. Images hardly shrink."""
RATIO_FROM = 100 * 2**20
COMPRESSIONS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}

ZIP = (b"PK\3\4", b"PK\5\6")
"""How a zip begins; at its end one would also be found where it is the last member of a tar."""

Member = tuple[str, int, IO[bytes] | None]
"""A name, its size in bytes, and its content; None is a folder."""


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or a tar, compressed or not, by its content."""
    with open(path, "rb") as file:
        start = file.read(512)
    return start.startswith(ZIP) or start[257:262] == b"ustar" or start.startswith(tuple(COMPRESSIONS))


def unpack(path: Path, progress: Progress | None = None) -> Path:
    """Unpack an archive into the cache, under its SHA-256, or find it there.

    Refused as a whole, before anything can be used: members that would land outside, links, devices, encrypted or
    sparse members, two members of one name (also in another case), and too much of anything. Permissions are not
    taken over; archives inside are left packed.

    Returns:
        The folder; where the archive has one top folder, that one.

    Raises:
        ResNetLabError: It is refused, damaged, or the cache cannot be written.
    """
    place = cache() / "archives" / files.sha256(path)[:32]
    if not place.is_dir():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _clear(place.parent)
            temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".unpacking-"))
            try:
                _write_all(path, temporary, progress)
                if hasattr(os, "sync"):
                    os.sync()  # a power cut after the rename must not leave empty files under the final name
                try:
                    os.rename(temporary, place)
                except OSError:
                    if not place.is_dir():  # else another process was first
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except (OSError, *_DAMAGE) as error:
            if not isinstance(error, OSError) or error.errno is None:
                raise ResNetLabError(f"{printable(path)} is damaged or cut off: {error}.") from error
            raise ResNetLabError(
                f"Cannot unpack {printable(path)} into {place.parent}: {error.strerror or error}. "
                "XDG_CACHE_HOME names another place for the cache."
            ) from error
    while len(inside := [e for e in place.iterdir() if e.name[0] != "." and e.name != "__MACOSX"]) == 1:
        if not inside[0].is_dir():
            break
        place = inside[0]
    return place


def _clear(folder: Path) -> None:
    """Remove what killed processes were unpacking."""
    for stray in folder.glob(".unpacking-*"):
        with contextlib.suppress(OSError):  # another process has just finished it
            if time.time() - stray.stat().st_mtime > files.STRAY_AFTER:
                shutil.rmtree(stray, ignore_errors=True)


_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, IndexError,
           NotImplementedError)  # fmt: skip


def _write_all(path: Path, target: Path, progress: Progress | None) -> None:
    """Check each member and write it below ``target``."""
    packed = path.stat().st_size
    names: set[str] = set()
    total = 0
    with _members(path) as members:
        for count, (name, size, content) in enumerate(members, 1):
            place = target / _safe(path, name)
            total += size
            _limit(path, count, total, packed)
            if content is None:
                place.mkdir(parents=True, exist_ok=True)
                continue
            key = unicodedata.normalize("NFC", str(place)).casefold()
            if key in names:
                raise _refusal(path, name, "it is there twice (perhaps in another case)")
            names.add(key)
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "xb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
                if file.tell() != size:
                    raise EOFError(f"{name} ends early")
            if progress:
                progress(min(total, packed), packed)


def _limit(path: Path, count: int, total: int, packed: int) -> None:
    """Refuse an archive that unpacks to too much."""
    if count > MAX_MEMBERS:
        raise ResNetLabError(f"{printable(path)} was refused: it has more than {MAX_MEMBERS:,} members.")
    if total > MAX_BYTES or (total > RATIO_FROM and total > MAX_RATIO * packed):
        raise ResNetLabError(
            f"{printable(path)} was refused: {packed / 2**20:,.1f} MiB unpack to more than {total / 2**20:,.0f} MiB. "
            f"The limits are {MAX_BYTES >> 30} GiB and {MAX_RATIO} times its size. To use it all the same, unpack it "
            "and give the folder as DATA."
        )


def _refusal(path: Path, name: str, reason: str) -> ResNetLabError:
    return ResNetLabError(
        f"{printable(path)} was refused because of its member {name!r}: {reason}. Nothing was unpacked."
    )


def _safe(path: Path, name: str) -> PurePosixPath:
    """Return a member's name as a path that stays below where it is put, on every system."""
    place = PurePosixPath(name)
    if "\0" in name or "\\" in name or re.match(r"[A-Za-z]:", name):
        raise _refusal(path, name, "its name has a NUL, a backslash or a drive letter")
    if place.is_absolute() or ".." in place.parts:
        raise _refusal(path, name, "it would land outside")
    return place


@contextlib.contextmanager
def _members(path: Path) -> Iterator[Iterator[Member]]:
    """Open an archive of either kind."""
    with open(path, "rb") as file:
        start = file.read(6)
        file.seek(0)
        if start.startswith(ZIP):
            with zipfile.ZipFile(file) as zipped:
                yield _zip_members(path, zipped)
        else:
            opener = next((o for magic, o in COMPRESSIONS.items() if start.startswith(magic)), None)
            stream = _Metered(path, opener(file) if opener else file)
            with tarfile.open(fileobj=io.BufferedReader(stream), mode="r|", tarinfo=_Strict) as tar:
                yield _tar_members(path, tar)
                while stream.read(1 << 20):
                    pass  # the compressor's checksum is at the end


def _zip_members(path: Path, zipped: zipfile.ZipFile) -> Iterator[Member]:
    entries = zipped.infolist()
    _limit(path, len(entries), sum(e.file_size for e in entries), path.stat().st_size)
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refusal(path, entry.filename, "it is a link, a device or a pipe")
        if entry.flag_bits & 1:
            raise _refusal(path, entry.filename, "it is encrypted")
        name = entry.orig_filename  # before Python cuts it at a NUL and turns the system's separators
        if entry.is_dir():
            yield name, 0, None
        else:
            with zipped.open(entry) as content:
                yield name, entry.file_size, content


def _tar_members(path: Path, tar: tarfile.TarFile) -> Iterator[Member]:
    for entry in tar:
        if entry.isdir():
            yield entry.name, 0, None
        elif entry.isreg() and not entry.issparse():
            yield entry.name, entry.size, tar.extractfile(entry)
        else:
            raise _refusal(path, entry.name, "it is a link, a device, a pipe or sparse")
        tar.members.clear()  # type: ignore[attr-defined]  # a stream needs no list; a million entries are 1 GB


class _Strict(tarfile.TarInfo):
    """A tar header that is right or an error; tarfile by itself takes a damaged or missing one for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Strict":
        try:
            return super().fromtarfile(tarfile)
        except (EmptyHeaderError, InvalidHeaderError, TruncatedHeaderError) as error:
            raise ReadError(f"{error}, and no end mark before it") from error


class _Metered(io.RawIOBase):
    """A decompressed stream that ends in an error at the limits, so that no header can hide a bomb."""

    def __init__(self, path: Path, stream: BinaryIO | IO[bytes]) -> None:
        self.path, self.stream, self.total = path, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.total += len(data)
        _limit(self.path, 0, self.total, self.path.stat().st_size)
        return len(data)
