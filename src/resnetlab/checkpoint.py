"""Checkpoints: what an exact resume needs, as tensors and JSON. Never a pickle.

A checkpoint is a directory with a manifest of sizes and SHA-256 digests. It is written beside its place, synced, and
renamed into it, so it is whole or not there; what lies there already is deleted only afterwards. The newest whole one
is found by its manifest, and the one before is kept too: a damaged newest costs time, not the run.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnetlab.errors import ResNetLabError
from resnetlab.files import as_os_error, cannot_write, sha256, sync_directory, sync_file

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
KEPT = 2
GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What a damaged checkpoint raises of the system's errors; others say nothing of it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training state, split into tensors and JSON-able values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write ``directory/step-N`` and then delete all but it and the one before.

    One of the same step (a run that was stopped at an epoch's last step saves it again, one epoch further) stays until
    the new one, ``step-N-2``, is complete. Later steps can only be damaged ones that were passed over, and go too.

    Raises:
        ResNetLabError: The disk is full or cannot be written; the earlier checkpoints are untouched.
    """
    serial = max((n for step, n in map(_order, _newest_first(directory)) if step == checkpoint.step), default=0) + 1
    target = directory / (f"step-{checkpoint.step:09d}" + (f"-{serial}" if serial > 1 else ""))
    temporary = directory / f".{target.name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for stray in directory.glob(".step-*.tmp"):  # of a process that was killed
            shutil.rmtree(stray, ignore_errors=True)
        temporary.mkdir()
        try:
            _write(temporary, checkpoint)
            os.rename(temporary, target)
            sync_directory(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise cannot_write(target, error) from error
    except SafetensorError as error:
        raise cannot_write(target, as_os_error(error)) from error
    others = [path for path in _newest_first(directory) if path != target]
    before = [path for path in others if _order(path)[0] < checkpoint.step]
    for old in set(others) - set(before[: KEPT - 1]):
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_newest(directory: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that passes its manifest, or None when there is none.

    Args:
        directory: Where checkpoints lie.
        tell: Called with a line for each damaged one that is passed over.

    Raises:
        ResNetLabError: The disk or the memory fails, so that nobody can say which are damaged; with the next save
            they would be gone.
    """
    paths = _newest_first(directory)
    for path in paths:
        try:
            return _read(path)
        except Exception as error:  # a damaged file can break the readers in any way
            if isinstance(error, MemoryError | OSError) and not isinstance(error, GONE):
                raise ResNetLabError(
                    f"The checkpoint {path} cannot be read ({_reason(error)}), which need not be its fault. Nothing "
                    "was changed: try again, or remove that folder to go on without it."
                ) from error
            then = "there is none before it" if path == paths[-1] else "falling back to the one before"
            tell(f"The checkpoint {path} is damaged ({_reason(error)}); {then}.")
    return None


def _write(path: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, path / TENSORS)
    (path / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}))
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)} for name in (TENSORS, STATE)}
    (path / MANIFEST).write_text(json.dumps(files))
    for name in (TENSORS, STATE, MANIFEST):
        sync_file(path / name)
    sync_directory(path)


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text())
    for name in (TENSORS, STATE):
        entry = manifest[name]
        if (path / name).stat().st_size != entry["bytes"] or sha256(path / name) != entry["sha256"]:
            raise ValueError(f"{name} does not match its checksum")
    state = json.loads((path / STATE).read_text())
    # Copies: what is read from a file that is later deleted must not hang on it, least of all on a network's disk.
    tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
    return Checkpoint(step=int(state.pop("step")), tensors=tensors, state=state)


def _newest_first(directory: Path) -> list[Path]:
    named = (p for p in directory.glob("step-*") if re.fullmatch(r"step-[0-9]+(-[0-9]+)?", p.name))
    return sorted((p for p in named if p.is_dir()), key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    """Return the step of a checkpoint, and how many times that step has been saved."""
    _, step, *serial = path.name.split("-")
    return int(step), int(serial[0]) if serial else 1


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{Path(error.filename).name}: {error.strerror}" if error.filename else error.strerror
    return f"no {error} in {MANIFEST}" if isinstance(error, KeyError) else str(error) or type(error).__name__
