"""What ends a run early, put for people: divergence, memory, a lost process of the group."""

import contextlib
import mmap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote

from resnetlab import capacity, divergence, rundir, runtime
from resnetlab.errors import ResNetLabError
from resnetlab.training import Training

RESERVE = 16 << 20
"""Bytes of address space, never touched, that are let go when memory runs out: oneDNN needs some of its own to compute
on, and what the allocator has freed within its heap is no use to it."""

NO_DETERMINISTIC = " does not have a deterministic implementation"
"""What PyTorch says of an operation, behind its name."""

ONE_VALUE = "Expected more than 1 value per channel"
"""What PyTorch says of a batch norm that has nothing to take a variance of."""


@contextlib.contextmanager
def explained(t: Training, path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Turn what can go wrong in training into an error that says what to do, and log it.

    Args:
        t: The run.
        path: Its directory.
        log: Takes the message.

    Raises:
        ResNetLabError: With what to do about it.
    """
    reserve = mmap.mmap(-1, RESERVE)
    try:
        yield
        return
    except divergence.Diverged as error:
        error.args = (f"{error} {_about_the_batch(t, path, error)}",)
        _try_to_log(log, str(error))
        raise
    except (RuntimeError, ValueError, MemoryError) as error:
        if runtime.lost_group(error):
            message = (
                f"Another process of this run has ended or no longer answers (after step {t.step}). What was saved is "
                f"whole. Go on, in as many processes, with: resnetlab train --resume {quote(str(path))}"
            )
        elif (operation := str(error).partition(NO_DETERMINISTIC))[1]:
            message = (
                f"deterministic=true does not go with this network on {t.runtime.device}: PyTorch's {operation[0]} has "
                "no deterministic form. Leave deterministic out, or train with device=cpu."
            )
        elif ONE_VALUE in str(error):
            message = (
                "Batch norm needs two values or more of each channel, and what is left of these images is one, of a "
                "batch of one. Take a larger batch_size (or model.norm_batch), a larger data.size, or more images."
            )
        elif capacity.ran_out(error):
            traceback.clear_frames(error.__traceback__)  # they hold what did not fit
            reserve.close()
            message = ""
        else:
            raise
    message = message or _too_large(t)
    _try_to_log(log, message)
    raise ResNetLabError(message)


def _try_to_log(log: Callable[[str], None], message: str) -> None:
    """Log a message, but not at the price of it: a full disk may be a part of what went wrong."""
    with contextlib.suppress(ResNetLabError):
        log(message)


def _about_the_batch(t: Training, path: Path, error: divergence.Diverged) -> str:
    """Keep the batch where that was asked for, say how to see it or how to get it, and what there is to go back to."""
    checkpoints = any((path / rundir.CHECKPOINTS).glob("step-*"))
    saved = "What was saved before is kept." if checkpoints else "Nothing had been saved before."
    if t.watch_gradients and error.tensors is None:
        return f"{saved} Its gradients were finite; the step itself was too large, so there is no batch to look into."
    try:
        if t.watch_gradients and error.process == t.runtime.rank:
            divergence.keep(path, error)
    except ResNetLabError as failed:
        return f"{saved} The batch could not be kept: {failed}"
    command = f"resnetlab replay {quote(str(path))}"
    if t.watch_gradients:
        return f"{saved} The batch is kept; see what it does, layer by layer, with: {command}"
    return f"{saved} To keep the batch and look into it: resnetlab train --resume {quote(str(path))} --debug-batch"


def _too_large(t: Training) -> str:
    """Say that memory ran out, and which batch size fits."""
    t.optimizer.zero_grad(set_to_none=True)
    preprocess, processes = t.loader.store.preprocess, t.runtime.world_size
    shape = (preprocess.channels, preprocess.size, preprocess.size)
    fits = capacity.largest_batch(t.model, t.runtime, shape, t.recipe.batch_size // processes)
    if fits:
        found = f"batch_size={fits * processes} fits (a third more was tried just now)"
    else:  # what is free may be too scattered for a trial, so none fitting says little
        small = capacity.with_margin(t.recipe.batch_size // processes // 16) * processes
        found = f"batch_size={small} may fit (there was no memory left to try it)"
    return (
        f"Out of memory with batch_size={t.recipe.batch_size} at {preprocess.size} px. {found}; a smaller data.size, "
        "a smaller network or data.memory=stream takes less too."
    )
