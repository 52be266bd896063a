"""Ensembles: the means they claim to be, runs like any other, and what does not go together."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import resnetlab as rl
from resnetlab import bundle, ensemble, models, predict, rundir, runtime
from resnetlab.bundle import Bundle, Card
from resnetlab.config import ModelConfig, Recipe
from resnetlab.console import Quiet
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.metrics import Predictions
from resnetlab.preprocess import Preprocess

CLASSES = ("a", "b", "c")


def network(
    seed: int,
    name: str = "resnet20",
    *,
    classes: tuple[str, ...] = CLASSES,
    mean: float = 0.5,
    std: float = 0.25,
    **fields: Any,
) -> Bundle:
    """Return a random network with its meaning; its logits differ enough from the others' to tell means apart."""
    p = Preprocess(**{"size": 8, "resize": 8, "mean": (mean,) * 3, "std": (std,) * 3, **fields})
    config = models.resolve(ModelConfig(name=name, num_classes=len(classes), image_size=p.size, in_channels=p.channels))
    torch.manual_seed(seed)
    model = models.build(config).eval()
    with torch.no_grad():
        model.get_submodule("fc").weight.mul_(4)  # type: ignore[operator]
    card = Card(model=config, classes=classes, preprocess=p, recipe=Recipe(name="test", model=config, epochs=1))
    return Bundle(model=model, card=card, path=Path(f"run-{seed}/model.safetensors"))


def no_data() -> Any:
    raise AssertionError("this rule needs no data")


NOTHING = ensemble.Material(val=no_data, batches=no_data)


def images(n: int, seed: int = 0, side: int = 8) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def answers(held: Bundle, shown: Sequence[Any]) -> Predictions:
    return predict.predict(held, shown, [str(i) for i in range(len(shown))], runtime.setup("cpu", "fp32"))


def saved(held: Bundle, path: Path) -> Bundle:
    path.mkdir()
    bundle.save(path, held.model.state_dict(), held.card)
    return bundle.load(path)


@pytest.fixture
def four() -> list[Bundle]:
    """Networks of three architectures, two normalisations and two orders of the classes."""
    return [
        network(1),
        network(2, "resnet18"),
        network(3, mean=0.3, std=0.2),
        network(4, "plain20", classes=("c", "a", "b")),
    ]


def test_every_rule_is_tested_here() -> None:
    assert list(ensemble.RULES) == ["probabilities", "logits", "weighted", "soup"]


@pytest.mark.parametrize("how", ["probabilities", "logits"])
def test_the_mean_is_that_of_the_members_answers(how: str, four: list[Bundle], tmp_path: Path) -> None:
    shown = images(6)
    alone = [answers(one, shown) for one in four]
    order = [[p.classes.index(name) for name in CLASSES] for p in alone]
    made = ensemble.combine(four, how, NOTHING)
    found = answers(saved(made, tmp_path / "run"), shown)
    assert found.classes == CLASSES
    if how == "logits":
        expected = np.mean([p.logits[:, o] for p, o in zip(alone, order, strict=True)], axis=0)
        np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    else:
        expected = np.mean([p.probabilities()[:, o] for p, o in zip(alone, order, strict=True)], axis=0)
        np.testing.assert_allclose(found.probabilities(), expected, atol=1e-5)
    assert np.abs(expected - expected.mean(0)).max() > 1e-3  # the images differ


def test_a_bundle_of_members_is_itself_bit_for_bit(four: list[Bundle], tmp_path: Path) -> None:
    made = ensemble.combine(four, "probabilities", NOTHING)
    again = saved(made, tmp_path / "run")
    assert isinstance(again.model, models.Ensemble) and not again.model.training
    assert again.card.members == made.card.members and again.card.combine == "probabilities"
    assert [m.source for m in again.card.members] == [str(one.path) for one in four]
    assert np.array_equal(answers(again, images(3)).logits, answers(made, images(3)).logits)
    assert all(name.startswith("members.") for name in again.model.state_dict())


def test_extreme_logits_stay_finite() -> None:
    made = ensemble.combine([network(1), network(2)], "probabilities", NOTHING)
    with torch.no_grad():
        for module in made.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(1e4)
        logits: Tensor = made.model(torch.randn(4, 3, 8, 8))
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(1).sum(1), torch.ones(4))


