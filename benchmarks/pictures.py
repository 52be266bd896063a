"""Generated photographs for the benchmarks: smooth noise with grain, about as hard to decode as real ones."""

from pathlib import Path


def photos(folder: Path, count: int, side: int, *, classes: int = 10) -> Path:
    """Make ``folder``/train/CLASS/*.jpg (PNG up to 64 px), ``count`` in all, and a small test part, if not there.

    Args:
        folder: Where; one that is complete is used as it is.
        count: Training pictures, in equal shares from the classes.
        side: The shorter side in pixels; the longer one is a third longer, above 64 px.
        classes: Class folders.
    """
    done = folder / f"complete-{count}-{side}"
    if done.exists():
        return folder
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    shape = (side, side) if side <= 64 else (side, side * 4 // 3)
    for split, number in (("train", count), ("test", classes)):
        for index in range(number):
            coarse = chance.integers(0, 256, (8 + index % classes, 12, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
            grain = chance.normal(0, 6, (*shape, 3))
            pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
            place = folder / split / f"class{index % classes}"
            place.mkdir(parents=True, exist_ok=True)
            name = place / f"{index:06}.{'png' if side <= 64 else 'jpg'}"
            Image.fromarray(pixels).save(name, **({} if side <= 64 else {"quality": 90}))
    done.touch()
    return folder
