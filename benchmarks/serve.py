"""The service under load beside plain FastAPI without batching: the same network, machine, clients and requests.

    python benchmarks/serve.py [--seconds 5] [--networks resnet20 resnet50] [--clients 1 8 64]

Networks have random weights. The peer is what a tutorial shows: a FastAPI route that decodes the upload with the same
decoder, prepares it the same way and calls the network, in FastAPI's thread pool. Both servers run at the same time,
each in its own process, and are loaded in turn; the clients are this process, on the same machine. Every answer is
held against what the network says of that image (probabilities within 1e-4), so a lost or swapped answer is counted.
Prints a table, and a JSON line with the same figures.
"""

import argparse
import asyncio
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = {"resnet20": 32, "resnet50": 224}
IMAGES = 32


def make(name: str, folder: Path) -> Path:
    """Write a bundle with random weights."""
    import torch

    from resnetlab import bundle, models
    from resnetlab.bundle import Card
    from resnetlab.config import ModelConfig
    from resnetlab.preprocess import Preprocess
    from resnetlab.recipes import RECIPES, Facts

    torch.manual_seed(0)
    size = SIZES[name]
    config = ModelConfig(name=name, num_classes=10, in_channels=3)
    preprocess = Preprocess(
        size=size, resize=round(size * 8 / 7) if size > 64 else size, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    recipe = RECIPES["default"](Facts(images=100, size=size, mirrors=True))
    card = Card(model=config, classes=tuple("abcdefghij"), preprocess=preprocess, recipe=recipe)
    folder.mkdir()
    bundle.save(folder, models.build(config).state_dict(), card)
    return folder


def peer(run: str) -> None:
    """Serve a bundle as a tutorial would."""
    import uvicorn
    from fastapi import FastAPI, Request

    from resnetlab import bundle, predict, runtime
    from resnetlab.metrics import answers
    from resnetlab.serve.connections import bind
    from resnetlab.sources.images import decode

    opened, machine = bundle.load(run), runtime.setup(precision="fp32")
    app = FastAPI()

    def work(body: bytes) -> list[dict[str, Any]]:
        return answers(predict.predict(opened, [decode(body, channels=3)], ["image"], machine), ["image"], 5)

    @app.post("/predict")
    async def route(request: Request) -> dict[str, Any]:
        from fastapi.concurrency import run_in_threadpool

        return {"images": await run_in_threadpool(work, await request.body())}

    listening = bind("127.0.0.1", 0)
    print(f"open http://127.0.0.1:{listening.getsockname()[1]} ", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listening])


def picture(seed: int, size: int) -> bytes:
    """Return a JPEG that no other seed gives: smooth, as photographs are."""
    import numpy as np
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    side = size if size <= 64 else round(size * 1.5)
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


async def client(port: int, requests: list[tuple[bytes, list[float]]], until: float, first: int) -> list[float | None]:
    """Ask on one connection, one request after the other; return the seconds of each, None where it went wrong."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times: list[float | None] = []
    at = first
    while time.monotonic() < until:
        body, right = requests[at % len(requests)]
        at += 1
        head = "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        start = time.perf_counter()
        writer.write(head.encode() + body)
        try:
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(answer.split("content-length:")[1].split()[0])
            reply = json.loads(await reader.readexactly(length))
            found = {t["class"]: t["probability"] for t in reply["images"][0]["top"]}
            ok = all(abs(found.get(c, p) - p) < 1e-4 for c, p in zip("abcdefghij", right, strict=True))
            times.append(time.perf_counter() - start if ok else None)
        except (OSError, asyncio.IncompleteReadError, KeyError, IndexError):
            times.append(None)
            break
    writer.close()
    return times


async def load(port: int, clients: int, seconds: float, requests: list[tuple[bytes, list[float]]]) -> dict[str, float]:
    """Load a server with so many clients for so long."""
    import numpy as np

    begin = time.monotonic()
    jobs = [client(port, requests, begin + seconds, 7 * i) for i in range(clients)]
    times = [t for found in await asyncio.gather(*jobs) for t in found]
    took = time.monotonic() - begin
    good = np.array([t for t in times if t is not None]) * 1000
    p50, p95, p99 = np.quantile(good, [0.5, 0.95, 0.99]) if len(good) else [np.nan] * 3  # not one answer in time
    lost = len(times) - len(good)
    return {"requests": len(times), "lost": lost, "per_s": len(good) / took, "p50": p50, "p95": p95, "p99": p99}


def start(*command: str) -> tuple["subprocess.Popen[str]", int]:
    """Start a server, and return it with its port."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "127.0.0.1:" not in (line := process.stdout.readline()):
        assert line, "the server ended"
    return process, int(line.split("127.0.0.1:")[1].split()[0])


def measure(name: str, clients: list[int], seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Load both servers in turn, and yield a row each."""
    from resnetlab import api
    from resnetlab.sources.images import decode

    with tempfile.TemporaryDirectory() as folder:
        run = make(name, Path(folder) / name)
        images = [picture(i, SIZES[name]) for i in range(IMAGES)]
        opened = api.load(run)
        right = [opened.predict(decode(data, channels=3)).probabilities()[0].tolist() for data in images]
        requests = list(zip(images, right, strict=True))
        servers = {
            "resnetlab serve": start("-m", "resnetlab", "serve", str(run), "--port", "0"),
            "plain FastAPI": start(__file__, "--peer", str(run)),
        }
        try:
            for count in clients:
                for _ in range(rounds):
                    for server, (_, port) in servers.items():
                        asyncio.run(load(port, min(count, 2), 0.5, requests))
                        figures = asyncio.run(load(port, count, seconds, requests))
                        yield {"network": name, "clients": count, "server": server, **figures}
        finally:
            for process, _ in servers.values():
                process.terminate()
                process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if arguments.peer:
        peer(arguments.peer)
        return
    rows = []
    print(f"{'network':9} {'clients':>7} {'server':16} {'requests':>8} {'lost':>4} {'req/s':>8}", end="")
    print(f" {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8}")
    for name in arguments.networks:
        for row in measure(name, arguments.clients, arguments.seconds, arguments.rounds):
            rows.append(row)
            print(
                f"{row['network']:9} {row['clients']:7} {row['server']:16} {row['requests']:8} {row['lost']:4}", end=""
            )
            print(f" {row['per_s']:8.1f} {row['p50']:8.1f} {row['p95']:8.1f} {row['p99']:8.1f}", flush=True)
    print(json.dumps({"cpus": os.cpu_count(), "machine": platform.processor() or platform.machine(), "rows": rows}))


if __name__ == "__main__":
    main()
