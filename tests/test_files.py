"""A file is replaced whole or not at all, and what went wrong is said in words."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.files import cache, cannot_write, existing_parent, sha256, write_atomic


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "content", ["grün\n", "grün\n".encode(), lambda path: path.write_text("grün\n", encoding="utf-8")]
)
def test_text_bytes_and_writers_give_the_same_file(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_atomic(path, content)  # type: ignore[arg-type]
    assert path.read_bytes() == "grün\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(path: Path) -> None:
        """Put a file of its own there, as safetensors does."""
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            write_atomic(tmp_path / "a", b"x")
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
            write_atomic(tmp_path / "a", another)
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
            assert os.umask(mask) == mask, "the process's umask was changed"
            monkeypatch.setattr(os, "umask", None)  # it is the process's: it opened other threads' files to all
            write_atomic(tmp_path / "b", b"x")
            monkeypatch.undo()
        finally:
            os.umask(before)


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    path = tmp_path / "model.json"
    path.write_text("old")

    def broken(*_: object, **__: object) -> None:
        raise fail(number)

    monkeypatch.setattr(os, step, broken)
    with pytest.raises(ResNetLabError) as caught:
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.json"]
    assert str(path) in str(caught.value)
    assert ("No space left" in str(caught.value)) == (number != errno.EIO)


def test_no_space_while_the_content_is_written(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise fail(errno.ENOSPC)

    with pytest.raises(ResNetLabError, match=r"No space left .* MiB free.* untouched"):
        write_atomic(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights"]


def test_any_other_failure_of_the_writer_passes_through_and_is_cleaned_up(tmp_path: Path) -> None:
    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", broken)
    assert os.listdir(tmp_path) == []


def test_the_writer_sees_a_file_beside_the_target_and_readers_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent  # a rename across file systems would be a copy
        temporary.write_text("new")
        assert path.read_text() == "old"

    write_atomic(path, write)
    assert path.read_text() == "new"


def test_a_missing_directory_is_an_explained_error(tmp_path: Path) -> None:
    with pytest.raises(ResNetLabError, match=r"Cannot write .*there is no folder .*no\. Make it"):
        write_atomic(tmp_path / "no" / "a", "x")


def test_the_explanation_finds_the_disk_of_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "MiB free" in str(cannot_write(tmp_path / "a" / "b" / "c", fail(errno.ENOSPC)))
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(Path("not-there") / "x") == Path.cwd()


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for them
    with pytest.raises(UsageError, match="Set HOME, or XDG_CACHE_HOME"):
        cache()


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
