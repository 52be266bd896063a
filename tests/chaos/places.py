"""R16: two trainers in one directory, clocks that jump, odd names, masks, locales, few file descriptors."""

import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from chaos import commands, injected, kills
from chaos.pictures import class_folders
from chaos.record import Bench, Result, Row, Tally

WORDS = (*kills.DIGITS, *kills.SMALL)


def two_trainers(bench: Bench) -> Result:
    """Start further trainers in a directory where one is training: each is refused, and the first is not disturbed."""
    expected = kills.reference(bench, WORDS)
    tally, run = Tally(bench, of=bench.pick(2, 10)), bench.folder / "run"
    first = commands.start(kills.train(WORDS, run), bench.folder / "first.txt", arm=slow_steps)
    until = time.monotonic() + 60
    while not list((run / "checkpoint").glob("step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    for number in range(tally.of):
        words = ["train", "--resume", str(run)] if number % 2 == 0 else ["train", *WORDS, "--out", str(run)]
        code, text = commands.run(words, bench.folder / f"second-{number}.txt")
        ok = code == 1 and ("Another process is training" in text or "exists already" in text)
        tally.add(words[1], None if ok else f"ended with {code}: {text[-200:]}")
    first.send(15)
    code = first.wait()
    if code == 143:
        code, _ = commands.run(kills.train(WORDS, run), bench.folder / "last.txt")
    wrong = f"the first ended with {code}: {first.end}" if code else commands.differences(run, expected)
    if wrong:
        tally.failures.append(wrong)
    return tally.result("half of them with --resume, half with --out")


def slow_steps() -> None:
    """Let every step take half a second more."""
    from resnetlab import training

    real = training._step

    def slow(*args: object) -> None:
        time.sleep(0.5)
        real(*args)  # type: ignore[arg-type]

    setattr(training, "_step", slow)  # noqa: B010


def jumping_clock() -> None:
    """Let the clock jump back and forth by days between readings."""
    real, hours = time.time, [0]

    def jumps() -> float:
        hours[0] = (hours[0] * 31 + 7) % 97
        return real() + 3600 * 24 * (hours[0] - 48)

    setattr(time, "time", jumps)  # noqa: B010
    setattr(time, "localtime", partial(_local, time.localtime, jumps))  # noqa: B010


def _local(real: Callable[[float], object], clock: Callable[[], float], seconds: float | None = None) -> object:
    return real(clock() if seconds is None else seconds)


def few_descriptors() -> None:
    """Leave this process 40 file descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))


def tight_mask() -> None:
    """Let new files be for the owner alone."""
    import os

    os.umask(0o077)


def in_odd_circumstances(bench: Bench) -> Result:
    """Train, stop and go on under each circumstance; the end equals that of the same run under none."""
    expected = kills.reference(bench, WORDS)
    odd = "a b ü 训练 'x' $HOME %s -o"
    cases: list[tuple[str, commands.Arm | None, dict[str, str], str]] = [
        ("clock that jumps by days", jumping_clock, {}, "clock"),
        ("umask 077", tight_mask, {}, "mask"),
        ("name with blanks, quotes and every script", None, {}, odd),
        ("locale C, ASCII streams", None, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, odd + "2"),
        ("40 file descriptors", few_descriptors, {}, "few"),
        ("TMPDIR that does not exist", None, {"TMPDIR": "/nonexistent"}, "tmp"),
        ("HOME that cannot be written", None, {"HOME": "/nonexistent"}, "home"),
    ]
    cases = cases if bench.size == "full" else cases[:5]
    tally = Tally(bench, of=len(cases))
    for name, arm, environment, place in cases:
        run = bench.folder / place
        stop = partial(_both, arm, partial(injected.kill_at, "step", 5, 0.0))
        commands.run(kills.train(WORDS, run), bench.folder / "o.txt", arm=stop, environment=environment)
        code, text = commands.run(kills.train(WORDS, run), bench.folder / "p.txt", arm=arm, environment=environment)
        wrong = f"ended with {code}: {text[-200:]}" if code else commands.differences(run, expected)
        if name.startswith("umask") and not wrong:
            open_files = [p.name for p in run.iterdir() if p.stat().st_mode & 0o077]
            wrong = f"{open_files} can be read by others" if open_files else None
        tally.add(name, wrong)
        shutil.rmtree(run, ignore_errors=True)
    return tally.result("; ".join(name for name, *_ in cases))


def _both(first: commands.Arm | None, second: commands.Arm) -> None:
    if first is not None:
        first()
    second()


def many_files(bench: Bench) -> Result:
    """Stream from more files than a process may open at once."""
    data = class_folders(bench.folder / "photos", {"a": 60, "b": 60}, size=12)
    tally, out = Tally(bench, of=1), bench.folder / "run"
    words = ["train", str(data), *kills.SMALL, "data.memory=stream", "data.workers=8", "--out", str(out)]
    code, text = commands.run(words, bench.folder / "o.txt", arm=few_descriptors)
    tally.add("120 pictures, 40 descriptors, 8 threads", f"ended with {code}: {text[-300:]}" if code else None)
    return tally.result()


def read_only_data(bench: Bench) -> Result:
    """Train from a folder that cannot be written: nothing is written beside the pictures."""
    data = class_folders(bench.folder / "photos", {"a": 12, "b": 12}, size=12)
    before = sorted(str(p) for p in data.rglob("*"))
    for path in (*data.rglob("*"), data):
        path.chmod(0o555 if path.is_dir() else 0o444)
    tally, out = Tally(bench, of=1), bench.folder / "run"
    words = ["train", str(data), "--model=linear", "epochs=1", "--out", str(out)]
    code, text = commands.run(words, bench.folder / "o.txt")
    for path in (data, *data.rglob("*")):
        path.chmod(0o755)
    added = sorted({str(p) for p in Path(data).rglob("*")} - set(before))
    tally.add(
        "read-only pictures", f"ended with {code}: {text[-200:]}" if code else f"wrote {added}" if added else None
    )
    return tally.result()


ROWS = (
    Row(
        id="R16",
        part="lock",
        fault="Further trainers started in the directory of one that trains",
        check="each is refused with a message; the first ends as if it had been alone, to the byte",
        run=two_trainers,
    ),
    Row(
        id="R16",
        part="circumstances",
        fault="Clock that jumps by days, umask 077, odd names, locale C, 40 file descriptors, no TMPDIR, no HOME; "
        "killed once each",
        check="resumed, equal to the undisturbed run to the byte",
        run=in_odd_circumstances,
    ),
    Row(
        id="R16",
        part="files",
        fault="More pictures than file descriptors, eight threads",
        check="trained to the end",
        run=many_files,
    ),
    Row(
        id="R16",
        part="data",
        fault="Data that cannot be written",
        check="trained to the end; nothing was written beside the pictures",
        run=read_only_data,
    ),
)
