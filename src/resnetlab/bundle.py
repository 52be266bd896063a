"""The artefact: weights that never travel without their meaning.

A bundle is one ``.safetensors`` file. Its header carries a JSON document with the network's configuration, the class
names, the preprocessing, the recipe, the metrics, versions, a schema number and a digest of the tensors; loading
checks all of them. ``model.json`` beside it is a copy for people and other programs. No pickle anywhere.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resnetlab import models
from resnetlab.config import Config, ModelConfig, Recipe, parse
from resnetlab.errors import ResNetLabError
from resnetlab.files import sha256, write_atomic
from resnetlab.preprocess import Preprocess

SCHEMA = 1
WEIGHTS, CARD = "model.safetensors", "model.json"
_KEY = "resnetlab"


class Card(Config):
    """What the weights mean."""

    schema_number: int = SCHEMA
    model: ModelConfig
    classes: tuple[str, ...] = Field(min_length=1)
    preprocess: Preprocess
    recipe: Recipe
    data: dict[str, Any] = Field(default_factory=dict)
    """Name, origin and sizes of the splits that it was trained on."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Scores by split: ``{"val": {"top1": …}}``."""
    epoch: int = 0
    """The epoch whose weights these are."""
    versions: dict[str, str] = Field(default_factory=dict)
    tensors_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A network with its meaning, in evaluation mode."""

    model: nn.Module
    card: Card
    path: Path


def save(directory: Path, weights: dict[str, Tensor], card: Card) -> Path:
    """Write ``model.safetensors`` and ``model.json`` into a directory, each in one step.

    Args:
        directory: The run directory.
        weights: A network's state dict, on any device.
        card: What they mean; its digest is filled in.

    Raises:
        ResNetLabError: The disk is full or cannot be written; what was there before is untouched.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    card = card.model_copy(update={"tensors_sha256": digest(tensors)})
    path = directory / WEIGHTS
    header = {_KEY: card.model_dump_json()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    record = {**card.model_dump(mode="json"), "file": WEIGHTS, "file_sha256": sha256(path)}
    write_atomic(directory / CARD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return path


def load(run: str | Path) -> Bundle:
    """Load a run directory, or the ``.safetensors`` bundle in it, and check it against itself.

    Raises:
        ResNetLabError: There is none, or it is damaged, or its parts disagree; the message says which.
    """
    path = find(run)
    card = read_card(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ResNetLabError(f"{path} cannot be read as safetensors: {error}") from error
    if digest(tensors) != card.tensors_sha256:
        raise ResNetLabError(f"{path} is damaged: its weights do not match the checksum saved with them.")
    if card.model.num_classes != len(card.classes):
        raise ResNetLabError(
            f"{path} disagrees with itself: the network has {card.model.num_classes} classes, but "
            f"{len(card.classes)} class names are listed."
        )
    if card.model.in_channels != card.preprocess.channels:
        raise ResNetLabError(
            f"{path} disagrees with itself: the network reads {card.model.in_channels} channels, the preprocessing "
            f"makes {card.preprocess.channels}."
        )
    model = models.build(card.model)
    models.load_state(model, tensors, str(path))
    return Bundle(model=model.eval(), card=card, path=path)


def find(run: str | Path) -> Path:
    """Return the bundle file that RUN means."""
    path = Path(run)
    file = path / WEIGHTS if path.is_dir() else path
    if file.is_file() and file.suffix == ".safetensors":
        return file
    if path.is_dir() and (path / "checkpoint").is_dir():
        raise ResNetLabError(
            f"The run {path} has not finished an epoch yet, so it has no {WEIGHTS}. "
            f"Continue it with: resnetlab train --resume {path}"
        )
    if path.is_dir():
        raise ResNetLabError(f"{path} is not a run: there is no {WEIGHTS} in it.")
    if path.is_file():
        raise ResNetLabError(f"{path} is not a bundle. RUN is a run directory or the {WEIGHTS} in it.")
    near = [p.parent for p in path.parent.glob(f"*/{WEIGHTS}")] if path.parent.is_dir() else []
    there = f" Runs there: {', '.join(sorted(str(p) for p in near)[:5])}." if near else ""
    raise ResNetLabError(f"There is no run {path}.{there}")


def read_card(path: Path) -> Card:
    """Read what the weights mean from the file's header, without reading the weights."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise ResNetLabError(f"{path} cannot be read as safetensors: {error}") from error
    if text is None:
        raise ResNetLabError(
            f"{path} holds weights but not their meaning: it was not saved by ResNetLab. "
            "In Python, resnetlab.load_weights(model, path) reads bare weights into a network of your choice."
        )
    try:
        schema = json.loads(text).get("schema_number")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ResNetLabError(f"{path}: the description in its header is not a JSON object.") from error
    if schema != SCHEMA:
        raise ResNetLabError(
            f"{path} has schema number {schema}; this ResNetLab reads {SCHEMA}. Use the version that wrote it."
        )
    return parse(Card, text, str(path))


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of tensors, whatever their order."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
