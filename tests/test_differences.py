"""The known differences between implementations: each field changes what `docs/differences.md` says, and no more."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import hollow
from resnetlab import training
from resnetlab.augment import AUGMENTATIONS
from resnetlab.config import DataConfig, ModelConfig, OptimConfig, Recipe, fields
from resnetlab.errors import UsageError
from resnetlab.loader import prepare
from resnetlab.models import ARCHITECTURES, create_model, describe
from resnetlab.models.layers import GhostBatchNorm, PaddedIdentity
from resnetlab.models.resnet import Block, Bottleneck, ResNet
from resnetlab.optim import CaffeSGD, build, parameter_groups
from resnetlab.runtime import setup
from resnetlab.sources.dataset import Dataset
from resnetlab.views import VIEWS

DOCUMENT = Path(__file__).parents[1] / "docs" / "differences.md"
CONVS_1 = {f"layer{stage}.0.conv1" for stage in (2, 3, 4)}
CONVS_2 = {f"layer{stage}.0.conv2" for stage in (2, 3, 4)}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def leaves(model: nn.Module) -> dict[str, str]:
    """Return every module without children by name, as it describes itself."""
    return {name: repr(module) for name, module in model.named_modules() if not list(module.children())}


def changed(name: str, **settings: Any) -> set[str]:
    """Return the names of the modules that the settings change, add or take away."""
    before, after = leaves(hollow(name)), leaves(hollow(name, **settings))
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- The document ----------------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_document_has_all_nineteen_and_every_cell() -> None:
    numbers = [row[0] for row in rows()]
    assert [n for n in numbers if n.isdigit()] == [str(i) for i in range(1, 20)]
    assert all(len(row) == 5 and all(row[:4]) for row in rows())


def test_every_field_that_the_document_names_exists() -> None:
    named = set(re.findall(r"`((?:model|optim|data)\.\w+|precise_bn|keep)`", DOCUMENT.read_text(encoding="utf-8")))
    assert named <= {key for key, _ in fields(Recipe)}
    assert len(named) >= 22


def test_the_defaults_that_the_document_prints_in_bold_are_the_defaults() -> None:
    recipe = Recipe(name="x", model=ModelConfig(name="resnet50"), epochs=1)
    seen = 0
    for row in rows():
        for key, value in re.findall(r"`((?:[\w]+\.)?\w+)` = \*\*`([^`]+)`\*\*", row[3]):
            found: Any = recipe
            for part in key.split("."):
                found = getattr(found, part)
            assert found == type(found)(value) if not isinstance(found, bool) else str(found).lower() == value, key
            seen += 1
    assert seen >= 18


def test_the_names_that_the_document_lists_are_rows() -> None:
    assert {"resnet18", "resnet20"} <= set(ARCHITECTURES)
    assert {"zoom", "crop", "flip"} <= set(AUGMENTATIONS)
    evaluation = next(row[3] for row in rows() if row[0] == "16")
    views = set(re.findall(r"`([a-z0-9-]+)`", evaluation.partition(". ")[0])) - {"--views"}
    assert len(views) >= 4 and views <= set(VIEWS)


# --- 1 to 5: the network's shape -------------------------------------------------------------------------------------


def test_1_stride_place() -> None:
    assert changed("resnet50", stride_on="1x1") == CONVS_1 | CONVS_2
    assert changed("resnet18", stride_on="1x1") == set()


def test_2_stride_unit() -> None:
    lasts = {1: 2, 2: 3, 3: 5}
    firsts = CONVS_2 | {f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)}
    assert changed("resnet50", stride_unit="last") == firsts | {
        f"layer{stage}.{block}.{part}" for stage, block in lasts.items() for part in ("conv2", "downsample")
    }
    model = create_model("resnet50", stride_unit="last")
    assert isinstance(model, ResNet)
    assert parameters(model) == 25_557_032
    with torch.no_grad():
        sizes = [stage.shape[-1] for stage in model.stages(torch.randn(2, 3, 64, 64)).values()]
    assert sizes == [8, 4, 2, 2]
    last = model.get_submodule("layer1.2.downsample")
    x = torch.randn(1, 256, 4, 4)
    assert torch.equal(last(x), F.max_pool2d(x, 1, stride=2))  # TF-slim's subsample


def test_3_stem_of_preactivated_networks() -> None:
    bare, normed = hollow("resnet50", preact=True), hollow("resnet50", preact=True, stem_norm=True)
    before, after = leaves(bare), leaves(normed)
    different = {key for key in before | after if before.get(key) != after.get(key)}
    assert different == {"bn1", "relu", "layer1.0.bn1"}
    assert isinstance(bare.bn1, nn.Identity) and isinstance(normed.get_submodule("layer1.0.bn1"), nn.Identity)
    assert parameters(bare) == parameters(normed)


def test_3_the_first_block_reads_the_stems_activation_once() -> None:
    model = create_model("preresnet20", stem_norm=True, activation="gelu").eval()
    block = model.get_submodule("layer1.0")
    assert isinstance(block, Block)
    convs, inner = block.layers()
    x = torch.randn(2, 16, 4, 4)
    expected = x + convs[1](F.gelu(inner[1](convs[0](x))))
    torch.testing.assert_close(block(x), expected)


def test_4_biases() -> None:
    convs = {name for name, module in hollow("resnet50").named_modules() if isinstance(module, nn.Conv2d)}
    assert changed("resnet50", conv_bias="stem") == {"conv1"}
    assert changed("resnet50", conv_bias="all") == convs
    assert parameters(hollow("resnet50", conv_bias="all")) == 25_557_032 + 26_560
    bias = create_model("resnet18", conv_bias="stem").get_parameter("conv1.bias")
    assert bias.shape == (64,) and not bias.any()


@pytest.mark.parametrize("size", [8, 112])
def test_5_max_pool(size: int) -> None:
    assert changed("resnet18", stem_pool="ceil") == {"maxpool"}
    x = torch.randn(1, 2, size, size)
    padded, cut = (hollow("resnet18", stem_pool=kind).maxpool(x) for kind in ("padded", "ceil"))
    assert padded.shape == cut.shape == (1, 2, size // 2, size // 2)
    same = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-float("inf")), 3, stride=2)  # TensorFlow's "SAME"
    assert torch.equal(cut, same)
    assert not torch.equal(padded, cut)


# --- 6, 7: batch norm ------------------------------------------------------------------------------------------------


def test_6_constants_of_batch_norm() -> None:
    assert changed("resnet50", norm_momentum=0.01, norm_eps=1.001e-5) == set(norms(hollow("resnet50")))
    for module in hollow("resnet50", norm_momentum=0.01, norm_eps=1.001e-5).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.momentum, module.eps) == (0.01, 1.001e-5)


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": ModelConfig(name="resnet20", num_classes=3, image_size=8, width=0.25),
        "data": DataConfig(val=0.2, augment=("flip",)),
        "optim": OptimConfig(lr=0.05, weight_decay=1e-3),
        "epochs": 2,
        "batch_size": 16,
        "seed": 3,
    }
    return Recipe(**(values | changes))


def trained(dataset: Dataset, chosen: Recipe) -> training.Training:
    t = training.start(chosen, prepare(chosen.data, dataset), setup("cpu", "fp32"))
    for _ in training.run(t):
        pass
    return t


def test_6a_precise_batch_norm_is_the_plain_average_over_training_batches(tiny: Dataset) -> None:
    before, after = (trained(tiny, recipe(precise_bn=batches)) for batches in (0, 2))
    for (name, p), q in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert after.history[0] == before.history[0]  # only the result is touched
    assert after.history[1].val_loss != before.history[1].val_loss
    stem = after.model.get_submodule("conv1")
    batches = list(after.loader.epoch(2))[-2:]
    with torch.no_grad():
        seen = [stem(batch.images) for batch in batches]
    norm = after.model.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert norm.momentum == 0.1


def test_6a_a_rest_of_few_images_does_not_count_as_a_batch(tiny: Dataset) -> None:
    t = trained(tiny, recipe(precise_bn=1, batch_size=46, data=DataConfig(val=0.2)))
    whole, rest = t.loader.epoch(2)
    assert (len(whole.labels), len(rest.labels)) == (46, 2)
    norm = t.model.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    with torch.no_grad():
        seen = t.model.get_submodule("conv1")(whole.images)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))


@pytest.mark.parametrize("optim", [OptimConfig(lr=0.05), OptimConfig(lr=0.05, average=0.5)])
@pytest.mark.parametrize("stop_after", [2, 3])
def test_6a_precise_batch_norm_survives_a_resume(tiny: Dataset, optim: OptimConfig, stop_after: int) -> None:
    model = ModelConfig(name="resnet20", num_classes=3, image_size=8, width=0.25, drop_path=0.3, norm_batch=8)
    chosen = recipe(precise_bn=3, keep="best", optim=optim, model=model)
    whole = trained(tiny, chosen)
    first, second = (training.start(chosen, prepare(chosen.data, tiny), setup("cpu", "fp32")) for _ in range(2))
    steps = training.run(first)
    for _ in range(stop_after):
        next(steps)
    training.restore(second, training.checkpoint(first))
    for _ in training.run(second):
        pass
    assert second.history == whole.history
    for name, tensor in training.result_weights(whole).items():
        assert torch.equal(tensor, training.result_weights(second)[name]), name


def test_7_images_that_share_a_statistic() -> None:
    assert changed("resnet50", norm_batch=32) == set(norms(hollow("resnet50")))
    sizes = {m.size for m in hollow("resnet50", norm_batch=32).modules() if isinstance(m, GhostBatchNorm)}
    assert sizes == {32}
    model = create_model("resnet20", norm_batch=4, image_size=8)
    images = torch.randn(8, 3, 8, 8)
    torch.testing.assert_close(model(images)[:4], model(images[:4]))  # two GPUs of four images


# --- 8 to 10: the optimiser ------------------------------------------------------------------------------------------


def walk(config: OptimConfig, rates: list[float]) -> list[float]:
    """Return the path of one weight under the gradient w² / 2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer, path = build(config, model), []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        model.weight.grad = model.weight.detach().clone()
        optimizer.step()
        path.append(float(model.weight.detach()))
    return path


