"""Archives: hostile ones do nothing, good ones unpack once."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnetlab import sources
from resnetlab.errors import ResNetLabError
from resnetlab.sources import archive
from resnetlab.sources.archive import is_archive, unpack


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "resnetlab" / "archives"


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                out.addfile(info, io.BytesIO(member[1]))
    return path


def zipped(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members:
            out.writestr(name, content)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def link(name: str, mode: int = stat.S_IFLNK | 0o777) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def with_nul(path: Path) -> Path:
    zipped(path, ("a/xNy.png", b"1"))
    path.write_bytes(path.read_bytes().replace(b"xNy", b"x\0y"))
    return path


def encrypted(path: Path) -> Path:
    zipped(path, ("a/x.png", b"1"))
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.find(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    return path


GOOD = ("a/good.png", b"good")
HOSTILE: dict[str, Callable[[Path, Path], Path]] = {
    "tar ..": lambda p, v: tar(p, GOOD, ("../victim", b"bad")),
    "tar nested ..": lambda p, v: tar(p, GOOD, ("a/../../victim", b"bad")),
    "tar absolute": lambda p, v: tar(p, GOOD, (str(v), b"bad")),
    "tar symlink": lambda p, v: tar(p, GOOD, special("out", tarfile.SYMTYPE, str(v.parent)), ("out/victim", b"bad")),
    "tar hard link": lambda p, v: tar(p, GOOD, special("x", tarfile.LNKTYPE, str(v)), ("x", b"bad")),
    "tar device": lambda p, v: tar(p, GOOD, special("x.png", tarfile.CHRTYPE)),
    "tar block device": lambda p, v: tar(p, GOOD, special("x.png", tarfile.BLKTYPE)),
    "tar pipe": lambda p, v: tar(p, GOOD, special("x.png", tarfile.FIFOTYPE)),
    "tar backslash": lambda p, v: tar(p, GOOD, ("..\\victim", b"bad")),
    "tar drive": lambda p, v: tar(p, GOOD, ("C:victim", b"bad")),
    "tar twice": lambda p, v: tar(p, GOOD, GOOD),
    "tar other case": lambda p, v: tar(p, GOOD, ("A/GOOD.png", b"bad")),
    "tar file as folder": lambda p, v: tar(p, GOOD, ("a/good.png/x", b"bad")),
    "zip ..": lambda p, v: zipped(p, GOOD, ("../victim", b"bad")),
    "zip absolute": lambda p, v: zipped(p, GOOD, (str(v), b"bad")),
    "zip link": lambda p, v: zipped(p, GOOD, (link("out"), str(v.parent).encode())),
    "zip pipe": lambda p, v: zipped(p, GOOD, (link("x", stat.S_IFIFO | 0o666), b"")),
    "zip backslash": lambda p, v: zipped(p, GOOD, ("a\\..\\..\\victim", b"bad")),
    "zip other case": lambda p, v: zipped(p, GOOD, ("A/Good.png", b"bad")),
    "zip NUL": lambda p, v: with_nul(p),
    "zip encrypted": lambda p, v: encrypted(p),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_do_nothing(kind: str, tmp_path: Path, cache: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    path = HOSTILE[kind](tmp_path / "hostile", victim)
    with pytest.raises(ResNetLabError, match="hostile"):
        unpack(path)
    assert victim.read_text() == "untouched"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "hostile", "victim"]
    assert list(cache.iterdir()) == [], "nothing half-done stays"


def test_bombs(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = bytes(150 * 2**20)
    header = tarfile.TarInfo("a/b")
    header.pax_headers = {"comment": "0" * (120 * 2**20)}  # the bomb is in a header, before any member
    bombs = [zipped(tmp_path / "a.zip", ("a/zeros", zeros)), tar(tmp_path / "b.tgz", ("a/zeros", zeros), mode="w:gz")]
    with tarfile.open(tmp_path / "c.tgz", "w:gz", format=tarfile.PAX_FORMAT) as out:
        out.addfile(header)
    for bomb in [*bombs, tmp_path / "c.tgz"]:
        assert bomb.stat().st_size < 2**20
        with pytest.raises(ResNetLabError, match="200 times its size"):
            unpack(bomb)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 50)
    for many in (
        tar(tmp_path / "many.tar", *((f"a/{i}", b"") for i in range(51))),
        zipped(tmp_path / "many.zip", *((f"a/{i}", b"") for i in range(51))),
    ):
        with pytest.raises(ResNetLabError, match="more than 50 members"):
            unpack(many)
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    with pytest.raises(ResNetLabError, match="refused"):
        unpack(tar(tmp_path / "large.tar", ("a/x", os.urandom(1001))))
    assert list(cache.iterdir()) == []


def test_a_zip_that_lies_about_sizes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", ("a/x", bytes(5000)))
    data = path.read_bytes()
    path.write_bytes(data.replace((5000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(ResNetLabError, match="damaged"):
        unpack(path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_cut_off_archives_leave_nothing(mode: str, tmp_path: Path, cache: Path) -> None:
    members = [(f"a/{i}", os.urandom(700)) for i in range(20)]
    path = tmp_path / "x"
    zipped(path, *members) if mode == "zip" else tar(path, *members, mode=mode)
    data = path.read_bytes()
    for share in (0.3, 0.5, 0.7):
        cut = tmp_path / "cut"
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ResNetLabError, match="damaged or cut off"):
            unpack(cut)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    cut.write_bytes(flipped)
    if mode != "w":  # a tar has no checksums of content
        with pytest.raises(ResNetLabError):
            unpack(cut)
    assert list(cache.iterdir()) == []


def test_a_damaged_tar_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", *((f"a/{i}", b"1") for i in range(5)))
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 3] ^= 0xFF  # the third header
    path.write_bytes(data)
    with pytest.raises(ResNetLabError, match="damaged"):
        unpack(path)


def test_permissions_are_not_taken_over(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a/x")
    info.mode = 0o6777
    place = unpack(tar(tmp_path / "x.tar", info, GOOD))
    assert not (place / "x").stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IXUSR)


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_folder_in_an_archive(form: str, tmp_path: Path, cache: Path) -> None:
    members = [(f"pets/{name}/{i}.png", png(i + first)) for name, first in (("cat", 0), ("dog", 10)) for i in range(10)]
    members += [("__MACOSX/pets/._x", b"x"), ("pets/inner.zip", b"stays packed")]
    path = tmp_path / f"pets.{form}"
    compress: dict[str, Callable[..., bytes]] = {
        "tar.gz": gzip.compress,
        "tar.bz2": bz2.compress,
        "tar.xz": lzma.compress,
        "tar": bytes,
    }
    zipped(path, *members) if form == "zip" else path.write_bytes(compress[form](tar(path, *members).read_bytes()))
    assert is_archive(path)
    dataset = sources.load(str(path))
    assert dataset.name == "pets" and dataset.train.classes == ("cat", "dog") and dataset.origin == str(path)
    assert dataset.test is not None and len(dataset.train) == 18 and len(dataset.test) == 2
    (place,) = cache.iterdir()
    before = place.stat().st_mtime_ns
    sources.load(str(path))
    assert place.stat().st_mtime_ns == before, "unpacked once"


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", ("x/1.png", png(1)), ("y/1.png", png(2))).read_bytes()
    members = [(f"{name}/{i}.png", png(i + first)) for name, first in (("a", 0), ("b", 10)) for i in range(10)]
    path = tar(tmp_path / "outer.tar", *members, ("zz.zip", inner))
    assert sources.load(str(path)).train.classes == ("a", "b")


def test_an_archive_without_images_is_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "only.zip", ("inner.zip", b"stays packed"))
    with pytest.raises(ResNetLabError, match=r"only\.zip, unpacked: .* has no images"):
        sources.load(str(path))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ResNetLabError, match="XDG_CACHE_HOME"):
        unpack(zipped(tmp_path / "x.zip", GOOD))


def test_another_process_may_be_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "pets.zip", ("a/1.png", png(1)), ("b/2.png", png(2)))
    rename = os.rename

    def beaten(source: Path, target: Path) -> None:
        rename(source, target)
        Path(source).mkdir()
        (Path(source) / "again").write_bytes(b"")
        rename(source, target)  # the directory is there and not empty

    monkeypatch.setattr(os, "rename", beaten)
    found = unpack(path)
    assert sorted(p.name for p in found.rglob("*.png")) == ["1.png", "2.png"]
    assert not list(found.parent.glob(".unpacking-*"))


def test_what_a_killed_process_was_unpacking_goes_after_a_day(tmp_path: Path, cache: Path) -> None:
    old, new = cache / ".unpacking-old", cache / ".unpacking-new"
    for stray in (old, new):
        (stray / "a").mkdir(parents=True)
    os.utime(old, (1, 1))
    unpack(zipped(tmp_path / "x.zip", GOOD))
    assert not old.exists() and new.exists()
