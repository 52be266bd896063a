"""When a loss, a gradient or a weight is no longer a number: where it began, and the batch, kept to be replayed.

Nothing here costs a healthy run anything: the search recomputes the one bad batch, with hooks, after the fact.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from resnetlab.errors import ResNetLabError
from resnetlab.files import write_atomic

FILE = "diverged.safetensors"
"""In the run directory: the network before the bad step, and the batch, as tensors; what is known of it, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was no longer a number, when, where it began, and on which batch."""

    what: str
    """``loss``, ``gradient`` or ``weights``."""
    value: str
    """``nan`` or ``inf``."""
    where: str
    """The layer it began in, in words."""
    epoch: int
    step: int
    """In the epoch, from 1."""
    steps: int
    lr: float
    images: tuple[str, ...]
    """Names of the batch's images (of this process's share of it)."""

    def __str__(self) -> str:
        names = ", ".join(self.images[:3]) + (", ..." if len(self.images) > 3 else "")
        became = "The weights became" if self.what == "weights" else f"The {self.what} became"
        return (
            f"{became} {self.value} in epoch {self.epoch}, step {self.step} of {self.steps}, at learning rate "
            f"{self.lr:g}: it began in {self.where}, on a batch of {len(self.images)} images ({names})."
        )


class Diverged(ResNetLabError):
    """The loss, a gradient or a weight is no longer a finite number."""

    def __init__(self, found: Finding, tensors: dict[str, Tensor] | None = None, process: int = 0) -> None:
        advice = "Try a lower rate (optim.lr=...), a longer warm-up (optim.warmup_epochs=...) or precision=fp32."
        super().__init__(f"{found} {advice}")
        self.found = found
        self.tensors = tensors
        """``model.*``, ``images`` and ``labels`` as they were before the step; None where they are gone."""
        self.process = process
        """Whose share of the batch it was found in, from 0; the others have tensors of their own share."""


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What a replayed batch did in one layer."""

    layer: str
    largest: float
    """The largest absolute value that it put out; NaN where one is."""
    not_finite: int
    """Values that it put out and that are NaN or infinite."""
    gradient: float | None
    """Norm of its weights' gradients; None where it has none, or the loss is not finite."""


def non_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity."""
    return [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def kind(tensor: Tensor) -> str:
    """Return ``nan`` or ``inf``, whichever a tensor holds, or an empty string."""
    return "nan" if bool(tensor.isnan().any()) else "inf" if bool(tensor.isinf().any()) else ""


def origin(model: nn.Module, images: Tensor, forward: Callable[[], object]) -> str:
    """Find where in a forward pass the first value came up that is not finite: in the images, a weight, or a layer.

    Args:
        model: The network; its buffers are as before afterwards.
        images: What the pass reads.
        forward: Computes it once more.
    """
    if kind(images):
        return f"the images, before the network ({kind(images)})"
    if bad := non_finite(dict(model.named_parameters())):
        return f"the weights {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
    for trace in trace_forward(model, forward):
        if trace.not_finite:
            return f"the output of the layer {trace.layer}"
    return "the loss itself: all layers are finite"


def gradient_origin(model: nn.Module) -> tuple[str, str] | None:
    """Return the value and the layer nearest to the loss whose gradient is not finite, or None where all are.

    A gradient flows from the loss back: what lies before that layer has only inherited it.
    """
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([g for _, g in gradients]))
    finite = torch.isfinite(norms)
    if bool(finite.all()):
        return None
    name, gradient = [pair for pair, good in zip(gradients, finite.tolist(), strict=True) if not good][-1]
    return kind(gradient) or "inf", f"the gradient of {name}"


def trace_forward(model: nn.Module, forward: Callable[[], object]) -> list[LayerTrace]:
    """Compute a pass and take down what every layer puts out, in the order of the computation."""
    traces: list[LayerTrace] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel():
                values = output.detach()
                bad = int((~torch.isfinite(values)).sum())
                traces.append(LayerTrace(layer=name, largest=float(values.abs().max()), not_finite=bad, gradient=None))

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if name and not any(True for _ in m.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with buffers_kept(model):
            forward()
    finally:
        for handle in hooks:
            handle.remove()
    return traces


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put batch norm's running statistics back after the block."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


def keep(directory: Path, error: Diverged) -> Path | None:
    """Write the bad batch and the network before it to ``diverged.safetensors``; None where they are gone."""
    if error.tensors is None:
        return None
    tensors = {name: t.detach().cpu().contiguous() for name, t in error.tensors.items()}
    facts = {**vars(error.found), "images": list(error.found.images)}
    path = directory / FILE
    write_atomic(path, serialize(tensors, metadata={"finding": json.dumps(facts)}))
    return path


def read(directory: Path) -> tuple[Finding, dict[str, Tensor]]:
    """Read what `keep` wrote.

    Raises:
        ResNetLabError: There is none, or it is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        raise ResNetLabError(
            f"There is no {path}. It is written when a run diverges under --debug-batch; a run that has diverged "
            f"already does so again with: resnetlab train --resume {directory} --debug-batch"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            facts = json.loads((file.metadata() or {})["finding"])
        return Finding(**{**facts, "images": tuple(facts["images"])}), tensors
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ResNetLabError(f"{path} is not as ResNetLab writes it ({error}).") from error


def replay(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor) -> tuple[float, list[LayerTrace]]:
    """Compute a kept batch once more, forward and back.

    Args:
        model: The network with the kept weights, on its device; in training mode.
        loss: Gives the network's mean loss on images.
        images: (B, C, size, size) as kept, on the same device.

    Returns:
        The loss, and what every layer put out and what its weights' gradient was, in the order of the computation.
    """
    values: list[Tensor] = []

    def both_ways() -> None:
        found = loss(images)
        values.append(found.detach())
        if math.isfinite(float(found.detach())):
            found.backward()  # type: ignore[no-untyped-call]

    traces = trace_forward(model, both_ways)
    value = float(values[0])
    if not math.isfinite(value):
        return value, traces
    norms = {name: _gradient_norm(module) for name, module in model.named_modules()}
    return value, [LayerTrace(**{**vars(t), "gradient": norms[t.layer]}) for t in traces]


def _gradient_norm(module: nn.Module) -> float | None:
    gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
    return float(torch.stack([g.norm() for g in gradients]).norm()) if gradients else None
