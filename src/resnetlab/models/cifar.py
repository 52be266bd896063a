"""The 6n+2 family for CIFAR-10 (paper, section 4.2): three stages of n basic blocks, 16, 32 and 64 channels wide.

The stem is the small one at every image size, and the shortcuts are option A. Variants are the rows at the end.
"""

from functools import partial
from typing import Any

from resnetlab.models.architecture import Architecture
from resnetlab.models.resnet import BasicBlock, ResNet


def _row(n: int, **defaults: Any) -> Architecture:
    return Architecture(
        make=partial(ResNet, block=BasicBlock, depths=(n, n, n), widths=(16, 32, 64)),
        family="cifar",
        num_classes=10,
        image_size=32,
        block="basic",
        defaults={"stem": "small", "shortcut": "A", **defaults},
    )


CIFAR: dict[str, Architecture] = {
    "resnet20": _row(3),
    "resnet32": _row(5),
    "resnet44": _row(7),
    "resnet56": _row(9),
    "resnet110": _row(18),
    "resnet1202": _row(200),
    "plain20": _row(3, shortcut="none"),
    "plain32": _row(5, shortcut="none"),
    "plain44": _row(7, shortcut="none"),
    "plain56": _row(9, shortcut="none"),
    "plain110": _row(18, shortcut="none"),
    "plain1202": _row(200, shortcut="none"),
}
"""The rows of this family. At the start of training the gradient of conv1 in the plain ones grows with depth, by about
1.18 a layer (one seed, fp64, norms: plain20 5, plain56 3e3, plain110 4e7, plain1202 3e86, which is infinite in fp32;
resnet110 29): the paper's case for shortcuts."""
