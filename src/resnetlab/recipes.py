"""Recipes: functions that return a whole run as data. To add one: a function here and a row in `RECIPES`.

Measured figures, with their commands, are in the README's table of results.
"""

from collections.abc import Callable
from dataclasses import dataclass

from resnetlab.config import DataConfig, ModelConfig, OptimConfig, Recipe
from resnetlab.errors import unknown


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a recipe may depend on: the data at hand and the network asked for."""

    images: int
    """Training images."""
    size: int
    """Median of the shorter image side, in pixels."""
    mirrors: bool
    """Whether a mirrored image keeps its class."""
    model: str | None = None
    """None: the recipe chooses."""
    epochs: int | None = None
    """None: as many as the recipe has."""
    read_at: int | None = None
    """Size in pixels at which the images are to be read; None: the recipe chooses."""
    gpu: bool = False
    """Whether it trains on a GPU, or on anything but a CPU: some hundred thumbnails at a time leave that idle."""

    @property
    def small(self) -> bool:
        """Whether the images are read at their own size (thumbnails), not as photographs."""
        return self.size <= 64


LONG = 16
"""Epochs from which on `fast` takes the deeper network and leaves out what it has learned: most images are easy in the
second half of so many."""
SHORT = 8
"""Epochs up to which `fast` takes a network that answers the same of a mirror image: it learns sooner, and in long runs
less (docs/log.md)."""
HALVED = 8
"""A mirror image is the same only where every stage halves the sides without a rest: three of them."""
OURS = ("fast", "mirror")
"""How the names of the networks begin that were made for `fast`."""
WITHOUT_NORM = ("linear", "vgg")
"""Networks that Muon is not for, as they have no batch norm."""


def default(facts: Facts) -> Recipe:
    """What a knowledgeable engineer would choose today for this data, without a sweep.

    SGD with Nesterov momentum, on small images with Muon for the filters (10 epochs of ResNet-20 on a JPEG copy of
    CIFAR-10, n = 1 each: 86.3 % of the validation split against 84.2 %); linear warm-up and cosine decay; no decay on
    norms and biases; a weight average; crops and, where it is safe, mirroring. Small images train a ResNet-20,
    photographs a ResNet-18 at 224 px.
    """
    flip = ("flip",) if facts.mirrors else ()
    augment = (f"crop:{max(1, facts.size // 8)}", *flip) if facts.small else ("zoom:0.35", *flip, "color:0.2")
    batch = 128 if facts.images >= 10_000 else 64 if facts.images >= 1_000 else 16
    name = facts.model or ("resnet20" if facts.small else "resnet18")
    muon = facts.small and not name.startswith(WITHOUT_NORM)
    return Recipe(
        name="default",
        model=ModelConfig(name=name),
        data=DataConfig(augment=augment),
        optim=OptimConfig(
            name="muon" if muon else "sgd",
            lr=0.05 if muon else 0.1 * batch / 128,  # linear scaling (1706.02677); Muon's is relative to the filters
            norm_lr=0.1 * batch / 128 if muon else None,
            head_lr=0.1 * batch / 128 if muon else None,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            decay_norms=False,
            schedule="cosine",
            warmup_epochs=1.0,
            average=1.0,
        ),
        epochs=20 if facts.small and facts.images < 5_000 else 30,
        batch_size=batch,
        label_smoothing=0.0 if facts.small else 0.1,
        keep="last",  # averaged at a rate of nearly 0; the best of many epochs on a small validation split is luck
    )


def fast(facts: Facts) -> Recipe:
    """The shortest way to an accurate classifier of small images (up to 64 px), on a CPU or a GPU.

    A network made for it (`models.fast`), Muon, images that grow, mirroring that alternates, strong label
    smoothing, a rate that falls to 0, and several views at the end. In short runs of images of 32 or 64 px a mirror
    image, where it keeps its class, is the same image to the network. Long runs take a deeper network, larger
    batches, and leave out the easiest images in their second half. A GPU gets larger batches still, of images that
    do not grow: it computes small ones hardly sooner.
    """
    size = facts.read_at or max(16, min(facts.size, 64))
    many = facts.images >= 10_000
    ours = facts.model is None or facts.model.startswith(OURS)
    wide = many and facts.gpu and ours
    epochs = facts.epochs or (16 if wide else 8 if many else 20)
    grown = (size // 2, 3 * size // 4) if size >= 28 and not wide else ()
    whole = all(side % HALVED == 0 for side in (*grown, size))
    other = "mirror-medium" if facts.mirrors and whole and epochs <= SHORT else "fast-medium"
    name = facts.model or ("fast-deep" if many and epochs >= LONG else other)
    flip = ("alternate",) if facts.mirrors and not (whole and name.startswith("mirror")) else ()
    batch = 64 if facts.images >= 1_000 else 16
    if many:
        batch = 1024 if wide else 512 if name == "fast-deep" else 256
    return Recipe(
        name="fast",
        model=ModelConfig(name=name),
        data=DataConfig(
            size=size,
            grow=(f"0:{grown[0]}", f"0.5:{grown[1]}", f"0.75:{size}") if grown else (),
            augment=(f"crop:{max(1, size // 16)}", *flip),
            skip_easy=0.3 if many and epochs >= LONG else 0.0,
            drop_last=True,
        ),
        optim=OptimConfig(
            name="muon",
            lr=0.2 if batch > 256 else 0.16,
            norm_lr=0.05 * batch if ours else 0.005 * batch / 128,  # ours has small logits, and biases alone
            head_lr=1e-5 * batch if ours else 0.005 * batch / 128,
            momentum=0.85,
            schedule="linear",
        ),
        epochs=epochs,
        batch_size=batch,
        label_smoothing=0.2,
        views="shift" if flip else "diagonal" if facts.mirrors else "single",
    )


def tutorial(facts: Facts) -> Recipe:
    """The Chinese tutorial's run, its mistakes mended: ResNet-50 on images enlarged to 224 px, Adam as it comes.

    Its own figures: 20 epochs of CIFAR-10 in 33 minutes on a Tesla T4, 82.78 % test accuracy as printed, 82.91 % as
    plotted. They differ because its losses and counts were divided wrongly; here every test image counts once.
    """
    return Recipe(
        name="tutorial",
        model=ModelConfig(name=facts.model or "resnet50-tutorial"),
        data=DataConfig(size=224, fit="squash", interpolation="bilinear", normalize="half", drop_last=True),
        optim=OptimConfig(name="adam", lr=1e-3),
        epochs=20,
        batch_size=128,
        precision="fp32",
    )


def paper(facts: Facts) -> Recipe:
    """Section 4.2 of He et al. (2015): SGD, divided by 10 at 32k and 48k of 64k iterations of 128 images.

    The paper's 64k iterations are 182 epochs of its 45,000 training images; with other epochs the two drops stay at
    one half and three quarters of the run. Networks of 110 layers and more start at a tenth of the rate for 400
    iterations, about an epoch (there: until the training error is below 80 %).
    """
    deep = facts.model is not None and facts.model.endswith(("110", "1202"))
    flip = ("flip",) if facts.mirrors else ()
    return Recipe(
        name="paper",
        model=ModelConfig(name=facts.model or "resnet20"),
        data=DataConfig(augment=(f"crop:{max(1, facts.size // 8)}" if facts.small else "zoom:0.08", *flip)),
        optim=OptimConfig(
            name="sgd",
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="step",
            milestones=(0.5, 0.75),
            warmup_epochs=400 * 128 / 45_000 if deep else 0.0,
            warmup_factor=0.1,
            warmup_shape="constant",
        ),
        epochs=182,
        batch_size=128,
    )


RECIPES: dict[str, Callable[[Facts], Recipe]] = {"default": default, "fast": fast, "tutorial": tutorial, "paper": paper}


def recipe(name: str, facts: Facts) -> Recipe:
    """Return the recipe called ``name`` for the data and network at hand.

    Raises:
        UsageError: There is no such recipe; the nearest is named.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name](facts)
