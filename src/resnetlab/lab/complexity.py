"""What networks cost (table 1): parameters and multiply-adds counted twice, time and memory measured; no training.

Each network is measured in a process of its own, ``python -m resnetlab.lab.complexity``, as the memory at the peak is
known of a whole process only.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from resnetlab import files, rundir, runtime
from resnetlab.errors import ResNetLabError
from resnetlab.lab.judges import percent
from resnetlab.lab.records import Finding, Sheet, Verdict
from resnetlab.lab.speed import environment

PAPER = {"resnet18": 1.8, "resnet34": 3.6, "resnet50": 3.8, "resnet101": 7.6, "resnet152": 11.3, "vgg16": 15.3,
         "vgg19": 19.6}  # fmt: skip
"""Multiply-adds in table 1 and section 3.3, in units of 10⁹."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network at an image size."""

    name: str
    model: str
    size: int
    classes: int
    batch: int
    stride_on: str = "3x3"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a case costs."""

    parameters: int
    macs: int
    """By our own walk over the network, for one image."""
    checked: int
    """By PyTorch's counter, halved: it counts a multiply-add as two."""
    infer_seconds: float
    """An image."""
    train_seconds: float
    """An image: forward, backward and an SGD step."""
    infer_memory: int
    """Bytes above an idle process with the weights, at the peak."""
    train_memory: int


def cases(large: int = 224, small: int = 32) -> list[Case]:
    """List what is measured: table 1 and the tutorial's networks at 224 px, then those and the CIFAR family at 32."""
    deep = [("ResNet-50", "resnet50"), ("ResNet-101", "resnet101"), ("ResNet-152", "resnet152")]
    plain = [("linear softmax", "linear"), ("VGG-16", "vgg16"), ("VGG-19", "vgg19"), ("GoogLeNet", "googlenet"),
             ("ResNet-18", "resnet18"), ("ResNet-34", "resnet34")]  # fmt: skip
    at_large = [Case(name=n, model=m, size=large, classes=1000, batch=4) for n, m in plain]
    at_large += [Case(name=n, model=m, size=large, classes=1000, batch=4, stride_on="1x1") for n, m in deep]
    at_large += [Case(name=f"{n}, strides on 3×3", model=m, size=large, classes=1000, batch=4) for n, m in deep]
    cifar = [(f"ResNet-{n} (CIFAR)", f"resnet{n}") for n in (20, 32, 44, 56, 110)]
    at_small = [Case(name=n, model=m, size=small, classes=10, batch=16) for n, m in [*plain, *deep, *cifar]]
    return [*at_large, *at_small]


def measure(path: Path, tell: Callable[[str], None], listed: Sequence[Case] | None = None, threads: int = 1) -> Finding:
    """Measure all cases, those that an earlier call finished in ``path`` excepted."""
    store = path / "costs.json"
    known = _known(store)
    machine = _machine(threads)
    found = []
    for case in cases() if listed is None else listed:
        key = f"{case.name} at {case.size} px, {machine}"
        if key not in known:
            begun = time.monotonic()
            known[key] = _in_process(case, threads)
            files.write_atomic(store, json.dumps(known, indent=1) + "\n")
            macs = known[key]["macs"] / 1e9
            tell(f"{case.name} at {case.size} px: {macs:,.3f} G multiply-adds, {time.monotonic() - begun:.0f} s")
        found.append((case, Cost(**known[key])))
    return finding(found, machine)


def _machine(threads: int) -> str:
    """Return what the times are of."""
    device = runtime.choose_device()
    if device.type != "cpu":
        return runtime.machine(device)
    return f"{threads} thread{'s' * (threads > 1)} of {runtime.cpu_name()}"


def _known(store: Path) -> dict[str, dict[str, Any]]:
    """Return what earlier calls measured, by network, size and machine.

    Raises:
        ResNetLabError: The file is damaged.
    """
    if not store.is_file():
        return {}
    rows, keys = rundir.read_json(store), {field.name for field in fields(Cost)}
    if not (isinstance(rows, dict) and all(isinstance(row, dict) and row.keys() == keys for row in rows.values())):
        raise ResNetLabError(f"{store} is not what was measured here. Remove it, and it is measured again.")
    return rows


def finding(found: Sequence[tuple[Case, Cost]], machine: str) -> Finding:
    """Make tables and verdicts of what was measured."""
    sizes = sorted({case.size for case, _ in found}, reverse=True)
    sheets = tuple(_sheet(size, [(case, cost) for case, cost in found if case.size == size], machine) for size in sizes)
    return Finding(sheets=sheets, verdicts=tuple(_verdicts(found)))


