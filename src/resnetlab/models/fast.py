"""Residual networks built for the shortest way to an accurate CIFAR-10 classifier, for images of up to 64 px.

What they are made of, and where it comes from: a stem of fixed patch-whitening filters (Page 2019, "How to train your
ResNet"); few, wide stages that pool before they normalise, GELU, filters that start as the identity, batch norm without
a scale, and logits of a small scale (Jordan 2024, arXiv:2404.00498). The shortcut over the later convolutions of a
stage, and the channels in two orientations (Cohen and Welling 2016, arXiv:1602.07576), are ours to this form. Variants
are the rows at the end of this file.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.config import ModelConfig
from resnetlab.models.architecture import Architecture, Network
from resnetlab.norms import norm_act
from resnetlab.winograd import WinogradConv2d, conv_max_pool

PATCH = 2
"""Height and width of the stem's filters, in pixels."""
PATCHES = 2**21
"""So many of them, about, are taken at once: those of 2,000 thumbnails; of 2,000 photographs all would be 19 GB."""
LEAST_VARIANCE = 5e-4
"""Added to the variance of a patch's components, so that noise is not blown up (arXiv:2404.00498)."""
NORM_MOMENTUM = 0.4
"""Share of the newest batch in batch norm's running statistics: a run may have only some hundred steps."""


