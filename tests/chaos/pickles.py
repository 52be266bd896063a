"""R7: files that would run a stranger's code or take all memory, at every door where weights or data enter."""

import io
import json
import pickle
import resource
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from chaos.record import Bench, Result, Row, Tally
from resnetlab import bundle, checkpoint, models, sources
from resnetlab.errors import ResNetLabError
from resnetlab.models import unpickle, weights

SLOW, HEAVY = 2.0, 200.0
"""Seconds of processor time and MB of memory that a refusal may take beyond the start of torch."""


def call(module: str, name: str, *arguments: str) -> bytes:
    """Return a pickle that calls a function with texts, in opcodes that every reader knows."""
    return (
        b"c%s\n%s\n(" % (module.encode(), name.encode()) + b"".join(b"V%s\n" % a.encode() for a in arguments) + b"tR."
    )


class _Build:
    """Unpickled with a state: code that runs in ``__setstate__``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return (eval, ("type('X', (), {'__setstate__': lambda s, c: __import__('os').system(c)})()",), self.command)


def payloads(canary: Path) -> dict[str, bytes]:
    """Return pickles by what they try; each would create ``canary``."""
    shell, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    held = call("os", "system", shell)
    return {
        "os.system": held,
        "posix.system": call("posix", "system", shell),
        "os.popen": call("os", "popen", shell),
        "nt.system": call("nt", "system", shell),
        "eval": call("builtins", "eval", code),
        "exec": call("builtins", "exec", code),
        "eval of Python 2": call("__builtin__", "eval", code),
        "open": call("builtins", "open", str(canary), "w"),
        "io.open": call("io", "open", str(canary), "w"),
        "os.mkdir": call("os", "mkdir", str(canary)),
        "pathlib": b"\x80\x04cpathlib\nPath.touch\n" + b"(cpathlib\nPath\n(V%s\ntRtR." % str(canary).encode(),
        "subprocess.getoutput": call("subprocess", "getoutput", shell),
        "subprocess.Popen": b"csubprocess\nPopen\n(" + b"(Vtouch\nV%s\nltR." % str(canary).encode(),
        "timeit": call("timeit", "timeit", code),
        "cProfile": call("cProfile", "run", code),
        "pdb": call("pdb", "run", code),
        "profile.run": call("profile", "run", code),
        "code": b"\x80\x04ccode\nInteractiveInterpreter.runsource\n(ccode\nInteractiveInterpreter\n(tRV%s\ntR."
        % code.encode(),
        "INST": b"(Vos\nios\nsystem\n.".replace(b"Vos\n", b"V%s\n" % shell.encode()),
        "OBJ": b"(cos\nsystem\nV%s\no." % shell.encode(),
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c%c%b\x85R." % (len(shell), shell.encode())
        if len(shell) < 256
        else held,
        "BUILD": pickle.dumps(_Build(shell)),
        "nested load": b"cpickle\nloads\n(cbuiltins\nbytes\n(V%s\nVlatin1\ntRtR."
        % held.decode().replace("\n", "\\u000a").encode(),
        "torch.storage": b"ctorch.storage\n_load_from_bytes\n(cbuiltins\nbytes\n(V%s\nVlatin1\ntRtR."
        % held.decode().replace("\n", "\\u000a").encode(),
        "numpy.load": call("numpy", "load", str(canary)),
        "torch.hub": call("torch.hub", "load", str(canary)),
        "torch.load": call("torch", "load", str(canary)),
        "runpy": call("runpy", "run_path", str(canary)),
        "importlib": call("importlib", "import_module", "antigravity"),
        "from type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(V%s\ntNtR."
        % shell.encode(),
        "partial": b"cfunctools\npartial\n(cos\nsystem\nV%s\ntR)R." % shell.encode(),
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V%s\ntR." % shell.encode(),
        "in a dictionary": b"(dVfc.weight\n" + held[:-1] + b"s.",
        "under a tensor": b"ccollections\nOrderedDict\n(tRVx\n" + held[:-1] + b"s.",
    }


def zipped(content: bytes, **records: bytes) -> bytes:
    """Return a file of torch's present form whose pickle is ``content``."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", **records}.items():
            file.writestr(f"archive/{name}", data)
    return out.getvalue()


def legacy(content: bytes) -> bytes:
    """Return a file of torch's form before 1.6."""
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(head) + content + pickle.dumps([], 2)


