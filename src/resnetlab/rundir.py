"""The run directory: complete, and readable without ResNetLab.

``model.safetensors`` and ``model.json`` (the bundle), ``metrics.csv``, ``timing.csv``, ``scores.json``, ``log.txt``,
``config.json``, ``splits.json``, pictures, and ``checkpoint/``.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from resnetlab.errors import ResNetLabError
from resnetlab.files import cannot_write, existing_parent, write_atomic
from resnetlab.files import locked as hold
from resnetlab.metrics import ClassScore, EpochRecord, RunData, Scorecard, TimingRecord

METRICS, TIMING, CONFIG, LOG, SCORES, SPLITS = (
    "metrics.csv",
    "timing.csv",
    "config.json",
    "log.txt",
    "scores.json",
    "splits.json",
)
WEIGHTS, CARD = "model.safetensors", "model.json"
"""The bundle (`resnetlab.bundle`)."""
CHECKPOINTS, LOCK, PROBE = "checkpoint", ".lock", ".probe"

STRAY = ".*.tmp"
"""How `files.write_atomic` names what it is writing."""

Record = TypeVar("Record", EpochRecord, TimingRecord)


def create(wanted: str | Path | None, name: str) -> Path:
    """Make a new run directory: ``wanted``, or ``runs/NAME``, ``runs/NAME-2``, ... whichever is free.

    Raises:
        ResNetLabError: ``wanted`` exists and is not empty (a run is never overwritten), cannot be made or named.
    """
    path = first = Path("runs") / name if wanted is None else Path(wanted)
    check_name(path)
    try:
        if wanted is not None:
            if path.exists() and not (path.is_dir() and _is_bare(path)):
                further = f", or continue it with: resnetlab train --resume {path}" if is_run(path) else "."
                raise ResNetLabError(f"{path} exists already and is never overwritten. Give another --out{further}")
            path.mkdir(parents=True, exist_ok=True)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = first if number == 1 else first.with_name(f"{first.name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        return path
    except OSError as error:
        raise cannot_write(path, error) from error


def check_name(place: str | Path) -> None:
    """Refuse a place whose name is not UTF-8, from which safetensors and JSON could not be read back, or has a NUL.

    Raises:
        ResNetLabError: It is such a one.
    """
    if "\0" in str(place):
        raise ResNetLabError(f"{str(place)!r}: no file system takes a name with a NUL. Take another.")
    if str(place) != os.fsencode(place).decode(errors="replace"):
        raise ResNetLabError(f"{place}: what is kept cannot be read back from a name that is not UTF-8. Take another.")


def probe(path: Path, needed: int) -> None:
    """Make sure that the directory can be written and has room for ``needed`` bytes, before any work is done.

    Raises:
        ResNetLabError: It cannot, or has not.
    """
    write_atomic(path / PROBE, b"x" * 4096)
    (path / PROBE).unlink()
    free = shutil.disk_usage(existing_parent(path)).free
    if free < needed:
        raise ResNetLabError(
            f"{path} has {free / 2**20:.0f} MiB free, but this run's weights and checkpoints need about "
            f"{needed / 2**20:.0f} MiB. Free some space, or name another place with --out DIR."
        )


def typed() -> list[str]:
    """Return the command that this process was started with, as it would be typed; none where Python calls us."""
    program = Path(sys.argv[0])
    ours = program.stem == "resnetlab" or program.parts[-2:] == ("resnetlab", "__main__.py")  # python -m resnetlab
    return ["resnetlab", *sys.argv[1:]] if ours else []


def discard(path: Path) -> None:
    """Remove a run directory in which nothing was written yet; any other stays."""
    with contextlib.suppress(OSError):
        if _is_bare(path):
            for entry in path.iterdir():
                entry.unlink()
            path.rmdir()


def _is_bare(path: Path) -> bool:
    """Whether a directory has nothing but what a run leaves that was killed before it had written anything."""
    return all(entry.name in (LOCK, PROBE) or entry.match(STRAY) for entry in path.iterdir())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock ends with the process, however it ends.

    What a killed process was just writing is cleared away.

    Raises:
        ResNetLabError: Another process is training in it.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold(path / LOCK, wait=False))
        except BlockingIOError as error:
            busy = f"Another process is training in {path}. Give another --out, or wait for it."
            raise ResNetLabError(busy) from error
        except OSError as error:
            raise cannot_write(path, error) from error
        for stray in [*path.glob(STRAY), path / PROBE]:
            stray.unlink(missing_ok=True)
        yield


class Log:
    """``log.txt``: a line for each thing that happened, with the time of day."""

    def __init__(self, path: Path) -> None:
        self.path = path / LOG

    def __call__(self, line: str) -> None:
        """Append a line."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{stamp}  {line}\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error


