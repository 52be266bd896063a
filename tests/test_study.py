"""From a finished run to its page: everything is looked at once, and what cannot be had is said."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnetlab import api, models, sources, study
from resnetlab.bundle import Card
from resnetlab.cli import main
from resnetlab.config import ModelConfig, Recipe, early_number, flat, override
from resnetlab.console import Quiet
from resnetlab.preprocess import Preprocess
from resnetlab.recipes import RECIPES, Facts, recipe
from resnetlab.report.records import ReportData
from resnetlab.sources.dataset import Dataset, Split
from resnetlab.sources.images import ArrayImages
from resnetlab.study import copies, labels, network, origin, pictures
from test_report_html import Checked

CLASSES = ("left", "right")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs with a train and a test folder; one test image is a training image, one nearly so."""
    root = tmp_path_factory.mktemp("data") / "sides"
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 12)):
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.kron(generator.integers(0, 130, (6, 6, 3)), np.ones((4, 4, 1))).astype(np.uint8)
                pixels[:, 12 * c : 12 * c + 12] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.png")
    first = root / "train" / "left" / "03.png"
    shutil.copy(first, root / "test" / "left" / "copied.png")
    pixels = np.asarray(Image.open(root / "train" / "right" / "07.png")).astype(int)
    noisy = np.clip(pixels + generator.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(root / "test" / "left" / "noisy.png")  # with the wrong label, too
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    """A finished run on them."""
    path = tmp_path_factory.mktemp("runs") / "sides"
    settings = ["epochs=3", "batch_size=16", "optim.lr=0.03", "optim.schedule=constant"]
    return api.train(folder, model="resnet20", out=path, settings=settings, seed=7, display=Quiet())


@pytest.fixture(scope="module")
def studied(run: api.Run) -> ReportData:
    return study.collect(run.bundle, run.runtime, Quiet())


def test_the_command_writes_the_page_and_the_table(run: api.Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["report", str(run.path)])
    out, err = capsys.readouterr()
    assert (done.value.code, err) == (0, "")
    assert "report.html" in out
    text = Checked((run.path / "report.html").read_text()).text
    recorded = json.loads((run.path / "scores.json").read_text())["test"]
    assert f"{100 * recorded['top1']:.1f}" in text
    rows = (run.path / "errors.csv").read_text().splitlines()
    assert len(rows) - 1 == recorded["n"] - round(recorded["top1"] * recorded["n"])


def test_a_page_can_be_written_elsewhere(run: api.Run, tmp_path: Path) -> None:
    assert run.report(tmp_path / "page.html") == tmp_path / "page.html"
    assert {p.name for p in tmp_path.iterdir()} == {"page.html", "page-errors.csv"}


def test_the_score_is_the_recorded_one_and_the_model_stays_as_it_was(run: api.Run, studied: ReportData) -> None:
    assert studied.run.score is not None and studied.run.score.top1 == run.evaluate().top1
    assert studied.notes == ()
    assert not run.bundle.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.bundle.model.modules())


def test_the_parts_add_up_to_the_network(run: api.Run, studied: ReportData) -> None:
    cost = models.cost(run.bundle.card.model, run.bundle.card.preprocess.size)
    assert sum(s.parameters for s in studied.stages) == cost.parameters == studied.origin.parameters
    assert sum(s.macs for s in studied.stages) == cost.macs == studied.origin.macs
    assert sum(s.share for s in studied.stages) == pytest.approx(1)
    shapes = {s.name: s.shape for s in studied.stages}
    assert shapes["layer1"] == (16, 24, 24) and shapes["layer3"] == (64, 6, 6) and shapes["fc"] == (2,)
    assert network.stages(run.bundle, run.runtime)[0].name == "conv1"


@pytest.mark.parametrize("name", ["mirror-small", "fast-small", "preresnet20", "resnet18", "linear"])
def test_the_parts_of_any_network_add_up_to_it(run: api.Run, name: str) -> None:
    config = models.resolve(ModelConfig(name=name, num_classes=2, image_size=24))
    made = replace(run.bundle, model=models.build(config), card=run.bundle.card.model_copy(update={"model": config}))
    found, cost = network.stages(made, run.runtime), models.cost(config, 24)
    assert sum(s.parameters for s in found) == cost.parameters
    assert sum(s.macs for s in found) == cost.macs


def test_copies_between_training_and_test_are_found(studied: ReportData) -> None:
    found = studied.copies
    assert found is not None
    assert (found.exact, found.similar) == (1, 1)
    exact, similar = found.shown
    assert exact.exact and exact.first.endswith("03.png") and exact.second.endswith("copied.png")
    assert not similar.exact and similar.first.endswith("07.png") and similar.second.endswith("noisy.png")
    assert (similar.first_class, similar.second_class) == ("right", "left")
    assert found.left_out == 0


