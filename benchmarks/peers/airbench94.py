"""The `airbench` package's 94 % recipe (SGD form, 9.9 epochs); on a CPU with the least change that makes it run.

    python benchmarks/peers/airbench94.py DATA EPOCHS SEED

Prints one JSON line: seconds of training (whitening and epochs), and test accuracy with one view and with its six. The
images come from DATA instead of a download. What else is patched where there is no CUDA, here at run time: fp16 becomes
bf16, or fp32 on a CPU without instructions for bf16 (it would emulate either), `.cuda()` stays on the CPU, and CUDA
events read the clock. Also glibc keeps freed memory, as it does for ours, unless AIRBENCH_ALLOCATOR=0.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from resnetlab import runtime, sources


class Clock:
    """Stands in for `torch.cuda.Event`: the time of day when it was recorded."""

    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        """Note the time."""
        self.at = time.perf_counter()

    def elapsed_time(self, later: "Clock") -> float:
        """Return the milliseconds until ``later``."""
        return 1000 * (later.at - self.at)


def patch() -> None:
    """Make the package's CUDA calls mean the CPU, and its fp16 what the CPU has instructions for."""
    if runtime.cpu_has_bf16():
        torch.Tensor.half = torch.Tensor.bfloat16  # type: ignore[method-assign, assignment]
        nn.Module.half = nn.Module.bfloat16  # type: ignore[method-assign, assignment]
        torch.half = torch.bfloat16  # which weights its average is of
    else:
        torch.Tensor.half = torch.Tensor.float  # type: ignore[method-assign, assignment]
        nn.Module.half = nn.Module.float  # type: ignore[method-assign, assignment]
    nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    torch.cuda.Event = Clock  # type: ignore[misc, assignment]
    torch.cuda.synchronize = lambda device=None: None


def provide(data: str, folder: Path) -> None:
    """Write the images where the package looks for them, as it stores them itself."""
    dataset = sources.load(data)
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        assert split is not None
        images = torch.from_numpy(np.stack([split.images[i] for i in range(len(split))]))
        labels = torch.from_numpy(split.labels)
        torch.save({"images": images, "labels": labels, "classes": list(split.classes)}, folder / f"{name}.pt")


def main(data: str, epochs: float, seed: int) -> None:
    """Train once and print the result."""
    if os.environ.get("AIRBENCH_ALLOCATOR", "1") != "0":
        runtime.keep_freed_memory()
    data = os.path.abspath(data) if os.path.exists(data) else data
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("cifar10").mkdir()
        provide(data, Path("cifar10"))
        cuda = torch.cuda.is_available()
        if not cuda:
            patch()
        import airbench

        if not cuda:
            begin = airbench.CifarLoader.__init__
            begin.__defaults__ = (*begin.__defaults__[:-1], "cpu")  # where it puts the images; it was GPU 0
        torch.manual_seed(seed)
        hyp = {"flip": True, "translate": 2}
        train = airbench.CifarLoader("cifar10", train=True, batch_size=1024, aug=hyp, altflip=True)
        test = airbench.CifarLoader("cifar10", train=False, batch_size=2000)
        begun = time.perf_counter()
        net = airbench.train94(train, epochs=epochs, verbose=False)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        top1, views = (airbench.evaluate(net, test, level) for level in (0, 2))
    print(json.dumps({"training_seconds": seconds, "top1": top1, "top1_views": views}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