def write_rows(path: Path, rows: Sequence[Record]) -> None:
    """Write records as CSV, all of them in one step: a resumed run can neither double a row nor lose one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(rows[0])])
    for row in rows:
        writer.writerow(["" if value is None else value for value in asdict(row).values()])
    write_atomic(path, text.getvalue())


def read_rows(path: Path, kind: type[Record]) -> tuple[Record, ...]:
    """Read what `write_rows` wrote.

    Raises:
        ResNetLabError: The file is not such a table.
    """
    columns = {field.name: field for field in fields(kind)}

    def value(name: str, text: str) -> float | None:
        if text == "" and columns[name].default is None:
            return None
        return int(text) if name in ("epoch", "step") else float(text)

    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, strict=True)
        if header != list(columns):
            raise ValueError(f"its columns are {', '.join(header)[:80]}")
        return tuple(kind(**{k: value(k, v) for k, v in zip(columns, row, strict=True)}) for row in rows)  # type: ignore[arg-type]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, csv.Error) as error:
        raise ResNetLabError(f"{path} cannot be read as a table of epochs: {error}") from error


def write_json(path: Path, value: object) -> None:
    """Write a JSON document for people and programs."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode("utf-8", "backslashreplace"))  # file names need not be text; JSON has the escape


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises:
        ResNetLabError: It is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResNetLabError(f"{path} cannot be read: {error}") from error


def is_run(path: Path) -> bool:
    """Whether a directory holds a run."""
    return os.path.isfile(path / CONFIG) or os.path.isdir(path / CHECKPOINTS)


def is_finished(path: Path) -> bool:
    """Whether a directory holds a run that has come to its end."""
    return (path / SCORES).is_file() and (path / WEIGHTS).is_file()


def read_run(path: Path) -> RunData:
    """Read what a report needs to know of a run.

    Raises:
        ResNetLabError: The directory holds no run, or a damaged one.
    """
    if not is_run(path):
        raise ResNetLabError(f"{path} is not a run directory: there is no {CONFIG} in it.")
    config = read_json(path / CONFIG)
    scores = read_json(path / SCORES) if (path / SCORES).is_file() else {}
    try:
        split = "test" if "test" in scores else "val"
        classes = tuple(config["data"]["classes"])
        score = Scorecard.from_dict(scores[split]) if split in scores else None
        _check(classes, score)
        return RunData(
            name=path.absolute().name,
            title=_title(config),
            classes=classes,
            epochs=read_rows(path / METRICS, EpochRecord),
            timing=read_rows(path / TIMING, TimingRecord),
            score=score,
            score_split=split,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ResNetLabError(f"{path}: {CONFIG} or {SCORES} is not as ResNetLab writes it ({error}).") from error


def _title(config: dict[str, Any]) -> str:
    """Say what was trained on what, or combined from what."""
    names = sorted({member["model"] for member in config.get("members", ())})
    if names:
        return f"{len(config['members'])} × {', '.join(names)} on {config['data']['name']}, {config['combine']}"
    return f"{config['recipe']['model']['name']} on {config['data']['name']}, recipe {config['recipe']['name']}"


def _check(classes: tuple[str, ...], score: Scorecard | None) -> None:
    """Refuse what a report could not draw."""
    if not all(isinstance(name, str) for name in classes):
        raise TypeError("a class has no name")
    if score is None:
        return
    if score.confusion.shape != (len(classes), len(classes)) or tuple(row.name for row in score.per_class) != classes:
        raise ValueError("the score is of other classes")
    records: list[Scorecard | ClassScore] = [score, *score.per_class]
    values = [
        getattr(record, field.name) for record in records for field in fields(record) if field.type in (int, float)
    ]
    low, high = score.top1_interval
    if not all(isinstance(value, int | float) for value in (low, high, *values)):
        raise TypeError("a score is not a number")
