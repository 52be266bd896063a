"""Explanations: they point at what decides, change with the weights, and leave the network as it was."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab import explain, models, runtime
from resnetlab.bundle import Bundle, Card
from resnetlab.config import ModelConfig, Recipe
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.metrics import Heatmap
from resnetlab.models import Ensemble, Member
from resnetlab.preprocess import Preprocess
from resnetlab.report import heatmap as drawn

SIZE, PATCH = 24, 6
CLASSES = ("red", "green", "blue", "nothing")
PREPROCESS = Preprocess(size=SIZE, resize=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
CAMS = ("grad-cam", "score-cam", "eigen-cam")


def planted(n: int, kinds: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[tuple[int, int]]]:
    """Return noise with a coloured patch in a random corner, which alone decides the class; kind 3 has none."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % kinds
    pixels = generator.integers(60, 200, (n, SIZE, SIZE, 3), dtype=np.uint8)
    corners = []
    for image, label in zip(pixels, labels, strict=True):
        top, left = (int(v) * (SIZE - PATCH) for v in generator.integers(0, 2, 2))
        corners.append((top, left))
        if label < 3:
            image[top : top + PATCH, left : left + PATCH] = 20
            image[top : top + PATCH, left : left + PATCH, label] = 235
    return pixels, labels, corners


