"""Out of memory: told from other errors, and the batch size that would have fitted, found by trying."""

import math
import mmap

import torch
from torch import nn

from resnetlab.runtime import Runtime, keep_freed_memory, return_freed_memory

SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "could not create a")
"""What allocators say: CUDA's, torch's CPU allocator, the system, C++, oneDNN."""
COPIES = 3
"""Of the weights, that a training step holds beyond gradients: the optimiser's state and the weight average."""
SPARE = 64 << 20
"""Bytes of address space that a trial leaves alone, for what a new run needs besides its first steps."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(sign in text for sign in SIGNS)
    )


def largest_batch(model: nn.Module, runtime: Runtime, shape: tuple[int, int, int], below: int) -> int | None:
    """Return a number of images that a training step surely has memory for, well below ``below``.

    Halves, quarters, eighths, ... are tried; what is returned is three quarters of the largest that goes through
    (a multiple of 8 from 8 on). A run that begins anew finds its memory cut up otherwise than this one has it: what
    fits to the last byte here does not always fit there.

    Args:
        model: The network; its weights and statistics are as before afterwards, its gradients are gone.
        runtime: Device and precision.
        shape: Of an image: (C, height, width).
        below: The number of images (of this process) that did not fit.

    Returns:
        The number of images, or None where not even four fit, or there is no memory left to try.
    """
    held: list[torch.Tensor] = []
    spare: mmap.mmap | None = None
    try:
        spare = mmap.mmap(-1, SPARE)
        held = [torch.empty_like(p) for p in model.parameters() for _ in range(COPIES)]
        sizes = [below >> shift for shift in range(1, int(math.log2(max(2, below))) + 1)]
        tried = next((size for size in sizes if size >= 4 and _fits(model, runtime, shape, size)), None)
        return None if tried is None else with_margin(tried)
    except (RuntimeError, MemoryError, OSError) as error:
        if not ran_out(error):
            raise
        return None
    finally:
        held.clear()
        if spare is not None:
            spare.close()
        model.zero_grad(set_to_none=True)


def with_margin(size: int) -> int:
    """Return at most three quarters of ``size``: a multiple of 8 from 8 on, at least 2."""
    most = size * 3 // 4
    return most - most % 8 if most >= 8 else max(2, most)


def _fits(model: nn.Module, runtime: Runtime, shape: tuple[int, int, int], size: int) -> bool:
    """Whether a step over ``size`` images finds the memory it needs, and after it a smaller one, as an epoch ends."""
    return_freed_memory()
    keep_freed_memory()  # as in the run to come
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for images in (size, size, max(2, size // 3)):
            _step(model, runtime, (images, *shape))
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


def _step(model: nn.Module, runtime: Runtime, shape: tuple[int, int, int, int]) -> None:
    """Compute a forward and a backward pass over black images, (B, C, H, W)."""
    images = torch.zeros(shape, device=runtime.device).contiguous(memory_format=torch.channels_last)
    with runtime.precision.autocast():
        loss = model.train()(images).float().mean()
    loss.backward()
