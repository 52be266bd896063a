"""3×3 convolutions on a CPU by Winograd's algorithm, with a quarter of the products (arXiv:1509.09308).

oneDNN, which PyTorch computes with, has this algorithm no longer for x86, and its direct convolution already runs at
the rate of the core, so that only fewer products make it faster. In fp32 the sums are taken in another order: results
differ from the direct ones by rounding (relative 1e-7 to 1e-6). Under autocast to bf16, where the processor multiplies
bf16 but has no AMX, the transformed images and filters are rounded to bf16 instead of the images and filters as they
are, which costs precision: relative 1e-2 of an output instead of 2e-3 (what it does to training: docs/log.md). The
compiled part is `native/winograd.cpp`; where that cannot be, or a layer does not suit, a convolution is PyTorch's.

Images of 2×2 px, which a tile does not suit, are multiplied with one matrix instead (`two_by_two`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resnetlab.native import functions
from resnetlab.native.build import library, why_not

NHWC = torch.channels_last
LEAST_CHANNELS, LEAST_SIDE = 16, 3
LEAST_TILES = 96
"""Tiles of 4×4 outputs in a batch; with much fewer, transforming the filters costs more than it saves (docs/log.md)."""
LEAST_IMAGES, LEAST_MATRIX = 128, 192
"""Images of 2×2 px in a batch, and channels, from which on one matrix product is quicker (docs/log.md)."""
PIXELS = ((0, 0), (0, 1), (1, 0), (1, 1))
REACHED_BY = [3 * (1 + i - r) + 1 + j - c for r, c in PIXELS for i, j in PIXELS]
"""Of 2×2 px: by which of the nine values of a filter, row by row, pixel (i, j) reaches output (r, c)."""

_wanted = True


def use(wanted: bool) -> None:
    """Switch the algorithm on (the default) or off for this process."""
    global _wanted
    _wanted = wanted


def wanted() -> bool:
    """Whether the algorithm is switched on."""
    return _wanted


def in_use(precision: str = "fp32") -> bool:
    """Whether suitable layers are computed this way: it is switched on, and could be compiled for this machine.

    In bf16 AMX multiplies so fast that the transforms would take longer than all the products of a direct convolution.
    """
    return _wanted and not _amx(precision) and functions.offers("winograd_forward", precision)


def state(precision: str = "fp32") -> str:
    """Say which algorithm is in use, and why if it is not this one, for people."""
    if in_use(precision):
        return "winograd"
    if _wanted and library(precision) is not None:
        return f"direct (faster in {precision} here)" if _amx(precision) else f"direct (no {precision} instructions)"
    return f"direct ({why_not(precision) if _wanted else 'switched off'})"


def _amx(precision: str) -> bool:
    return precision == "bf16" and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


class WinogradConv2d(nn.Conv2d):
    """A convolution that takes the algorithm where it pays; weights and their names are those of `nn.Conv2d`.

    Its gradient cannot be differentiated once more; `functions.plain` helps where that is wanted.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → (B, K, H, W), of the dtype that `nn.Conv2d` returns."""
        if self.suits(input):
            return self.compute(input, pooled=False)
        if self._suits_a_matrix(input):
            return two_by_two(input, self.filters(), self.bias)
        out: Tensor = self._conv_forward(input, self.filters(), self.bias)
        return out

    def filters(self) -> Tensor:
        """Return what the images are convolved with, (out_channels, in_channels, 3, 3)."""
        return self.weight

    def compute(self, x: Tensor, *, pooled: bool) -> Tensor:
        """Take the algorithm for images that suit, and pool its output where ``pooled``; see `conv_max_pool`."""
        out: Tensor = _Convolution.apply(x.to(_dtype()), self.filters(), pooled)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

    def suits(self, x: Tensor) -> bool:
        """Whether the algorithm is in use, and made for ``x`` as it comes."""
        if not self._ours(x) or min(x.shape[2:]) < LEAST_SIDE:
            return False
        tiles: int = len(x) * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
        return tiles >= LEAST_TILES

    def _suits_a_matrix(self, x: Tensor) -> bool:
        """Whether ``x`` is for `two_by_two`, in either precision the quicker there."""
        wide = min(self.in_channels, self.out_channels) >= LEAST_MATRIX
        return wide and self._ours(x) and x.shape[2:] == (2, 2) and len(x) >= LEAST_IMAGES

    def _ours(self, x: Tensor) -> bool:
        """Whether images ``x`` are what we compute with, here and now; traced, they may later be any number."""
        if x.ndim != 4 or functions.traced():
            return False
        known = self.weight.dtype == torch.float32 and x.dtype in (torch.float32, _dtype())
        if not known or x.shape[1] != self.in_channels or not functions.here(x, self.weight):
            return False
        return in_use(functions.NAMES.get(_dtype(), ""))


def _dtype() -> torch.dtype:
    """Return what a convolution computes in here and now, if its input is fp32."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def conv_max_pool(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return ``max_pool2d(conv(x), 2)``: (B, C, H, W) → (B, K, H // 2, W // 2).

    Computed at once where the algorithm is in use, so that the convolution's output never lies in memory, unless a
    hook waits for that output.
    """
    if isinstance(conv, WinogradConv2d) and conv.suits(x) and not functions.watched(conv):
        return conv.compute(x, pooled=True)
    return F.max_pool2d(conv(x), 2)


def two_by_two(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``conv2d(x, weight, bias, padding=1)`` of images of 2×2 px: (B, C, 2, 2) → (B, K, 2, 2).

    Each of the four pixels reaches each, by one of the nine filter values: a matrix of 4 C columns and 4 K rows. A
    direct convolution also multiplies the zeros of the padding, 20 products of 36.
    """
    filters, channels = weight.shape[:2]
    values = weight.to(_dtype()).permute(0, 2, 3, 1).reshape(filters, 9, channels)
    chosen = values.index_select(1, torch.tensor(REACHED_BY, device=x.device))
    matrix = chosen.view(filters, 4, 4 * channels).transpose(0, 1)
    pixels = x.permute(0, 2, 3, 1).reshape(len(x), 4 * channels)
    out = F.linear(pixels, matrix.reshape(4 * filters, -1), None if bias is None else bias.repeat(4))
    return out.view(len(x), 2, 2, filters).permute(0, 3, 1, 2)


