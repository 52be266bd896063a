"""R8 and R11: archives and folder trees as a stranger, or an accident, may make them."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import test_sources as trees
import test_sources_archive as hostile
from chaos.record import Bench, Result, Row, Tally
from resnetlab.errors import ResNetLabError
from resnetlab.sources import archive, load


def _chain(path: Path, victim: Path) -> Path:
    """Make the long chain of links of CVE-2025-4517: each step is short, all together are longer than PATH_MAX."""
    members: list[tarfile.TarInfo | tuple[str, bytes]] = []
    for i in range(16):
        members.append(hostile.special("d" * 200 + str(i), tarfile.DIRTYPE))
        members.append(hostile.special(f"l{i}", tarfile.SYMTYPE, "d" * 200 + str(i)))
    return hostile.tar(path, hostile.GOOD, *members, ("l0/../../victim", b"bad"))


def _setuid(path: Path, victim: Path) -> Path:
    info = tarfile.TarInfo("../victim")
    info.mode = 0o6777
    return hostile.tar(path, hostile.GOOD, info)


MORE: dict[str, Callable[[Path, Path], Path]] = {
    "tar chain of long links": _chain,
    "tar setuid outside": _setuid,
    "tar.gz ..": lambda p, v: hostile.tar(p, hostile.GOOD, ("../victim", b"bad"), mode="w:gz"),
    "tar.xz absolute": lambda p, v: hostile.tar(p, hostile.GOOD, (str(v), b"bad"), mode="w:xz"),
    "tar link up": lambda p, v: hostile.tar(p, hostile.special("up", tarfile.SYMTYPE, ".."), ("up/victim", b"bad")),
    "zip drive": lambda p, v: hostile.zipped(p, hostile.GOOD, ("C:/victim", b"bad")),
    "zip nested ..": lambda p, v: hostile.zipped(p, hostile.GOOD, ("a/b/../../../victim", b"bad")),
    "zip twice": lambda p, v: hostile.zipped(p, hostile.GOOD, ("a//good.png", b"bad")),
    "zip NFC and NFD": lambda p, v: hostile.zipped(p, ("a/caf\u00e9.png", b"1"), ("a/cafe\u0301.png", b"2")),
}


@contextmanager
def cache_in(folder: Path) -> Iterator[Path]:
    """Have archives unpacked below a folder."""
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}):
        yield folder


def unpacked(path: Path, folder: Path) -> str | None:
    """Say what was wrong about how a hostile archive was met; None: refused, and nothing of it is anywhere."""
    victim = folder / "victim"
    victim.write_text("untouched")
    try:
        archive.unpack(path)
        return "it was unpacked"
    except ResNetLabError:
        pass
    except BaseException as error:
        return f"{type(error).__name__} instead of a refusal"
    left = [p for p in (folder / "cache").rglob("*") if p.is_file()]
    if victim.read_text() != "untouched" or left:
        return f"it wrote {left or victim}"
    return None


def archives(bench: Bench) -> Result:
    """Unpack every hostile archive beside a file that it aims at."""
    table = hostile.HOSTILE | MORE
    tally = Tally(bench, of=len(table))
    with cache_in(bench.folder / "cache"):
        for what, make in table.items():
            path = bench.folder / "hostile"
            path.unlink(missing_ok=True)
            tally.add(what, unpacked(make(path, bench.folder / "victim"), bench.folder))
    return tally.result(f"{len(table)} archives")


def bombs(bench: Bench) -> Result:
    """Unpack what is small and stands for much; at full size with the limits in use (2,000,001 members)."""
    zeros, folder, most = bytes(150 << 20), bench.folder, bench.pick(2000, archive.MAX_MEMBERS)
    tally = Tally(bench)
    with cache_in(folder / "cache"), mock.patch.object(archive, "MAX_MEMBERS", most):
        for what, path in {
            "zip of zeros": hostile.zipped(folder / "a.zip", ("a/0", zeros)),
            "tar.gz of zeros": hostile.tar(folder / "b.tgz", ("a/0", zeros), mode="w:gz"),
        }.items():
            tally.add(what, unpacked(path, folder))
        with zipfile.ZipFile(folder / "many.zip", "w") as out:
            for i in range(most + 1):
                out.writestr(zipfile.ZipInfo(f"a/{i // 1000}/{i}"), b"")
        tally.add(f"{most + 1:,} empty files", unpacked(folder / "many.zip", folder))
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as out:
            out.writestr("0", bytes(50 << 20))
        nested = hostile.zipped(folder / "42.zip", *((f"a/{i}.zip", inner.getvalue()) for i in range(16)))
        place = archive.unpack(nested)
        size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        tally.add("archives in an archive", None if size < 2 << 20 else f"{size:,} bytes were written")
    return tally.result("archives inside an archive stay packed")


TREES = (
    "a_flat_folder_is_split_by_seed", "split_folders_and_nested_ones", "a_class_that_val_lacks_shifts_no_other",
    "what_is_no_class_and_no_image_is_passed_over_and_counted", "links_pipes_and_loops", "names_in_every_script",
    "train_as_a_class_of_vehicles", "grey_folders_have_one_channel", "survey_finds_what_is_wrong",
)  # fmt: skip
"""Tests of folder structures, each with many cases in it."""
UNFIT: dict[str, dict[str, int]] = {
    "nothing": {}, "empty classes": {"a": 0, "b": 0}, "one class": {"a": 5}, "only val": {"val/a": 2, "val/b": 2},
    "train twice": {"train/a": 2, "Training/a": 2}, 
    "a class that train lacks": {"train/a": 1, "train/b": 2, "val/z": 1},
    "classes of one image": {"a": 1, "b": 1},
}  # fmt: skip


def folders(bench: Bench) -> Result:
    """Read folder trees of every shape, and one with very many files."""
    tally = Tally(bench)
    for name in TREES:
        place = bench.folder / name
        place.mkdir()
        try:
            getattr(trees, f"test_{name}")(place)
            tally.add(name)
        except BaseException as error:
            tally.add(name, f"{type(error).__name__}: {error}")
    for name, made in UNFIT.items():
        try:
            load(str(trees.folder(bench.folder / "unfit" / name, made)))
            tally.add(name, "it was taken")
        except ResNetLabError:
            tally.add(name)
    count, root = bench.pick(2000, 100_000), bench.folder / "many"
    for label in range(10):
        (root / str(label)).mkdir(parents=True)
        for i in range(count // 10):
            (root / str(label) / f"{i}.png").write_bytes(b"")
    dataset = load(str(root))
    found = len(dataset.train) + len(dataset.test or ())
    tally.add(f"{count:,} files", None if found == count else f"{found:,} were listed")
    return tally.result(f"{count:,} files in one tree; links, loops, pipes, twins in Unicode, every script")


ROWS = (
    Row(
        id="R8",
        part="archives",
        fault="Malicious archives: .., absolute, links, devices, pipes, NUL, backslash, case and Unicode twins, the "
        "long link chain of CVE-2025-4517, setuid",
        check="refused as a whole; the file aimed at is untouched and nothing stays",
        run=archives,
    ),
    Row(
        id="R8",
        part="bombs",
        fault="Archive bombs: zeros in zip and gz, too many empty files, archives in an archive",
        check="refused at the limits of size, ratio and count; nothing stays",
        run=bombs,
    ),
    Row(
        id="R11",
        part="folders",
        fault="Folder trees: empty, single, hidden, nested, stray files, Unicode and case twins, link loops, pipes, "
        "val without a class, very many files",
        check="the documented outcome; classes from train by name; what is passed over is counted",
        run=folders,
    ),
)
