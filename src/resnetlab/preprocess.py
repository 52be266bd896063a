"""The one deterministic transform from an image to what a network reads. Training, prediction and export share it."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from resnetlab.config import Config, DataConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Channel statistics of ImageNet's training images in [0, 1], as torchvision's weights use them."""

LARGEST_SMALL_IMAGE = 64
"""Images up to this many pixels a side are read as they are; larger ones are photographs and become 224 px."""

PADDING = 127
"""Value of the border that ``fit="pad"`` adds. Fixed, because the channel means are measured on padded images."""


LONGEST = 16
"""Times its shorter side. Of a longer image the middle is cut out before it is resized, with ``fit="crop"``."""
LARGEST_PADDED = 2**26
"""Pixels of the square that ``fit="pad"`` makes before it resizes; of an image that would need a larger one (a long
strip; a poster) the border is added after it is resized."""


class Preprocess(Config):
    """How a decoded image becomes a tensor: made square, cropped to ``size``, scaled to [0, 1], normalised."""

    size: int = Field(ge=1)
    """Height and width that the network reads, in pixels."""
    resize: int = Field(ge=1)
    """Side of the square that the image is brought to first; its centre ``size`` pixels are then cut out."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How it becomes square: the centre of the longer side, a border in mid-grey, or a change of aspect."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    channels: Literal[1, 3] = 3
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=3)] = (0.5,)
    """Per channel, of values in [0, 1]."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=3)] = (0.5,)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) must not be below size ({self.size})")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std must have {self.channels} values, one a channel")
        return self

    def square(self, images: Tensor) -> Tensor:
        """Resize to the square that training crops from.

        Args:
            images: (..., C, H, W) uint8.

        Returns:
            (..., C, resize, resize) uint8. A batch gives what its images give one by one.
        """
        height, width = images.shape[-2:]
        if (height, width) == (self.resize, self.resize):
            return images
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        mode = InterpolationMode(self.interpolation)
        images = self._shortened(images)
        height, width = images.shape[-2:]
        if self.fit == "pad":
            side = max(height, width)
            if side**2 > LARGEST_PADDED:
                shape = [max(1, round(n * self.resize / side)) for n in (height, width)]
                images = F.resize(images, shape, mode, antialias=True)
            images = _padded(images)
        target = [self.resize] if self.fit == "crop" else [self.resize, self.resize]  # one number: the shorter side
        images = F.resize(images, target, mode, antialias=True)
        squares: Tensor = F.center_crop(images, [self.resize, self.resize])
        return squares

    def square_pixels(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Do the same to decoded pixels: (H, W, C) → (resize, resize, C), which `square` then leaves as they are."""
        pixels: NDArray[np.uint8] = self.square(to_tensor(image)).permute(1, 2, 0).contiguous().numpy()
        return pixels

    def _shortened(self, images: Tensor) -> Tensor:
        """Cut the ends off what is many times longer than wide, where only its middle will be seen: (..., C, H, W).

        Without this a strip of 1 × 60,000 pixels would fill 9 GB on its way to a square of 224. What is left is long
        enough that the middle is resized as it would be within the whole, but for less than a pixel's shift.
        """
        height, width = images.shape[-2:]
        most = LONGEST * min(height, width)
        if self.fit != "crop" or max(height, width) <= most:
            return images
        top, left = max(0, height - most) // 2, max(0, width - most) // 2
        return images[..., top : top + most, left : left + most]

    def crop(self, squares: Tensor) -> Tensor:
        """Cut the centre: (..., C, resize, resize) → (..., C, size, size)."""
        start = (self.resize - self.size) // 2
        return squares[..., start : start + self.size, start : start + self.size]

    def normalize(self, images: Tensor) -> Tensor:
        """Map pixel values 0 to 255 to ``(value / 255 - mean) / std``.

        Args:
            images: (..., C, H, W), uint8 or floating point, on any device.

        Returns:
            The same shape in float32.
        """
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.sub(255 * mean).div_(255 * std).to(torch.float32)  # the sum is float32 or wider, and new

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Turn decoded images, (H, W, C) uint8 of any sizes, into a batch (N, C, size, size) float32."""
        squares = torch.stack([self.square(to_tensor(image)) for image in images])
        return self.normalize(self.crop(squares))


def _padded(images: Tensor) -> Tensor:
    """Add a border in mid-grey to the shorter side: (..., C, H, W) → (..., C, side, side)."""
    from torchvision.transforms.v2 import functional as F

    height, width = images.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    border = [left, top, side - width - left, side - height - top]
    padded: Tensor = F.pad(images, border, fill=[PADDING] * images.shape[-3])
    return padded


def to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """Turn (H, W, C) pixels into a (C, H, W) tensor of the same memory, which resizing reads fastest."""
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)  # a copy of what is read-only


def fit_to(config: DataConfig, *, height: int, width: int, channels: int, margin: bool) -> Preprocess:
    """Resolve what ``config`` leaves open for images of a typical size; ``dataset`` statistics stay to be filled in.

    Args:
        config: The recipe's data section.
        height: Median height of the training images, in pixels.
        width: Their median width.
        channels: 1 or 3.
        margin: Keep a border of a seventh around the crop (224 of 256) for training to move in.
    """
    native = min(height, width)
    kept = native if config.fit == "crop" else max(height, width)  # of the longer side a crop sees so much only
    size = config.size or (native if kept <= LARGEST_SMALL_IMAGE else 224)
    margin = margin and config.fit == "crop" and size > LARGEST_SMALL_IMAGE
    mean, std = ((0.5,) * channels,) * 2
    if config.normalize == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return Preprocess(
        size=size,
        resize=round(size * 8 / 7) if margin else size,
        fit=config.fit,
        interpolation=config.interpolation,
        channels=3 if channels == 3 else 1,
        mean=mean,
        std=std,
    )
