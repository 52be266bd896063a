"""Optimisers (Muon among them), learning-rate schedules as functions of the step, and the weight average."""

import math
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnetlab.config import OptimConfig
from resnetlab.errors import UsageError

REST_LR = 0.1
"""Learning rate of what Muon does not move, where the recipe names none."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration (Jordan): singular values end between about 0.7 and 1.2, in few iterations."""
ITERATIONS = 3
"""Of the same; airbench94 takes 3, Jordan 5."""
LEAST_AFTER_WARMUP = 5
"""A warm-up takes at most one part in so many of a run, so that a recipe also suits a run of very few epochs."""
LEAST_BEYOND_AVERAGE = 10
"""The same for the time constant of the weight average: a longer one would still hold the first, random weights."""


def build(config: OptimConfig, model: nn.Module, dtype: torch.dtype | None = None) -> torch.optim.Optimizer:
    """Make the optimiser. Its learning rate is set before every step by `set_learning_rate`.

    Args:
        config: Which optimiser, with its settings.
        model: The network that it moves.
        dtype: What Muon's large matrix products are computed in, if not in that of the weights.

    Raises:
        UsageError: A setting is not of this optimiser.
    """
    _spare_the_compiler()
    if config.momentum_form != "torch" and config.name != "sgd":
        raise UsageError(f"optim.momentum_form is a setting of optim.name=sgd; this recipe has {config.name}.")
    if config.name == "muon":
        return Muon(muon_groups(model, config), lr=config.lr, dtype=dtype)
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        sgd = CaffeSGD if config.momentum_form == "caffe" else torch.optim.SGD
        return sgd(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr)


def _spare_the_compiler() -> None:
    """Let optimisers be used without importing torch.compile's machinery, which takes 2 to 3 s and is not used.

    PyTorch wraps four of their methods so that a compiled function would leave them alone, and imports the compiler at
    the first call of each to do so, unless it finds what it is after already there. Where it looks elsewhere (another
    version), or the compiler is imported anyway, nothing changes.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        if inner := getattr(method, "__wrapped__", None):
            vars(inner).setdefault("__dynamo_disable", inner)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Split the parameters into those that decay and those that do not: biases and norms, where the recipe says so."""
    decay = [p for p in model.parameters() if p.requires_grad and (p.ndim > 1 or config.decay_norms)]
    rest = [p for p in model.parameters() if p.requires_grad and not (p.ndim > 1 or config.decay_norms)]
    groups: list[dict[str, object]] = [{"params": decay, "weight_decay": config.weight_decay}]
    return groups + ([{"params": rest, "weight_decay": 0.0}] if rest else [])


class CaffeSGD(torch.optim.SGD):
    """SGD as Caffe has it: the learning rate is inside the momentum, v ← m·v + lr·g, w ← w − v.

    With Nesterov momentum, w ← w − (m·v + lr·g) with the new v. At a constant rate it is `torch.optim.SGD`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients at hand; parameters without one stay."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad.add(p, alpha=group["weight_decay"]).mul_(group["lr"])
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.sub_(update.add_(velocity, alpha=group["momentum"]) if group["nesterov"] else velocity)


def muon_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Split the parameters into filters of convolutions, linear layers, and norms and biases, each with its rate.

    Raises:
        UsageError: The network has no batch norm, or filters that are to start as zero; Muon fixes their norm, which
            a batch norm has to undo.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise UsageError("optim.name=muon needs a network with batch norm after its convolutions. Try optim.name=sgd.")
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(p.ndim == 4 and not p.any() for p in trained):
        raise UsageError(
            "optim.name=muon keeps the norm of filters, so none can start as zero, as model.zero_init=true has them in "
            "pre-activated blocks. Try optim.name=sgd."
        )
    rest: dict[str, object] = {"momentum": config.momentum}
    kinds: list[tuple[list[nn.Parameter], float, dict[str, object]]] = [
        ([p for p in trained if p.ndim == 4], config.lr, {"momentum": config.filter_momentum, "muon": True}),
        ([p for p in trained if p.ndim == 2], config.head_lr or REST_LR, rest | {"weight_decay": config.weight_decay}),
        ([p for p in trained if p.ndim == 1], config.norm_lr or REST_LR, rest),
    ]
    return [{"params": found, "share": lr / config.lr, **more} for found, lr, more in kinds if found]


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``muon`` set, SGD with Nesterov momentum for the others.

    Muon steps along the nearest orthogonal matrix to the momentum (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon; this variant, with filters of fixed norm, is airbench94's, arXiv:2404.00498 and
    its repository). `torch.optim.Muon` takes matrices only.

    A filter bank (out, in, height, width) is read as a matrix of ``out`` rows. Before each step it is brought to the
    norm sqrt(out), which the batch norm behind it undoes; so ``lr`` is about the relative change a step makes, and
    there is no weight decay. Momentum and weight decay of the other groups are theirs. ``dtype`` is
    `orthogonal`'s.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, dtype: torch.dtype | None = None) -> None:
        super().__init__(groups, {"lr": lr, "momentum": 0.6, "weight_decay": 0.0, "muon": False})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients at hand; parameters without one stay."""
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(parameters, [p.grad for p in parameters], group)

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        if not group["muon"] and group["weight_decay"]:
            gradients = [g.add(p, alpha=group["weight_decay"]) for g, p in zip(gradients, parameters, strict=True)]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        updates = torch._foreach_add(gradients, buffers, alpha=group["momentum"])  # Nesterov
        if not group["muon"]:
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            return
        norms = torch._foreach_norm(parameters)
        torch._foreach_mul_(norms, [1 / math.sqrt(len(p)) for p in parameters])
        torch._foreach_div_(parameters, torch._foreach_clamp_min(norms, 1e-12))
        for batches in _batches(parameters):
            matrices = [_matrices([updates[i] for i in batch]) for batch in batches]
            for batch, turned in zip(batches, orthogonal(matrices, dtype=self.dtype), strict=True):
                filters = [parameters[i] for i in batch]
                count, channels, height, width = filters[0].shape
                directions = turned.view(len(batch), count, height, width, channels).permute(0, 1, 4, 2, 3).unbind()
                torch._foreach_add_(filters, directions, alpha=-group["lr"])


