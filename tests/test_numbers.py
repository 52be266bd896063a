"""Numbers that cannot lie: one network gives one answer wherever it is asked; the test images can change nothing."""

import ast
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CLASSES, colours
from resnetlab import evaluate, loader, models, sources, training
from resnetlab.augment import pipeline
from resnetlab.bundle import Bundle, Card
from resnetlab.config import DataConfig, ModelConfig, OptimConfig, Recipe
from resnetlab.loader import Prepared, TrainLoader, prepare
from resnetlab.metrics import EpochRecord, Predictions, score
from resnetlab.models import Member
from resnetlab.predict import logits, predict, predict_store
from resnetlab.preprocess import Preprocess
from resnetlab.runtime import Runtime, setup
from resnetlab.sources.dataset import Dataset, Split
from resnetlab.sources.decoded import KEEPING
from resnetlab.sources.images import ArrayImages, EncodedImages, decode

RECIPE = Recipe(
    name="test",
    model=ModelConfig(name="resnet20", num_classes=3, image_size=8),
    data=DataConfig(augment=("crop:1", "flip"), val=0.2),
    optim=OptimConfig(name="sgd", lr=0.05, momentum=0.9, average=0.5),
    epochs=2,
    batch_size=16,
    keep="best",
)


@pytest.fixture(scope="module")
def machine() -> Runtime:
    return setup("cpu", "fp32")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def trained(dataset: Dataset, machine: Runtime) -> tuple[training.Training, Prepared]:
    prepared = prepare(RECIPE.data, dataset)
    t = training.start(RECIPE, prepared, machine)
    for _ in training.run(t):
        pass
    return t, prepared


def bundle_of(t: training.Training, preprocess: Preprocess, path: Path = Path("x")) -> Bundle:
    card = Card(model=RECIPE.model, classes=t.loader.store.split.classes, preprocess=preprocess, recipe=RECIPE, epoch=1)
    return Bundle(model=t.result.eval(), card=card, path=path)


def agree(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> None:
    """Logits at most 1e-4 apart, and the same first class wherever the first two are further apart than that."""
    assert one.shape == two.shape
    assert np.abs(one - two).max() <= 1e-4
    best = np.sort(one, axis=1)
    clear = best[:, -1] - best[:, -2] > 2e-4
    assert (one.argmax(1) == two.argmax(1))[clear].all()


def test_training_evaluate_and_predict_agree_for_every_batch_size_and_thread_count(
    tiny: Dataset, machine: Runtime, threads: Callable[[int], None]
) -> None:
    t, prepared = trained(tiny, machine)
    assert prepared.val is not None
    first = predict_store(t.result, prepared.val, machine).logits  # what training scored its last epoch with
    held = bundle_of(t, prepared.preprocess)
    split = prepared.val.split
    pixels = [split.images[i] for i in range(len(split))]
    for count, sizes in ((1, (1, 7, 250)), (3, (2, 250))):
        threads(count)
        for size in sizes:
            agree(first, evaluate.predict_split(held, split, machine, batch_size=size).logits)
            agree(first, predict(held, pixels, ["x"] * len(pixels), machine, batch_size=size).logits)
    record = t.history[-1]
    scored = score(predict_store(t.result, prepared.val, machine))
    assert record.val_top1 == scored.top1
    assert record.val_loss == pytest.approx(scored.loss, rel=1e-6)


def test_a_run_a_reloaded_bundle_and_every_command_agree(
    photos: Callable[..., Path], command: Any, tmp_path: Path, machine: Runtime
) -> None:
    data, run = photos({"ant": 20, "bee": 20}), tmp_path / "run"
    settings = ("epochs=2", "batch_size=8", "data.size=16", "device=cpu", "precision=fp32")
    status, _, err = command("train", data, "--model", "resnet20", "--out", run, *settings)
    assert status == 0, err
    scores = json.loads((run / "scores.json").read_text())
    copied = tmp_path / "elsewhere.safetensors"
    copied.write_bytes((run / "model.safetensors").read_bytes())
    for where in (run, copied):
        status, out, err = command("evaluate", where, data, "--json")
        assert status == 0, err
        found = json.loads(out)
        assert found["top1"] == scores["test"]["top1"]
        assert found["loss"] == pytest.approx(scores["test"]["loss"], abs=1e-5)
    test = sources.load(str(data)).test
    assert test is not None
    status, out, err = command("predict", copied, *[test.images.name(i) for i in range(len(test))], "--json")
    assert status == 0, err
    told = json.loads(out)
    rows = told["predictions"] if isinstance(told, dict) else told
    right = sum(row["class"] == test.classes[label] for row, label in zip(rows, test.labels, strict=True))
    assert right / len(test) == scores["test"]["top1"]


def test_an_image_gets_the_same_answer_in_any_company(tiny: Dataset, machine: Runtime) -> None:
    """Batch norm uses its stored statistics: what else is in the batch, and the mode before, do not matter."""
    t, prepared = trained(tiny, machine)
    images = prepared.preprocess([tiny.train.images[i] for i in range(12)])
    t.model.train()
    alone = torch.cat([logits(t.model, [image[None]], machine) for image in images])
    together = logits(t.model, [images], machine)
    assert t.model.training, "the mode is as it was"
    agree(alone.numpy(), together.numpy())


# The test split can change nothing


def test_the_test_images_cannot_reach_training(tiny: Dataset, machine: Runtime) -> None:
    """Other test images, other labels, none at all: the same run to the last bit."""
    strange = colours(30, seed=99)
    others = [
        replace(tiny, test=replace(strange, labels=strange.labels[::-1].copy())),
        replace(tiny, test=None),
    ]
    base, _ = trained(tiny, machine)
    for dataset in others:
        t, prepared = trained(dataset, machine)
        assert t.history == base.history
        assert prepared.preprocess.mean == prepare(RECIPE.data, tiny).preprocess.mean
        for name, tensor in t.result.state_dict().items():
            assert torch.equal(tensor, base.result.state_dict()[name]), name


def test_no_module_of_training_names_the_test_split() -> None:
    """By construction: `training` takes its images from a record's ``train`` and ``val``, and never reads ``test``."""
    for module in ("training", "optim", "augment", "checkpoint"):
        tree = ast.parse(Path(evaluate.__file__).with_name(f"{module}.py").read_text())
        read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "test"]
        text = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == "test"]
        assert not [*read, *text], module
    assert {field for field in training.Training.__dataclass_fields__ if "test" in field} <= {"best_epoch"}


