"""The run directory: complete, and readable without ResNetLab.

``model.safetensors`` and ``model.json`` (the bundle), ``metrics.csv``, ``timing.csv``, ``scores.json``, ``log.txt``,
``config.json``, ``splits.json``, pictures, and ``checkpoint/``.
"""

import contextlib
import csv
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from resnetlab.errors import ResNetLabError
from resnetlab.files import cannot_write, existing_parent, write_atomic
from resnetlab.metrics import EpochRecord, RunData, Scorecard, TimingRecord

METRICS, TIMING, CONFIG, LOG, SCORES, SPLITS = (
    "metrics.csv",
    "timing.csv",
    "config.json",
    "log.txt",
    "scores.json",
    "splits.json",
)
CHECKPOINTS = "checkpoint"

Record = TypeVar("Record", EpochRecord, TimingRecord)


def create(wanted: str | Path | None, name: str) -> Path:
    """Make a new run directory: ``wanted``, or ``runs/NAME``, ``runs/NAME-2``, ... whichever is free.

    Raises:
        ResNetLabError: ``wanted`` exists and is not empty (a run is never overwritten), or cannot be made.
    """
    try:
        if wanted is not None:
            path = Path(wanted)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ResNetLabError(
                    f"{path} exists already and is never overwritten. Give another --out, "
                    f"or continue it with: resnetlab train --resume {path}"
                )
            path.mkdir(parents=True, exist_ok=True)
            return path
        number = 1
        while True:
            path = Path("runs") / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                return path
            number += 1
    except OSError as error:
        raise cannot_write(path, error) from error


def probe(path: Path, needed: int) -> None:
    """Make sure that the directory can be written and has room for ``needed`` bytes, before any work is done.

    Raises:
        ResNetLabError: It cannot, or has not.
    """
    write_atomic(path / ".probe", b"x" * 4096)
    (path / ".probe").unlink()
    free = shutil.disk_usage(existing_parent(path)).free
    if free < needed:
        raise ResNetLabError(
            f"{path} has {free / 2**20:.0f} MiB free, but this run's weights and checkpoints need about "
            f"{needed / 2**20:.0f} MiB. Free some space, or name another place with --out DIR."
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock ends with the process, however it ends.

    Raises:
        ResNetLabError: Another process is training in it.
    """
    try:
        file = open(path / ".lock", "a+")  # noqa: SIM115 - closed below, after the block
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        try:
            import fcntl
        except ImportError:  # Windows has no flock; two processes there are the user's care
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResNetLabError(f"Another process is training in {path}. Give another --out.") from error
        yield


class Log:
    """``log.txt``: a line for each thing that happened, with the time of day."""

    def __init__(self, path: Path) -> None:
        self.path = path / LOG

    def __call__(self, line: str) -> None:
        """Append a line."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with open(self.path, "a", encoding="utf-8") as file:
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
    whole = {"epoch", "step"}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return tuple(
                kind(**{k: None if v == "" else int(v) if k in whole else float(v) for k, v in row.items()})  # type: ignore[arg-type]
                for row in csv.DictReader(file)
            )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError) as error:
        raise ResNetLabError(f"{path} cannot be read as a table of epochs: {error}") from error


def write_json(path: Path, value: object) -> None:
    """Write a JSON document for people and programs."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
    return (path / CONFIG).is_file() or os.path.isdir(path / CHECKPOINTS)


def read_run(path: Path) -> RunData:
    """Read what a report needs to know of a run.

    Raises:
        ResNetLabError: The directory holds no run, or a damaged one.
    """
    if not is_run(path):
        raise ResNetLabError(f"{path} is not a run directory: there is no {CONFIG} in it.")
    config = read_json(path / CONFIG)
    scores = read_json(path / SCORES) if (path / SCORES).is_file() else {}
    split = "test" if "test" in scores else "val"
    try:
        return RunData(
            name=path.absolute().name,
            title=f"{config['recipe']['model']['name']} on {config['data']['name']}, recipe {config['recipe']['name']}",
            classes=tuple(config["data"]["classes"]),
            epochs=read_rows(path / METRICS, EpochRecord),
            timing=read_rows(path / TIMING, TimingRecord),
            score=Scorecard.from_dict(scores[split]) if split in scores else None,
            score_split=split,
        )
    except (KeyError, TypeError) as error:
        raise ResNetLabError(f"{path}: {CONFIG} or {SCORES} is not as ResNetLab writes it ({error}).") from error
