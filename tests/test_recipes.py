"""Each recipe says what its text says."""

from dataclasses import replace

import pytest

from resnetlab.config import Recipe
from resnetlab.errors import UsageError
from resnetlab.recipes import RECIPES, Facts, recipe

CIFAR = Facts(images=50_000, size=32, mirrors=True)
PHOTOS = Facts(images=2_000, size=400, mirrors=True)


def test_the_table_names_each_recipe_as_it_names_itself() -> None:
    assert len(RECIPES) == 4
    for name in RECIPES:
        made = recipe(name, CIFAR)
        assert made.name == name
        assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [8, 28, 32, 64, 65, 500])
def test_the_network_asked_for_is_used_and_mirroring_only_where_it_is_safe(name: str, size: int) -> None:
    for mirrors in (True, False):
        made = recipe(name, Facts(images=50_000, size=size, mirrors=mirrors, model="resnet34"))
        assert made.model.name == "resnet34"
        flips = [step for step in made.data.augment if step.partition(":")[0] in ("flip", "alternate")]
        assert len(flips) == (mirrors and name != "tutorial")


def test_paper_is_section_4_2() -> None:
    made = recipe("paper", CIFAR)
    o = made.optim
    assert made.model.name == "resnet20"
    assert (o.name, o.lr, o.momentum, o.nesterov, o.weight_decay, o.decay_norms) == ("sgd", 0.1, 0.9, False, 1e-4, True)
    assert (o.schedule, o.milestones, o.gamma) == ("step", (0.5, 0.75), 0.1)
    assert made.batch_size == 128
    assert made.epochs * 45_000 / 128 == pytest.approx(64_000, rel=0.005)  # "terminate training at 64k iterations"
    assert made.data.val == 0.1  # "a 45k/5k train/val split"
    assert made.data.augment == ("crop:4", "flip")  # "4 pixels are padded on each side"
    assert (made.label_smoothing, o.average, made.keep) == (0, 0, "last")


@pytest.mark.parametrize("model", ["resnet20", "resnet56", "plain56", "resnet110", "resnet1202", "plain110", None])
def test_paper_warms_up_only_the_deepest_networks(model: str | None) -> None:
    deep = model in ("resnet110", "resnet1202", "plain110")
    optim = recipe("paper", Facts(images=50_000, size=32, mirrors=True, model=model)).optim
    assert (optim.warmup_epochs > 0) == deep
    if deep:  # "0.01 to warm up", "about 400 iterations"
        assert optim.warmup_shape == "constant"
        assert optim.lr * optim.warmup_factor == pytest.approx(0.01)
        assert optim.warmup_epochs * 45_000 / 128 == pytest.approx(400)


def test_tutorial_is_the_tutorial() -> None:
    for facts in (CIFAR, PHOTOS):
        made = recipe("tutorial", facts)
        assert made.model.name == "resnet50-tutorial"
        assert (made.optim.name, made.optim.lr, made.optim.weight_decay) == ("adam", 1e-3, 0)
        assert (made.optim.schedule, made.optim.warmup_epochs, made.optim.average) == ("constant", 0, 0)
        assert (made.data.size, made.data.interpolation, made.data.normalize) == (224, "bilinear", "half")
        assert made.data.fit == "squash"  # torchvision's Resize((224, 224))
        assert made.data.augment == ()
        assert made.data.drop_last
        assert (made.epochs, made.batch_size, made.precision, made.label_smoothing) == (20, 128, "fp32", 0)


def test_default_fits_the_data() -> None:
    small, photos = recipe("default", CIFAR), recipe("default", PHOTOS)
    assert (small.model.name, photos.model.name) == ("resnet20", "resnet18")
    assert small.data.augment == ("crop:4", "flip")
    assert [step.partition(":")[0] for step in photos.data.augment] == ["zoom", "flip", "color"]
    assert (small.batch_size, photos.batch_size) == (128, 64)
    tiny = recipe("default", Facts(images=50, size=32, mirrors=True))
    assert tiny.batch_size < 50
    assert (small.optim.name, photos.optim.name) == ("muon", "sgd")
    for made in (small, photos, tiny):
        scaled = made.optim.norm_lr or made.optim.lr
        assert scaled / made.batch_size == pytest.approx(0.1 / 128)  # linear scaling
        assert not made.optim.decay_norms
        assert made.optim.schedule == "cosine"
        assert 0 < made.optim.warmup_epochs < made.epochs
        assert made.keep == "last"


def test_fast_grows_to_the_size_of_the_images_and_knows_other_networks() -> None:
    made = recipe("fast", CIFAR)
    assert made.model.name == "mirror-medium"
    assert made.data.growth[0][0] == 0
    assert made.data.growth[-1][1] == made.data.size == 32
    assert recipe("fast", Facts(images=1_000, size=8, mirrors=False)).data.size == 16
    other = recipe("fast", Facts(images=50_000, size=32, mirrors=True, model="resnet18"))
    assert other.optim.norm_lr == pytest.approx(0.005 * other.batch_size / 128)  # its norms have a scale


