"""Batch norm, shortcut and activation computed in one on a CPU, by `native/norm.cpp`.

They are bandwidth: one after the other, each reads and writes the whole array and keeps one for the backward pass. In
one, the backward pass computes once more what lies between (in the manner of In-Place ABN, arXiv:1712.02616). Results
differ from PyTorch's by rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnetlab.native import functions

NHWC = torch.channels_last
LEAST_SHARED = 2**15
"""Values from which on threads share the work; PyTorch has the same bound."""


class NativeBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that `norm_act` may compute together with what follows it; alone it is `nn.BatchNorm2d`."""


def adopt(model: nn.Module) -> None:
    """Let `norm_act` compute the batch norms of ``model`` together with what follows them, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = NativeBatchNorm2d


def norm_act(norm: nn.Module, act: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Return ``act(norm(x) + shortcut)``: (B, C, H, W) → the same.

    In one where the norm was adopted, it trains or no gradient is wanted, and no hook waits for what lies between; else
    one after the other.
    """
    if isinstance(norm, NativeBatchNorm2d) and (name := _suiting(norm, act, x, shortcut)):
        if not norm.training:
            return _evaluate(norm, x, shortcut, name)
        y, mean, variance = _NormAct.apply(x, shortcut, norm.weight, norm.bias, norm.eps, name)
        _note(norm, mean, variance, x.numel() // x.shape[1])
        return y  # type: ignore[no-any-return]
    out = norm(x)
    return act(out if shortcut is None else out + shortcut)  # type: ignore[no-any-return]


def _suiting(norm: nn.BatchNorm2d, act: nn.Module, x: Tensor, shortcut: Tensor | None) -> str | None:
    """Return the activation by which compiled functions that suit are called, if any do."""
    if norm.momentum is None or norm.running_mean is None or norm.running_mean.dtype != torch.float32:
        return None
    if functions.traced() or (not norm.training and torch.is_grad_enabled()):
        return None
    arrays = [x] if shortcut is None else [x, shortcut]
    if not functions.here(norm.running_mean, *arrays) or any(a.shape != x.shape or a.dtype != x.dtype for a in arrays):
        return None
    if x.ndim != 4 or x.shape[1] != norm.num_features or x.numel() <= x.shape[1]:  # these are PyTorch's to refuse
        return None
    if functions.watched(norm, act) or not all(a.is_contiguous(memory_format=NHWC) for a in arrays):
        return None
    name, precision = _kind(act), functions.NAMES.get(x.dtype)
    if name is None or precision is None or not functions.offers(f"norm_forward_{name}", precision):
        return None
    return name if x.shape[1] % functions.call("norm_width", precision) == 0 else None


def _kind(act: nn.Module) -> str | None:
    if type(act) is nn.GELU and act.approximate == "none":
        return "gelu"
    return "relu" if type(act) is nn.ReLU else None


def _evaluate(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, name: str) -> Tensor:
    y = torch.empty_like(x)
    arrays = (x, shortcut, norm.weight, norm.bias, norm.running_mean, norm.running_var, y)
    functions.call(
        f"norm_evaluate_{name}", functions.NAMES[x.dtype], *functions.pointers(*arrays), norm.eps, *_sizes(x)
    )
    return y


@torch.no_grad()
def _note(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, values: int) -> None:
    """Update the running statistics as `nn.BatchNorm2d` does, the variance without bias."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (values / (values - 1)), norm.momentum)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shortcut: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        mean, variance = (torch.empty(x.shape[1]) for _ in range(2))
        ctx.save_for_backward(x, shortcut, scale, shift, mean, variance)
        ctx.eps, ctx.name = eps, name
        ctx.mark_non_differentiable(mean, variance)
        _call(f"norm_forward_{name}", x, (x, shortcut, scale, shift, y, mean, variance), eps)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, shortcut, scale, shift, mean, variance = ctx.saved_tensors
        gradient = gradient.to(x.dtype).contiguous(memory_format=NHWC)
        of_x, of_scale, of_shift = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
        of_shortcut = None if shortcut is None else torch.empty_like(x)
        arrays = (gradient, x, shortcut, scale, shift, mean, variance, of_x, of_shortcut, of_scale, of_shift)
        _call(f"norm_backward_{ctx.name}", x, arrays, ctx.eps)
        needed = ctx.needs_input_grad
        return of_x, of_shortcut, of_scale if needed[2] else None, of_shift if needed[3] else None, None, None


def _call(function: str, x: Tensor, arrays: tuple[Tensor | None, ...], eps: float) -> None:
    precision = functions.NAMES[x.dtype]
    scratch = torch.empty(functions.call("norm_scratch", precision, x.shape[1]))
    functions.call(function, precision, *functions.pointers(*arrays, scratch), eps, *_sizes(x))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Return rows (pixels of all images), channels and threads: one where there is too little to share."""
    threads = torch.get_num_threads() if x.numel() >= LEAST_SHARED else 1
    return x.numel() // x.shape[1], x.shape[1], threads