def test_splits_share_no_image(tiny: Dataset) -> None:
    """Copies of held-out images are taken out of training, and copies between given splits are said."""
    pixels = np.concatenate([tiny.train.images.read(i)[None] for i in range(60)])
    doubled = Split(
        images=ArrayImages(np.concatenate([pixels, pixels]), "x"),
        labels=np.tile(tiny.train.labels, 2),
        classes=tiny.train.classes,
    )
    prepared = prepare(RECIPE.data, replace(tiny, train=doubled, test=None))
    assert prepared.val is not None

    def contents(split: Split) -> set[bytes]:
        return {split.images[i].tobytes() for i in range(len(split))}

    assert not contents(prepared.train.split) & contents(prepared.val.split)
    assert len(prepared.train) + len(prepared.val) < 120
    assert any("copies of images held out" in note for note in prepared.notes)
    leaky = replace(tiny, val=tiny.train.select(range(5)), test=tiny.train.select(range(3, 9)))
    told = [note for note in prepare(RECIPE.data, leaky).notes if "byte for byte" in note]
    assert [note.split(" in ")[0] for note in told] == [
        "5 images of val are", "6 images of test are", "2 images of test are"
    ]  # fmt: skip


def test_a_few_test_images_are_found_among_many_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small images of a table are decoded at once, few are not: the splits of one table all are, or none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoded = []
    for pixels in colours(12, seed=1).images.pixels:  # type: ignore[attr-defined]
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        encoded.append(stream.getvalue())
    table = Split(images=EncodedImages(encoded, str), labels=colours(12, seed=1).labels, classes=CLASSES)
    leaky = Dataset(name="table", train=table, test=table.select(range(3)), origin="made by the tests")
    assert isinstance(prepare(DataConfig(val=0), leaky).train.split.images, EncodedImages)
    monkeypatch.setattr(loader, "FEWEST", 12)
    prepared = prepare(DataConfig(val=0), leaky)
    for thread in threading.enumerate():
        if thread.name == KEEPING:
            thread.join()
    assert isinstance(prepared.train.split.images, ArrayImages)
    assert any("3 images of test are in train too" in note for note in prepared.notes)


def test_a_folders_copies_are_kept_out_of_what_is_held_out(photos: Callable[..., Path], command: Any) -> None:
    root = photos({"ant": 30, "bee": 30})
    for i in range(15):
        (root / "ant" / f"copy{i}.png").write_bytes((root / "ant" / f"{i:03}.png").read_bytes())
    dataset = sources.load(str(root))
    assert dataset.test is not None
    stored = [{Path(s.images.name(i)).read_bytes() for i in range(len(s))} for s in (dataset.train, dataset.test)]
    assert not stored[0] & stored[1]
    assert len(dataset.train) + len(dataset.test) < 75
    (root / "train").mkdir()
    for name in ("ant", "bee"):
        (root / name).rename(root / "train" / name)
    (root / "test" / "ant").mkdir(parents=True)
    (root / "test" / "ant" / "x.png").write_bytes((root / "train" / "ant" / "003.png").read_bytes())
    status, out, _ = command("data", root, "--out", root.with_name("sheet.png"))
    assert status == 0
    assert "The same image in test and train" in " ".join(out.split())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.01, 0.1, 0.9])