def _sheet(size: int, found: Sequence[tuple[Case, Cost]], machine: str) -> Sheet:
    classes, batch, named = found[0][0].classes, found[0][0].batch, size == 224
    return Sheet(
        name=f"costs-{size}px",
        title=f"At {size} × {size} pixels, {classes:,} classes",
        columns=("network", "parameters", "multiply-adds", *(["in the paper"] if named else []), "train, ms/image",
                 "infer, ms/image", "memory to train", "memory to infer"),
        rows=tuple(
            (
                case.name,
                cost.parameters,
                cost.macs,
                *([PAPER.get(case.model) if "3×3" not in case.name else None] if named else []),
                1000 * cost.train_seconds,
                1000 * cost.infer_seconds,
                cost.train_memory,
                cost.infer_memory,
            )
            for case, cost in found
        ),
        caption="Multiply-adds of convolutions and linear layers for one image, counted by a walk over the network; "
        "PyTorch’s own counter gives "
        + ("the same in every row. " if all(c.macs == c.checked for _, c in found) else "other figures in some. ")
        + f"Times on {machine}, fp32, batches of {batch}, the fastest of a "
        "few passes; memory at the peak, beyond the process and its weights.",
        forms={"parameters": "quantity", "multiply-adds": "quantity", "in the paper": ".1f G",
               "train, ms/image": ".1f", "infer, ms/image": ".1f", "memory to train": "bytes",
               "memory to infer": "bytes"},
    )  # fmt: skip


def _verdicts(found: Sequence[tuple[Case, Cost]]) -> list[Verdict]:
    at = {case.name: cost.macs for case, cost in found if case.size == 224}
    verdicts = []
    if {"ResNet-152", "VGG-16"} <= at.keys():
        a, b = at["ResNet-152"], at["VGG-16"]
        why = f"{a / 1e9:.2f} G against {b / 1e9:.2f} G."
        verdicts.append(Verdict(claim="ResNet-152 needs fewer multiply-adds than VGG-16.", held=a < b, why=why))
    if {"ResNet-34", "VGG-19"} <= at.keys():
        share = at["ResNet-34"] / at["VGG-19"]
        claim = "ResNet-34 needs 18 % of the multiply-adds of VGG-19."
        verdicts.append(Verdict(claim=claim, held=0.175 <= share < 0.195, why=f"{percent(share)}."))
    table = [(c.name, cost.macs, PAPER[c.model]) for c, cost in found
             if c.size == 224 and c.model in PAPER and "3×3" not in c.name]  # fmt: skip
    if table:
        off = [f"{name} {macs / 1e9:.2f} G, not {paper} G" for name, macs, paper in table
               if abs(macs / 1e9 - paper) > 0.1]  # fmt: skip
        claim = "The multiply-adds of table 1 come out again, to the digit that the paper gives."
        why = f"{len(table) - len(off)} of {len(table)} agree within 0.1 G" + (f"; {'; '.join(off)}." if off else ".")
        verdicts.append(Verdict(claim=claim, held=not off, why=why))
    same = all(cost.macs == cost.checked for _, cost in found)
    claim = "Our count of multiply-adds and PyTorch’s own counter agree exactly."
    verdicts.append(Verdict(claim=claim, held=same, why=f"In {len(found)} networks." if same else "Not in all."))
    return verdicts


def _in_process(case: Case, threads: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "resnetlab.lab.complexity"],
        input=json.dumps(asdict(case)),
        capture_output=True,
        text=True,
        env=environment(threads),
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ResNetLabError(f"{case.name} at {case.size} px cannot be measured: {last or 'it was killed'}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return answer


def cost(case: Case, *, passes: int = 2) -> Cost:
    """Count and measure a network in this process; the memory is right only for the first network of a process."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from resnetlab import models
    from resnetlab.config import ModelConfig, OptimConfig
    from resnetlab.native import functions
    from resnetlab.optim import build

    given: dict[str, Any] = {"stride_on": case.stride_on} if case.stride_on != "3x3" else {}
    config = ModelConfig(name=case.model, num_classes=case.classes, image_size=case.size, **given)
    counted = models.cost(config, case.size)
    torch.manual_seed(0)
    machine = runtime.setup(precision="fp32")
    model = machine.place(models.build(config))
    model.eval()
    images = torch.randn(case.batch, 3, case.size, case.size, device=machine.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(case.batch, dtype=torch.long, device=machine.device)
    optimizer = build(OptimConfig(name="sgd", lr=1e-3), model)
    idle = runtime.peak_memory(machine.device)

    def infer() -> None:
        with torch.inference_mode():
            model(images)

    def train() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    infer_seconds = _fastest(infer, passes, machine.device)
    infer_memory = runtime.peak_memory(machine.device) - idle
    model.train()
    train_seconds = _fastest(train, passes, machine.device)
    train_memory = runtime.peak_memory(machine.device) - idle
    # PyTorch's counter knows no convolutions but its own.
    with functions.plain(), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(images[:1])
    return Cost(
        parameters=counted.parameters,
        macs=counted.macs,
        checked=counter.get_total_flops() // 2,
        infer_seconds=infer_seconds / case.batch,
        train_seconds=train_seconds / case.batch,
        infer_memory=infer_memory,
        train_memory=train_memory,
    )


def _fastest(act: Callable[[], None], passes: int, device: Any) -> float:
    """Return the seconds of the fastest pass after one that warms up."""
    import torch

    times = []
    for _ in range(passes + 1):
        begun = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


if __name__ == "__main__":
    print(json.dumps(asdict(cost(Case(**json.load(sys.stdin))))))  # noqa: T201 - the lab reads it
