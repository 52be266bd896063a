"""Explanations as pictures and files: an image, and beside it the same image under its heatmap."""

import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from resnetlab.files import cannot_write, write_atomic
from resnetlab.metrics import Heatmap
from resnetlab.report.panels import INK
from resnetlab.report.text import drawable, wrap

COLOURS = "inferno"
"""Dark to bright without a turn in lightness, so that it also reads in print and to colour-blind eyes."""
SMALLEST = 256
"""Pixels. Smaller images are enlarged to about this side, by a whole factor, each pixel a square."""
STRENGTH = 0.75
"""How much of the picture the colour covers where the map is 1; where it is 0 the picture is as it was, in grey."""


def overlay(heatmap: Heatmap) -> NDArray[np.uint8]:
    """Lay a heatmap over what the network read, in grey: (H', W', 3), enlarged where the image is small."""
    side = heatmap.values.shape[0]
    pixels = enlarged(heatmap)
    size = (pixels.shape[1], pixels.shape[0])
    soft = Image.fromarray(heatmap.values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    values = np.asarray(soft if side < size[0] else heatmap.values)[..., None].clip(0, 1)  # (H', W', 1)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    colour = colormaps[COLOURS](values[..., 0])[..., :3] * 255
    share = STRENGTH * np.sqrt(values)
    result: NDArray[np.uint8] = (share * colour + (1 - share) * grey[..., None]).round().astype(np.uint8)
    return result


def enlarged(heatmap: Heatmap) -> NDArray[np.uint8]:
    """Return what the network read as RGB, (H', W', 3), small images enlarged by a whole factor."""
    factor = max(1, round(SMALLEST / heatmap.pixels.shape[0]))
    pixels = np.repeat(heatmap.pixels, 3, axis=2) if heatmap.pixels.shape[2] == 1 else heatmap.pixels
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def explanation(heatmap: Heatmap) -> Figure:
    """Draw the image, its heatmap over it, what the colours mean, and in words what is explained."""
    where = f"{heatmap.method}, {heatmap.stage}" if heatmap.stage else heatmap.method
    empty = "" if heatmap.values.any() else " Nothing in the image speaks for this class."
    said = f"Evidence for “{heatmap.target}” (probability {heatmap.probability:.1%}) by {where}.{empty}"
    (title, name), families = drawable([said, heatmap.name])
    figure = Figure(figsize=(8, 4.4), dpi=110)
    figure.text(0.02, 0.97, wrap(title, 88, lines=2), va="top", fontsize=11, fontfamily=families, parse_math=False)
    figure.text(0.02, 0.03, wrap(name, 110, lines=1), fontsize=9, fontfamily=families, parse_math=False, color=INK)
    for left, picture in ((0.02, enlarged(heatmap)), (0.46, overlay(heatmap))):
        axes = figure.add_axes((left, 0.1, 0.42, 0.74))
        axes.imshow(picture, interpolation="nearest" if picture.shape[0] < 2 * SMALLEST else "antialiased")
        axes.axis("off")
    scale = figure.add_axes((0.9, 0.14, 0.02, 0.66))
    bar = figure.colorbar(ScalarMappable(cmap=COLOURS), cax=scale, ticks=[0, 1])
    bar.ax.set_yticklabels(["none", "most"], fontsize=9, color=INK)
    return figure


def write(heatmaps: Sequence[Heatmap], out: Path) -> list[Path]:
    """Write a picture (``.png``) and the values (``.npy``, float32) of each heatmap into a folder; nothing is replaced.

    Files are named after image, method and class: ``cat-grad-cam-tabby.png``; where there is one already, the next is
    ``cat-grad-cam-tabby-2.png``.

    Returns:
        The pictures.

    Raises:
        ResNetLabError: The folder cannot be written, or the disk is full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    written = []
    for heatmap in heatmaps:
        path = _free(out, f"{_plain(Path(heatmap.name).stem)}-{heatmap.method}-{_plain(heatmap.target)}")
        values = io.BytesIO()
        np.save(values, heatmap.values)
        write_atomic(path.with_name(f"{path.name}.npy"), values.getvalue())
        picture = path.with_name(f"{path.name}.png")
        drawn = io.BytesIO()
        explanation(heatmap).savefig(drawn, format="png", dpi="figure")
        write_atomic(picture, drawn.getvalue())
        written.append(picture)
    return written


def _free(out: Path, name: str) -> Path:
    """Return the first of NAME, NAME-2, ... for which there are no files yet."""
    for number in itertools.count(1):
        path = out / (name if number == 1 else f"{name}-{number}")
        if not any(path.with_name(path.name + suffix).exists() for suffix in (".png", ".npy")):
            break
    return path


def _plain(text: str) -> str:
    """Return a text as a part of a file's name."""
    plain = re.sub(r"[^\w.+-]+", "_", text).strip("._").encode()[:80]  # file systems count bytes
    return plain.decode("utf-8", "ignore") or "image"