class MirrorConv2d(WinogradConv2d):
    """A 3×3 convolution that commutes with mirroring the images, once a mirror image also swaps the halves of channels.

    (B, in_channels, H, W) → (B, out_channels, H, W). Its weight (out_channels // 2, in_channels, 3, 3) is the filters
    of the first half; those of the second are their mirror images, which read the halves the other way round (Cohen
    and Welling 2016, arXiv:1602.07576, for the group of the mirror image).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels // 2, 3, padding=1, bias=False)
        self.out_channels = out_channels

    def filters(self) -> Tensor:
        """Return the filters of both halves."""
        halves = self.weight.view(len(self.weight), 2, -1, *self.kernel_size)
        return torch.cat([self.weight, halves.flip(1, 4).reshape(self.weight.shape)])


class MirrorStem(nn.Conv2d):
    """The stem in two orientations: each patch, and beside it the one that ends where it begins, mirrored.

    (B, in_channels, H, W) → (B, 2 * out_channels, H, W).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the patches of both orientations."""
        weight = torch.cat([F.pad(self.weight, (1, 0)), F.pad(self.weight.flip(3), (0, 1))])
        return F.conv2d(F.pad(input, (1, 1, 0, 1)), weight)


class Stage(nn.Module):
    """A 3×3 convolution, max-pool to half the size, then ``depth`` - 1 more convolutions with a shortcut over them.

    (B, in_channels, H, W) → (B, width, H // 2, W // 2). With two orientations, half of the channels are for the images
    as they are, and half for their mirror images; a batch norm has one channel for both.
    """

    def __init__(self, in_channels: int, width: int, depth: int, orientations: int) -> None:
        super().__init__()
        self.orientations = orientations
        self.conv1, self.bn1 = _conv(in_channels, width, orientations), _norm(width // orientations)
        self.act = nn.GELU()
        self.branch = nn.Sequential()
        for index in range(depth - 1):
            if index:
                self.branch.append(nn.GELU())
            self.branch.extend([_conv(width, width, orientations), _norm(width // orientations)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output."""
        shortcut = out = self._norm_act(self.bn1, self.act, conv_max_pool(self.conv1, x))
        for index in range(0, len(self.branch), 3):  # convolution, norm, and an activation behind all but the last
            last = index + 2 == len(self.branch)
            act = self.act if last else self.branch[index + 2]
            convolved = self.branch[index](out)
            out = self._norm_act(self.branch[index + 1], act, convolved, shortcut if last else None)
        return out

    def _norm_act(self, norm: nn.Module, act: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Compute `norms.norm_act` with the orientations side by side, as if they were more pixels."""
        beside = None if shortcut is None else _side_by_side(shortcut, self.orientations)
        out = norm_act(norm, act, _side_by_side(x, self.orientations), beside)
        return _reshape(out, x.shape)


def _side_by_side(x: Tensor, orientations: int) -> Tensor:
    """(B, C, H, W) → (B, C // orientations, H, W * orientations): the parts of the channels beside one another."""
    _, channels, height, width = x.shape
    return _reshape(x, (-1, channels // orientations, height, width * orientations))


def _reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape as the pixels lie in the memory format channels last, where that copies nothing."""
    _, channels, height, width = shape
    return x.permute(0, 2, 3, 1).reshape(-1, height, width, channels).permute(0, 3, 1, 2)


class FastResNet(Network):
    """Whitening stem, three stages, global max-pooling, one linear layer without a bias.

    Args:
        config: Classes and channels.
        widths: Channels of each stage's output.
        depths: Convolutions of each stage.
        orientations: 1, or 2 for a network that answers the same of an image and of its mirror image, where every stage
            halves the width without a rest. It learns from both at once, and is for images whose class that keeps.
    """

    stem_sample = 2_000

    def __init__(
        self, config: ModelConfig, widths: Sequence[int], depths: Sequence[int], orientations: int = 1
    ) -> None:
        super().__init__(config)
        values = config.in_channels * PATCH**2
        self.orientations = orientations
        kind = nn.Conv2d if orientations == 1 else MirrorStem
        self.stem = kind(config.in_channels, 2 * values // orientations, PATCH, bias=False)
        self.stem.weight.requires_grad_(False)  # `fit_stem` sets it
        self.act = nn.GELU() if orientations == 1 else nn.Identity()  # of half as many filters all values are needed
        self.stage_channels: dict[str, int] = {}
        """Channels of each stage's output, by the stage's name, in order."""
        channels = 2 * values
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            self.add_module(f"layer{number}", Stage(channels, width, depth, orientations))
            self.stage_channels[f"layer{number}"] = channels = width
        self.fc = nn.Linear(channels // orientations, config.num_classes, bias=False)
        nn.init.normal_(self.fc.weight, std=1 / channels)

    @torch.no_grad()
    def fit_stem(self, images: Tensor) -> None:
        """Set the stem to filters that whiten the patches of ``images`` (B, in_channels, H, W), about zero.

        With one orientation their negatives follow, whose values the activation would lose else. Normalised images
        have a mean of zero.
        """
        side = self.stem.weight[0].numel()
        moments, count = torch.zeros(side, side, dtype=torch.float64, device=images.device), 0
        for part in torch.split(images, max(1, PATCHES // images[0, 0].numel())):
            patches = F.unfold(part.double(), PATCH).transpose(1, 2).flatten(0, 1)
            moments, count = moments + patches.T @ patches, count + len(patches)
        variances, directions = torch.linalg.eigh(moments / count)
        filters = (directions / (variances + LEAST_VARIANCE).sqrt()).T.reshape(-1, *self.stem.weight.shape[1:])
        self.stem.weight.copy_(torch.cat([filters, -filters])[: len(self.stem.weight)])

    def _patches(self, x: Tensor) -> Tensor:
        """Return the whitened patches of ``x``, as many as it has pixels, in every orientation."""
        patches: Tensor = self.stem(F.pad(x, (0, 1, 0, 1)) if self.orientations == 1 else x)
        return patches

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of every stage, (B, C, H', W'), by name; the channels are in ``stage_channels``."""
        x = self.act(self._patches(x))
        outputs = {}
        for name in self.stage_channels:
            x = outputs[name] = self.get_submodule(name)(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to the last stage's output (B, C, H', W')."""
        return list(self.stages(x).values())[-1]

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the last stage's output (B, C, H', W') to logits (B, num_classes)."""
        found, *mirrored = features.flatten(2).max(2).values.chunk(self.orientations, dim=1)
        logits: Tensor = self.fc(sum(mirrored, found))
        return logits


def _conv(in_channels: int, out_channels: int, orientations: int) -> nn.Conv2d:
    """Return a 3×3 convolution whose first filters hand its input on (`torch.nn.init.dirac_`)."""
    if orientations == 2:
        conv: nn.Conv2d = MirrorConv2d(in_channels, out_channels)
    else:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[: min(in_channels, out_channels) // orientations])
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with a bias and a scale that stays 1: what follows it needs none."""
    norm = nn.BatchNorm2d(channels, momentum=NORM_MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm


def _row(widths: Sequence[int], depths: Sequence[int], orientations: int = 1) -> Architecture:
    return Architecture(
        make=partial(FastResNet, widths=widths, depths=depths, orientations=orientations),
        family="fast",
        num_classes=10,
        image_size=32,
        defaults={"stem": "small", "shortcut": "A"},  # every shortcut is the identity
        mirrors_alike=orientations == 2,
        adjustable=False,
    )


FAST: dict[str, Architecture] = {
    "fast-small": _row((32, 96, 96), depths=(2, 2, 2)),
    "fast-medium": _row((64, 192, 192), depths=(2, 2, 2)),
    "fast-deep": _row((64, 192, 192), depths=(3, 3, 3)),
    "fast-large": _row((96, 256, 384), depths=(3, 3, 3)),
    "mirror-small": _row((32, 96, 96), depths=(2, 2, 2), orientations=2),
    "mirror-medium": _row((64, 192, 192), depths=(2, 2, 2), orientations=2),
}
"""The rows of this family. Images must be of 16 px or more: each stage halves them."""
