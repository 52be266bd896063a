"""Heatmaps as PNG files in memory."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

from resnetlab.metrics import Heatmap
from resnetlab.report import heatmap as drawn
from resnetlab.sources.dataset import Pixels


def heat(heatmap: Heatmap) -> bytes:
    """Return the heat alone, coloured, as transparent as it is low: to be laid over the image."""
    values = heatmap.values.clip(0, 1)
    pixels = (colormaps[drawn.COLOURS](0.25 + 0.75 * values) * 255).round().astype(np.uint8)  # (H, W, 4)
    pixels[..., 3] = (values**0.75 * 255).round()
    return _png(pixels)


def overlay(heatmap: Heatmap) -> bytes:
    """Return the heat over what the network read, as in the report."""
    return _png(drawn.overlay(heatmap))


def values(heatmap: Heatmap) -> bytes:
    """Return the heat as grey values: 0 is none, 255 the most."""
    return _png((heatmap.values.clip(0, 1) * 255).round().astype(np.uint8))


FORMATS = {"overlay": overlay, "heat": heat, "values": values}
"""What `/explain?format=` returns besides JSON."""


def data_url(png: bytes) -> str:
    """Return a PNG as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
