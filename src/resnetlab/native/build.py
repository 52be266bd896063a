"""The C++ files here, compiled once for this processor by the machine's compiler, and kept in the user's cache."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
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
SECONDS = 120
"""How long a compiler may take; three are usual."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None where there are none; `why_not` says why.

    Those for bf16 are there where the processor has instructions for it.
    """
    if _switched_off() or os.name != "posix":
        return None
    path = place()
    with suppress(OSError, ResNetLabError, subprocess.SubprocessError):
        if not path.exists():
            if (compiler := find_compiler()) is None or failure().exists():
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, lambda temporary: _compile(compiler, temporary))
        return _declare(ctypes.CDLL(str(path)))
    return None


def why_not() -> str:
    """Say why there is no library, for people."""
    if os.name != "posix":
        return "not on this system"
    if _switched_off():
        return "RESNETLAB_NATIVE=0"
    for path in (failure(), place()):  # what the compiler said, or a library that cannot be loaded
        if path.exists():
            return f"see {path}, and remove it to try again"
    return "its library cannot be kept in the cache" if find_compiler() else "a C++ compiler, such as g++, is missing"


def _switched_off() -> bool:
    return os.environ.get("RESNETLAB_NATIVE", "1") == "0"


def place() -> Path:
    """Return where the compiled functions are kept: another place for another source, options or processor.

    A home directory may be shared by machines whose processors do not know each other's instructions.
    """
    digest = hashlib.sha256()
    for source in (*SOURCES, *HERE.glob("*.h")):
        digest.update(source.read_bytes())
    digest.update(repr((OPTIONS, platform.system(), platform.machine(), _instructions())).encode())
    return files.cache() / f"native-{digest.hexdigest()[:16]}.so"


def failure() -> Path:
    """Return where it is noted what a compiler said that failed, so that not every process asks it again."""
    return place().with_suffix(".failed")


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, if there is one."""
    names = [os.environ.get("CXX", ""), *COMPILERS]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compile(compiler: str, target: Path) -> None:
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    command = [compiler, *OPTIONS, native, *map(str, SOURCES), "-o", str(target)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.SubprocessError as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        files.write_atomic(failure(), f"{error}\n{said}")
        raise


def _instructions() -> str:
    """Return what tells one processor's instruction set from another's."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line for line in file if line.startswith(("flags", "Features")))
    return platform.processor()


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the functions take and return."""
    pointer, size = ctypes.c_void_p, ctypes.c_long
    functions: dict[str, list[type]] = {
        "winograd_forward_{}": [pointer] * 5 + [size] * 6,
        "winograd_backward_{}": [pointer] * 7 + [size] * 6,
        "norm_evaluate_gelu_{}": [pointer] * 7 + [ctypes.c_double] + [size] * 3,
        "norm_forward_gelu_{}": [pointer] * 8 + [ctypes.c_double] + [size] * 3,
        "norm_backward_gelu_{}": [pointer] * 12 + [ctypes.c_double] + [size] * 3,
    }
    functions |= {name.replace("gelu", "relu"): takes for name, takes in functions.items()}
    for name, takes in functions.items():
        for precision in ("fp32", "bf16"):
            with suppress(AttributeError):  # bf16 only where the processor has instructions for it
                function = getattr(loaded, name.format(precision))
                function.argtypes, function.restype = takes, None
    loaded.winograd_scratch.argtypes, loaded.winograd_scratch.restype = [size] * 3, size
    loaded.norm_scratch.argtypes, loaded.norm_scratch.restype = [size], size
    loaded.norm_width.argtypes, loaded.norm_width.restype = [], size
    return loaded