def _weights(folder: Path, data: bytes, suffix: str = ".pt") -> None:
    path = folder / f"w{suffix}"
    path.write_bytes(data)
    models.load_weights(torch.nn.Linear(2, 2), path)


def _batch(folder: Path, data: bytes) -> None:
    root = folder / "cifar-10-batches-py"
    root.mkdir(exist_ok=True)
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
        "batches.meta",
    ):
        (root / name).write_bytes(data)
    sources.load(str(root))


def _array(folder: Path, data: bytes) -> None:
    (folder / "x.npy").write_bytes(
        b"\x93NUMPY\1\0F\0{'descr': '|O', 'fortran_order': False, 'shape': (1,)}         \n" + data
    )
    sources.load(str(folder / "x.npy"))


def _bundle(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    bundle.load(folder)


def _checkpoint(folder: Path, data: bytes) -> None:
    place = folder / "checkpoint" / "step-000000001"
    place.mkdir(parents=True, exist_ok=True)
    for name in (checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST):
        (place / name).write_bytes(data)
    if checkpoint.load_newest(folder / "checkpoint", lambda line: None) is None:
        raise ResNetLabError("passed over")


DOORS: dict[str, Callable[[Path, bytes], None]] = {
    "bare .pt": _weights,
    "zipped .pth": lambda folder, data: _weights(folder, zipped(data), ".pth"),
    "legacy .th": lambda folder, data: _weights(folder, legacy(data), ".th"),
    "CIFAR batch": _batch,
    ".npy": _array,
    "bundle": _bundle,
    "checkpoint": _checkpoint,
}


@contextmanager
def near() -> Iterator[None]:
    """Unpickle in this process, by the code that the other process runs: its start takes seconds for every file."""
    before = weights._convert_apart

    def convert(path: Path, target: Path) -> dict[str, str]:
        try:
            unpickle.convert(path, target)
        except unpickle.Refused as error:
            return {"refused": str(error)}
        return {}

    weights._convert_apart = convert
    try:
        yield
    finally:
        weights._convert_apart = before


def refused(door: Callable[[Path, bytes], None], folder: Path, data: bytes, canary: Path) -> str | None:
    """Say what was wrong about how a file was met; None: it was refused in plain words, and nothing ran."""
    began, wrong = time.process_time(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about what it refuses
            door(folder, data)
        wrong = "it was taken"
    except ResNetLabError as error:
        wrong = None if str(error) else "no word was said"
    except BaseException as error:
        wrong = f"{type(error).__name__} instead of a refusal"
    took = time.process_time() - began
    if canary.exists():
        canary.rmdir() if canary.is_dir() else canary.unlink()
        return "IT WAS EXECUTED"
    return wrong or (f"it took {took:.1f} s" if took > SLOW else None)


def works(payload: dict[str, bytes], folder: Path) -> int:
    """Return how many of the attacks would have worked: a process apart unpickles them with nothing in the way."""
    canary = folder / "canary"
    script = (
        "import os, pickle, shutil, sys, time\n"
        f"canary = {str(canary)!r}\n"
        "for line in open(sys.argv[1]):\n"
        "    try: pickle.loads(bytes.fromhex(line.strip()))\n"
        "    except BaseException: pass\n"
        "    for wait in range(10):\n"
        "        if not os.path.exists(canary): time.sleep(0.01)\n"
        "    os.write(2, b'1' if os.path.exists(canary) else b'0')\n"
        "    shutil.rmtree(canary) if os.path.isdir(canary) else os.path.exists(canary) and os.remove(canary)\n"
    )
    heavy = (
        "importlib",
        "torch.hub",
        "torch.load",
        "torch.storage",
        "from type",
        "numpy.load",
        "under a tensor",
        "pdb",
        "timeit",
    )
    (folder / "hex").write_text("\n".join(data.hex() for name, data in payload.items() if name not in heavy))
    command = [sys.executable, "-c", script, str(folder / "hex")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    return done.stderr.count(b"1")


def attacks(bench: Bench) -> Result:
    """Take every pickle to every door; at full size a process of its own reads each weights file, as it is in use."""
    canary = bench.folder / "canary"
    corpus = payloads(canary)
    tally = Tally(bench, of=len(corpus) * len(DOORS))
    for door, enter in DOORS.items():
        for what, data in corpus.items():
            if bench.size == "full":
                tally.add(f"{what} in a {door}", refused(enter, bench.folder, data, canary))
            else:
                with near():
                    tally.add(f"{what} in a {door}", refused(enter, bench.folder, data, canary))
    real = works(corpus, bench.folder)
    return tally.result(f"{len(corpus)} pickles at {len(DOORS)} doors; plain pickle would have run {real} of them")


def _saved(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def _deflated() -> bytes:
    plain = zipfile.ZipFile(io.BytesIO(_saved({"x": torch.zeros(2**26)})))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    return out.getvalue()


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def bombs() -> dict[str, tuple[str, Callable[[], bytes]]]:
    """Return small files that stand for much: suffix and how each is made."""
    keys = {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    lie = pickle.dumps({"x": 1}, 2)
    return {
        "stride 0": (".pt", lambda: _saved({"x": torch.zeros(1).expand(10**12)})),
        "compressed records": (".pt", _deflated),
        "a length of 2^62": (".pt", lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x."),
        "a number of 2^31 bytes": (".pt", lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"."),
        "nesting of 10^5": (".pt", lambda: zipped(b"(" * 10**5 + b"t" * 10**5 + b".")),
        "10^6 names": (".pt", lambda: zipped(pickle.dumps(dict.fromkeys(range(10**6)), 2))),
        "legacy that lies": (".th", lambda: legacy(lie) + struct.pack("<q", 2**40)),
        "header of 2^60": (".safetensors", lambda: struct.pack("<Q", 2**60) + b"{}"),
        "200,000 names": (".safetensors", lambda: _header(json.dumps(keys).encode())),
        "deep header": (".safetensors", lambda: _header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)),
        "shape of 2^62": (
            ".safetensors",
            lambda: _header(b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}') + bytes(4),
        ),
        "40,000 records": (".pt", lambda: zipped(lie, **{f"data/{i}": b"" for i in range(40_000)})),
    }


class _Watched:
    """Stands in for `subprocess.run` where weights are read, and notes the most memory that a reader held."""

    def __init__(self) -> None:
        self.peak = self.seconds = 0.0

    def __call__(self, command: list[str], **how: Any) -> "subprocess.CompletedProcess[bytes]":
        began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=how["env"], stdin=subprocess.DEVNULL
        ) as process:
            status = Path(f"/proc/{process.pid}/status")
            self.peak = 0.0
            while process.poll() is None:
                with suppress(OSError, IndexError):
                    self.peak = max(self.peak, int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024)
                time.sleep(0.01)
            out, _ = process.communicate()
        self.seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
        return subprocess.CompletedProcess(command, process.returncode, out, b"")


def resources(bench: Bench) -> Result:
    """Have each bomb read as in use, in a process of its own with limits; measure what that took."""
    table = bombs()
    if bench.size == "ci":
        pickled = ("stride 0", "compressed records")
        table = {what: row for what, row in table.items() if what in pickled or row[0] == ".safetensors"}
    tally, watched, most = Tally(bench, of=len(table)), _Watched(), 0.0
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, bench.folder / "good.pt")
    with mock.patch("subprocess.run", watched):
        models.load_weights(torch.nn.Linear(2, 2), bench.folder / "good.pt")
        usual, seconds = watched.peak, watched.seconds
        for what, (suffix, make) in table.items():
            data, watched.peak, watched.seconds = make(), 0.0, 0.0
            wrong = refused(partial(_weights, suffix=suffix), bench.folder, data, bench.folder / "canary")
            rise = watched.peak - usual
            if rise > HEAVY + 2 * len(data) / 2**20:
                wrong = wrong or f"memory rose by {rise:.0f} MB for a file of {len(data) / 2**20:.1f} MB"
            if watched.seconds > seconds + SLOW:
                wrong = wrong or f"it took {watched.seconds:.1f} s of processor time"
            most = max(most, rise)
            tally.add(what, wrong)
    return tally.result(f"files of 16 bytes to 12 MB; at most {most:.0f} MB above a good file's {usual:.0f}")


ROWS = (
    Row(
        id="R7",
        part="pickles",
        fault="Malicious pickles (os.system, eval, nested loads, BUILD, INST, getattr chains, ...) as weights, CIFAR "
        "batch, .npy, bundle and checkpoint",
        check="refused in words within 2 s, and no canary file exists",
        run=attacks,
    ),
    Row(
        id="R7",
        part="bombs",
        fault="Small files that claim much: stride 0, compressed records, false lengths, deep nesting, a million names",
        check="refused; the reading process takes at most 2 × the file + 200 MB more than for a good file",
        run=resources,
    ),
)