def test_digits_held_out_share_nothing_with_training(seed: int, share: float) -> None:
    dataset = sources.load("digits", split_seed=seed)
    prepared = prepare(DataConfig(val=share, split_seed=seed), dataset)
    splits = [prepared.train.split, prepared.val.split if prepared.val else None, prepared.test]
    held = [{s.images[i].tobytes() for i in range(len(s))} for s in splits if s is not None]
    assert len(held) == 3
    assert sum(map(len, held)) == len(set().union(*held)) == 1797


# Where a silent mistake would hide


def test_of_equal_accuracy_the_smaller_loss_is_the_better_epoch(tiny: Dataset, machine: Runtime) -> None:
    t = training.start(RECIPE, prepare(RECIPE.data, tiny), machine)

    def record(epoch: int, top1: float, loss: float) -> EpochRecord:
        return EpochRecord(
            epoch=epoch, step=1, lr=1, train_loss=1, train_top1=1, val_top1=top1, val_loss=loss, val_top5=1
        )

    t.history, t.best_epoch = [record(1, 0.5, 1.0)], 1
    assert training._better(t, record(2, 0.5, 0.9))
    assert not training._better(t, record(2, 0.5, 1.1))
    assert not training._better(t, record(2, 0.4, 0.1))
    assert training._better(t, record(2, 0.6, 9.0))


def test_the_best_epochs_weights_are_in_the_checkpoint(tiny: Dataset, machine: Runtime) -> None:
    t, prepared = trained(tiny, machine)
    again = training.start(RECIPE, prepared, machine)
    training.restore(again, training.checkpoint(t))
    assert t.best_weights
    assert again.best_weights.keys() == t.best_weights.keys()
    assert all(torch.equal(tensor, again.best_weights[name]) for name, tensor in t.best_weights.items())


def test_every_image_keeps_its_label_and_meets_new_chance_each_epoch(tiny: Dataset, machine: Runtime) -> None:
    store = prepare(DataConfig(val=0), tiny).train
    plain = TrainLoader(store=store, pipeline=pipeline(()), batch_size=16, drop_last=False, seed=1, runtime=machine)
    known = {store.preprocess([tiny.train.images[i]]).numpy().tobytes(): int(tiny.train.labels[i]) for i in range(60)}
    for batch in plain.epoch(1):
        for image, label in zip(batch.images, batch.labels, strict=True):
            assert known[image.contiguous().numpy().tobytes()] == int(label)
    mirrored = replace(plain, pipeline=pipeline(("flip",)))
    seen = []
    for epoch in (1, 2):
        batches = list(mirrored.epoch(epoch))
        order = torch.cat([batch.indices for batch in batches if batch.indices is not None]).argsort()
        seen.append(torch.cat([batch.images for batch in batches])[order])
    changed = (seen[0] != seen[1]).flatten(1).any(1).sum()
    assert 15 <= changed <= 45, "about half of the images are turned the other way in another epoch"


def test_members_count_by_their_weights() -> None:
    """Of two networks with the weights 0.8 and 0.2, the probabilities are averaged so."""
    torch.manual_seed(0)
    config = ModelConfig(name="linear", num_classes=3, in_channels=1, image_size=4)
    about = [Member(model=config, mean=(0.5,), std=(0.5,), weight=w) for w in (0.8, 0.2)]
    whole = models.build_ensemble(about, "probabilities", mean=(0.5,), std=(0.5,)).eval()
    images = torch.randn(6, 1, 4, 4)
    first, second = (network(images).softmax(1) for network in whole.members)
    torch.testing.assert_close(whole(images).softmax(1), 0.8 * first + 0.2 * second)


def test_labels_are_matched_by_name_never_by_position(tiny: Dataset) -> None:
    assert tiny.test is not None
    turned = replace(tiny.test, classes=tiny.test.classes[::-1], labels=2 - tiny.test.labels)
    back = evaluate.relabel(turned, tiny.test.classes)
    assert np.array_equal(back.labels, tiny.test.labels)
    assert back.classes == tiny.test.classes


def test_what_is_scored_is_what_was_predicted(tiny: Dataset, machine: Runtime) -> None:
    """The rows of a prediction are the images in their order: names, labels and logits belong together."""
    t, prepared = trained(tiny, machine)
    assert prepared.val is not None
    whole: Predictions = predict_store(t.result, prepared.val, machine, batch_size=5)
    split = prepared.val.split
    for i in (0, 3, len(split) - 1):
        one = predict(bundle_of(t, prepared.preprocess), [split.images[i]], ["x"], machine)
        agree(one.logits, whole.logits[i : i + 1])
        assert whole.names[i] == split.images.name(i)
    assert whole.labels is not None
    assert np.array_equal(whole.labels, split.labels)


def test_a_picture_is_the_same_from_a_file_and_from_bytes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, "PNG")
    (tmp_path / "x").write_bytes(buffer.getvalue())
    assert np.array_equal(decode(tmp_path / "x", channels=3), decode(buffer.getvalue(), channels=3))
