"""Training: `start` makes a run from a recipe, `run` moves it, `checkpoint` and `restore` hold it still.

The caller loops over `run`, draws, logs, saves or stops as it likes. All chance is keyed by (seed, epoch or step), and
all that moves is in a checkpoint, so a run that was killed and resumed ends bit for bit where it would have ended.
Nothing in this module can be given a test split.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn

from resnetlab import diagnosis, divergence, graphs, metrics, models, optim
from resnetlab.augment import pipeline
from resnetlab.checkpoint import Checkpoint
from resnetlab.config import Recipe
from resnetlab.divergence import Diverged as Diverged  # for those who train
from resnetlab.easy import Easy
from resnetlab.loader import Batch, Prepared, Store, TrainLoader
from resnetlab.metrics import EpochRecord, StepRecord, TimingRecord
from resnetlab.predict import predict_store
from resnetlab.runtime import Runtime, keyed_generator


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
    """``model``, or its wrapper that adds gradients up over the processes, or records the passes."""
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
    seconds: float = 0.0
    """Of this epoch's training so far, also before a stop."""
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    watch_gradients: bool = False
    """Look at every gradient before its step, at the price of a pass over them (``--debug-batch``)."""

    @property
    def result(self) -> nn.Module:
        """Return the network that is scored and kept: the weight average where there is one."""
        return self.average.module if self.average else self.model

    @property
    def seed(self) -> int:
        """Return what dropout is drawn from in the step that comes next, in this process."""
        return keyed_generator(self.recipe.seed, self.step, self.runtime.rank).initial_seed()


def start(recipe: Recipe, prepared: Prepared, runtime: Runtime) -> Training:
    """Build the network, the optimiser and the loader of a new run, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = models.build(recipe.model)
    runtime.place(model)
    loader = TrainLoader(
        store=prepared.train.near(runtime),
        pipeline=pipeline(recipe.data.augment),
        batch_size=recipe.batch_size,
        drop_last=recipe.data.drop_last,
        seed=recipe.seed,
        runtime=runtime,
    )
    share = recipe.data.skip_easy
    easy = Easy.of(len(prepared.train), share, recipe.epochs) if share else None
    loader = replace(loader, sizes=_growth(recipe, loader.steps), easy=easy)
    if size := min(model.stem_sample, len(prepared.train)):
        sample = prepared.train.squares(torch.linspace(0, len(prepared.train) - 1, size).long())
        model.fit_stem(prepared.preprocess.normalize(prepared.preprocess.crop(sample)))
    averaged = recipe.optim.average
    schedule = optim.Schedule(recipe.optim, steps=loader.steps * recipe.epochs, steps_per_epoch=loader.steps)
    return Training(
        recipe=recipe,
        runtime=runtime,
        loader=loader,
        val=prepared.val.near(runtime) if prepared.val else None,
        model=model,
        network=_network(model, runtime),
        optimizer=optim.build(recipe.optim, model, torch.bfloat16 if runtime.precision.name == "bf16" else None),
        schedule=schedule,
        average=optim.average(model, averaged, schedule) if averaged else None,
    )


def _network(model: nn.Module, runtime: Runtime) -> nn.Module:
    if runtime.world_size > 1:
        return DistributedDataParallel(model)
    return graphs.Graphed(model, runtime.precision) if graphs.recordable(model, runtime.device) else model


def _growth(recipe: Recipe, steps: int) -> Callable[[int], int] | None:
    """Return the size of the images as a function of the step, where the recipe lets them grow."""
    growth = [(round(share * steps * recipe.epochs), pixels) for share, pixels in recipe.data.growth]
    if not growth:
        return None
    return lambda step: next(pixels for first, pixels in reversed(growth) if step >= first)


def run(t: Training) -> Iterator[StepRecord | EpochEnd]:
    """Train to the end of the recipe, yielding after every step and every epoch.

    Raises:
        Diverged: The loss (or a gradient, where they are watched) became NaN or infinite, and the state is that before
            the step; or the weights of an epoch's last step did.
    """
    while len(t.history) < t.recipe.epochs:
        epoch, steps = len(t.history) + 1, t.loader.steps
        begun = time.perf_counter() - t.seconds
        t.network.train()
        for batch in t.loader.epoch(epoch, start=t.step - (epoch - 1) * steps):
            _step(t, batch, epoch)
            t.seconds = time.perf_counter() - begun
            yield StepRecord(
                epoch=epoch,
                step=t.step - (epoch - 1) * steps,
                steps=steps,
                images=t.images,
                loss=t.loss_sum / t.images,
                top1=t.correct / t.images,
            )
        t.seconds = time.perf_counter() - begun
        yield _finish_epoch(t, epoch)


def _step(t: Training, batch: Batch, epoch: int) -> None:
    """One optimiser step, and its share of the epoch's sums."""
    torch.manual_seed(t.seed)  # for dropout
    optim.set_learning_rate(t.optimizer, t.schedule(t.step))
    with t.runtime.precision.autocast():
        logits = t.network(batch.images)
        objective = objective_sum(logits, batch, t.recipe.label_smoothing) / batch.size
    with torch.no_grad():
        losses, hits = _judge(logits.float(), batch)
        loss, right = losses.sum(), hits.sum().float()  # Apple's GPUs have no float64
        sums = torch.stack([loss, right, objective])
    loss_sum, correct, check = t.runtime.sum(sums).tolist()
    if not math.isfinite(check):
        raise diagnosis.bad_loss(t, batch, objective.detach(), "nan" if math.isnan(check) else "inf")
    if t.loader.easy:
        own = losses if batch.weight >= 0.5 else torch.full_like(losses, torch.inf)  # what it shows is another's
        _note(t, t.loader.easy, batch, own, epoch)
    # DDP takes the mean over the processes, and each has summed only its own images of the batch.
    total, clip = objective * t.runtime.world_size, t.recipe.optim.clip
    t.runtime.precision.step(total, t.optimizer, clip, inspect=lambda: diagnosis.look_at_gradients(t, batch))
    if t.average:
        t.average.update_parameters(t.model)
    t.step += 1
    t.loss_sum += loss_sum
    t.correct += int(correct)
    t.images += batch.size


