"""The experiments: functions that list what to train as data. To add one: a function here and a row in `EXPERIMENTS`.

The paper is He, Zhang, Ren and Sun 2015 (arXiv:1512.03385); errors of the paper are in percent, on the CIFAR-10 test
split, of networks trained for 64,000 iterations of 128 images.
"""

from collections.abc import Callable

from resnetlab.errors import unknown
from resnetlab.lab import judges
from resnetlab.lab.records import Arm, Experiment

SHORT = (
    "After a small part of the paper's iterations, error rates say who learns faster, not who is better in the end; "
    "they cannot be set beside the paper's."
)


def _cifar(name: str, model: str, *settings: str, paper: float | None = None, source: str = "") -> Arm:
    return Arm(name=name, model=model, settings=settings, paper=paper, source=source)


def degradation() -> Experiment:
    """Stack more plain layers and the training error rises; with shortcuts it does not.

    Figure 1 and figure 6: plain networks of 20 to 56 layers, ResNets of the same. The paper gives the plain networks'
    errors only as curves (and over 60 % for 110 layers); ResNet-20 ends at 8.75 % and ResNet-56 at 6.97 %.

    Measured with --budget 30m on one core of an AMD EPYC (JPEG copy of CIFAR-10, 10,000 images at 16 px, half the
    channels, 2,679 iterations of 64, n = 2 seeds), training error: plain-20 55.7 ± 0.8 %, plain-56 79.5 ± 2.3 %,
    ResNet-20 48.8 ± 0.1 %, ResNet-56 46.3 ± 0.1 %.
    """
    return Experiment(
        name="degradation",
        title="Degradation: deeper plain networks train worse, deeper residual networks do not",
        claim="With 56 layers a plain network has a higher training error than with 20, so it is not overfitting but "
        "harder to optimise. A residual network of 56 layers trains at least as well as one of 20.",
        place="He et al. 2015, figures 1 and 6 (left and middle), section 4.2",
        caution="A short run shows the order of the training errors, which is the claim. The final test errors "
        "(8.75 % and 6.97 % for the ResNets) need the full schedule.",
        arms=(
            _cifar("plain-20", "plain20"),
            _cifar("plain-56", "plain56"),
            _cifar("ResNet-20", "resnet20", paper=8.75),
            _cifar("ResNet-56", "resnet56", paper=6.97),
        ),
        panels=(("plain networks", ("plain-20", "plain-56")), ("residual networks", ("ResNet-20", "ResNet-56"))),
        judge=judges.degradation,
        least=2500,
    )


def depth() -> Experiment:
    """Residual networks gain from depth: 20, 32, 44, 56 and 110 layers; 1,202 layers only with the full budget.

    Table 6 and figure 6 (right): 8.75, 7.51, 7.17, 6.97, 6.43 (best of five; mean 6.61 ± 0.16) and 7.93 % error. The
    110-layer network starts at a tenth of the learning rate (the ``paper`` recipe does that by itself).

    Measured with --budget 6m on one busy core of an AMD EPYC (JPEG copy of CIFAR-10, 5,000 images at 16 px, half the
    channels, 71 iterations of 64, n = 2 seeds), test error from 20 to 110 layers: 76.9, 77.8, 77.5, 78.5, 78.1 %:
    nothing is learned so soon.
    """
    return Experiment(
        name="depth",
        title="Depth: what more layers buy a residual network",
        claim="Test error falls with depth from 20 to 110 layers. 1,202 layers still train to almost no error, but "
        "generalise less well than 110.",
        place="He et al. 2015, table 6 and figure 6 (middle and right)",
        caution=SHORT + " Deep networks catch up late: in a short run the shallow ones usually lead.",
        arms=(
            _cifar("ResNet-20", "resnet20", paper=8.75),
            _cifar("ResNet-32", "resnet32", paper=7.51),
            _cifar("ResNet-44", "resnet44", paper=7.17),
            _cifar("ResNet-56", "resnet56", paper=6.97),
            _cifar("ResNet-110", "resnet110", paper=6.43),
            _cifar("ResNet-1202", "resnet1202", paper=7.93),
        ),
        judge=judges.depth,
    )


