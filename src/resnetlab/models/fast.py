"""Residual networks built for the shortest way to an accurate CIFAR-10 classifier, for images of up to 64 px.

What they are made of, and where it comes from: a stem of fixed patch-whitening filters (Page 2019, "How to train your
ResNet"); few, wide stages that pool before they normalise, GELU, filters that start as the identity, batch norm without
a scale, and logits of a small scale (Jordan 2024, arXiv:2404.00498). The shortcut over the later convolutions of a
stage is ours to this form. Variants are the rows at the end of this file.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.config import ModelConfig
from resnetlab.models.architecture import Architecture, Network
from resnetlab.norms import norm_act
from resnetlab.winograd import conv_max_pool

PATCH = 2
"""Height and width of the stem's filters, in pixels."""
LEAST_VARIANCE = 5e-4
"""Added to the variance of a patch's components, so that noise is not blown up (arXiv:2404.00498)."""
NORM_MOMENTUM = 0.4
"""Share of the newest batch in batch norm's running statistics: a run may have only some hundred steps."""


class Stage(nn.Module):
    """A 3×3 convolution, max-pool to half the size, then ``depth`` - 1 more convolutions with a shortcut over them.

    (B, in_channels, H, W) → (B, width, H // 2, W // 2).
    """

    def __init__(self, in_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, width), _norm(width)
        self.act = nn.GELU()
        self.branch = nn.Sequential()
        for index in range(depth - 1):
            if index:
                self.branch.append(nn.GELU())
            self.branch.extend([_conv(width, width), _norm(width)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output."""
        x = out = norm_act(self.bn1, self.act, conv_max_pool(self.conv1, x))
        for index in range(0, len(self.branch), 3):  # convolution, norm, and an activation behind all but the last
            last = index + 2 == len(self.branch)
            act = self.act if last else self.branch[index + 2]
            out = norm_act(self.branch[index + 1], act, self.branch[index](out), shortcut=x if last else None)
        return out


class FastResNet(Network):
    """Whitening stem, three stages, global max-pooling, one linear layer without a bias."""

    stem_sample = 2_000

    def __init__(self, config: ModelConfig, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__(config)
        values = config.in_channels * PATCH**2
        self.stem = nn.Conv2d(config.in_channels, 2 * values, PATCH, bias=False)
        self.stem.weight.requires_grad_(False)  # `fit_stem` sets it
        self.act = nn.GELU()
        self.stage_channels: dict[str, int] = {}
        """Channels of each stage's output, by the stage's name, in order."""
        channels = 2 * values
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            self.add_module(f"layer{number}", Stage(channels, width, depth))
            self.stage_channels[f"layer{number}"] = channels = width
        self.fc = nn.Linear(channels, config.num_classes, bias=False)
        nn.init.normal_(self.fc.weight, std=1 / channels)

    @torch.no_grad()
    def fit_stem(self, images: Tensor) -> None:
        """Set the stem to filters that whiten the patches of ``images`` (B, in_channels, H, W), and to their negatives.

        The covariance is taken about zero, as normalised images are.
        """
        patches = F.unfold(images.double(), PATCH).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + LEAST_VARIANCE).sqrt()).T.reshape(-1, *self.stem.weight.shape[1:])
        self.stem.weight.copy_(torch.cat([filters, -filters]))

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of every stage, (B, C, H', W'), by name; the channels are in ``stage_channels``."""
        x = self.act(self.stem(F.pad(x, (0, 1, 0, 1))))  # as large as the images
        outputs = {}
        for name in self.stage_channels:
            x = outputs[name] = self.get_submodule(name)(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to the last stage's output (B, C, H', W')."""
        return list(self.stages(x).values())[-1]

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the last stage's output (B, C, H', W') to logits (B, num_classes)."""
        logits: Tensor = self.fc(features.flatten(2).max(2).values)
        return logits


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3×3 convolution whose first filters hand its input on (`torch.nn.init.dirac_`)."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[: min(in_channels, out_channels)])
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with a bias and a scale that stays 1: what follows it needs none."""
    norm = nn.BatchNorm2d(channels, momentum=NORM_MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm


def _row(widths: Sequence[int], depths: Sequence[int]) -> Architecture:
    return Architecture(
        make=partial(FastResNet, widths=widths, depths=depths),
        family="fast",
        num_classes=10,
        image_size=32,
        defaults={"stem": "small", "shortcut": "A"},  # every shortcut is the identity
        adjustable=False,
    )


FAST: dict[str, Architecture] = {
    "fast-small": _row((32, 96, 96), depths=(2, 2, 2)),
    "fast-medium": _row((64, 192, 192), depths=(2, 2, 2)),
    "fast-deep": _row((64, 192, 192), depths=(3, 3, 3)),
    "fast-large": _row((96, 256, 384), depths=(3, 3, 3)),
}
"""The rows of this family. Images must be of 16 px or more: each stage halves them."""
