"""Training: `start` makes a run from a recipe, `run` moves it, `checkpoint` and `restore` hold it still.

The caller loops over `run`, draws, logs, saves or stops as it likes. All chance is keyed by (seed, epoch or step), and
all that moves is in a checkpoint, so a run that was killed and resumed ends bit for bit where it would have ended.
Nothing in this module can be given a test split.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from resnetlab import metrics, models, optim
from resnetlab.augment import pipeline
from resnetlab.checkpoint import Checkpoint
from resnetlab.config import Recipe
from resnetlab.errors import ResNetLabError
from resnetlab.loader import Batch, Prepared, Store, TrainLoader
from resnetlab.metrics import EpochRecord, StepRecord, TimingRecord
from resnetlab.predict import predict_store
from resnetlab.runtime import Runtime, keyed_generator


class Diverged(ResNetLabError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True, kw_only=True)
class EpochEnd:
    """An epoch is done and scored; `checkpoint` now would begin the next one."""

    record: EpochRecord
    timing: TimingRecord
    is_best: bool
    """Whether the weights of this epoch are, so far, the result of the run."""


@dataclass(kw_only=True)
class Training:
    """A run in motion."""

    recipe: Recipe
    runtime: Runtime
    loader: TrainLoader
    val: Store | None
    model: nn.Module
    network: nn.Module
    """``model``, or its wrapper that adds gradients up over the processes."""
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    average: AveragedModel | None
    step: int = 0
    """Optimiser steps done."""
    history: list[EpochRecord] = field(default_factory=list)
    loss_sum: float = 0.0
    """Of this epoch so far, over all processes' images."""
    correct: int = 0
    images: int = 0
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def result(self) -> nn.Module:
        """Return the network that is scored and kept: the weight average where there is one."""
        return self.average.module if self.average else self.model


def start(recipe: Recipe, prepared: Prepared, runtime: Runtime) -> Training:
    """Build the network, the optimiser and the loader of a new run, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = runtime.place(models.build(recipe.model))
    loader = TrainLoader(
        store=prepared.train,
        pipeline=pipeline(recipe.data.augment),
        batch_size=recipe.batch_size,
        drop_last=recipe.data.drop_last,
        seed=recipe.seed,
        runtime=runtime,
    )
    averaged = recipe.optim.average
    schedule = optim.Schedule(recipe.optim, steps=loader.steps * recipe.epochs, steps_per_epoch=loader.steps)
    return Training(
        recipe=recipe,
        runtime=runtime,
        loader=loader,
        val=prepared.val,
        model=model,
        network=DistributedDataParallel(model) if runtime.world_size > 1 else model,
        optimizer=optim.build(recipe.optim, model),
        schedule=schedule,
        average=optim.average(model, averaged, schedule) if averaged else None,
    )


def run(t: Training) -> Iterator[StepRecord | EpochEnd]:
    """Train to the end of the recipe, yielding after every step and every epoch.

    Raises:
        Diverged: The loss became NaN or infinite; the state is that before the step.
    """
    while len(t.history) < t.recipe.epochs:
        epoch, steps = len(t.history) + 1, t.loader.steps
        begun, seen = time.perf_counter(), t.images
        t.network.train()
        for batch in t.loader.epoch(epoch, start=t.step - (epoch - 1) * steps):
            _step(t, batch, epoch)
            yield StepRecord(
                epoch=epoch,
                step=t.step - (epoch - 1) * steps,
                steps=steps,
                images=t.images,
                loss=t.loss_sum / t.images,
                top1=t.correct / t.images,
            )
        train_seconds = time.perf_counter() - begun
        rate = (t.images - seen) / train_seconds
        yield _finish_epoch(t, epoch, train_seconds, rate)


def _step(t: Training, batch: Batch, epoch: int) -> None:
    """One optimiser step, and its share of the epoch's sums."""
    torch.manual_seed(keyed_generator(t.recipe.seed, t.step, t.runtime.rank).initial_seed())  # for dropout
    optim.set_learning_rate(t.optimizer, t.schedule(t.step))
    with t.runtime.precision.autocast():
        logits = t.network(batch.images)
        objective = objective_sum(logits, batch, t.recipe.label_smoothing) / batch.size
    with torch.no_grad():
        loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
        sums = torch.stack([loss.double(), (logits.argmax(1) == batch.labels).sum().double(), objective.double()])
    loss_sum, correct, check = t.runtime.sum(sums).tolist()
    if not math.isfinite(check):
        raise Diverged(
            f"The loss became {check} in epoch {epoch}, step {t.step - (epoch - 1) * t.loader.steps + 1} of "
            f"{t.loader.steps}, at learning rate {t.schedule(t.step):g}. The last good state is kept. Try a lower "
            "rate (optim.lr=...), a longer warm-up (optim.warmup_epochs=...) or precision=fp32."
        )
    # DDP takes the mean over the processes, and each has summed only its own images of the batch.
    t.runtime.precision.step(objective * t.runtime.world_size, t.optimizer, t.recipe.optim.clip)
    if t.average:
        t.average.update_parameters(t.model)
    t.step += 1
    t.loss_sum += loss_sum
    t.correct += int(correct)
    t.images += batch.size


