"""What a row of the table is: how its network is made, what it was made for, and the settings it comes with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from resnetlab.config import ModelConfig
from resnetlab.errors import UsageError

SMALL_IMAGE = 64
"""Up to this height and width, in pixels, an ``auto`` stem is the small one."""
EVERY_NETWORKS = {"name", "num_classes", "in_channels", "image_size"}
"""Fields of `ModelConfig` that every network has; the others are settings of residual networks."""


def _both(**settings: Any) -> Callable[[ModelConfig], bool]:
    """Return whether a configuration has all of these settings."""
    return lambda config: all(getattr(config, key) == value for key, value in settings.items())


CONFLICTS: tuple[tuple[Callable[[ModelConfig], bool], str], ...] = (
    (
        lambda c: c.shortcut == "none" and c.zero_init,
        "zero_init starts each block as its shortcut; a plain network has none and would be dead.",
    ),
    (
        lambda c: c.shortcut == "none" and c.drop_path > 0,
        "drop_path leaves only a block's shortcut; a plain network has none, so nothing would be left.",
    ),
    (
        _both(zero_init=True, norm_place="sum"),
        "zero_init makes a block's last batch norm zero; after the sum (norm_place=sum) nothing would be left.",
    ),
    (
        _both(preact=True, norm_place="sum"),
        "norm_place=sum is for blocks that are not pre-activated: leave preact out.",
    ),
    (
        _both(preact=False, stem_norm=False),
        "stem_norm=false is for pre-activated blocks, which begin with a batch norm.",
    ),
    (_both(blur=True, stride_on="1x1"), "blur halves before a block's last convolution: leave stride_on out."),
    (_both(blur=True, shortcut_pool=True), "blur halves the shortcut, too: leave shortcut_pool out."),
    (_both(blur=True, stem_pool="ceil"), "blur comes after a padded max-pool: leave stem_pool out."),
)
"""Settings that contradict each other, and what a user is told."""


class Network(nn.Module):
    """Features, then a head. What it was built from stays with it, as ``config``."""

    stem_sample = 0
    """How many training images `fit_stem` wants to see; 0: there is nothing to fit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def fit_stem(self, images: Tensor) -> None:
        """Take from a sample of normalised training images (B, in_channels, H, W) what the first weights depend on.

        Called once, before training, where ``stem_sample`` is not 0.
        """

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
    family: Literal["imagenet", "cifar", "fast", "reference"]
    num_classes: int
    """Classes of the data set that the network was designed for."""
    image_size: int
    """Height and width, in pixels, of that data set's images."""
    block: Literal["basic", "bottleneck", ""] = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that this row sets unless the user does."""
    mirrors_alike: bool = False
    """Whether its networks answer the same of an image and of its mirror image, whatever they were trained on; where
    the sides are multiples of 8."""
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
        if chosen.get("preact", own.get("preact")):
            own = {"stem_norm": False, "shortcut_norm": False, **own}
        resolved = ModelConfig(**{**own, **chosen})
        self._check(resolved, ModelConfig(**{**own, "name": config.name}))
        return resolved

    def _check(self, config: ModelConfig, own: ModelConfig) -> None:
        """Refuse settings that the architecture cannot have; ``own`` is the configuration without any setting."""
        if not self.adjustable:
            for key in ModelConfig.model_fields:
                if key not in EVERY_NETWORKS and getattr(config, key) != getattr(own, key):
                    raise UsageError(f'"{config.name}" has no setting {key}; it is a setting of residual networks.')
        if own.shortcut == "none" != config.shortcut:
            raise UsageError(
                f'"{config.name}" is a plain network: it has no shortcuts. For shortcut={config.shortcut} use '
                f'"{config.name.replace("plain", "resnet")}".'
            )
        if self.block != "bottleneck" and (config.groups, config.base_width) != (own.groups, own.base_width):
            raise UsageError(f'groups and base_width are settings of bottleneck blocks; "{config.name}" has none.')
        for contradicts, message in CONFLICTS:
            if contradicts(config):
                raise UsageError(message)
