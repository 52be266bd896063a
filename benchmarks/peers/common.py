"""What every peer of `benchmarks/throughput.py` shares: the row, its pictures, how work is timed, what is printed.

A peer is a script that is run as a process of its own. It defines ``rates(row) -> dict[str, float]`` and ends with
``main(rates)``. Networks are ResNetLab's own (``create_model``), in PyTorch's default layout, so that all peers train
the same one; only Keras builds its own of the same shape.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASSES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
clock = time.process_time if os.environ.get("RESNETLAB_BENCH_CLOCK") == "cpu" else time.perf_counter
"""Seconds: by the wall, or of this process's threads where the machine is shared with other work."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The work that is the same for all peers."""

    network: str
    size: int
    """Image side that the network reads, in pixels."""
    batch: int
    images: int
    """Training images in an epoch."""
    data: Path
    """A folder with train/CLASS/*.jpg (or .png)."""
    tries: int
    """Steps and inference batches that are timed."""


def network(row: Row) -> Any:
    """Return the network that every PyTorch peer trains."""
    from resnetlab import create_model

    return create_model(row.network, num_classes=CLASSES, image_size=row.size)


def pictures(row: Row) -> Any:
    """Return torchvision's ImageFolder over the row's pictures, with the usual augmentation for their size."""
    from torchvision import datasets, transforms

    small = row.size <= 64
    crop = transforms.RandomCrop(row.size, padding=4) if small else transforms.RandomResizedCrop(row.size)
    usual = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return datasets.ImageFolder(str(row.data / "train"), transforms.Compose(usual))


def batch_of(row: Row) -> Any:
    """Return normalised images (batch, 3, size, size) and labels (batch,)."""
    import torch

    return torch.randn(row.batch, 3, row.size, row.size), torch.arange(row.batch) % CLASSES


def rate(work: Callable[[], object], images: int, tries: int) -> float:
    """Return images a second: the median of so many tries after one that warms up."""
    work()
    taken = []
    for _ in range(max(1, tries)):
        begun = clock()
        work()
        taken.append(clock() - begun)
    return images / statistics.median(taken)


def step_rate(taken: list[float], images: int) -> float:
    """Return images a second of steps that a running trainer took: their median, without the first, which warms up."""
    return images / statistics.median(taken[1:] or taken)


def epoch_rate(work: Callable[[], object], images: int) -> float:
    """Return images a second of one epoch, not warmed up: the steps before it have done that."""
    begun = clock()
    work()
    return images / (clock() - begun)


def peak() -> float:
    """Return the process's peak memory so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def main(rates: Callable[[Row], dict[str, float]]) -> None:
    """Read the row from the command line, and print the rates as one line of JSON, the last one."""
    parser = argparse.ArgumentParser()
    for name in ("network", "data"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("size", "batch", "images", "tries"):
        parser.add_argument(f"--{name}", type=int, required=True)
    words = vars(parser.parse_args())
    found = rates(Row(**{**words, "data": Path(words["data"])}))
    print("\n" + json.dumps(found), flush=True)
