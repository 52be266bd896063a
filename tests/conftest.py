"""Fixtures that most tests share: a tiny data set whose classes are colours, and where the real data lies."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # test machines are shared (`resnetlab.threads`)

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnetlab import tuning
from resnetlab.cli import main
from resnetlab.sources.dataset import Dataset, Split
from resnetlab.sources.images import ArrayImages

CLASSES = ("blue", "green", "red")


def colours(n: int, *, seed: int, size: int = 8) -> Split:
    """Return ``n`` noisy images, each mostly of its class's colour."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 3
    pixels = generator.integers(0, 160, (n, size, size, 3), dtype=np.uint8)
    pixels[np.arange(n), :, :, 2 - labels] += 60
    return Split(images=ArrayImages(pixels, "tiny"), labels=labels, classes=CLASSES)


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `resnetlab bench` found on this machine, tests run with the defaults."""
    monkeypatch.setattr(tuning, "place", lambda: tmp_path / "resnetlab" / "bench.json")


@pytest.fixture
def tiny() -> Dataset:
    """60 training and 30 test images of 8×8 pixels in three classes."""
    return Dataset(name="tiny", train=colours(60, seed=1), test=colours(30, seed=2), origin="made by the tests")


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a folder of class folders with PNG files, and returns it."""

    def write(counts: dict[str, int], root: str = "photos", size: tuple[int, int] = (24, 20)) -> Path:
        generator = np.random.default_rng(0)
        for name, count in counts.items():
            folder = tmp_path / root / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (*size, 3), dtype=np.uint8)
                pixels[..., len(name) % 3] += 100
                Image.fromarray(pixels).save(folder / f"{i:03}.png")
        return tmp_path / root

    return write


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process: exit status, stdout, stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


@pytest.fixture
def not_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Go into the test's folder; return a function after which this process is nobody, so that permissions hold."""
    if not hasattr(os, "seteuid"):
        pytest.skip("this system has no users to become")
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    me = os.geteuid()
    yield lambda: os.seteuid(65534) if me == 0 else None
    os.seteuid(me)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real CIFAR-10 and published weights, for the tests that need them."""
    place = os.environ.get("RESNETLAB_TEST_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("RESNETLAB_TEST_DATA does not name the folder with the real test data")
    return Path(place)
