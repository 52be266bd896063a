"""Networks to compare with: a linear softmax, VGG-16 and VGG-19, GoogLeNet.

VGG and GoogLeNet are torchvision's, under torchvision's names, and take its weights (GoogLeNet without its auxiliary
heads, and to be read with ``data.normalize=half``: torchvision turns ImageNet's normalisation into that). torchvision
is imported only when one of them is built: that takes 2.5 s (measured on 2 cores of a Xeon).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from resnetlab.config import ModelConfig
from resnetlab.errors import UsageError
from resnetlab.models.architecture import Architecture, Network


class Linear(Network):
    """Softmax regression on pixels: one linear layer. The features are the image itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.image_size is None:
            raise UsageError('The model "linear" needs image_size: it has a weight for every pixel.')
        self.fc = nn.Linear(config.in_channels * config.image_size**2, config.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the images (B, in_channels, image_size, image_size) as they are."""
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """Map images (B, in_channels, image_size, image_size) to logits (B, num_classes)."""
        logits: Tensor = self.fc(features.flatten(1))
        return logits


class Chain(Network):
    """The children of one of torchvision's networks in their order, the pooling named ``avgpool`` in between.

    Args:
        config: The resolved configuration.
        network: Where the children come from; its first convolution has 3 input channels.
        init: Draws the first convolution's weights anew where the images have other than 3 channels.
    """

    def __init__(self, config: ModelConfig, network: nn.Module, init: Callable[[Tensor], object]) -> None:
        super().__init__(config)
        for name, child in network.named_children():
            self.add_module(name, child)
        first = next(module for module in self.modules() if isinstance(module, nn.Conv2d))
        if config.in_channels != first.in_channels:
            first.in_channels = config.in_channels
            first.weight = nn.Parameter(torch.empty(first.out_channels, config.in_channels, *first.kernel_size))
            init(first.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to the last feature maps (B, C, H', W')."""
        for child in self._before_and_after_pool()[0]:
            x = child(x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the last feature maps (B, C, H', W') to logits (B, num_classes)."""
        x: Tensor = self.get_submodule("avgpool")(features).flatten(1)
        for child in self._before_and_after_pool()[1]:
            x = child(x)
        return x

    def _before_and_after_pool(self) -> tuple[list[nn.Module], list[nn.Module]]:
        children = dict(self.named_children())
        pool = list(children).index("avgpool")
        modules = list(children.values())
        return modules[:pool], modules[pool + 1 :]


def _vgg(config: ModelConfig) -> Network:
    """Build VGG-16 or VGG-19 (Simonyan and Zisserman 2014, configurations D and E, without batch norm)."""
    from torchvision.models import vgg16, vgg19

    constructor = {"vgg16": vgg16, "vgg19": vgg19}[config.name]
    init = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    return Chain(config, constructor(weights=None, num_classes=config.num_classes), init)


def _googlenet(config: ModelConfig) -> Network:
    """Build GoogLeNet (Szegedy et al. 2014) with torchvision's batch norm, without the auxiliary heads."""
    from torchvision.models import googlenet

    network = googlenet(weights=None, num_classes=config.num_classes, aux_logits=False, init_weights=True)
    return Chain(config, network, partial(nn.init.trunc_normal_, std=0.01))


def _row(make: Callable[[ModelConfig], Network], num_classes: int = 1000, image_size: int = 224) -> Architecture:
    return Architecture(
        make=make,
        family="reference",
        num_classes=num_classes,
        image_size=image_size,
        defaults={"stem": "imagenet", "shortcut": "none"},
        adjustable=False,
    )


REFERENCE: dict[str, Architecture] = {
    "linear": _row(Linear, num_classes=10, image_size=32),
    "vgg16": _row(_vgg),
    "vgg19": _row(_vgg),
    "googlenet": _row(_googlenet),
}
"""The rows of this family."""
