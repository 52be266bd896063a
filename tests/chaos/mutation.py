"""Runs the mutation check: a copy of the tree, one mutant in it at a time, the tests that should notice.

A test run is a fork of a process that has imported torch and pytest, but nothing of ResNetLab: it begins at once. Where
the system cannot fork, it is a process of its own.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from chaos.mutants import Mutant, apply, misplaced
from chaos.record import Bench, Result, Row, Tally

PATIENCE = 300
"""Seconds after which a test run is stopped; a mutant that makes the tests hang is noticed by that."""
PASSED = 0
"""The status of pytest when all passed. Without a mutant anything else (1: some failed, 5: none collected) is wrong."""
PRELOADED = ("numpy", "pytest", "torch", "torchvision", "pydantic", "sklearn.metrics", "torchmetrics")
"""What most tests import, and takes its time."""


def run(mutants: Sequence[Mutant], root: Path, tell: Callable[[str], None]) -> list[tuple[Mutant, bool]]:
    """Try mutants on a copy of the tree at ``root``.

    Returns:
        Each mutant, and whether a test noticed it. Tests that fail without a mutant notice nothing.

    Raises:
        ValueError: A fragment is not there exactly once.
    """
    if lines := misplaced(root / "src" / "resnetlab"):
        raise ValueError("the table does not fit the source:\n  " + "\n  ".join(lines))
    outcomes: list[tuple[Mutant, bool]] = []
    sound: dict[tuple[str, ...], int] = {}
    with _copy(root) as tree:
        for mutant in mutants:
            if mutant.tests not in sound:
                sound[mutant.tests] = _status(tree, mutant.tests)
            killed = False
            if sound[mutant.tests] == PASSED:
                text = apply(mutant, tree / "src" / "resnetlab")
                killed = _status(tree, mutant.tests) != PASSED
                (tree / "src" / "resnetlab" / mutant.file).write_text(text, encoding="utf-8")
            outcomes.append((mutant, killed))
            why = "" if sound[mutant.tests] == PASSED else f" (its tests fail without it: {sound[mutant.tests]})"
            tell(f"{'killed  ' if killed else 'SURVIVED'} {mutant.file}: {mutant.what}{why}")
    return outcomes


@contextlib.contextmanager
def _copy(root: Path) -> Iterator[Path]:
    """Yield a copy of the source, the tests and their settings."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        for name in ("src", "tests", "scripts"):
            shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".*"))
        shutil.copy(root / "pyproject.toml", tree)
        yield tree


def _status(tree: Path, tests: Iterable[str]) -> int:
    """Run tests against a tree and return pytest's status, or a negative number where the run was stopped."""
    words = [str(tree / "tests" / test) for test in tests]
    if not hasattr(os, "fork"):
        return _apart(tree, words)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            import_module(name)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_test(tree, words))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _test(tree: Path, words: list[str]) -> int:
    """Run pytest in this (forked) process, with the tree before everything else on the path. Never raises."""
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        signal.alarm(PATIENCE)
        for name in [name for name in sys.modules if name.split(".")[0] in ("chaos", "resnetlab", "conftest")]:
            del sys.modules[name]
        sys.path[:0] = [str(tree / "src"), str(tree / "tests")]
        os.environ["PYTHONPATH"] = str(tree / "src")  # for the processes that tests start
        sys.dont_write_bytecode = True  # a mutant has the size and perhaps the second of the text before it
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.chdir(tree)
        import pytest

        import resnetlab

        if not str(resnetlab.__file__).startswith(str(tree)):
            return 9  # the installed package would be tested
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *words]))
    except BaseException:
        return 8


def _apart(tree: Path, words: list[str]) -> int:
    """Run pytest in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words]
    try:
        return subprocess.run(command, env=environment, cwd=tree, capture_output=True, timeout=PATIENCE).returncode
    except subprocess.TimeoutExpired:
        return -1


def row(bench: Bench) -> Result:
    """Run ``scripts/mutate`` in a process that has imported nothing yet; in CI a few quick mutants of it."""
    root, answer = Path(__file__).resolve().parents[2], bench.folder / "mutants.json"
    chosen = ["sources/splits.py", "schedule"] if bench.size == "ci" else []
    command = [sys.executable, str(root / "scripts" / "mutate"), "--json", str(answer), *chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    if not answer.is_file():
        return Result(tried=1, survived=0, notes=(f"FAILED {done.stderr[-300:]}",))
    found, tally = json.loads(answer.read_text()), Tally(bench)
    for i in range(found["tried"]):
        lived = found["survivors"][i : i + 1]
        tally.add("mutant", f"{lived[0]} survived" if lived else None)
    return tally.result(f"{found['tried']} lines of the core, each broken in a copy of the tree")


ROWS = (
    Row(
        id="N5",
        part="mutants",
        fault="Lines of the core broken on purpose: loss, batch norm, schedule, flip, split, average, scores, checks",
        check="a test fails for every one",
        run=row,
    ),
)