def adopt(model: nn.Module) -> None:
    """Let every convolution of ``model`` that can suit choose its algorithm, in place: 3×3, stride 1, padding 1."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _can_suit(module):
            module.__class__ = WinogradConv2d


def _can_suit(conv: nn.Conv2d) -> bool:
    window = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    channels = (conv.in_channels, conv.out_channels)
    plain = conv.groups == 1 and conv.padding_mode == "zeros" and window == ((3, 3), (1, 1), (1, 1), (1, 1))
    return plain and min(channels) >= LEAST_CHANNELS and all(count % 8 == 0 for count in channels)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pooled: bool) -> Tensor:
        x, weight = x.contiguous(memory_format=NHWC), weight.contiguous(memory_format=NHWC)
        height, width = (side // 2 if pooled else side for side in x.shape[2:])
        shape = (len(x), len(weight), height, width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=NHWC)
        winners = torch.empty_like(out, dtype=torch.uint8) if pooled else None
        ctx.save_for_backward(x, weight, winners)
        scratch, sizes = _scratch(x, weight)
        pointers = functions.pointers(x, weight, out, winners, scratch)
        functions.call("winograd_forward", functions.NAMES[x.dtype], *pointers, *sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight, winners = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=NHWC)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight)
        scratch, sizes = _scratch(x, weight)
        pointers = functions.pointers(x, weight, gradient, winners, of_x, of_weight, scratch)
        functions.call("winograd_backward", functions.NAMES[x.dtype], *pointers, *sizes)
        return of_x, of_weight, None


def _scratch(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return room for what is transformed, and the sizes that both functions of `native/winograd.cpp` take."""
    images, channels, height, width = x.shape
    threads = torch.get_num_threads()
    values = functions.call("winograd_scratch", functions.NAMES[x.dtype], channels, len(weight), threads)
    room = torch.empty(values, dtype=torch.float32, device=x.device)
    return room, (images, height, width, channels, len(weight), threads)
