"""The decoder against reference arrays and against damage; scanning."""

import contextlib
import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resnetlab.errors import ResNetLabError
from resnetlab.sources import images
from resnetlab.sources.dataset import Pixels, Split
from resnetlab.sources.images import (
    ArrayImages,
    BrokenImage,
    EncodedImages,
    FileImages,
    all_grey,
    decode,
    read_header,
    refuse_or_drop,
    scan,
)

Array = NDArray[np.generic]


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def picture(height: int = 24, width: int = 36) -> Pixels:
    """A smooth picture, so that lossy formats stay near it."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 / height, x * 255 / width, (y + x) * 255 / (height + width)], -1).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def far(a: Array, b: Array) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


GREY16 = (np.mgrid[:20, :30].sum(0) * 1300).astype(np.uint16)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact(form: str) -> None:
    assert (decode(encode(Image.fromarray(picture()), form), channels=3) == picture()).all()


def test_webp_and_first_frames() -> None:
    red, blue = Image.new("RGB", (9, 7), "red"), Image.new("RGB", (9, 7), "blue")
    assert (decode(encode(Image.fromarray(picture()), "WEBP", lossless=True), channels=3) == picture()).all()
    for form in ("GIF", "TIFF", "WEBP", "PNG"):
        data = encode(red, form, save_all=True, append_images=[blue], **({"lossless": True} if form == "WEBP" else {}))
        assert decode(data, channels=3)[3, 3].tolist() == [255, 0, 0], form


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_not_clipped(form: str, channels: int) -> None:
    pixels = decode(encode(Image.fromarray(GREY16), form), channels=channels)
    assert pixels.shape == (20, 30, channels)
    assert far(pixels[..., 0], np.rint(GREY16 / 257)) <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("bits", "photometric", "values", "wanted"),
    [(16, 1, [0, 257, 65535], [0, 1, 255]), (16, 0, [0, 257, 65535], [255, 254, 0])],
)
def test_tiff_by_hand(order: str, bits: int, photometric: int, values: list[int], wanted: list[int]) -> None:
    if order == ">" and photometric == 0:
        pytest.skip("Pillow does not read it")
    tags = [(256, 3), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1), (279, 6)]
    data = struct.pack(order + "3H", *values)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data) + 2)
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    tiff = head + data + b"\0\0" + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)
    assert decode(tiff, channels=1)[0, :, 0].tolist() == wanted


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (GREY16 / 65535, GREY16 / 257),
        (GREY16 / 257, GREY16 / 257),
        (GREY16 * 1.0, GREY16 / 257),
        (np.where(GREY16 > 30000, np.nan, GREY16 / 65535), np.where(GREY16 > 30000, 0, GREY16 / 257)),
        (GREY16 / 65535 - 0.2, np.clip(GREY16 / 257 - 51, 0, 255)),
    ],
)
def test_float_tiff(values: Array, wanted: Array) -> None:
    data = encode(Image.fromarray(values.astype(np.float32)), "TIFF")
    assert far(decode(data, channels=1)[..., 0], np.rint(wanted)) <= 1


def test_32_bit_grey() -> None:
    for values in (GREY16.astype(np.int32), GREY16.astype(np.int32) * 32768):
        data = encode(Image.fromarray(values), "TIFF")
        scale = 257 if values.max() < 65536 else (2**32 - 1) / 255
        assert far(decode(data, channels=1)[..., 0], np.rint(values / scale)) <= 1


def test_transparency_is_laid_on_white() -> None:
    alpha = np.tile(np.linspace(0, 255, 36).astype(np.uint8), (24, 1))
    rgba = Image.fromarray(np.dstack([picture(), alpha]))
    share = alpha[..., None] / 255
    wanted = np.rint(picture() * share + 255 * (1 - share))
    for form in ("PNG", "TIFF"):
        assert far(decode(encode(rgba, form), channels=3), wanted) <= 2
    la = Image.fromarray(np.dstack([picture()[..., 0], alpha]), "LA")
    assert far(decode(encode(la, "PNG"), channels=1)[..., 0], wanted[..., 0]) <= 2
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    data = encode(palette, "PNG", transparency=bytes([0, 128]))
    assert far(decode(data, channels=3)[0], np.array([[255, 255, 255], [227, 177, 152]])) <= 2
    grey = encode(Image.fromarray(np.array([[0, 90]], np.uint8)), "PNG", transparency=90)
    assert decode(grey, channels=1)[0, :, 0].tolist() == [0, 255]


def test_cmyk_and_1_bit_and_grey() -> None:
    cmyk = Image.fromarray(picture()).convert("CMYK")  # black is 0, so RGB comes back exactly
    assert far(decode(encode(cmyk, "TIFF"), channels=3), picture()) <= 1
    jpeg = encode(cmyk, "JPEG", quality=100, subsampling=0)  # Pillow writes Adobe's inverted form
    assert b"Adobe" in jpeg
    assert far(decode(jpeg, channels=3), picture()) <= 4
    bits = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    assert decode(encode(bits, "PNG"), channels=3)[0, :, 0].tolist() == [0, 255, 255]
    assert decode(encode(bits, "TIFF"), channels=1)[0, :, 0].tolist() == [0, 255, 255]
    grey = decode(encode(Image.fromarray(picture()), "PNG"), channels=1)
    assert far(grey[..., 0], np.asarray(Image.fromarray(picture()).convert("L"))) == 0


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(form: str, turn: int) -> None:
    """The stored picture is the upright one turned the way the camera was; decoding undoes it."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = (255, 0, 0)
    upright[8:, 16:] = (0, 0, 255)
    undo = Image.Transpose
    inverse = {2: undo.FLIP_LEFT_RIGHT, 3: undo.ROTATE_180, 4: undo.FLIP_TOP_BOTTOM, 5: undo.TRANSPOSE}
    inverse |= {6: undo.ROTATE_90, 7: undo.TRANSVERSE, 8: undo.ROTATE_270}
    stored = Image.fromarray(upright)
    stored = stored.transpose(inverse[turn]) if turn > 1 else stored
    exif = Image.Exif()
    exif[0x0112] = turn
    lossless: dict[str, dict[str, object]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = encode(stored, form, exif=exif, **lossless.get(form, {}))
    assert far(decode(data, channels=3), upright) <= 3
    assert read_header(data)[2:] == (16, 32)
    assert decode(data, channels=3, at_least=(1, 1)).shape[0] * 2 == decode(data, channels=3, at_least=(1, 1)).shape[1]


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("progressive", [False, True])
def test_cut_off_anywhere_is_read_or_explained(form: str, progressive: bool) -> None:
    """Every 50th byte: never another exception, and never fewer pixels passed off as the picture."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), form, **({"progressive": True} if progressive and form == "JPEG" else {}))
    whole = decode(data, channels=3)
    refused = 0
    for end in [*range(0, len(data), 50), len(data) - 3]:
        for channels in (1, 3):
            try:
                pixels = decode(data[:end], channels=channels)
            except BrokenImage as error:
                refused += 1
                assert error.reason
            else:
                assert channels == 1 or far(pixels, whole) == 0, end
    assert refused >= 2 * len(range(0, len(data), 50)) - 2


def test_a_flipped_bit_in_a_png_is_found() -> None:
    data = encode(Image.fromarray(picture()), "PNG")
    for at in range(8, len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        with pytest.raises(BrokenImage):
            decode(bytes(flipped), channels=3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>404</body></html>", "text"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC"),
        (b"%PDF-1.7", "PDF"),
        (bytes(100), "not an image"),
        (b"\xff\xd8\xff\xe0", "cut off"),
        (b"BM" + bytes(60), "damaged"),
        (b"II*\0" + b"\xff" * 40, "the file is"),
    ],
)
def test_what_is_no_image_is_explained(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(path, channels=3)
    assert "x.jpg" in str(caught.value)
    with pytest.raises(BrokenImage):
        read_header(path)


def test_a_bomb_is_refused_by_its_header() -> None:
    for side in (11_000, 20_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        with warnings.catch_warnings(), pytest.raises(BrokenImage, match=rf"{side:,} × {side:,} pixels.* 50 million"):
            warnings.simplefilter("error")
            decode(bomb, channels=3)
    jpeg = bytearray(encode(Image.fromarray(picture()), "JPEG"))
    at = jpeg.find(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xf0\xff\xf0"
    with pytest.raises(BrokenImage, match="65,520 × 65,520"):
        decode(bytes(jpeg), channels=3)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """Each costs the decoder a walk over the whole image, and ten bytes."""
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    decode(whole, channels=3)
    many = whole[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 200 + whole[-2:]
    with pytest.raises(BrokenImage, match="a JPEG of more than 100 scans"):
        decode(many, channels=3)


def test_a_large_jpeg_of_many_scans_is_refused_and_a_small_one_is_not() -> None:
    large = io.BytesIO()
    Image.new("L", (7_000, 7_000)).save(large, "JPEG", progressive=True)
    small = encode(Image.fromarray(picture()), "JPEG")
    again = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 30
    with pytest.raises(BrokenImage, match="scans, which is too many for 7,000 × 7,000 pixels"):
        decode(large.getvalue()[:-2] + again + large.getvalue()[-2:], channels=1)
    with contextlib.suppress(BrokenImage):  # damaged it may be
        assert decode(small[:-2] + again + small[-2:], channels=3).shape == picture().shape


@pytest.mark.parametrize("tile", [(16, 16), (23_008, 22_000)])
def test_a_tile_that_is_larger_than_its_tiff_counts(tile: tuple[int, int]) -> None:
    """A tile is decoded whole: a file of 15 kB could take 2 GB."""
    values = [(256, 3, 16), (257, 3, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, tile[0]),
              (323, 4, tile[1])]  # fmt: skip
    packed = zlib.compress(bytes(16 * 16))
    at = 8 + 2 + 12 * (len(values) + 2) + 4
    entries = [*values, (324, 4, at), (325, 4, len(packed))]
    tags = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4) + packed
    if tile == (16, 16):
        assert not decode(data, channels=1).any()
    else:
        with pytest.raises(BrokenImage, match="the image is too large: 23,008 × 22,000 pixels"):
            decode(data, channels=1)


def test_zipped_text_bomb_in_a_png() -> None:
    data = encode(Image.fromarray(picture()), "PNG")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    with pytest.raises(BrokenImage):
        decode(data[:33] + text + data[33:], channels=3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    for path in (tmp_path / "x.jpg", tmp_path, Path("/dev/zero")):
        with pytest.raises(BrokenImage, match="not a regular file"):
            decode(path, channels=3)
        with pytest.raises(BrokenImage):
            read_header(path)
    with pytest.raises(BrokenImage, match="no such file"):
        decode(tmp_path / "gone.png", channels=3)


def test_content_decides_not_the_extension(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encode(Image.fromarray(picture()), "PNG"))
    assert (decode(tmp_path / "x.jpg", channels=3) == picture()).all()
    assert read_header(tmp_path / "x.jpg").format == "PNG"


def test_formats_outside_the_list_are_not_tried(tmp_path: Path) -> None:
    for form in ("ICO", "TGA", "PCX", "EPS"):
        with pytest.raises(BrokenImage):
            decode(encode(Image.fromarray(picture()), form), channels=3)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_fast_way_for_jpeg_gives_what_the_long_one_gives(
    mode: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(Image.fromarray(picture()).convert(mode), "JPEG")
    assert images._frame(data) == read_header(data) == ("JPEG", mode, 24, 36)
    fast = decode(data, channels=channels)
    monkeypatch.setattr(images, "_frame", lambda data: None)
    assert read_header(data) == ("JPEG", mode, 24, 36)
    assert (decode(data, channels=channels) == fast).all()


def test_jpegs_can_be_decoded_smaller(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encode(Image.fromarray(picture(400, 800)), "JPEG"))
    files = FileImages([path])
    assert files.read(0, (100, 100)).shape == (100, 200, 3)
    assert files.read(0, (101, 100)).shape == (200, 400, 3)
    assert files[0].shape == (400, 800, 3)
    assert files[0].flags.writeable


def test_grey_is_told_by_headers_and_stops_at_colour() -> None:
    grey, colour = encode(Image.new("L", (4, 4)), "PNG"), encode(Image.new("RGB", (4, 4)), "PNG")
    assert all_grey(EncodedImages([grey, b"", encode(Image.fromarray(GREY16), "PNG")], str))
    assert not all_grey(EncodedImages([grey, colour], str))
    assert EncodedImages([colour], str).with_channels(1)[0].shape == (4, 4, 1)
    assert all_grey(ArrayImages(np.zeros((2, 3, 3, 1), np.uint8), "x"))


def test_selection_keeps_names() -> None:
    arrays = ArrayImages(np.arange(5, dtype=np.uint8)[:, None, None, None], "batch").select([4, 2]).select([1])
    assert (arrays.name(0), arrays[0].item(), len(arrays)) == ("batch image 2", 2, 1)
    encoded = EncodedImages([b"a", b"b", b"c"], "row {}".format).select([2, 0]).select([0])
    assert (encoded.name(0), encoded.source(0), len(encoded)) == ("row 2", b"c", 1)


def test_scan_keeps_order_and_collects_the_broken() -> None:
    good = [encode(Image.new("L", (3, 3), i), "PNG") for i in range(250)]
    for i in (3, 100, 249):
        good[i] = b""
    seen: list[tuple[int, int]] = []
    results, broken = scan(
        EncodedImages(good, "row {}".format),
        lambda i, pixels: (i, int(pixels[0, 0, 0])),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert results == [(i, i) for i in range(250) if i not in (3, 100, 249)]
    assert [(e.index, e.name) for e in broken] == [(3, "row 3"), (100, "row 100"), (249, "row 249")]
    assert seen[-1] == (250, 250) and seen == sorted(seen)


def test_an_interrupt_stops_the_scan() -> None:
    calls: list[int] = []

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(ArrayImages(np.zeros((100_000, 1, 1, 1), np.uint8), "x"), lambda i, p: calls.append(i), progress=interrupt)
    assert len(calls) < 100_000
    assert threading.active_count() < 10


def test_broken_images_are_refused_by_name_or_dropped() -> None:
    data = [encode(Image.new("L", (3, 3)), "PNG")] * 20
    split = Split(images=EncodedImages(data, "row {}".format), labels=np.repeat(np.arange(2), 10), classes=("a", "b"))
    broken = [BrokenImage(f"row {i}", "it is cut off", i) for i in range(12)]
    with pytest.raises(
        ResNetLabError, match=r"12 of 20 images(.|\n)*row 9: it is cut off\n.* 2 more(.|\n)*--skip-broken"
    ):
        refuse_or_drop(split, broken, skip_broken=False)
    kept = refuse_or_drop(split, broken, skip_broken=True)
    assert kept.labels.tolist() == [1] * 8 and kept.images.name(0) == "row 12"
    assert refuse_or_drop(split, [], skip_broken=False) is split
    with pytest.raises(ResNetLabError, match="None is left"):
        refuse_or_drop(split, [BrokenImage("x", "y", i) for i in range(20)], skip_broken=True)


def test_pillow_does_not_warn() -> None:
    """An APNG without frames warns in Pillow; warnings are errors here."""
    data = encode(Image.fromarray(picture()), "PNG")
    animation = chunk(b"acTL", struct.pack(">II", 0, 0))
    assert (decode(data[:33] + animation + data[33:], channels=3) == picture()).all()
    with pytest.warns(UserWarning, match="Invalid APNG"):
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data[:33] + animation + data[33:]))


def test_damaged_exif_does_not_hide_the_picture() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 40
    jpeg = encode(Image.fromarray(picture()), "JPEG", exif=exif.tobytes()[:30])
    assert decode(jpeg, channels=3).shape == (24, 36, 3)
