"""Residual networks and their plain twins (He, Zhang, Ren and Sun 2015, arXiv:1512.03385), for ImageNet (section 4.1).

A network is a stem, stages of equal blocks, and a head. Modules carry torchvision's names, so that its published
weights load unchanged. Variants are the rows at the end of this file; the 6n+2 family is in `cifar`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.config import ModelConfig
from resnetlab.models.architecture import Architecture, Network


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: relu(F(x) + x) (figure 5, left).

    (B, in_channels, H, W) → (B, width, H / stride, W / stride).
    """

    expansion = 1
    name: Literal["basic"] = "basic"

    def __init__(self, in_channels: int, width: int, stride: int, config: ModelConfig) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(config.shortcut, in_channels, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm whose output is added to the shortcut."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            y += self.downsample(x)
        out: Tensor = self.relu(y)
        return out


class Bottleneck(nn.Module):
    """A 1×1 convolution that narrows, a 3×3, a 1×1 that widens, and a shortcut (figure 5, right).

    (B, in_channels, H, W) → (B, 4 · width, H / stride, W / stride).
    """

    expansion = 4
    name: Literal["bottleneck"] = "bottleneck"

    def __init__(self, in_channels: int, width: int, stride: int, config: ModelConfig) -> None:
        super().__init__()
        out_channels = width * self.expansion
        first, second = (stride, 1) if config.stride_on == "1x1" else (1, stride)
        self.conv1 = _conv(in_channels, width, 1, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, second)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(config.shortcut, in_channels, out_channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm whose output is added to the shortcut."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            y += self.downsample(x)
        out: Tensor = self.relu(y)
        return out


class PaddedIdentity(nn.Module):
    """Shortcut option A (section 3.3): every ``stride``-th pixel, and new channels that are zero. No parameters.

    Half of the zeros come before the channels and half after, as in the CIFAR weights that are in circulation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def shortcut(option: str, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """Return what a block adds to its output (section 4.1, options A, B and C), or None in a plain network."""
    if option == "none":
        return None
    same_shape = stride == 1 and in_channels == out_channels
    if same_shape and option != "C":
        return nn.Identity()
    if option == "A":
        return PaddedIdentity(in_channels, out_channels, stride)
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class ResNet(Network):
    """A stem, stages of blocks, global average pooling and one linear layer (table 1).

    Each stage after the first halves the height and width. With the ImageNet stem the stages' strides are 4, 8, 16
    and 32 pixels, with the small one 1, 2, 4 (and 8). All of it lies in children that run in their order, so that
    torchvision's detection and segmentation models take the network as a backbone.
    """

    def __init__(
        self,
        config: ModelConfig,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
    ) -> None:
        super().__init__(config)
        imagenet, channels = config.stem == "imagenet", widths[0]
        self.conv1 = _conv(config.in_channels, channels, 7, 2) if imagenet else _conv(config.in_channels, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True) if config.stem_relu else nn.Identity()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()

        self.stage_channels: dict[str, int] = {}
        """Channels of each stage's output, by the stage's name, in order."""
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stage = nn.Sequential()
            for index in range(depth):
                stride = 2 if index == 0 and number > 1 else 1
                stage.append(block(channels, width, stride, config))
                channels = width * block.expansion
            self.add_module(f"layer{number}", stage)
            self.stage_channels[f"layer{number}"] = channels

        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, config.num_classes)
        _initialise(self, config)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of every stage, (B, C, H', W'), by name; the channels are in ``stage_channels``."""
        x = self._stem(x)
        outputs = {}
        for name in self.stage_channels:
            x = outputs[name] = self.get_submodule(name)(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to the last stage's output (B, C, H', W')."""
        x = self._stem(x)
        for name in self.stage_channels:
            x = self.get_submodule(name)(x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the last stage's output (B, C, H', W') to logits (B, num_classes)."""
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits

    def _stem(self, x: Tensor) -> Tensor:
        out: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return out


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without a bias (a batch norm follows) that keeps H and W at stride 1."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


def _initialise(network: nn.Module, config: ModelConfig) -> None:
    """Draw the initial weights; what is not drawn here stays as PyTorch made it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and config.init == "he":
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, BasicBlock | Bottleneck) and config.zero_init:
            nn.init.zeros_(module.last_norm.weight)


def _row(block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], **defaults: Any) -> Architecture:
    return Architecture(
        make=partial(ResNet, block=block, depths=depths, widths=(64, 128, 256, 512)),
        family="imagenet",
        num_classes=1000,
        image_size=224,
        block=block.name,
        defaults={"shortcut": "B", **defaults},
    )


IMAGENET: dict[str, Architecture] = {
    "resnet18": _row(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _row(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _row(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _row(Bottleneck, (3, 4, 23, 3)),
    "resnet152": _row(Bottleneck, (3, 8, 36, 3)),
    "plain18": _row(BasicBlock, (2, 2, 2, 2), shortcut="none"),
    "plain34": _row(BasicBlock, (3, 4, 6, 3), shortcut="none"),
    "plain50": _row(Bottleneck, (3, 4, 6, 3), shortcut="none"),
    "plain101": _row(Bottleneck, (3, 4, 23, 3), shortcut="none"),
    "plain152": _row(Bottleneck, (3, 8, 36, 3), shortcut="none"),
    "resnet50-tutorial": _row(Bottleneck, (3, 4, 6, 3), stem="imagenet", stem_relu=False, init="torch"),
}
"""The rows of this family. ``resnet50-tutorial`` is the widely copied tutorial's: its stem has no ReLU, its weights
start as PyTorch's defaults, and it keeps the ImageNet stem at every image size."""
