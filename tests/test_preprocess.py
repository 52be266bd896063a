"""The evaluation transform against torchvision's, and its own promises."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from resnetlab import preprocess
from resnetlab.config import DataConfig, parse
from resnetlab.preprocess import IMAGENET_MEAN, IMAGENET_STD, LONGEST, PADDING, Preprocess, fit_to, to_tensor

SHAPES = [(300, 400), (401, 299), (255, 256), (64, 1000), (40, 30), (256, 256)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def make(**settings: object) -> Preprocess:
    return Preprocess.model_validate({"size": 24, "resize": 24, "mean": MEAN, "std": STD} | settings)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_crop_is_torchvisions_evaluation_transform(shape: tuple[int, int], interpolation: str) -> None:
    pixels = image(*shape)
    theirs = v2.Compose(
        [
            v2.Resize(256, InterpolationMode(interpolation), antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )(to_tensor(pixels))
    ours = make(size=224, resize=256, interpolation=interpolation)([pixels])
    assert ours.shape == (1, 3, 224, 224)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours[0], theirs, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_squash_is_torchvisions_resize_to_both_sides(shape: tuple[int, int]) -> None:
    theirs = v2.Resize((224, 224), antialias=True)(to_tensor(image(*shape)))
    assert torch.equal(make(size=224, resize=224, fit="squash").square(to_tensor(image(*shape))), theirs)


@pytest.mark.parametrize(("height", "width"), [(12, 24), (24, 13), (23, 24)])
def test_pad_keeps_every_pixel_and_adds_a_grey_border(height: int, width: int) -> None:
    pixels = to_tensor(image(height, width))
    square = make(fit="pad").square(pixels)
    assert square.shape == (3, 24, 24)
    top, left = (24 - height) // 2, (24 - width) // 2
    assert torch.equal(square[:, top : top + height, left : left + width], pixels)
    outside = torch.ones(24, 24, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert outside.any()
    assert (square[:, outside] == PADDING).all()


@pytest.mark.parametrize("shape", [(3, 30_000), (30_000, 1), (9_000, 300)])
def test_a_strip_is_padded_without_filling_the_memory(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms.v2 import functional as F

    pad, seen = F.pad, []

    def watched(images: Tensor, *rest: Any, **more: Any) -> Tensor:
        padded: Tensor = pad(images, *rest, **more)
        seen.append(padded.numel())
        return padded

    monkeypatch.setattr(F, "pad", watched)
    square = make(fit="pad").square(torch.full((3, *shape), 200, dtype=torch.uint8))
    assert square.shape == (3, 24, 24) and seen == [3 * 24 * 24]
    assert (square[:, 11, 11] == 200).all() and (square[:, 0, 0] == PADDING).all()


@pytest.mark.parametrize("shape", [(30, 48), (48, 25), (48, 48)])
def test_a_border_added_after_resizing_is_where_it_was_before(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    smooth = torch.stack([100 + 2 * rows, 100 + 2 * columns, rows + columns]).byte()
    before = make(fit="pad").square(smooth)
    monkeypatch.setattr(preprocess, "LARGEST_PADDED", 0)
    after = make(fit="pad").square(smooth)
    apart = (before.float() - after.float()).abs()
    assert apart.mean() < 3 and (apart > 5).float().mean() < 0.1, "but for what the edge blends"


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(32, 32), (20, 50), (50, 20)])
def test_a_batch_gives_what_its_images_give_one_by_one(
    fit: str, interpolation: str, channels: int, shape: tuple[int, int]
) -> None:
    statistics = {"channels": channels, "mean": MEAN[:channels], "std": STD[:channels]}
    p = make(size=20, resize=24, fit=fit, interpolation=interpolation, **statistics)
    images = [image(*shape, channels, seed) for seed in range(5)]
    batch = torch.stack([to_tensor(i) for i in images])
    together = p.square(batch)
    assert torch.equal(together, torch.stack([p.square(one) for one in batch]))
    assert together.dtype == torch.uint8
    ready = p.normalize(p.crop(together))
    assert torch.equal(ready, p(images))
    for i, one in enumerate(images):
        assert torch.equal(ready[i : i + 1], p([one]))


def test_images_of_several_sizes_make_one_batch() -> None:
    batch = make(size=16, resize=18)([image(*shape) for shape in [(32, 32), (40, 20), (9, 7), (1, 1)]])
    assert batch.shape == (4, 3, 16, 16)
    assert torch.isfinite(batch).all()


def test_an_image_that_is_a_square_of_the_right_size_is_left_as_it_is() -> None:
    pixels = to_tensor(image(24, 24))
    assert make().square(pixels) is pixels
    assert torch.equal(make().crop(pixels), pixels)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_the_square_of_an_image_can_be_kept_in_its_place(fit: Literal["crop", "pad", "squash"]) -> None:
    preprocess = Preprocess(size=12, resize=16, fit=fit, mean=(0.5,) * 3, std=(0.5,) * 3)
    image = np.random.default_rng(0).integers(0, 256, (40, 29, 3), dtype=np.uint8)
    square = preprocess.square_pixels(image)
    assert square.shape == (16, 16, 3) and torch.equal(preprocess([square]), preprocess([image]))


def test_the_crop_is_the_centre() -> None:
    squares = torch.arange(10 * 10).view(1, 1, 10, 10)
    assert torch.equal(make(size=4, resize=10).crop(squares), squares[..., 3:7, 3:7])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_normalize_maps_to_mean_0_and_deviation_1_and_leaves_its_argument(dtype: torch.dtype) -> None:
    pixels = torch.tensor([[0, 128, 255]] * 3).view(1, 3, 1, 3).to(dtype)
    before = pixels.clone()
    got = make().normalize(pixels)
    expected = (torch.tensor([0.0, 128 / 255, 1.0]) - torch.tensor(MEAN)[:, None]) / torch.tensor(STD)[:, None]
    assert got.dtype == torch.float32
    assert torch.allclose(got[0, :, 0], expected, atol=0.03 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(pixels, before)


def test_normalize_keeps_channels_last() -> None:
    batch = torch.zeros(2, 3, 8, 8, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert make().normalize(batch).is_contiguous(memory_format=torch.channels_last)


def test_to_tensor_moves_channels_first_of_any_layout() -> None:
    pixels = image(5, 7)
    frozen = pixels.copy()
    frozen.flags.writeable = False  # as Pillow hands its pixels out
    for view in (pixels, pixels[:, ::-1], pixels.transpose(1, 0, 2), frozen):
        tensor: Tensor = to_tensor(view)
        assert np.array_equal(tensor.permute(1, 2, 0).numpy(), view)
        assert tensor.numpy().flags.writeable


@pytest.mark.parametrize(
    ("config", "height", "width", "margin", "size", "resize"),
    [
        ({}, 32, 32, False, 32, 32),
        ({}, 32, 32, True, 32, 32),
        ({}, 28, 28, False, 28, 28),
        ({}, 64, 48, False, 48, 48),
        ({}, 65, 48, False, 48, 48),
        ({"fit": "pad"}, 65, 48, False, 224, 224),
        ({}, 65, 66, False, 224, 224),
        ({}, 500, 375, False, 224, 224),
        ({}, 500, 375, True, 224, 256),
        ({"fit": "pad"}, 500, 375, True, 224, 224),
        ({"fit": "squash"}, 500, 375, True, 224, 224),
        ({"size": 224}, 32, 32, False, 224, 224),
        ({"size": 224}, 32, 32, True, 224, 256),
        ({"size": 64}, 500, 500, True, 64, 64),
        ({"size": 112}, 500, 500, True, 112, 128),
    ],
)
def test_what_a_recipe_leaves_open_fits_the_images(
    config: dict[str, object], height: int, width: int, margin: bool, size: int, resize: int
) -> None:
    data = DataConfig.model_validate(config)
    got = fit_to(data, height=height, width=width, channels=3, margin=margin)
    assert (got.size, got.resize, got.fit) == (size, resize, data.fit)


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_follow_the_recipe(channels: int) -> None:
    def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        got = fit_to(
            DataConfig.model_validate({"normalize": name}), height=8, width=8, channels=channels, margin=False
        )  # fmt: skip
        assert got.channels == channels
        return got.mean, got.std

    assert statistics("half") == ((0.5,) * channels, (0.5,) * channels)
    mean, std = statistics("imagenet")
    assert len(mean) == len(std) == channels
    assert sum(mean) / channels == pytest.approx(sum(IMAGENET_MEAN) / 3)
    assert sum(std) / channels == pytest.approx(sum(IMAGENET_STD) / 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_json_round_trip(channels: int) -> None:
    before = make(channels=channels, mean=MEAN[:channels], std=STD[:channels], fit="pad", size=20)
    assert parse(Preprocess, before.model_dump_json(), "model.json") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": 20}, r"resize \(20\) must not be below size \(24\)"),
        ({"mean": (0.5,)}, "must have 3 values"),
        ({"std": (0.5, 0.5)}, "must have 3 values"),
        ({"std": (0.5, 0.5, 0.0)}, "greater than 0"),
        ({"channels": 4}, "Input should be 1 or 3"),
        ({"channels": 1}, "must have 1 values"),
        ({"size": 0}, "greater than or equal to 1"),
        ({"mean": (0.5, 0.5, float("nan"))}, "finite"),
        ({"fit": "stretch"}, "'squash'"),
        ({"crop": 3}, "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**settings)


@pytest.mark.parametrize("shape", [(3, 30_000), (30_000, 3), (1, 60_000), (16, 4_001)])
def test_of_a_long_strip_only_the_middle_is_resized(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is far from the middle is not even looked at: a strip must not fill the memory."""
    from torchvision.transforms.v2 import functional as F

    seen: list[Tensor] = []
    resize = F.resize

    def watched(images: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append(images)
        resized: Tensor = resize(images, *rest, **more)
        return resized

    monkeypatch.setattr(F, "resize", watched)
    ramp = (torch.arange(max(shape)) % 251).to(torch.uint8)
    strip = ramp.expand(3, min(shape), -1) if shape[1] > shape[0] else ramp[:, None].expand(3, -1, min(shape))
    square = make(size=16, resize=16).square(strip)
    assert square.shape == (3, 16, 16)
    assert max(seen[0].shape[-2:]) == LONGEST * min(shape)
    whole = F.center_crop(resize(strip, [16], antialias=True), [16, 16])
    step = 255 * 2 * min(shape) / 251  # a shift by less than a pixel of the square, down a ramp
    assert (square.float() - whole.float()).abs().max() <= max(4, step)
