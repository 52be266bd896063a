"""Every row of the tables keeps the promises that the loader builds on; each is what it says it is."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnetlab.augment import (
    AUGMENTATIONS,
    MIX_ALPHA,
    MIX_DRAWS,
    MIXES,
    color,
    crop,
    cutmix,
    cutout,
    erase,
    flip,
    mixup,
    pipeline,
    zoom,
)
from resnetlab.errors import UsageError

NEUTRAL = {"flip": 0, "alternate": 0, "crop": 0, "zoom": 1, "cutout": 0, "erase": 0, "color": 0}
"""The parameter at which each augmentation leaves images as they are."""

FILL = torch.tensor([10, 20, 30], dtype=torch.uint8)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def chance(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_the_tables_are_covered() -> None:
    assert NEUTRAL.keys() == AUGMENTATIONS.keys()
    assert len(AUGMENTATIONS) == 7
    assert len(MIXES) == 2
    assert MIX_ALPHA.keys() == MIXES.keys()
    assert not AUGMENTATIONS.keys() & MIXES.keys()


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(9, 3, 32, 32), (9, 1, 28, 28), (9, 3, 7, 12), (3, 3, 160, 160), (1, 3, 8, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_augmentation_is_a_function_of_the_image_and_its_own_numbers(
    name: str, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    row, fill = AUGMENTATIONS[name], FILL[: shape[1]]
    images = pixels(*shape).to(dtype).contiguous(memory_format=layout)
    u, before = chance(shape[0], row.draws), images.clone()
    got = row.function(images, u, fill, row.default)
    assert torch.equal(images, before), "the argument was changed"
    assert got.shape == images.shape
    assert got.dtype in (dtype, torch.float32)
    assert got.min() >= 0
    assert got.max() <= 255
    assert torch.equal(got, row.function(images, u, fill, row.default))
    for i in range(shape[0]):
        alone = row.function(images[i : i + 1], u[i : i + 1], fill, row.default)
        assert torch.equal(got[i : i + 1], alone), "an image depends on its batch"


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_neutral_parameter_is_the_identity(name: str) -> None:
    row, images = AUGMENTATIONS[name], pixels(64, 3, 32, 32)
    got = row.function(images, chance(64, row.draws), FILL, NEUTRAL[name])
    assert torch.allclose(got.float(), images.float(), atol=1e-2)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_default_does_something(name: str) -> None:
    row, images = AUGMENTATIONS[name], pixels(64, 3, 32, 32)
    got = row.function(images, chance(64, row.draws), FILL, row.default).float()
    changed = (got != images.float()).flatten(1).any(dim=1)
    assert changed.float().mean() > 0.1


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_chance_are_safe(name: str, u: float) -> None:
    row, images = AUGMENTATIONS[name], pixels(2, 3, 16, 20)
    for parameter in (NEUTRAL[name], row.default, 1, 0):
        got = row.function(images, torch.full((2, row.draws), u), FILL, parameter)
        assert got.shape == images.shape
        assert torch.isfinite(got.float()).all()
        assert got.min() >= 0
        assert got.max() <= 255


def test_flip_mirrors_left_and_right_half_of_the_time() -> None:
    images = pixels(10_000, 1, 2, 3)
    got = flip(images, chance(10_000, 1), FILL[:1], 0.5)
    mirrored = (got == images.flip(-1)).flatten(1).all(1)
    assert ((got == images).flatten(1).all(1) | mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.025)  # 5 standard deviations
    assert torch.equal(flip(images, chance(10_000, 1), FILL[:1], 1), images.flip(-1))


@pytest.mark.parametrize("padding", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_is_a_slice_of_the_padded_image(padding: int, dtype: torch.dtype) -> None:
    images = pixels(50, 3, 8, 11).to(dtype) / (1 if dtype == torch.uint8 else 1.7)
    images = images.to(dtype)
    u = chance(50, 2)
    got = crop(images, u, FILL, padding)
    assert got.dtype == dtype
    for i in range(50):
        padded = FILL.to(dtype).view(3, 1, 1).repeat(1, 8 + 2 * padding, 11 + 2 * padding)
        padded[:, padding : padding + 8, padding : padding + 11] = images[i]
        top, left = (int(v * (2 * padding + 1)) for v in u[i])
        assert torch.equal(got[i], padded[:, top : top + 8, left : left + 11])


def test_crop_offsets_are_uniform() -> None:
    n = 81 * 200
    images = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255  # it stays in sight of every cut
    where = crop(images, chance(n, 2), FILL[:1], 4).flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=81)
    chi2 = ((counts - 200.0) ** 2 / 200).sum().item()
    assert chi2 < 80 + 5 * math.sqrt(2 * 80)


@pytest.mark.parametrize("smallest", [0.08, 0.35, 0.9, 1.0])
def test_zoom_cuts_the_area_it_says_within_the_image(smallest: float) -> None:
    """Two ramps, whose values are the column and the row, show which part of the image was cut out."""
    n, side = 400, 64
    columns = torch.arange(side).float().expand(side, side)
    images = torch.stack([columns, columns.T]).expand(n, 2, side, side)
    u = chance(n, 4)
    got = zoom(images, u, FILL[:2], smallest)
    middle = got[:, :, 20:44, 20:44]  # away from the edges, where there is nothing to interpolate with
    width = (middle[:, 0, :, -1] - middle[:, 0, :, 0]).mean(1) / 23
    height = (middle[:, 1, -1, :] - middle[:, 1, 0, :]).mean(1) / 23
    area = smallest + (1 - smallest) * u[:, 0]
    assert torch.allclose(width * height, area, atol=1e-3)
    assert (width / height).min() >= 3 / 4 - 1e-3
    assert (width / height).max() <= 4 / 3 + 1e-3
    if smallest < 0.5:
        assert (width / height).min() < 0.8
        assert (width / height).max() > 1.25
    for start, size, place in ((middle[:, 0, :, 0], width, u[:, 2]), (middle[:, 1, 0, :], height, u[:, 3])):
        first = (start.mean(1) + 0.5) - 20.5 * size  # the cut's edge, in pixels of the image
        assert first.min() > -1e-2
        assert (first + side * size).max() < side + 1e-2
        assert torch.allclose(first, side * (1 - size) * place, atol=1e-2)


@pytest.mark.parametrize("side", [1, 7, 8])
def test_cutout_covers_a_square_and_what_is_left_of_it_at_the_edges(side: int) -> None:
    images = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    u = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.999, 0.5]])
    covered = (cutout(images, u, FILL, side) == FILL.view(3, 1, 1)).all(1)
    before, after = side // 2, side - side // 2
    assert covered.flatten(1).sum(1).tolist() == [side**2, after**2, (before + 1) * side]
    assert covered[0, 16 - before : 16 + after, 16 - before : 16 + after].all()


def test_cutout_centres_are_uniform() -> None:
    covered = cutout(torch.full((20_000, 1, 8, 8), 255, dtype=torch.uint8), chance(20_000, 2), FILL[:1], 1) == 10
    share = covered.float().mean(0)[0] * 64
    assert share.min() > 0.7
    assert share.max() < 1.3


def test_erase_covers_one_rectangle_of_2_to_33_percent() -> None:
    n, side = 2_000, 48
    covered = erase(torch.full((n, 1, side, side), 255, dtype=torch.uint8), chance(n, 5), FILL[:1], 1)[:, 0] == 10
    share = covered.flatten(1).float().mean(1)
    rows, columns = covered.any(2), covered.any(1)
    assert torch.equal(covered, rows[:, :, None] & columns[:, None, :])
    height, width = rows.sum(1), columns.sum(1)
    slack = (height + width + 1) / side**2  # edges fall between pixels
    assert (share + slack >= 0.02).all()
    assert (share - slack <= 0.33).all()
    assert share.mean().item() == pytest.approx(0.175, abs=0.01)
    ratio = (height / width).log()
    assert ratio.mean().item() == pytest.approx(0, abs=0.08)
    quarter = erase(torch.full((n, 1, 8, 8), 255, dtype=torch.uint8), chance(n, 5, seed=3), FILL[:1], 0.25) == 10
    assert quarter.flatten(1).any(1).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_color_changes_brightness_and_contrast_by_their_factors() -> None:
    images = 100 + 50 * chance(2, 3, 6, 6).round()
    u = torch.tensor([[0.75, 0.5], [0.5, 0.25]])
    brighter, flatter = color(images, u, FILL, 0.2)
    assert torch.allclose(brighter, images[0] * 1.1, atol=1e-3)
    mean = images[1].mean()
    assert torch.allclose(flatter, mean + (images[1] - mean) * 0.9, atol=1e-3)


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_the_weight_of_a_mix_is_the_share_of_its_pixels(name: str, alpha: float) -> None:
    images = torch.tensor([0.0, 1.0, 10.0, 100.0]).view(4, 1, 1, 1).expand(4, 3, 16, 24)
    neighbours = images.roll(1, 0)
    weights = []
    for i in range(200):
        u = chance(4, MIX_DRAWS, seed=i)
        mixed = MIXES[name](images, u, alpha)
        assert mixed.images.shape == images.shape
        assert 0 <= mixed.weight <= 1
        expected = mixed.weight * images + (1 - mixed.weight) * neighbours
        assert torch.allclose(mixed.images.mean((1, 2, 3)), expected.mean((1, 2, 3)), atol=1e-3)
        again = MIXES[name](images, u, alpha)
        assert again.weight == mixed.weight
        assert torch.equal(again.images, mixed.images)
        weights.append(mixed.weight)
    assert len(set(weights)) > 50
    if name == "mixup":
        assert torch.tensor(weights).mean().item() == pytest.approx(0.5, abs=0.15)
        variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
        assert torch.tensor(weights).var().item() == pytest.approx(variance, rel=0.3)


def test_mixup_blends_and_cutmix_pastes_one_rectangle() -> None:
    images = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    u = torch.tensor([[0.4, 0.5, 0.25]] * 3)
    blend = mixup(images, u, 1.0)
    assert blend.weight == pytest.approx(0.4)
    assert torch.allclose(blend.images, 0.4 * images + 0.6 * images.roll(1, 0), atol=1e-6)
    paste = cutmix(images, u, 1.0)
    own = (paste.images == images).all(1)
    assert torch.equal(paste.images, torch.where(own[:, None], images, images.roll(1, 0)))
    other = ~own[0]
    rectangle = other.any(1)[:, None] & other.any(0)
    assert torch.equal(other, rectangle)
    assert paste.weight == pytest.approx(1 - other.float().mean().item())


def test_a_pipeline_is_its_steps_in_order_each_with_its_own_numbers() -> None:
    made = pipeline(("crop:2", "flip", "color:0.3", "cutout:4", "cutmix"))
    assert made.steps == (("crop", 2), ("flip", 0.5), ("color", 0.3), ("cutout", 4))
    assert made.mix == ("cutmix", 1.0)
    assert made.draws == 2 + 1 + 2 + 2 + MIX_DRAWS
    images, u = pixels(16, 3, 12, 12), chance(16, made.draws)
    by_hand = cutout(color(flip(crop(images, u[:, :2], FILL, 2), u[:, 2:3], FILL, 0.5), u[:, 3:5], FILL, 0.3),
                     u[:, 5:7], FILL, 4)  # fmt: skip
    assert torch.equal(made.pixels(images, u, FILL), by_hand)
    mixed, expected = made.pairs(by_hand, u), cutmix(by_hand, u[:, 7:], 1.0)
    assert torch.equal(mixed.images, expected.images)
    assert mixed.weight == expected.weight


@pytest.mark.parametrize("names", list(itertools.permutations(AUGMENTATIONS, 2)))
def test_any_two_augmentations_combine(names: tuple[str, ...]) -> None:
    made, images = pipeline(names), pixels(6, 3, 16, 16)
    got = made.pixels(images, chance(6, made.draws), FILL)
    assert got.shape == images.shape
    if {"zoom", "color"} & set(names):
        assert got.dtype == torch.float32
        fractions = got != got.round()
        assert fractions.any(), "a later step rounded what an earlier one computed"


@pytest.mark.parametrize("size", [None, 7, 40])
def test_beyond_its_edge_an_image_repeats_its_outermost_pixels(size: int | None) -> None:
    """PyTorch's border padding, made of what all devices can do."""
    images, u, sample = pixels(6, 3, 12, 20), chance(6, 4), F.grid_sample

    def bordered(images: Tensor, grid: Tensor, *, padding_mode: str, **_: Any) -> Tensor:
        assert padding_mode == "zeros"  # the only one that Apple's GPUs have always had
        return sample(images, grid, padding_mode="border", align_corners=False)

    made = zoom(images, u, FILL, 0.3, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "grid_sample", bordered)
        assert torch.allclose(zoom(images, u, FILL, 0.3, size), made, atol=1e-3)


