"""Networks: an explicit table of architectures, and how to build, describe and count them."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError

from resnetlab.catalogue import Description
from resnetlab.config import ModelConfig
from resnetlab.errors import UsageError, unknown
from resnetlab.models.architecture import Architecture, Network
from resnetlab.models.cifar import CIFAR
from resnetlab.models.complexity import Complexity, ShapesOnly, count
from resnetlab.models.ensemble import Combine, Ensemble, Member
from resnetlab.models.fast import FAST
from resnetlab.models.reference import REFERENCE
from resnetlab.models.resnet import IMAGENET
from resnetlab.models.weights import load_state, load_weights

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Combine",
    "Complexity",
    "Description",
    "Ensemble",
    "Member",
    "Network",
    "build",
    "build_ensemble",
    "canonical",
    "cost",
    "count",
    "create_model",
    "describe",
    "load_state",
    "load_weights",
    "resolve",
    "rows",
]

ARCHITECTURES: dict[str, Architecture] = {**IMAGENET, **CIFAR, **FAST, **REFERENCE}
"""Every network by its name."""


def canonical(name: str) -> str:
    """Return the table's spelling of a name: ``ResNet-50`` is ``resnet50``.

    Raises:
        UsageError: There is no such architecture.
    """
    spellings = {_plain(row): row for row in ARCHITECTURES}
    if _plain(name) not in spellings:
        raise unknown("model", name, ARCHITECTURES)
    return spellings[_plain(name)]


def resolve(config: ModelConfig) -> ModelConfig:
    """Settle every ``auto``: the user's settings first, then the architecture's, then `ModelConfig`'s defaults.

    A setting is the user's if it was given to `ModelConfig`, even at its default value (``model_fields_set``).

    Raises:
        UsageError: The name is unknown, or a setting does not fit the architecture.
    """
    config = ModelConfig(**{**config.model_dump(exclude_unset=True), "name": canonical(config.name)})
    return ARCHITECTURES[config.name].resolve(config)


def build(config: ModelConfig) -> Network:
    """Make the network with fresh weights from PyTorch's generator; its ``config`` is the resolved one."""
    config = resolve(config)
    return ARCHITECTURES[config.name].make(config)


def build_ensemble(
    members: Sequence[Member], combine: Combine, *, mean: Sequence[float], std: Sequence[float]
) -> Ensemble:
    """Make the networks of an ensemble, as `build` does, and join them; ``mean`` and ``std`` are the ensemble's own."""
    return Ensemble([build(member.model) for member in members], members, combine, mean=mean, std=std)


def create_model(
    name: str, *, num_classes: int | None = None, in_channels: int = 3, image_size: int | None = None, **fields: Any
) -> Network:
    """Make a network by name, for example ``create_model("resnet50", num_classes=10, image_size=32)``.

    Args:
        name: A row of `ARCHITECTURES`.
        num_classes: None: as many as the architecture was designed for (1000 or 10).
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels; up to 64, the ImageNet family gets the small stem.
        fields: Any other fields of `ModelConfig`.

    Raises:
        UsageError: The name is unknown, or a field does not exist or does not fit.
    """
    name = canonical(name)
    if num_classes is None:
        num_classes = ARCHITECTURES[name].num_classes
    for key in fields:
        if key not in ModelConfig.model_fields:
            raise unknown("model setting", key, ModelConfig.model_fields)
    try:
        config = ModelConfig(
            name=name, num_classes=num_classes, in_channels=in_channels, image_size=image_size, **fields
        )
    except ValidationError as error:
        found = "; ".join(f"{e['loc'][0]}: {e['msg']} (got {e['input']!r})" for e in error.errors())
        raise UsageError(f"{name}: {found}.") from error
    return build(config)


@cache
def describe(name: str) -> Description:
    """Describe an architecture; nothing is computed and no memory is taken for weights."""
    name = canonical(name)
    row = ARCHITECTURES[name]
    figures = cost(ModelConfig(name=name, num_classes=row.num_classes, image_size=row.image_size), row.image_size)
    return Description(
        name=name,
        family=row.family,
        block=row.block,
        image_size=row.image_size,
        num_classes=row.num_classes,
        parameters=figures.parameters,
        macs=figures.macs,
        layers=figures.layers,
    )


def cost(config: ModelConfig, image_size: int) -> Complexity:
    """Count a network's parameters, multiply-adds and layers for images of a size, without computing anything.

    Raises:
        UsageError: Such images are too small for it.
    """
    return _cost(resolve(config), image_size)  # equal settings may mean two networks: `resolve` sees what was given


@cache
def _cost(config: ModelConfig, image_size: int) -> Complexity:
    with ShapesOnly():
        network = build(config)
    return count(network, image_size)


def rows() -> list[Description]:
    """Describe every architecture, in the table's order."""
    return [describe(name) for name in ARCHITECTURES]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
