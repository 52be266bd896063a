"""What `resnetlab bench` found to be fastest on this machine, kept in the user's cache: written there, read by runtime.

A choice belongs to a machine and to the versions it was measured with; with others it is not found, and the defaults
hold. A file that cannot be read counts as no file.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from resnetlab import files
from resnetlab.config import Config


class Choice(Config):
    """The fastest settings. They alter results by no more than rounding, but for the precision, which is printed."""

    threads: Annotated[int, Field(ge=1, le=4096)]
    """Threads of PyTorch's thread pool."""
    precision: Literal["fp32", "bf16", "fp16"]
    """What ``precision=auto`` means."""
    batch: Annotated[int, Field(ge=1, le=65536)]
    """Images at a time when a split is predicted."""
    convolution: Literal["winograd", "direct"] = "winograd"
    """The algorithm of 3×3 convolutions on a CPU; alters results by rounding."""
    measured: str
    """The day, such as 2026-11-24."""


def place() -> Path:
    """Return the file that the choices of this user's machines are kept in."""
    return files.cache() / "bench.json"


def recall(machine: str) -> Choice | None:
    """Return what was remembered for ``machine`` (`runtime.identity`), if anything."""
    try:
        return Choice.model_validate(_read()[machine])
    except (KeyError, ValidationError):
        return None


def remember(machine: str, choice: Choice) -> None:
    """Keep a choice beside those of other machines.

    Raises:
        ResNetLabError: The cache cannot be written.
    """
    _write({**_read(), machine: choice.model_dump(mode="json")})


def forget(machine: str) -> bool:
    """Remove what was remembered for ``machine``; whether there was anything."""
    kept = _read()
    found = kept.pop(machine, None) is not None
    if found:
        _write(kept)
    return found


def _read() -> dict[str, object]:
    try:
        kept = json.loads(place().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(kept: dict[str, object]) -> None:
    try:
        place().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(place(), error) from error
    files.write_atomic(place(), json.dumps(kept, indent=2) + "\n")
