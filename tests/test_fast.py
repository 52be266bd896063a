"""What the recipe `fast` is made of: Muon, the whitening stem, growing images, mirroring that alternates, views."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab import models, optim, session, training
from resnetlab.config import DataConfig, ModelConfig, OptimConfig, Recipe, override
from resnetlab.errors import UsageError
from resnetlab.loader import prepare
from resnetlab.models import fast
from resnetlab.models.fast import FAST, FastResNet, MirrorConv2d
from resnetlab.optim import Muon, orthogonal
from resnetlab.recipes import Facts, recipe
from resnetlab.runtime import setup
from resnetlab.sources.dataset import Dataset
from resnetlab.training import Training

MUON = OptimConfig(name="muon", lr=0.1, norm_lr=0.3, head_lr=0.02, momentum=0.85, weight_decay=1e-3)


def start(dataset: Dataset, **changes: Any) -> Training:
    values: dict[str, Any] = {
        "name": "test",
        "model": ModelConfig(name="fast-small", num_classes=3, image_size=16),
        "data": DataConfig(size=16, val=0, augment=("alternate",)),
        "optim": MUON,
        "epochs": 2,
        "batch_size": 20,
    }
    chosen = Recipe(**(values | changes))
    return training.start(chosen, prepare(chosen.data, dataset), setup("cpu", "fp32"))


@pytest.mark.parametrize("shape", [(32, 288), (64, 27), (10, 10)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_lengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, before, v = torch.linalg.svd(matrix, full_matrices=False)
    after = u.T @ orthogonal([matrix], iterations=5)[0] @ v.T
    assert torch.allclose(after, torch.diag(after.diagonal()), atol=1e-4)
    big = before > 0.1 * before.max()
    assert after.diagonal()[big].min() > 0.6
    assert after.diagonal().max() < 1.3


@pytest.mark.parametrize("shape", [(64, 576), (64, 27), (3, 32, 288)])
def test_orthogonal_with_products_in_bf16_is_off_by_less_than_a_hundredth(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (reference,), (rounded,) = orthogonal([matrix.double()]), orthogonal([matrix], dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - reference).norm() / reference.norm() < 1e-2
    assert (orthogonal([matrix])[0] - reference).norm() / reference.norm() < 1e-5


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_muon_rounds_its_products_in_runs_of_bf16_only(
    precision: str, dtype: torch.dtype | None, tiny: Dataset
) -> None:
    chosen = start(tiny).recipe
    begun = training.start(chosen, prepare(chosen.data, tiny), setup("cpu", precision))
    assert isinstance(begun.optimizer, Muon)
    assert begun.optimizer.dtype is dtype


def test_a_step_of_muon_turns_a_filter_bank_by_about_its_rate_whatever_the_gradient() -> None:
    filters = torch.nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = Muon([{"params": [filters], "muon": True, "momentum": 0.0}], lr=0.1)
    for scale in (1e-6, 1e6):
        before = filters.detach() * math.sqrt(16) / filters.detach().norm()
        filters.grad = scale * torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        assert 0.06 < (filters.detach() - before).norm() / before.norm() < 0.12


def test_matrices_of_as_many_rows_are_turned_together_as_each_alone() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(6, 36), torch.randn(40, 6), torch.randn(6, 7), torch.randn(3, 6, 9), torch.randn(6, 6)]
    alone = [orthogonal([matrix])[0] for matrix in matrices]
    for one, other in zip(alone, orthogonal(matrices), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_filters_of_a_shape_are_turned_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(together: bool) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = [(6, 4, 3, 3), (40, 4, 3, 3), (6, 4, 3, 3), (40, 4, 3, 3), (6, 6, 1, 1)]  # the second kind is tall
        filters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        if together:
            monkeypatch.setattr(optim, "_batches", lambda parameters: [[[0, 2]], [[1, 3]], [[4]]])
        optimizer = Muon([{"params": filters, "muon": True}], lr=0.1)
        for _ in range(3):
            for p in filters:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        return [p.detach() for p in filters]

    for alone, with_others in zip(turned(False), turned(True), strict=True):
        torch.testing.assert_close(alone, with_others, rtol=1e-4, atol=1e-5)


def test_what_muon_does_not_turn_moves_as_sgd_moves_it() -> None:
    start = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = Muon([{"params": [ours], "momentum": 0.8, "weight_decay": 0.01}], lr=0.1)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01)
    for step in range(4):
        gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_muon_gives_filters_norms_and_the_last_layer_their_own_rates_momentum_and_decay() -> None:
    network = models.create_model("resnet20")
    optimizer = optim.build(MUON.model_copy(update={"filter_momentum": 0.6}), network)
    optim.set_learning_rate(optimizer, 0.05)  # half of the highest
    names = ("lr", "momentum", "weight_decay")
    found = {group["params"][0].ndim: [group[name] for name in names] for group in optimizer.param_groups}
    assert found[4] == pytest.approx([0.05, 0.6, 0])
    assert found[2] == pytest.approx([0.01, 0.85, 1e-3])
    assert found[1] == pytest.approx([0.15, 0.85, 0])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


def test_muon_refuses_a_network_without_batch_norm() -> None:
    with pytest.raises(UsageError, match="batch norm"):
        optim.build(MUON, models.create_model("linear", image_size=8))
    for name in ("linear", "vgg16"):
        assert recipe("default", Facts(images=100, size=32, mirrors=True, model=name)).optim.name == "sgd"


def test_the_stem_whitens_the_patches_it_was_fitted_to() -> None:
    generator = torch.Generator().manual_seed(0)
    smooth = F.avg_pool2d(torch.randn(64, 3, 20, 20, generator=generator), 3, 1)  # neighbours alike, as in pictures
    network = FastResNet(ModelConfig(name="fast-small"), widths=(8, 8, 8), depths=(2, 2, 2))
    network.fit_stem(smooth)
    answers = network.stem(smooth).transpose(0, 1).flatten(1)[:12]
    covariance = answers @ answers.T / answers.shape[1]
    assert torch.allclose(covariance, torch.eye(12), atol=0.1)
    assert torch.allclose(network.stem.weight[:12], -network.stem.weight[12:])


def test_the_stem_is_the_same_however_many_patches_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images, stems = torch.randn(10, 3, 16, 16), []
    for patches in (10_000, 600):
        monkeypatch.setattr(fast, "PATCHES", patches)
        network = FastResNet(ModelConfig(name="fast-small"), widths=(8, 8, 8), depths=(2, 2, 2))
        network.fit_stem(images)
        stems.append(network.stem.weight[:12])
    torch.testing.assert_close(stems[0].abs(), stems[1].abs(), rtol=1e-5, atol=1e-5)


def test_what_hardly_varies_is_not_blown_up_by_the_stem() -> None:
    network = FastResNet(ModelConfig(name="fast-small"), widths=(8, 8, 8), depths=(2, 2, 2))
    network.fit_stem(torch.zeros(4, 3, 16, 16))
    lengths = network.stem.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1 / math.sqrt(5e-4)))


@pytest.mark.parametrize("name", ["fast-small", "mirror-small"])
def test_every_channel_is_handed_on_once_by_a_new_convolution(name: str) -> None:
    conv, maps = models.create_model(name).get_submodule("layer2.conv1"), torch.randn(2, 32, 6, 6)
    same = torch.isclose(conv(maps)[:, :, None], maps[:, None], atol=1e-3).all(4).all(3).all(0)
    assert same.sum(0).tolist() == [1] * 32


def test_new_networks_have_small_logits_and_quick_statistics() -> None:
    network = models.create_model("fast-small")
    assert {module.momentum for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.4}
    assert network.get_parameter("fc.weight").std().item() == pytest.approx(1 / 96, rel=0.2)


@pytest.mark.parametrize("name", list(FAST))
@pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 1), (32, 3), (64, 3)])
def test_the_networks_read_small_images_of_all_sizes(name: str, size: int, channels: int) -> None:
    network = models.create_model(name, num_classes=7, in_channels=channels, image_size=size).eval()
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", list(FAST))
@pytest.mark.parametrize("training", [True, False])
def test_to_some_networks_a_mirror_image_is_the_same_image(name: str, training: bool) -> None:
    torch.manual_seed(0)
    network = models.create_model(name, num_classes=7, image_size=32).train(training)
    images = torch.randn(16, 3, 32, 32)
    network.fit_stem(images)
    network, images = network.double(), images.double()
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))  # as after training: no filter is the identity
    found = []
    for shown in (images, images.flip(-1)):
        logits = network(shown)
        gradients = torch.autograd.grad(logits.square().sum(), [p for p in network.parameters() if p.requires_grad])
        found.append([logits.detach(), *gradients])
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]
    if models.ARCHITECTURES[name].mirrors_alike:
        assert max(errors) < 1e-9
    else:
        assert min(errors) > 1e-2


def test_mirror_convolutions_commute_with_mirroring_and_swapping_the_halves() -> None:
    torch.manual_seed(0)
    conv, x = MirrorConv2d(6, 8), torch.randn(2, 6, 5, 7)

    def mirrored(maps: Tensor) -> Tensor:
        return torch.cat(maps.flip(3).chunk(2, dim=1)[::-1], dim=1)

    torch.testing.assert_close(conv(mirrored(x)), mirrored(conv(x)))
    assert not torch.allclose(conv(x.flip(3)), conv(x).flip(3))
    assert conv(x).shape == (2, 8, 5, 7) and conv.weight.shape == (4, 6, 3, 3)


def test_a_network_that_mirrors_says_so_where_mirror_images_are_something_else(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    for name, said in (("mirror-medium", True), ("fast-small", False)):
        status, out, err = command("train", "digits", "--recipe", "fast", "--model", name, "--dry-run")
        assert status == 0, err
        assert ("mirror image for the same" in " ".join(out.split())) == said


def test_the_stem_is_fitted_when_training_starts_and_stays(tiny: Dataset) -> None:
    t = start(tiny)
    stem = t.model.state_dict()["stem.weight"].clone()
    for _ in training.run(t):
        pass
    assert stem.std() > 0
    assert torch.equal(t.model.state_dict()["stem.weight"], stem)
    assert t.history[-1].train_top1 > 0.8


def test_images_grow_during_the_run_and_are_scored_whole(tiny: Dataset) -> None:
    t = start(tiny, data=DataConfig(size=16, val=0.2, grow=("0:12", "0.25:16")), batch_size=12)

    def sizes(epoch: int, start: int = 0) -> list[int]:
        return [batch.images.shape[-1] for batch in t.loader.epoch(epoch, start)]

    assert (sizes(1), sizes(2)) == ([12, 12, 16, 16], [16] * 4)
    assert (sizes(1, start=1), sizes(2, start=3)) == ([12, 16, 16], [16])


def test_a_dry_run_reckons_with_images_that_grow_and_easy_ones_left_out() -> None:
    def cost(**data: Any) -> float:
        chosen = Recipe(name="test", model=ModelConfig(name="fast-small"), data=DataConfig(**data), epochs=1)
        return session.later_cost(chosen, 32)

    assert cost() == 1
    assert cost(skip_easy=0.4) == pytest.approx(0.5 + 0.5 * 0.6)
    assert cost(size=32, grow=("0:16", "0.25:32")) == pytest.approx(0.25 + 0.75 * 4)
    growing = 0.25 + 0.25 * 4 + 0.5 * 0.6 * 4
    assert cost(size=32, grow=("0:16", "0.25:32"), skip_easy=0.4) == pytest.approx(growing)


@pytest.mark.parametrize("grow", ["0:12,0:16", "0.5:12", "0:12,1:16", "0:2", "0:big", "0:16,nan:16", "early"])
def test_growth_that_makes_no_sense_is_refused(grow: str) -> None:
    with pytest.raises(UsageError, match="grow"):
        override(recipe("fast", Facts(images=100, size=32, mirrors=True)), [f"data.grow={grow}"])


def test_alternate_shows_each_image_as_it_is_and_mirrored_in_turn(tiny: Dataset) -> None:
    t = start(tiny)

    def images(epoch: int) -> dict[int, torch.Tensor]:
        batches = list(t.loader.epoch(epoch))
        return {int(i): x for b in batches if b.indices is not None for i, x in zip(b.indices, b.images, strict=True)}

    first, second, third = images(1), images(2), images(3)
    plain = t.loader.store.preprocess.normalize(t.loader.store.squares(torch.arange(60)))
    assert all(torch.equal(first[i], second[i].flip(-1)) and torch.equal(first[i], third[i]) for i in range(60))
    mirrored = sum(not torch.equal(first[i], plain[i]) for i in range(60))
    assert 15 < mirrored < 45


def test_the_recipe_scores_with_its_views_too(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, _, err = command(
        "train", "digits", "--recipe", "fast", "--model", "fast-small", "epochs=1", "data.limit=200", "views=shift",
        "--out", run,
    )  # fmt: skip
    assert status == 0, err
    scores = json.loads((run / "scores.json").read_text())
    assert set(scores) == {"val", "test", "val-shift", "test-shift"}
    status, out, _ = command("evaluate", run, "--views", "shift", "--json")
    assert json.loads(out)["top1"] == pytest.approx(scores["test-shift"]["top1"])
    status, _, err = command("train", "digits", "views=sideways", "--out", tmp_path / "other")
    assert status == 2
    assert "sideways" in err
