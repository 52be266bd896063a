"""R3, R14 and R15: signals, process groups that lose a member, and another number of processes."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from chaos import commands, injected, kills
from chaos.record import Bench, Result, Row, Tally
from resnetlab.stopping import TOGETHER

WORDS = (*kills.DIGITS, *kills.SMALL)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOMENTS = ("step", "evaluation", "checkpoint", "final save")


def signals(bench: Bench) -> Result:
    """Send each signal at each moment, once: it saves, ends with 128 + n, and the resumed run ends the same."""
    expected = kills.reference(bench, WORDS)
    cases = [(n, m, c) for c in range(3 if bench.size == "full" else 1) for n in SIGNALS for m in MOMENTS]
    cases = cases if bench.size == "full" else [cases[i] for i in (0, 6, 9)]
    tally, chance = Tally(bench, of=len(cases)), bench.chance("signals")
    for number, moment, again in cases:
        run, output = bench.folder / "run", bench.folder / "output.txt"
        call = 0 if moment == "final save" else chance.randrange(2 if moment == "evaluation" else 9)
        arm = partial(injected.signal_at, moment, call, chance.choice([0.0, 0.01]), int(number))
        code, text = commands.run(kills.train(WORDS, run), output, arm=arm)
        wrong = _not_saved(code, text, number)
        if not wrong:
            output.unlink()
            code, text = commands.run(kills.train(WORDS, run), output)
            wrong = f"resumed, it ended with {code}: {text[-200:]}" if code else commands.differences(run, expected)
        tally.add(f"{number.name} in {moment}, {again + 1}", wrong)
        shutil.rmtree(run)
        output.unlink()
    return tally.result("; ".join(f"{number.name} in {moment}" for number, moment, again in cases if again == 0))


def _not_saved(code: int | None, text: str, number: signal.Signals) -> str | None:
    said = " ".join(text.split())
    goes_on = "train --resume" in said or "when the run was finished" in said
    if code != 128 + number or "Traceback" in text or not goes_on:
        return f"ended with {code}: {said[-250:]}"
    return None


def signals_twice(bench: Bench) -> Result:
    """Send each signal twice, too far apart to be one, in a step that hangs: it ends, and what was saved is whole."""
    expected = kills.reference(bench, WORDS)
    tally = Tally(bench, of=bench.pick(1, 9))
    for number in range(tally.of):
        run, output, which = bench.folder / "run", bench.folder / "output.txt", SIGNALS[number % 3]
        begun = time.monotonic()
        code, text = commands.run(
            kills.train(WORDS, run), output, arm=partial(hang_and_signal, number // 3 + 1, int(which))
        )
        seconds = time.monotonic() - begun
        bad = code != 128 + which or "Traceback" in text or seconds > 60
        wrong = f"ended with {code} after {seconds:.0f} s: {text[-200:]}" if bad else None
        if not wrong:
            output.unlink()
            code, text = commands.run(kills.train(WORDS, run), output)
            wrong = f"resumed, it ended with {code}: {text[-200:]}" if code else commands.differences(run, expected)
        tally.add(f"{which.name} twice", wrong)
        shutil.rmtree(run)
        output.unlink()
    return tally.result()


def hang_and_signal(call: int, number: int) -> None:
    """Let a step take minutes, and send the signal twice meanwhile."""
    injected.at("step", call, lambda: time.sleep(300))
    injected.signal_at("step", call, 0.3, number, times=2, apart=TOGETHER + 0.2)


def terminal_gone(bench: Bench) -> Result:
    """Close the terminal that a run shows itself on: it saves and ends with 129 although it can print no more."""
    import pty

    expected = kills.reference(bench, WORDS)
    tally = Tally(bench, of=bench.pick(1, 5))
    for number in range(tally.of):
        run = bench.folder / "run"
        status = bench.folder / "status"
        child, terminal = pty.fork()
        if child == 0:
            os.execv(sys.executable, [sys.executable, "-c", _IN_TERMINAL, str(status), *kills.train(WORDS, run)])
        until = time.monotonic() + 100
        while not list((run / "checkpoint").glob("step-*")) and time.monotonic() < until:
            time.sleep(0.02)
        os.close(terminal)
        _, how = os.waitpid(child, 0)
        said = status.read_text() if status.exists() else f"no status ({how})"
        wrong = None if said == "129" else f"ended with {said}"
        if not wrong:
            code, text = commands.run(kills.train(WORDS, run), bench.folder / "o.txt")
            wrong = f"resumed, it ended with {code}: {text[-200:]}" if code else commands.differences(run, expected)
        tally.add(f"closed {number + 1}", wrong)
        shutil.rmtree(run)
    return tally.result()


_IN_TERMINAL = """
import sys, pathlib
from resnetlab.cli import main
try:
    main(sys.argv[2:])