def test_a_twin_is_found_among_images_of_one_outline() -> None:
    """Digits on black have like hashes by the million: none may crowd out the others."""
    generator = np.random.default_rng(0)
    pixels = np.zeros((2_000, 28, 28, 1), np.uint8)
    pixels[:, 10:18, 10:18, 0] = generator.integers(0, 256, (2_000, 8, 8))
    other = np.zeros((300, 28, 28, 1), np.uint8)
    other[:, 10:18, 10:18, 0] = generator.integers(0, 256, (300, 8, 8))
    other[5] = pixels[-1]
    other[5, 14, 14] ^= 8
    splits = {
        name: Split(images=ArrayImages(p, name), labels=np.zeros(len(p), np.int64), classes=("one",))
        for name, p in (("train", pixels), ("test", other))
    }
    found = copies.search(splits, Quiet())
    assert found is not None and found.exact == 0
    twin = found.shown[0]
    assert (twin.first, twin.second) == (f"train: {splits['train'].images.name(1_999)}", "test: test image 5")


def test_counts_and_thumbnails(studied: ReportData) -> None:
    assert {s: sum(n) for s, n in studied.balance.items()} == {"train": 54, "val": 6, "test": 26}
    assert studied.predictions is not None
    assert all(p.width == 24 for p in studied.pictures.values())
    assert len(studied.sheet) == 54 or len(studied.sheet) <= pictures.SHEET
    large = pictures.thumbnail(np.zeros((300, 200, 3), np.uint8))
    assert (large.width, large.height) == (64, 96)
    assert pictures.thumbnail(np.zeros((9, 9, 1), np.uint8)).data[8:12] == b"WEBP"


def test_the_command_that_does_it_again_gives_the_same_recipe(run: api.Run, studied: ReportData, folder: Path) -> None:
    words = origin.rebuilt(run.bundle.card, sources.load(str(folder)))
    assert studied.origin.command.split() == words
    assert words[:3] == ["resnetlab", "train", str(folder)]
    facts = Facts(images=60, size=24, mirrors=True, model="resnet20")
    settings = [word for word in words if "=" in word]
    assert settings == ["optim.lr=0.03", "optim.schedule=constant", "epochs=3"]  # 16 images is the recipe's own
    again = override(recipe("default", facts), [*settings, f"seed={words[-1]}"])
    made, kept = again.model_dump(exclude={"model"}), run.bundle.card.recipe.model_dump(exclude={"model"})
    assert made == kept


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("asked", [["epochs=16"], ["epochs=4", "data.size=64"], ["batch_size=1024", "optim.lr=0.2"]])
@pytest.mark.parametrize("name", RECIPES)
def test_that_command_gives_the_same_recipe_of_every_kind_wherever_it_runs(
    name: str, asked: list[str], gpu: bool
) -> None:
    pixels = np.zeros((20_000, 8, 8, 3), np.uint8)
    labels = np.arange(20_000) % 2
    dataset = Dataset(name="x", train=Split(images=ArrayImages(pixels, "x"), labels=labels, classes=CLASSES), origin="")

    def made(settings: list[str], gpu: bool) -> Recipe:
        known = {"epochs": early_number(settings, "epochs"), "read_at": early_number(settings, "data.size")}
        facts = Facts(images=20_000, size=8, mirrors=dataset.mirrors, model="resnet20", gpu=gpu, **known)
        chosen = override(recipe(name, facts), settings)
        return chosen.model_copy(update={"model": models.resolve(chosen.model)})

    run = made(asked, gpu)
    card = Card(
        model=run.model,
        classes=CLASSES,
        preprocess=Preprocess(size=8, resize=8, mean=(0.5,) * 3, std=(0.5,) * 3),
        recipe=run,
    )
    words = origin.rebuilt(card, dataset)
    for elsewhere in (False, True):
        again = made([word for word in words if "=" in word], elsewhere)
        assert flat(again) == flat(run)


def test_the_typed_command_is_kept_but_for_the_place_of_the_run() -> None:
    typed = {"command": ["resnetlab", "train", "my photos", "--out", "runs/a", "--model", "resnet18", "--out=b"]}
    assert origin._recorded(typed) == "resnetlab train 'my photos' --model resnet18"
    assert origin._recorded({"command": ["resnetlab", "train", "--resume", "runs/a"]}) == ""
    assert origin._recorded({"command": []}) == ""


