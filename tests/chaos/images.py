"""R9 and R10: images that are damaged, hostile or exotic, and what the pixels of the good ones must be."""

import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

import test_sources_images as known
from chaos.record import Bench, Result, Row, Tally
from resnetlab import inputs, sources
from resnetlab.config import DataConfig
from resnetlab.errors import ResNetLabError
from resnetlab.loader import prepare, read
from resnetlab.preprocess import Preprocess
from resnetlab.sources.dataset import Pixels, Split
from resnetlab.sources.images import BrokenImage, EncodedImages, FileImages, decode, read_header

SLOW = 2.0
"""Seconds of processor time that an image may take."""
PICTURE = known.picture(40, 56)


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    """Return the picture in a format and mode."""
    return known.encode(Image.fromarray(PICTURE).convert(mode), form, **options)


def _png(width: int, height: int, rows: bytes = bytes(1000), *chunks: bytes) -> bytes:
    head = known.chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunks)
        + known.chunk(b"IDAT", zlib.compress(rows))
        + known.chunk(b"IEND", b"")
    )


def readable() -> dict[str, bytes]:
    """Return images that must be read, by what is special about them."""
    frames = [Image.fromarray(np.roll(PICTURE, i, 0)) for i in range(3)]
    pages = [frame.copy() for frame in frames]  # saving leaves its settings in an image
    thin = Image.fromarray(np.resize(PICTURE, (3, 6550, 3)))
    found = {
        **{f"{form} {mode}": encoded(form, mode) for form, modes in {
            "JPEG": ("RGB", "L", "CMYK", "YCbCr"), "PNG": ("RGB", "L", "1", "P", "LA", "RGBA"), "WEBP": ("RGB", "RGBA"),
            "GIF": ("P", "L"), "BMP": ("RGB", "L", "P"), "TIFF": ("RGB", "L", "CMYK", "1", "P", "LAB"),
            "PPM": ("RGB", "L"),
        }.items() for mode in modes},
        "progressive JPEG": encoded("JPEG", progressive=True),
        "JPEG 4:4:4": encoded("JPEG", subsampling=0),
        "JPEG with a profile": encoded("JPEG", icc_profile=os.urandom(3000)),
        "JPEG with junk after": encoded("JPEG") + b"junk" * 100,
        "MPO": known.encode(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "APNG": known.encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "GIF animated": known.encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "WebP animated": known.encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "WebP lossless": encoded("WEBP", lossless=True),
        "TIFF of pages": known.encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
        "TIFF LZW": encoded("TIFF", compression="tiff_lzw"),
        "TIFF deflate": encoded("TIFF", compression="tiff_adobe_deflate"),
        "16-bit PNG": known.encode(Image.fromarray(np.full((9, 9), 30000, np.uint16)), "PNG"),
        "float TIFF": known.encode(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"),
        "one pixel": known.encode(Image.new("RGB", (1, 1), "red"), "PNG"),
        "one row": known.encode(thin, "PNG"),
    }  # fmt: skip
    return found


def unreadable() -> dict[str, bytes]:
    """Return what must be refused, by what is wrong with it."""
    jpeg, png = encoded("JPEG"), encoded("PNG")
    bad = bytearray(png)
    bad[png.find(b"IDAT") + 20] ^= 4
    text = known.chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))
    return {
        "empty": b"", "one byte": b"\xff", "zeros": bytes(1000), "noise": os.urandom(1000),
        "HTML": b"<!doctype html><html><body>404</body></html>", "JSON": b'{"error": 404}',
        "SVG": b"<svg xmlns='x'/>",
        "PDF": b"%PDF-1.7\n", "HEIC": b"\0\0\0\x18ftypheic" + bytes(90), 
        "AVIF": b"\0\0\0\x1cftypavif" + bytes(90),
        "ZIP": b"PK\3\4" + bytes(90), "GZIP": b"\x1f\x8b\x08" + bytes(90), 
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(50),
        "PSD": b"8BPS\0\1" + bytes(90), "ICO": b"\0\0\1\0\1\0" + bytes(90), 
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90),
        "pickle": b"\x80\x04cos\nsystem\n.", "AppleDouble": b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(90),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "JPEG header only": jpeg[:20], "JPEG without an end": jpeg[: len(jpeg) // 2], "progressive JPEG cut off":
        encoded("JPEG", progressive=True)[:700], "PNG header only": png[:40],
        "PNG without an end": png[: len(png) // 2],
        "PNG bad checksum": bytes(bad), "400 Mpx PNG": _png(20_000, 20_000), "121 Mpx PNG": _png(11_000, 11_000),
        "65,500 × 3000": _png(65_500, 3000), "PNG of no size": _png(0, 5), 
        "zTXt bomb": png[:33] + text + png[33:],
        "two sizes": png[:33] + png[8:33] + png[33:200], "WebP cut off": encoded("WEBP")[:60],
        "GIF cut off": encoded("GIF", "P")[:300],
        "BMP cut off": encoded("BMP")[:200], "TIFF cut off": encoded("TIFF")[:90],
    }  # fmt: skip


def met(data: bytes, name: str = "x") -> Pixels | str:
    """Return an image's pixels, or why it is refused; anything else that happens begins with ``!``."""
    began = time.process_time()
    try:
        found: Pixels | str = decode(data, channels=3, name=name)
    except BrokenImage as error:
        found = error.reason or "!no word was said"
    except BaseException as error:
        found = f"!{type(error).__name__}: {error}"
    took = time.process_time() - began
    return found if took < SLOW else f"!it took {took:.1f} s"


def corpus(bench: Bench) -> Result:
    """Read each image by itself, then all in one folder: what is left out is named, nothing takes its place."""
    good, bad, root = readable(), unreadable(), bench.folder / "photos"
    tally = Tally(bench)
    for i, (what, data) in enumerate([*good.items(), *bad.items()]):
        found = met(data)
        wanted = what in good
        wrong = (
            None
            if wanted is not isinstance(found, str) and str(found)[:1] != "!"
            else f"{'' if wanted else 'taken: '}{found}"
        )
        tally.add(what, wrong[:200] if wrong else None)
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[i % 2] / f"{i:03}.png").write_bytes(data)
    dataset = sources.load(str(root), hold_out_test=False)
    try:
        prepare(DataConfig(val=0, size=16), dataset)
        tally.add("all in a folder", "it was taken with broken images")
    except ResNetLabError as error:
        tally.add(
            "all in a folder", None if f"{len(bad)} of {len(good) + len(bad)}" in str(error) else str(error)[:200]
        )
    kept = prepare(DataConfig(val=0, size=16, skip_broken=True), dataset).train
    names = {Path(kept.split.images.name(i)).stem for i in range(len(kept))}
    want = {f"{i:03}" for i in range(len(good))}
    tally.add("with --skip-broken", None if names == want else f"{sorted(names ^ want)} differ")
    missing = [form for form in ("webp", "libtiff") if not features.check(form)]
    return tally.result(f"{len(good)} that must be read, {len(bad)} that must not", *(f"no {m} here" for m in missing))