def shortcuts() -> Experiment:
    """Which shortcuts? A: zero-padded identity, B: projections where shapes change, C: projections everywhere.

    The paper asks this of ResNet-34 on ImageNet (table 3, top-1 error in 10-crop testing): plain 28.54, A 25.03, B
    24.52, C 24.19 %. Here it is asked of ResNet-32 on the data at hand; only the order can be compared.
    """
    return Experiment(
        name="shortcuts",
        title="Shortcuts: options A, B and C",
        claim="All three kinds of shortcut are far better than none. B is slightly better than A, and C than B; the "
        "differences are small, so projections are not what matters.",
        place="He et al. 2015, table 3 (there ResNet-34 on ImageNet, top-1 error: none 28.54 %, A 25.03 %, B 24.52 %, "
        "C 24.19 %)",
        caution=SHORT + " The paper's differences between A, B and C are 0.3 to 0.8 points on ImageNet: fewer than "
        "about five seeds of a short run cannot tell such differences from luck.",
        arms=(
            _cifar("plain-32, no shortcuts", "plain32"),
            _cifar("A: zero-padded", "resnet32", "model.shortcut=A", paper=7.51),
            _cifar("B: projections where shapes change", "resnet32", "model.shortcut=B"),
            _cifar("C: projections everywhere", "resnet32", "model.shortcut=C"),
        ),
        judge=judges.shortcuts,
    )


def responses() -> Experiment:
    """Residual functions are closer to zero than plain layers' outputs, and the more so the deeper the network.

    Figure 7: the standard deviation of each 3×3 layer's response, after batch norm and before ReLU or addition, in
    order and sorted. Published ResNets for CIFAR-10 gave means of 0.686, 0.562, 0.478 and 0.427 for 20, 32, 44 and 56
    layers over 500 test images, measured for this project.

    Measured on the networks of `degradation` above, n = 2 seeds, mean over the layers: plain-20 0.98, plain-56 2.39,
    ResNet-20 0.77, ResNet-56 0.66.
    """
    base = degradation()
    return Experiment(
        name="responses",
        title="Layer responses: residual functions stay small",
        claim="The responses of residual networks are generally smaller than those of plain ones, and those of deeper "
        "residual networks are smaller than those of shallower ones.",
        place="He et al. 2015, figure 7, section 4.2",
        caution="Responses are measured on trained networks; after a short training they still carry much of the "
        "initialisation.",
        arms=base.arms,
        panels=base.panels,
        measure="responses",
        least=base.least,
    )


def complexity() -> Experiment:
    """ResNet-152 costs less than VGG-16: parameters, multiply-adds, time and memory of each network; no training.

    Table 1 of the paper, in multiply-adds: 1.8, 3.6, 3.8, 7.6 and 11.3 G for 18, 34, 50, 101 and 152 layers, VGG-16
    15.3 G, VGG-19 19.6 G. The paper's bottlenecks stride on the first 1×1 convolution, torchvision's on the 3×3.

    Measured: of all 26 networks our count and PyTorch's agree; ResNet-152 11.28 G, VGG-16 15.47 G, VGG-19 19.63 G.
    """
    return Experiment(
        name="complexity",
        title="Complexity: what each network costs",
        claim="Depth is not cost: ResNet-152 needs fewer multiply-adds than VGG-16, and ResNet-34 needs 18 % of "
        "VGG-19's.",
        place="He et al. 2015, table 1 and section 3.3",
        caution="Multiply-adds are exact. Times and memory are this machine's, for small batches.",
        measure="complexity",
    )


def compare() -> Experiment:
    """What each network buys on CIFAR-10 when all are trained alike: linear softmax, VGG-16, GoogLeNet, ResNets.

    The widely copied tutorial says that a linear softmax does very badly on CIFAR-10. One recipe for all: SGD at 0.02
    with a warm-up and clipped gradients, at which also VGG without batch norm trains.

    Measured with --budget 40m on one busy core of an AMD EPYC (JPEG copy of CIFAR-10, 5,000 images, 142 iterations of
    64, half the channels of the ResNets, n = 1), test error: linear 65.3 %, VGG-16 81.0, GoogLeNet 71.7, ResNet-20
    79.0, ResNet-56 79.3, ResNet-18 69.6 %: nothing has learned yet but the linear model, which has little to learn.
    `resnetlab train --recipe default epochs=10` on all images: linear 36.89 % right, ResNet-20 85.37 %.
    """
    return Experiment(
        name="compare",
        title="Comparison: linear softmax, VGG, GoogLeNet and ResNets, trained alike",
        claim="A linear softmax does very badly; convolutional networks do far better, and residual networks do best "
        "for what they cost.",
        place="the tutorial's comparison; He et al. 2015, tables 4 and 6 for the families",
        caution=SHORT + " One recipe suits none of them best.",
        arms=(
            Arm(name="linear softmax", model="linear", narrows=False),
            Arm(name="VGG-16", model="vgg16", narrows=False),
            Arm(name="GoogLeNet", model="googlenet", narrows=False),
            _cifar("ResNet-20", "resnet20", paper=8.75),
            _cifar("ResNet-56", "resnet56", paper=6.97),
            _cifar("ResNet-18", "resnet18"),
        ),
        judge=judges.compare,
        settings=(
            "optim.lr=0.02", "optim.clip=1", "optim.schedule=cosine", "optim.warmup_epochs=1",
            "optim.warmup_factor=0", "optim.warmup_shape=linear",
        ),
        least=400,
        needs=32,
    )  # fmt: skip


