"""The artefact: weights that never travel without their meaning.

A bundle is one ``.safetensors`` file. Its header carries a JSON document with the network's configuration, the class
names, the preprocessing, the recipe, the metrics, versions, a schema number, a digest of the tensors and one of itself;
loading checks all of them. ``model.json`` beside it is a copy for people and other programs. No pickle anywhere.
"""

import difflib
import glob
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from resnetlab import models
from resnetlab.config import Config, ModelConfig, Recipe, parse
from resnetlab.errors import ResNetLabError
from resnetlab.files import write_atomic
from resnetlab.models.complexity import ShapesOnly
from resnetlab.preprocess import Preprocess
from resnetlab.rundir import CARD as CARD  # as others know them
from resnetlab.rundir import WEIGHTS as WEIGHTS

SCHEMA = 1
LARGEST_SIDE = 8192
"""Pixels. A description that asks for larger images is refused: it would take all memory at the first prediction."""
_KEY = "resnetlab"
"""The header's only key, as safetensors writes several in no fixed order, and a run's file is the same each time."""


class Card(Config):
    """What the weights mean."""

    schema_number: int = SCHEMA
    model: ModelConfig
    classes: tuple[str, ...] = Field(min_length=1)
    preprocess: Preprocess
    recipe: Recipe
    data: dict[str, Any] = Field(default_factory=dict)
    """Name, origin and sizes of the splits that it was trained on."""
    metrics: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Scores by split: ``{"val": {"top1": …}}``."""
    epoch: int = 0
    """The epoch whose weights these are."""
    versions: dict[str, str] = Field(default_factory=dict)
    members: tuple[models.Member, ...] = Field((), max_length=64)
    """The networks of an ensemble, whose tensors are named ``members.0.…``; ``model`` is then the first's, and
    ``recipe``, ``data`` and ``preprocess`` too. Empty: one network."""
    combine: models.Combine = "probabilities"
    """What is averaged over the members."""
    tensors_sha256: str = ""
    card_sha256: str = ""
    """Of this document's text while this value is empty. The last field."""


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
        card: What they mean; its digests are filled in.

    Raises:
        ResNetLabError: The disk is full or cannot be written; what was there before is untouched.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    text = _seal(card.model_copy(update={"tensors_sha256": digest(tensors), "card_sha256": ""}))
    content = serialize(tensors, metadata={_KEY: text})
    write_atomic(directory / WEIGHTS, content)
    record = {**json.loads(text), "file": WEIGHTS, "file_sha256": hashlib.sha256(content).hexdigest()}
    write_atomic(directory / CARD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return directory / WEIGHTS


def load(run: str | Path) -> Bundle:
    """Load a run directory, or the ``.safetensors`` bundle in it, and check it against itself.

    Raises:
        ResNetLabError: There is none, or it is damaged, or its parts disagree; the message says which.
    """
    path = find(run)
    text, tensors = _read(path)
    card = _parse(text, path)
    if digest(tensors) != card.tensors_sha256:
        raise ResNetLabError(f"{path} is damaged: its weights do not match the checksum saved with them.")
    _check(card, path)
    model = build(card)
    models.load_state(model, tensors, str(path))
    return Bundle(model=model.eval(), card=card, path=path)


def build(card: Card) -> nn.Module:
    """Make the network, or the ensemble, that a description describes, with fresh weights."""
    if card.members:
        own = card.preprocess
        return models.build_ensemble(card.members, card.combine, mean=own.mean, std=own.std)
    return models.build(card.model)


def _check(card: Card, path: Path) -> None:
    """Refuse a description that contradicts itself, or a network for which the file is too small."""
    for config in (card.model, *(member.model for member in card.members)):
        _check_network(config, card, path)
    if card.members and abs(sum(member.weight for member in card.members) - 1) > 1e-3:
        raise ResNetLabError(f"{path} disagrees with itself: the weights of its members do not add up to 1.")
    if card.preprocess.resize > LARGEST_SIDE:
        raise ResNetLabError(f"{path} asks for images of {card.preprocess.resize} px; the limit is {LARGEST_SIDE}.")
    try:
        with ShapesOnly():  # no memory is taken yet
            values = sum(tensor.numel() for tensor in build(card).state_dict().values())
    except (ResNetLabError, RuntimeError, TypeError) as error:  # torch's, where sizes overflow
        raise ResNetLabError(f"{path}: its network cannot be built: {error}") from error
    if 2 * values > path.stat().st_size:  # two bytes a value at least
        raise ResNetLabError(
            f"{path} disagrees with itself: the network that it describes has {values:,} values, which do not fit in a "
            f"file of {path.stat().st_size:,} bytes."
        )


def _check_network(config: ModelConfig, card: Card, path: Path) -> None:
    """Refuse a network that does not fit the classes and the preprocessing."""
    if config.num_classes != len(card.classes):
        raise ResNetLabError(
            f"{path} disagrees with itself: the network has {config.num_classes} classes, but "
            f"{len(card.classes)} class names are listed."
        )
    if config.in_channels != card.preprocess.channels:
        raise ResNetLabError(
            f"{path} disagrees with itself: the network reads {config.in_channels} channels, the preprocessing "
            f"makes {card.preprocess.channels}."
        )
    if config.image_size not in (None, card.preprocess.size):
        raise ResNetLabError(
            f"{path} disagrees with itself: the network reads images of {config.image_size} px, the preprocessing "
            f"makes {card.preprocess.size}."
        )


def find(run: str | Path) -> Path:
    """Return the bundle file that RUN means."""
    path = Path(run)
    is_directory = os.path.isdir(path)  # pathlib's raises on a name that is too long, or a folder that is closed
    file = path / WEIGHTS if is_directory else path
    if os.path.isfile(file) and file.suffix == ".safetensors":
        return file
    if is_directory and os.path.isdir(path / "checkpoint"):
        raise ResNetLabError(
            f"The run {path} has not finished an epoch yet, so it has no {WEIGHTS}. "
            f"Continue it with: resnetlab train --resume {path}"
        )
    if is_directory:
        try:
            os.stat(file)
        except PermissionError as error:  # of a closed folder it cannot be said what is in it
            raise ResNetLabError(f"{path} cannot be read: permission denied.") from error
        except OSError:
            pass
        raise ResNetLabError(f"{path} is not a run: there is no {WEIGHTS} in it.")
    if os.path.isfile(path):
        raise ResNetLabError(f"{path} is not a bundle. RUN is a run directory or the {WEIGHTS} in it.")
    raise ResNetLabError(f"There is no run {path}.{_neighbours(path)}")


def _neighbours(path: Path) -> str:
    """Name the runs where a run was looked for, or else where runs are made: first what it was perhaps meant to be."""
    for place in (path.parent, Path("runs")):
        names = sorted(os.path.dirname(found) for found in glob.glob(f"*/{WEIGHTS}", root_dir=place))
        if names:
            shown = list(dict.fromkeys([*difflib.get_close_matches(path.name, names), *names]))[:5]
            return f" Runs there: {', '.join(str(place / name) for name in shown)}."
    return ""


def _read(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """Return our part of the header and the weights, both of one file though another may take its place meanwhile."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            return text, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged file can break the reader in any way
        if reason := _closed(path):  # the reader says of such a file that there is none
            raise ResNetLabError(f"{path} cannot be read: {reason}.") from error
        size = " (it is empty)" if os.path.isfile(path) and os.path.getsize(path) == 0 else ""
        raise ResNetLabError(f"{path} cannot be read as safetensors{size}: {error}") from error


def _closed(path: Path) -> str:
    """Say why a file cannot be opened, in the system's words; nothing when it can be."""
    try:
        with open(path, "rb"):
            return ""
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _parse(text: str | None, path: Path) -> Card:
    """Read the description in the header, and hold it against its own digest."""
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
    card = parse(Card, text, str(path))
    if hashlib.sha256(text.replace(card.card_sha256, "").encode()).hexdigest() != card.card_sha256:
        raise ResNetLabError(f"{path} is damaged: its description does not match the checksum saved with it.")
    return card


def _seal(card: Card) -> str:
    """Return a card without its own digest as JSON with it."""
    text = json.dumps(card.model_dump(mode="json"), ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode()  # the path of the data need not be text
    seal = hashlib.sha256(text.encode()).hexdigest()
    return text.removesuffix('""}') + f'"{seal}"}}'  # it is the last field


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of tensors, whatever their order."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
