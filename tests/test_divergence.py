"""Divergence is found where it began, never kept as a result, and can be replayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnetlab import divergence, training
from resnetlab.config import DataConfig, ModelConfig, OptimConfig, Recipe
from resnetlab.divergence import Diverged
from resnetlab.errors import ResNetLabError
from resnetlab.loader import prepare
from resnetlab.predict import predict_store
from resnetlab.runtime import setup
from resnetlab.sources.dataset import Dataset
from resnetlab.training import EpochEnd, Training

LAYER = "layer2.1.conv1"


def begin(tiny: Dataset, *, dropout: float = 0.0, **changes: Any) -> Training:
    chosen = Recipe(
        name="test",
        model=ModelConfig(name="resnet20", num_classes=3, image_size=8, dropout=dropout),
        data=DataConfig(val=0.2),
        optim=OptimConfig(name="sgd", lr=0.01),
        **{"epochs": 2, "batch_size": 16, "seed": 3, **changes},
    )
    return training.start(chosen, prepare(chosen.data, tiny), setup("cpu", "fp32"))


def layer(t: Training, name: str = LAYER) -> nn.Module:
    return t.model.get_submodule(name)


def diverge(t: Training) -> Diverged:
    with pytest.raises(Diverged) as caught:
        for _ in training.run(t):
            pass
    return caught.value


def spoil_output(t: Training, value: float) -> None:
    """Let a layer put out one bad value from the third step on."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if module.training and t.step >= 2:
            output = output.clone()
            output[0, 0, 0, 0] = value
        return output

    layer(t).register_forward_hook(hook)


def spoil_gradient(t: Training) -> None:
    """Let a layer's weight get a gradient that is not a number in the second step."""
    weight = next(layer(t).parameters())
    weight.register_hook(lambda gradient: gradient * (float("nan") if t.step == 1 else 1.0))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_puts_out_no_number_is_named_with_step_and_batch(tiny: Dataset, value: float) -> None:
    t = begin(tiny)
    spoil_output(t, value)
    before: dict[str, Tensor] = {}
    for _ in training.run(t):
        if t.step == 2:
            before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
            break
    error = diverge(t)
    assert (error.found.what, error.found.epoch, error.found.step, error.found.steps) == ("loss", 1, 3, 3)
    assert error.found.where == f"the output of the layer {LAYER}"
    assert len(error.found.images) == 16 and all(name in str(tiny_names(tiny)) for name in error.found.images)
    assert f"{LAYER}, on a batch of 16 images ({error.found.images[0]}" in str(error)
    assert all(torch.equal(p, before[name]) for name, p in t.model.named_parameters()), "the state before the step"
    assert not any(m._forward_hooks for name, m in t.model.named_modules() if name != LAYER), "hooks are removed"


def tiny_names(tiny: Dataset) -> list[str]:
    return [tiny.train.images.name(i) for i in range(len(tiny.train))]


