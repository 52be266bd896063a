"""Convolutions that stride over images narrower than a stride, in bf16 on a CPU.

There PyTorch leaves a part of the filters' gradient unset, so that what lay in memory before is trained on: a network
becomes NaN, or learns worse in silence. Seen with 2.14 on AVX-512 with bf16, for filters of 2×2 and more where the
width is below the stride, whatever the height; fp32 is right. Thumbnails get there: stage 4 of a ResNet with the stem
for photographs reads 16 px as one.
"""

import torch
from torch import Tensor, nn


class NarrowConv2d(nn.Conv2d):
    """A convolution that is computed in fp32 where bf16 would go wrong; all else is `nn.Conv2d`'s."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → (B, K, H', W'), of the dtype that `nn.Conv2d` returns."""
        if not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and input.shape[-1] < self.stride[1]):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float()).to(torch.get_autocast_dtype("cpu"))


def adopt(model: nn.Module) -> None:
    """Let every convolution of ``model`` that strides beware of narrow images, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.stride[1] > 1 and module.kernel_size[1] > 1:
            module.__class__ = NarrowConv2d
