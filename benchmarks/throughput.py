"""Images a second and peak memory at equal work: ours beside what users would take instead.

    python benchmarks/throughput.py                                 # everything; see --help for how long
    python benchmarks/throughput.py --rows resnet20/32 --rounds 1 --images 256 --peers plain,tuned

Same network, batch, pictures and number of epochs for all; every measurement in a process of its own, the peers
alternating, medians over the rounds. A step is forward, loss, backward and optimiser on a batch that lies ready (ours:
with its data); an epoch has the reading of its data in it. Ours is its second epoch, of pictures that it has decoded
before the first and keeps in memory; the line below each table says what an epoch makes that reads them too, as those
of the peers do. Packages are installed into an environment of the benchmark's own on the first run. Prints a table in
Markdown and writes the same as JSON. Achieved ÷ measured: multiply-adds of the steps against the convolution rate that
this machine reached in the same run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from environment import cache, install, interpreter
from pictures import photos

from resnetlab.files import write_atomic

HERE = Path(__file__).resolve().parent
FIGURES = ("step", "epoch", "inference")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network and the work it is measured on."""

    network: str
    size: int
    batch: int
    images: int
    """In an epoch, unless --images says otherwise."""
    side: int
    """Of the stored pictures, in pixels."""


ROWS = {
    "resnet20/32": Row(network="resnet20", size=32, batch=128, images=1280, side=32),
    "resnet18/32": Row(network="resnet18", size=32, batch=128, images=512, side=32),
    "resnet50/224": Row(network="resnet50", size=224, batch=16, images=64, side=256),
}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A script in `peers/`, and the package it needs."""

    script: str
    package: str = ""
    says: str = ""


PEERS = {
    "ours": Peer(script="ours.py", says="ResNetLab, everything at auto"),
    "tutorial": Peer(script="tutorial.py", says="the tutorial's loop"),
    "plain": Peer(script="plain.py", says="torchvision + DataLoader, fp32"),
    "tuned": Peer(script="tuned.py", says="the same, channels_last, bf16 where the CPU has it, workers"),
    "timm": Peer(script="timm_parts.py", package="timm", says="timm's loader, optimiser, loop"),
    "lightning": Peer(script="lightning_trainer.py", package="lightning", says="Lightning's Trainer"),
    "ultralytics": Peer(script="ultralytics_classify.py", package="ultralytics", says="Ultralytics classify"),
    "keras": Peer(script="keras_fit.py", package="keras", says="Keras on PyTorch"),
}
"""To add a peer: a script in `peers/` that ends with `common.main`, and a row here."""


def measure(peer: Peer, row: Row, images: int, tries: int, home: Path) -> dict[str, Any]:
    """Run a peer in a process of its own; its figures, or ``{"error": why}``."""
    if peer.package and (problem := install(home / "environment", peer.package)):
        return {"error": problem}
    python = str(interpreter(home / "environment")) if peer.package else sys.executable
    data = photos(home / f"pictures-{row.side}-{images}", images, row.side)
    command = [python, str(HERE / "peers" / peer.script), "--data", str(data), "--tries", str(tries)]
    command += ["--network", row.network, "--size", str(row.size), "--batch", str(row.batch), "--images", str(images)]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed without a word"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "process": time.perf_counter() - begun}


def machine() -> dict[str, Any]:
    """Name this machine and measure its ceilings."""
    import torch

    from resnetlab import runtime
    from resnetlab.ceilings import ceilings

    runtime.keep_freed_memory()
    here = runtime.setup("cpu")
    found = ceilings(here.device, here.precision)
    return {
        "name": runtime.machine(here.device),
        "system": platform.platform(),
        "torch": torch.__version__,
        "precision": here.precision.name,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "ceilings": [asdict(c) for c in found],
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and spreads over the rounds that went well, or the last error."""
    good = [r for r in rounds if "error" not in r]
    if not good:
        return {"error": rounds[-1]["error"]}
    keys = [key for key in good[0] if isinstance(good[0][key], (int, float))]
    medians = {key: statistics.median(r[key] for r in good) for key in keys}
    ranges = {key: [min(r[key] for r in good), max(r[key] for r in good)] for key in FIGURES}
    return {**medians, "ranges": ranges, "rounds": len(good)}