@pytest.mark.parametrize("nesterov", [False, True])
def test_8_momentum_form(nesterov: bool) -> None:
    torchs, caffes = (
        OptimConfig(momentum=0.9, weight_decay=0.01, nesterov=nesterov, momentum_form=form)
        for form in ("torch", "caffe")
    )
    assert walk(caffes, [0.1] * 6) == pytest.approx(walk(torchs, [0.1] * 6), rel=1e-5)
    rates = [0.1, 0.1, 0.01, 0.01]
    w, v, path = 1.0, 0.0, []
    for rate in rates:  # Caffe: the update, and its Nesterov form
        g = w + 0.01 * w
        v = 0.9 * v + rate * g
        w -= 0.9 * v + rate * g if nesterov else v
        path.append(w)
    assert walk(caffes, rates) == pytest.approx(path, rel=1e-5)
    assert walk(torchs, rates)[2] - walk(caffes, rates)[2] > 0.05  # Caffe's goes on at the old speed


def test_8_and_9_which_optimiser_is_made() -> None:
    model = nn.Linear(2, 2)
    assert type(build(OptimConfig(), model)) is torch.optim.SGD
    caffe = build(OptimConfig(momentum_form="caffe", nesterov=True), model)
    assert type(caffe) is CaffeSGD and caffe.param_groups[0]["nesterov"]
    assert not build(OptimConfig(), model).param_groups[0]["nesterov"]
    with pytest.raises(UsageError, match=r"momentum_form is a setting of optim\.name=sgd; this recipe has adam"):
        build(OptimConfig(name="adam", momentum_form="caffe"), model)


