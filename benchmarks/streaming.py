"""Photos that do not stay in memory: our loader beside torchvision's ImageFolder with PyTorch's DataLoader.

    python benchmarks/streaming.py [--photos 2000] [--side 500] [--steps 8] [--rounds 2] [--network resnet18]

Both read the same generated folder of JPEGs at 224 px with a random crop and mirroring, batches of 32, as many workers
as cores. Two figures each: images a second of the data alone, and the share of a training run that its steps of
ResNet-18 wait for data, after the first batch. The wait is what matters: it is 0 as long as decoding keeps up. Each
measurement is a process of its own, the two alternating; medians. ``--photos 20000`` is the size of the issue.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from environment import cache
from pictures import photos

from resnetlab import threads

BATCH, SIZE = 32, 224
Batches = Iterator[tuple[Any, Any]]


def ours(data: Path, workers: int) -> tuple[Callable[[], Batches], float]:
    """Return what makes an epoch of batches, and the seconds of reading everything once before."""
    from resnetlab import session, training
    from resnetlab.console import Quiet

    settings = ["data.memory=stream", f"data.workers={workers}", f"batch_size={BATCH}", f"data.size={SIZE}"]
    settings += ["data.augment=zoom:0.08,flip", "data.val=0", "data.drop_last=true", "optim.average=0"]
    begun = time.perf_counter()
    plan = session.plan(str(data), "resnet18", "default", settings, Quiet())
    prepare = time.perf_counter() - begun
    loader = training.start(plan.recipe, plan.prepared, plan.runtime).loader
    return lambda: ((batch.images, batch.labels) for batch in loader.epoch(1)), prepare


def theirs(data: Path, workers: int) -> tuple[Callable[[], Batches], float]:
    """Return the same of torchvision and PyTorch, which reads nothing before."""
    import torch
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    steps += [transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    folder = datasets.ImageFolder(str(data / "train"), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(folder, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    return lambda: iter(loader), 0.0


SIDES = {"ours": ours, "torchvision": theirs}


def measure(name: str, words: argparse.Namespace) -> dict[str, float]:
    """Measure one of the two in this process."""
    import torch

    from resnetlab import create_model, runtime

    here = runtime.setup("cpu")
    epoch, prepare = SIDES[name](words.data, words.workers)
    model = here.place(create_model(words.network, num_classes=10, image_size=SIZE)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    alone = _pass(epoch(), words.steps, lambda images, labels: None)

    def step(images: Any, labels: Any) -> None:
        with here.precision.autocast():
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        here.precision.step(loss, optimizer, 0.0)

    trained = _pass(epoch(), words.steps, step)
    waited = trained["wait"] / (trained["wait"] + trained["work"])
    return {
        "data": words.steps * BATCH / alone["wait"],
        "first": trained["first"],
        "wait": waited,
        "longest": trained["longest"],
        "training": words.steps * BATCH / (trained["wait"] + trained["work"]),
        "prepare": prepare,
    }


def _pass(batches: Batches, steps: int, work: Callable[[Any, Any], object]) -> dict[str, float]:
    """Take so many batches; the seconds of the first, and of waiting and working after it."""
    begun = time.perf_counter()
    images, labels = next(batches)
    found = {"first": time.perf_counter() - begun, "wait": 0.0, "work": 0.0, "longest": 0.0}
    work(images, labels)  # not counted: what is fetched ahead is fetched meanwhile
    for _ in range(steps):
        begun = time.perf_counter()
        images, labels = next(batches)
        got = time.perf_counter()
        work(images, labels)
        found["wait"] += got - begun
        found["work"] += time.perf_counter() - got
        found["longest"] = max(found["longest"], got - begun)
    return found


def main() -> None:
    """Run both alternately, a line a measurement, then a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--side", type=int, default=500, help="shorter side of the photos, in pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, help="a folder with train/CLASS/*.jpg instead of generated photos")
    parser.add_argument("--one", choices=list(SIDES), help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.one == "ours":
        threads.choose_waiting()  # as the command does; torchvision's wait as PyTorch's do
    if words.one:
        print("\n" + json.dumps(measure(words.one, words)))
        return
    data = words.data or photos(cache() / f"photos-{words.side}-{words.photos}", words.photos, words.side)
    options = [f"--{key}={getattr(words, key)}" for key in ("steps", "network", "workers")] + [f"--data={data}"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for number in range(words.rounds):
        for name, rounds in found.items():
            command = [sys.executable, __file__, "--one", name, *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1} {name}: {rounds[-1]}", flush=True)
    print(
        "\n| loader | data alone, images/s | training, images/s | of it waiting | longest wait | first batch | before |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, rounds in found.items():
        m = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        print(
            f"| {name} | {m['data']:,.0f} | {m['training']:,.1f} | {m['wait']:.1%} | {m['longest'] * 1e3:,.0f} ms "
            f"| {m['first']:.1f} s | {m['prepare']:.1f} s |"
        )


if __name__ == "__main__":
    main()
