"""Out of memory: told from other errors, and the batch size that would have fitted, found by trying."""

import math

import torch
from torch import nn

from resnetlab.runtime import Runtime, return_freed_memory

SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "could not create a")
"""What allocators say: CUDA's, torch's CPU allocator, the system, C++, oneDNN."""
COPIES = 3
"""Of the weights, that a training step holds beyond gradients: the optimiser's state and the weight average."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS))


def largest_batch(model: nn.Module, runtime: Runtime, shape: tuple[int, int, int], below: int) -> int | None:
    """Return the largest half, quarter, eighth, ... of ``below`` images that a training step has memory for.

    Args:
        model: The network; its weights and statistics are as before afterwards, its gradients are gone.
        runtime: Device and precision.
        shape: Of an image: (C, height, width).
        below: The number of images (of this process) that did not fit.

    Returns:
        The number of images, or None where not even two fit.
    """
    held: list[torch.Tensor] = []
    try:
        held = [torch.empty_like(p) for p in model.parameters() for _ in range(COPIES)]
        sizes = [below >> shift for shift in range(1, int(math.log2(max(2, below))) + 1)]
        return next((size for size in sizes if size >= 2 and _fits(model, runtime, shape, size)), None)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return None
    finally:
        held.clear()
        model.zero_grad(set_to_none=True)


def _fits(model: nn.Module, runtime: Runtime, shape: tuple[int, int, int], size: int) -> bool:
    """Whether a forward and a backward pass over ``size`` images find the memory they need."""
    return_freed_memory()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        images = torch.zeros(size, *shape, device=runtime.device).contiguous(memory_format=torch.channels_last)
        with runtime.precision.autocast():
            loss = model.train()(images).float().mean()
        loss.backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
