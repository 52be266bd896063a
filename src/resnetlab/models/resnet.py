"""Residual networks and their plain twins (He, Zhang, Ren and Sun 2015, arXiv:1512.03385), for ImageNet (section 4.1).

A network is a stem, stages of equal blocks, and a head. Modules carry torchvision's names, so that its published
weights load unchanged. Variants are the rows at the end of this file; the 6n+2 family is in `cifar`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from resnetlab.config import ModelConfig
from resnetlab.models.architecture import Architecture, Network
from resnetlab.models.layers import (
    BlurPool,
    DropPath,
    SqueezeExcitation,
    activation,
    conv,
    norm,
    shortcut,
    stem_conv,
    stem_pool,
)
from resnetlab.norms import norm_act


class Block(nn.Module):
    """What both kinds of block share: how their convolutions, batch norms, activations and shortcut are joined.

    After each convolution come batch norm and activation, the last activation after the sum: relu(F(x) + x). With
    ``preact`` they come before each convolution, and nothing after the sum: x + F(x) (arXiv:1603.05027, figure 1b).
    """

    expansion: int
    """Output channels, as a multiple of ``width``."""
    downsample: nn.Module | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.preact = config.preact
        self.norm_after_sum = config.norm_place == "sum"

    def _finish(
        self, config: ModelConfig, in_channels: int, inner: int, out_channels: int, stride: int, drop_path: float
    ) -> None:
        """Add what comes after the convolutions; ``inner`` is the number of channels that the last one reads."""
        self.relu = activation(config)
        self.downsample = shortcut(config, in_channels, out_channels, stride)
        self.blur = BlurPool(inner) if config.blur and stride > 1 else nn.Identity()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.se = SqueezeExcitation(out_channels, config.se) if config.se else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm_before_sum = not (self.norm_after_sum or config.se or drop_path)  # with nothing between them

    def layers(self) -> tuple[list[nn.Conv2d], list[nn.Module]]:
        """Return the block's convolutions and batch norms in their order, as many of one as of the other."""
        raise NotImplementedError

    def start_as_identity(self) -> None:
        """Make the branch zero."""
        convs, norms = self.layers()
        last = convs[-1] if self.preact else norms[-1]
        nn.init.zeros_(last.get_parameter("weight"))
        if last.bias is not None:
            nn.init.zeros_(last.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, expansion · width, H / stride, W / stride)."""
        convs, norms = self.layers()
        if self.preact:
            return self._preactivated(x, convs, norms)
        y = self._branch(x, convs, norms[:-1])
        added = None if self.downsample is None else self.downsample(x)
        if self.norm_before_sum:
            return norm_act(norms[-1], self.relu, y, added)
        y = self.drop_path(self.se(y if self.norm_after_sum else norms[-1](y)))
        if added is not None:
            y += added
        return norm_act(norms[-1] if self.norm_after_sum else nn.Identity(), self.relu, y)

    def _preactivated(self, x: Tensor, convs: list[nn.Conv2d], norms: list[nn.Module]) -> Tensor:
        """Return the sum for a pre-activated block; a shortcut that changes the shape reads what the branch reads."""
        active = x if isinstance(norms[0], nn.Identity) else norm_act(norms[0], self.relu, x)
        y = self.drop_path(self.se(self._branch(active, convs, norms[1:])))
        if self.downsample is not None:
            y += self.downsample(x if isinstance(self.downsample, nn.Identity) else active)
        out: Tensor = y
        return out

    def _branch(self, x: Tensor, convs: list[nn.Conv2d], between: list[nn.Module]) -> Tensor:
        """Run the convolutions, with batch norm and activation between them."""
        for convolution, norm_ in zip(convs[:-1], between, strict=True):
            x = norm_act(norm_, self.relu, convolution(x))
        out: Tensor = convs[-1](self.dropout(self.blur(x)))
        return out


class BasicBlock(Block):
    """Two 3×3 convolutions and a shortcut (figure 5, left).

    Args:
        in_channels: Channels of the input.
        width: Channels of both convolutions.
        stride: 2: the block halves H and W.
        config: The resolved configuration.
        drop_path: Probability of leaving out the branch in training.
        active: With ``preact``: the input is an activation, and the block does not begin with one.
    """

    expansion = 1
    name: Literal["basic"] = "basic"

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        config: ModelConfig,
        drop_path: float = 0.0,
        active: bool = False,
    ) -> None:
        super().__init__(config)
        self.conv1 = conv(config, in_channels, width, 3, 1 if config.blur else stride)
        self.bn1 = first_norm(config, in_channels, width, active)
        self.conv2 = conv(config, width, width, 3)
        self.bn2 = norm(config, width)
        self._finish(config, in_channels, width, width, stride, drop_path)

    def layers(self) -> tuple[list[nn.Conv2d], list[nn.Module]]:
        """Return the convolutions and batch norms."""
        return [self.conv1, self.conv2], [self.bn1, self.bn2]


class Bottleneck(Block):
    """A 1×1 convolution that narrows, a 3×3, a 1×1 that widens, and a shortcut (figure 5, right).

    Args:
        in_channels: Channels of the input.
        width: A quarter of the output's channels; the 3×3's, unless ``groups`` and ``base_width`` say otherwise.
        stride, config, drop_path, active: As in `BasicBlock`.
    """

    expansion = 4
    name: Literal["bottleneck"] = "bottleneck"

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        config: ModelConfig,
        drop_path: float = 0.0,
        active: bool = False,
    ) -> None:
        super().__init__(config)
        out_channels = width * self.expansion
        inner = max(1, int(width * config.base_width / 64)) * config.groups
        first, second = (stride, 1) if config.stride_on == "1x1" else (1, stride)
        self.conv1 = conv(config, in_channels, inner, 1, first)
        self.bn1 = first_norm(config, in_channels, inner, active)
        self.conv2 = conv(config, inner, inner, 3, 1 if config.blur else second, config.groups)
        self.bn2 = norm(config, inner)
        self.conv3 = conv(config, inner, out_channels, 1)
        self.bn3 = norm(config, inner if config.preact else out_channels)
        self._finish(config, in_channels, inner, out_channels, stride, drop_path)

    def layers(self) -> tuple[list[nn.Conv2d], list[nn.Module]]:
        """Return the convolutions and batch norms."""
        return [self.conv1, self.conv2, self.conv3], [self.bn1, self.bn2, self.bn3]


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
        stem_width = widths[0]
        widths = [max(1, round(width * config.width)) for width in widths]
        channels = min(stem_width, widths[0])  # a wide network's stem is not widened (arXiv:1605.07146, table 1)
        self.conv1 = stem_conv(config, channels)
        self.bn1 = norm(config, channels) if config.stem_norm else nn.Identity()
        self.relu = activation(config) if config.stem_norm and config.stem_relu else nn.Identity()
        self.maxpool = stem_pool(config, channels)

        self.stage_channels: dict[str, int] = {}
        """Channels of each stage's output, by the stage's name, in order."""
        drops = [config.drop_path * number / sum(depths) for number in range(1, sum(depths) + 1)]
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            for index, stride in enumerate(self._strides(number, depth, len(depths))):
                active = config.stem_norm and number == index == 0
                stage.append(block(channels, width, stride, config, drops.pop(0), active))
                channels = width * block.expansion
            self.add_module(f"layer{number + 1}", stage)
            self.stage_channels[f"layer{number + 1}"] = channels

        self.norm = nn.Sequential(norm(config, channels), activation(config)) if config.preact else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, config.num_classes)
        _initialise(self, config)

    def _strides(self, stage: int, depth: int, stages: int) -> list[int]:
        """Return the strides of a stage's blocks: one of them halves the image between each two stages."""
        if self.config.stride_unit == "last":
            return [1] * (depth - 1) + [2 if stage < stages - 1 else 1]
        return [2 if stage > 0 else 1] + [1] * (depth - 1)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of every stage, (B, C, H', W'), by name; the channels are in ``stage_channels``."""
        x = self._stem(x)
        outputs = {}
        for name in self.stage_channels:
            x = outputs[name] = self.get_submodule(name)(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to the last stage's output (B, C, H', W'), normed where blocks are not."""
        x = self._stem(x)
        for name in self.stage_channels:
            x = self.get_submodule(name)(x)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the last stage's output (B, C, H', W') to logits (B, num_classes)."""
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits

    def _stem(self, x: Tensor) -> Tensor:
        out: Tensor = self.maxpool(norm_act(self.bn1, self.relu, self.conv1(x)))
        return out


