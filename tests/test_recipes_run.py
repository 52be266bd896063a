"""Every recipe trains: a few steps on tiny data, the same twice; and pinned losses of a few steps of digits."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from resnetlab import sources, training
from resnetlab.config import Recipe, override
from resnetlab.console import Quiet
from resnetlab.loader import prepare
from resnetlab.metrics import StepRecord
from resnetlab.recipes import RECIPES, Facts
from resnetlab.runtime import setup
from resnetlab.session import Plan, plan, resolve
from resnetlab.sources.dataset import Dataset

TRACES = Path(__file__).parent / "golden" / "traces.json"
"""Losses after each of the first steps. Rewrite with: RESNETLAB_ACCEPT=1 pytest tests/test_recipes_run.py"""


def small(dataset: Dataset, name: str) -> Recipe:
    """Return a recipe cut down to tiny images and one epoch, its own choices otherwise."""
    facts = Facts(images=len(dataset.train), size=8, mirrors=dataset.mirrors)
    chosen = RECIPES[name](facts)
    return override(chosen, ["data.size=16", "epochs=1", "batch_size=16", "model.name=resnet20"])


def losses(plan: Plan, steps: int) -> list[float]:
    t = training.start(plan.recipe, plan.prepared, plan.runtime)
    found: list[float] = []
    for event in training.run(t):
        if isinstance(event, StepRecord):
            found.append(event.loss)
            if len(found) == steps:
                break
    return found


def test_all_recipes_are_covered() -> None:
    assert list(RECIPES) == ["default", "fast", "tutorial", "paper"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_repeats_itself(tiny: Dataset, name: str) -> None:
    plan = resolve("tiny", tiny, small(tiny, name), Quiet())
    first = losses(plan, 3)
    assert all(map(math.isfinite, first))
    assert first == losses(plan, 3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_losses_on_digits_are_the_stored_ones(name: str) -> None:
    digits = sources.load("digits")
    chosen = override(
        RECIPES[name](Facts(images=1438, size=8, mirrors=False)),
        ["data.size=8", "model.name=resnet20", "batch_size=64", "precision=fp32"],
    )
    plan = resolve("digits", digits, chosen, Quiet())
    found = losses(plan, 3)  # from one step to the next a difference of rounding grows about tenfold
    stored = json.loads(TRACES.read_text()) if TRACES.exists() else {}
    if os.environ.get("RESNETLAB_ACCEPT"):
        TRACES.write_text(json.dumps(stored | {name: found}, indent=2) + "\n")
    assert found == pytest.approx(json.loads(TRACES.read_text())[name], rel=1e-3)  # kernels differ between CPUs


def test_preparing_is_the_same_for_a_recipe_read_back_from_json(tiny: Dataset) -> None:
    plan = resolve("tiny", tiny, small(tiny, "default"), Quiet())
    again = Recipe.model_validate_json(plan.recipe.model_dump_json())
    assert again == plan.recipe
    assert prepare(again.data, tiny).preprocess == plan.prepared.preprocess
    assert resolve("tiny", tiny, again, Quiet()).recipe == plan.recipe
    assert setup("cpu", "fp32").precision.name == "fp32"


def test_the_recipe_knows_the_network_however_it_is_named() -> None:
    named = plan("digits", "resnet20", "fast", [], Quiet()).recipe
    assert plan("digits", None, "fast", ["model.name=resnet20"], Quiet()).recipe == named
    assert named.optim.norm_lr == 0.0025


def test_small_images_of_any_shape_are_read_at_their_own_size(photos: Any) -> None:
    """What a recipe for thumbnails expects; a crop sees no more of the longer side at any size."""
    strips = str(photos({"a": 12, "b": 12}, size=(100, 32)))
    found = plan(strips, None, "default", [], Quiet())
    assert (found.recipe.model.name, found.prepared.preprocess.size) == ("resnet20", 32)
    assert plan(strips, None, "default", ["data.fit=pad"], Quiet()).prepared.preprocess.size == 224


def test_a_place_that_no_run_can_keep_is_noted(photos: Any) -> None:
    place = photos({"a": 12, "b": 12}, root="caf\udce9")
    notes = plan(str(place), None, "default", [], Quiet()).prepared.notes
    assert any("caf\\xe9 is not UTF-8" in note for note in notes)


def test_the_recipe_knows_the_size_that_is_asked_for() -> None:
    found = plan("digits", None, "fast", ["data.size=32"], Quiet()).recipe.data
    assert found.grow == ("0:16", "0.5:24", "0.75:32")