def blocks() -> Experiment:
    """Ideas that came after the paper, each on a ResNet-20 of its own: what does each buy?

    Sources at the arms. Grouped convolutions need bottlenecks, so the ResNeXt is one of 29 layers, as narrow as brings
    it near ResNet-20 (57 against 41 M multiply-adds, 0.36 against 0.27 M parameters). ResNet-D's average-pooled
    shortcut stands for its downsampling (its stem is for large images); stochastic depth leaves out 10 % at most, as a
    network of nine blocks has few to spare (the source: 50 % of 54).

    Measured with --budget 28m on one core of an AMD EPYC (JPEG copy of CIFAR-10, 5,000 images at 16 px, half the
    channels, 1,136 iterations of 64, n = 2 seeds), test error: ResNet-20 53.9 ± 0.9 %, pre-activation 53.4 ± 0.2,
    twice as wide 52.1 ± 1.2, squeeze-and-excitation 54.6 ± 1.3, ResNet-D 49.9 ± 0.4, ResNeXt 52.2 ± 0.1, stochastic
    depth 56.5 ± 0.2, blur-pool 53.7 ± 1.6, GELU 54.8 ± 0.7, SiLU 55.9 ± 0.1 %. Too short to judge any of them.
    """
    base = "ResNet-20"
    return Experiment(
        name="blocks",
        title="Blocks: what came after, one idea at a time",
        claim="Each of these changes was published as an improvement over the residual block of 2015.",
        place="after the paper; each source is named beside its network",
        caution=SHORT + " Most of these ideas were made for networks that are deeper, wider or trained far longer, and "
        "their gains there are of the order of one point.",
        arms=(
            _cifar(base, "resnet20", paper=8.75, source="He et al. 2015, 1512.03385"),
            _cifar("pre-activation", "resnet20", "model.preact=true", source="He et al. 2016, 1603.05027"),
            _cifar("twice as wide", "resnet20", "model.width=2", source="Zagoruyko and Komodakis 2016, 1605.07146"),
            _cifar("squeeze-and-excitation", "resnet20", "model.se=4", source="Hu et al. 2017, 1709.01507"),
            _cifar(
                "ResNet-D shortcuts", "resnet20", "model.shortcut=B", "model.shortcut_pool=true",
                source="He et al. 2018, 1812.01187",
            ),
            _cifar(
                "ResNeXt-29, 8 groups of 4", "resnext29_8x64d", "model.width=0.25", "model.base_width=16",
                source="Xie et al. 2016, 1611.05431",
            ),
            _cifar("stochastic depth", "resnet20", "model.drop_path=0.1", source="Huang et al. 2016, 1603.09382"),
            _cifar("blur-pool", "resnet20", "model.blur=true", source="Zhang 2019, 1904.11486"),
            _cifar("GELU", "resnet20", "model.activation=gelu", source="Hendrycks and Gimpel 2016, 1606.08415"),
            _cifar("SiLU", "resnet20", "model.activation=silu", source="Ramachandran et al. 2017, 1710.05941"),
        ),
        judge=judges.blocks(base),
    )  # fmt: skip


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "degradation": degradation,
    "depth": depth,
    "shortcuts": shortcuts,
    "responses": responses,
    "complexity": complexity,
    "compare": compare,
    "blocks": blocks,
}


def experiment(name: str) -> Experiment:
    """Return the experiment called ``name``.

    Raises:
        UsageError: There is none; the nearest is named.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]()


def about() -> list[tuple[str, str]]:
    """Return each experiment with the first line of its docstring."""
    return [(name, (make.__doc__ or "").partition("\n")[0]) for name, make in EXPERIMENTS.items()]
