"""The compiled functions on tensors, and what their callers share.

PyTorch has no such operation, or none as fast on a CPU; where there is no compiler its own are taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.native import build

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""The precision, of which there is a library, of what tensors hold."""

_plain = False


def offers(function: str, precision: str | None) -> bool:
    """Whether a compiled function is there to be taken; `build.why_not` says why it is not."""
    return not _plain and precision in build.DEFINED and hasattr(build.library(precision), function)


def call(function: str, precision: str, *arguments: Any) -> Any:
    """Call a compiled function that is there."""
    return getattr(build.library(precision), function)(*arguments)


@contextmanager
def plain() -> Iterator[None]:
    """Compute as PyTorch does in between, for tools that count or record PyTorch's operations."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def pointers(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """Return where the tensors' numbers lie, as compiled functions take it."""
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)


def here(*tensors: Tensor) -> bool:
    """Whether the numbers of all tensors lie in this machine's memory; those of a subclass of `Tensor` need not."""
    return all(t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter) for t in tensors)


def traced() -> bool:
    """Whether what runs now is being recorded, to run elsewhere later."""
    tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
    return torch.compiler.is_compiling() or bool(tracing())


def watched(*modules: nn.Module) -> bool:
    """Whether a hook waits for what one of the modules computes."""
    own = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for module in modules for name in own):
        return True
    return nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call, no-any-return]
