"""The C++ files here, compiled once for this processor by the machine's compiler, and kept in the user's cache.

There is a library for each precision, so that training waits only for its own.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from resnetlab import files
from resnetlab.errors import ResNetLabError

HERE = Path(__file__).parent
SOURCES = tuple(sorted(HERE.glob("*.cpp")))
COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order after the variable ``CXX``."""
OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
"""Without -ffast-math: NaN must stay NaN, and its start-up code would change the arithmetic of the whole process."""
DEFINED = {"fp32": (), "bf16": ("-DBF16",)}
"""What a compiler is told besides, for each precision that there are libraries for."""
SECONDS = 120
"""How long a compiler may take; three are usual."""
PASSING = ("No space left", "Killed", "memory exhausted", "out of memory")
"""What a compiler says where it is not to blame, and may be asked again."""
COMPILING = "compile for this processor"
"""The thread that compiles beside the reading of data; where the process ends before it, the compiler is stopped."""
SIZES = ("winograd_scratch", "norm_width", "norm_scratch")
"""The functions that return a number; the others write into arrays."""
LOCKS = {precision: threading.Lock() for precision in DEFINED}
"""Who wants a library that is being compiled waits for it."""
_compilers: set[subprocess.Popen[str]] = set()
"""Those that are running."""


@functools.cache
def library(precision: str) -> ctypes.CDLL | None:
    """Return the compiled functions for ``fp32`` or ``bf16``, or None where there are none; `why_not` says why.

    In a library for bf16 there are some where the processor has instructions for it.
    """
    if _compiled(precision):
        with suppress(OSError):
            return _declare(ctypes.CDLL(str(place(precision))))
    return None


def _compiled(precision: str) -> bool:
    """Compile a library that is not there yet; False where that cannot be, or it is not wanted."""
    if _switched_off() or os.name != "posix":
        return False
    path = place(precision)
    with LOCKS[precision], suppress(OSError, ResNetLabError, subprocess.SubprocessError):
        known = os.path.exists(path) or os.path.exists(failure(precision))
        if not known and (compiler := find_compiler()):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, lambda temporary: _compile(compiler, precision, temporary))
    return os.path.exists(path)  # as Path.exists, but False where the cache may not be looked into


def likely_precision() -> str:
    """Return what `runtime.choose_precision` probably chooses for this CPU, ``fp32`` or ``bf16``; needs no PyTorch."""
    known = _instructions().split()
    return "bf16" if "avx512_bf16" in known or "amx_bf16" in known else "fp32"


def begin(precision: str) -> None:
    """Compile a library that is not there yet beside whatever comes next; `library` waits for it, and loads it.

    Loaded before PyTorch, it would not find PyTorch's threads (`native/common.h`).
    """
    if _switched_off() or precision not in DEFINED:
        return
    if not os.path.exists(place(precision)) and find_compiler():
        thread = threading.Thread(target=_compiled, args=(precision,), name=COMPILING, daemon=True)
        thread.start()
        atexit.register(_give_up, thread)


def why_not(precision: str) -> str:
    """Say why there is no library, for people."""
    if os.name != "posix":
        return "not on this system"
    if _switched_off():
        return "RESNETLAB_NATIVE=0"
    for path in (failure(precision), place(precision)):  # what the compiler said, or a library that cannot be loaded
        if os.path.exists(path):
            return f"see {path}, and remove it to try again"
    return "its library cannot be kept in the cache" if find_compiler() else "a C++ compiler, such as g++, is missing"


def _switched_off() -> bool:
    return os.environ.get("RESNETLAB_NATIVE", "1") == "0"


def place(precision: str) -> Path:
    """Return where the compiled functions are kept: another place for another source, options or processor.

    A home directory may be shared by machines whose processors do not know each other's instructions.
    """
    digest = hashlib.sha256()
    for source in (*SOURCES, *HERE.glob("*.h")):
        digest.update(source.read_bytes())
    digest.update(repr((OPTIONS, DEFINED, platform.system(), platform.machine(), _instructions())).encode())
    return files.cache() / f"native-{precision}-{digest.hexdigest()[:16]}.so"


def failure(precision: str) -> Path:
    """Return where it is noted what a compiler said that failed, so that not every process asks it again."""
    return place(precision).with_suffix(".failed")


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, if there is one."""
    names = [os.environ.get("CXX", ""), *COMPILERS]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compile(compiler: str, precision: str, target: Path) -> None:
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    command = [compiler, *OPTIONS, native, *DEFINED[precision], "-I", str(HERE), "-x", "c++", "-", "-o", str(target)]
    unit = "".join(f'#include "{source.name}"\n' for source in SOURCES)  # one, so that their headers are read once
    with subprocess.Popen(  # in a session of its own: a compiler is several processes, which are stopped together
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},  # `PASSING` is English
    ) as process:
        _compilers.add(process)
        try:
            _, said = process.communicate(unit, timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            files.write_atomic(failure(precision), f"{error}\n")
            raise
        finally:  # Ctrl-C, too, ends it
            _compilers.discard(process)
            _stop(process)
    if process.returncode:
        ended = subprocess.CalledProcessError(process.returncode, command)
        if process.returncode > 0 and not any(word in said for word in PASSING):  # below 0: a signal, such as ours
            files.write_atomic(failure(precision), f"{ended}\n{said}")
        raise ended


def _give_up(thread: threading.Thread) -> None:
    """End a thread that compiles, and its compiler, as the process ends: nothing is going to call what it makes."""
    while thread.is_alive():
        for process in tuple(_compilers):
            _stop(process)
        thread.join(0.05)


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop a compiler that is still running, and what it has begun."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _instructions() -> str:
    """Return what tells one processor's instruction set from another's."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line for line in file if line.startswith(("flags", "Features")))
    return platform.processor()


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the functions take and return."""
    pointer, size = ctypes.c_void_p, ctypes.c_long
    functions: dict[str, list[type]] = {
        "winograd_scratch": [size] * 3,
        "winograd_forward": [pointer] * 5 + [size] * 6,
        "winograd_backward": [pointer] * 7 + [size] * 6,
        "norm_width": [],
        "norm_scratch": [size],
        "norm_evaluate_gelu": [pointer] * 7 + [ctypes.c_double] + [size] * 3,
        "norm_forward_gelu": [pointer] * 8 + [ctypes.c_double] + [size] * 3,
        "norm_backward_gelu": [pointer] * 12 + [ctypes.c_double] + [size] * 3,
    }
    functions |= {name.replace("gelu", "relu"): takes for name, takes in functions.items()}
    for name, takes in functions.items():
        with suppress(AttributeError):  # bf16 only where the processor has instructions for it
            function = getattr(loaded, name)
            function.argtypes, function.restype = takes, size if name in SIZES else None
    return loaded
