"""The networks: parity with second implementations, the paper's figures, every switch, and loading of weights.

The golden values in ``golden/models.json`` are rewritten with

    RESNETLAB_ACCEPT=1 pytest tests/test_models.py -k golden

Some tests need data that is not in the repository: RESNETLAB_TEST_DATA names the directory that holds it.
"""

import copy
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from networks import randomise
from resnetlab import models
from resnetlab.config import ModelConfig
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.models import (
    ARCHITECTURES,
    build,
    count,
    create_model,
    describe,
    load_weights,
    resolve,
    unpickle,
    weights,
)
from resnetlab.models.complexity import ShapesOnly
from resnetlab.models.layers import PaddedIdentity
from resnetlab.models.resnet import BasicBlock, Bottleneck, ResNet
from resnetlab.threads import cores

GOLDEN = Path(__file__).parent / "golden" / "models.json"
SLOW = {"resnet101", "resnet152", "plain50", "plain101", "plain152", "resnet110", "plain110", "vgg16", "vgg19"}
SLOW |= {"resnet1202", "plain1202", "preresnet110", "preresnet164", "preresnet1001", "wrn-28-10", "resnext29_16x64d"}
SLOW |= {"wide_resnet50_2", "wide_resnet101_2", "resnext101_32x8d", "resnext101_64x4d"}
ROWS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ARCHITECTURES]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def hollow(name: str, **fields: Any) -> models.Network:
    """Build without content, which is quick."""
    with ShapesOnly():
        return create_model(name, **fields)


# --- Parity with torchvision ---------------------------------------------------------------------------------------


def parity_cases() -> Iterator[Any]:
    fast = ("resnet18", "resnet34", "resnet50", "resnext50_32x4d")
    deep = ("resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2", "resnext101_32x8d", "resnext101_64x4d")
    for name in fast + deep:
        yield pytest.param(name, 32, marks=[] if name in fast else [pytest.mark.slow])
    for name in ("resnet18", "resnet50", "resnext50_32x4d"):  # a block of each kind: more of them add no new sizes
        yield pytest.param(name, 224, marks=[] if name == "resnet18" else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "size"), list(parity_cases()))
