"""The table of networks in figures, without building the networks each time or importing PyTorch.

Counting takes seconds for networks of a thousand layers and the same for every call, so it is kept in the user's cache
until a source file that it depends on changes.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from resnetlab import files
from resnetlab.errors import ResNetLabError


@dataclass(frozen=True)
class Description:
    """A row of the table in figures, at the image size and number of classes that the network was designed for."""

    name: str
    family: str
    block: str
    image_size: int
    num_classes: int
    parameters: int
    macs: int
    layers: int


def rows(count: Callable[[], list[Description]]) -> list[Description]:
    """Return what ``count`` returns, from the cache where the networks are still the same."""
    place, state = files.cache() / "models.json", _state()
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["state"] == state:
            return [Description(**row) for row in kept["rows"]]
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is not as we write it
        pass
    found = count()
    with suppress(OSError, ResNetLabError):  # a cache that cannot be written only costs time
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(place, json.dumps({"state": state, "rows": [asdict(row) for row in found]}))
    return found


def _state() -> str:
    """Return the SHA-256 of the sources that the figures depend on."""
    home = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [Path(__file__), home / "config.py", *sorted((home / "models").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