def _cuts(bench: Bench) -> Iterator[tuple[str, bytes, int]]:
    every = bench.pick(50, 10)
    for form, options in {
        "JPEG": {}, "progressive JPEG": {"progressive": True}, "PNG": {}, "WEBP": {"lossless": True}, "GIF": {},
        "BMP": {}, "TIFF": {},
    }.items():  # fmt: skip
        data = encoded(form.split()[-1], "P" if form == "GIF" else "RGB", **options)
        yield from ((form, data, at) for at in range(0, len(data), every))


def cut(bench: Bench) -> Result:
    """Cut images off at every so many bytes: they are refused, or what is read is the whole image."""
    tally = Tally(bench)
    for form, data, at in _cuts(bench):
        found = met(data[:at])
        whole = met(data)
        same = not isinstance(found, str) and not isinstance(whole, str) and np.array_equal(found, whole)
        wrong = None if same or (isinstance(found, str) and found[0] != "!") else f"byte {at} of {len(data)}: {found}"
        tally.add(form, wrong[:200] if wrong else None)
    return tally.result("JPEG, progressive JPEG, PNG, WebP, GIF, BMP and TIFF; no pixels are made up")


def mutated(bench: Bench) -> Result:
    """Change some bytes of images at random: they are read or refused in words, and soon."""
    chance, total = bench.chance("mutated"), bench.pick(1000, 10_000)
    seeds = [data for data in readable().values() if len(data) < 20_000]
    tally = Tally(bench, of=total)
    for i in range(total):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 12)):
            at = chance.randrange(min(len(data), chance.choice((64, 1 << 20))))
            data[at : at + chance.choice((0, 1, 1, 1, 4))] = chance.randbytes(chance.choice((0, 1, 1, 1, 4)))
        found = met(bytes(data))
        wrong = found if isinstance(found, str) and found[0] == "!" else None
        try:
            read_header(bytes(data))
        except BrokenImage:
            pass
        except BaseException as error:
            wrong = f"header: {type(error).__name__}: {error}"
        tally.add(f"mutation {i}", wrong)
    return tally.result(f"{total:,} files of {len(seeds)} kinds")


