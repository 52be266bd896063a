"""R4 and R5: a disk that is full, broken or cuts writes short, and a run directory that cannot be written."""

import ctypes
import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from chaos import commands, injected, kills
from chaos.record import Bench, Result, Row, Tally
from resnetlab import checkpoint
from resnetlab.checkpoint import Checkpoint
from resnetlab.errors import ResNetLabError

OLD, NEW = 10, 20
SETTINGS = ("digits", "data.limit=160", "data.limit_test=60", "--model=resnet20", "epochs=2", "batch_size=80")


def network(step: int, floats: int = 60_000) -> Checkpoint:
    """Return a checkpoint that can be told from those of other steps."""
    tensors = {f"model.{i}": torch.full((floats // 4,), float(step)) for i in range(4)}
    return Checkpoint(step=step, tensors=tensors, state={"step twice": 2 * step})


def wrong_after(directory: Path) -> str | None:
    """Say what is wrong with a checkpoint directory after a save of ``NEW`` failed: ``OLD`` must be found, whole."""
    told: list[str] = []
    found = checkpoint.load_newest(directory, told.append)
    if found is None or found.step not in (OLD, NEW) or found.state["step twice"] != 2 * found.step:
        return f"the earlier checkpoint does not load ({told})"
    if told or not all(bool(t.eq(found.step).all()) for t in found.tensors.values()):
        return f"it is not whole ({told})"
    checkpoint.save(directory, network(30))
    stray = [p.name for p in directory.iterdir() if p.name.startswith(".")]
    return f"{stray} is left after the next save" if stray else None


def sweep(bench: Bench) -> Result:
    """Let the disk fail at swept offsets of a checkpoint, in each of three ways; in processes of their own."""
    tally = Tally(bench, of=bench.pick(12, 240))
    for number in range(tally.of):
        kind = (errno.ENOSPC, errno.EIO, errno.EDQUOT)[number % 3]
        directory = bench.folder / str(number)
        checkpoint.save(directory, network(OLD))
        left = int(number / tally.of * 241_500)
        tally.add(
            f"{errno.errorcode[kind]} after {left:,} bytes", _forked(directory, left, kind) or wrong_after(directory)
        )
        shutil.rmtree(directory)
    return tally.result("of a checkpoint of 241 kB: tensors, state and manifest; every byte that got through stays")


def _forked(directory: Path, left: int, number: int) -> str | None:
    """Save ``NEW`` with a failing disk, in a process of its own, as the damage cannot be undone."""
    process = commands.forked(_save_failing, str(directory), left, number)
    process.join(60)
    said = (directory.parent / "said.txt").read_text()
    space = "MiB free" in said
    if str(directory) not in said or space != (number in (errno.ENOSPC, errno.EDQUOT)):
        return f"the message does not name the place and the reason: {said}"
    return None


def _save_failing(directory: str, left: int, number: int) -> None:
    said = open(Path(directory).parent / "said.txt", "w")  # noqa: SIM115 - before the disk fails
    injected.failing_disk(left, number)
    try:
        checkpoint.save(Path(directory), network(NEW))
    except ResNetLabError as error:
        said.write(str(error))
    said.close()


@contextmanager
def small_disk(place: Path, kib: int) -> Iterator[bool]:
    """Mount a memory disk of ``kib`` KiB at ``place``; False where that is not allowed (it takes root)."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(place)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], capture_output=True, check=False)


def full_disk(bench: Bench) -> Result:
    """Fill a real small disk while a run trains on it; free it again; the resumed run must end as the reference."""
    words = (*SETTINGS, "checkpoint_minutes=0.0001")
    expected = kills.reference(bench, words)
    tally, place = Tally(bench, of=bench.pick(2, 12)), bench.folder / "disk"
    with small_disk(place, 60 << 10) as mounted:
        if not mounted:
            return Result(tried=0, survived=0, notes=("a disk of its own needs root: not tried",))
        for number in range(tally.of):
            tally.add(f"full from save {number + 1} on", _fill(bench, place, words, number, expected))
            shutil.rmtree(place / "run", ignore_errors=True)
    return tally.result("a tmpfs of 60 MiB that another file fills to the last byte while the run saves")


def _fill(bench: Bench, place: Path, words: tuple[str, ...], number: int, expected: Path) -> str | None:
    run, output = place / "run", bench.folder / "output.txt"
    output.unlink(missing_ok=True)
    arm = partial(fill_at, "checkpoint" if number % 2 == 0 else "bundle", number // 2 % 4, str(place / "filler"))
    code, text = commands.run(kills.train(words, run), output, arm=arm)
    (place / "filler").unlink(missing_ok=True)
    if code == 0:
        return None if number // 2 > 0 else "the disk was not full"
    if code != 1 or "No space left on the disk while writing" not in text or "Traceback" in text:
        return f"ended with {code}: {text[-200:]}"
    code, text = commands.run(kills.train(words, run), output)
    return f"resumed, it ended with {code}: {text[-200:]}" if code else commands.differences(run, expected)


def fill_at(point: str, call: int, filler: str) -> None:
    """Write a file until the disk is full when a moment of the run comes; a part of a page is left."""

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                return

    injected.at(point, call, fill)


def too_little_space(bench: Bench) -> Result:
    """Begin on a disk that cannot hold the run: refused before any work."""
    tally, place = Tally(bench, of=1), bench.folder / "disk"
    with small_disk(place, 2 << 10) as mounted:
        if not mounted:
            return Result(tried=0, survived=0, notes=("a disk of its own needs root: not tried",))
        code, text = commands.run(["train", *SETTINGS, "--out", place / "run"], bench.folder / "o.txt")
        bad = code != 1 or "MiB free, but" not in text or "epoch 1" in text or (place / "run").exists()
        tally.add("2 MiB", f"ended with {code}: {text[-200:]}" if bad else None)
    return tally.result()


def unwritable(bench: Bench) -> Result:
    """Try the ways in which a run directory cannot be written, before the start and meanwhile."""
    tally, output = Tally(bench, of=5), bench.folder / "output.txt"
    for name, wrong in (
        ("read-only parent", _refused(bench, output, _drop_rights, 0o555)),
        ("a file in its place", _refused_file(bench, output)),
        ("of another user", _refused(bench, output, _drop_rights, 0o755)),
        ("deleted while training", _vanishes(bench, output, "run")),
        ("checkpoints deleted while training", _vanishes(bench, output, "run/checkpoint")),
    ):
        tally.add(name, wrong)
    return tally.result()


def _drop_rights() -> None:
    """Give up root's right to write anywhere (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER, man 2 capset)."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of the first 32 rights, then of the others
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets) or libc.capset(header, _without(sets)):
        raise OSError(ctypes.get_errno(), "rights cannot be given up")


def _without(sets: "ctypes.Array[ctypes.c_uint32]") -> "ctypes.Array[ctypes.c_uint32]":
    for index in (0, 1, 2):
        sets[index] &= ~0b1110
    return sets


def _refused(bench: Bench, output: Path, arm: commands.Arm, mode: int) -> str | None:
    place = bench.folder / f"place-{mode:o}"
    place.mkdir(mode=mode)
    place.chmod(mode)
    if mode == 0o755:
        if os.geteuid() != 0:
            return None  # a directory of another user takes root to make; the permission is the same
        os.chown(place, 65534, 65534)
    output.unlink(missing_ok=True)
    code, text = commands.run(["train", *SETTINGS, "--out", place / "run"], output, arm=arm)
    ok = code == 1 and "Permission denied" in text and "epoch 1" not in text and "Traceback" not in text
    return None if ok else f"ended with {code}: {text[-200:]}"


def _refused_file(bench: Bench, output: Path) -> str | None:
    (bench.folder / "file").write_text("x")
    output.unlink(missing_ok=True)
    code, text = commands.run(["train", *SETTINGS, "--out", bench.folder / "file"], output)
    return None if code == 1 and "exists already" in text else f"ended with {code}: {text[-200:]}"


def _vanishes(bench: Bench, output: Path, what: str) -> str | None:
    """Remove a directory at a step: the run ends with a message, or goes on and is whole in the end."""
    shutil.rmtree(bench.folder / "run", ignore_errors=True)
    output.unlink(missing_ok=True)
    arm = partial(remove_at, "step", 3, str(bench.folder / what))
    code, text = commands.run(["train", *SETTINGS, "--out", bench.folder / "run"], output, arm=arm)
    if "Traceback" in text:
        return f"a traceback: {text[-250:]}"
    if what == "run":
        return None if code == 1 and "Cannot write" in text else f"ended with {code}: {text[-200:]}"
    whole = (bench.folder / "run" / "model.safetensors").is_file()
    return None if code == 0 and whole else f"ended with {code}: {text[-200:]}"


def remove_at(point: str, call: int, path: str) -> None:
    """Delete a directory when a moment of the run comes."""
    injected.at(point, call, lambda: shutil.rmtree(path))


def damage(bench: Bench) -> Result:
    """Flip a bit, zero a page or cut each file of a checkpoint: the one before is loaded, and that is said."""
    directory, chance, counts = bench.folder / "checkpoint", bench.chance("damage"), {"bit": 0, "page": 0, "cut": 0}
    for step in (OLD, NEW):
        checkpoint.save(directory, network(step, 4_000))
    files = sorted((directory / f"step-{NEW:09d}").iterdir())
    tally = Tally(bench, of=bench.pick(300, 3000))
    for number in range(tally.of):
        path, kind = files[number % 3], list(counts)[number // 3 % 3]
        whole = path.read_bytes()
        spoilt = spoil(whole, kind, chance)
        path.write_bytes(spoilt)
        told: list[str] = []
        found = checkpoint.load_newest(directory, told.append)
        good = found is not None and found.step == OLD and len(told) == 1 and "damaged" in told[0]
        tally.add(f"{kind} of {path.name}", None if good else f"loaded step {found and found.step}, said {told}")
        counts[kind] += 1
        path.write_bytes(whole)
    return tally.result(", ".join(f"{kind} {n:,}" for kind, n in counts.items()))


def spoil(whole: bytes, kind: str, chance: random.Random) -> bytes:
    """Return bytes with a bit flipped, a page of 4 KiB zeroed, or the end missing."""
    content = bytearray(whole)
    if kind == "bit":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "page":
        start = chance.randrange(0, len(content), 4096)
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    else:
        del content[chance.randrange(len(content)) :]
    return bytes(content)


def damaged_bundle(bench: Bench) -> Result:
    """The same with the bundle that `evaluate` and `predict` read."""
    from resnetlab import bundle

    run, chance, counts = bench.folder / "run", bench.chance("bundle"), {"bit": 0, "page": 0, "cut": 0}
    shutil.copytree(kills.reference(bench, SETTINGS), run)
    files = (run / "model.safetensors", run / "model.json")
    bundle.load(run)
    tally = Tally(bench, of=bench.pick(30, 600))
    for number in range(tally.of):
        path, kind = files[number % 3 == 2], list(counts)[number // 3 % 3]
        whole = path.read_bytes()
        path.write_bytes(spoil(whole, kind, chance))
        try:
            bundle.load(run)
            wrong: str | None = "it was loaded"
        except ResNetLabError:
            wrong = None
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if path.name == "model.json" and wrong == "it was loaded":
            wrong = None if bundle.load(run).card == bundle.load(files[0]).card else wrong
        tally.add(f"{kind} of {path.name}", wrong)
        counts[kind] += 1
        path.write_bytes(whole)
    return tally.result(", ".join(f"{kind} {n:,}" for kind, n in counts.items()))


ROWS = (
    Row(
        id="R4",
        part="sweep",
        fault="The disk is full, broken or over quota (ENOSPC, EIO, EDQUOT) after any byte of a checkpoint's write",
        check="the checkpoint before loads whole; the message names the place, the reason and the free space; nothing "
        "is left behind after the next save",
        run=sweep,
    ),
    Row(
        id="R4",
        part="tmpfs",
        fault="A real small disk becomes full while a run saves a checkpoint or a bundle",
        check="exit 1 with a message; with room again, `--resume` ends equal to the undisturbed run to the byte",
        run=full_disk,
    ),
    Row(
        id="R5",
        part="space",
        fault="A disk that cannot hold the run",
        check="refused before the first step with the space needed; nothing is left",
        run=too_little_space,
    ),
    Row(
        id="R5",
        part="directory",
        fault="Run directory read-only, a file, of another user, deleted while training (all of it, or checkpoints)",
        check="exit 1 with a clear text, before the first step where possible; or the run goes on and ends whole",
        run=unwritable,
    ),
    Row(
        id="R6",
        part="checkpoint",
        fault="A bit flipped, a 4 KiB page zeroed, the end missing, in each file of the newest checkpoint",
        check="noticed; the one before is loaded, and a line says so",
        run=damage,
    ),
    Row(
        id="R6",
        part="bundle",
        fault="The same in each file of a bundle",
        check="refused with a message (or, in the description beside the weights, without effect on what is loaded)",
        run=damaged_bundle,
    ),
)
