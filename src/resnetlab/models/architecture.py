"""What a row of the table is: how its network is made, what it was made for, and the settings it comes with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from resnetlab.config import ModelConfig
from resnetlab.errors import UsageError

SMALL_IMAGE = 64
"""Up to this height and width, in pixels, an ``auto`` stem is the small one."""


class Network(nn.Module):
    """Features, then a head. What it was built from stays with it, as ``config``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to the last feature maps (B, C, H', W')."""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the last feature maps (B, C, H', W') to logits (B, num_classes)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A row of the table."""

    make: Callable[[ModelConfig], Network]
    """Builds the network from a resolved configuration."""
    family: Literal["imagenet", "cifar", "reference"]
    num_classes: int
    """Classes of the data set that the network was designed for."""
    image_size: int
    """Height and width, in pixels, of that data set's images."""
    block: Literal["basic", "bottleneck", ""] = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that this row sets unless the user does."""
    adjustable: bool = True
    """Whether the stem, the shortcuts and so on can be chosen; the reference networks are what they are."""

    def resolve(self, config: ModelConfig) -> ModelConfig:
        """Settle what the user left open: the user's own settings, then the row's, then `ModelConfig`'s.

        Raises:
            UsageError: The settings do not fit the architecture.
        """
        given = {key: getattr(config, key) for key in config.model_fields_set}
        chosen = {key: value for key, value in given.items() if value != "auto"}
        auto_stem = "small" if config.image_size and config.image_size <= SMALL_IMAGE else "imagenet"
        own = {"stem": auto_stem, **self.defaults}
        resolved = ModelConfig(**{**own, **chosen})
        self._check(resolved, ModelConfig(**{**own, "name": config.name}))
        return resolved

    def _check(self, config: ModelConfig, own: ModelConfig) -> None:
        """Refuse settings that the architecture cannot have; ``own`` is the configuration without any setting."""
        if not self.adjustable:
            for key in ("stem", "stem_relu", "shortcut", "stride_on", "zero_init", "init"):
                if getattr(config, key) != getattr(own, key):
                    raise UsageError(f'"{config.name}" has no setting {key}; it is a setting of residual networks.')
        if own.shortcut == "none" != config.shortcut:
            raise UsageError(
                f'"{config.name}" is a plain network: it has no shortcuts. For shortcut={config.shortcut} use '
                f'"{config.name.replace("plain", "resnet")}".'
            )
        if config.shortcut == "none" and config.zero_init:
            raise UsageError("zero_init starts each block as its shortcut; a plain network has none and would be dead.")