def objective_sum(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Return the summed loss of a batch: cross-entropy with label smoothing, shared between two labels where mixed."""
    logits = logits.float()
    loss = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing)
    if batch.weight == 1.0:
        return loss
    other = F.cross_entropy(logits, batch.labels.roll(1), reduction="sum", label_smoothing=smoothing)
    return batch.weight * loss + (1 - batch.weight) * other


def _finish_epoch(t: Training, epoch: int, train_seconds: float, rate: float) -> EpochEnd:
    """Score the validation split, add the record, and begin the sums anew."""
    begun = time.perf_counter()
    loss = top1 = top5 = None
    if t.val is not None:
        predictions = predict_store(t.result, t.val, t.runtime)
        assert predictions.labels is not None
        loss = float(metrics.cross_entropy(predictions.logits, predictions.labels).mean())
        top1, top5 = metrics.top_k(predictions, 1), metrics.top_k(predictions, 5)
    record = EpochRecord(
        epoch=epoch,
        step=t.step,
        lr=t.schedule(t.step - 1),
        train_loss=t.loss_sum / t.images,
        train_top1=t.correct / t.images,
        val_loss=loss,
        val_top1=top1,
        val_top5=top5,
    )
    timing = TimingRecord(
        epoch=epoch,
        train_seconds=train_seconds,
        val_seconds=time.perf_counter() - begun,
        images_per_second=rate,
    )
    t.history.append(record)
    t.loss_sum, t.correct, t.images = 0.0, 0, 0
    is_best = t.recipe.keep == "last" or _better(t, record)
    if is_best:
        t.best_epoch = epoch
        if t.recipe.keep == "best":
            t.best_weights = {k: v.detach().cpu().clone() for k, v in t.result.state_dict().items()}
    return EpochEnd(record=record, timing=timing, is_best=is_best)


def _better(t: Training, record: EpochRecord) -> bool:
    """Whether an epoch beats the best so far on validation: by accuracy, then by loss."""
    if t.best_epoch == 0 or record.val_top1 is None or record.val_loss is None:
        return True
    best = t.history[t.best_epoch - 1]
    assert best.val_top1 is not None and best.val_loss is not None
    return (record.val_top1, -record.val_loss) > (best.val_top1, -best.val_loss)


def result_weights(t: Training) -> dict[str, Tensor]:
    """Return the weights that the run results in: the best epoch's, or the last's."""
    return t.best_weights or t.result.state_dict()


def checkpoint(t: Training) -> Checkpoint:
    """Take down all that moves."""
    tensors = {f"model.{k}": v for k, v in t.model.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in t.best_weights.items()}
    if t.average:
        tensors |= {f"average.{k}": v for k, v in t.average.state_dict().items()}
    for index, values in t.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    state = {
        "history": [asdict(record) for record in t.history],
        "loss_sum": t.loss_sum,
        "correct": t.correct,
        "images": t.images,
        "best_epoch": t.best_epoch,
        "scaler": t.runtime.precision.scaler.state_dict(),
    }
    return Checkpoint(step=t.step, tensors={k: v.clone() for k, v in tensors.items()}, state=state)


def restore(t: Training, saved: Checkpoint) -> None:
    """Put a freshly started run into the state that `checkpoint` took down.

    Raises:
        ResNetLabError: The checkpoint belongs to another network.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "average": {}, "optimizer": {}}
    for name, tensor in saved.tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    models.load_state(t.model, parts["model"], "the checkpoint")
    if t.average:
        t.average.load_state_dict(parts["average"])
    optimizer = t.optimizer.state_dict()
    for name, tensor in parts["optimizer"].items():
        index, _, key = name.partition(".")
        optimizer["state"].setdefault(int(index), {})[key] = tensor
    t.optimizer.load_state_dict(optimizer)
    t.best_weights = parts["best"]
    t.step = saved.step
    t.history = [EpochRecord(**row) for row in saved.state["history"]]
    t.loss_sum, t.correct, t.images = saved.state["loss_sum"], saved.state["correct"], saved.state["images"]
    t.best_epoch = saved.state["best_epoch"]
    if saved.state["scaler"]:
        t.runtime.precision.scaler.load_state_dict(saved.state["scaler"])
