"""The parts of residual networks: convolutions, norms, activations, stems, shortcuts, and what variants add to a block.

Each function reads what it makes from `ModelConfig`, where every variant is a field with its source.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.config import ModelConfig


def conv(
    config: ModelConfig, in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution that keeps H and W at stride 1; a batch norm follows or precedes, so it needs no bias."""
    bias = config.conv_bias == "all"
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=bias)


def norm(config: ModelConfig, channels: int) -> nn.BatchNorm2d:
    """Return a batch norm, over the whole batch or over ghost batches."""
    if config.norm_batch:
        return GhostBatchNorm(channels, config.norm_eps, config.norm_momentum, config.norm_batch)
    return nn.BatchNorm2d(channels, config.norm_eps, config.norm_momentum)


def activation(config: ModelConfig) -> nn.Module:
    """Return the non-linearity that stands where the paper has ReLU."""
    if config.activation == "gelu":
        return nn.GELU()
    return nn.SiLU(inplace=True) if config.activation == "silu" else nn.ReLU(inplace=True)


# --- Stem ----------------------------------------------------------------------------------------------------------


def stem_conv(config: ModelConfig, channels: int) -> nn.Conv2d | nn.Sequential:
    """Return the stem's convolution: one of 7×7/2, one of 3×3, or three of 3×3 of which the first strides."""
    images, bias = config.in_channels, config.conv_bias != "none"
    if config.stem != "deep":
        size, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        return nn.Conv2d(images, channels, size, stride, padding=size // 2, bias=bias)
    half = max(1, channels // 2)
    return nn.Sequential(
        nn.Conv2d(images, half, 3, 2, padding=1, bias=bias),
        norm(config, half),
        activation(config),
        conv(config, half, half, 3),
        norm(config, half),
        activation(config),
        conv(config, half, channels, 3),
    )


def stem_pool(config: ModelConfig, channels: int) -> nn.Module:
    """Return the stem's max-pool, which halves H and W; the small stem has none."""
    if config.stem == "small":
        return nn.Identity()
    if config.blur:
        return nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), BlurPool(channels))
    padded = config.stem_pool == "padded"
    return nn.MaxPool2d(3, stride=2, padding=1 if padded else 0, ceil_mode=not padded)


# --- Shortcuts -----------------------------------------------------------------------------------------------------


class PaddedIdentity(nn.Module):
    """Shortcut option A (section 3.3): every ``stride``-th pixel, and new channels that are zero. No parameters.

    Half of the zeros come before the channels and half after, as in the CIFAR weights that are in circulation, or all
    of them after, as in fb.resnet.torch.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, pad: Literal["both", "end"] = "both") -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2 if pad == "both" else 0
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def shortcut(config: ModelConfig, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """Return what a block adds to its output (section 4.1, options A, B and C), or None in a plain network."""
    if config.shortcut == "none":
        return None
    same_channels = in_channels == out_channels
    if stride == 1 and same_channels and config.shortcut != "C":
        return nn.Identity()
    parts: list[nn.Module] = []
    if config.blur and stride > 1:
        parts, stride = [BlurPool(in_channels)], 1
    elif config.shortcut_pool:  # at stride 1 a place holder, so that timm's ResNet-D weights load
        average = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        parts, stride = [average if stride > 1 else nn.Identity()], 1
    if config.shortcut == "A" or (config.shortcut == "B" and same_channels):
        identity = PaddedIdentity(in_channels, out_channels, stride, config.shortcut_pad)
        return nn.Sequential(*parts, identity) if parts else identity
    parts.append(conv(config, in_channels, out_channels, 1, stride))
    if config.shortcut_norm:
        parts.append(norm(config, out_channels))
    return nn.Sequential(*parts)


# --- What variants add ---------------------------------------------------------------------------------------------


class BlurPool(nn.Module):
    """A 3×3 binomial filter on each channel, then every second pixel (arXiv:1904.11486, "Tri-3"). No parameters.

    (B, C, H, W) → (B, C, ⌈H / 2⌉, ⌈W / 2⌉). Border pixels are repeated outwards, so that a constant stays constant.
    """

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = (row[:, None] * row / 16).repeat(channels, 1, 1, 1)  # (C, 1, 3, 3)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image at half its size."""
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.kernel, stride=2, groups=len(self.kernel))


class SqueezeExcitation(nn.Module):
    """Scale each channel by what all of them are on average (arXiv:1709.01507, section 3): x · σ(W₂ relu(W₁ mean(x))).

    (B, C, H, W) → the same shape.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.fc2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled channels."""
        squeezed = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed))))


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training an image's branch is zero with ``probability``, else scaled up.

    The paper drops a block for a whole batch and scales at test time instead; the expected values are the same.
    Written out because torchvision, which has it as `ops.StochasticDepth`, takes 2.5 s to import.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        if not self.training:
            return x
        kept = 1 - self.probability
        return x * torch.empty(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(kept).div_(kept)

    def extra_repr(self) -> str:
        """Say the probability."""
        return f"{self.probability:g}"


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of equal parts of the batch, each of ``size`` images or more.

    The running statistics move once a batch, by the mean over the parts (arXiv:1705.08741).
    """

    def __init__(self, channels: int, eps: float, momentum: float, size: int) -> None:
        super().__init__(channels, eps, momentum)
        self.size = size

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        parts = torch.tensor_split(input, max(1, len(input) // self.size))
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        outputs, means, variances = [], [], []
        for part in parts:
            part_mean, part_var = torch.zeros_like(mean), torch.zeros_like(var)
            # At momentum 1 the running statistics become those of the part.
            outputs.append(F.batch_norm(part, part_mean, part_var, self.weight, self.bias, True, 1.0, self.eps))
            means.append(part_mean)
            variances.append(part_var)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(torch.stack(means).mean(0), share)
            self.running_var.lerp_(torch.stack(variances).mean(0), share)
        return torch.cat(outputs)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}, size={self.size}"
