"""What a network costs: parameters, multiply-adds and weighted layers, counted without computing anything."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from resnetlab.errors import UsageError

CREATE = {torch.empty, torch.zeros, torch.ones, torch.tensor}
"""Functions that make a tensor."""
KEEP_SHAPE = {
    *(F.batch_norm, F.relu, F.gelu, F.silu, Tensor.add, Tensor.add_),
    *(Tensor.fill_, Tensor.flip, Tensor.normal_, Tensor.uniform_, Tensor.zero_),
    *(nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.trunc_normal_, nn.init.uniform_),
}
"""Functions whose result has their first argument's shape: nothing needs to run, which saves most of the time.

PyTorch's own way of doing some of them without content imports its compiler, or SymPy: 1 to 3 s. The shapes of
convolutions, linear layers, pools and what is joined are worked out here for the same reason."""
SMALL = "too small|greater than actual input size"
"""What errors say where a window is larger than what it slides over: ours, and PyTorch's."""
ASIDE = {"downsample", "se"}
"""Modules that papers do not count as layers: projection shortcuts, squeeze-and-excitation."""


@dataclass(frozen=True)
class Complexity:
    """The three figures that papers give."""

    parameters: int
    macs: int
    """Multiply-adds of the convolutions and linear layers for one image (the paper's "FLOPs", table 1)."""
    layers: int
    """Convolutions and linear layers one after the other, without projection shortcuts, as papers count depth."""


class ShapesOnly(TorchFunctionMode):
    """While this is active, new tensors have a shape and no content, and multiply-adds are counted.

    A network that is built inside takes no memory for its weights and no time to draw them.
    """

    macs = 0
    """Multiply-adds so far, for one image of a batch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in KEEP_SHAPE:
            return args[0] if args else kwargs["tensor"]
        if func in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
            size = args[1] if len(args) > 1 else kwargs["output_size"]
            return args[0].new_empty(*args[0].shape[:2], *_pair(size))
        if func == F.max_pool2d and not kwargs.get("ceil_mode"):
            return args[0].new_empty(_pooled(*args, **kwargs))
        if func == torch.cat:
            return args[0][0].new_empty(_joined(*args, **kwargs))
        if func in (F.conv2d, F.linear):
            shape = _convolved if func == F.conv2d else _mapped
            output = args[0].new_empty(shape(*args, **kwargs))
            self.macs += output[0].numel() * args[1][0].numel()  # each output value sums over one filter
            return output
        return func(*args, **(kwargs | {"device": "meta"} if func in CREATE else kwargs))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> list[int]:
    """Return the shape of `torch.cat`'s result."""
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return shape


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> list[int]:  # fmt: skip
    """Return the shape of `torch.nn.functional.conv2d`'s result."""
    return [len(x), len(weight), *_windows(x, weight.shape[2:], stride, padding, dilation)]


def _pooled(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, **_: Any
) -> list[int]:
    """Return the shape of `torch.nn.functional.max_pool2d`'s result, without ``ceil_mode``."""
    return [*x.shape[:2], *_windows(x, kernel_size, stride or kernel_size, padding, dilation)]


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Return how many windows there are down and across."""
    sides = zip(x.shape[2:], *map(_pair, (kernel, stride, padding, dilation)), strict=True)
    count = [(n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, step, pad, gap in sides]
    if min(count) < 1:
        raise RuntimeError(f"what is left of them, {x.shape[2]} × {x.shape[3]}, is too small for a layer")
    return count


def _mapped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[int]:
    """Return the shape of `torch.nn.functional.linear`'s result."""
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(
            f"The network reads images of one size: a layer of it takes {weight.shape[1]} values, and would get "
            f"{x.shape[-1]} of images of another size, as data.grow or the view multi-scale have them."
        )
    return [*x.shape[:-1], len(weight)]


def count(model: nn.Module, image_size: int) -> Complexity:
    """Count what ``model`` costs at an image of ``image_size`` × ``image_size`` pixels.

    Raises:
        UsageError: Such images are too small for it, or it reads others only.
    """
    run = ShapesOnly()
    _pass(model, image_size, run)
    return Complexity(sum(parameter.numel() for parameter in model.parameters()), run.macs, _depth(model))


def count_parts(model: nn.Module, image_size: int, parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Count the multiply-adds of parts of ``model``, as `count` does those of all of it.

    Raises:
        UsageError: As `count`.
    """
    run = ShapesOnly()
    before, found = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)

    def begin(name: str) -> None:
        before[name] = run.macs

    def end(name: str) -> None:
        found[name] += run.macs - before[name]

    with ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_pre_hook(lambda *_, name=name: begin(name)).remove)
            hooks.callback(part.register_forward_hook(lambda *_, name=name: end(name)).remove)
        _pass(model, image_size, run)
    return found


def _pass(model: nn.Module, image_size: int, run: ShapesOnly) -> None:
    """Run a network on stand-ins of its tensors, so that its weights, its statistics and its mode stay as they are."""
    stand_ins = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    channels = getattr(getattr(model, "config", None), "in_channels", 3)
    try:
        with torch.no_grad(), run:
            torch.func.functional_call(model, stand_ins, (torch.empty(1, channels, image_size, image_size),))
    except RuntimeError as error:
        if not re.search(SMALL, str(error)):
            raise
        name = getattr(getattr(model, "config", None), "name", type(model).__name__)
        raise UsageError(
            f"{name} cannot read images of {image_size} × {image_size} pixels: {error}. Larger ones: data.size=N "
            "(where images grow, also in data.grow)."
        ) from error


def _depth(module: nn.Module) -> int:
    """Return the weighted layers on the longest path, those beside it left out.

    Children run one after the other, but for those named ``branch…``, as in GoogLeNet, which run side by side.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        return 1
    depths = {name: _depth(child) for name, child in module.named_children() if name not in ASIDE}
    if depths and all(name.startswith("branch") for name in depths):
        return max(depths.values())
    return sum(depths.values())
