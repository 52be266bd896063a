"""How fast networks train here: a process for each job measures them all, so that they share the machine as later."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from resnetlab.errors import ResNetLabError
from resnetlab.lab.budget import Speed
from resnetlab.lab.records import Facts, Run

STEPS = 4
"""Batches of made-up images that there are to train on."""


def measure(
    runs: Sequence[Run], facts: Facts, recipe: str, jobs: int, threads: int, devices: Sequence[str] = ()
) -> list[Speed]:
    """Train each run's network a few steps, in ``jobs`` processes at the same time, and average over them.

    ``devices`` are the GPUs that these share, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        ResNetLabError: A network cannot be trained like this; the message is its own.
    """
    request = json.dumps({"facts": facts.model_dump(), "recipe": recipe, "runs": [r.model_dump() for r in runs]})
    command = [sys.executable, "-m", "resnetlab.lab.speed"]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=environment(threads) | ({"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}),
        )
        for number in range(jobs)
    ]
    try:
        for child in children:
            assert child.stdin is not None
            child.stdin.write(request)
            child.stdin.close()
            child.stdin = None
        answers = []
        for child in children:
            out, err = child.communicate()
            if child.returncode:
                last = err.strip().rpartition("\n")[2]
                raise ResNetLabError(f"The speed of the networks cannot be measured: {last or 'it was killed'}")
            answers.append(json.loads(out.strip().rpartition("\n")[2]))
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [
        Speed(seconds=sum(a[i][0] for a in answers) / jobs, memory=max(a[i][1] for a in answers))
        for i in range(len(runs))
    ]


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a child that computes with so many threads."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "MKL_NUM_THREADS": str(threads),
    }


def _main() -> None:
    """Read runs from stdin, write [seconds a step, bytes at the peak] of each to stdout."""
    request = json.load(sys.stdin)
    facts = Facts(**request["facts"])
    try:
        found = [_steps(Run(**run), facts, request["recipe"]) for run in request["runs"]]
    except ResNetLabError as error:
        print(error, file=sys.stderr)  # noqa: T201 - this is what the process is for
        sys.exit(error.exit_status)
    print(json.dumps(found))  # noqa: T201


def _steps(run: Run, facts: Facts, recipe_name: str) -> tuple[float, int]:
    import numpy as np

    from resnetlab import session
    from resnetlab.config import override
    from resnetlab.console import Quiet
    from resnetlab.recipes import Facts as RecipeFacts
    from resnetlab.recipes import recipe
    from resnetlab.sources.dataset import Dataset, Split
    from resnetlab.sources.images import ArrayImages

    base = recipe(recipe_name, RecipeFacts(images=facts.train, size=facts.size, mirrors=False, model=run.model))
    settings = [s for s in run.settings if not s.startswith(("data.limit", "epochs="))]
    chosen = override(base, [*settings, "epochs=9", "data.val=0"])
    count = max(STEPS * chosen.batch_size, facts.classes)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (count, facts.size, facts.size, facts.channels), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % facts.classes
    split = Split(images=ArrayImages(pixels, "noise"), labels=labels, classes=tuple(map(str, range(facts.classes))))
    dataset = Dataset(name="noise", train=split, test=None, origin="made up", channels=facts.channels)
    cost = session.dry_run(session.resolve("noise", dataset, chosen, Quiet()))
    return cost["seconds_per_step"], cost["peak_memory_bytes"]


if __name__ == "__main__":
    _main()
