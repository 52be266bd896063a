"""Time to accuracy on CIFAR-10: seconds until the mean test accuracy passes each target, ours beside others.

    python benchmarks/time_to_accuracy.py DATA --arm fast:1,2,4,8 --arm airbench:2,9.9 --seeds 3 --out FOLDER

An arm is a name and the lengths, in epochs, that it is run for: a schedule that ends at a rate of 0 has one honest
accuracy, at its end, so a curve is made of whole runs. Arms:

- ``fast``, and with a network of ours ``mirror-small``, ``mirror-medium``, ``fast-small``, ``fast-medium``,
  ``fast-deep``, ``fast-large``: `resnetlab train DATA --recipe fast`, with all training images;
- ``airbench``: the package's 94 % recipe, on a CPU patched to run there (`benchmarks/peers/airbench94.py`), its
  allocator mended as ours is; ``airbench-as-is``: without that;
- ``resnet18``: a tuned ResNet-18, `resnetlab train DATA --model resnet18 --recipe default`;
- ``tutorial``: the widely copied tutorial's ResNet-50 at 224 px (hours an epoch on a CPU).

Runs alternate between the arms, seed by seed. Inside the clock of ``process``: everything from the start of the Python
process to its end, so imports, reading 60,000 images, training, validation, scoring, pictures. Inside that of
``training``: the optimiser steps with their data, and nothing else. Written: results.csv (a row a run; a row that is
there is not run again), results.md, curve.png, of one data set and machine. Runs on an otherwise idle machine, or say
so.
"""

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import environment

from resnetlab.files import write_atomic

TARGETS = (0.70, 0.75, 0.80, 0.8278, 0.85, 0.88, 0.90, 0.906)
NETWORKS = ("mirror-small", "mirror-medium", "fast-small", "fast-medium", "fast-deep", "fast-large")
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: what it took and what came of it."""

    data: str
    machine: str
    arm: str
    epochs: float
    seed: int
    process_seconds: float
    training_seconds: float
    top1: float
    top1_views: float


def ours(*arguments: str) -> Callable[[str, float, int], dict[str, float]]:
    """Return an arm that is one of our commands."""

    def run(data: str, epochs: float, seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, "-m", "resnetlab", "train", data, *arguments, f"epochs={epochs:g}", "data.val=0"]
            _call([*command, "--seed", str(seed), "--out", str(out)])
            scores = json.loads((out / "scores.json").read_text())
            with (out / "timing.csv").open() as file:
                training = sum(float(row["train_seconds"]) for row in csv.DictReader(file))
        single = scores["test"]["top1"]
        views = next((s["top1"] for name, s in scores.items() if name.startswith("test-")), single)
        return {"training_seconds": training, "top1": single, "top1_views": views}

    return run


def airbench(*, mended: bool) -> Callable[[str, float, int], dict[str, float]]:
    """Return an arm that runs the package in an environment of its own; ``mended``: glibc keeps what is freed."""

    def run(data: str, epochs: float, seed: int) -> dict[str, float]:
        place = environment.cache() / "airbench"
        if problem := environment.install(place, "airbench"):
            raise SystemExit(f"airbench cannot be installed: {problem}")
        script = str(HERE / "peers" / "airbench94.py")
        command = [str(environment.interpreter(place)), script, data, str(epochs), str(seed)]
        printed = _call(command, {"AIRBENCH_ALLOCATOR": str(int(mended))})
        found: dict[str, float] = json.loads(printed.splitlines()[-1])
        return found

    return run


ARMS: dict[str, Callable[[str, float, int], dict[str, float]]] = {
    "fast": ours("--recipe", "fast"),
    **{name: ours("--recipe", "fast", "--model", name) for name in NETWORKS},
    "airbench": airbench(mended=True),
    "airbench-as-is": airbench(mended=False),
    "resnet18": ours("--recipe", "default", "--model", "resnet18"),
    "tutorial": ours("--recipe", "tutorial"),
}


def _call(command: list[str], variables: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(variables or {})})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}{done.stdout[-2000:]}")
    return done.stdout


def measure(data: str, machine: str, plan: list[tuple[str, float]], seeds: int, out: Path) -> list[Row]:
    """Run what is not in results.csv yet, alternating between the arms."""
    path = out / "results.csv"
    rows = _read(path)
    if other := next((r for r in rows if (r.data, r.machine) != (data, machine)), None):
        raise SystemExit(f"{path} is of {other.data} on {other.machine}. Name another folder with --out.")
    for seed in range(seeds):
        for arm, epochs in plan:
            if any((r.arm, r.epochs, r.seed) == (arm, epochs, seed) for r in rows):
                continue
            begun = time.perf_counter()
            found = ARMS[arm](data, epochs, seed)
            where = {"data": data, "machine": machine, "arm": arm, "epochs": epochs, "seed": seed}
            row = Row(**where, process_seconds=time.perf_counter() - begun, **found)
            rows.append(row)
            text = io.StringIO()
            writer = csv.DictWriter(text, list(asdict(row)))
            writer.writeheader()
            writer.writerows(asdict(r) for r in rows)
            write_atomic(path, text.getvalue())
            print(
                f"{arm} {epochs:g} epochs, seed {seed}: {row.process_seconds:.0f} s ({row.training_seconds:.0f} s of "
                f"training), {row.top1:.2%}, with views {row.top1_views:.2%}",
                flush=True,
            )
    return rows


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    words = ("data", "machine", "arm")
    with path.open(newline="") as file:
        return [
            Row(**{k: r.pop(k) for k in words}, seed=int(r.pop("seed")), **{k: float(v) for k, v in r.items()})
            for r in csv.DictReader(file)
        ]


def table(rows: list[Row], machine: str) -> str:
    """Return every arm's points, and the least time to each target, as Markdown."""
    lines = [f"On {machine}.", "", "| arm | epochs | n | process, s | training, s | top-1 | with views |"]
    lines += ["|---|---|---|---|---|---|---|"]
    points = [
        (key, [r for r in rows if (r.arm, r.epochs) == key]) for key in dict.fromkeys((r.arm, r.epochs) for r in rows)
    ]
    for (arm, epochs), found in points:
        process, training, single, views = (
            [getattr(r, name) for r in found] for name in ("process_seconds", "training_seconds", "top1", "top1_views")
        )
        lines.append(
            f"| {arm} | {epochs:g} | {len(found)} | {statistics.median(process):.0f} | "
            f"{statistics.median(training):.0f} | {_spread(single)} | {_spread(views)} |"
        )
    for what, name in (("one view", "top1"), ("its views", "top1_views")):
        lines += [
            "",
            f"Least seconds of training (of the process) until the mean accuracy with {what} passes a target:",
            "",
        ]
        lines += _passed([found for _, found in points], name)
    return "\n".join(lines) + "\n"


