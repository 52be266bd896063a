"""Augmentations: pure functions on a batch. All chance comes in as numbers between 0 and 1, a row for each image.

The caller draws those numbers by (seed, epoch, image), so neither the batch an image falls into, nor the number of
workers, nor a resume can change what happens to it. To add one: a function, and a row in `AUGMENTATIONS` (pixels) or
`MIXES` (pairs of images).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.errors import UsageError, unknown


def flip(images: Tensor, u: Tensor, fill: Tensor, probability: float) -> Tensor:
    """Mirror left to right with the given probability."""
    return torch.where(u[:, 0].view(-1, 1, 1, 1) < probability, images.flip(-1), images)


def crop(images: Tensor, u: Tensor, fill: Tensor, padding: float) -> Tensor:
    """Pad by so many pixels in the mean colour and cut the original size out anywhere (paper, section 4.2: 4)."""
    if padding == 0:
        return images
    batch, channels, height, width = images.shape
    p = int(padding)
    padded = fill.to(images.dtype).view(1, -1, 1, 1).expand(batch, channels, height + 2 * p, width + 2 * p).contiguous()
    padded[:, :, p : p + height, p : p + width] = images
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p + 1, 2p + 1, H, W), a view
    top, left = (u * (2 * p + 1)).long().clamp_(max=2 * p).unbind(1)
    rows = torch.arange(batch, device=images.device)
    return windows[rows, :, top, left]


def zoom(images: Tensor, u: Tensor, fill: Tensor, smallest: float, size: int | None = None) -> Tensor:
    """Cut out a random part of the area (``smallest`` to 1) at an aspect of 3:4 to 4:3, and resize it to full size.

    The "inception crop" of torchvision's RandomResizedCrop, here on a batch by bilinear sampling. Of a large part only
    those aspects are drawn that lie within the image: all of it has its own. With ``size`` the result is
    ``size`` by ``size``: what is larger need not be made first.
    """
    area = smallest + (1 - smallest) * u[:, 0]
    aspect = torch.exp((-area.log()).clamp(max=math.log(4 / 3)) * (2 * u[:, 1] - 1))
    height = (area / aspect).sqrt().clamp(max=1)  # at most 1 but for rounding
    width = (area * aspect).sqrt().clamp(max=1)
    rows, columns = (size, size) if size else images.shape[-2:]
    y = _middles(rows, images) * height[:, None] + ((1 - height) * (2 * u[:, 3] - 1))[:, None]
    x = _middles(columns, images) * width[:, None] + ((1 - width) * (2 * u[:, 2] - 1))[:, None]
    edge_x, edge_y = (1 - 1 / n for n in (images.shape[-1], images.shape[-2]))  # the middles of the outermost pixels
    x, y = x.clamp(-edge_x, edge_x), y.clamp(-edge_y, edge_y)  # padding_mode="border", which Apple's GPUs lack
    grid = torch.stack((x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)), dim=-1)
    return F.grid_sample(images.float(), grid, padding_mode="zeros", align_corners=False)


def _middles(count: int, like: Tensor) -> Tensor:
    """Return the middles of so many pixels side by side that reach from -1 to 1."""
    return (2 * torch.arange(count, device=like.device) + 1) / count - 1


def cutout(images: Tensor, u: Tensor, fill: Tensor, side: float) -> Tensor:
    """Cover a square of the given side, in pixels, with the mean colour; its centre lies anywhere (1708.04552)."""
    height, width = images.shape[-2:]
    y = (u[:, 0] * height).long().view(-1, 1, 1)
    x = (u[:, 1] * width).long().view(-1, 1, 1)
    rows = torch.arange(height, device=images.device).view(1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, -1)
    half = int(side) // 2
    low, high = half, int(side) - half
    inside = (rows >= y - low) & (rows < y + high) & (columns >= x - low) & (columns < x + high)
    return torch.where(inside.unsqueeze(1), fill.view(1, -1, 1, 1).to(images.dtype), images)


def erase(images: Tensor, u: Tensor, fill: Tensor, probability: float) -> Tensor:
    """Cover, with the given probability, a rectangle of 2 to 33 % of the area with the mean colour (1708.04896)."""
    height, width = images.shape[-2:]
    area, aspect = 0.02 + 0.31 * u[:, 1], torch.exp(math.log(3.3) * (2 * u[:, 2] - 1))
    h = ((area * aspect).sqrt().clamp(max=1) * height).view(-1, 1, 1)
    w = ((area / aspect).sqrt().clamp(max=1) * width).view(-1, 1, 1)
    y, x = u[:, 3].view(-1, 1, 1) * (height - h), u[:, 4].view(-1, 1, 1) * (width - w)
    rows = torch.arange(height, device=images.device).view(1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, -1)
    inside = (rows >= y) & (rows < y + h) & (columns >= x) & (columns < x + w)
    chosen = inside & (u[:, 0] < probability).view(-1, 1, 1)
    return torch.where(chosen.unsqueeze(1), fill.view(1, -1, 1, 1).to(images.dtype), images)


def color(images: Tensor, u: Tensor, fill: Tensor, strength: float) -> Tensor:
    """Change brightness and contrast, each by a factor between 1 - strength and 1 + strength."""
    brightness, contrast = (1 + strength * (2 * u - 1)).view(-1, 2, 1, 1, 1).unbind(1)
    values = images.float() * brightness
    rows = images.round().sum(dim=-1, dtype=torch.float32)  # of whole numbers, so the same in any order
    total = rows.to(torch.int64).sum(dim=(1, 2)).to(torch.float32)
    middle = total.view(-1, 1, 1, 1) / images[0].numel() * brightness
    return ((values - middle) * contrast + middle).clamp_(0, 255)


@dataclass(frozen=True)
class Augmentation:
    """A row of the table: the function, how many random numbers an image needs, and its parameter."""

    function: Callable[..., Tensor]
    """``(images (B, C, H, W) with values 0 to 255, u (B, draws) in [0, 1), fill (C,), parameter) → images``;
    where it `resizes`, with one more argument: ``size``, in pixels, or None."""
    draws: int
    default: float
    pixels: bool = False
    """Whether the parameter is a whole number of pixels; else it is a share from 0 to 1."""
    resizes: bool = False
    """Whether it can also be asked for a ``size``; it gains from images that are larger than that."""
    alternates: bool = False
    """Whether an image's first random number is drawn once, and one half is added (modulo 1) in every other epoch."""
    mirrors: bool = False
    """Whether it may only be used where a mirrored image keeps its class."""


