"""CUDA graphs: the passes of a training step recorded once, and from then on launched as one.

A step of a network for thumbnails is hundreds of kernels of some microseconds each, and a GPU waits for Python to
launch them. Recorded (`torch.cuda.make_graphed_callables`), the same kernels compute the same numbers without waiting.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnetlab.runtime import Precision

LARGEST = 1 << 20
"""Values in a batch of images up to which its passes are recorded: the kernels of larger ones outlast their launches.

ResNet-18 at 32 px in bf16 on an H200: a step of 128 images 7.1 ms as it comes and 2.9 recorded, of 512 8.5 and 8.1.
Recording also holds a second set of activations.
"""
AFTER = 20
"""Batches of a shape that are computed as they come before it is recorded, which takes about a second: the last batch
of an epoch is not worth it."""


class Graphed(nn.Module):
    """A network whose passes in training are recorded, one recording for each shape of its images.

    The logits it returns are overwritten by the next batch's.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.seen: Counter[torch.Size] = Counter()
        self.recorded: dict[torch.Size, Callable[[Tensor], Tensor]] = {}
        self.memory = torch.cuda.graph_pool_handle()
        """Shared by the recordings: what one holds is of no use when another runs."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits: (B, C, H, W) → (B, classes)."""
        shape = images.shape
        if not self.training or images.numel() > LARGEST:
            return self.model(images)  # type: ignore[no-any-return]
        if shape not in self.recorded:
            self.seen[shape] += 1
            if self.seen[shape] <= AFTER:
                return self.model(images)  # type: ignore[no-any-return]
            self.recorded[shape] = self._record(images)
        return self.recorded[shape](images)

    def _record(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """Record both passes for images of this shape; the batch-norm statistics stay what they were."""
        autocast = torch.autocast(
            images.device.type,
            dtype=self.precision.dtype,
            enabled=self.precision.name != "fp32",
            cache_enabled=False,  # 16-bit copies of the weights are part of the recording
        )
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with autocast, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of streams: the gradients' sums began on another
            recorded: Callable[[Tensor], Tensor] = torch.cuda.make_graphed_callables(  # type: ignore[assignment]
                _Passes(self.model), (images.clone(),), pool=self.memory
            )
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        return recorded


class _Passes(nn.Module):
    """A network under a name of its own: what is recorded replaces ``forward``, and each shape needs another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[no-any-return]


def recordable(model: nn.Module, device: torch.device) -> bool:
    """Whether a network's passes can be recorded here: on CUDA, and not where a pass draws random numbers."""
    return device.type == "cuda" and not any(_draws(module) for module in model.modules())


def _draws(module: nn.Module) -> bool:
    return any(word in type(module).__name__ for word in ("Drop", "Stochastic"))  # PyTorch's, torchvision's, ours
