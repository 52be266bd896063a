"""Folders of class folders with small pictures."""

from pathlib import Path

import numpy as np
from PIL import Image


def class_folders(root: Path, counts: dict[str, int], size: int = 20) -> Path:
    """Write ``counts`` PNG files of ``size`` pixels a class, noise around the class's own colour; return ``root``."""
    generator = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 140, (size, size, 3), dtype=np.uint8)
            pixels[..., number % 3] += 80
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    return root
