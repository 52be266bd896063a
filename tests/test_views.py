"""Test-time views against references that look at one image and one crop at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnetlab import evaluate, models, predict, runtime
from resnetlab.bundle import Bundle, Card
from resnetlab.config import DataConfig, ModelConfig, Recipe
from resnetlab.errors import UsageError
from resnetlab.loader import EvalLoader, read
from resnetlab.preprocess import Preprocess, to_tensor
from resnetlab.runtime import Runtime
from resnetlab.sources.dataset import Dataset, Split
from resnetlab.sources.images import ArrayImages
from resnetlab.views import MIRRORING, PHOTO_SCALES, VIEWS, note

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PREPROCESSES = {
    "small": Preprocess(size=16, resize=16, mean=MEAN, std=STD),
    "odd margin": Preprocess(size=16, resize=21, mean=MEAN, std=STD),
    "photo": Preprocess(size=70, resize=80, mean=MEAN, std=STD),
}


@pytest.fixture(scope="module")
def machine() -> Runtime:
    return runtime.setup("cpu", "fp32")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = models.build(ModelConfig(name="resnet20", num_classes=3, image_size=16)).train()
    with torch.no_grad():
        for _ in range(3):  # statistics that are not 0 and 1
            network(torch.randn(8, 3, 16, 16))
    return network.eval()


def pictures(n: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def reference(name: str, model: nn.Module, image: NDArray[np.uint8], p: Preprocess) -> NDArray[np.float64]:
    """Return the logits of one square image over the views of a name, written down as plainly as can be."""
    pixels = ((image / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)  # (R, R, C)

    def look(crop: NDArray[np.floating]) -> NDArray[np.float64]:
        with torch.no_grad():
            logits: Tensor = model(torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))[None])
        values: NDArray[np.float64] = logits[0].double().numpy()
        return values

    def cut(top: int, left: int, of: NDArray[np.floating]) -> NDArray[np.floating]:
        crop = of[top : top + p.size, left : left + p.size]
        assert crop.shape[:2] == (p.size, p.size)
        return crop

    def one(top: int, left: int, of: NDArray[np.floating]) -> NDArray[np.float64]:
        return look(cut(top, left, of))

    def both(top: int, left: int, of: NDArray[np.floating]) -> NDArray[np.float64]:
        crop = cut(top, left, of)
        mean: NDArray[np.float64] = (look(crop) + look(crop[:, ::-1])) / 2
        return mean

    def padded(margin: int) -> NDArray[np.floating]:
        return np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")

    start = (p.resize - p.size) // 2
    if name == "single":
        return look(pixels[start : start + p.size, start : start + p.size])
    if name == "flip":
        return both(start, start, pixels)
    if name == "10-crop":
        wide = padded(2) if p.resize == p.size else pixels
        end = len(wide) - p.size
        places = [(0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2)]
        return sum((both(top, left, wide) for top, left in places), np.zeros(3)) / len(places)
    if name in ("diagonal", "shift"):
        wide = (
            padded(1) if p.resize == p.size else pixels[start - 1 : start + p.size + 1, start - 1 : start + p.size + 1]
        )
        at = both if name == "shift" else one
        return at(1, 1, wide) / 2 + at(0, 0, wide) / 4 + at(2, 2, wide) / 4
    from torchvision.transforms.v2.functional import resize

    sides = [round(p.size * s) for s in ((7 / 8, 1.0, 9 / 8) if p.size <= 64 else PHOTO_SCALES)]
    scaled = [resize(to_tensor(image), [side, side], antialias=True).permute(1, 2, 0).numpy() for side in sides]
    crops = [((s / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32) for s in scaled]
    return sum((look(crop) for crop in crops), np.zeros(3)) / len(crops)


def test_every_view_is_tested_here() -> None:
    assert list(VIEWS) == ["single", "flip", "10-crop", "multi-scale", "diagonal", "shift"]


@pytest.mark.parametrize("kind", PREPROCESSES)
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_equals_looking_one_by_one(name: str, kind: str, model: nn.Module, machine: Runtime) -> None:
    p = PREPROCESSES[kind]
    images = pictures(3, p.resize)
    squares = torch.stack([to_tensor(image) for image in images])
    found = predict.view_logits(model, [squares[:2], squares[2:]], p, VIEWS[name], machine)
    expected = np.stack([reference(name, model, image, p) for image in images])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", PREPROCESSES)
@pytest.mark.parametrize("name", VIEWS)
def test_weights_add_up_and_shapes_are_the_network_s(name: str, kind: str) -> None:
    p = PREPROCESSES[kind]
    squares = torch.from_numpy(pictures(2, p.resize)).permute(0, 3, 1, 2)
    looks = VIEWS[name](squares, p)
    assert sum(weight for _, weight in looks) == pytest.approx(1)
    assert all(images.dtype == torch.float32 and images.shape[:2] == (2, 3) for images, _ in looks)
    if name != "multi-scale":
        assert all(images.shape[2:] == (p.size, p.size) for images, _ in looks)
    assert len(looks) == {"single": 1, "flip": 2, "10-crop": 10, "diagonal": 3, "shift": 6}.get(name, len(looks))


def test_multi_scale_has_the_paper_s_sizes_at_224_px() -> None:
    p = Preprocess(size=224, resize=256, mean=MEAN, std=STD)
    looks = VIEWS["multi-scale"](torch.zeros(1, 3, 256, 256, dtype=torch.uint8), p)
    assert [images.shape[-1] for images, _ in looks] == [224, 256, 384, 480, 640]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tiny_images_have_views_too(size: int) -> None:
    p = Preprocess(size=size, resize=size, mean=MEAN, std=STD)
    squares = torch.from_numpy(pictures(1, size)).permute(0, 3, 1, 2)
    for view in VIEWS.values():
        assert all(images.isfinite().all() for images, _ in view(squares, p))


def test_single_is_bit_for_bit_one_look(model: nn.Module, machine: Runtime, tiny: Dataset) -> None:
    p = Preprocess(size=8, resize=8, mean=MEAN, std=STD)
    assert tiny.test is not None
    store = read(tiny.test, p, DataConfig(), "images")[0]
    plain = predict.logits(model, EvalLoader(store=store, batch_size=7, runtime=machine), machine)
    assert np.array_equal(predict.predict_store(model, store, machine, batch_size=7).logits, plain.numpy())
    images = [tiny.test.images[i] for i in range(5)]
    held = hold(model, p)
    batch = p(images).contiguous(memory_format=torch.channels_last)
    alone = predict.logits(machine.place(model), [batch], machine)  # as `predict` places it
    assert np.array_equal(predict.predict(held, images, list("abcde"), machine).logits, alone.numpy())


def hold(model: nn.Module, p: Preprocess, name: str = "resnet20") -> Bundle:
    config = ModelConfig(name=name, num_classes=3, image_size=p.size)
    recipe = Recipe(name="test", model=config, epochs=1)
    card = Card(model=config, classes=("blue", "green", "red"), preprocess=p, recipe=recipe)
    return Bundle(model=model, card=card, path=Path("held"))


@pytest.mark.parametrize("name", VIEWS)
def test_predict_and_evaluate_agree_whatever_the_batch(name: str, model: nn.Module, machine: Runtime) -> None:
    p = PREPROCESSES["odd margin"]
    pixels = pictures(5, 30)
    split = Split(images=ArrayImages(pixels, "x"), labels=np.zeros(5, dtype=np.int64), classes=("blue", "green", "red"))
    held = hold(model, p)
    scored = evaluate.predict_split(held, split, machine, batch_size=2, views=name).logits
    predicted = predict.predict(held, list(pixels), list("abcde"), machine, batch_size=3, views=name).logits
    np.testing.assert_allclose(scored, predicted, atol=1e-5 * max(1, np.abs(scored).max()))


def test_a_mirrored_image_gets_the_same_answer_over_mirrored_views(model: nn.Module, machine: Runtime) -> None:
    p = PREPROCESSES["small"]
    pixels = pictures(2, 16)
    held = hold(model, p)
    for name in VIEWS:
        one, other = (
            predict.predict(held, list(x), list("ab"), machine, views=name).logits for x in (pixels, pixels[:, :, ::-1])
        )
        same = np.allclose(one, other, atol=1e-4)
        assert same == (name in ("flip", "10-crop")), name  # shift goes along one diagonal only


def test_wrong_views_are_refused_before_anything_is_read(machine: Runtime, model: nn.Module, tiny: Dataset) -> None:
    p = Preprocess(size=8, resize=8, mean=MEAN, std=STD)
    with pytest.raises(UsageError, match='Did you mean "flip"'):
        evaluate.predict_split(hold(model, p), tiny.train, machine, views="flop")
    linear = models.build(ModelConfig(name="linear", num_classes=3, image_size=8)).eval()
    with pytest.raises(UsageError, match="one size"):
        evaluate.predict_split(hold(linear, p, "linear"), tiny.train, machine, views="multi-scale")
    assert evaluate.predict_split(hold(linear, p, "linear"), tiny.train, machine, views="10-crop").logits.shape == (
        60,
        3,
    )


def test_mirror_images_are_noted_where_training_had_none() -> None:
    assert {name for name in VIEWS if note(name, ("crop:4",))} == set(MIRRORING)
    assert all(note(name, ("crop:4", step)) is None for name in VIEWS for step in ("flip:0.5", "alternate"))


def test_the_commands_take_views(command: Any, photos: Callable[..., Path], tmp_path: Path) -> None:
    root = photos({"a": 10, "bb": 10})
    run = tmp_path / "run"
    assert command("train", root, "--out", run, "--model", "resnet20", "epochs=1", "batch_size=8")[0] == 0
    single = json.loads(command("evaluate", run, "--json")[1])
    named = json.loads(command("evaluate", run, "--json", "--views", "single")[1])
    flipped = json.loads(command("evaluate", run, "--json", "--views", "flip")[1])
    assert single == named
    assert flipped["loss"] != single["loss"]
    status, out, err = command("evaluate", run, "--views", "flip")
    assert status == 0 and "top-1" in out and "note:" not in out + err  # it was trained with mirror images
    status, out, err = command("predict", run, root / "a" / "000.png", "--json", "--views", "shift")
    assert (status, err) == (0, "") and json.loads(out)[0]["probability"] > 0
    status, _, err = command("evaluate", run, "--views", "flop")
    assert status == 2 and 'Did you mean "flip"' in err
