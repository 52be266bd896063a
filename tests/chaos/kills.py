"""R1 to R3: a run that is killed at any instant and resumed, elsewhere or otherwise, ends where it would have ended."""

import atexit
import random
import shutil
import socket
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from chaos import commands, injected
from chaos.pictures import class_folders
from chaos.record import Bench, Result, Row, Tally
from resnetlab.rundir import is_run

DIGITS = ("digits", "data.limit=160", "data.limit_test=60")
SMALL = (
    "--model=resnet20",
    "epochs=2",
    "batch_size=32",
    "optim.name=sgd",
    "optim.nesterov=true",
    "optim.average=0.5",
    "data.augment=crop:1,cutout:2",
    "label_smoothing=0.1",
    "keep=best",
    "checkpoint_minutes=0.0001",  # after every step, so that many kills fall into a save
    "precision=fp32",
)
"""A short run in which everything that a checkpoint holds moves."""
MOMENTS = (*injected.POINTS, "any time")


def train(words: Sequence[str], out: Path) -> list[str]:
    """Return the command that begins a run, or that goes on with one."""
    return ["train", "--resume", str(out)] if is_run(out) else ["train", *words, "--out", str(out)]


def reference(bench: Bench, words: Sequence[str]) -> Path:
    """Run the command to its end, undisturbed, once for all rows that need it. Returns the run's directory."""
    path = _references() / str(abs(hash((bench.size, *words))))
    if not path.exists():
        code, text = commands.run(train(words, path), bench.folder / "reference.txt", seconds=300)
        if code != 0:
            raise RuntimeError(f"the run that nothing was done to ended with {code}: {text[-300:]}")
    return path


@cache
def _references() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="chaos-references-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def killed_anywhere(bench: Bench, words: Sequence[str], kills: int, each: int = 5) -> Result:
    """Kill runs ``each`` times, every time at another moment, and compare what they come to in the end."""
    expected, chance, tally = reference(bench, words), bench.chance("kills", *words), Tally(bench, of=kills)
    moments: dict[str, int] = {}
    while tally.tried < kills:
        out, output = bench.folder / f"run-{tally.tried}", bench.folder / "output.txt"
        hits: list[str] = []
        while len(hits) < min(each, kills - tally.tried):
            moment = MOMENTS[(tally.tried + len(hits)) % len(MOMENTS)]
            if not _killed(train(words, out), output, moment, chance):
                break
            hits.append(moment)
        code, text = commands.run(train(words, out), output)
        wrong = f"ended with {code}: {text[-200:]}" if code else commands.differences(out, expected)
        for moment in hits:
            tally.add(f"killed in {', '.join(hits)}", wrong)
            moments[moment] = moments.get(moment, 0) + 1
        shutil.rmtree(out)
        output.unlink()
    return tally.result(_counted(moments))


def _killed(words: Sequence[str], output: Path, moment: str, chance: random.Random) -> bool:
    """Run a command and kill it at a moment. False: it was through before the moment came."""
    if moment == "any time":
        command = commands.start(words, output)
        code = command.wait(chance.uniform(0.0, 2.0))
        if code is None:
            command.send(9)
            code = command.wait(30)
        return code == -9
    many = 12 if moment in ("sync", "rename", "replace") else 6 if moment in ("step", "checkpoint") else 1
    delay = chance.choice([0.0, chance.uniform(0, 0.03)])
    arm = partial(injected.kill_at, moment, chance.randrange(many), delay)
    return commands.run(words, output, arm=arm)[0] == -9


def _counted(moments: dict[str, int]) -> str:
    return "kills by moment: " + ", ".join(f"{name} {n}" for name, n in sorted(moments.items()))


def in_memory(bench: Bench) -> Result:
    """Kill runs whose images lie in memory."""
    return killed_anywhere(bench, (*DIGITS, *SMALL), bench.pick(11, 120))


def streaming(bench: Bench) -> Result:
    """Kill runs whose images are decoded from files by threads as they are needed."""
    data = class_folders(bench.folder / "photos", {"blue": 40, "green": 40, "red": 40})
    more = ("data.memory=stream", "data.workers=2", "data.size=16", "data.augment=crop:2,flip")
    return killed_anywhere(bench, (str(data), *SMALL, *more), bench.pick(3, 60))


def group(
    words: Sequence[str],
    folder: Path,
    arms: Sequence[commands.Arm | None],
    seconds: float = 60,
    watched: int | None = None,
) -> list[int | None]:
    """Run a command as processes of one group (as torchrun starts them), and return how each ended.

    What has not ended after ``seconds``, or when ``watched`` (a rank; None: any) has, is killed and counts as None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank, arm in enumerate(arms):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(arms)), "RANK": str(rank)}
        environment |= {"LOCAL_RANK": str(rank), "RESNETLAB_GROUP_SECONDS": "20"}
        output = folder / f"rank-{rank}.txt"
        output.unlink(missing_ok=True)
        started.append(commands.start(words, output, arm=arm, environment=environment))
    if watched is not None:
        started[watched].wait(seconds)
    codes = [command.wait(seconds if watched is None else 0) for command in started]
    for command in started:
        command.send(9)
        command.wait(10)
    return codes


def two_processes(bench: Bench) -> Result:
    """Kill one process of two, at a moment of the run; the other must end by itself, and both go on together."""
    words = (*DIGITS, *SMALL)
    path, chance = bench.folder / "reference", bench.chance("two")
    if (codes := group(train(words, path), bench.folder, [None, None], 120)) != [0, 0]:
        raise RuntimeError(f"two processes that nothing was done to ended with {codes}")
    tally = Tally(bench, of=bench.pick(2, 20))
    while tally.tried < tally.of:
        out, rank = bench.folder / f"run-{tally.tried}", tally.tried % 2
        moment = ("step", "checkpoint", "sync", "evaluation")[tally.tried // 2 % 4] if rank == 0 else "step"
        call = chance.randrange(2) if moment == "evaluation" else chance.randrange(1, 6)
        arms: list[commands.Arm | None] = [None, None]
        arms[rank] = partial(injected.kill_at, moment, call, 0.0)
        codes = group(train(words, out), bench.folder, arms)
        wrong = "the other process hung" if None in codes else None if codes[rank] == -9 else f"not killed: {codes}"
        other = (bench.folder / f"rank-{1 - rank}.txt").read_text()
        wrong = wrong or ("a traceback: " + other[-200:] if "Traceback" in other else None)
        if not wrong:
            codes = group(train(words, out), bench.folder, [None, None])
            wrong = f"resumed, it ended with {codes}" if codes != [0, 0] else commands.differences(out, path)
        tally.add(f"rank {rank} killed in {moment}", wrong)
        shutil.rmtree(out, ignore_errors=True)
    return tally.result()


ROWS = (
    Row(
        id="R1",
        part="memory",
        fault="SIGKILL at random instants (in a step, an evaluation, a checkpoint's write, the final save), "
        "images in memory",
        check="resumed with `train --resume` until done: weights, optimiser, averages, metrics.csv and scores equal "
        "those of the undisturbed run to the byte",
        run=in_memory,
    ),
    Row(
        id="R1",
        part="stream",
        fault="The same, images decoded by threads as they are needed",
        check="the same, to the byte",
        run=streaming,
    ),
    Row(
        id="R1",
        part="group",
        fault="The same, one of two processes (gloo) killed",
        check="the other process ends by itself with a message; both resumed, to the byte",
        run=two_processes,
    ),
)