def test_8_caffes_momentum_survives_a_resume(tiny: Dataset) -> None:
    chosen = recipe(optim=OptimConfig(lr=0.05, schedule="cosine", momentum_form="caffe"))
    whole = trained(tiny, chosen)
    first, second = (training.start(chosen, prepare(chosen.data, tiny), setup("cpu", "fp32")) for _ in range(2))
    steps = training.run(first)
    next(steps), next(steps)
    training.restore(second, training.checkpoint(first))
    for _ in training.run(second):
        pass
    assert second.history == whole.history


def test_10_weight_decay_on_norms() -> None:
    model = create_model("resnet20")
    (everything,) = parameter_groups(model, OptimConfig(weight_decay=1e-4))
    decay, rest = parameter_groups(model, OptimConfig(weight_decay=1e-4, decay_norms=False))
    assert isinstance(decay["params"], list) and isinstance(rest["params"], list)
    assert (everything["weight_decay"], decay["weight_decay"], rest["weight_decay"]) == (1e-4, 1e-4, 0.0)
    assert {p.ndim for p in decay["params"]} == {2, 4}
    assert {p.ndim for p in rest["params"]} == {1}


# --- 11 to 13: CIFAR and the start -----------------------------------------------------------------------------------


def test_11_zeros_of_option_a() -> None:
    x = torch.randn(1, 2, 4, 4)
    ends = PaddedIdentity(2, 6, 2, "end")(x)
    assert torch.equal(ends[:, :2], F.avg_pool2d(x, 1, stride=2)) and not ends[:, 2:].any()
    padded = [m.padding for m in hollow("resnet20", shortcut_pad="end").modules() if isinstance(m, PaddedIdentity)]
    assert padded == [(0, 0, 0, 0, 0, 16), (0, 0, 0, 0, 0, 32)]
    assert changed("resnet20", shortcut_pad="end") == set()  # no module and no weight is another one