def test_without_its_data_a_run_still_has_a_page(run: api.Run, folder: Path, tmp_path: Path) -> None:
    moved = folder.with_name("moved")
    folder.rename(moved)
    try:
        found = study.collect(run.bundle, run.runtime, Quiet())
        assert found.predictions is None and found.run.score is not None and found.run.epochs
        assert "could not be read" in found.notes[0]
        Checked(run.report(tmp_path / "page.html").read_text())
        assert study.collect(run.bundle, run.runtime, Quiet(), data=str(moved)).predictions is not None
    finally:
        moved.rename(folder)


def test_a_bundle_alone_has_a_page(run: api.Run, tmp_path: Path) -> None:
    shutil.copy(run.path / "model.safetensors", tmp_path / "net.safetensors")
    path = api.load(tmp_path / "net.safetensors").report()
    text = Checked(path.read_text()).text
    assert path == tmp_path / "report.html" and "No epoch was recorded" in text and "They call" in text


def test_data_that_changed_since_is_said(run: api.Run, folder: Path) -> None:
    first = folder / "test" / "right" / "00.png"
    extra = first.with_name("extra.png")
    shutil.copy(first, extra)
    try:
        found = study.collect(run.bundle, run.runtime, Quiet())
    finally:
        extra.unlink()
    assert "has changed since the run, but the images of its splits are all there" in found.notes[0]
    assert len(found.notes) == 1 and found.predictions is not None and len(found.predictions.names) == 26
    content = first.read_bytes()
    first.unlink()
    try:
        gone, careful = study.collect(run.bundle, run.runtime, Quiet()).notes
    finally:
        first.write_bytes(content)
    assert "images of its splits are gone" in gone
    assert "Careful" in careful and "of 26 test images" in careful and "of 25" in careful


def test_the_page_is_of_the_test_images_that_the_run_was_scored_on(folder: Path, tmp_path: Path) -> None:
    settings = ["data.limit_test=10", "epochs=1", "data.size=16"]
    run = api.train(folder, model="linear", settings=settings, out=tmp_path / "run", display=Quiet())
    found = study.collect(run.bundle, run.runtime, Quiet())
    assert found.notes == () and found.predictions is not None and len(found.predictions.names) == 10


def test_labels_are_suspected_or_the_extra_is_named(studied: ReportData, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    assert labels.suspects(studied.predictions) == ((), labels.HINT)


def test_a_planted_label_error_is_suspected(studied: ReportData, photos: Callable[..., Path]) -> None:
    pytest.importorskip("cleanlab")
    generator = np.random.default_rng(0)
    truth = np.arange(90) % 3
    logits = generator.normal(0, 0.5, (90, 3)).astype(np.float32)
    logits[np.arange(90), truth] += 5
    given = truth.copy()
    given[[4, 50]] = (given[[4, 50]] + 1) % 3
    from resnetlab.metrics import Predictions

    p = Predictions(logits=logits, classes=("a", "b", "c"), names=tuple(map(str, range(90))), labels=given)
    found, note = labels.suspects(p)
    assert {s.index for s in found} == {4, 50} and "2 of 90" in note
    assert all(s.suggested == truth[s.index] for s in found)


def test_an_ensemble_says_what_it_was_joined_of(run: api.Run, tmp_path: Path) -> None:
    joined = api.combine([run.path, run.path], tmp_path / "both", display=Quiet())
    text = Checked(joined.report().read_text()).text
    assert "2 networks, the first a resnet20, joined as an ensemble (probabilities)" in text
    assert f"resnetlab ensemble {run.path} {run.path} --combine probabilities" in text
    assert "members.1" in text and "was trained on" not in text


def test_the_sheet_leaves_out_a_class_that_the_network_does_not_know() -> None:
    pixels, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    train = Split(images=ArrayImages(pixels, "x"), labels=labels, classes=("left", "up", "right"))
    assert [place for place, _ in pictures.sheet(train, CLASSES)] == [0, 0, 1, 1]


def test_explanations_are_there_though_an_image_could_not_be_read(run: api.Run, folder: Path) -> None:
    found = study.read(run.bundle)
    predictions = study.predict(run.bundle, found, run.runtime, Quiet())["test"]
    assert predictions.labels is not None
    fewer = replace(
        predictions, logits=predictions.logits[1:], names=predictions.names[1:], labels=predictions.labels[1:]
    )
    shown, note = pictures.explain(run.bundle, found.splits["test"], fewer, run.runtime)
    assert shown or "pip install" in note


def test_a_network_without_feature_maps_is_explained_by_pixels(folder: Path, tmp_path: Path) -> None:
    run = api.train(folder, model="linear", out=tmp_path / "run", settings=["epochs=1"], display=Quiet())
    found = study.read(run.bundle)
    predictions = study.predict(run.bundle, found, run.runtime, Quiet())["test"]
    shown, note = pictures.explain(run.bundle, found.splits["test"], predictions, run.runtime)
    assert {one.method for one in shown} == {"integrated-gradients"} or "pip install" in note
