"""A checkpoint comes back exactly, and whatever happens to the newest one, there is a whole one to go on from."""

import errno
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from resnetlab import checkpoint
from resnetlab.checkpoint import MANIFEST, STATE, TENSORS, Checkpoint
from resnetlab.errors import ResNetLabError
from resnetlab.files import sha256

FILES = (TENSORS, STATE, MANIFEST)


def at(step: int, note: str = "") -> Checkpoint:
    """Return a small checkpoint that can be told from those of other steps."""
    return Checkpoint(step=step, tensors={"model.w": torch.full((50,), float(step))}, state={"note": note, "lr": 0.1})


def newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    told: list[str] = []
    found = checkpoint.load_newest(directory, told.append)
    if found is not None:
        assert torch.equal(found.tensors["model.w"], torch.full((50,), float(found.step))), "parts of two checkpoints"
    return found, told


def step_of(directory: Path) -> int | None:
    found, _ = newest(directory)
    return found.step if found else None


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory with checkpoints of steps 10 and 20."""
    for step in (10, 20):
        checkpoint.save(tmp_path, at(step))
    return tmp_path


def test_tensors_of_every_type_come_back_to_the_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-(2**63), 2**63 - 1, (257,), generator=generator)
    wide = noise.view(torch.float32)  # with NaNs of all kinds, infinities, denormals, both zeros
    tensors = {
        "fp32": wide.reshape(2, 257),
        "bf16": noise.view(torch.bfloat16),
        "fp16": noise.view(torch.float16),
        "fp64": noise.view(torch.float64),
        "int64": noise,
        "uint8": noise.view(torch.uint8),
        "bool": noise > 0,
        "0-d": torch.tensor(7),
        "0-d float": torch.tensor(-0.0),
        "empty": torch.empty(0, 3),
        "strided": wide.reshape(2, 257).t(),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "a.b/c ü": torch.ones(1),
    }
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # they share memory, which is not saved
    checkpoint.save(tmp_path, Checkpoint(step=3, tensors=tensors, state={}))
    found = checkpoint.load_newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = found.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape), name
        assert bits(back) == bits(tensor.detach()), name
        assert not back.requires_grad


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    floats=st.lists(st.floats()), state=st.dictionaries(st.text().filter(lambda key: key != "step"), JSON, max_size=4)
)
@settings(deadline=None, max_examples=40)
def test_values_come_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, floats: list[float], state: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("values")
    checkpoint.save(directory, Checkpoint(step=2**40, tensors={}, state={**state, "floats": floats}))
    found = checkpoint.load_newest(directory, pytest.fail)
    assert found is not None
    assert found.step == 2**40
    back = found.state.pop("floats")
    assert [struct.pack("d", x) for x in back if x == x] == [struct.pack("d", x) for x in floats if x == x]
    assert [x != x for x in back] == [x != x for x in floats]
    state.pop("floats", None)
    assert found.state == state


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert newest(tmp_path / "not there") == (None, [])
    assert newest(tmp_path) == (None, [])
    for step in (1, 5, 999_999_999, 1_000_000_000, 1_000_000_001):
        path = checkpoint.save(tmp_path / "deep" / "er", at(step))
        assert path.is_dir()
        assert step_of(tmp_path / "deep" / "er") == step
    assert len(os.listdir(tmp_path / "deep" / "er")) == checkpoint.KEPT == 2
    shutil.rmtree(path)
    assert step_of(tmp_path / "deep" / "er") == 1_000_000_000


def test_what_comes_back_does_not_hang_on_the_files(two: Path) -> None:
    content = {path: path.read_bytes() for path in two.rglob("*") if path.is_file()}
    found, _ = newest(two)
    assert found is not None
    found.tensors["model.w"].add_(1)
    assert {path: path.read_bytes() for path in two.rglob("*") if path.is_file()} == content
    (two / "step-000000020" / TENSORS).write_bytes(b"\xff" * len(content[two / "step-000000020" / TENSORS]))
    assert found.tensors["model.w"].eq(21).all()


def test_the_same_step_again_replaces_the_first_one_only_when_it_is_whole(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for times in range(3):
        monkeypatch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(two, at(20, "broken off"))
        monkeypatch.undo()
        found, told = newest(two)
        assert found is not None
        assert (found.step, found.state["note"], told) == (20, str(times) if times else "", [])
        checkpoint.save(two, at(20, str(times + 1)))
        found, _ = newest(two)
        assert found is not None
        assert found.state["note"] == str(times + 1)
    assert len(os.listdir(two)) == 2
    shutil.rmtree(checkpoint.save(two, at(20, "last")))
    assert step_of(two) == 10, "the step before is kept as well"


def test_what_a_killed_process_left_is_ignored_and_cleared_away(two: Path) -> None:
    stray = two / ".step-000000015.tmp"
    shutil.copytree(two / "step-000000020", stray)
    (two / ".step-000000033.tmp").mkdir()
    (two / ".step-000000033.tmp" / ".tmpAbC").write_bytes(b"half")
    assert step_of(two) == 20
    checkpoint.save(two, at(30))
    assert sorted(os.listdir(two)) == ["step-000000020", "step-000000030"]


def test_what_others_put_there_is_left_alone(two: Path) -> None:
    shutil.copytree(two / "step-000000010", two / "step-000000010.bak")
    shutil.copytree(two / "step-000000010", two / "step-best")
    (two / "step-000000099").write_text("a file")
    (two / "notes.txt").write_text("mine")
    for step in (30, 40, 50):
        checkpoint.save(two, at(step))
    names = ["notes.txt", "step-000000010.bak", "step-000000040", "step-000000050", "step-000000099", "step-best"]
    assert sorted(os.listdir(two)) == names
    assert newest(two)[1] == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, cut, empty, zero, lengthen, Path.unlink, make_folder, dangle])
def test_a_damaged_newest_one_is_passed_over_and_named(two: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(two / "step-000000020" / name)
    found, told = newest(two)
    assert found is not None
    if (name, damage) == (MANIFEST, lengthen):  # a blank after the JSON changes nothing
        assert (found.step, told) == (20, [])
        return
    assert found.step == 10
    assert len(told) == 1
    assert f"{two / 'step-000000020'} is damaged (" in told[0]
    assert told[0].endswith("; falling back to the one before.")


@pytest.mark.parametrize(
    "manifest",
    [
        "null",
        "[]",
        "{}",
        '"x"',
        "[" * 100_000,
        json.dumps({name: None for name in FILES}),
        json.dumps({TENSORS: {"bytes": 1, "sha256": ""}, STATE: {"bytes": 1, "sha256": ""}}),
        json.dumps({f"../step-000000010/{name}": {} for name in FILES}),
    ],
    ids=range(8),
)
def test_a_manifest_that_lies_is_not_believed(two: Path, manifest: str) -> None:
    (two / "step-000000020" / MANIFEST).write_text(manifest)
    found, told = newest(two)
    assert found is not None
    assert found.step == 10
    assert len(told) == 1
    assert len(told[0]) < 500


def test_every_flipped_bit_is_noticed(two: Path) -> None:
    chance, folder = random.Random(0), two / "step-000000020"
    for name in FILES:
        content = (folder / name).read_bytes()
        for bit in chance.sample(range(8 * len(content)), 150):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(damaged)
            assert step_of(two) == 10, (name, bit)
        (folder / name).write_bytes(content)
    assert step_of(two) == 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two checkpoints of which one is written to again and again."""
    directory = tmp_path_factory.mktemp("fuzz")
    for step in (10, 20):
        checkpoint.save(directory, at(step))
    return directory


