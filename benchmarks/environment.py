"""An environment of the benchmarks' own for the packages they compare with: none of them is a dependency of ResNetLab.

PyTorch, torchvision and ResNetLab itself are taken from the interpreter that runs the benchmark, by a link, so that
every peer computes with the same build and nothing large is downloaded again.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

SAME = ("torch", "torchvision", "numpy", "pillow")
"""Packages that every peer shares with us, at our version."""


def cache() -> Path:
    """Return where environments and pictures are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "resnetlab-benchmarks"


def interpreter(place: Path) -> Path:
    """Return the environment's Python, made if it is not there."""
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(place, with_pip=True)
        home = sysconfig.get_paths()["purelib"]
        paths = {"base": str(place), "platbase": str(place)}
        target = Path(sysconfig.get_path("purelib", "venv" if os.name != "nt" else "nt_venv", paths))
        (target / "parent.pth").write_text(f"import site; site.addsitedir({home!r})\n")
    return python


def install(place: Path, package: str) -> str:
    """Install a package from the registry where it is missing; return what went wrong, or an empty string."""
    from importlib.metadata import version

    python = interpreter(place)
    if subprocess.run([python, "-m", "pip", "show", "-q", package], capture_output=True).returncode == 0:
        return ""
    limits = place / "constraints.txt"
    limits.write_text("".join(f"{name}=={version(name).partition('+')[0]}\n" for name in SAME))
    print(f"installing {package} into {place} ...", file=sys.stderr)
    command = [str(python), "-m", "pip", "install", "-q", "-c", str(limits), package]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
