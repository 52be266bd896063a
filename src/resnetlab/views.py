"""Test-time views: what a network is shown of an image when its answer is a mean over several looks.

A view maps squares (B, C, resize, resize) uint8 to batches (B, C, S, S) float32, normalised, with weights that add up
to 1. The *logits* are averaged, as the widely used fb.resnet.torch sums them over ten crops (`train.lua`) and as the
CIFAR-10 speed records do (airbench); section 3.4 of the paper says "scores". To add one: a function and a row in
`VIEWS`.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.augment import AUGMENTATIONS
from resnetlab.errors import unknown
from resnetlab.models.complexity import count
from resnetlab.preprocess import LARGEST_SMALL_IMAGE, Preprocess

Looks = list[tuple[Tensor, float]]
View = Callable[[Tensor, Preprocess], Looks]

PHOTO_SCALES = (224 / 224, 256 / 224, 384 / 224, 480 / 224, 640 / 224)
"""Sides of `multi-scale` for photographs, as shares of ``size``: section 3.4's {224, 256, 384, 480, 640} for 224."""
SMALL_SCALES = (7 / 8, 1.0, 9 / 8)
"""The same for images of up to 64 px. They are trained at one scale, not at 256 to 480 px as the paper's photographs
are, so objects of twice the size would be strange to the network."""


def single(squares: Tensor, preprocess: Preprocess) -> Looks:
    """Look once, at the centre: what training's validation sees."""
    return [(preprocess.normalize(preprocess.crop(squares)), 1.0)]


def flip(squares: Tensor, preprocess: Preprocess) -> Looks:
    """Look at the centre and at its mirror image."""
    return _mirrored(single(squares, preprocess))


def ten_crop(squares: Tensor, preprocess: Preprocess) -> Looks:
    """Look at the four corners, the centre, and their mirror images ("standard 10-crop testing", section 3.4).

    Where the square is no larger than what the network reads (small images), the image is first padded by an eighth of
    its side, reflected: 4 px at 32 px, as far as training's crops move (section 4.2).
    """
    size = preprocess.size
    images = preprocess.normalize(squares)
    if preprocess.resize == size:
        images = _reflected(images, min(max(1, size // 8), size - 1))
    end = images.shape[-1] - size
    middle = end // 2
    corners = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    return _mirrored([(images[..., top : top + size, left : left + size], 1 / 5) for top, left in corners])


def multi_scale(squares: Tensor, preprocess: Preprocess) -> Looks:
    """Look at the whole square at several sizes; global pooling makes the network fully convolutional (section 3.4).

    Sizes are `PHOTO_SCALES` or `SMALL_SCALES` of ``size``. They are resized from the square, so those beyond its side
    hold no more detail than it does.
    """
    from torchvision.transforms.v2.functional import resize

    sides = _scaled(preprocess.size)
    resized = [resize(squares, [side, side], antialias=True) for side in sides]
    return [(preprocess.normalize(images), 1 / len(sides)) for images in resized]


def _scaled(size: int) -> list[int]:
    """Return the sides that `multi_scale` shows, in pixels."""
    scales = SMALL_SCALES if size <= LARGEST_SMALL_IMAGE else PHOTO_SCALES
    return list(dict.fromkeys(max(1, round(size * scale)) for scale in scales))


def diagonal(squares: Tensor, preprocess: Preprocess) -> Looks:
    """Look at the centre with half of the weight, and one pixel up-left and down-right of it.

    The pixels beyond the crop come from the square where it has them, else from a reflected border.
    """
    size = preprocess.size
    if (preprocess.resize - size) // 2 >= 1:
        start = (preprocess.resize - size) // 2 - 1
        images = preprocess.normalize(squares[..., start : start + size + 2, start : start + size + 2])
    else:
        images = _reflected(preprocess.normalize(preprocess.crop(squares)), min(1, size - 1))
    end = images.shape[-1] - size
    places = [(end // 2, 1 / 2), (0, 1 / 4), (end, 1 / 4)]
    return [(images[..., at : at + size, at : at + size], weight) for at, weight in places]


def shift(squares: Tensor, preprocess: Preprocess) -> Looks:
    """Look as `diagonal` does, and at the mirror images of it.

    The test-time practice of the CIFAR-10 speed records (Jordan 2024, arXiv:2404.00498, section 3.5).
    """
    return _mirrored(diagonal(squares, preprocess))


VIEWS: dict[str, View] = {
    "single": single,
    "flip": flip,
    "10-crop": ten_crop,
    "multi-scale": multi_scale,
    "diagonal": diagonal,
    "shift": shift,
}
MIRRORING = ("flip", "10-crop", "shift")
"""The views that hold mirror images."""


def view(name: str, model: nn.Module | None = None, size: int | None = None) -> View:
    """Return the view of a name.

    Args:
        name: A row of `VIEWS`.
        model: The network that is to look so, if it is known already.
        size: What that reads, in pixels.

    Raises:
        UsageError: There is none, or the network cannot read images of all the sizes that the view has.
    """
    if name not in VIEWS:
        raise unknown("view", name, VIEWS)
    if name == "multi-scale" and model is not None and size is not None:
        for side in _scaled(size):
            count(model, side)
    return VIEWS[name]


def note(name: str, augment: tuple[str, ...]) -> str | None:
    """Say so where a view shows mirror images to a network that has never seen any; it is allowed all the same.

    Args:
        name: The view.
        augment: The augmentations that the network was trained with. Recipes mirror no digits and letters.
    """
    mirroring = {row for row, augmentation in AUGMENTATIONS.items() if augmentation.mirrors}
    if name not in MIRRORING or any(step.partition(":")[0] in mirroring for step in augment):
        return None
    return (
        f"The views {name} hold mirror images, but this network was trained without (data.augment has no flip): "
        "its score may fall, above all where a mirrored image is another class or none, as with digits."
    )


def _mirrored(looks: Looks) -> Looks:
    """Add the mirror image of each look and halve the weights."""
    return [(side, weight / 2) for images, weight in looks for side in (images, images.flip(-1))]


def _reflected(images: Tensor, margin: int) -> Tensor:
    """Pad all sides by ``margin`` pixels, reflected without repeating the edge."""
    return F.pad(images, (margin,) * 4, mode="reflect") if margin else images
