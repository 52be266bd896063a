"""Weights that others published, into a network: read without running anything, checked whole, then copied.

The bundle of a run is read elsewhere; this is for bare state dicts under torchvision's names.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from resnetlab.errors import ResNetLabError

CONTAINERS = ("state_dict", "model")
"""Keys under which a checkpoint may hold its state dict."""
PREFIXES = ("module.", "_orig_mod.")
"""What `DataParallel`, `DistributedDataParallel` and `torch.compile` put before every name."""
NAME_MAP = {"linear.weight": "fc.weight", "linear.bias": "fc.bias"}
"""Names elsewhere → names here. The CIFAR networks of akamaster/pytorch_resnet_cifar10 and of kuangliu/pytorch-cifar
call the last layer ``linear``."""
SHOWN = 8
"""An error lists this many names of a kind, then says how many more there are."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in a file into a model of the same shapes.

    Reads safetensors, and PyTorch's .pth, .pt and .th as far as they hold tensors and nothing that would have to be
    executed. `num_batches_tracked` may be missing, as in files from before PyTorch 0.4.1.

    Raises:
        ResNetLabError: The file cannot be read, is unsafe, holds values that are not finite, or does not fit; the
            message lists what is missing, what is left over and which shapes differ. The model is unchanged.
    """
    path = Path(path)
    load_state(model, _unwrap(_read(path), path), str(path))


def load_state(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy a state dict into a model of the same shapes; ``where`` is what an error names.

    Raises:
        ResNetLabError: As `load_weights`.
    """
    target = model.state_dict()
    renamed = _rename(weights, target, where)
    _check_names(renamed, target, where)
    model.load_state_dict({name: _convert(name, renamed.get(name, old), old, where) for name, old in target.items()})


def _read(path: Path) -> object:
    """Return what the file holds; no code in it is run."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pth", ".pt", ".th"):
        raise ResNetLabError(f"{path}: weights are read from .safetensors, .pth, .pt and .th files.")
    if not path.is_file():
        raise ResNetLabError(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise ResNetLabError(f"{path} is empty (0 bytes); perhaps a download was interrupted.")
    try:
        if suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ResNetLabError(
            f"{path} was refused: it is damaged, or it holds more than tensors, and loading that could run a "
            "stranger's code. Convert it to safetensors where you trust it."
        ) from error
    except Exception as error:  # a damaged file can break the readers in any way
        raise ResNetLabError(f"{path} cannot be read as weights; it is damaged or of another format.") from error


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """Return the state dict, out of its container if it is in one."""
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ResNetLabError(f"{path} holds no state dict (names and their tensors).")
    odd = [str(name) for name, tensor in content.items() if not (isinstance(name, str) and _is_plain(tensor))]
    if odd:
        raise ResNetLabError(f"{path}: these entries are not named dense tensors: {_some(odd)}.")
    return dict(content)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _rename(weights: Mapping[str, Tensor], target: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the weights under the names used here."""
    renamed: dict[str, Tensor] = {}
    for original, tensor in weights.items():
        name = original
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name not in target:
            name = NAME_MAP.get(name, name)
        if name in renamed:
            raise ResNetLabError(f'{where}: "{original}" and another entry both stand for "{name}".')
        renamed[name] = tensor
    return renamed


def _check_names(weights: Mapping[str, Tensor], target: Mapping[str, Tensor], where: str) -> None:
    """Raise an error that lists all differences in names and shapes, if there are any."""
    missing = [n for n in target if n not in weights and not n.endswith("num_batches_tracked")]
    left_over = [name for name in weights if name not in target]
    differ = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in target.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = {"Missing": missing, "Left over": left_over, "Other shapes": differ}
    lines = [f"  {kind} ({len(names)}): {_some(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise ResNetLabError("\n".join([f"{where} does not fit this network.", *lines]))


def _convert(name: str, new: Tensor, old: Tensor, where: str) -> Tensor:
    """Return the new values in the model's type, or refuse them."""
    if new.is_floating_point() != old.is_floating_point() or new.is_complex():
        raise ResNetLabError(f"{where}: {name} is {new.dtype}; the network needs {old.dtype}.")
    converted = new.to(old.dtype)
    if converted.is_floating_point() and not converted.isfinite().all():
        raise ResNetLabError(f"{where}: {name} holds values that are not finite in {old.dtype}.")
    return converted


def _some(names: list[str]) -> str:
    """List the first names and say how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
