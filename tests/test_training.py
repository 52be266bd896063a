"""The loop: the right loss, the right steps, and nothing lost by stopping."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from resnetlab import divergence, failures, models, training
from resnetlab.config import DataConfig, ModelConfig, OptimConfig, Recipe
from resnetlab.errors import ResNetLabError
from resnetlab.loader import Batch, prepare
from resnetlab.metrics import EpochRecord, StepRecord
from resnetlab.native import functions
from resnetlab.runtime import setup
from resnetlab.sources.dataset import Dataset
from resnetlab.training import Diverged, EpochEnd, Training

SGD = OptimConfig(name="sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, schedule="cosine", average=0.5)
ADAM = OptimConfig(name="adam", lr=1e-3)


def recipe(optim: OptimConfig = SGD, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": ModelConfig(name="resnet20", num_classes=3, image_size=8),
        "data": DataConfig(augment=("crop:1", "flip"), val=0.2),
        "optim": optim,
        "epochs": 3,
        "batch_size": 16,
        "keep": "best",
        "seed": 3,
    }
    return Recipe(**(values | changes))


def start(dataset: Dataset, chosen: Recipe) -> Training:
    return training.start(chosen, prepare(chosen.data, dataset), setup("cpu", "fp32"))


def finish(t: Training) -> Training:
    for _ in training.run(t):
        pass
    return t


def same(a: Training, b: Training) -> None:
    assert a.history == b.history
    assert (a.step, a.best_epoch) == (b.step, b.best_epoch)
    for x, y in ((a.model, b.model), (a.result, b.result)):
        for name, tensor in x.state_dict().items():
            assert torch.equal(tensor, y.state_dict()[name]), name
    for name, tensor in training.result_weights(a).items():
        assert torch.equal(tensor, training.result_weights(b)[name]), name


def test_the_loop_is_the_textbook_loop(tiny: Dataset) -> None:
    chosen = recipe(OptimConfig(name="sgd", lr=0.05, momentum=0.9), data=DataConfig(val=0), keep="last", epochs=2)
    with functions.plain():  # as the textbook's are computed; another algorithm rounds otherwise
        t = finish(start(tiny, chosen))
    torch.manual_seed(3)
    model = models.build(chosen.model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, right, loader = 0.0, 0, start(tiny, chosen).loader
    for epoch in (1, 2):
        losses, right = 0.0, 0
        for batch in loader.epoch(epoch):
            logits = model(batch.images)
            loss = F.cross_entropy(logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses += loss.item() * len(batch.labels)
            right += int((logits.argmax(1) == batch.labels).sum())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(t.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert t.history[-1].train_loss == pytest.approx(losses / 60, rel=1e-5)
    assert t.history[-1].train_top1 == right / 60


def test_it_learns_colours(tiny: Dataset) -> None:
    t = finish(start(tiny, recipe(epochs=12)))
    best = t.history[t.best_epoch - 1]
    assert best.val_top1 is not None
    assert best.val_top1 >= 0.9
    assert t.history[-1].train_loss < 0.6 * t.history[0].train_loss


@pytest.mark.parametrize("optim", [SGD, ADAM, OptimConfig(name="adamw", lr=1e-3, weight_decay=0.01, clip=1.0)])
@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 8])
def test_stopped_anywhere_and_restored_it_ends_bit_for_bit_the_same(
    tiny: Dataset, optim: OptimConfig, stop_after: int
) -> None:
    whole = finish(start(tiny, recipe(optim)))
    t = start(tiny, recipe(optim))
    for event in training.run(t):
        if t.step >= stop_after and isinstance(event, StepRecord):
            break
    saved = training.checkpoint(t)
    again = start(tiny, recipe(optim))
    training.restore(again, saved)
    same(finish(again), whole)


def test_the_time_before_a_stop_counts(tiny: Dataset) -> None:
    t = start(tiny, recipe())
    for event in training.run(t):
        if isinstance(event, StepRecord) and t.step == 2:
            break
    saved = training.checkpoint(t)
    assert saved.state["seconds"] > 0
    again = start(tiny, recipe())
    training.restore(again, replace(saved, state={**saved.state, "seconds": 1000.0}))
    ends = [event.timing for event in training.run(again) if isinstance(event, EpochEnd)]
    assert ends[0].train_seconds > 1000 and ends[0].images_per_second < 1 < ends[1].images_per_second


def test_a_second_run_of_the_seed_is_the_same_and_another_seed_is_not(tiny: Dataset) -> None:
    first = finish(start(tiny, recipe()))
    same(first, finish(start(tiny, recipe())))
    assert finish(start(tiny, recipe(seed=4))).history != first.history


def test_records_count_steps_and_images(tiny: Dataset) -> None:
    events = list(training.run(start(tiny, recipe(epochs=2))))
    steps = [e for e in events if isinstance(e, StepRecord)]
    ends = [e for e in events if isinstance(e, EpochEnd)]
    assert [s.images for s in steps] == [16, 32, 48] * 2
    assert [(e.record.epoch, e.record.step) for e in ends] == [(1, 3), (2, 6)]
    assert all(e.timing.images_per_second > 0 for e in ends)


def test_the_best_epoch_is_kept_by_accuracy_then_loss(tiny: Dataset) -> None:
    t = finish(start(tiny, recipe(epochs=6)))

    def key(record: EpochRecord) -> tuple[float, float]:
        assert record.val_top1 is not None
        assert record.val_loss is not None
        return record.val_top1, -record.val_loss

    assert t.best_epoch == 1 + max(range(6), key=lambda i: key(t.history[i]))


def test_label_smoothing_and_mixing_are_soft_targets() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    batch = Batch(images=torch.empty(0), labels=labels, weight=0.7, size=5)
    soft = 0.7 * F.one_hot(labels, 4) + 0.3 * F.one_hot(labels.roll(1), 4)
    soft = 0.9 * soft + 0.1 / 4
    expected = -(soft * logits.log_softmax(1)).sum()
    torch.testing.assert_close(training.objective_sum(logits, batch, 0.1), expected)


def test_a_loss_that_is_not_a_number_stops_before_the_step(tiny: Dataset) -> None:
    t = start(tiny, recipe(OptimConfig(name="sgd", lr=0.1, momentum=0.9)))
    events: Iterator[object] = training.run(t)
    next(events)
    with torch.no_grad():
        next(t.model.parameters()).fill_(float("inf"))
    before = {k: v.clone() for k, v in t.model.state_dict().items() if "running" not in k and "num_" not in k}
    with pytest.raises(Diverged, match=r"epoch 1, step 2 of 3.*optim\.lr"):
        next(events)
    assert t.step == 1
    assert all(torch.equal(v, t.model.state_dict()[k]) for k, v in before.items())


def test_precision_bf16_follows_fp32(tiny: Dataset) -> None:
    chosen = recipe(epochs=2)
    exact = finish(start(tiny, chosen))
    prepared = prepare(chosen.data, tiny)
    mixed = finish(training.start(chosen, prepared, setup("cpu", "bf16")))
    for a, b in zip(exact.history, mixed.history, strict=True):
        assert b.train_loss == pytest.approx(a.train_loss, rel=0.15)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())


def test_an_operation_that_cannot_be_deterministic_is_named(tiny: Dataset, tmp_path: Path) -> None:
    said: list[str] = []
    words = "pool_backward_cuda does not have a deterministic implementation, but you set ..."
    t, match = start(tiny, recipe()), "PyTorch's pool_backward_cuda has no deterministic form"
    with pytest.raises(ResNetLabError, match=match), failures.explained(t, tmp_path, said.append):
        raise RuntimeError(words)
    assert "device=cpu" in said[0]


def test_a_batch_norm_with_one_value_is_explained(tiny: Dataset, tmp_path: Path) -> None:
    t = start(tiny, recipe())
    with pytest.raises(ResNetLabError, match="two values or more"), failures.explained(t, tmp_path, print):
        F.batch_norm(torch.zeros(1, 3, 1, 1), None, None, training=True)


def test_what_went_wrong_is_said_where_nothing_can_be_written_any_more(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ResNetLabError("No space left")

    monkeypatch.setattr(divergence, "keep", full)
    t = start(tiny, recipe())
    t.watch_gradients = True
    with torch.no_grad():
        next(t.model.parameters()).fill_(float("nan"))
    match = r"The loss became nan.*could not be kept: No space left"
    with pytest.raises(Diverged, match=match), failures.explained(t, tmp_path, full):
        finish(t)


def test_a_step_needs_no_double_precision(tiny: Dataset) -> None:
    """Apple's GPUs have none."""

    class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            assert not isinstance(result, torch.Tensor) or result.dtype is not torch.float64, func
            return result

    t = start(tiny, recipe())
    (batch, *_) = t.loader.epoch(1)
    with Seen():  # type: ignore[no-untyped-call]
        training._step(t, batch, 1)
    assert t.step == 1


@pytest.mark.parametrize("mix", ["mixup:1", "cutmix:1"])
def test_what_is_told_of_mixed_images_is_of_both_and_a_hit_of_the_larger(tiny: Dataset, mix: str) -> None:
    t = start(tiny, recipe(data=DataConfig(augment=(mix,), val=0), keep="last", epochs=8))
    weights = set()
    for batch in (next(iter(t.loader.epoch(epoch))) for epoch in range(1, 9)):
        weights.add(batch.weight >= 0.5)
        logits = torch.randn(len(batch.labels), 3)
        losses, hits = training._judge(logits, batch)
        torch.testing.assert_close(losses.sum(), training.objective_sum(logits, batch, 0.0))
        shown = batch.labels if batch.weight >= 0.5 else batch.labels.roll(1)
        assert torch.equal(hits, logits.argmax(1) == shown)
    assert weights == {True, False}
