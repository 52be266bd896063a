"""Configuration: what goes in comes out, typed; what does not fit is named, with the nearest thing that would."""

import itertools
import warnings

import pytest
from pydantic import ValidationError

from resnetlab.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    as_text,
    early,
    early_flag,
    early_number,
    fields,
    flat,
    override,
    parse,
)
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.recipes import RECIPES, Facts

FACTS = [
    Facts(images=images, size=size, mirrors=mirrors, model=model)
    for images, size, mirrors, model in itertools.product(
        (20, 5_000, 50_000), (8, 32, 500), (True, False), (None, "resnet110")
    )
]


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[object, object]]:
    a, b = flat(old), flat(new)
    assert list(a) == list(b) == [key for key, _ in fields(Recipe)]
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(name="r", model=ModelConfig(name="resnet20"), epochs=3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    assert len(FACTS) == 36
    for facts in FACTS:
        made = RECIPES[name](facts)
        assert parse(Recipe, made.model_dump_json(), "config.json") == made
        assert override(made, []) == made
        assert differences(made, override(made, [])) == {}


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("epochs=40", "epochs", 40),
        ("optim.lr=5e-2", "optim.lr", 0.05),
        ("deterministic=true", "deterministic", True),
        ("deterministic=False", "deterministic", False),
        ("optim.nesterov=no", "optim.nesterov", False),
        ("optim.nesterov=1", "optim.nesterov", True),
        ("data.augment=crop:4,flip", "data.augment", ("crop:4", "flip")),
        ("data.augment=flip", "data.augment", ("flip",)),
        ("data.augment=none", "data.augment", ()),
        ("data.augment=", "data.augment", ()),
        ("data.augment=[crop:4, flip]", "data.augment", ("crop:4", "flip")),
        ("optim.milestones=0.5,0.75", "optim.milestones", (0.5, 0.75)),
        ("optim.milestones=none", "optim.milestones", ()),
        ("data.size=none", "data.size", None),
        ("data.size=None", "data.size", None),
        ("data.size=64", "data.size", 64),
        ("data.limit=none", "data.limit", None),
        ("data.val=0.2", "data.val", 0.2),
        ("model.zero_init=true", "model.zero_init", True),
        ("model.shortcut=none", "model.shortcut", "none"),
        ("model.name=resnet50", "model.name", "resnet50"),
        ("device=cuda:1", "device", "cuda:1"),
        ("name=a=b", "name", "a=b"),
        ("seed=9223372036854775807", "seed", 2**63 - 1),
    ],
)
def test_overrides_are_typed(recipe: Recipe, setting: str, key: str, value: object) -> None:
    changed = override(recipe, [setting])
    got: object = changed
    for part in key.split("."):
        got = getattr(got, part)
    assert got == value
    assert type(got) is type(value)
    assert set(differences(recipe, changed)) <= {key}
    assert parse(Recipe, changed.model_dump_json(), "x") == changed


