"""When passes are recorded and what that leaves alone, with a stand-in for CUDA; what CUDA computes: test_cuda."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnetlab import graphs, models
from resnetlab.graphs import Graphed
from resnetlab.models.layers import DropPath
from resnetlab.runtime import Precision

CPU = torch.device("cpu")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Record by computing the passes, as CUDA does when it warms up; return the shapes that were recorded."""
    shapes: list[torch.Size] = []

    def record(network: nn.Module, sample: tuple[Tensor], **kind: Any) -> Callable[[Tensor], Tensor]:
        shapes.append(sample[0].shape)
        for _ in range(3):
            network(sample[0]).sum().backward()
        network.zero_grad()
        return network

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(graphs, "AFTER", 2)
    return shapes


def network() -> Graphed:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    return Graphed(model, Precision("fp32", CPU)).train()


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_each_shape_is_recorded_once_it_has_come_often(recordings: list[torch.Size]) -> None:
    graphed = network()
    for _ in range(2):
        graphed(images(4))
    assert not recordings
    for _ in range(3):
        graphed(images(4))
    graphed(images(6))
    assert recordings == [images(4).shape]
    for _ in range(3):
        graphed(images(6))
    assert recordings == [images(4).shape, images(6).shape]


def test_recording_leaves_results_and_statistics_alone(recordings: list[torch.Size]) -> None:
    graphed, plain = network(), network().model
    for seed in range(5):
        assert torch.equal(graphed(images(4, seed)), plain(images(4, seed)))
    assert recordings
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, graphed.model.state_dict()[name]), name


def test_scoring_and_large_batches_are_not_recorded(
    recordings: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphed = network()
    for _ in range(5):
        graphed.eval()(images(4))
    monkeypatch.setattr(graphs, "LARGEST", images(4).numel() - 1)
    for _ in range(5):
        graphed.train()(images(4))
    assert not recordings


def test_only_a_gpu_gains_and_only_where_nothing_is_drawn() -> None:
    cuda = torch.device("cuda")
    plain, dropping = models.create_model("resnet20"), models.create_model("resnet20", drop_path=0.1)
    assert any(isinstance(module, DropPath) for module in dropping.modules())
    assert graphs.recordable(plain, cuda) and not graphs.recordable(plain, CPU)
    assert not graphs.recordable(dropping, cuda) and not graphs.recordable(nn.Sequential(nn.Dropout()), cuda)
