"""A GPU computes what a CPU computes, and recorded passes (`graphs`) what they compute as they come."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from resnetlab import bench, ceilings, ensemble, graphs, models, training
from resnetlab.config import DataConfig, ModelConfig, OptimConfig, Recipe
from resnetlab.loader import prepare
from resnetlab.metrics import StepRecord
from resnetlab.runtime import Precision, setup, undisturbed
from resnetlab.sources.dataset import Dataset
from resnetlab.training import Training
from test_ensemble import network
from test_training import finish, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CUDA = torch.device("cuda")
SGD = OptimConfig(name="sgd", lr=0.05, momentum=0.9, nesterov=True, schedule="cosine", average=0.5)
MUON = OptimConfig(name="muon", lr=0.05, norm_lr=0.05, head_lr=0.05, schedule="linear")


@pytest.fixture(autouse=True)
def own_switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(graphs, "AFTER", 2)
    with undisturbed():
        yield


def start(dataset: Dataset, device: str = "cuda", precision: str = "fp32", **changes: Any) -> Training:
    data = {"augment": ("crop:1", "flip"), "val": 0.2} | changes.pop("data", {})
    values: dict[str, Any] = {"epochs": 4, "batch_size": 16, "seed": 3, "optim": SGD}
    model = ModelConfig(name="resnet20", num_classes=3, image_size=8)
    chosen = Recipe(name="test", **({"model": model, "data": DataConfig(**data)} | values | changes))
    return training.start(chosen, prepare(chosen.data, dataset), setup(device, precision, deterministic=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optim", [SGD, MUON], ids=["sgd", "muon"])
def test_recorded_passes_compute_what_they_compute_as_they_come(
    tiny: Dataset, optim: OptimConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = finish(start(tiny, precision=precision, optim=optim))
    assert isinstance(recorded.network, graphs.Graphed) and len(recorded.network.recorded) == 1
    monkeypatch.setattr(graphs, "AFTER", 10**9)
    as_they_come = finish(start(tiny, precision=precision, optim=optim))
    assert isinstance(as_they_come.network, graphs.Graphed) and not as_they_come.network.recorded
    same(recorded, as_they_come)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_stopped_and_restored_it_ends_bit_for_bit_the_same(tiny: Dataset, stop_after: int) -> None:
    whole = finish(start(tiny, data={"skip_easy": 0.3}))
    t = start(tiny, data={"skip_easy": 0.3})
    for event in training.run(t):
        if t.step >= stop_after and isinstance(event, StepRecord):
            break
    again = start(tiny, data={"skip_easy": 0.3})
    training.restore(again, training.checkpoint(t))
    same(finish(again), whole)


@pytest.mark.parametrize("optim", [SGD, MUON], ids=["sgd", "muon"])
def test_it_computes_what_a_cpu_computes(tiny: Dataset, optim: OptimConfig) -> None:
    cpu, cuda = (finish(start(tiny, device, optim=optim, epochs=1)) for device in ("cpu", "cuda"))
    for a, b in zip(cpu.history, cuda.history, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=0.002)


def test_images_lie_on_the_gpu_and_the_network_made_for_speed_repeats_itself(tiny: Dataset) -> None:
    model = ModelConfig(name="fast-small", num_classes=3, image_size=16)
    data = {"size": 16, "grow": ("0:16", "0.5:24"), "skip_easy": 0.3}
    first, second = (finish(start(tiny, "cuda", "bf16", model=model, data=data, optim=MUON)) for _ in range(2))
    same(first, second)
    small = start(tiny, "cuda", "bf16")
    assert small.loader.store.pixels is not None and small.loader.store.pixels.is_cuda


@pytest.mark.slow
@pytest.mark.parametrize("name", list(models.ARCHITECTURES))
def test_every_network_can_be_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LARGEST", 10**9)
    model = models.build(ModelConfig(name=name, num_classes=10, image_size=64)).cuda()
    if not graphs.recordable(model, CUDA):
        pytest.skip("draws random numbers")
    network = graphs.Graphed(model, Precision("bf16", CUDA)).train()
    for _ in range(4):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            network(torch.rand(4, 3, 64, 64, device=CUDA)).float().sum().backward()
    assert len(network.recorded) == 1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_large_batches_and_networks_that_draw_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LARGEST", 31)
    network = graphs.Graphed(nn.Linear(4, 2).cuda(), Precision("fp32", CUDA))
    for _ in range(5):
        network(torch.rand(8, 4, device=CUDA))
    assert not network.recorded
    assert graphs.recordable(nn.Linear(1, 1), CUDA) and not graphs.recordable(nn.Dropout(), CUDA)


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    found = bench.measure("cuda")
    assert found.choice.precision in ("bf16", "fp16", "fp32") and all(speed.training > 0 for speed in found.speeds)


def test_a_soup_of_networks_is_made_of_images_on_the_gpu() -> None:
    one = network(1)
    images = [torch.randn(8, 3, 8, 8, device=CUDA)]
    made = ensemble.soup([one, one], ensemble.Material(val=list, batches=lambda: images))
    assert all(bool(value.isfinite().all()) for value in made.model.state_dict().values())