AUGMENTATIONS = {
    "flip": Augmentation(flip, draws=1, default=0.5, mirrors=True),
    "alternate": Augmentation(flip, draws=1, default=0.5, mirrors=True, alternates=True),
    "crop": Augmentation(crop, draws=2, default=4, pixels=True),
    "zoom": Augmentation(zoom, draws=4, default=0.35, resizes=True),
    "cutout": Augmentation(cutout, draws=2, default=8, pixels=True),
    "erase": Augmentation(erase, draws=5, default=0.25),
    "color": Augmentation(color, draws=2, default=0.2),
}
"""``alternate`` mirrors each image in every other epoch, one half of them first (arXiv:2404.00498, section 3.6)."""


@dataclass(frozen=True)
class Mixed:
    """A batch whose images are each mixed with the next one of the batch."""

    images: Tensor
    weight: float
    """Share of an image's own label; its neighbour (``labels.roll(1)``) has the rest."""


def mixup(images: Tensor, u: Tensor, alpha: float) -> Mixed:
    """Blend each image with its neighbour, the share drawn from Beta(alpha, alpha) (1710.09412)."""
    weight = _beta(float(u[0, 0]), alpha)
    return Mixed(images.lerp(images.roll(1, 0), 1 - weight), weight)


def cutmix(images: Tensor, u: Tensor, alpha: float) -> Mixed:
    """Replace a rectangle by the neighbour's, its area drawn from Beta(alpha, alpha) (1905.04899)."""
    height, width = images.shape[-2:]
    side = math.sqrt(1 - _beta(float(u[0, 0]), alpha))
    y, x = int(u[0, 1] * height), int(u[0, 2] * width)
    top, bottom = max(0, y - int(height * side / 2)), min(height, y + int(height * side / 2))
    left, right = max(0, x - int(width * side / 2)), min(width, x + int(width * side / 2))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
    return Mixed(mixed, 1 - (bottom - top) * (right - left) / (height * width))