def _judge(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each image's loss, and whether its class is called; of two mixed that with the larger share. (B,) both."""
    losses, labels = F.cross_entropy(logits, batch.labels, reduction="none"), batch.labels
    if batch.weight != 1.0:
        other = batch.labels.roll(1)
        others = F.cross_entropy(logits, other, reduction="none")
        losses = batch.weight * losses + (1 - batch.weight) * others
        labels = labels if batch.weight >= 0.5 else other
    return losses, logits.argmax(1) == labels


def _note(t: Training, easy: Easy, batch: Batch, losses: Tensor, epoch: int) -> None:
    """Take down what each image of a batch cost, in every process that of all processes' images."""
    assert batch.everywhere is not None
    everyones = losses.new_zeros(len(batch.everywhere))
    everyones[t.runtime.rank :: t.runtime.world_size] = losses
    easy.note(batch.everywhere, t.runtime.sum(everyones), epoch)


def replay(recipe: Recipe, runtime: Runtime, kept: dict[str, Tensor]) -> tuple[float, list[divergence.LayerTrace]]:
    """Compute a batch that `divergence.keep` wrote once more; see `divergence.replay`."""
    model = runtime.place(models.build(recipe.model)).train()
    weights = {name.removeprefix("model."): tensor for name, tensor in kept.items() if name.startswith("model.")}
    models.load_state(model, {**model.state_dict(), **weights}, "the kept network")
    images = kept["images"].to(runtime.device).contiguous(memory_format=torch.channels_last)
    labels, weight, size = kept["labels"].to(runtime.device), float(kept["weight"]), int(kept["size"])
    batch = Batch(images=images, labels=labels, weight=weight, size=size)

    def loss(images: Tensor) -> Tensor:
        torch.manual_seed(int(kept.get("seed", torch.tensor(0))))  # for dropout
        with runtime.precision.autocast():
            return objective_sum(model(images), batch, recipe.label_smoothing) / batch.size

    return divergence.replay(model, loss, images)


def objective_sum(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Return the summed loss of a batch: cross-entropy with label smoothing, shared between two labels where mixed."""
    logits = logits.float()
    loss = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing)
    if batch.weight == 1.0:
        return loss
    other = F.cross_entropy(logits, batch.labels.roll(1), reduction="sum", label_smoothing=smoothing)
    return batch.weight * loss + (1 - batch.weight) * other


def _finish_epoch(t: Training, epoch: int) -> EpochEnd:
    """Score the validation split, add the record, and begin the sums anew."""
    diagnosis.require_finite(t)
    begun = time.perf_counter()
    _precise_norms(t, epoch)
    t.runtime.share_buffers(t.result)
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
        train_seconds=t.seconds,
        val_seconds=time.perf_counter() - begun,
        images_per_second=t.images / t.seconds,
    )
    t.history.append(record)
    t.loss_sum, t.correct, t.images, t.seconds = 0.0, 0, 0, 0.0
    is_best = t.recipe.keep == "last" or _better(t, record)
    if is_best:
        t.best_epoch = epoch
        if t.recipe.keep == "best":
            t.best_weights = {k: v.detach().cpu().clone() for k, v in t.result.state_dict().items()}
    return EpochEnd(record=record, timing=timing, is_best=is_best)


def _precise_norms(t: Training, epoch: int) -> None:
    """Where the recipe asks for it, replace running statistics of batch norm by averages over the last batches.

    Done where the epoch may become the result: after the last one, and after each where the best is kept.
    """
    if not t.recipe.precise_bn or not (t.recipe.keep == "best" or epoch == t.recipe.epochs):
        return
    whole = len(t.loader.store) // t.recipe.batch_size or t.loader.steps  # a rest of few images would count as much
    first = max(0, whole - t.recipe.precise_bn)
    batches = islice(t.loader.epoch(epoch, start=first), whole - first)
    torch.manual_seed(keyed_generator(t.recipe.seed, epoch, "precise_bn", t.runtime.rank).initial_seed())  # for dropout
    with t.runtime.precision.autocast():
        update_bn((batch.images for batch in batches), t.result)
    for module in t.result.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            t.runtime.sum(module.running_mean).div_(t.runtime.world_size)
            t.runtime.sum(module.running_var).div_(t.runtime.world_size)


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
    """Take down all that moves.

    Raises:
        Diverged: The weights are no longer finite; there is no use in going on from them.
    """
    diagnosis.require_finite(t)
    tensors = {f"model.{k}": v for k, v in t.model.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in t.best_weights.items()}
    if t.average:
        tensors |= {f"average.{k}": v for k, v in t.average.state_dict().items()}
    if t.loader.easy:
        tensors |= {"easy.loss": t.loader.easy.loss, "easy.epoch": t.loader.easy.epoch}
    for index, values in t.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    state = {
        "history": [asdict(record) for record in t.history],
        "loss_sum": t.loss_sum,
        "correct": t.correct,
        "images": t.images,
        "seconds": t.seconds,
        "best_epoch": t.best_epoch,
        "scaler": t.runtime.precision.scaler.state_dict(),
    }
    return Checkpoint(step=t.step, tensors={k: v.clone() for k, v in tensors.items()}, state=state)


def restore(t: Training, saved: Checkpoint) -> None:
    """Put a freshly started run into the state that `checkpoint` took down.

    Raises:
        ResNetLabError: The checkpoint belongs to another network.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "average": {}, "optimizer": {}, "easy": {}}
    for name, tensor in saved.tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    models.load_state(t.model, parts["model"], "the checkpoint")
    if t.average:
        t.average.load_state_dict(parts["average"])
    if t.loader.easy:
        t.loader.easy.loss.copy_(parts["easy"]["loss"])
        t.loader.easy.epoch.copy_(parts["easy"]["epoch"])
    optimizer = t.optimizer.state_dict()
    for name, tensor in parts["optimizer"].items():
        index, _, key = name.partition(".")
        optimizer["state"].setdefault(int(index), {})[key] = tensor
    t.optimizer.load_state_dict(optimizer)
    t.best_weights = parts["best"]
    t.step = saved.step
    t.history = [EpochRecord(**row) for row in saved.state["history"]]
    t.loss_sum, t.correct, t.images = saved.state["loss_sum"], saved.state["correct"], saved.state["images"]
    t.seconds = saved.state.get("seconds", 0.0)
    t.best_epoch = saved.state["best_epoch"]
    if saved.state["scaler"]:
        t.runtime.precision.scaler.load_state_dict(saved.state["scaler"])