except SystemExit as end:
    pathlib.Path(sys.argv[1]).write_text(str(end.code))
"""


def stopped_member(bench: Bench) -> Result:
    """Stop one process of two for good: the other gives it up, ends by itself, and both go on together."""
    tally, expected = Tally(bench, of=bench.pick(1, 6)), bench.folder / "reference"
    if (codes := kills.group(kills.train(WORDS, expected), bench.folder, [None, None], 120)) != [0, 0]:
        raise RuntimeError(f"two processes that nothing was done to ended with {codes}")
    for number in range(tally.of):
        run, rank, call = bench.folder / f"run-{number}", 1 - number % 2, 2 + number // 2
        arms: list[commands.Arm | None] = [None, None]
        arms[rank] = partial(injected.signal_at, "step", call, 0.0, int(signal.SIGSTOP))
        begun = time.monotonic()
        codes = kills.group(kills.train(WORDS, run), bench.folder, arms, watched=1 - rank)
        seconds, other = time.monotonic() - begun, bench.folder / f"rank-{1 - rank}.txt"
        said = " ".join(other.read_text().split())
        good = codes[1 - rank] == 1 and "Another process of this run" in said and "Traceback" not in said
        wrong = None if good else f"the other ended with {codes[1 - rank]}: {said[-200:]}"
        if not wrong:
            codes = kills.group(kills.train(WORDS, run), bench.folder, [None, None])
            wrong = f"resumed, it ended with {codes}" if codes != [0, 0] else commands.differences(run, expected)
        tally.add(f"rank {rank} stopped at step {call + 1} ({seconds:.0f} s)", wrong)
        shutil.rmtree(run, ignore_errors=True)
    return tally.result("two processes, gloo; a process waits 20 s for the others (RESNETLAB_GROUP_SECONDS)")


LOST = (("kill", 1, "step", 3), ("kill", 0, "checkpoint", 2), ("agent", 0, "step", 5))
"""What is done under torchrun: to which rank, at which call of which moment."""


def lost_member(bench: Bench) -> Result:
    """Under torchrun: kill a process, rank 0 in a save, or torchrun itself; then let it, or us, start again."""
    path = bench.folder / "reference"
    if (code := torchrun(bench, kills.train(WORDS, path))) != 0:
        raise RuntimeError(f"torchrun that nothing was done to ended with {code}: {_said(bench)}")
    tally, again = Tally(bench, of=len(LOST)), 0
    for what, rank, moment, call in LOST:
        run = bench.folder / "run"
        begun = time.monotonic()
        code = torchrun(bench, ["train", *WORDS, "--out", str(run)], fault=(what, rank, moment, call))
        seconds = time.monotonic() - begun
        wrong = f"{seconds:.0f} s without an end" if code is None else None
        again += code == 0
        if code:
            code = torchrun(bench, kills.train(WORDS, run))
        wrong = wrong or (f"ended with {code}: {_said(bench)}" if code else commands.differences(run, path))
        tally.add(f"{what} rank {rank} in {moment} {call + 1} ({seconds:.0f} s)", wrong)
        shutil.rmtree(run)
    return tally.result(
        f"torchrun --max-restarts=1, two processes, gloo; a process waits 30 s for the others; torchrun itself brought "
        f"{again} of {len(LOST)} to the end, the others were resumed by hand",
    )


def torchrun(bench: Bench, words: Sequence[str], fault: tuple[str, int, str, int] | None = None) -> int | None:
    """Run a command in two processes under torchrun, with a fault in the first try; None: it took minutes."""
    script = bench.folder / "member.py"
    script.write_text(_MEMBER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2", "--max-restarts=1"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RESNETLAB_GROUP_SECONDS": "30",
        "CHAOS_PATH": str(Path(__file__).parent.parent),
        "CHAOS_FAULT": "/".join(map(str, fault or ())),
        "CHAOS_MEMBERS": str(bench.folder / "members"),
    }
    with open(bench.folder / "torchrun.txt", "w") as output:
        process = subprocess.Popen(
            [*launch, *words], stdout=output, stderr=output, env=environment, cwd=bench.folder, start_new_session=True
        )
        try:
            code: int | None = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    return code if _members_ended(bench.folder / "members") else None


def _members_ended(members: Path) -> bool:
    """Wait for the processes that torchrun has started, which outlive it where it is killed; then end what is left."""
    until = time.monotonic() + PATIENCE
    left = [int(line) for line in members.read_text().split()]
    members.unlink()
    while (left := [pid for pid in left if _lives(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


PATIENCE = 180
"""Seconds after which torchrun, or a process of it, counts as hung."""


def _said(bench: Bench) -> str:
    return " ".join((bench.folder / "torchrun.txt").read_text().split())[-250:]


_MEMBER = """
import os, sys
sys.path.insert(0, os.environ["CHAOS_PATH"])
with open(os.environ["CHAOS_MEMBERS"], "a") as members:
    members.write(f"{os.getpid()}\\n")