def test_11a_norm_on_projections() -> None:
    projections = {f"layer{stage}.0.downsample.1" for stage in (1, 2, 3, 4)}
    assert changed("resnet50", shortcut_norm=False) == projections
    assert not projections & set(norms(hollow("resnet50", preact=True)))
    assert projections <= set(norms(hollow("resnet50", preact=True, shortcut_norm=True)))


def test_12_two_networks_on_cifar() -> None:
    assert describe("resnet20").parameters == 269_722
    assert parameters(hollow("resnet18", num_classes=10, image_size=32)) == 11_173_962


def test_13_initial_weights() -> None:
    assert changed("resnet50", init="he-in") == changed("resnet50", init="torch") == set()
    found = {init: create_model("resnet18", init=init).get_parameter("conv1.weight") for init in ("he", "he-in")}
    assert float(found["he"].detach().std()) == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.03)
    assert float(found["he-in"].detach().std()) == pytest.approx((2 / (3 * 49)) ** 0.5, rel=0.03)
    last = create_model("resnet18", init="he-in").get_parameter("fc.weight")
    assert float(last.detach().std()) == pytest.approx((2 / 512) ** 0.5, rel=0.03)


# --- 18, 19: the end of a block --------------------------------------------------------------------------------------


def test_18_last_norm_starts_at_zero() -> None:
    assert changed("resnet50", zero_init=True) == set()
    zeros = {n for n, p in create_model("resnet50", zero_init=True).named_parameters() if not p.any() and "weight" in n}
    assert zeros == {
        f"{name}.bn3.weight" for name, m in hollow("resnet50").named_modules() if isinstance(m, Bottleneck)
    }


def outputs(model: ResNet) -> Tensor:
    with torch.no_grad():
        return model.eval().stages(torch.randn(2, 3, 32, 32))["layer3"]


def test_19_what_follows_the_sum() -> None:
    for preact in (False, True):
        model = create_model("resnet20", preact=preact)
        assert isinstance(model, ResNet)
        assert bool((outputs(model) < 0).any()) is preact


def test_19a_norm_after_the_sum() -> None:
    assert changed("resnet50", norm_place="sum") == set()
    model = create_model("resnet20", norm_place="sum")
    block = model.get_submodule("layer1.1")
    assert isinstance(block, Block)
    convs, inner = block.layers()
    x = torch.randn(4, 16, 4, 4)
    expected = F.relu(inner[1](x + convs[1](F.relu(inner[0](convs[0](x))))))
    torch.testing.assert_close(block(x), expected)
