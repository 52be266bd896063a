"""Small images kept decoded between runs: the same pixels, never another table's, never a damaged file's."""

import io
import mmap
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnetlab import files, loader
from resnetlab.config import DataConfig
from resnetlab.errors import ResNetLabError
from resnetlab.sources import decoded as module
from resnetlab.sources.dataset import Dataset, Images, Progress, Split
from resnetlab.sources.images import ArrayImages, EncodedImages


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in which a dozen images are enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "FEWEST", 12)
    return tmp_path / "resnetlab" / "decoded"


def decoded(images: Images, progress: Progress | None = None) -> Images:
    """The function, and its thread."""
    found = module.decoded(images, progress)
    for thread in threading.enumerate():
        if thread.name == module.KEEPING:
            thread.join()
    return found


def table(seed: int = 0, count: int = 12, size: int = 8) -> EncodedImages:
    generator = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        stream = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(stream, "jpeg")
        encoded.append(stream.getvalue())
    return EncodedImages(encoded, lambda row: f"row {row}")


def no_decoding(*_: object, **__: object) -> None:
    raise AssertionError("it was decoded")


def test_the_second_time_nothing_is_decoded_and_all_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images = table().select(range(11, -1, -1))
    first = decoded(images)
    monkeypatch.setattr(module, "_decode", no_decoding)
    second = decoded(images)
    for found in (first, second):
        assert isinstance(found, ArrayImages)
        assert all(np.array_equal(found[i], images[i]) for i in range(12))
        assert found.name(2) == images.name(2) == "row 9"
        assert found.select([5, 2]).name(1) == "row 9"
    with pytest.raises(AssertionError, match="it was decoded"):
        decoded(table(seed=1))
    with pytest.raises(AssertionError, match="it was decoded"):
        decoded(images.with_channels(1))


@pytest.mark.skipif(sys.platform != "linux", reason="one process decodes here")
def test_several_processes_decode_the_same_and_say_what_they_could_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, counts = table(count=13), list[int]()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(module, "FEWEST", 4)
    found = decoded(images, lambda done, total: counts.append(done))
    assert isinstance(found, ArrayImages) and counts == [13]
    assert all(np.array_equal(found[i], images[i]) for i in range(13))
    for row, other in ((6, b"broken"), (6, table(count=1, size=9).encoded[0]), (11, b"")):  # the second's, the third's
        changed = EncodedImages([other if i == row else e for i, e in enumerate(images.encoded)], str)
        assert decoded(changed) is changed

    def refused(*_: int) -> int:
        raise BlockingIOError

    for module_of, name in ((os, "fork"), (mmap, "mmap")):
        with monkeypatch.context() as patch:
            patch.setattr(module_of, name, refused)
            assert decoded(table(seed=1)).__class__ is EncodedImages
    assert len(list(place.iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="one process decodes here")
def test_an_interrupt_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    children, fork = list[int](), os.fork

    def noted() -> int:
        children.append(fork())
        return children[-1]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fork", noted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(module, "FEWEST", 6)
    with pytest.raises(KeyboardInterrupt):
        decoded(table(), interrupt)
    (child,) = children
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_damaged_file_is_not_believed(place: Path) -> None:
    images = table()
    decoded(images)
    (file,) = place.iterdir()
    whole = file.read_bytes()
    damages = [whole[:-5], b"", whole[:-9] + bytes([whole[-9] ^ 16]) + whole[-8:], whole.replace(b"sha256", b"sha255")]
    for damaged in damages:
        file.write_bytes(damaged)
        found = decoded(images)
        assert all(np.array_equal(found[i], images[i]) for i in range(12))
        assert file.read_bytes() == whole


def test_a_file_of_another_user_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    decoded(table())
    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(module, "_decode", no_decoding)
    assert isinstance(decoded(table()), ArrayImages)


def test_what_cannot_be_kept_or_read_comes_back_as_it_is(place: Path) -> None:
    none, large = table(count=0), table(size=65)
    mixed = EncodedImages([*table(count=11).encoded, *table(count=1, size=9).encoded], str)
    broken = EncodedImages([*table(count=11).encoded, table().encoded[11][:-40]], str)
    array = ArrayImages(np.zeros((12, 8, 8, 3), np.uint8), "zeros")
    for images in (none, large, mixed, broken, array):
        assert decoded(images) is images
    assert not place.exists()


def test_copies_are_found_where_another_split_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken image among those of test leaves them encoded: then train stays so too, or none could be compared."""
    monkeypatch.setattr(loader, "FEWEST", 12)
    classes, train, other = ("a", "b"), table(count=40), table(seed=1)
    for broken in (b"", other.encoded[0][:-40]):
        test = EncodedImages([*train.encoded[:4], *other.encoded[1:], *([broken] if broken else [])], str)
        train_split, test_split = (
            Split(images=images, labels=np.arange(len(images)) % 2, classes=classes) for images in (train, test)
        )
        dataset = Dataset(name="twins", train=train_split, test=test_split)
        prepared = loader.prepare(DataConfig(val=0, skip_broken=True), dataset)
        assert any("4 images of test are in train too" in note for note in prepared.notes)


def test_a_table_that_would_fill_the_memory_is_left_encoded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = table()
    monkeypatch.setattr(module, "MOST", 12 * 8 * 8 * 3 - 1)
    assert decoded(images) is images and not place.exists()


def test_without_room_it_is_decoded_each_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ResNetLabError("No space left on the disk")

    monkeypatch.setattr(module, "write_atomic", full)
    images = table()
    assert all(np.array_equal(decoded(images)[i], images[i]) for i in range(12))
    assert not list(place.iterdir())


def test_the_files_that_were_not_used_for_longest_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded(table(0))
    (first,) = place.iterdir()
    decoded(table(1))
    (second,) = set(place.iterdir()) - {first}
    os.utime(second, (1, 1))
    monkeypatch.setattr(module, "MOST", 2 * first.stat().st_size)
    decoded(table(2))
    assert first.exists() and not second.exists() and len(list(place.iterdir())) == 2
    assert files.cache() == place.parent


def test_what_a_killed_process_was_writing_goes_after_a_day(place: Path) -> None:
    place.mkdir(parents=True)
    old, new = place / ".a.safetensors.x.tmp", place / ".b.safetensors.y.tmp"
    for stray in (old, new):
        stray.write_bytes(b"half")
    os.utime(old, (1, 1))
    decoded(table())
    assert not old.exists() and new.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="one process decodes here")
def test_children_that_somebody_else_waited_for_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: int) -> tuple[int, int]:
        raise ChildProcessError

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(module, "FEWEST", 6)
    wait = os.waitpid
    monkeypatch.setattr(os, "waitpid", gone)
    children, fork = list[int](), os.fork

    def noted() -> int:
        children.append(fork())
        return children[-1]

    monkeypatch.setattr(os, "fork", noted)
    images = table()
    assert decoded(images) is images
    for child in children:
        wait(child, 0)
