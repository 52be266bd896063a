"""Schedules against closed forms and PyTorch's own; parameter groups; the weight average."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from resnetlab.config import OptimConfig
from resnetlab.optim import Schedule, average, build, parameter_groups, set_learning_rate

Make = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def torch_rates(make: Make, lr: float, steps: int) -> list[float]:
    """Return the rates that one of PyTorch's schedulers gives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(schedule: Schedule) -> list[float]:
    return [schedule(step) for step in range(schedule.steps)]


def test_cosine_is_torchs() -> None:
    ours = Schedule(OptimConfig(lr=0.3, schedule="cosine"), steps=50, steps_per_epoch=10)
    assert rates(ours) == pytest.approx(torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 50), 0.3, 50))


def test_cosine_after_a_warmup_is_torchs() -> None:
    config = OptimConfig(lr=0.3, schedule="cosine", warmup_epochs=1.5, warmup_factor=0.1)
    ours = rates(Schedule(config, steps=100, steps_per_epoch=10))
    warm = torch_rates(lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=15), 0.3, 16)
    assert ours[:15] == pytest.approx(warm[1:])  # the first step is one step up: none is wasted at the start's rate
    assert ours[15:] == pytest.approx(torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 85), 0.3, 85))


def test_steps_are_torchs() -> None:
    config = OptimConfig(lr=0.1, schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    ours = Schedule(config, steps=64, steps_per_epoch=8)
    assert rates(ours) == pytest.approx(torch_rates(lambda o: lr_scheduler.MultiStepLR(o, [32, 48]), 0.1, 64))


def test_linear_is_torchs() -> None:
    ours = Schedule(OptimConfig(lr=0.2, schedule="linear"), steps=40, steps_per_epoch=8)

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=40)

    assert rates(ours) == pytest.approx(torch_rates(make, 0.2, 40))


def test_constant_is_constant() -> None:
    assert set(rates(Schedule(OptimConfig(lr=0.7), steps=9, steps_per_epoch=3))) == {0.7}


def test_the_papers_schedule() -> None:
    """64k steps of CIFAR: 0.01 for 400, 0.1 to 32k, 0.01 to 48k, 0.001 to the end."""
    config = OptimConfig(
        lr=0.1,
        schedule="step",
        milestones=(0.5, 0.75),
        warmup_epochs=400 / 352,
        warmup_factor=0.1,
        warmup_shape="constant",
    )
    schedule = Schedule(config, steps=64_000, steps_per_epoch=352)
    for step, rate in [
        (0, 0.01),
        (399, 0.01),
        (400, 0.1),
        (31_999, 0.1),
        (32_000, 0.01),
        (47_999, 0.01),
        (48_000, 0.001),
        (63_999, 0.001),
    ]:
        assert schedule(step) == pytest.approx(rate), step