@given(state=JSON)
@settings(deadline=None, max_examples=100)
def test_fuzz_states_with_a_valid_checksum(shared: Path, state: Any) -> None:
    folder = shared / "step-000000020"
    (folder / STATE).write_text(json.dumps(state))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[STATE] = {"bytes": (folder / STATE).stat().st_size, "sha256": sha256(folder / STATE)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert step_of(shared) == 10


@given(manifest=JSON | st.fixed_dictionaries({TENSORS: JSON, STATE: JSON}))
@settings(deadline=None, max_examples=100)
def test_fuzz_manifests(shared: Path, manifest: Any) -> None:
    (shared / "step-000000020" / MANIFEST).write_text(json.dumps(manifest))
    assert step_of(shared) == 10


def test_when_all_are_damaged_there_is_none_and_each_is_named(two: Path) -> None:
    for path in two.iterdir():
        flip(path / TENSORS)
    found, told = newest(two)
    assert found is None
    assert [line.rpartition("; ")[2] for line in told] == [
        "falling back to the one before.",
        "there is none before it.",
    ]
    assert all(f"{TENSORS} does not match its checksum" in line for line in told)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError(), PermissionError(13, "no")])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(
    two: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(path: Path) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "sha256", failing)
    with pytest.raises(ResNetLabError, match=r"step-000000020 cannot be read .*Nothing was changed"):
        newest(two)
    monkeypatch.undo()
    assert step_of(two) == 20