def share(row: Row, rate: float, peaks: list[dict[str, Any]], precision: str) -> float:
    """Return which share of the convolution ceiling a training step at ``rate`` images a second reaches."""
    from resnetlab import models
    from resnetlab.config import ModelConfig

    macs = models.cost(ModelConfig(name=row.network, num_classes=10, image_size=row.size), row.size).macs
    peak = next(c["rate"] for c in peaks if c["work"] == "convolution" and c["precision"] == precision)
    return float(6 * macs * rate / peak)


def table(result: dict[str, Any]) -> str:
    """Write the result as Markdown."""
    here = result["machine"]
    lines = [f"Machine: {here['name']}, {here['precision']}, torch {here['torch']}; load at start {here['load']}.", ""]
    if result["clock"] == "cpu":
        lines += ["Images a second of processor time, as the machine was not idle; data workers are not counted."]
        lines += [""]
    for c in here["ceilings"]:
        unit = "GB/s" if c["work"] == "memory" else "Gop/s"
        lines.append(f"- ceiling, {c['work']} ({c['precision']}): {c['rate'] / 1e9:,.1f} {unit}")
    for name, peers in result["rows"].items():
        row = ROWS[name]
        lines += ["", f"### {name}, batch {row.batch}, {result['images'][name]} images an epoch", ""]
        lines += ["| peer | step | epoch | inference | peak memory | ours ÷ peer (step, epoch, inference) |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        ours = peers.get("ours", {})
        for peer, found in peers.items():
            if "error" in found:
                lines.append(f"| {PEERS[peer].says} | did not run: {found['error']} | | | | |")
                continue
            figures = " | ".join(f"{found[key]:,.1f}" for key in FIGURES)
            ratios = ", ".join(f"{ours[key] / found[key]:.2f}" for key in FIGURES) if "step" in ours else "-"
            lines.append(f"| {PEERS[peer].says} | {figures} | {found['peak'] / 2**30:.2f} GiB | {ratios} |")
        if "step" in ours and result["clock"] == "wall":
            reached = share(row, ours["step"], here["ceilings"], here["precision"])
            read = f"Reading takes {ours['prepare']:.1f} s; an epoch that reads makes {ours['read']:,.1f} images/s."
            lines += ["", f"Ours: {reached:.0%} of the measured convolution ceiling. {read}"]
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for, a line a measurement, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}; ours is always there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="in an epoch; by default 1,280, 512 and 64")
    parser.add_argument("--tries", type=int, default=3, help="steps that are timed")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of a machine that is not idle")
    parser.add_argument("--out", type=Path, default=Path("throughput.json"))
    parser.add_argument("--cache", type=Path, default=cache(), help="for the environment and the pictures")
    words = parser.parse_args()
    names = list(dict.fromkeys(["ours", *words.peers.split(",")]))
    rows = words.rows.split(",")
    if words.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    if unknown := [w for w in names if w not in PEERS] + [w for w in rows if w not in ROWS]:
        parser.error(f"there is no {', '.join(unknown)}")
    os.environ["RESNETLAB_BENCH_CLOCK"] = words.clock
    words.cache = words.cache.resolve()  # peers run in it
    words.cache.mkdir(parents=True, exist_ok=True)
    images = {name: max(words.images or ROWS[name].images, ROWS[name].batch) for name in rows}
    result: dict[str, Any] = {"machine": machine(), "clock": words.clock, "images": images, "rows": {}}
    for name in rows:
        found: dict[str, list[dict[str, Any]]] = {peer: [] for peer in names}
        for number in range(words.rounds):
            for peer, rounds in found.items():
                rounds.append(measure(PEERS[peer], ROWS[name], images[name], words.tries, words.cache))
                print(f"{name} round {number + 1} {peer}: {rounds[-1]}", flush=True)
                result["rows"][name] = {peer: summary(rounds) for peer, rounds in found.items() if rounds}
                write_atomic(words.out, json.dumps(result, indent=2) + "\n")
    print("\n" + table(result))


if __name__ == "__main__":
    main()