@pytest.mark.parametrize("kind", ["constant", "step", "linear", "cosine"])
@pytest.mark.parametrize("shape", ["linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.04, 1.0, 1000.0, 1e30])
def test_every_rate_is_positive_and_none_is_above_the_peak(kind: str, shape: str, steps: int, warmup: float) -> None:
    config = OptimConfig.model_validate(
        {"lr": 0.5, "schedule": kind, "milestones": (0.5,), "warmup_epochs": warmup, "warmup_shape": shape,
         "warmup_factor": 0.1}
    )  # fmt: skip
    got = rates(Schedule(config, steps=steps, steps_per_epoch=10))
    assert all(0 < rate <= 0.5 * (1 + 1e-12) for rate in got)
    if warmup == 1000 and shape == "constant" and steps > 1:  # longer than the run: a fifth of it
        assert got[: steps // 5] == pytest.approx([0.05] * (steps // 5))
        assert got[steps // 5] == pytest.approx(0.5)


def test_a_linear_warmup_from_nothing_reaches_the_peak_at_its_last_step() -> None:
    config = OptimConfig(lr=1.0, warmup_epochs=1)
    got = rates(Schedule(config, steps=20, steps_per_epoch=4))
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, *[1] * 16])


def test_rates_do_not_depend_on_what_was_asked_before() -> None:
    config = OptimConfig(schedule="cosine", warmup_epochs=1)
    a, b = (Schedule(config, steps=30, steps_per_epoch=10) for _ in range(2))
    assert [a(i) for i in range(30)] == [b(i) for i in reversed(range(30))][::-1]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    body.register_parameter("frozen", nn.Parameter(torch.zeros(3, 3), requires_grad=False))
    return body


@pytest.mark.parametrize("decay_norms", [True, False])
def test_groups_hold_every_trainable_parameter_once(model: nn.Module, decay_norms: bool) -> None:
    groups = parameter_groups(model, OptimConfig(weight_decay=0.01, decay_norms=decay_norms))
    held = [id(p) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}  # type: ignore[attr-defined]
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    everything = {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert names == (everything if decay_norms else {"0.weight", "3.weight"})


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_the_optimiser_is_the_one_asked_for(model: nn.Module, name: str, kind: type[torch.optim.Optimizer]) -> None:
    config = OptimConfig.model_validate({"name": name, "lr": 0.02, "nesterov": True, "weight_decay": 0.1})
    optimizer = build(config.model_copy(update={"decay_norms": False}), model)
    assert type(optimizer) is kind
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.02, 0.1), (0.02, 0.0)]
    set_learning_rate(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.5}


def test_sgd_steps_as_written_down(model: nn.Module) -> None:
    """v = 0.9 v + (g + 0.1 w); w = w - lr (g + 0.1 w + 0.9 v) with Nesterov's look ahead."""
    w = model.get_parameter("3.weight")
    optimizer = build(OptimConfig(lr=0.1, nesterov=True, weight_decay=0.1), model)
    expected, velocity = w.detach().clone(), torch.zeros_like(w)
    for step in range(3):
        w.grad = torch.full_like(w, float(step + 1))
        slope = w.grad + 0.1 * expected
        velocity = 0.9 * velocity + slope
        expected = expected - 0.1 * (slope + 0.9 * velocity)
        optimizer.step()
    assert torch.allclose(w, expected, atol=1e-6)


def test_nesterov_without_momentum_is_plain(model: nn.Module) -> None:
    assert build(OptimConfig(momentum=0, nesterov=True), model).param_groups[0]["nesterov"] is False


def long_run(steps_per_epoch: int) -> Schedule:
    return Schedule(OptimConfig(), steps=1000 * steps_per_epoch, steps_per_epoch=steps_per_epoch)


def test_the_averages_time_constant_is_at_most_a_tenth_of_the_run() -> None:
    model = nn.Linear(1, 1, bias=False)
    averaged = average(model, 100, Schedule(OptimConfig(), steps=40, steps_per_epoch=10))
    for value in (0.0, 1.0):
        with torch.no_grad():
            model.weight.fill_(value)
        averaged.update_parameters(model)
    assert averaged.module.get_parameter("weight").item() == pytest.approx(1 - math.exp(-1 / 4))


def test_the_average_is_the_closed_form_for_weights_and_statistics() -> None:
    class Scalar(nn.Module):
        statistic: torch.Tensor
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.0))
            self.register_buffer("statistic", torch.tensor(0.0))
            self.register_buffer("count", torch.tensor(0))

    model = Scalar()
    averaged = average(model, 0.5, long_run(steps_per_epoch=8))
    decay, expected = math.exp(-1 / 4), 0.0
    for step in range(1, 20):
        value = step**1.5
        with torch.no_grad():
            model.weight.fill_(value)
            model.statistic.fill_(-value)
            model.count.fill_(step)
        averaged.update_parameters(model)
        expected = value if step == 1 else decay * expected + (1 - decay) * value
        assert averaged.module.get_parameter("weight").item() == pytest.approx(expected, rel=1e-5)
        assert averaged.module.get_buffer("statistic").item() == pytest.approx(-expected, rel=1e-5)
    assert averaged.module.get_buffer("count").dtype == torch.int64
    assert model.weight.item() == pytest.approx(19**1.5)  # the network that trains is left alone


def test_the_average_has_the_networks_names_and_shapes(model: nn.Module) -> None:
    averaged = average(model, 1, long_run(steps_per_epoch=5))
    before = copy.deepcopy(model.state_dict())
    assert averaged.module.state_dict().keys() == before.keys()
    for _ in range(3):
        model(torch.randn(2, 3, 4, 4))
        averaged.update_parameters(model)
    assert not torch.equal(averaged.module.state_dict()["1.running_mean"], before["1.running_mean"])


def test_a_time_constant_below_a_step_still_averages(model: nn.Module) -> None:
    averaged = average(model, 0.001, long_run(steps_per_epoch=5))
    averaged.update_parameters(model)
    before = model.get_parameter("3.bias").detach().clone()
    with torch.no_grad():
        model.get_parameter("3.bias").add_(1)
    averaged.update_parameters(model)
    assert torch.allclose(averaged.module.get_parameter("3.bias"), before + 1 - math.exp(-1))