from resnetlab.cli import main
what, rank, moment, call = (os.environ["CHAOS_FAULT"].split("/") + ["", "", "", ""])[:4]
if what and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == rank:
    import signal
    from chaos import injected
    if what == "agent":
        injected.at(moment, int(call), lambda: os.kill(os.getppid(), signal.SIGKILL))
    else:
        injected.signal_at(moment, int(call), 0.0, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
main(sys.argv[1:])
"""


def world_size(bench: Bench) -> Result:
    """Stop a run of one process and go on with two, and the other way: the same images in every step, scores close."""
    plain = ("--model=linear", "epochs=3", "batch_size=32", "optim.average=0", "precision=fp32")
    words = (*kills.DIGITS, *plain, "checkpoint_minutes=0.0001")
    expected = kills.reference(bench, words)
    cases = [(1, 2), (2, 1)] if bench.size == "ci" else [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)]
    tally, largest = Tally(bench, of=len(cases)), 0.0
    for before, after in cases:
        run = bench.folder / "run"
        arms: list[commands.Arm | None] = [partial(injected.kill_at, "step", 7, 0.0)] + [None] * (before - 1)
        kills.group(kills.train(words, run), bench.folder, arms)
        codes = kills.group(kills.train(words, run), bench.folder, [None] * after)
        wrong = f"resumed, it ended with {codes}" if any(c != 0 for c in codes) else None
        if not wrong:
            off = _apart(run, expected)
            largest = max(largest, off)
            wrong = f"the losses are {off:.1e} apart" if off > 1e-5 else None
        tally.add(f"{before} to {after} processes", wrong)
        shutil.rmtree(run)
    return tally.result(f"largest relative distance of a loss: {largest:.1e} (a network without batch norm)")


def _apart(run: Path, reference: Path) -> float:
    tables = [list(csv.DictReader((p / "metrics.csv").read_text().splitlines())) for p in (run, reference)]
    if [row["step"] for row in tables[0]] != [row["step"] for row in tables[1]]:
        return float("inf")
    pairs = [(float(a[k]), float(b[k])) for a, b in zip(*tables, strict=True) for k in ("train_loss", "val_loss")]
    return max(abs(a - b) / abs(b) for a, b in pairs)


ROWS = (
    Row(
        id="R3",
        part="world",
        fault="Resumed with another number of processes (1, 2, 3)",
        check="the same steps over the same images: losses at most 1e-5 apart (sums in another order)",
        run=world_size,
    ),
    Row(
        id="R14",
        part="once",
        fault="SIGTERM, SIGINT, SIGHUP in a step, an evaluation, a checkpoint's write, the final save",
        check="saved, exit 143, 130 or 129 and the command to go on; resumed, equal to the byte",
        run=signals,
    ),
    Row(
        id="R14",
        part="twice",
        fault="The same signal again more than a second later, in a step that hangs",
        check="ends at once with the same status; resumed from the last checkpoint, equal to the byte",
        run=signals_twice,
    ),
    Row(
        id="R14",
        part="terminal",
        fault="The terminal is closed under a run",
        check="saved, exit 129; resumed, equal to the byte",
        run=terminal_gone,
        short=False,
    ),
    Row(
        id="R15",
        part="stop",
        fault="One of two processes stopped for good (SIGSTOP)",
        check="the other gives it up, ends by itself with a message; both resumed, equal to the byte",
        run=stopped_member,
    ),
    Row(
        id="R15",
        part="torchrun",
        fault="Under torchrun: a process killed in a step, rank 0 killed in a save, torchrun itself killed; once each",
        check="no hang (three minutes); started again, by torchrun or by hand, equal to the byte",
        run=lost_member,
        short=False,
    ),
)