def _passed(points: list[list[Row]], name: str) -> list[str]:
    """Return, for each target and arm, the quickest length whose mean of ``name`` passes it, as a table."""
    arms = list(dict.fromkeys(found[0].arm for found in points))
    lines = ["| target | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for target in TARGETS:
        cells = []
        for arm in arms:
            times = [
                [
                    statistics.median(r.training_seconds for r in found),
                    statistics.median(r.process_seconds for r in found),
                ]
                for found in points
                if found[0].arm == arm and statistics.mean(getattr(r, name) for r in found) >= target
            ]
            cells.append("{:.0f} ({:.0f})".format(*min(times)) if times else "not reached")
        lines.append(f"| {target:.2%} | " + " | ".join(cells) + " |")
    return lines


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2%}"
    return f"{statistics.mean(values):.2%} ± {100 * statistics.stdev(values):.2f}"


def draw(rows: list[Row], path: Path) -> None:
    """Draw accuracy against seconds of training, a line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for arm in dict.fromkeys(r.arm for r in rows):
        lengths = sorted({r.epochs for r in rows if r.arm == arm})
        groups = [[r for r in rows if r.arm == arm and r.epochs == e] for e in lengths]
        times = [statistics.median(r.training_seconds for r in g) for g in groups]
        line = axes.plot(times, [100 * statistics.mean(r.top1_views for r in g) for g in groups], "o-", label=arm)[0]
        axes.plot(times, [100 * statistics.mean(r.top1 for r in g) for g in groups], ".:", color=line.get_color())
    axes.axhline(82.78, color="0.6", linewidth=1)
    axes.text(1, 82.78, "the tutorial's 82.78 % (on lossless CIFAR-10)", va="bottom", fontsize=8, color="0.4",
              transform=axes.get_yaxis_transform(), ha="right")  # fmt: skip
    axes.set(xscale="log", xlabel="seconds of training", ylabel="test accuracy, % (dotted: a single view)")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description="Time to accuracy on CIFAR-10, ours beside others.")
    parser.add_argument("data", help="CIFAR-10, as for `resnetlab train`")
    parser.add_argument("--arm", action="append", help="NAME:EPOCHS,EPOCHS...; once for each arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("time_to_accuracy"))
    arguments = parser.parse_args()
    plan = []
    for text in arguments.arm or ["fast:1,2,4,8", "airbench:9.9"]:
        name, _, lengths = text.partition(":")
        if name not in ARMS:
            parser.error(f'there is no arm "{name}"; there are {", ".join(ARMS)}')
        try:
            plan += [(name, float(epochs)) for epochs in lengths.split(",")]
        except ValueError:
            parser.error(f"--arm {text}: epochs are missing; it is NAME:EPOCHS,EPOCHS, as in fast:8,16")
    arguments.out.mkdir(parents=True, exist_ok=True)
    from resnetlab import runtime

    machine = runtime.machine()
    rows = measure(os.path.abspath(arguments.data), machine, plan, arguments.seeds, arguments.out)
    (arguments.out / "results.md").write_text(found := table(rows, machine))
    draw(rows, arguments.out / "curve.png")
    print(found)


if __name__ == "__main__":
    main()
