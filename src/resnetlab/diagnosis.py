"""Why a run diverged: which step, which layer, which images. `training` asks; `divergence` searches."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resnetlab import divergence
from resnetlab.divergence import Diverged, Finding
from resnetlab.loader import Batch

if TYPE_CHECKING:
    from resnetlab.training import Training


def bad_loss(t: "Training", batch: Batch, share: Tensor, value: str) -> Diverged:
    """Explain a loss that is not finite, by computing the batch once more.

    Args:
        t: The run.
        batch: This process's share of the batch.
        share: What it has added to the loss; not finite in one of the processes or in several. The first of these
            finds out, and tells the others.
        value: ``nan`` or ``inf``, in all of them together.
    """

    def forward() -> None:
        torch.manual_seed(t.seed)
        with torch.no_grad(), t.runtime.precision.autocast():
            t.model(batch.images)

    if divergence.non_finite(dict(t.model.named_parameters())) and t.step:
        return _bad_weights(t, "loss", value, t.step)
    bad = t.runtime.each(not bool(share.isfinite()))
    process = bad.index(max(bad))
    where = divergence.origin(t.model, batch.images, forward) if process == t.runtime.rank else ""
    found = t.runtime.share(_finding(t, batch, "loss", value, where, t.step), process)
    return Diverged(found, _evidence(t, batch), process)


def _bad_weights(t: "Training", what: str, value: str, step: int) -> Diverged:
    """Explain weights that the last step has made NaN or infinite, by the batch of that step."""
    weights = divergence.non_finite(dict(t.model.named_parameters()))
    bad = weights or divergence.non_finite(t.model.state_dict())
    epoch, before = divmod(max(0, t.step - 1), t.loader.steps)
    batch = next(iter(t.loader.epoch(epoch + 1, start=before)))
    more = f" and {len(bad) - 1} before it" if len(bad) > 1 else ""  # a bad gradient spreads towards the input
    kind = "weights" if weights else "statistics"
    where = f"the {kind} {bad[-1]}{more}, made so by " + ("the step before" if step == t.step else "that step")
    return Diverged(_finding(t, batch, what, value, where, step), None if weights else _evidence(t, batch))


def look_at_gradients(t: "Training", batch: Batch) -> None:
    """Where they are watched, refuse gradients that are not finite before they reach the weights.

    Not under fp16: its scaler meets some by design, skips the step and lowers its scale.
    """
    if not t.watch_gradients or t.runtime.precision.scaler.is_enabled():
        return
    if found := divergence.gradient_origin(t.model):
        raise Diverged(_finding(t, batch, "gradient", *found, t.step), _evidence(t, batch))


def _finding(t: "Training", batch: Batch, what: str, value: str, where: str, step: int) -> Finding:
    epoch, index = divmod(step, t.loader.steps)
    name = t.loader.store.split.images.name
    images = () if batch.indices is None else tuple(str(name(i)) for i in batch.indices.tolist())
    return Finding(
        what=what,
        value=value,
        where=where,
        epoch=epoch + 1,
        step=index + 1,
        steps=t.loader.steps,
        lr=t.schedule(step),
        images=images,
    )


def _evidence(t: "Training", batch: Batch) -> dict[str, Tensor]:
    """Return what it takes to compute a batch once more: weights, what the network reads, what it should say."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in t.model.named_parameters()}
    numbers = {"weight": batch.weight, "size": batch.size, "seed": t.seed}
    tensors |= {name: torch.tensor(number) for name, number in numbers.items()}
    return tensors | {"images": batch.images, "labels": batch.labels}


def require_finite(t: "Training") -> None:
    """Make sure that nothing is kept of a network whose weights the last step has spoilt.

    Raises:
        Diverged: A weight or a statistic is NaN or infinite.
    """
    state = t.model.state_dict()
    if bad := divergence.non_finite(state):
        raise _bad_weights(t, "weights", divergence.kind(state[bad[0]]), max(0, t.step - 1))