def as_batch(pixels: NDArray[np.uint8]) -> Tensor:
    return PREPROCESS.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A network that has learned the patches."""
    torch.manual_seed(0)
    model = models.build(ModelConfig(name="resnet20", num_classes=4, image_size=SIZE)).train()
    pixels, labels, _ = planted(384, 4, seed=0)
    images, targets = as_batch(pixels), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(5):
        for rows in torch.split(torch.randperm(len(images)), 32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def held(network: nn.Module) -> Bundle:
    """The same network with its meaning."""
    config = ModelConfig(name="resnet20", num_classes=4, image_size=SIZE)
    recipe = Recipe(name="test", model=config, epochs=1)
    card = Card(
        model=config,
        classes=CLASSES,
        preprocess=PREPROCESS,
        recipe=recipe,
    )
    return Bundle(model=network, card=card, path=Path("held"))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Take down everything of a network that an explanation could disturb."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": [m.training for m in model.modules()],
        "inplace": [getattr(m, "inplace", None) for m in model.modules()],
        "hooks": [{k: list(v) for k, v in vars(m).items() if k.endswith("_hooks")} for m in model.modules()],
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "needs": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            n: None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for n, p in model.named_parameters()
        },
    }


def in_use() -> nn.Module:
    """Return a network in the middle of something: some of it in training mode, with gradients, frozen, hooked."""
    torch.manual_seed(1)
    model = models.build(ModelConfig(name="resnet20", num_classes=4, image_size=SIZE)).train()
    model.get_submodule("layer2").eval()
    model.get_submodule("conv1").requires_grad_(False)
    for parameter in list(model.parameters())[5:9]:
        parameter.grad = torch.ones_like(parameter)
    model.get_submodule("layer3").register_forward_hook(lambda *_: pytest.fail("the caller's hook was called"))
    return model


def test_every_method_is_tested_here() -> None:
    assert list(explain.METHODS) == ["grad-cam", "score-cam", "eigen-cam", "occlusion", "integrated-gradients"]


@pytest.mark.parametrize("method", explain.METHODS)
def test_the_network_comes_back_exactly_as_it_was(method: str) -> None:
    model = in_use()
    before = snapshot(model)
    images = as_batch(planted(2, 3, seed=3)[0])
    kept = images.clone()
    explain.METHODS[method](model, images, torch.tensor([0, 1]), None)
    assert snapshot(model) == before
    assert torch.equal(images, kept) and not images.requires_grad and images.grad is None
    with pytest.raises(RuntimeError):
        explain.METHODS[method](model, images[:, :1], torch.tensor([0, 1]), None)  # one channel of three
    assert snapshot(model) == before


@pytest.mark.parametrize("method", explain.METHODS)
def test_maps_have_the_image_s_shape_and_range_for_every_kind_of_network(method: str) -> None:
    images, targets = as_batch(planted(3, 3, seed=4)[0]), torch.tensor([0, 1, 3])
    for name in ("resnet20", "plain20", "resnet18", "fast-small", "mirror-medium"):
        if name in ("resnet18", "mirror-medium") and method not in ("grad-cam", "eigen-cam"):
            continue  # hundreds of passes
        model = models.build(ModelConfig(name=name, num_classes=4, image_size=SIZE)).eval()
        for stage in ["layer1", None] if method in CAMS else [None]:
            maps = explain.METHODS[method](model, images, targets, stage)
            assert maps.shape == (3, SIZE, SIZE) and maps.dtype == torch.float32
            assert maps.min() >= 0 and maps.max() <= 1
            assert all(peak in (0.0, 1.0) for peak in maps.amax((1, 2)).tolist())


@pytest.mark.parametrize("method", explain.METHODS)
def test_an_image_has_the_same_map_alone_and_in_a_batch(method: str, network: nn.Module) -> None:
    images, targets = as_batch(planted(4, 3, seed=5)[0]), torch.tensor([0, 1, 2, 0])
    together = explain.METHODS[method](network, images, targets, None)
    alone = explain.METHODS[method](network, images[2:3], targets[2:3], None)
    torch.testing.assert_close(together[2:3], alone, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", explain.METHODS)
def test_the_map_points_at_the_patch_that_decides(method: str, network: nn.Module) -> None:
    """At least 90 % of the maxima lie on the patch (measured: all of 60, for each method); by chance 6 %."""
    pixels, labels, corners = planted(20, 3, seed=1)
    images, targets = as_batch(pixels), torch.from_numpy(labels)
    with torch.no_grad():
        assert (network(images).argmax(1) == targets).all()
    maps = explain.METHODS[method](network, images, targets, None).numpy()
    hits = 0
    for values, (top, left) in zip(maps, corners, strict=True):
        y, x = np.unravel_index(values.argmax(), values.shape)
        hits += top <= y < top + PATCH and left <= x < left + PATCH
    assert hits >= 18


@pytest.mark.parametrize("method", explain.METHODS)
def test_other_weights_give_another_map(method: str, network: nn.Module) -> None:
    """The sanity check of Adebayo et al. 2018: an edge detector would pass it by, an explanation must not.

    Mean correlation measured: grad-cam 0.32, score-cam 0.65 (its weights are nearly equal, as a softmax of small
    differences), eigen-cam 0.45, occlusion 0.32, integrated gradients 0.19.
    """
    torch.manual_seed(7)
    random = models.build(ModelConfig(name="resnet20", num_classes=4, image_size=SIZE)).eval()
    pixels, labels, _ = planted(8, 3, seed=6)
    images, targets = as_batch(pixels), torch.from_numpy(labels)
    trained, untrained = (explain.METHODS[method](m, images, targets, None).flatten(1) for m in (network, random))
    together = torch.stack([trained, untrained], 1)  # (8, 2, pixels)
    likeness = [0.0 if pair.std(1).min() == 0 else float(torch.corrcoef(pair)[0, 1]) for pair in together]
    assert np.mean(likeness) < 0.75


def test_the_class_matters_to_all_but_eigen_cam(network: nn.Module) -> None:
    images = as_batch(planted(3, 3, seed=8)[0])
    for name, method in explain.METHODS.items():
        own, other = (method(network, images, torch.tensor(t), None) for t in ([0, 1, 2], [1, 2, 0]))
        assert torch.equal(own, other) == (name == "eigen-cam"), name


def test_googlenet_is_looked_at_before_its_pooling() -> None:
    model = models.build(ModelConfig(name="googlenet", num_classes=4, image_size=32)).eval()
    assert explain.stages(model)[-1] == "inception5b"
    maps = explain.grad_cam(model, torch.randn(1, 3, 32, 32), torch.tensor([1]), "inception4a")
    assert maps.shape == (1, 32, 32)


def test_a_network_without_feature_maps_is_explained_by_its_pixels() -> None:
    model = models.build(ModelConfig(name="linear", num_classes=4, image_size=SIZE)).eval()
    images, targets = as_batch(planted(2, 3, seed=9)[0]), torch.tensor([0, 1])
    for name, method in explain.METHODS.items():
        if name in CAMS:
            with pytest.raises(UsageError, match="occlusion or integrated-gradients"):
                method(model, images, targets, None)
        else:
            assert method(model, images, targets, None).shape == (2, SIZE, SIZE)


def test_integrated_gradients_of_a_linear_network_are_its_weights_times_the_pixels() -> None:
    model = models.build(ModelConfig(name="linear", num_classes=4, image_size=SIZE)).eval()
    images = as_batch(planted(2, 3, seed=10)[0])
    weight = model.state_dict()["fc.weight"][2].view(1, 3, SIZE, SIZE)
    expected = (weight * images).sum(1).clamp(min=0)
    expected /= expected.amax((1, 2), keepdim=True)
    maps = explain.integrated_gradients(model, images, torch.tensor([2, 2]), None)
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=0)


def test_grad_cam_is_its_formula(network: nn.Module) -> None:
    images, targets = as_batch(planted(3, 3, seed=11)[0]), torch.tensor([0, 1, 2])
    features = network.forward_features(images).detach().requires_grad_()  # type: ignore[operator]
    scores = network.forward_head(features)  # type: ignore[operator]
    gradient = torch.autograd.grad(scores.gather(1, targets[:, None]).sum(), features)[0]
    small = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    expected = F.interpolate(small, (SIZE, SIZE), mode="bilinear").squeeze(1).detach()
    expected /= expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(explain.grad_cam(network, images, targets, "layer3"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", explain.METHODS)
def test_an_ensemble_is_explained_through_its_members(method: str, network: nn.Module) -> None:
    config = ModelConfig(name="resnet20", num_classes=4, image_size=SIZE)
    same = Member(model=config, mean=(0.5,) * 3, std=(0.5,) * 3, weight=0.5)
    turned = same.model_copy(update={"order": (1, 2, 3, 0), "mean": (0.4,) * 3})
    model = Ensemble([network, network], [same, turned], "probabilities", mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    images = as_batch(planted(2, 3, seed=12)[0])
    maps = explain.METHODS[method](model, images, torch.tensor([0, 1]), None)
    assert maps.shape == (2, SIZE, SIZE) and maps.max() <= 1
    if method in CAMS:
        one = explain.METHODS[method](network, images, torch.tensor([0, 1]), None)
        two = explain.METHODS[method](network, images + (0.5 - 0.4) / 0.5, torch.tensor([1, 2]), None)
        expected = one + two
        torch.testing.assert_close(maps, expected / expected.amax((1, 2), keepdim=True), atol=1e-4, rtol=0)


def test_heatmaps_say_what_they_are_of(held: Bundle) -> None:
    pixels, labels, _ = planted(5, 3, seed=13)
    machine = runtime.setup("cpu", "fp32")
    names = [f"{i}.png" for i in range(5)]
    maps = explain.explain(held, list(pixels), names, machine, batch_size=2)
    assert [m.target for m in maps] == [CLASSES[i] for i in labels]
    assert [m.name for m in maps] == names
    assert all(m.stage == "layer3" and m.method == "grad-cam" and m.probability > 0.5 for m in maps)
    assert all(np.array_equal(m.pixels, image) for m, image in zip(maps, pixels, strict=True))
    assert all(m.values.shape == (SIZE, SIZE) and m.values.dtype == np.float32 for m in maps)
    forced = explain.explain(held, list(pixels), names, machine, method="occlusion", target="nothing")
    assert all(m.target == "nothing" and m.probability < 0.5 and m.stage is None for m in forced)
    assert explain.explain(held, [], [], machine) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, 'Did you mean "grad-cam"'),
        ({"stage": "layer4"}, "There are: layer1, layer2, layer3"),
        ({"target": "rde"}, 'Did you mean "red"'),
        ({"method": "occlusion", "stage": "layer3"}, "leave out --stage"),
    ],
)
def test_wrong_names_are_explained(held: Bundle, options: dict[str, str], message: str) -> None:
    pixels = planted(1, 3, seed=14)[0]
    with pytest.raises(UsageError, match=message):
        explain.explain(held, list(pixels), ["x"], runtime.setup("cpu", "fp32"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "method"),
    [
        ("torchcam.methods", "grad-cam"),
        ("torchcam.methods", "score-cam"),
        ("captum.attr", "occlusion"),
        ("captum.attr", "integrated-gradients"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    held: Bundle, monkeypatch: pytest.MonkeyPatch, module: str, method: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    pixels = planted(1, 3, seed=15)[0]
    with pytest.raises(ResNetLabError, match=r'needs the package \w+: pip install "resnetlab\[explain\]"'):
        explain.explain(held, list(pixels), ["x"], runtime.setup("cpu", "fp32"), method=method)


def some_heatmap(size: int, channels: int, name: str = "a.png") -> Heatmap:
    values = np.zeros((size, size), np.float32)
    values[0, 0] = 1
    pixels = np.full((size, size, channels), 100, np.uint8)
    return Heatmap(
        values=values, pixels=pixels, method="grad-cam", stage="layer3", target="猫/x", probability=0.5, name=name
    )


@pytest.mark.parametrize(("size", "channels"), [(1, 1), (8, 1), (32, 3), (300, 3)])
def test_overlays_colour_what_matters_and_leave_the_rest_grey(size: int, channels: int) -> None:
    heatmap = some_heatmap(size, channels)
    picture = drawn.overlay(heatmap)
    assert picture.shape == drawn.enlarged(heatmap).shape
    assert picture.shape[0] >= 250 and picture.dtype == np.uint8
    if size > 1:
        assert np.ptp(picture[-1, -1]) == 0  # no colour
        assert np.ptp(picture[0, 0].astype(int)) > 50


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    heatmap = some_heatmap(8, 3, "folder/cat.png")
    first, second = drawn.write([heatmap, replace(heatmap, name="other/cat.png")], tmp_path / "out")
    before = first.read_bytes()
    (third,) = drawn.write([heatmap], tmp_path / "out")
    assert [p.name for p in (first, second, third)] == [f"cat-grad-cam-猫_x{n}.png" for n in ("", "-2", "-3")]
    assert first.read_bytes() == before
    assert np.array_equal(np.load(third.with_suffix(".npy")), heatmap.values)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".png", ".npy"}  # nothing temporary is left
    with Image.open(first) as picture:
        assert min(picture.size) > 300


def test_the_command_writes_pictures_and_arrays(command: Any, held: Bundle, tmp_path: Path) -> None:
    from resnetlab import bundle

    bundle.save(tmp_path, held.model.state_dict(), held.card)
    run, out = tmp_path / "model.safetensors", tmp_path / "out"
    for number, image in enumerate(planted(2, 3, seed=16)[0]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    status, text, err = command("explain", run, tmp_path / "0.png", tmp_path / "1.png", "--out", out, "--json")
    assert (status, err) == (0, "")
    rows = json.loads(text)
    assert [row["class"] for row in rows] == ["red", "green"]
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png"]
    assert all(Path(row["picture"]).is_file() and np.load(row["values"]).shape == (SIZE, SIZE) for row in rows)
    status, text, _ = command(
        "explain", run, tmp_path / "0.png", "--out", out, "--method", "eigen-cam", "--stage", "layer2"
    )
    assert status == 0 and "eigen-cam of layer2" in text and "0-eigen-cam-red.png" in text.replace("\n", "")
    (tmp_path / "bad.png").write_bytes(b"no image")
    status, text, err = command("explain", run, tmp_path / "bad.png", "--out", tmp_path / "none")
    assert (status, text) == (1, "") and "bad.png" in err
    assert not (tmp_path / "none").exists()
    assert command("explain", run)[0] == 2


def test_a_name_is_cut_by_bytes_as_file_systems_count_them() -> None:
    name = drawn._plain("\u8bad" * 80)
    assert 70 < len(name.encode()) <= 80 and set(name) == {"\u8bad"}
