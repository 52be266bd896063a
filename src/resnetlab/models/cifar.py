"""Networks for CIFAR-10: three stages of n blocks, 16, 32 and 64 channels wide (paper, section 4.2), and what followed.

The 6n+2 family has basic blocks and option A shortcuts. Those that followed are pre-activated (arXiv:1603.05027), wide
(arXiv:1605.07146), or have grouped convolutions (arXiv:1611.05431). The stem is the small one at every image size.
Variants are the rows at the end.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from resnetlab.models.architecture import Architecture
from resnetlab.models.resnet import BasicBlock, Bottleneck, ResNet

Kind = type[BasicBlock] | type[Bottleneck]


def _row(n: int, block: Kind = BasicBlock, widths: Sequence[int] = (16, 32, 64), **defaults: Any) -> Architecture:
    return Architecture(
        make=partial(ResNet, block=block, depths=(n, n, n), widths=widths),
        family="cifar",
        num_classes=10,
        image_size=32,
        block=block.name,
        defaults={"stem": "small", "shortcut": "A", **defaults},
    )


def _wide(n: int, width: int) -> Architecture:
    return _row(n, preact=True, shortcut="B", width=width)


def _resnext(groups: int) -> Architecture:
    return _row(3, Bottleneck, (64, 128, 256), shortcut="B", groups=groups)


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
    "preresnet20": _row(3, preact=True),
    "preresnet56": _row(9, preact=True),
    "preresnet110": _row(18, preact=True),
    "preresnet164": _row(18, Bottleneck, preact=True, shortcut="B"),
    "preresnet1001": _row(111, Bottleneck, preact=True, shortcut="B"),
    "wrn-16-8": _wide(2, 8),
    "wrn-28-10": _wide(4, 10),
    "wrn-40-4": _wide(6, 4),
    "resnext29_8x64d": _resnext(8),
    "resnext29_16x64d": _resnext(16),
}
"""The rows of this family. At the start of training the gradient of conv1 in the plain ones grows with depth, by about
1.18 a layer (one seed, fp64, norms: plain20 5, plain56 3e3, plain110 4e7, plain1202 3e86, which is infinite in fp32;
resnet110 29): the paper's case for shortcuts."""