def test_after_falling_back_two_whole_ones_are_kept_again(two: Path) -> None:
    """A damaged one that is newer must not take the place of a whole one."""
    flip(two / "step-000000020" / STATE)
    checkpoint.save(two, at(12))
    assert sorted(os.listdir(two)) == ["step-000000010", "step-000000012"]
    flip(two / "step-000000012" / STATE)
    checkpoint.save(two, at(12))
    shutil.rmtree(two / "step-000000012-2")
    assert step_of(two) == 10


CALLS = 11
"""Two folders, three files, a sync of each and of their folder, the rename, and a sync after it."""


def fail_once(monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> list[str]:
    """Let one of the calls that change the disk fail, counted from 0; returns what was called."""
    left, called = itertools.count(-call), []

    def failing(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        if next(left) == 0:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    for owner, name in (
        (Path, "mkdir"),
        (os, "fsync"),
        (os, "rename"),
        (Path, "write_text"),
        (checkpoint, "save_file"),
    ):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, r=real, **k: failing(n, r, *a, **k))
    return called


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_step_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for call in range(CALLS):
        directory = tmp_path / str(call)
        for step in (10, 20):
            checkpoint.save(directory, at(step))
        called = fail_once(monkeypatch, call, number)
        with pytest.raises(ResNetLabError, match="step-000000030") as caught:
            checkpoint.save(directory, at(30))
        monkeypatch.undo()
        assert ("No space left on the disk" in str(caught.value)) == (number == errno.ENOSPC)
        assert step_of(directory) in (20, 30)
        assert {"step-000000010", "step-000000020"} <= set(os.listdir(directory))
        assert not list(directory.glob(".*")), f"{called[-1]} left something behind"
        checkpoint.save(directory, at(40))
        assert step_of(directory) == 40
        assert len(os.listdir(directory)) == 2
    called = fail_once(monkeypatch, CALLS, number)
    checkpoint.save(directory, at(50))
    assert len(called) == CALLS


def test_a_file_that_cannot_grow_is_named_with_its_reason(two: Path) -> None:
    resource = pytest.importorskip("resource")
    large = Checkpoint(step=30, tensors={"w": torch.zeros(1_000_000)}, state={})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(ResNetLabError, match=r"Cannot write .*step-000000030: File too large"):
            checkpoint.save(two, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(two)) == ["step-000000010", "step-000000020"]
    assert step_of(two) == 20


def test_a_full_disk_is_named_where_only_the_text_says_so(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ResNetLabError, match=r"No space left on the disk while writing .* MiB free"):
        checkpoint.save(two, at(30))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file" / "checkpoint"):
        with pytest.raises(ResNetLabError, match=r"Cannot write .*file.*(Not a directory|File exists)"):
            checkpoint.save(directory, at(1))
        assert newest(directory) == (None, [])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_directory_is_named(two: Path) -> None:
    two.chmod(0o500)
    try:
        with pytest.raises(ResNetLabError, match="Permission denied"):
            checkpoint.save(two, at(30))
        assert step_of(two) == 20
    finally:
        two.chmod(0o700)


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from resnetlab import checkpoint

def save_for_ever(directory, step, done):
    while True:
        step += 1
        tensors = {f"w{i}": torch.full((20_000,), float(step)) for i in range(4)}
        checkpoint.save(directory, checkpoint.Checkpoint(step=step, tensors=tensors, state={"twice": 2 * step}))
        os.write(done, b"%d " % step)

torch.set_num_threads(1)
directory, chance, step, inside, told = Path(sys.argv[1]), random.Random(0), 0, 0, []
for _ in range(10):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(directory, step, write)
    os.close(write)
    begun = os.read(read, 20)  # at least one save is complete
    time.sleep(chance.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = [int(word) for word in (begun + os.read(read, 10**6)).split()]
    os.close(read)
    inside += any(directory.glob(".step-*.tmp"))
    found = checkpoint.load_newest(directory, told.append)
    assert said[-1] <= found.step <= said[-1] + 1, (said, found.step)
    assert found.state["twice"] == 2 * found.step
    assert all(tensor.eq(found.step).all() for tensor in found.tensors.values())
    step = found.step
checkpoint.save(directory, checkpoint.Checkpoint(step=step + 1, tensors={}, state={}))
assert not told, told
print(inside, *sorted(os.listdir(directory)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")
def test_a_process_killed_while_saving_leaves_a_whole_newest_one(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    inside, *left = result.stdout.split()
    assert int(inside) > 0, "no kill fell into a save"
    assert len(left) == 2
    assert all(name.startswith("step-") for name in left)