def _batches(parameters: list[Tensor]) -> list[list[list[int]]]:
    """Return which filters are computed in one, by index: first those whose matrices have as many rows, together.

    Of these, on a GPU, all of a shape are one batch, or launching the kernels would take longer.
    """
    rows = _alike(range(len(parameters)), lambda i: min(len(parameters[i]), parameters[i][0].numel()))
    if parameters[0].device.type == "cpu":
        return [[[index] for index in indices] for indices in rows]
    return [_alike(indices, lambda i: parameters[i].shape) for indices in rows]


def _alike(indices: Iterable[int], kind: Callable[[int], Hashable]) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for index in indices:
        found.setdefault(kind(index), []).append(index)
    return list(found.values())


def _matrices(filters: list[Tensor]) -> Tensor:
    """Return filters of one shape as matrices (..., out, height * width * in), a single one as (out, ...).

    The order of the columns does not matter; so they lie in memory (channels last), and nothing is copied.
    """
    rows = [bank.permute(0, 2, 3, 1) for bank in filters]
    return rows[0].flatten(1) if len(rows) == 1 else torch.stack(rows).flatten(2)


def orthogonal(
    matrices: Sequence[Tensor], iterations: int = ITERATIONS, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return matrices with the same singular vectors as ``matrices`` and singular values near 1.

    Args:
        matrices: (rows, columns) or (matrices, rows, columns) each, float32 or wider, any scale. The smaller of rows
            and columns is the same in all.
        iterations: Of Newton-Schulz: a fifth-degree odd polynomial of the matrix, which acts on its singular values. 1
            to 5; with more, rounding grows beyond bounds where singular values are near 0.
        dtype: What the two products with a matrix itself, the large ones, are computed in, if not in the matrix's own.
            In bfloat16 the result is off by less than 1 %. The polynomials, where rounding grows, keep it.
    """
    wide = [m.mT if m.shape[-2] > m.shape[-1] else m for m in matrices]
    xs = [(m / _norm(m)).to(dtype or m.dtype) for m in wide]
    # Each iteration is x ← p(x xᵀ) x. All those polynomials are of the first x xᵀ, which is small: they are multiplied
    # with one another, those of all matrices at once, and x with their product.
    grams = [(x @ x.mT).to(m.dtype).view(-1, x.shape[-2], x.shape[-2]) for x, m in zip(xs, wide, strict=True)]
    gram = torch.cat(grams)
    product = polynomial = _polynomial(gram)
    for _ in range(iterations - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    products = torch.split(product, [len(gram) for gram in grams])
    turned = [(p.to(x.dtype) @ x).to(m.dtype).view_as(x) for p, x, m in zip(products, xs, wide, strict=True)]
    return [y if y.shape == m.shape else y.mT for y, m in zip(turned, matrices, strict=True)]


def _polynomial(gram: Tensor) -> Tensor:
    """Return a + b gram + c gram², in two kernels instead of seven: a GPU waits for them to be launched."""
    a, b, c = COEFFICIENTS
    result: Tensor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


def _norm(matrix: Tensor) -> Tensor:
    """Return the norm of all values of a matrix, (..., 1, 1), and never 0."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    return norm.clamp_min(1e-12)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step alone, so that a resume cannot lose its place."""

    config: OptimConfig
    steps: int
    """Optimiser steps in the whole run."""
    steps_per_epoch: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of step ``step``, from 0."""
        c = self.config
        warmup = round(min(c.warmup_epochs * self.steps_per_epoch, self.steps // LEAST_AFTER_WARMUP))
        if step < warmup:
            if c.warmup_shape == "constant":
                return c.lr * c.warmup_factor
            return c.lr * (c.warmup_factor + (1 - c.warmup_factor) * (step + 1) / warmup)
        if c.schedule == "step":  # milestones are shares of the run, warm-up included (paper, section 4.2)
            return c.lr * c.gamma ** sum(step >= round(m * self.steps) for m in c.milestones)
        progress = (step - warmup) / max(1, self.steps - warmup)
        if c.schedule == "linear":
            return c.lr * (1 - progress)
        if c.schedule == "cosine":
            return c.lr * (1 + math.cos(math.pi * progress)) / 2
        return c.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate of this step, or its own share of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1.0)


def average(model: nn.Module, epochs: float, schedule: Schedule) -> AveragedModel:
    """Start an exponential moving average of weights and batch-norm statistics.

    Args:
        model: The network that trains.
        epochs: The average's time constant; its decay a step is ``exp(-1 / (epochs * steps in an epoch))``.
        schedule: How long the run is; the time constant is at most a tenth of it.
    """
    constant = min(epochs * schedule.steps_per_epoch, schedule.steps / LEAST_BEYOND_AVERAGE)
    decay = math.exp(-1 / max(1.0, constant))
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
