"""Variants of residual networks: exact costs, second implementations of each part, and that each of them trains."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from networks import hollow, randomise
from resnetlab import models
from resnetlab.config import ModelConfig
from resnetlab.errors import UsageError
from resnetlab.models import build, cost, count, create_model, describe, resolve
from resnetlab.models.complexity import ShapesOnly
from resnetlab.models.layers import BlurPool, DropPath, GhostBatchNorm, PaddedIdentity, SqueezeExcitation
from resnetlab.models.resnet import BasicBlock, Block, Bottleneck, ResNet

VARIANTS: dict[str, dict[str, Any]] = {
    "preact": {"preact": True},
    "preact, stem with norm": {"preact": True, "stem_norm": True, "shortcut_norm": True},
    "preact, plain": {"preact": True, "shortcut": "none"},
    "preact, all projections": {"preact": True, "shortcut": "C"},
    "wide": {"width": 2.0},
    "narrow": {"width": 0.4},
    "deep stem": {"stem": "deep"},
    "D": {"stem": "deep", "shortcut_pool": True},
    "A, pooled": {"shortcut": "A", "shortcut_pool": True},
    "SE": {"se": 16},
    "SE, preact": {"se": 4, "preact": True},
    "drop path": {"drop_path": 0.5},
    "dropout": {"dropout": 0.3, "preact": True},
    "blur": {"blur": True, "stem": "imagenet"},
    "blur, A": {"blur": True, "shortcut": "A"},
    "blur, preact": {"blur": True, "preact": True},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": "silu", "preact": True},
    "last unit strides": {"stride_unit": "last"},
    "zeros at the end": {"shortcut": "A", "shortcut_pad": "end"},
    "no norm on projections": {"shortcut_norm": False},
    "norm after the sum": {"norm_place": "sum"},
    "ghost batches": {"norm_batch": 2},
    "biases": {"conv_bias": "all"},
    "everything": {"preact": True, "width": 1.5, "se": 8, "blur": True, "activation": "silu", "drop_path": 0.1,
                   "dropout": 0.1, "stem": "deep", "norm_batch": 4, "zero_init": True},
}  # fmt: skip
"""Settings beside each other; every one is built of basic blocks and of bottlenecks."""
GROUPED: dict[str, Any] = {"groups": 2, "base_width": 32}
CASES = [pytest.param(kind, fields, id=f"{kind}-{name}") for name, fields in VARIANTS.items()
         for kind in ("basic", "bottleneck")]  # fmt: skip
CASES += [pytest.param("bottleneck", GROUPED, id="grouped")]
CASES += [pytest.param("bottleneck", {**GROUPED, "preact": True, "se": 4}, id="grouped, preact, SE")]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def small(kind: str, fields: dict[str, Any]) -> ResNet:
    """Build a network of three stages of two blocks, 8, 16 and 32 channels wide."""
    block = BasicBlock if kind == "basic" else Bottleneck
    name = {"basic": "resnet18", "bottleneck": "resnet50"}[kind]
    config = resolve(ModelConfig(name=name, num_classes=3, image_size=16, **fields))
    return ResNet(config, block, (2, 2, 2), (8, 16, 32))


# --- Costs ---------------------------------------------------------------------------------------------------------

CIFAR_ROWS = [  # parameters and multiply-adds, our layers
    ("preresnet20", 269_722, 40_551_040, 20),
    ("preresnet56", 853_018, 125_485_696, 56),
    ("preresnet110", 1_727_962, 252_887_680, 110),
    ("preresnet164", 1_703_258, 247_646_720, 164),
    ("preresnet1001", 10_327_706, 1_490_995_712, 1001),
    ("wrn-16-8", 10_961_370, 1_548_145_664, 14),
    ("wrn-28-10", 36_479_194, 5_243_328_768, 26),
    ("wrn-40-4", 8_949_210, 1_298_582_016, 38),
    ("resnext29_8x64d", 34_426_698, 5_387_266_048, 29),
    ("resnext29_16x64d", 68_155_210, 10_688_866_304, 29),
]
FIELD_COSTS = [  # image size, parameters and 10⁹ multiply-adds of other implementations
    ("resnet50", {"se": 16}, 224, 28_088_024, 4.092),  # timm seresnet50
    ("resnet50", {"stem": "deep", "shortcut_pool": True}, 224, 25_576_264, 4.329),  # timm resnet50d
    ("resnet18", {"preact": True}, 32, 11_171_146 + 1_024, 0.555),  # kuangliu PreActResNet18, which has no last norm
    ("resnext29_8x64d", {"groups": 2}, 32, 9_128_778 + 1_536, 1.411),  # kuangliu ResNeXt29 2x64d, whose stem is 1×1
    ("resnet50", {"conv_bias": "all"}, 224, 25_583_592, 4.089),  # Keras, trainable
]


@pytest.mark.parametrize(("name", "parameters", "macs", "layers"), CIFAR_ROWS)
def test_cifar_rows(name: str, parameters: int, macs: int, layers: int) -> None:
    row = describe(name)
    assert (row.parameters, row.macs, row.layers) == (parameters, macs, layers)


@pytest.mark.parametrize(("name", "fields", "size", "parameters", "gmacs"), FIELD_COSTS)
def test_fields_cost_what_they_cost_elsewhere(
    name: str, fields: dict[str, Any], size: int, parameters: int, gmacs: float
) -> None:
    classes = 1000 if size == 224 else 10
    found = cost(ModelConfig(name=name, num_classes=classes, image_size=size, **fields), size)
    assert found.parameters == parameters
    assert found.macs / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_macs_agree_with_pytorchs_own_counter(kind: str, fields: dict[str, Any]) -> None:
    model = small(kind, fields).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 16, 16))
    assert count(model, 16).macs * 2 == counter.get_total_flops()


ROWS = ("preresnet20", "preresnet164", "wrn-16-8", "resnext29_8x64d", "wide_resnet50_2", "resnext50_32x4d")


@pytest.mark.parametrize("name", ROWS)
def test_macs_of_rows_agree_with_pytorchs_own_counter(name: str) -> None:
    model = hollow(name, image_size=32).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device="meta"))
    assert count(model, 32).macs * 2 == counter.get_total_flops()


# --- Every variant is a whole network --------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [*VARIANTS.values(), GROUPED], ids=[*VARIANTS, "grouped"])
def test_variants_learn(fields: dict[str, Any]) -> None:
    model = small("bottleneck", fields)
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    images += labels[:, None, None, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        losses.append(float(loss.detach()))
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
    assert min(losses[-4:]) < 0.8 * losses[0]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_variants_keep_their_meaning_through_json_and_weights(kind: str, fields: dict[str, Any]) -> None:
    model = small(kind, fields)
    randomise(model)
    config = ModelConfig.model_validate_json(model.config.model_dump_json())
    again = ResNet(config, BasicBlock if kind == "basic" else Bottleneck, (2, 2, 2), (8, 16, 32))
    assert repr(again) == repr(model)
    assert resolve(again.config) == model.config
    models.load_state(again, model.state_dict(), "the test")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_variants_read_odd_sizes(kind: str, fields: dict[str, Any]) -> None:
    model = small(kind, fields).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, 17, 17))
        assert features.shape[1] == list(model.stage_channels.values())[-1]
        assert bool(model.forward_head(features).isfinite().all())


def test_old_descriptions_still_build_the_same_network() -> None:
    old = '{"name": "resnet18", "num_classes": 10, "in_channels": 3, "image_size": 32, "stem": "small", "stem_relu": '
    old += 'true, "shortcut": "B", "stride_on": "3x3", "zero_init": false, "init": "he"}'
    with ShapesOnly():
        model = build(ModelConfig.model_validate_json(old))
    assert model.config == hollow("resnet18", num_classes=10, image_size=32).config


# --- Pre-activation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_preactivation_is_norm_activation_convolution_and_a_bare_sum(kind: str) -> None:
    model = small(kind, {"preact": True}).eval()
    randomise(model)
    for name, stride in (("layer2.0", 2), ("layer2.1", 1)):
        block = model.get_submodule(name)
        assert isinstance(block, Block)
        convs, norms = block.layers()
        x = torch.randn(2, convs[0].in_channels, 6, 6)
        active = y = F.relu(norms[0](x))
        for conv, norm in zip(convs[:-1], norms[1:], strict=True):
            y = F.relu(norm(conv(y)))
        y = convs[-1](y)
        assert block.downsample is not None
        expected = y + (x if stride == 1 else block.downsample(active))
        torch.testing.assert_close(block(x), expected)
        assert bool((block(x) < 0).any())


def test_preactivated_networks_end_with_norm_and_activation() -> None:
    model = small("basic", {"preact": True}).eval()
    randomise(model)
    images = torch.randn(2, 3, 16, 16)
    stages, features = model.stages(images), model.forward_features(images)
    assert isinstance(model.norm, nn.Sequential)
    torch.testing.assert_close(features, F.relu(model.norm[0](stages["layer3"])))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_preactivated_blocks_can_start_as_the_identity_and_still_learn(kind: str) -> None:
    model = small(kind, {"preact": True, "zero_init": True})
    block = model.get_submodule("layer1.1")
    x = torch.randn(2, 8 if kind == "basic" else 32, 4, 4)
    assert torch.equal(block(x), x)
    torch.autograd.backward(block(x).square().sum())
    last = block.get_parameter("conv2.weight" if kind == "basic" else "conv3.weight")
    assert last.grad is not None and bool(last.grad.any())


# --- Width, groups ---------------------------------------------------------------------------------------------------


def test_width_multiplies_the_stages_and_narrows_the_stem() -> None:
    for width, stem, stages in ((4, 16, (64, 128, 256)), (0.5, 8, (8, 16, 32)), (1, 16, (16, 32, 64))):
        model = hollow("resnet20", width=width)
        assert tuple(model.stage_channels.values()) == stages
        assert model.get_parameter("conv1.weight").shape == (stem, 3, 3, 3)


def test_groups_and_base_width_are_the_3x3s_alone() -> None:
    block = hollow("resnext50_32x4d").get_submodule("layer1.0")
    assert isinstance(block, Bottleneck)
    assert [(c.in_channels, c.out_channels, c.groups) for c in block.layers()[0]] == [
        (64, 128, 1),
        (128, 128, 32),
        (128, 256, 1),
    ]
    with pytest.raises(UsageError, match="bottleneck"):
        create_model("resnet18", groups=2)
    with pytest.raises(UsageError, match="bottleneck"):
        create_model("resnet20", base_width=32)


# --- Parts against second implementations ----------------------------------------------------------------------------


def test_squeeze_and_excitation_is_torchvisions() -> None:
    ops = pytest.importorskip("torchvision.ops")
    ours, theirs = SqueezeExcitation(32, 8), ops.SqueezeExcitation(32, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_stochastic_depth_is_torchvisions() -> None:
    ops = pytest.importorskip("torchvision.ops")
    x = torch.randn(64, 3, 2, 2)
    torch.manual_seed(1)
    ours = DropPath(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(ours, ops.stochastic_depth(x, 0.3, "row"))
    dropped = (ours == 0).flatten(1).all(1)
    assert 5 < int(dropped.sum()) < 35
    torch.testing.assert_close(ours[~dropped], x[~dropped] / 0.7)
    assert DropPath(0.3).eval()(x) is x


def test_stochastic_depth_grows_linearly() -> None:
    model = hollow("resnet20", drop_path=0.45)
    found = [module.probability for module in model.modules() if isinstance(module, DropPath)]
    assert found == pytest.approx([0.05 * number for number in range(1, 10)])


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("preact", [False, True])
def test_dropout_is_before_the_last_convolution_of_a_block(kind: str, preact: bool) -> None:
    block = small(kind, {"dropout": 0.3, "preact": preact, "activation": "silu"}).get_submodule("layer1.1")
    assert isinstance(block, Block)
    convs, _ = block.layers()
    zeros: list[float] = []
    convs[-1].register_forward_pre_hook(lambda _m, args: zeros.append(float((args[0] == 0).float().mean())))
    for training in (True, False):
        block.train(training)(torch.randn(8, convs[0].in_channels, 8, 8))
    assert zeros == pytest.approx([0.3, 0], abs=0.05)


def test_a_dropped_branch_leaves_the_shortcut() -> None:
    block = small("basic", {"drop_path": 0.9}).get_submodule("layer3.1")
    x = torch.rand(40, 32, 2, 2)
    same = (block(x) == x).flatten(1).all(1)
    assert 28 <= int(same.sum()) < 40


def test_blur_is_a_binomial_filter_on_each_channel() -> None:
    x = torch.randn(2, 3, 8, 8)
    weights = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    blurred = BlurPool(3)(x)
    torch.testing.assert_close(blurred[:, :, 1, 2], (x[:, :, 1:4, 3:6] * weights).sum((2, 3)))
    assert blurred.shape == (2, 3, 4, 4)
    assert BlurPool(3)(x[:, :, :5, :7]).shape == (2, 3, 3, 4)
    torch.testing.assert_close(BlurPool(3)(torch.ones(1, 3, 6, 6)), torch.ones(1, 3, 3, 3))


def test_blur_replaces_every_stride_but_the_stems() -> None:
    for name, blurs in (("resnet50", 1 + 3 * 2), ("resnet20", 2 * 2)):
        model = hollow(name, blur=True)
        assert sum(isinstance(module, BlurPool) for module in model.modules()) == blurs
        strides = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d) and 2 in (m.stride, *(
            m.stride if isinstance(m.stride, tuple) else ()))]  # fmt: skip
        assert strides == (["conv1"] if model.config.stem == "imagenet" else [])
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in hollow(name).parameters())


def test_blur_makes_features_move_less_when_the_image_moves() -> None:
    """The claim of arXiv:1904.11486, on untrained networks: the mean feature changes less under a shift of a pixel."""
    change = {}
    for blur in (False, True):
        torch.manual_seed(3)
        model = create_model("resnet20", blur=blur)
        x = F.interpolate(torch.randn(16, 3, 10, 10), 40, mode="bicubic")
        with torch.no_grad():
            a, b = (model.forward_features(x[..., i : i + 32]).mean((2, 3)) for i in (3, 4))
        change[blur] = float((a - b).norm() / a.norm())
    assert change[True] < 0.8 * change[False]


def test_ghost_batches_are_batch_norms_side_by_side() -> None:
    ghost, x = GhostBatchNorm(3, 1e-5, 0.1, size=4), torch.randn(11, 3, 5, 5) * 2 + 1
    randomise(ghost)
    mean, var = ghost.running_mean, ghost.running_var
    assert mean is not None and var is not None
    before, parts = (mean.clone(), var.clone()), (x[:6], x[6:])  # two parts of at least 4
    expected = [F.batch_norm(p, None, None, ghost.weight, ghost.bias, True) for p in parts]
    torch.testing.assert_close(ghost(x), torch.cat(expected))
    means = torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0)
    variances = torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0)
    torch.testing.assert_close(mean, 0.9 * before[0] + 0.1 * means)
    torch.testing.assert_close(var, 0.9 * before[1] + 0.1 * variances)
    torch.testing.assert_close(ghost.eval()(x), F.batch_norm(x, mean, var, ghost.weight, ghost.bias))


def test_a_ghost_batch_that_is_the_whole_batch_is_batch_norm() -> None:
    ghost, plain, x = GhostBatchNorm(3, 1e-5, 0.1, size=8), nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(ghost(x), plain(x))
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict())


# --- Activations, ResNet-D -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("gelu", nn.GELU), ("silu", nn.SiLU)])
@pytest.mark.parametrize("fields", [{}, {"preact": True, "stem": "deep"}])
def test_activation_replaces_every_relu(name: str, kind: type[nn.Module], fields: dict[str, Any]) -> None:
    relus = [n for n, m in hollow("resnet50", **fields).named_modules() if isinstance(m, nn.ReLU)]
    model = hollow("resnet50", activation=name, **fields)
    assert [n for n, m in model.named_modules() if isinstance(m, kind)] == relus
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())


def test_resnet_d() -> None:
    model = hollow("resnet50", stem="deep", shortcut_pool=True)
    convs = [m for m in model.get_submodule("conv1").modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [(32, 3, 2), (32, 3, 1), (64, 3, 1)]
    for stage in ("layer2", "layer3", "layer4"):
        pool, conv = (model.get_submodule(f"{stage}.0.downsample.{i}") for i in (0, 1))
        assert isinstance(pool, nn.AvgPool2d) and pool.kernel_size == 2
        assert isinstance(conv, nn.Conv2d) and conv.stride == (1, 1)
    pooled = small("basic", {"shortcut": "A", "shortcut_pool": True}).get_submodule("layer2.0.downsample")
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(pooled(x), PaddedIdentity(8, 16, 1)(F.avg_pool2d(x, 2)))


# --- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("plain18", {"drop_path": 0.2}, "drop_path leaves only"),
        ("resnet18", {"zero_init": True, "norm_place": "sum"}, "zero_init makes"),
        ("preresnet20", {"norm_place": "sum"}, "norm_place=sum"),
        ("resnet18", {"stem_norm": False}, "stem_norm=false"),
        ("resnet50", {"blur": True, "stride_on": "1x1"}, "leave stride_on out"),
        ("resnet50", {"blur": True, "shortcut_pool": True}, "leave shortcut_pool out"),
        ("resnet50", {"blur": True, "stem_pool": "ceil"}, "leave stem_pool out"),
        ("resnet18", {"drop_path": 1.0}, "drop_path: .*less than 1"),
        ("resnet18", {"width": 0}, "width: .*greater than 0"),
        ("resnet50", {"groups": 0}, "groups: .*greater than or equal to 1"),
        ("resnet18", {"activation": "tanh"}, "activation: .*'tanh'"),
    ],
)
def test_contradictions_are_explained(name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create_model(name, **fields)


def moved(field: str) -> Any:
    """Return another value of a setting than its default."""
    default = ModelConfig.model_fields[field].default
    others = {"stem": "deep", "shortcut": "C", "stride_on": "1x1", "init": "torch", "stem_pool": "ceil"}
    others |= {"conv_bias": "all", "activation": "gelu", "stride_unit": "last", "shortcut_pad": "end"}
    others |= {"norm_place": "sum"}
    if field in others:
        return others[field]
    return (not default) if isinstance(default, bool) else 0.5 if isinstance(default, float) else 3


@pytest.mark.parametrize("field", sorted({*ModelConfig.model_fields} - {"name", "num_classes", "in_channels"}))
def test_networks_to_compare_with_refuse_every_setting(field: str) -> None:
    if field == "image_size":
        return
    with pytest.raises(UsageError, match=f"no setting {field}"):
        create_model("vgg16", **{field: moved(field)})


def test_stages_of_a_variant_are_a_backbone() -> None:
    model = small("bottleneck", {"preact": True, "blur": True})
    outputs: dict[str, Tensor] = model.stages(torch.randn(2, 3, 16, 16))
    assert {n: (t.shape[1], t.shape[2]) for n, t in outputs.items()} == {
        "layer1": (32, 16),
        "layer2": (64, 8),
        "layer3": (128, 4),
    }
