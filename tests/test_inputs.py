"""What a person names is found, in the order that was named; what names nothing is an error, never an empty result."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.inputs import Found, gather, read

NOTHING = io.BytesIO()


def encoded(kind: str, colour: tuple[int, int, int] = (200, 10, 10)) -> bytes:
    """Return a picture of 4×4 pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(stream, kind)
    return stream.getvalue()


def names(found: list[Found]) -> list[str]:
    return [name for name, _ in found]


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures, a text, a hidden file and an empty folder; the current directory."""
    for name in ("b.png", "a.PNG", "deep/er/c.png", "deep/.hidden.png", "._a.png", ".ipynb_checkpoints/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded("png"))
    (tmp_path / "deep" / "notes.txt").write_text("x")
    (tmp_path / "empty.png").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_come_in_the_order_named_and_as_often(album: Path) -> None:
    assert gather(["b.png", "a.PNG", "b.png"], NOTHING) == [(n, Path(n)) for n in ("b.png", "a.PNG", "b.png")]
    assert names(gather([str(album / "b.png")], NOTHING)) == [str(album / "b.png")]


def test_a_file_that_is_named_is_taken_whatever_it_is_called(album: Path) -> None:
    assert names(gather(["deep/notes.txt", "deep/.hidden.png"], NOTHING)) == ["deep/notes.txt", "deep/.hidden.png"]


def test_a_folder_gives_its_images_sorted_by_name(album: Path) -> None:
    assert names(gather(["."], NOTHING)) == ["a.PNG", "b.png", "deep/er/c.png"]
    assert names(gather(["deep", "b.png"], NOTHING)) == ["deep/er/c.png", "b.png"]


@pytest.mark.parametrize("word", ["empty.png", "empty.png/"])
def test_a_folder_without_images_is_an_error(album: Path, word: str) -> None:
    with pytest.raises(ResNetLabError, match=r"There are no images in the folder empty\.png"):
        gather(["b.png", word], NOTHING)


def test_patterns(album: Path) -> None:
    assert names(gather(["*.png"], NOTHING)) == ["b.png"]
    assert names(gather(["*.[pP][nN][gG]"], NOTHING)) == ["a.PNG", "b.png"]
    assert names(gather(["**/*.png"], NOTHING)) == ["b.png", "deep/er/c.png"]
    (album / "x[1].png").write_bytes(encoded("png"))
    assert names(gather(["x[1].png"], NOTHING)) == ["x[1].png"], "a file of that very name comes first"


@pytest.mark.parametrize(
    "word", ["nothing.png", "*.gif", "empt*", "deep/*/", "", "x" * 5_000, "a.PNG/x", "a\0b", "[", "~"]
)
def test_what_names_nothing_is_an_error(album: Path, word: str) -> None:
    with pytest.raises(ResNetLabError, match="There is no image ") as caught:
        gather(["b.png", word], NOTHING)
    assert len(str(caught.value)) < 250


def test_no_words_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match="Name at least one image"):
        gather([], NOTHING)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm"])
@pytest.mark.parametrize("colour", [(200, 10, 10), (0, 0, 0), (65, 66, 67), (10, 10, 10)])
def test_an_image_on_standard_input(album: Path, kind: str, colour: tuple[int, int, int]) -> None:
    """Also one whose bytes are text: a dark BMP or PPM has none above 127."""
    found = gather(["-"], io.BytesIO(encoded(kind, colour)))
    good, broken = read(found, 3)
    assert broken == []
    assert [(name, pixels.shape) for name, pixels in good] == [("standard input", (4, 4, 3))]
    assert np.abs(good[0][1].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("content", [b"\0", b"\x7fELF\2\1\1\0\n", b"a.png\0b.png\0"])
def test_what_can_be_neither_is_a_broken_image(content: bytes) -> None:
    good, broken = read(gather(["-"], io.BytesIO(content)), 3)
    assert good == []
    assert [error.name for error in broken] == ["standard input"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", ""])
def test_a_list_of_paths_on_standard_input(album: Path, end: str) -> None:
    text = f"b.png\n\n{album / 'deep/er/c.png'}{end}"
    assert names(gather(["-", "a.PNG"], io.BytesIO(text.encode()))) == ["b.png", str(album / "deep/er/c.png"), "a.PNG"]


def test_a_list_may_begin_with_a_path_that_looks_like_an_image(album: Path) -> None:
    (album / "BMW.png").write_bytes(encoded("png"))
    assert names(gather(["-"], io.BytesIO(b"BMW.png\nb.png\n"))) == ["BMW.png", "b.png"]


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n"])
def test_an_empty_standard_input_is_an_error(content: bytes) -> None:
    with pytest.raises(ResNetLabError, match="Standard input is empty; it should hold an image, or a path a line"):
        gather(["-"], io.BytesIO(content))


@pytest.mark.parametrize("content", [b"b.png\nnothing.png\n", b"nothing.png", b"{" * 100_000, b"deep\n", b"\xe9\n"])
def test_a_list_that_names_nothing_is_an_error(album: Path, content: bytes) -> None:
    with pytest.raises(ResNetLabError, match=r"There is no image .*\(from standard input\)") as caught:
        gather(["-"], io.BytesIO(content))
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@given(
    content=st.binary(max_size=60),
    start=st.sampled_from([b"", b"BM", b"\x89PNG\r\n\x1a\n", b"P6 4 4 255\n", b"GIF89a"]),
)
@settings(deadline=None, max_examples=150)
def test_fuzz_standard_input(content: bytes, start: bytes) -> None:
    try:
        good, broken = read(gather(["-"], io.BytesIO(start + content)), 3)
    except ResNetLabError:
        return
    assert len(good) + len(broken) == 1
    assert all("standard input" in str(error) for error in broken)


def test_names_that_are_not_text_can_be_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / name).write_bytes(encoded("png"))
    except (OSError, UnicodeError):
        pytest.skip("this disk has no such names")
    monkeypatch.chdir(tmp_path)
    for words, stdin in (([name], b""), (["."], b""), (["*.png"], b""), (["-"], b"caf\xe9.png\n")):
        found = gather(words, io.BytesIO(stdin))
        assert found == [(r"caf\xe9.png", Path(name))]
        assert len(read(found, 3)[0]) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_broken_images_are_listed_and_the_others_read(album: Path, channels: int) -> None:
    png = encoded("png")
    (album / "0 cut.png").write_bytes(png[:50])
    (album / "1 empty.png").write_bytes(b"")
    (album / "2 text.png").write_text("<html>")
    (album / "3 page.pdf").write_bytes(b"%PDF-1.4")
    found = gather([".", "3 page.pdf", "-"], io.BytesIO(png[:50]))
    (album / "deep" / "er" / "c.png").unlink()
    good, broken = read(found, channels)
    shape = (4, 4, channels)
    assert [(name, pixels.shape, pixels.dtype.name) for name, pixels in good] == [
        ("a.PNG", shape, "uint8"),
        ("b.png", shape, "uint8"),
    ]
    reasons = {
        "0 cut.png": "cut off",
        "1 empty.png": "empty",
        "2 text.png": "holds text, not an image",
        "deep/er/c.png": "no such file",
        "3 page.pdf": "PDF and SVG are not read",
        "standard input": "cut off",
    }
    assert [error.name for error in broken] == list(reasons)
    for error in broken:
        assert str(error).startswith(f"{error.name}: ")
        assert reasons[error.name] in error.reason


def test_a_pipe_does_not_hang(album: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(album / "pipe.png")
    assert "pipe.png" not in names(gather(["."], NOTHING))
    good, broken = read(gather(["pipe.png"], NOTHING), 3)
    assert good == []
    assert broken[0].reason == "not a regular file"


def test_what_is_passed_over_below_a_folder_is_said_once(album: Path) -> None:
    (album / "phone.HEIC").write_bytes(b"x")
    (album / "gone.png").symlink_to(album / "nowhere")
    (album / "linked").symlink_to(album / "deep")
    said: list[str] = []
    assert names(gather(["."], NOTHING, said.append)) == ["a.PNG", "b.png", "deep/er/c.png"]
    assert said == ["passed over in .: 1 × broken link or device, 2 × file of another kind, 1 × link to a folder."]
    said.clear()
    gather(["deep/er"], NOTHING, said.append)
    assert not said


def test_images_are_read_as_they_are(photos: Callable[..., Path]) -> None:
    folder = photos({"cat": 2, "dog": 1}, size=(24, 20))
    good, broken = read(gather([str(folder)], NOTHING), 3)
    assert [Path(name).relative_to(folder).as_posix() for name, _ in good] == [
        "cat/000.png",
        "cat/001.png",
        "dog/000.png",
    ]
    assert {pixels.shape for _, pixels in good} == {(24, 20, 3)}
    assert broken == []


def test_a_folder_that_cannot_be_listed_is_said(album: Path, not_root: Callable[[], None]) -> None:
    (album / "deep" / "er").chmod(0)
    not_root()
    told: list[str] = []
    assert names(gather(["."], NOTHING, told.append)) == ["a.PNG", "b.png"]
    assert told[0] == "the folder deep/er cannot be listed (Permission denied); its images are left out."
    with pytest.raises(ResNetLabError, match=r"Cannot list the folder deep/er: Permission denied"):
        gather(["deep/er"], NOTHING)