def test_torchvisions_state_dict_gives_torchvisions_logits_and_gradients(name: str, size: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = getattr(torchvision.models, name)(weights=None)
    randomise(theirs)
    ours = create_model(name, image_size=size, stem="imagenet")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images, labels = torch.randn(2, 3, size, size), torch.tensor([3, 7])
    for training in (False, True):
        results = []
        for model in (ours, theirs):
            model.train(training).zero_grad()
            logits = model(images)
            torch.autograd.backward(nn.functional.cross_entropy(logits, labels))
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((logits.detach(), grads))
        (our_logits, our_grads), (their_logits, their_grads) = results
        assert (our_logits - their_logits).abs().max() <= 1e-5
        assert set(our_grads) == set(their_grads) == {n for n, _ in ours.named_parameters()}
        assert max(float((our_grads[n] - their_grads[n]).abs().max()) for n in their_grads) <= 1e-5
    for key, value in theirs.state_dict().items():  # the running statistics after the training step
        torch.testing.assert_close(ours.state_dict()[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vgg16", "vgg19", "googlenet"])
def test_reference_networks_have_torchvisions_names_and_shapes(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    extra = {"aux_logits": False} if name == "googlenet" else {}
    with ShapesOnly():
        theirs = getattr(torchvision.models, name)(weights=None, init_weights=True, **extra)
    assert shapes(hollow(name)) == shapes(theirs)


def test_googlenet_computes_what_torchvisions_does() -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.googlenet(weights=None, num_classes=10, aux_logits=False, init_weights=True).eval()
    ours = create_model("googlenet", num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(ours(images), theirs(images))


def test_googlenet_takes_weights_with_the_heads_that_help_training_alone() -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.googlenet(weights=None, num_classes=10, aux_logits=True, init_weights=False)
    ours = create_model("googlenet", num_classes=10)
    models.load_state(ours, theirs.state_dict(), "theirs")
    assert torch.equal(ours.state_dict()["fc.weight"], theirs.fc.weight)


# --- The paper's figures -------------------------------------------------------------------------------------------

IMAGENET_COSTS = [
    ("resnet18", {}, 11_689_512, 1.814073),
    ("resnet34", {}, 21_797_672, 3.663761),
    ("resnet50", {}, 25_557_032, 4.089184),
    ("resnet101", {}, 44_549_160, 7.801405),
    ("resnet152", {}, 60_192_808, 11.513627),
    ("resnet50", {"stride_on": "1x1"}, 25_557_032, 3.857973),
    ("resnet101", {"stride_on": "1x1"}, 44_549_160, 7.570194),
    ("resnet152", {"stride_on": "1x1"}, 60_192_808, 11.282416),
    ("resnet18", {"shortcut": "A"}, 11_515_688, 1.794806),
    ("resnet34", {"shortcut": "A"}, 21_623_848, 3.644494),
    ("plain18", {}, 11_515_688, 1.794806),
    ("plain34", {}, 21_623_848, 3.644494),
    ("wide_resnet50_2", {}, 68_883_240, 11.398021),
    ("wide_resnet101_2", {}, 126_886_696, 22.753051),
    ("resnext50_32x4d", {}, 25_028_904, 4.230480),
    ("resnext101_32x8d", {}, 88_791_336, 16.414015),
    ("resnext101_64x4d", {}, 83_455_272, 15.460270),
]
CIFAR_COSTS = [  # n, parameters with options A, B and C, millions of multiply-adds with A
    (3, 269_722, 272_474, 283_962, 40.551),
    (5, 464_154, 466_906, 489_594, 68.863),
    (7, 658_586, 661_338, 695_226, 97.174),
    (9, 853_018, 855_770, 900_858, 125.486),
    (18, 1_727_962, 1_730_714, 1_826_202, 252.888),
    (200, 19_421_274, 19_424_026, 20_538_714, 2829.239),
]


@pytest.mark.parametrize(("name", "fields", "parameters", "gmacs"), IMAGENET_COSTS)
def test_imagenet_costs(name: str, fields: dict[str, Any], parameters: int, gmacs: float) -> None:
    cost = count(hollow(name, **fields), 224)
    assert cost.parameters == parameters
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=6e-7)
    depth = re.search(r"\d+", name)
    assert depth and cost.layers == int(depth[0])


@pytest.mark.parametrize(("n", "a", "b", "c", "mmacs"), CIFAR_COSTS)
def test_cifar_costs(n: int, a: int, b: int, c: int, mmacs: float) -> None:
    name = f"resnet{6 * n + 2}"
    for option, parameters in {"B": b, "C": c}.items():
        assert sum(p.numel() for p in hollow(name, shortcut=option).parameters()) == parameters
    cost = describe(name)
    assert cost.parameters == describe(f"plain{6 * n + 2}").parameters == a
    assert cost.macs / 1e6 == pytest.approx(mmacs, abs=6e-4)
    assert cost.layers == 6 * n + 2
    assert describe(f"plain{6 * n + 2}").macs == cost.macs


@pytest.mark.parametrize(("name", "size"), [("resnet50", 64), ("resnet20", 32), ("googlenet", 64), ("linear", 32)])
def test_macs_agree_with_pytorchs_own_counter(name: str, size: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = create_model(name, image_size=size).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    assert count(model, size).macs * 2 == counter.get_total_flops()


def test_every_row_is_described() -> None:
    rows = models.rows()
    assert [row.name for row in rows] == list(ARCHITECTURES)
    assert all(row.parameters > 0 and row.macs > 0 for row in rows)
    by_name = {row.name: row for row in rows}
    assert [by_name[n].layers for n in ("linear", "vgg16", "vgg19", "googlenet")] == [1, 16, 19, 22]
    assert by_name["vgg16"].parameters == 138_357_544
    assert by_name["resnet50"].block == "bottleneck"
    assert by_name["plain20"].num_classes == 10


def test_counting_leaves_model_and_random_numbers_alone() -> None:
    model = create_model("resnet20")
    before, random_state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    cost = count(model, 32)
    describe.cache_clear()
    describe("resnet20")
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert cost == count(model.eval(), 32)


# --- Conformance of every row --------------------------------------------------------------------------------------


def test_the_table_has_all_rows() -> None:
    assert len(ARCHITECTURES) == 48
    assert len({models.canonical(name) for name in ARCHITECTURES}) == 48


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_rows_train_on_small_images(name: str, channels: int) -> None:
    # plain1202's gradient grows by 1.18 a layer, to 1e86 at the first: finite, but not in fp32.
    dtype = torch.float64 if name == "plain1202" else torch.float32
    model = create_model(name, num_classes=7, in_channels=channels, image_size=32).to(dtype)
    images = torch.randn(2, channels, 32, 32, dtype=dtype)
    logits = model(images)
    assert logits.shape == (2, 7)
    torch.autograd.backward(nn.functional.cross_entropy(logits, torch.tensor([0, 1])))
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # a stem that is fitted, a scale that stays 1
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    model.eval()
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.ndim == 4
        assert torch.equal(model.forward_head(features), model(images))


@pytest.mark.parametrize("name", ROWS)
def test_rows_keep_their_weights_through_a_file(name: str, tmp_path: Path) -> None:
    model = create_model(name, num_classes=7, image_size=32)
    randomise(model)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    other = build(model.config)
    load_weights(other, tmp_path / "w.safetensors")
    state = model.state_dict()
    assert list(other.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", ROWS)
def test_rows_rebuild_from_their_json(name: str) -> None:
    model = hollow(name, num_classes=7, in_channels=1, image_size=32)
    assert "auto" not in model.config.model_dump().values()
    config = ModelConfig.model_validate_json(model.config.model_dump_json())
    with ShapesOnly():
        again = build(config)
    assert again.config == model.config
    assert shapes(again) == shapes(model)
    assert repr(again) == repr(model)


@pytest.mark.parametrize("name", [n for n, row in ARCHITECTURES.items() if row.family != "cifar"])
def test_rows_accept_imagenet_sizes(name: str) -> None:
    model = hollow(name, in_channels=1, image_size=224)
    with ShapesOnly(), torch.no_grad():
        assert model(torch.empty(1, 1, 224, 224)).shape == (1, model.config.num_classes)


# --- Names and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("resnet-50", "resnet50"),
        ("ResNet50", "resnet50"),
        ("RESNET_101", "resnet101"),
        ("plain-18", "plain18"),
        ("resnet50-tutorial", "resnet50-tutorial"),
        ("ResNet-50_Tutorial", "resnet50-tutorial"),
        ("VGG-16", "vgg16"),
        ("wide-resnet-50-2", "wide_resnet50_2"),
        ("ResNeXt-50 32x4d", "resnext50_32x4d"),
        ("WRN-28-10", "wrn-28-10"),
        ("PreResNet-110", "preresnet110"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert resolve(ModelConfig(name=spelling, image_size=32)).name == name


def test_unknown_names_and_settings_are_explained() -> None:
    with pytest.raises(UsageError, match=r'Unknown model "resnet51". Did you mean'):
        create_model("resnet51")
    with pytest.raises(UsageError, match=r'Unknown model setting "steem". Did you mean "stem"'):
        create_model("resnet18", steem="small")
    with pytest.raises(UsageError, match=r"shortcut: .*'D'"):
        create_model("resnet18", shortcut="D")


@pytest.mark.parametrize(
    ("fields", "stem"),
    [
        ({"name": "resnet18"}, "imagenet"),
        ({"name": "resnet18", "image_size": 64}, "small"),
        ({"name": "resnet18", "image_size": 65}, "imagenet"),
        ({"name": "resnet18", "image_size": 32, "stem": "imagenet"}, "imagenet"),
        ({"name": "resnet20", "image_size": 224}, "small"),
        ({"name": "resnet20", "stem": "imagenet"}, "imagenet"),
        ({"name": "resnet50-tutorial", "image_size": 32}, "imagenet"),
        ({"name": "resnet50-tutorial", "stem": "small"}, "small"),
    ],
)
def test_stem(fields: dict[str, Any], stem: str) -> None:
    with ShapesOnly():
        model = build(ModelConfig(**fields))
    assert model.config.stem == stem
    assert isinstance(model, ResNet)
    assert model.conv1.kernel_size == ((7, 7) if stem == "imagenet" else (3, 3))
    assert model.conv1.stride == ((2, 2) if stem == "imagenet" else (1, 1))
    assert isinstance(model.maxpool, nn.MaxPool2d if stem == "imagenet" else nn.Identity)


def test_tutorial_row_and_the_users_right_to_differ() -> None:
    config = hollow("resnet50-tutorial", num_classes=10).config
    assert (config.stem, config.stem_relu, config.init, config.stride_on) == ("imagenet", False, "torch", "3x3")
    changed = resolve(ModelConfig(name="resnet50-tutorial", stem_relu=True, init="he"))
    assert (changed.stem_relu, changed.init, changed.stem) == (True, "he", "imagenet")
    assert resolve(changed) == changed


def test_stem_relu() -> None:
    for kept in (True, False):
        model = create_model("resnet18", stem_relu=kept).eval()
        outputs: list[Tensor] = []
        assert isinstance(model, ResNet)
        model.maxpool.register_forward_pre_hook(lambda _m, args, outputs=outputs: outputs.append(args[0]))
        model(torch.randn(1, 3, 64, 64))
        assert bool((outputs[0] < 0).any()) is not kept


def test_stride_place() -> None:
    for place, strides in {"3x3": ((1, 1), (2, 2)), "1x1": ((2, 2), (1, 1))}.items():
        block = hollow("resnet50", stride_on=place).get_submodule("layer2.0")
        assert isinstance(block, Bottleneck)
        assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == (*strides, (1, 1))


def test_zero_init_makes_every_block_the_identity() -> None:
    model = create_model("resnet50", zero_init=True, image_size=32)
    for name in ("layer1.1", "layer4.2"):
        block = model.get_submodule(name)
        assert isinstance(block, Bottleneck)
        x = torch.rand(2, block.conv1.in_channels, 4, 4)
        assert torch.equal(block(x), x)
    assert bool((model.get_parameter("layer1.0.downsample.1.weight") == 1).all())
    with pytest.raises(UsageError, match="zero_init"):
        create_model("plain18", zero_init=True)


def test_init() -> None:
    weight = "layer2.0.conv2.weight"  # 128 channels, 3×3: fan-in and fan-out are 1152
    he = create_model("resnet18").get_parameter(weight)
    default = create_model("resnet18", init="torch").get_parameter(weight)
    assert float(he.detach().std()) == pytest.approx((2 / 1152) ** 0.5, rel=0.02)
    assert float(default.detach().std()) == pytest.approx((1 / 3 / 1152) ** 0.5, rel=0.02)
    assert float(default.detach().abs().max()) <= (1 / 1152) ** 0.5 + 1e-6


@pytest.mark.parametrize(("init", "zero"), [("he", True), ("torch", False)])
def test_biases_of_convolutions_start_at_zero_unless_as_in_pytorch(init: str, zero: bool) -> None:
    model = create_model("resnet20", conv_bias="all", init=init)
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert len(biases) == 19
    assert {not bias.any() for bias in biases} == {zero}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_shortcut_options(name: str) -> None:
    blocks = {
        option: [m for m in hollow(name, shortcut=option).modules() if isinstance(m, BasicBlock | Bottleneck)]
        for option in ("A", "B", "C", "none")
    }
    kinds = {option: [type(block.downsample) for block in chain] for option, chain in blocks.items()}
    changes = [kind is nn.Sequential for kind in kinds["B"]]
    assert sum(changes) == {"resnet18": 3, "resnet50": 4, "resnet20": 2}[name]
    assert kinds["A"] == [PaddedIdentity if change else nn.Identity for change in changes]
    assert kinds["B"] == [nn.Sequential if change else nn.Identity for change in changes]
    assert set(kinds["C"]) == {nn.Sequential}
    assert set(kinds["none"]) == {type(None)}
    assert resolve(ModelConfig(name=name)).shortcut == ("A" if name == "resnet20" else "B")


def test_option_a_takes_every_second_pixel_and_pads_both_ends() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4) + 1
    y = PaddedIdentity(2, 5, 2)(x)
    assert y.shape == (1, 5, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3, 4]].any()


def test_plain_networks_have_no_shortcuts() -> None:
    assert hollow("plain34").config.shortcut == "none"
    assert shapes(hollow("plain34")) == shapes(hollow("resnet34", shortcut="none"))
    assert shapes(hollow("plain56")) == shapes(hollow("resnet56"))
    assert resolve(ModelConfig(name="plain34", shortcut="none")).shortcut == "none"
    with pytest.raises(UsageError, match=r'plain network.*"resnet34"'):
        create_model("plain34", shortcut="B")


def test_settings_of_reference_networks() -> None:
    with pytest.raises(UsageError, match="image_size"):
        create_model("linear")
    with pytest.raises(UsageError, match="no setting shortcut"):
        create_model("googlenet", shortcut="B")
    assert create_model("linear", image_size=8, in_channels=1).get_parameter("fc.weight").shape == (10, 64)


def test_first_convolution_for_other_channels_starts_at_the_networks_own_scale() -> None:
    weight = create_model("googlenet", num_classes=10, in_channels=4).get_parameter("conv1.conv.weight")
    assert weight.shape == (64, 4, 7, 7)
    assert float(weight.detach().std()) == pytest.approx(0.01, rel=0.05)


# --- As a backbone -------------------------------------------------------------------------------------------------


def test_stages() -> None:
    model = create_model("resnet50").eval()
    assert isinstance(model, ResNet)
    assert model.stage_channels == {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
    images = torch.randn(1, 3, 64, 64)
    stages = model.stages(images)
    assert {n: tuple(s.shape[1:]) for n, s in stages.items()} == {
        name: (channels, 64 // stride, 64 // stride)
        for (name, channels), stride in zip(model.stage_channels.items(), (4, 8, 16, 32), strict=True)
    }
    assert torch.equal(stages["layer4"], model.forward_features(images))
    small = create_model("resnet20").eval()
    assert isinstance(small, ResNet)
    assert [tuple(s.shape) for s in small.stages(torch.randn(1, 3, 32, 32)).values()] == [
        (1, 16, 32, 32),
        (1, 32, 16, 16),
        (1, 64, 8, 8),
    ]


@pytest.mark.parametrize("fields", [{}, {"stem_relu": False}, {"image_size": 32, "shortcut": "A"}])
def test_children_run_in_their_order(fields: dict[str, Any]) -> None:
    getter = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter
    model = create_model("resnet18", **fields).eval()
    assert isinstance(model, ResNet)
    taken = getter(model, {name: name for name in model.stage_channels})
    images = torch.randn(1, 3, 32, 32)
    for name, output in model.stages(images).items():
        assert torch.equal(taken(images)[name], output)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_detection_runs_on_our_backbone(name: str) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    fpn = pytest.importorskip("torchvision.models.detection.backbone_utils").BackboneWithFPN
    model = create_model(name)
    assert isinstance(model, ResNet)
    layers = {stage: str(i) for i, stage in enumerate(model.stage_channels)}
    backbone = fpn(model, layers, list(model.stage_channels.values()), out_channels=32)
    detector = detection.FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64, rpn_post_nms_top_n_train=50)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])} for _ in images]
    loss = sum(detector(images, targets).values())
    assert torch.isfinite(loss)
    loss.backward()
    assert model.conv1.weight.grad is not None
    detector.eval()
    with torch.no_grad():
        assert set(detector(images)[0]) == {"boxes", "labels", "scores"}


def test_segmentation_runs_on_our_backbone() -> None:
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    head = pytest.importorskip("torchvision.models.segmentation.deeplabv3").DeepLabHead
    getter = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter
    model = create_model("resnet18")
    assert isinstance(model, ResNet)
    network = segmentation.DeepLabV3(getter(model, {"layer4": "out"}), head(model.stage_channels["layer4"], 5))
    assert network.eval()(torch.randn(1, 3, 64, 64))["out"].shape == (1, 5, 64, 64)


# --- Golden values -------------------------------------------------------------------------------------------------


def tiny(name: str) -> ResNet:
    """Build the seeded 8-layer CIFAR network, or bottlenecks of one block a stage with every switch moved."""
    torch.manual_seed(1)
    if name == "cifar8":
        config = ModelConfig(name=name, stem="small", shortcut="A")
        return ResNet(config, BasicBlock, (1, 1, 1), (16, 32, 64))
    moved: dict[str, Any] = {"stem_relu": False, "stride_on": "1x1", "shortcut": "C", "init": "torch"}
    config = ModelConfig(name=name, stem="imagenet", **({"shortcut": "B"} if name == "bottleneck14" else moved))
    return ResNet(config, Bottleneck, (1, 1, 1, 1), (8, 16, 32, 64))


@pytest.mark.parametrize("name", ["cifar8", "bottleneck14", "bottleneck14-moved"])
def test_golden(name: str) -> None:
    """In fp64: batch norm over two values (stage 4 has 1×1 pixels) makes much of how a processor rounds fp32."""
    model = tiny(name)
    images = torch.randn(2, 3, 32, 32).double()  # drawn in fp32, as the weights
    train = copy.deepcopy(model).double()(images)
    randomise(model.eval())
    model.double()
    with torch.no_grad():
        found = {
            "train_logits": train.detach().tolist(),
            "logits": model(images).tolist(),
            "stage_means": {stage: float(output.mean()) for stage, output in model.stages(images).items()},
        }
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("RESNETLAB_ACCEPT") == "1":
        GOLDEN.write_text(json.dumps({**stored, name: found}, indent=1, sort_keys=True) + "\n")
        return
    close = partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-6)
    close(found["train_logits"], stored[name]["train_logits"])
    close(found["logits"], stored[name]["logits"])
    assert found["stage_means"] == pytest.approx(stored[name]["stage_means"], abs=1e-6)


# --- Weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def resnet20() -> models.Network:
    return create_model("resnet20").eval()


def assert_refused(model: nn.Module, path: Path, *messages: str) -> None:
    """Loading must fail with all of the messages and leave the model as it is."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ResNetLabError) as caught:
        load_weights(model, path)
    for message in (path.name, *messages):
        assert message in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickle in this process: starting torch in another one for every case would take most of the tests' time."""

    def convert(path: Path, target: Path) -> dict[str, str]:
        try:
            unpickle.convert(path, target)
        except unpickle.Refused as error:
            return {"refused": str(error)}
        return {}

    monkeypatch.setattr(weights, "_convert_apart", convert)


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_load_from_every_format(suffix: str, prefix: str, resnet20: models.Network, tmp_path: Path) -> None:
    source = create_model("resnet20").eval()
    randomise(source)
    old_names = {"fc.weight": "linear.weight", "fc.bias": "linear.bias"}
    state = {
        prefix + old_names.get(name, name): tensor
        for name, tensor in source.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".th" else {"model": state}, path)
    load_weights(resnet20, path)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(resnet20(images), source(images))


def test_half_precision_weights_load_as_the_models_type(resnet20: models.Network, tmp_path: Path) -> None:
    save_file(
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in resnet20.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    load_weights(resnet20, tmp_path / "w.safetensors")
    assert resnet20.get_parameter("fc.weight").dtype == torch.float32


def test_mismatches_are_listed_in_full(resnet20: models.Network, tmp_path: Path) -> None:
    save_file(create_model("resnet32", num_classes=100).state_dict(), tmp_path / "deep.safetensors")
    assert_refused(
        resnet20,
        tmp_path / "deep.safetensors",
        "Left over (72)",
        "and 64 more",
        "Other shapes (2)",
        "fc.weight (100, 64) instead of (10, 64)",
    )
    save_file({"conv1.weight": torch.zeros(16, 3, 3, 3), "extra": torch.zeros(1)}, tmp_path / "little.safetensors")
    assert_refused(resnet20, tmp_path / "little.safetensors", "Missing (96)", "bn1.weight", "Left over (1): extra")


@pytest.mark.usefixtures("near")
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_bad_contents_are_refused(resnet20: models.Network, tmp_path: Path) -> None:
    good = resnet20.state_dict()
    path = tmp_path / "w.pt"
    cases: list[tuple[Any, str]] = [
        ({**good, "fc.bias": torch.full((10,), float("nan"))}, "fc.bias holds values that are not finite"),
        ({**good, "fc.bias": torch.arange(10.0) / torch.arange(10.0)}, "fc.bias holds values that are not finite"),
        ({**good, "fc.bias": torch.full((10,), 1e300, dtype=torch.float64)}, "not finite in torch.float32"),
        ({**good, "fc.bias": torch.zeros(10, dtype=torch.complex64)}, "complex64"),
        ({**good, "fc.bias": torch.zeros(10, dtype=torch.int64)}, "int64"),
        ({**good, "fc.bias": torch.eye(10).to_sparse()}, "not named dense tensors: fc.bias"),
        ({**good, "module.fc.bias": torch.zeros(10)}, "both stand for"),
        ({**good, "epoch": 3}, "not named dense tensors: epoch"),
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
    ]
    for content, message in cases:
        torch.save(content, path)
        assert_refused(resnet20, path, message)


@pytest.mark.usefixtures("near")
def test_broken_files_are_refused(resnet20: models.Network, tmp_path: Path) -> None:
    assert_refused(resnet20, tmp_path / "none.pt", "no such file")
    assert_refused(resnet20, tmp_path / "none.onnx", ".safetensors")
    whole: dict[str, bytes] = {}
    save_file(resnet20.state_dict(), tmp_path / "whole.safetensors")
    torch.save(resnet20.state_dict(), tmp_path / "whole.pt")
    for suffix in (".safetensors", ".pt"):
        whole[suffix] = (tmp_path / f"whole{suffix}").read_bytes()
        for content in (b"", b"x", os.urandom(1000), whole[suffix][: len(whole[suffix]) // 2]):
            path = tmp_path / f"broken{suffix}"
            path.write_bytes(content)
            assert_refused(resnet20, path)
    assert_refused(resnet20, tmp_path, "are read from")


def test_weights_that_may_not_be_read_are_not_called_damaged(
    resnet20: models.Network, tmp_path: Path, not_root: Callable[[], None]
) -> None:
    for suffix in (".safetensors", ".pth"):
        path = tmp_path / f"closed{suffix}"
        path.write_bytes(b"x")
        path.chmod(0)
    not_root()
    for suffix in (".safetensors", ".pth"):
        assert_refused(resnet20, tmp_path / f"closed{suffix}", "cannot be read: Permission denied")


def test_limits_that_are_lower_already_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    set_to: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1000, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: set_to.update({kind: limits}))
    unpickle.limit(10**6)
    assert set_to[resource.RLIMIT_FSIZE] == (1000, 1000) and set_to[resource.RLIMIT_CORE] == (0, 0)


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def test_a_view_that_negates_is_read_as_what_it_shows(tmp_path: Path) -> None:
    torch.save({"w": torch._neg_view(torch.ones(3))}, tmp_path / "w.pth")
    unpickle.convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors")["w"].tolist() == [-1.0, -1.0, -1.0]


def test_a_setting_at_its_default_may_still_be_another_network() -> None:
    row, narrow = ModelConfig(name="wrn-16-8", image_size=32), ModelConfig(name="wrn-16-8", image_size=32, width=1.0)
    assert row == narrow
    found = [models.cost(config, 32).parameters for config in (row, narrow, row)]
    assert found == [10_961_370, 175_066, 10_961_370]


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_never_run(zipped: bool, resnet20: models.Network, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = {**resnet20.state_dict(), "evil": Attack(canary)}
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    for name, data in {"w.pth": buffer.getvalue(), "bare.pt": pickle.dumps(Attack(canary))}.items():
        (tmp_path / name).write_bytes(data)
        assert_refused(resnet20, tmp_path / name)
    assert not canary.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert canary.exists()  # the attack would have worked


def test_pickles_are_read_in_a_process_of_their_own(
    resnet20: models.Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = create_model("resnet20")
    randomise(source)
    torch.save(source.state_dict(), tmp_path / "good.pt")
    expanded = {"fc.weight": torch.zeros(1).expand(10**12)}  # a file of 2 kB that stands for 4 TB
    torch.save(expanded, tmp_path / "bomb.pt")
    monkeypatch.setattr(torch, "load", None)  # in this process nothing is unpickled
    load_weights(resnet20, tmp_path / "good.pt")
    assert torch.equal(resnet20.get_parameter("fc.weight"), source.get_parameter("fc.weight"))
    assert_refused(resnet20, tmp_path / "bomb.pt", "claim 4,000,000,000,000 bytes")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "broke the process"),
        ("import time; time.sleep(60)", "within 1 s"),
        ('print(\'{"refused": "so"}\')', "was refused: so."),
        ("pass", "broke the process"),
        ("raise SystemExit(3)", "broke the process"),
    ],
)
def test_a_reader_that_breaks_is_a_refusal(
    body: str, message: str, resnet20: models.Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.pt").write_bytes(b"x")
    (tmp_path / "reader.py").write_text(body)
    monkeypatch.setattr(unpickle, "__file__", str(tmp_path / "reader.py"))
    monkeypatch.setattr(weights, "PATIENCE", 1.0 if "sleep" in body else 60.0)
    assert_refused(resnet20, tmp_path / "w.pt", message)


# --- Weights that others trained -----------------------------------------------------------------------------------


def external() -> Path:
    directory = os.environ.get("RESNETLAB_TEST_DATA")
    if not directory:
        pytest.skip("RESNETLAB_TEST_DATA does not name the directory with weights/ and data/cifar10/")
    return Path(directory)


def cifar_test_rows(directory: Path, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) as the external weights want them, and labels (N,)."""
    from PIL import Image
    from pyarrow import parquet

    (file,) = (directory / "data" / "cifar10").glob("test-*.parquet")
    table = parquet.read_table(file).slice(0, limit)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["img"].to_pylist()])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (torch.from_numpy(pixels).float() / 255 - mean) / std
    return images.permute(0, 3, 1, 2), torch.tensor(table["label"].to_pylist())


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_external_weights_give_their_authors_logits(name: str) -> None:
    directory = external()
    model = create_model(name).eval()
    load_weights(model, directory / "weights" / f"cifar_{name}.safetensors")
    images, _ = cifar_test_rows(directory, 64)
    with np.load(directory / "weights" / "reference_logits.npz") as reference, torch.no_grad():
        np.testing.assert_allclose(model(images).numpy(), reference[name], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "percent"), [("resnet20", 81.03), ("resnet56", 83.20)])
def test_external_weights_reach_their_accuracy(name: str, percent: float) -> None:
    directory = external()
    torch.set_num_threads(cores())
    model = create_model(name).eval()
    load_weights(model, directory / "weights" / f"cifar_{name}.safetensors")
    images, labels = cifar_test_rows(directory)
    assert len(images) == 10_000
    with torch.no_grad():
        found = torch.cat([model(images[i : i + 500]).argmax(1) for i in range(0, 10_000, 500)])
    torch.set_num_threads(1)
    assert float((found == labels).double().mean()) * 100 == pytest.approx(percent, abs=0.05)
