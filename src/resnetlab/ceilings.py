"""The ceilings of a machine, measured: matrix products, convolutions, memory. A network is made of such work.

Every figure is the best of a few tries in a short time, after one try that warms up; other programs can only make a
try slower.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from resnetlab.runtime import Precision

SECONDS = 0.4
"""How long a figure is measured after its warm-up, unless one try takes longer."""
SHAPES = ((64, 32), (128, 16), (256, 8))
"""Channels and image side of the 3×3 convolutions that are tried, as ResNet-18 has them; the fastest counts."""
MORE = 32
"""By so much there is more to do at a time on a GPU than on a CPU, whose work would leave it idle."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The fastest that one kind of work gets here; a network's work is made of these."""

    work: str
    """A row of `CEILINGS`, or ``memory``."""
    precision: str
    rate: float
    """Operations a second (a multiply-add is two); for ``memory`` bytes a second, read and written."""


def ceilings(device: torch.device, precision: Precision) -> list[Ceiling]:
    """Measure what bounds a network here, in fp32 and in ``precision``: matrix products, convolutions, memory."""
    found = [
        Ceiling(work=work, precision=name, rate=rate(Precision(name, device), device))
        for name in dict.fromkeys(["fp32", precision.name])
        for work, rate in CEILINGS.items()
    ]
    return [*found, Ceiling(work="memory", precision="-", rate=memory_rate(device))]


def matrix_rate(precision: Precision, device: torch.device) -> float:
    """Return operations a second of a product of two square matrices, of side 1024 on a CPU and 8192 elsewhere."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.rand(side, side, device=device, dtype=precision.dtype) for _ in range(2))
    return 2 * side**3 / fastest(lambda: a @ b, device)


def convolution_rate(precision: Precision, device: torch.device) -> float:
    """Return operations a second of the fastest of three 3×3 convolutions as ResNets have them, forward."""
    return max(_convolution(c, s, precision, device, backward=False) for c, s in SHAPES)


def trained_convolution_rate(precision: Precision, device: torch.device) -> float:
    """Return the same for forward and backward together."""
    return max(_convolution(c, s, precision, device, backward=True) for c, s in SHAPES)


CEILINGS: dict[str, Callable[[Precision, torch.device], float]] = {
    "matrix product": matrix_rate,
    "convolution": convolution_rate,
    "convolution, trained": trained_convolution_rate,
}


def _convolution(channels: int, side: int, precision: Precision, device: torch.device, *, backward: bool) -> float:
    images = 16 if device.type == "cpu" else 16 * MORE
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=precision.dtype)
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.rand(images, channels, side, side, device=device, dtype=precision.dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    gradient = torch.ones_like(x)

    def both() -> None:
        torch.autograd.grad(layer(x), (x, layer.weight), gradient)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    operations = 2 * images * channels**2 * 9 * side**2
    return operations * (3 if backward else 1) / fastest(both if backward else forward, device)


def memory_rate(device: torch.device) -> float:
    """Return bytes a second of copying 64 MiB (on a GPU 512 MiB): each byte is read once and written once."""
    source = torch.zeros((16 if device.type == "cpu" else 128) << 20, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() * 4 / fastest(lambda: target.copy_(source), device)


def fastest(work: Callable[[], object], device: torch.device, seconds: float = SECONDS) -> float:
    """Return the seconds that ``work`` takes at its best."""
    _timed(work, device)
    best = _timed(work, device)
    spent = best
    while spent < seconds:
        taken = _timed(work, device)
        best, spent = min(best, taken), spent + taken
    return best


def _timed(work: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - begun