def test_fast_keeps_a_gpu_busy_with_large_batches_of_images_that_do_not_grow() -> None:
    def made(images: int, model: str | None = None) -> Recipe:
        return recipe("fast", Facts(images=images, size=32, mirrors=True, gpu=True, model=model))

    large = made(50_000)
    assert large.batch_size > 2 * recipe("fast", CIFAR).batch_size and large.data.growth == ()
    assert large.data.size == 32
    assert made(2_000) == recipe("fast", Facts(images=2_000, size=32, mirrors=True)), "few images make small batches"
    assert made(50_000, "resnet18") == recipe("fast", Facts(images=50_000, size=32, mirrors=True, model="resnet18"))


def test_fast_takes_the_deeper_network_and_larger_batches_for_long_runs_of_many_images() -> None:
    def made(epochs: int | None, images: int = 50_000, model: str | None = None) -> Recipe:
        return recipe("fast", Facts(images=images, size=32, mirrors=True, epochs=epochs, model=model))

    assert made(16).model.name == "fast-deep" and made(16).batch_size > made(15).batch_size
    assert {made(15).model.name, made(40, 5_000).model.name} == {"fast-medium"}
    assert made(16, model="fast-small").model.name == "fast-small"
    assert made(2, model="fast-deep").batch_size == made(16).batch_size, "its batches are its own, however long"


def test_short_runs_of_fast_take_a_network_that_mirrors_where_a_mirror_image_keeps_its_class() -> None:
    def made(mirrors: bool, model: str | None = None) -> Recipe:
        return recipe("fast", Facts(images=50_000, size=32, mirrors=mirrors, model=model))

    safe, unsafe, asked = made(True), made(False), made(True, "fast-medium")
    assert [r.model.name for r in (safe, unsafe, asked)] == ["mirror-medium", "fast-medium", "fast-medium"]
    assert safe.data.augment == unsafe.data.augment == ("crop:2",), "to mirror the images would change nothing"
    assert asked.data.augment == ("crop:2", "alternate")
    assert [r.views for r in (safe, unsafe, asked)] == ["diagonal", "single", "shift"]
    assert safe.optim == unsafe.optim == asked.optim
    few = [recipe("fast", Facts(images=1_000, size=32, mirrors=True, epochs=epochs)) for epochs in (None, 8)]
    assert [r.model.name for r in few] == ["fast-medium", "mirror-medium"], "20 epochs are no short run"


def test_fast_leaves_out_easy_images_in_long_runs_of_many_images() -> None:
    def skipped(images: int, epochs: int | None) -> float:
        return recipe("fast", Facts(images=images, size=32, mirrors=True, epochs=epochs)).data.skip_easy

    assert (skipped(50_000, None), skipped(50_000, 15), skipped(2_000, 40)) == (0, 0, 0)
    assert 0 < skipped(50_000, 16) < 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_augmentations_of_every_recipe_can_be_read(name: str) -> None:
    from resnetlab.augment import AUGMENTATIONS, pipeline

    for size in (1, 4, 8, 28, 32, 64, 65, 500):
        for mirrors in (True, False):
            made = recipe(name, Facts(images=100, size=size, mirrors=mirrors))
            steps = pipeline(made.data.augment).steps
            assert len(steps) == len(made.data.augment)
            assert mirrors or not any(AUGMENTATIONS[step].mirrors for step, _ in steps)


def test_an_unknown_recipe_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r'Unknown recipe "papper"\. Did you mean "paper"\? There are: default, '):
        recipe("papper", CIFAR)


def test_fast_grows_images_to_the_size_that_is_asked_for() -> None:
    data = recipe("fast", replace(CIFAR, read_at=64)).data
    assert (data.size, data.grow, data.augment[0]) == (64, ("0:32", "0.5:48", "0.75:64"), "crop:4")
    assert recipe("fast", replace(CIFAR, read_at=20)).data.grow == ()


def test_fast_takes_a_network_that_mirrors_only_where_every_stage_halves_the_images_evenly() -> None:
    """28 px grow from 14 and 21, of which a max-pool leaves out a column on one side."""
    chosen, named = (
        recipe("fast", Facts(images=60_000, size=28, mirrors=True, model=model)) for model in (None, "mirror-small")
    )
    assert chosen.model.name == "fast-medium"
    for made in (chosen, named):
        assert made.data.augment[-1] == "alternate" and made.views == "shift"
    assert recipe("fast", Facts(images=60_000, size=64, mirrors=True)).model.name == "mirror-medium"
