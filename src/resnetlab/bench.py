"""What this machine can do, measured in half a minute: its ceilings, its fastest settings, images/s of usual networks.

Every figure is the best of a few tries in a short time, after one try that warms up; other programs can only make a
try slower. A setting that is no default is chosen only where it is clearly faster (`CLEARLY`).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab import models, runtime, tuning, winograd
from resnetlab.capacity import ran_out
from resnetlab.ceilings import Ceiling, ceilings, fastest
from resnetlab.config import ModelConfig
from resnetlab.predict import logits
from resnetlab.runtime import Precision, Runtime
from resnetlab.threads import cores
from resnetlab.tuning import Choice

CLEARLY = 1.05
"""A setting replaces the default where it is at least so many times as fast; less is noise in such short tries."""
BATCHES = (250, 64, 16)
"""Images at a time in inference that are tried; the first is the default."""
TRIAL = ("resnet20", 32)
"""The network, and its image side in pixels, that settings are tried on."""
IMAGES = (64, 1024)
"""Images in a training step of the same, on a CPU and on a GPU."""
NETWORKS = (
    ("resnet20", 32, 128, 1024),
    ("resnet18", 32, 32, 512),
    ("resnet18", 224, 4, 64),
    ("resnet50", 224, 2, 64),
)
"""Networks whose speed is shown: name, image side, images in a training step on a CPU and on a GPU."""
PASSES = {"training": 3, "inference": 1}
"""Convolutions of a training step: forward, and backward for the input and for the weights."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting that was tried."""

    setting: Literal["threads", "precision", "convolution", "layout", "batch", "compile"]
    value: str
    images_per_second: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images a second of a network with the chosen settings."""

    model: str
    size: int
    """Image side, in pixels."""
    training: float
    inference: float
    share: float
    """Of the ceiling of direct convolutions that the step reaches, its multiply-adds against its time; Winograd's
    algorithm needs fewer, so that this may pass 1."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All that was measured."""

    machine: str
    ceilings: tuple[Ceiling, ...]
    trials: tuple[Trial, ...]
    speeds: tuple[Speed, ...]
    choice: Choice
    seconds: float
    """What measuring took."""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, JSON-able."""
        return {**asdict(self), "choice": self.choice.model_dump(mode="json")}


def measure(
    device: str = "auto", *, compiled: bool = False, tell: Callable[[str], object] = lambda what: None
) -> Bench:
    """Measure this machine. `keep` remembers what was chosen.

    Args:
        device: As in a recipe.
        compiled: Also try torch.compile in inference, which takes a minute of compiling; shown, never chosen.
        tell: Is told what is being measured.

    Raises:
        UsageError: There is no such device.
    """
    begun = time.perf_counter()
    runtime.keep_freed_memory()
    chosen = runtime.choose_device(device)
    with runtime.undisturbed():
        runtime.set_switches()
        tell("threads, precision, convolution, layout, batch")
        choice, trials = choose(chosen)
        best = on(chosen, choice.precision, choice.threads)
        if compiled:
            tell("torch.compile")
            trials += [_compiled(best)]
        tell("ceilings of the machine")
        peaks = ceilings(best.device, best.precision)
        speeds = []
        for name, size, *images in NETWORKS:
            tell(f"{name} at {size} px")
            speeds.append(speed(name, size, images[chosen.type != "cpu"], best, peaks))
        return Bench(
            machine=runtime.machine(chosen),
            ceilings=tuple(peaks),
            trials=tuple(trials),
            speeds=tuple(speeds),
            choice=choice,
            seconds=time.perf_counter() - begun,
        )


def keep(found: Bench, device: str = "auto") -> None:
    """Remember the choice for later runs on this machine: `runtime.setup` takes it where a recipe leaves it open.

    Raises:
        ResNetLabError: The cache cannot be written.
    """
    tuning.remember(runtime.identity(runtime.choose_device(device)), found.choice)


def choose(device: torch.device) -> tuple[Choice, list[Trial]]:
    """Try the settings one after the other, each with the best of those before it."""
    trials: list[Trial] = []

    def pick(setting: Any, values: list[Any], rate: Callable[[Any], float]) -> Any:
        found = {value: rate(value) for value in values}
        trials.extend(Trial(setting=setting, value=str(v), images_per_second=r) for v, r in found.items())
        best = max(found, key=lambda value: found[value])
        return best if found[best] > CLEARLY * found[values[0]] else values[0]

    auto, images = runtime.choose_precision("auto", device), IMAGES[device.type != "cpu"]
    counts = _thread_counts() if device.type == "cpu" else [torch.get_num_threads()]
    threads = pick("threads", counts, lambda n: training_rate(on(device, auto, n), *TRIAL, images))
    names = list(dict.fromkeys([auto, "fp32"]))  # bf16 on a CPU only where it has instructions for it
    precision = pick("precision", names, lambda name: training_rate(on(device, name, threads), *TRIAL, images))
    best = on(device, precision, threads)
    winograd.use(True)
    convolution: Literal["winograd", "direct"] = "winograd"
    if best.convolutions == "winograd":
        convolution = pick("convolution", ["winograd", "direct"], lambda name: _convolving(name, best))
    winograd.use(convolution == "winograd")
    for layout in (torch.channels_last, torch.contiguous_format):
        name = {torch.channels_last: "NHWC", torch.contiguous_format: "NCHW"}[layout]
        found = training_rate(best, *TRIAL, images, layout=layout)
        note = "" if layout == torch.channels_last else "shown only: training always uses NHWC"
        trials.append(Trial(setting="layout", value=name, images_per_second=found, note=note))
    batch = pick("batch", list(BATCHES), lambda n: inference_rate(on(device, "fp32", threads), *TRIAL, n))
    day = date.today().isoformat()
    choice = Choice(threads=threads, precision=precision, batch=batch, convolution=convolution, measured=day)
    return choice, trials


def _convolving(name: str, on: Runtime) -> float:
    """Return the images a second of training with one algorithm for 3×3 convolutions."""
    winograd.use(name == "winograd")
    return training_rate(on, *TRIAL, 64)


def _thread_counts() -> list[int]:
    """Return the thread counts to try, the present one first: all cores, a half, a quarter, one."""
    present, all_ = torch.get_num_threads(), cores()
    return list(dict.fromkeys([present, all_, max(1, all_ // 2), max(1, all_ // 4), 1]))


def on(device: torch.device, precision: str, threads: int) -> Runtime:
    """Return a runtime with these settings, and set the threads."""
    torch.set_num_threads(threads)
    return Runtime(device=device, precision=Precision(precision, device))


def training_rate(
    on: Runtime, name: str, size: int, images: int, layout: torch.memory_format = torch.channels_last
) -> float:
    """Return the images a second of whole training steps: forward, loss, backward, SGD."""
    model = on.place(_network(name, size)).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch, labels = _batch(on, size, images, layout), torch.zeros(images, dtype=torch.int64, device=on.device)

    def step() -> None:
        with on.precision.autocast():
            loss = F.cross_entropy(model(batch).float(), labels)
        on.precision.step(loss, optimizer, 0.0)

    return images / fastest(step, on.device)


def inference_rate(on: Runtime, name: str, size: int, images: int) -> float:
    """Return the images a second that `predict` gets, its batches ready in memory."""
    model = on.place(_network(name, size))
    batch = _batch(on, size, images, torch.channels_last)
    return images / fastest(lambda: logits(model, [batch], on), on.device)


def speed(name: str, size: int, images: int, on: Runtime, peaks: list[Ceiling]) -> Speed:
    """Measure a network, and hold it against the convolution ceiling of its precision; with fewer images if need be."""
    try:
        training = training_rate(on, name, size, images)
        inference = inference_rate(on, name, size, 2 * images)
    except (RuntimeError, MemoryError) as error:
        if images == 1 or not ran_out(error):
            raise
        return speed(name, size, images // 2, on, peaks)
    macs = models.cost(ModelConfig(name=name, num_classes=10, image_size=size), size).macs
    peak = next(c.rate for c in peaks if c.work == "convolution" and c.precision == on.precision.name)
    share = 2 * macs * PASSES["training"] * training / peak
    return Speed(model=name, size=size, training=training, inference=inference, share=share)


def _network(name: str, size: int) -> nn.Module:
    return models.build(ModelConfig(name=name, num_classes=10, image_size=size))


def _batch(on: Runtime, size: int, images: int, layout: torch.memory_format) -> Tensor:
    return torch.rand(images, 3, size, size).to(on.device).contiguous(memory_format=layout)


def _compiled(on: Runtime) -> Trial:
    """Try torch.compile in inference, whose compiling is not counted but said."""
    model = on.place(_network(*TRIAL)).eval()
    batch = _batch(on, TRIAL[1], 64, torch.channels_last)
    begun = time.perf_counter()
    try:
        quick = torch.compile(model)
        with torch.inference_mode(), on.precision.autocast():
            quick(batch)
    except Exception as error:  # no C++ compiler, or one of the many ways in which it fails
        return Trial(setting="compile", value="inference", images_per_second=0.0, note=f"failed: {error!s:.80}")
    taken = time.perf_counter() - begun

    def run() -> None:
        with torch.inference_mode(), on.precision.autocast():
            quick(batch)

    rate = 64 / fastest(run, on.device)
    note = f"shown only; {taken:.0f} s of compiling; eager {inference_rate(on, *TRIAL, 64):,.0f}"
    return Trial(setting="compile", value="inference, 64", images_per_second=rate, note=note)
