"""How a run came about, and the command that does it again."""

import shlex
from typing import Any

from resnetlab import loader, models, rundir
from resnetlab.bundle import WEIGHTS, Bundle, Card
from resnetlab.config import ModelConfig, Recipe, as_text, flat
from resnetlab.recipes import RECIPES, Facts
from resnetlab.report.records import Origin
from resnetlab.sources.dataset import Dataset

FROM_DATA = ("model.name", "model.num_classes", "model.in_channels", "model.image_size", "name", "seed")
"""Keys that no setting has to repeat: the data decides them, or an option names them."""


def describe(bundle: Bundle) -> Origin:
    """Return what is known of a run from its files."""
    card, config = bundle.card, _config(bundle)
    members = _members(card, config)
    cost = models.count(bundle.model, card.preprocess.size)
    return Origin(
        model=card.model.name,
        data=str(card.data.get("name", "unknown data")),
        recipe=card.recipe.name,
        splits={s: int(card.data[s]) for s in ("train", "val", "test") if isinstance(card.data.get(s), int)},
        size=card.preprocess.size,
        epochs=card.recipe.epochs,
        epoch=card.epoch,
        chosen=card.recipe.keep == "best",
        seed=card.recipe.seed,
        machine=str(config.get("machine", "")),
        precision=str(config.get("precision", "")),
        command=_recorded(config),
        versions=card.versions,
        parameters=cost.parameters,
        macs=cost.macs,
        layers=models.cost(card.model, card.preprocess.size).layers,
        members=members,
        combine=str(config.get("combine", card.combine)) if members else "",
        settings=flat(card.recipe),
    )


def command(bundle: Bundle, dataset: Dataset) -> str:
    """Return the command that makes the run again: as it was typed, or else made from its recipe.

    Where the run was written does not belong to it, so ``--out`` is left out: a run is never overwritten.
    """
    config = _config(bundle)
    members = _members(bundle.card, config)
    if members and not _recorded(config):
        rule = str(config.get("combine", bundle.card.combine))
        return shlex.join(["resnetlab", "ensemble", *members, "--combine", rule])
    return _recorded(config) or shlex.join(rebuilt(bundle.card, dataset))


def _members(card: Card, config: dict[str, Any]) -> tuple[str, ...]:
    """Return the runs that an ensemble, or a mean of weights, was made of."""
    listed = config.get("members")
    sources = [str(m.get("run", "")) for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
    return tuple(source.removesuffix(f"/{WEIGHTS}") for source in sources or [m.source for m in card.members])


def _config(bundle: Bundle) -> dict[str, Any]:
    path = bundle.path.parent / rundir.CONFIG
    config = rundir.read_json(path) if path.is_file() else {}
    return config if isinstance(config, dict) else {}


def _recorded(config: dict[str, Any]) -> str:
    words = [str(word) for word in config.get("command") or []]
    if words[1:2] not in (["train"], ["ensemble"]) or any(word.startswith("--resume") for word in words):
        return ""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return shlex.join(kept)


def rebuilt(card: Card, dataset: Dataset) -> list[str]:
    """Write a command with only those settings in which the run differs from its recipe."""
    recipe = card.recipe
    source = str(card.data.get("source", dataset.name))
    words = ["resnetlab", "train", source, "--model", recipe.model.name]
    if recipe.name in RECIPES:
        words += ["--recipe", recipe.name]
        size = recipe.data.size if recipe.data.size != _plain(recipe, dataset).data.size else None
        always = ("epochs", *(["data.size"] if size else []))  # a recipe may depend on these
        bases = [flat(_plain(recipe, dataset, size=size, gpu=gpu)) for gpu in (False, True)]  # wherever it will run
        words += [
            f"{key}={as_text(value)}"
            for key, value in flat(recipe).items()
            if key in always or (key not in FROM_DATA and any(value != base.get(key) for base in bases))
        ]
    return [*words, "--seed", str(recipe.seed)]


def _plain(recipe: Recipe, dataset: Dataset, *, size: int | None = None, gpu: bool = False) -> Recipe:
    """Return the recipe as it is for this data, network and length, without anybody's other settings.

    Args:
        recipe: What the run had.
        dataset: What it was trained on.
        size: At which the images were asked to be read; None: nobody asked.
        gpu: Whether it would train on one.
    """
    native = min(loader.typical_shape(dataset.train))
    facts = Facts(
        images=len(dataset.train),
        size=native,
        mirrors=dataset.mirrors,
        model=recipe.model.name,
        epochs=recipe.epochs,
        read_at=size,
        gpu=gpu,
    )
    base = RECIPES[recipe.name](facts)
    given = {"num_classes": recipe.model.num_classes, "in_channels": recipe.model.in_channels}
    given["image_size"] = recipe.model.image_size or native
    network = models.resolve(ModelConfig(**{**base.model.model_dump(exclude_unset=True), **given}))
    return base.model_copy(update={"model": network})