def first_norm(config: ModelConfig, in_channels: int, channels: int, active: bool) -> nn.Module:
    """Return a block's first batch norm: of its first convolution's output or, with ``preact``, of the block's input.

    An ``active`` pre-activated block has none.
    """
    if config.preact:
        return nn.Identity() if active else norm(config, in_channels)
    return norm(config, channels)


def _initialise(network: nn.Module, config: ModelConfig) -> None:
    """Draw the initial weights; what is not drawn here stays as PyTorch made it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and config.init == "he":
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and config.init == "he-in":
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if isinstance(module, nn.Conv2d) and module.bias is not None and config.init != "torch":
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, Block) and config.zero_init:
            module.start_as_identity()


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
    "wide_resnet50_2": _row(Bottleneck, (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": _row(Bottleneck, (3, 4, 23, 3), base_width=128),
    "resnext50_32x4d": _row(Bottleneck, (3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x8d": _row(Bottleneck, (3, 4, 23, 3), groups=32, base_width=8),
    "resnext101_64x4d": _row(Bottleneck, (3, 4, 23, 3), groups=64, base_width=4),
    "resnet50-tutorial": _row(Bottleneck, (3, 4, 6, 3), stem="imagenet", stem_relu=False, init="torch"),
}
"""The rows of this family. ``resnet50-tutorial`` is the widely copied tutorial's: its stem has no ReLU, its weights
start as PyTorch's defaults, and it keeps the ImageNet stem at every image size."""
