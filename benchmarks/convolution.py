"""3×3 convolutions by Winograd's algorithm beside PyTorch's own, layer by layer: milliseconds, ratio, errors.

    python benchmarks/convolution.py [--rounds 5] [--precision bf16] [--rows 256x24x64x32,128x64x64x8]

A row is images × channels × filters × side of the feature map, in NHWC. Each round runs both alternately,
forward, then backward for the input and the weights; medians are shown. The error is that of the output and of both
gradients together against double precision, relative to their norm. Rows of few tiles (the last ones) are computed by
the algorithm here, although `resnetlab.winograd` leaves them to PyTorch: they show where that pays.
"""

import argparse
import copy
import statistics
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from resnetlab import runtime, winograd
from resnetlab.runtime import Precision

ROWS = (
    "256x24x64x32,256x64x64x16,256x64x192x16,256x192x192x8,256x192x192x6,256x192x192x4,128x16x16x32,128x32x32x16,"
    "128x64x64x8,128x128x128x16,128x256x256x8,128x512x512x4,32x512x512x7,1x256x256x8,8x256x256x8,16x512x512x4,8x512x512x7"
)


def passes(
    layer: nn.Module, x: Tensor, slope: Tensor, precision: Precision | None = None
) -> tuple[float, float, list[Tensor]]:
    """Return the seconds forward and backward, and output and gradients; in that of the layer without a precision."""
    begun = time.perf_counter()
    with precision.autocast() if precision else nullcontext():
        out = layer(x)
    between = time.perf_counter()
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], slope)
    return between - begun, time.perf_counter() - between, [out.detach(), *gradients]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest error of a tensor, relative to its norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def compare(row: str, rounds: int, precision: Precision) -> str:
    """Return a line of the table."""
    images, channels, filters, side = map(int, row.split("x"))
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
    x, slope = (torch.randn(images, count, side, side) for count in (channels, filters))
    exact = passes(copy.deepcopy(layer).double(), x.double().requires_grad_(), slope.double())[2]
    layer = layer.to(memory_format=torch.channels_last)
    x, slope = (t.to(precision.dtype, memory_format=torch.channels_last) for t in (x, slope))
    x.requires_grad_()
    winograd.adopt(layer)
    seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    errors = {}
    for number in range(rounds + 1):
        for wanted in (True, False):
            winograd.use(wanted)
            forward, backward, found = passes(layer, x, slope, precision)
            errors[wanted] = error(found, exact)
            if number:  # the first round warms up
                seconds[wanted].append((forward, backward))
    ours, direct = (
        [1000 * statistics.median(one) for one in zip(*seconds[wanted], strict=True)] for wanted in (True, False)
    )
    return (
        f"| {images} | {channels} → {filters} | {side} "
        f"| {direct[0]:.1f} + {direct[1]:.1f} | {ours[0]:.1f} + {ours[1]:.1f} "
        f"| {direct[0] / ours[0]:.2f} | {sum(direct) / sum(ours):.2f} | {errors[False]:.0e} | {errors[True]:.0e} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rows", default=ROWS)
    arguments = parser.parse_args()
    runtime.keep_freed_memory()
    precision = Precision(arguments.precision, torch.device("cpu"))
    if not winograd.in_use(precision.name):
        raise SystemExit(f"Convolutions are {winograd.state(precision.name)}.")
    winograd.LEAST_TILES = 1
    print(f"{runtime.machine()}, {precision.name}, torch {torch.__version__}\n")
    print("| images | channels | px | PyTorch, ms | Winograd, ms | forward | both | error: PyTorch | Winograd |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in arguments.rows.split(","):
        print(compare(row, arguments.rounds, precision), flush=True)


if __name__ == "__main__":
    main()