def test_fitted_weights_are_the_best_on_the_simplex() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    good, other = generator.dirichlet([1, 1, 1], (2, 300))
    good[np.arange(300), labels] += 1
    other[np.arange(300), labels] += 0.7
    useless = generator.dirichlet([0.3] * 3, 300)
    members = np.stack([p / p.sum(1, keepdims=True) for p in (good, useless, other)])

    def loss(weights: Sequence[float]) -> float:
        return float(-np.log(np.einsum("m,mn->n", weights, members[:, np.arange(300), labels])).mean())

    found = ensemble.fit_weights(members, labels)
    assert sum(found) == pytest.approx(1) and min(found) >= 0
    assert found[1] < 0.01
    grid = [(a / 50, b / 50, 1 - (a + b) / 50) for a in range(51) for b in range(51 - a)]
    assert loss(found) <= min(loss(w) for w in grid) + 1e-7
    assert ensemble.fit_weights(members[:1], labels) == [1.0]


def test_weighted_takes_each_network_s_own_order_of_classes(four: list[Bundle]) -> None:
    labels = np.array([0, 1, 2, 0, 1])
    perfect = np.eye(3, dtype=np.float32)[labels] * 9
    wrong = np.roll(perfect, 1, axis=1)
    logits = [wrong, wrong, wrong, perfect[:, [2, 0, 1]]]  # the fourth knows the classes as c, a, b
    val = [
        Predictions(logits=x, classes=one.card.classes, names=tuple("abcde"), labels=labels)
        for x, one in zip(logits, four, strict=True)
    ]
    made = ensemble.combine(four, "weighted", ensemble.Material(val=lambda: val, batches=no_data))
    assert [round(m.weight, 3) for m in made.card.members] == [0, 0, 0, 1]


def test_a_soup_is_the_mean_of_weights_with_statistics_of_its_own(tmp_path: Path) -> None:
    two = [network(1), network(2)]
    batches = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    made = ensemble.combine(two, "soup", ensemble.Material(val=no_data, batches=lambda: batches))
    assert made.card.members == () and made.card.model == two[0].card.model
    states = [one.model.state_dict() for one in two]
    for name, tensor in made.model.state_dict().items():
        if not any(part in name for part in ("running", "tracked")):
            torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    seen = made.model.get_submodule("conv1")(torch.cat(batches))
    torch.testing.assert_close(made.model.state_dict()["bn1.running_mean"], seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not made.model.training
    assert isinstance(saved(made, tmp_path / "soup").model, models.Network)


def test_the_soup_of_a_network_with_itself_is_the_network() -> None:
    one = network(1)
    with torch.no_grad():
        batches = [torch.randn(64, 3, 8, 8)]
        torch.optim.swa_utils.update_bn(batches, one.model)
    made = ensemble.combine([one, one], "soup", ensemble.Material(val=no_data, batches=lambda: batches))
    np.testing.assert_allclose(answers(made, images(3)).logits, answers(one, images(3)).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("other", "how", "message"),
    [
        (network(2, size=10, resize=10), "probabilities", "size is 8 in run-1/.* and 10 in run-2"),
        (network(2, resize=9), "logits", "resize is 8"),
        (network(2, fit="pad"), "logits", "fit is crop"),
        (network(2, classes=("a", "b", "d")), "probabilities", "only one of them knows: c, d"),
        (network(2, "resnet18"), "soup", "name is resnet20 in run-1/.* and resnet18 in run-2"),
        (network(2, mean=0.4), "soup", "mean is"),
        (network(2, classes=("c", "a", "b")), "soup", "classes is a, b, c"),
    ],
)
def test_what_does_not_go_together_is_named(other: Bundle, how: str, message: str) -> None:
    with pytest.raises(ResNetLabError, match=message):
        ensemble.combine([network(1), other], how, NOTHING)


def test_too_few_ensembles_of_ensembles_and_unknown_rules_are_refused() -> None:
    one, two = network(1), network(2)
    with pytest.raises(UsageError, match="at least two"):
        ensemble.combine([one], "logits", NOTHING)
    with pytest.raises(UsageError, match='Did you mean "logits"'):
        ensemble.combine([one, two], "logit", NOTHING)
    made = ensemble.combine([one, two], "logits", NOTHING)
    with pytest.raises(ResNetLabError, match="an ensemble itself"):
        ensemble.combine([one, made], "logits", NOTHING)


def change(path: Path, card: Card) -> None:
    """Save the tensors of a bundle under another description, with checksums that fit."""
    held = bundle.load(path)
    bundle.save(path, held.model.state_dict(), card)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"model": {"name": "resnet1202"}}, "do not fit in a file"),
        ({"model": {"num_classes": 4}}, "4 classes"),
        ({"model": {"image_size": 16}}, "images of 16 px"),
        ({"model": {"name": "resnet9"}}, "cannot be built"),
        ({"weight": 0.9}, "do not add up to 1"),
        ({"weight": 0.1}, "do not add up to 1"),
    ],
)
def test_a_file_that_lies_about_its_members_is_refused(tmp_path: Path, update: dict[str, Any], message: str) -> None:
    made = ensemble.combine([network(1), network(2)], "probabilities", NOTHING)
    saved(made, tmp_path / "run")
    first = made.card.members[0]
    fields = {**update, **({"model": first.model.model_copy(update=update["model"])} if "model" in update else {})}
    change(
        tmp_path / "run",
        made.card.model_copy(update={"members": (first.model_copy(update=fields), *made.card.members[1:])}),
    )
    with pytest.raises(ResNetLabError, match=message):
        bundle.load(tmp_path / "run")