def test_the_last_of_two_overrides_wins_and_the_recipe_is_untouched(recipe: Recipe) -> None:
    before = recipe.model_dump()
    assert override(recipe, ["epochs=5", "optim.lr=1", "epochs=6"]).epochs == 6
    assert recipe.model_dump() == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("epoch=3", ["Unknown setting", '"epoch"', 'Did you mean "epochs"?']),
        ("lr=0.1", ['"lr"', 'Did you mean "optim.lr"?']),
        ("data.lr=0.1", ['Did you mean "optim.lr"?']),
        ("optim.momemtum=0.1", ['Did you mean "optim.momentum"?']),
        ("optim=sgd", ['"optim"']),
        ("zzz=1", ['"zzz"', "resnetlab recipes"]),
        ("epochs", ['"epochs" is not a setting', "epochs=40"]),
        ("epochs=many", ["epochs", "integer", "'many'"]),
        ("epochs=1.5", ["epochs", "integer", "'1.5'"]),
        ("epochs=0", ["epochs", "greater than 0"]),
        ("epochs=none", ["epochs", "integer"]),
        ("optim.lr=-1", ["optim.lr", "greater than 0"]),
        ("optim.lr=nan", ["optim.lr", "finite"]),
        ("optim.lr=inf", ["optim.lr", "finite"]),
        ("optim.lr=1e31", ["optim.lr", "less than or equal to 1000000"]),
        ("optim.weight_decay=1e308", ["optim.weight_decay", "less than or equal to 1000000"]),
        ("optim.momentum=1", ["optim.momentum", "less than 1"]),
        ("optim.nesterov=maybe", ["optim.nesterov", "boolean", "'maybe'"]),
        ("optim.schedule=cosin", ["optim.schedule", "'cosine'", "'cosin'"]),
        ("optim.milestones=32000,48000", ["optim.milestones", "less than or equal to 1"]),
        ("optim.milestones=a", ["optim.milestones", "number"]),
        ("data.val=1", ["data.val", "less than 1"]),
        ("precision=fp8", ["precision", "'bf16'", "'fp8'"]),
        ("seed=-1", ["seed", "greater than or equal to 0"]),
        ("label_smoothing=1", ["label_smoothing", "less than 1"]),
    ],
)
def test_what_does_not_fit_is_explained(recipe: Recipe, setting: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        override(recipe, [setting])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_every_wrong_value_is_reported_at_once(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match=r"optim\.lr: .*'y'.* epochs: .*'x'"):
        override(recipe, ["epochs=x", "optim.lr=y"])


def test_every_key_of_a_recipe_can_be_set_to_what_it_is(recipe: Recipe) -> None:
    keys = dict(fields(Recipe))
    assert len(keys) == len(set(keys)) > 40
    for key in keys:
        value: object = recipe
        for part in key.split("."):
            value = getattr(value, part)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert override(recipe, [f"{key}={text}"]) == recipe, key


def test_documents_that_do_not_fit_are_explained() -> None:
    good = Recipe(name="r", model=ModelConfig(name="m"), epochs=1).model_dump_json()
    cases = {
        good.replace('"epochs"', '"epoch"'): [
            "epoch: Extra inputs",
            'Did you mean "epochs"?',
            "epochs: Field required",
        ],
        good.replace('"lr"', '"learning_rate"'): ["optim.learning_rate"],
        good[:-5]: ["document: Invalid JSON"],
        "[1]": ["document"],
        '"' + "x" * 10_000 + '"': ["document"],
    }
    for text, words in cases.items():
        with pytest.raises(ResNetLabError) as caught:
            parse(Recipe, text, "run/config.json")
        message = str(caught.value)
        assert message.startswith("run/config.json: ")
        assert len(message) < 600, "the whole document is in the message"
        for word in words:
            assert word in message


@pytest.mark.parametrize("record", [ModelConfig(name="m"), DataConfig(), OptimConfig()])
def test_records_are_frozen_and_take_no_unknown_field(record: Config) -> None:
    field = next(iter(type(record).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(record, field, getattr(record, field))
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(record).model_validate(record.model_dump() | {"colour": "red"})


def test_with_no_validation_images_there_is_no_best_epoch() -> None:
    model = ModelConfig(name="m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Recipe(name="r", model=model, data=DataConfig(val=0), epochs=1, keep="best").keep == "last"
    kept = Recipe(name="r", model=model, epochs=1, keep="best")
    assert kept.keep == "best"
    assert override(kept, ["data.val=0"]).keep == "last"


def test_flat_has_every_dotted_key_with_its_value(recipe: Recipe) -> None:
    changed = override(recipe, ["optim.lr=0.5", "data.size=64", "epochs=3"])
    assert differences(recipe, changed) == {"optim.lr": (0.1, 0.5), "data.size": (None, 64)}


def test_a_setting_can_be_read_before_there_is_a_recipe() -> None:
    settings = ["epochs=3", "device=cpu", "epochs=7", "optim.lr=0.1"]
    assert (early(settings, "epochs"), early(settings, "device"), early(settings, "seed")) == ("7", "cpu", None)
    assert early_number(settings, "epochs") == 7
    assert early_number(settings, "device") is None and early_number(settings, "lr") is None
    assert early_number(["epochs=²"], "epochs") is None


@pytest.mark.parametrize("text", ["1_000", " 7 ", "+7", "0", "3.0", "-1", "1e3", "x"])
def test_a_number_that_is_read_before_there_is_a_recipe_is_the_recipes(recipe: Recipe, text: str) -> None:
    settings = [f"data.split_seed={text}"]
    found = early_number(settings, "data.split_seed")
    try:
        assert override(recipe, settings).data.split_seed == found
    except UsageError:
        assert found is None


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("1", True), ("yes", True), ("no", False)])
def test_a_truth_value_can_be_read_before_there_is_a_recipe(recipe: Recipe, text: str, value: bool) -> None:
    settings = [f"data.skip_broken={text}"]
    assert early_flag(settings, "data.skip_broken") is override(recipe, settings).data.skip_broken is value
    assert not early_flag([], "data.skip_broken") and not early_flag(["data.skip_broken=maybe"], "data.skip_broken")


def test_values_are_written_as_settings_take_them(recipe: Recipe) -> None:
    for key, value in flat(recipe).items():
        if not key.startswith("model."):
            assert flat(override(recipe, [f"{key}={as_text(value)}"]))[key] == value