def test_images_that_are_no_numbers_are_told_from_the_network(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    t = begin(tiny)
    object.__setattr__(t.loader.store, "preprocess", t.loader.store.preprocess.model_copy(update={"std": (0.0,) * 3}))
    assert "the images, before the network" in diverge(t).found.where


def test_a_bad_gradient_is_stopped_before_the_step_where_gradients_are_watched(tiny: Dataset) -> None:
    t = begin(tiny)
    t.watch_gradients = True
    spoil_gradient(t)
    found = diverge(t).found
    assert (found.what, found.value, found.step) == ("gradient", "nan", 2)
    assert found.where == f"the gradient of {LAYER}.weight"
    assert not divergence.non_finite(t.model.state_dict())


def test_elsewhere_it_is_noticed_in_the_next_step_and_the_step_before_is_named(tiny: Dataset) -> None:
    t = begin(tiny)
    spoil_gradient(t)
    found = diverge(t).found
    assert (found.what, found.step) == ("loss", 3)
    assert found.where == f"the weights {LAYER}.weight, made so by the step before"
    assert diverge(t).tensors is None, "the network before that step is gone"


def test_weights_that_are_no_numbers_are_never_kept(tiny: Dataset) -> None:
    t = begin(tiny)
    weight = next(layer(t).parameters())
    last = 2  # the epoch's last step, from 0
    weight.register_hook(lambda gradient: gradient * (float("nan") if t.step == last else 1.0))  # type: ignore[no-untyped-call]
    with pytest.raises(Diverged, match=r"The weights became nan in epoch 1, step 3 of 3.*that step"):
        for event in training.run(t):
            assert not isinstance(event, EpochEnd)
    with pytest.raises(Diverged):
        training.checkpoint(t)


def test_the_search_leaves_the_network_as_it_was(tiny: Dataset) -> None:
    t = begin(tiny)
    before = {name: tensor.clone() for name, tensor in t.model.state_dict().items()}
    batch = next(iter(t.loader.epoch(1)))
    t.model.train()
    where = divergence.origin(t.model, batch.images, lambda: t.model(batch.images))
    assert where == "the loss itself: all layers are finite"
    assert all(torch.equal(tensor, before[name]) for name, tensor in t.model.state_dict().items())


def test_from_the_command_line_to_the_replay(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("digits", "--model", "resnet20", "data.limit=160", "epochs=2", "batch_size=32", "optim.warmup_epochs=0")
    status, _, err = command("train", *words, "optim.lr=1e25", "--out", tmp_path / "run")
    assert status == 1 and f"--resume {tmp_path / 'run'} --debug-batch" in err, err
    assert not (tmp_path / "run" / divergence.FILE).exists()
    status, _, err = command("replay", tmp_path / "run")
    assert status == 1 and "--debug-batch" in err
    status, _, err = command("train", "--resume", tmp_path / "run", "--debug-batch")
    assert status == 1 and f"resnetlab replay {tmp_path / 'run'}" in err, err
    status, out, err = command("replay", tmp_path / "run")
    assert (status, err) == (0, "")
    assert "it began in the" in out and "layer3.2.conv2" in out and "norm of the gradient" in out
    (tmp_path / "run" / divergence.FILE).write_bytes(b"x" * 100)
    status, _, err = command("replay", tmp_path / "run")
    assert status == 1 and "is not as ResNetLab writes it" in err


def test_there_is_nothing_to_replay_where_nothing_was_kept(tmp_path: Path) -> None:
    with pytest.raises(ResNetLabError, match=r"There is no .*--debug-batch"):
        divergence.read(tmp_path)


def test_answers_that_are_no_numbers_are_said_where_all_weights_are(tiny: Dataset) -> None:
    """The loss of the last step is seen before its update."""
    t = begin(tiny)
    with torch.no_grad():
        layer(t, "fc").get_parameter("weight").fill_(3e38)
    assert not divergence.non_finite(t.model.state_dict()) and t.val is not None
    with pytest.raises(ResNetLabError, match=r"answers to 12 of 12 images are not numbers.*optim\.lr"):
        predict_store(t.model, t.val, t.runtime)


def test_a_replay_drops_what_the_run_dropped(tiny: Dataset) -> None:
    t = begin(tiny, dropout=0.5)
    t.watch_gradients = True
    spoil_gradient(t)
    losses = []
    for _ in training.run(t):
        before = t.loss_sum
        break
    with pytest.MonkeyPatch.context() as patch:
        sound = training.objective_sum

        def noted(*given: Any) -> Tensor:
            losses.append(float(sound(*given).detach()) / given[1].size)
            return sound(*given)

        patch.setattr(training, "objective_sum", noted)
        error = diverge(t)
    assert before > 0 and error.tensors is not None and len(losses) == 1
    torch.manual_seed(5)
    assert training.replay(t.recipe, t.runtime, error.tensors)[0] == pytest.approx(losses[0], rel=1e-5)
