"""Checkpoints: what an exact resume needs, as tensors and JSON. Never a pickle.

A checkpoint is a directory with a manifest of sizes and SHA-256 digests. It is written beside its place, synced, and
renamed into it, so it is whole or not there. The newest whole one is found by its manifest, and the one before is
kept until a newer one is complete: a damaged newest costs time, not the run.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnetlab.files import cannot_write, sha256, sync_directory, sync_file

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training state, split into tensors and JSON-able values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write ``directory/step-N`` and then delete all but the newest two.

    Raises:
        ResNetLabError: The disk is full or cannot be written; the earlier checkpoints are untouched.
    """
    target = directory / f"step-{checkpoint.step:09d}"
    temporary = directory / f".{target.name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write(temporary, checkpoint)
            if target.exists():  # left by a run that was stopped and resumed from an earlier step
                shutil.rmtree(target)
            os.rename(temporary, target)
            sync_directory(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise cannot_write(target, error) from error
    except SafetensorError as error:
        raise cannot_write(target, _as_os_error(error)) from error
    for old in _newest_first(directory)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_newest(directory: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that passes its manifest, or None when there is none.

    Args:
        directory: Where checkpoints lie.
        tell: Called with a line for each damaged one that is passed over.
    """
    for path in _newest_first(directory):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
            tell(f"The checkpoint {path} is damaged ({error}); falling back to the one before.")
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
    return Checkpoint(step=int(state.pop("step")), tensors=load_file(path / TENSORS), state=state)


def _newest_first(directory: Path) -> list[Path]:
    return sorted((p for p in directory.glob("step-*") if p.is_dir()), reverse=True)


def _as_os_error(error: SafetensorError) -> OSError:
    """Recover the errno that safetensors reports as text, so that a full disk is named as one."""
    import errno

    return OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error))
