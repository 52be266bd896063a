"""A run directory is never overwritten, has one writer, and its tables come back exactly or not at all."""

import errno
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnetlab import files, rundir
from resnetlab.errors import ResNetLabError
from resnetlab.metrics import EpochRecord, Predictions, RunData, TimingRecord, score

EPOCH = EpochRecord(
    epoch=1, step=10, lr=0.1, train_loss=1.5, train_top1=0.25, val_loss=1.25, val_top1=0.5, val_top5=1.0
)
TIMING = TimingRecord(epoch=1, train_seconds=1.5, val_seconds=0.25, images_per_second=1e3)
CONFIG: dict[str, Any] = {
    "recipe": {"name": "fast", "model": {"name": "resnet20"}},
    "data": {"name": "colours", "classes": ["blue", "green", "red"]},
}


def scored() -> dict[str, Any]:
    """Return what ``scores.json`` holds of one split."""
    logits = np.eye(3, dtype=np.float32).repeat(4, 0)
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 0], dtype=np.int64)
    names = tuple(map(str, range(12)))
    return score(Predictions(logits=logits, classes=("blue", "green", "red"), names=names, labels=labels)).to_dict()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, without its network."""
    rundir.write_json(tmp_path / rundir.CONFIG, CONFIG)
    rundir.write_json(tmp_path / rundir.SCORES, {"val": scored(), "test": scored()})
    rundir.write_rows(tmp_path / rundir.METRICS, [EPOCH, replace(EPOCH, epoch=2, val_loss=None)])
    rundir.write_rows(tmp_path / rundir.TIMING, [TIMING])
    return tmp_path


def test_names_are_counted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [rundir.create(None, "resnet20-cifar10") for _ in range(3)]
    assert [str(path) for path in made] == [f"runs/resnet20-cifar10{end}" for end in ("", "-2", "-3")]
    assert all(path.is_dir() for path in made)
    (tmp_path / "runs" / "v1.5").write_text("a file")
    (tmp_path / "runs" / "v1.5-2").symlink_to("nowhere")
    assert rundir.create(None, "v1.5") == Path("runs/v1.5-3")


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_a_place_for_runs_that_is_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    if what == "file":
        Path("runs").write_text("x")
    else:
        Path("runs").symlink_to("/mnt/not mounted/runs")
    with pytest.raises(ResNetLabError, match=r"Cannot write runs.*--out DIR"):
        rundir.create(None, "x")


def test_what_a_run_leaves_that_was_killed_at_its_very_start_is_no_run(tmp_path: Path) -> None:
    for name in (rundir.LOCK, rundir.PROBE, ".config.json.9b5ixpej.tmp"):
        (tmp_path / name).write_text("")
    assert rundir.create(tmp_path, "x") == tmp_path
    with rundir.locked(tmp_path):
        assert os.listdir(tmp_path) == [rundir.LOCK]
    (tmp_path / ".hidden").write_text("the user's")
    with pytest.raises(ResNetLabError, match="never overwritten"):
        rundir.create(tmp_path, "x")
    rundir.discard(tmp_path)
    assert (tmp_path / ".hidden").exists()


def test_a_directory_that_holds_anything_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    assert rundir.create(path, "ignored") == path
    assert rundir.create(str(path), "ignored") == path, "an empty directory is as good as none"
    (path / rundir.LOCK).write_text("")
    assert rundir.create(path, "ignored") == path, "so is one where a run could not even begin"
    (path / "log.txt").write_text("x")
    for taken in (path, path / "log.txt"):
        with pytest.raises(ResNetLabError, match=rf"{taken} exists already .*Give another --out\.$"):
            rundir.create(taken, "ignored")
    (path / rundir.CONFIG).write_text("{}")
    with pytest.raises(ResNetLabError, match=rf"{path} exists already .*Give another --out.*--resume {path}"):
        rundir.create(path, "ignored")
    rundir.discard(path)
    assert (path / "log.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResNetLabError, match="Cannot write "):
        rundir.create(tmp_path / name, "ignored")


class Usage(NamedTuple):
    """What `shutil.disk_usage` says."""

    total: int
    used: int
    free: int


def test_too_little_space_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(2**40, 2**40, 100 << 20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    rundir.probe(tmp_path, 100 << 20)
    with pytest.raises(ResNetLabError, match=r"has 100 MiB free, but .* need about 1024 MiB\..*--out DIR"):
        rundir.probe(tmp_path, 1 << 30)
    assert set(asked) == {tmp_path}
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResNetLabError, match=r"Cannot write .*there is no folder"):
        rundir.probe(tmp_path / "gone", 0)

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(ResNetLabError, match=r"Cannot write .*Permission denied\. Check the permissions"):
        rundir.probe(tmp_path, 0)


HOLDER = """
import sys
from pathlib import Path
from resnetlab import rundir
with rundir.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that trains in the directory."""
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    stray = tmp_path / ".model.safetensors.abc.tmp"
    stray.write_text("being written")
    for _ in range(2):
        with pytest.raises(ResNetLabError, match=r"Another .* in .*Give another --out"), rundir.locked(tmp_path):
            pytest.fail("both hold it")
    assert stray.exists(), "it belongs to the process that holds the lock"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with rundir.locked(tmp_path):
        assert os.listdir(tmp_path) == [rundir.LOCK]
    with rundir.locked(tmp_path):
        pass


def test_a_lock_is_given_back_after_an_error_and_holds_within_a_process(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with pytest.raises(KeyError), rundir.locked(tmp_path):
        with pytest.raises(ResNetLabError, match="Another process"), rundir.locked(tmp_path):
            pytest.fail("both hold it")
        raise KeyError
    with rundir.locked(tmp_path):
        pass


def test_an_error_of_the_block_is_not_taken_for_one_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="mine"), rundir.locked(tmp_path):
        raise BlockingIOError("mine")


def test_a_disk_without_locks_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with rundir.locked(tmp_path):
        pass


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    """Its file has the very name that the atomic writer gave it."""
    given: list[Path] = []

    def write(temporary: Path) -> None:
        temporary.write_text("epoch,loss\n")
        given.append(temporary)

    files.write_atomic(tmp_path / "metrics.csv", write)
    shutil.copy(tmp_path / "metrics.csv", given[0])
    (tmp_path / "notes.tmp").write_text("mine")
    with rundir.locked(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [rundir.LOCK, "metrics.csv", "notes.tmp"]


def test_a_directory_that_is_gone_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(ResNetLabError, match=r"Cannot write .*No such file"), rundir.locked(tmp_path / "gone"):
        pytest.fail("locked nothing")


def test_the_log_takes_any_text(tmp_path: Path) -> None:
    log = rundir.Log(tmp_path)
    log("grün")
    log(os.fsdecode(b"caf\xe9"))
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line[19:] for line in lines] == ["  grün", r"  caf\udce9"]
    shutil.rmtree(tmp_path)
    with pytest.raises(ResNetLabError, match=r"Cannot write .*log\.txt"):
        log("x")


def packed(row: EpochRecord | TimingRecord) -> list[object]:
    values = vars(row).values()
    return ["nan" if v != v else struct.pack("d", v) if isinstance(v, float) else v for v in values]


FLOATS = st.floats()
EPOCHS = st.builds(
    EpochRecord,
    epoch=st.integers(1, 10**6),
    step=st.integers(0, 2**63),
    lr=FLOATS,
    train_loss=FLOATS,
    train_top1=FLOATS,
    val_loss=st.none() | FLOATS,
    val_top1=st.none() | FLOATS,
    val_top5=st.none() | FLOATS,
)


@given(st.lists(EPOCHS, min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_rows_come_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, rows: list[EpochRecord]) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    rundir.write_rows(path, rows)
    back = rundir.read_rows(path, EpochRecord)
    assert list(map(packed, back)) == list(map(packed, rows))
    first = path.read_bytes()
    rundir.write_rows(path, back)
    assert path.read_bytes() == first


def test_a_table_is_plain_csv(run: Path) -> None:
    lines = (run / rundir.METRICS).read_text().splitlines()
    assert lines == [
        "epoch,step,lr,train_loss,train_top1,val_loss,val_top1,val_top5",
        "1,10,0.1,1.5,0.25,1.25,0.5,1.0",
        "2,10,0.1,1.5,0.25,,0.5,1.0",
    ]
    assert rundir.read_rows(run / rundir.TIMING, TimingRecord) == (TIMING,)
    assert rundir.read_rows(run / "none.csv", EpochRecord) == ()


HEADER = b"epoch,train_seconds,val_seconds,images_per_second\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b"\xff\xfe\0\0",
        b"\0" * 100,
        HEADER + b"\0",
        HEADER + b"1,2,3\n",
        HEADER + b"1,2,3,4,5\n",
        HEADER + b"1,2,,4\n",
        HEADER + b",2,3,4\n",
        HEADER + b"1.5,2,3,4\n",
        HEADER + b"1,2,3,fast\n",
        HEADER + b"1,2,3,4\n\n1,2,3,4\n",
        HEADER + b"1,2,3," + b"4" * 200_000 + b"\n",
        HEADER + b'1,2,3,"4\n',
        HEADER.replace(b"epoch", b"step"),
        HEADER.replace(b",val_seconds", b""),
        HEADER.replace(b"\n", b",extra\n"),
        b"x" * 200_000,
    ],
    ids=range(18),
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "timing.csv"
    path.write_bytes(content)
    with pytest.raises(ResNetLabError, match=r"timing\.csv cannot be read as a table of epochs") as caught:
        rundir.read_rows(path, TimingRecord)
    assert len(str(caught.value)) < 1000
    path.unlink()
    path.mkdir()
    with pytest.raises(ResNetLabError, match="cannot be read"):
        rundir.read_rows(path, TimingRecord)


@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 40))
@settings(deadline=None, max_examples=80)
def test_fuzz_tables(tmp_path_factory: pytest.TempPathFactory, noise: bytes, start: int, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    rundir.write_rows(path, [EPOCH, replace(EPOCH, epoch=2)])
    content = path.read_bytes()
    path.write_bytes(content[:start] + noise + content[start + length :])
    try:
        rows = rundir.read_rows(path, EpochRecord)
    except ResNetLabError as error:
        assert str(path) in str(error)
    else:
        assert all(type(row.epoch) is int and type(row.train_loss) is float for row in rows)


def test_json_is_written_for_people_and_read_back(tmp_path: Path) -> None:
    value = {"name": "grün", "path": os.fsdecode(b"/data/caf\xe9"), "x": [0.1, 1e-300, None]}
    rundir.write_json(tmp_path / "a.json", value)
    assert rundir.read_json(tmp_path / "a.json") == value
    assert "grün" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5_000])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ResNetLabError, match=r"a\.json cannot be read"):
        rundir.read_json(tmp_path / "a.json")


def test_a_run_is_read_whole(run: Path) -> None:
    data = rundir.read_run(run)
    assert data.name == run.name
    assert data.title == "resnet20 on colours, recipe fast"
    assert data.classes == ("blue", "green", "red")
    assert data.epochs == (EPOCH, replace(EPOCH, epoch=2, val_loss=None))
    assert data.timing == (TIMING,)
    assert data.score is not None
    assert data.score.to_dict() == scored()
    assert data.score_split == "test"


def test_a_run_is_read_as_far_as_it_has_come(run: Path) -> None:
    rundir.write_json(run / rundir.SCORES, {"val": scored()})
    assert rundir.read_run(run).score_split == "val"
    for name in (rundir.SCORES, rundir.METRICS, rundir.TIMING):
        (run / name).unlink()
    data = rundir.read_run(run)
    assert (data.score, data.epochs, data.timing) == (None, (), ())


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone", tmp_path / ("x" * 300)):
        assert not rundir.is_run(path)
        with pytest.raises(ResNetLabError, match=r"is not a run directory: there is no config\.json in it"):
            rundir.read_run(path)
    (tmp_path / "checkpoint").mkdir()
    assert rundir.is_run(tmp_path)
    with pytest.raises(ResNetLabError, match=r"config\.json cannot be read"):
        rundir.read_run(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        [],
        3,
        None,
        "x",
        {},
        {"recipe": {}},
        {**CONFIG, "data": None},
        {**CONFIG, "recipe": []},
        {**CONFIG, "data": {"name": "x", "classes": [1, 2, 3]}},
    ],
)
def test_a_damaged_configuration_is_refused(run: Path, config: object) -> None:
    rundir.write_json(run / rundir.CONFIG, config)
    with pytest.raises(ResNetLabError, match=r"config\.json or scores\.json is not as ResNetLab writes it"):
        rundir.read_run(run)


@pytest.mark.parametrize("scores", [3, None, {"val": None}, {"val": []}, {"test": {}}, {"test": "x"}])
def test_damaged_scores_are_refused(run: Path, scores: object) -> None:
    rundir.write_json(run / rundir.SCORES, scores)
    with pytest.raises(ResNetLabError, match=r"scores\.json is not as ResNetLab writes it"):
        rundir.read_run(run)


WRONG: list[object] = [None, "x", [], {}, [[1, 2], [3]], [[1] * 3] * 2, [[10**30] * 3] * 3, [["x"] * 3] * 3]


@pytest.mark.parametrize("key", scored())
@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_a_score_of_the_wrong_kind_is_refused(run: Path, key: str, value: object) -> None:
    rundir.write_json(run / rundir.SCORES, {"test": {**scored(), key: value}})
    with pytest.raises(ResNetLabError, match=r"scores\.json is not as ResNetLab writes it"):
        rundir.read_run(run)


@pytest.mark.parametrize("key", scored()["per_class"][0])
def test_a_class_score_of_the_wrong_kind_is_refused(run: Path, key: str) -> None:
    values = scored()
    values["per_class"] = [row | {key: [1]} for row in values["per_class"]]
    rundir.write_json(run / rundir.SCORES, {"test": values})
    with pytest.raises(ResNetLabError, match=r"scores\.json is not as ResNetLab writes it"):
        rundir.read_run(run)


def test_a_score_that_is_not_finite_is_read(run: Path) -> None:
    rundir.write_json(run / rundir.SCORES, {"test": {**scored(), "loss": math.inf}})
    data: RunData = rundir.read_run(run)
    assert data.score is not None
    assert data.score.loss == math.inf


@pytest.mark.parametrize(
    ("program", "ours"),
    [
        ("/usr/bin/resnetlab", True),
        ("resnetlab.exe", True),
        ("/site-packages/resnetlab/__main__.py", True),
        ("/site-packages/pytest/__main__.py", False),
        ("my_script.py", False),
        ("", False),
    ],
)
def test_the_command_that_was_typed(program: str, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "train", "digits"])
    assert rundir.typed() == (["resnetlab", "train", "digits"] if ours else [])