MIXES: dict[str, Callable[[Tensor, Tensor, float], Mixed]] = {"mixup": mixup, "cutmix": cutmix}
MIX_DRAWS, MIX_ALPHA = 3, {"mixup": 0.2, "cutmix": 1.0}


def _beta(u: float, alpha: float) -> float:
    """Draw from Beta(alpha, alpha) by inverting its distribution function at ``u``."""
    from scipy.special import betaincinv

    return float(betaincinv(alpha, alpha, u))


@dataclass(frozen=True)
class Pipeline:
    """Augmentations in order, with their parameters, as one function of a batch and its random numbers."""

    steps: tuple[tuple[str, float], ...]
    mix: tuple[str, float] | None

    @property
    def draws(self) -> int:
        """Return how many random numbers an image needs in an epoch."""
        return sum(AUGMENTATIONS[name].draws for name, _ in self.steps) + (MIX_DRAWS if self.mix else 0)

    @property
    def resizes(self) -> bool:
        """Whether one of them brings the images to their final size; a border around the final crop helps it."""
        return any(AUGMENTATIONS[name].resizes for name, _ in self.steps)

    @property
    def alternating(self) -> list[int]:
        """Return the positions of the random numbers that alternate between the epochs."""
        starts = accumulate((AUGMENTATIONS[name].draws for name, _ in self.steps), initial=0)
        return [start for start, (name, _) in zip(starts, self.steps, strict=False) if AUGMENTATIONS[name].alternates]

    def pixels(self, images: Tensor, u: Tensor, fill: Tensor, size: int | None = None) -> Tensor:
        """Augment pixel values, 0 to 255: (B, C, H, W) uint8 or float32; what `resizes` makes them ``size`` square."""
        start = 0
        for name, parameter in self.steps:
            row = AUGMENTATIONS[name]
            last = (size,) if row.resizes else ()
            images = row.function(images, u[:, start : start + row.draws], fill, parameter, *last)
            start += row.draws
        return images

    def pairs(self, images: Tensor, u: Tensor) -> Mixed:
        """Mix pairs of normalised images; without a mix they come back as they are, with weight 1."""
        if self.mix is None or len(images) < 2:
            return Mixed(images, 1.0)
        name, alpha = self.mix
        return MIXES[name](images, u[:, -MIX_DRAWS:], alpha)


def pipeline(names: tuple[str, ...]) -> Pipeline:
    """Read augmentations such as ``("crop:4", "flip", "mixup:0.2")``.

    Raises:
        UsageError: A name is unknown, a parameter is not a number of its range, or two mixes are named.
    """
    steps: list[tuple[str, float]] = []
    mixes: list[tuple[str, float]] = []
    for entry in names:
        name, colon, text = entry.partition(":")
        if name not in AUGMENTATIONS and name not in MIXES:
            raise unknown("augmentation", name, [*AUGMENTATIONS, *MIXES])
        default = MIX_ALPHA[name] if name in MIXES else AUGMENTATIONS[name].default
        try:
            parameter = float(text) if colon else default
        except ValueError:
            parameter = math.nan
        if problem := _problem(name, parameter):
            raise UsageError(f'The parameter of augmentation "{entry}" must be {problem}, such as {name}:{default:g}.')
        (mixes if name in MIXES else steps).append((name, parameter))
    if len(mixes) > 1:
        raise UsageError(f"Only one of {', '.join(MIXES)} can be used at a time.")
    return Pipeline(tuple(steps), mixes[0] if mixes else None)


def _problem(name: str, parameter: float) -> str:
    """Say what a parameter must be where it is not; an empty string where it is."""
    if name in MIXES:
        return "" if 0 < parameter < 4096 else "a number above 0"
    if AUGMENTATIONS[name].pixels:
        return "" if 0 <= parameter < 4096 and parameter == int(parameter) else "a whole number of pixels"
    return "" if 0 <= parameter <= 1 else "a number from 0 to 1"