def truth() -> dict[str, tuple[bytes, Pixels]]:
    """Return images with the pixels (H, W, 3) that must come of them."""
    grey = np.linspace(0, 255, 32 * 16).reshape(16, 32).round().astype(np.uint8)
    three = np.repeat(grey[..., None], 3, 2)
    small = PICTURE[:16, :24]
    alpha = np.dstack([small, np.full(small.shape[:2], 128, np.uint8)])
    on_white = (small * (128 / 255) + 255 * (127 / 255)).round().astype(np.uint8)
    palette = Image.fromarray(small).quantize(16)
    found = {
        "16-bit PNG": (known.encode(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), three),
        "16-bit TIFF": (known.encode(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), three),
        "float TIFF to 1": (known.encode(Image.fromarray((grey / 255).astype(np.float32)), "TIFF"), three),
        "float TIFF to 255": (known.encode(Image.fromarray(grey.astype(np.float32)), "TIFF"), three),
        "grey PNG": (known.encode(Image.fromarray(grey), "PNG"), three),
        "grey BMP": (known.encode(Image.fromarray(grey), "BMP"), three),
        "LA": (known.encode(Image.merge("LA", [Image.fromarray(grey), Image.new("L", (32, 16), 255)]), "PNG"), three),
        "RGBA": (known.encode(Image.fromarray(alpha), "PNG"), on_white),
        "palette": (known.encode(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "palette with a clear colour": (
            known.encode(palette, "PNG", transparency=3),
            np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB"))).astype(np.uint8),
        ),
        "1 bit": (known.encode(Image.fromarray(grey > 127), "PNG"), (three > 127) * np.uint8(255)),
        "CMYK TIFF": (known.encode(Image.fromarray(255 - np.dstack([small, small[..., :1] * 0 + 255]),
                                                   mode="CMYK"), "TIFF"), small),
        "RGB WebP lossless": (encoded("WEBP", lossless=True), PICTURE),
    }  # fmt: skip
    wide = np.ascontiguousarray(small)
    across = wide.transpose(1, 0, 2)
    turned = [wide, wide[:, ::-1], wide[::-1, ::-1], wide[::-1], across, np.rot90(wide, -1), across[::-1, ::-1]]
    turned.append(np.rot90(wide))
    for turn, upright in enumerate(turned, 1):
        exif = Image.Exif()
        exif[0x0112] = turn
        found[f"EXIF {turn}"] = (known.encode(Image.fromarray(wide), "PNG", exif=exif), np.ascontiguousarray(upright))
    return found


def ways(data: bytes, path: Path) -> dict[str, Pixels]:
    """Return an image's pixels by every way that it can come in."""
    path.write_bytes(data)
    labels, same = np.zeros(1, np.int64), Preprocess(size=8, resize=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    train = read(Split(images=FileImages([path]), labels=labels, classes=("a",)), same, DataConfig(), "")[0]
    table = Split(images=EncodedImages([data], str), labels=labels, classes=("a",))
    evaluated = read(table, same, DataConfig(memory="stream"), "")[0]
    (_, predicted), *_ = inputs.read([(path.name, path)], 3)[0]
    squares = {
        "train": train.squares(train.labels[:1] * 0)[0].numpy(),
        "evaluate": evaluated.squares(train.labels[:1] * 0)[0].numpy(),
        "predict": same.square(known_tensor(predicted)).numpy(),
        "serve": same.square(known_tensor(decode(data, channels=3))).numpy(),
    }
    return squares


def known_tensor(pixels: Pixels) -> Any:
    """Return pixels as the networks' transform wants them."""
    from resnetlab.preprocess import to_tensor

    return to_tensor(pixels)


def pixels(bench: Bench) -> Result:
    """Hold decoded pixels against arrays made by hand, and all ways in against each other."""
    table = truth()
    tally = Tally(bench, of=2 * len(table))
    for what, (data, wanted) in table.items():
        found = decode(data, channels=3)
        error = 999 if found.shape != wanted.shape else int(np.abs(found.astype(int) - wanted.astype(int)).max())
        tally.add(what, None if error <= 2 else f"off by {error}")
        squares = ways(data, bench.folder / "image")
        same = all(np.array_equal(squares["train"], other) for other in squares.values())
        tally.add(f"{what}, four ways", None if same else "they differ")
    return tally.result(f"{len(table)} images; train = evaluate = predict = serve to the bit")


RUNS: tuple[tuple[str, str, str, Callable[[Bench], Result]], ...] = (
    (
        "R9",
        "corpus",
        "Images of every format and mode, and what is none: cut off, false sizes, bombs, other files",
        corpus,
    ),
    ("R9", "cut", "Images cut off at every 10th byte (CI: 50th)", cut),
    ("R9", "mutated", "Images with random bytes changed, lost and added", mutated),
    ("R10", "pixels", "16 bit, float, CMYK, palette and clear colours, LA, RGBA, EXIF 1 to 8, grey", pixels),
)
CHECKS = {
    "corpus": "the good are read, the others refused in words within 2 s and left out; nothing takes their place",
    "cut": "refused, or the whole image",
    "mutated": "read or refused in words within 2 s",
    "pixels": "at most 2/255 from the reference; the same in train, evaluate, predict and serve",
}
ROWS = tuple(Row(id=i, part=part, fault=fault, check=CHECKS[part], run=run) for i, part, fault, run in RUNS)