@pytest.mark.parametrize("side", [40, 56])
def test_zoom_to_a_size_is_what_interpolation_makes_of_the_same_part(side: int) -> None:
    """Without a random part: all of the image, resized without antialiasing, and as sharp as that."""
    images, made = pixels(5, 3, 48, 48), pipeline(("zoom:1", "flip:0"))
    got = made.pixels(images, chance(5, made.draws), FILL, side)
    theirs = torch.nn.functional.interpolate(images.float(), side, mode="bilinear", antialias=False)
    assert got.shape == (5, 3, side, side)
    assert torch.allclose(got, theirs, atol=1e-2)


def test_nothing_is_done_without_augmentations() -> None:
    made, images = pipeline(()), pixels(2, 3, 4, 4)
    assert made.draws == 0
    assert not made.resizes
    assert made.pixels(images, chance(2, 1), FILL) is images
    mixed = made.pairs(images.float(), chance(2, 1))
    assert (mixed.weight, torch.equal(mixed.images, images.float())) == (1.0, True)


def test_one_image_alone_is_not_mixed() -> None:
    images = torch.rand(1, 3, 4, 4)
    mixed = pipeline(("mixup",)).pairs(images, chance(1, MIX_DRAWS))
    assert mixed.images is images
    assert mixed.weight == 1.0