def test_a_member_with_an_impossible_order_is_refused() -> None:
    member = ensemble.combine([network(1), network(2)], "logits", NOTHING).card.members[0]
    with pytest.raises(ValueError, match="order must name each of 3 classes once"):
        models.Member(**{**member.model_dump(), "order": (0, 1, 1)})
    with pytest.raises(ValueError, match="one a channel"):
        models.Member(**{**member.model_dump(), "mean": (0.5,)})


@pytest.fixture(scope="module")
def digits_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three short runs of digits from different seeds."""
    root = tmp_path_factory.mktemp("runs")
    more: dict[str, Any] = {"epochs": 2, "batch_size": 64, "views": "flip"}
    return [rl.train("digits", out=root / f"{s}", seed=s, display=Quiet(), **more).path for s in range(3)]


@pytest.mark.parametrize("how", ensemble.RULES)
def test_the_result_is_a_run_like_any_other(command: Any, digits_runs: list[Path], tmp_path: Path, how: str) -> None:
    out = tmp_path / "joint"
    status, text, err = command("ensemble", *digits_runs, "--out", out, "--combine", how)
    assert (status, err) == (0, "")
    assert text.count("member  ") == 3 and "best member" in text
    there = {p.name for p in out.iterdir()}
    assert there == {
        *("model.safetensors", "model.json", "scores.json", "config.json", "splits.json", "log.txt", "confusion.png")
    }
    recorded = json.loads((out / "scores.json").read_text())["test"]
    found = json.loads(command("evaluate", out, "--json")[1])
    assert found["confusion"] == recorded["confusion"]
    assert found["loss"] == pytest.approx(recorded["loss"], abs=1e-6)
    mirrored = json.loads((out / "scores.json").read_text())["test-flip"]  # the views of the members' recipe
    assert json.loads(command("evaluate", out, "--views", "flip", "--json")[1])["confusion"] == mirrored["confusion"]
    data = rundir.read_run(out)
    assert data.score is not None and data.title == f"3 × resnet20 on digits, {how}" and data.epochs == ()
    config = json.loads((out / "config.json").read_text())
    assert sum(member["weight"] for member in config["members"]) == pytest.approx(1)
    assert json.loads((out / "model.json").read_text())["metrics"]["test"]["top1"] == recorded["top1"]
    status, _, err = command("train", "--resume", out)
    assert status == 1 and "combined from other runs" in err


def test_the_mean_beats_the_average_member(digits_runs: list[Path], tmp_path: Path) -> None:
    joint = rl.combine(digits_runs, tmp_path / "joint", display=Quiet()).evaluate()
    alone = [rl.load(run).evaluate() for run in digits_runs]
    assert joint.loss < np.mean([s.loss for s in alone])  # always, by convexity
    assert joint.top1 >= np.mean([s.top1 for s in alone])


def test_fitted_weights_are_no_worse_on_val_than_equal_ones(digits_runs: list[Path], tmp_path: Path) -> None:
    fitted = rl.combine(digits_runs, tmp_path / "fitted", how="weighted", display=Quiet())
    equal = rl.combine(digits_runs, tmp_path / "equal", display=Quiet())
    assert fitted.evaluate(split="val").loss <= equal.evaluate(split="val").loss + 1e-6


class Lines(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def line(self, text: str) -> None:
        self.kept.append(text)


def test_a_split_that_a_member_was_trained_on_is_not_scored(digits_runs: list[Path], tmp_path: Path) -> None:
    other = rl.train("digits", out=tmp_path / "other", epochs=1, settings=["data.split_seed=5"], display=Quiet())
    said = Lines()
    joint = rl.combine([digits_runs[0], other.path], tmp_path / "joint", display=said)
    assert json.loads((joint.path / "scores.json").read_text()) == {}
    notes = [line for line in said.kept if line.startswith("note: not scored on")]
    assert len(notes) == 2 and all("may have been trained on images of it" in line for line in notes)
    with pytest.raises(ResNetLabError, match="none in common"):
        rl.combine([digits_runs[0], other.path], tmp_path / "weighted", how="weighted", display=Quiet())
    assert not (tmp_path / "weighted").exists()


def test_of_data_that_grew_between_the_runs_no_training_image_is_scored(photos: Any, tmp_path: Path) -> None:
    """The later run divides the same place with the same seed in another way."""
    here = photos({"a": 20, "b": 20})
    more: dict[str, Any] = {"epochs": 1, "model": "linear", "display": Quiet()}
    before = rl.train(here, out=tmp_path / "before", **more).path
    photos({"a": 40, "b": 40})
    after = rl.train(here, out=tmp_path / "after", **more).path
    first, second = (json.loads((run / "splits.json").read_text()) for run in (before, after))
    seen = {name for name in ("val", "test") if set(first[name]) & set(second["train"])}
    said = Lines()
    joint = rl.combine([before, after], tmp_path / "joint", display=said)
    assert seen and set(json.loads((joint.path / "scores.json").read_text())) == {"val", "test"} - seen
    assert sum("may have been trained on images of it" in line for line in said.kept) == len(seen)


def test_images_that_lie_in_two_places_are_known_again(photos: Any, tmp_path: Path) -> None:
    """Of the same photographs elsewhere, under other names, another test split is held out."""
    here = photos({"a": 20, "b": 20}, root="here")
    for number, file in enumerate(sorted(here.rglob("*.*"))):
        place = tmp_path / "there" / file.parent.name / f"{(7 * number) % 40:03}{file.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    more: dict[str, Any] = {"epochs": 1, "model": "resnet20", "display": Quiet()}
    runs = [rl.train(data, out=tmp_path / f"of-{data.name}", **more).path for data in (here, tmp_path / "there")]
    said = Lines()
    joint = rl.combine(runs, tmp_path / "joint", display=said)
    assert json.loads((joint.path / "scores.json").read_text()) == {}
    assert sum("may have been trained on images of it" in line for line in said.kept) == 2


def test_members_are_named_beside_it_where_they_were_scored_on_the_same_images(
    digits_runs: list[Path], tmp_path: Path
) -> None:
    fewer = rl.train("digits", out=tmp_path / "x", epochs=1, settings=["data.limit_test=20"], display=Quiet())
    said = Lines()
    rl.combine([digits_runs[0], fewer.path], tmp_path / "joint", display=said)
    test = next(line for line in said.kept if line.startswith("test "))
    assert "best member" not in test


def test_of_data_that_has_moved_the_splits_are_found_again(photos: Any, tmp_path: Path) -> None:
    """As for one run; the networks were not trained on the same images here."""
    here = photos({"a": 20, "b": 20}, root="here")
    more: dict[str, Any] = {"epochs": 1, "model": "resnet20", "display": Quiet()}
    runs = [rl.train(here, out=tmp_path / f"{val}", val=val, **more).path for val in (0.1, 0.2)]
    joint = rl.combine(runs, tmp_path / "joint", display=Quiet())
    recorded = json.loads((joint.path / "scores.json").read_text())
    assert joint.evaluate().top1 == joint.evaluate(str(here)).top1 == recorded["test"]["top1"]
    here.rename(tmp_path / "gone")
    assert joint.evaluate(str(tmp_path / "gone")).n == recorded["test"]["n"] == 4


def test_a_double_within_the_data_leaves_the_ensemble_its_score(photos: Any, tmp_path: Path) -> None:
    root = photos({"train/a": 20, "train/b": 20, "test/a": 8, "test/b": 8}, root="doubled")
    shutil.copy(root / "train/a/000.png", root / "test/a/double.png")
    more: dict[str, Any] = {"epochs": 1, "model": "resnet20", "display": Quiet()}
    runs = [rl.train(root, out=tmp_path / f"{val}", val=val, **more).path for val in (0.1, 0.2)]
    joint = rl.combine(runs, tmp_path / "joint", display=Quiet())
    assert json.loads((joint.path / "scores.json").read_text())["test"]["n"] == 17


def test_mistakes_leave_nothing_behind(command: Any, digits_runs: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for words, status, text in [
        (["ensemble"], 2, "at least two"),
        (["ensemble", digits_runs[0]], 2, "at least two"),
        (["ensemble", *digits_runs, "--combine", "sou"], 2, 'Did you mean "soup"'),
        (["ensemble", digits_runs[0], "nowhere"], 1, "nowhere"),
        (["ensemble", *digits_runs, "--out", digits_runs[0]], 1, "never overwritten"),
    ]:
        found, out, err = command(*(str(word) for word in words))  # type: ignore[attr-defined]
        assert (found, out) == (status, ""), err
        assert text in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