def test_the_number_that_alternates_is_found_behind_those_of_other_steps() -> None:
    assert pipeline(("crop", "color", "alternate", "cutout")).alternating == [4]
    assert pipeline(("alternate", "crop")).alternating == [0]


def test_only_zoom_resizes_and_only_flips_mirror() -> None:
    assert [name for name in AUGMENTATIONS if pipeline((name,)).resizes] == ["zoom"]
    assert [name for name, row in AUGMENTATIONS.items() if row.mirrors] == ["flip", "alternate"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("flop",), 'Unknown augmentation "flop". Did you mean "flip"?'),
        (("mixupp:0.2",), 'Did you mean "mixup"?'),
        (("crop:many",), '"crop:many" must be a whole number of pixels, such as crop:4'),
        (("crop:",), "such as crop:4"),
        (("crop:1.5",), "whole number of pixels"),
        (("crop:-1",), "whole number of pixels"),
        (("cutout:inf",), "whole number of pixels"),
        (("crop:nan",), "whole number of pixels"),
        (("flip:50",), "a number from 0 to 1, such as flip:0.5"),
        (("zoom:1.1",), "a number from 0 to 1"),
        (("color:-0.1",), "a number from 0 to 1"),
        (("mixup:0",), "a number above 0, such as mixup:0.2"),
        (("cutmix:-1",), "a number above 0"),
        (("mixup", "cutmix"), "Only one of mixup, cutmix"),
        (("",), 'Unknown augmentation ""'),
    ],
)
def test_what_cannot_be_read_is_explained(entries: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        pipeline(entries)
    assert message in str(caught.value)
