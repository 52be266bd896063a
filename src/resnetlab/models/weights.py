"""Weights that others published, into a network: read without running anything, checked whole, then copied.

The bundle of a run is read elsewhere; this is for bare state dicts under torchvision's names.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from resnetlab.errors import ResNetLabError
from resnetlab.models import unpickle
from resnetlab.models.unpickle import some

PREFIXES = ("module.", "_orig_mod.")
"""What `DataParallel`, `DistributedDataParallel` and `torch.compile` put before every name."""
TRAINING_ONLY = ("aux1.", "aux2.")
"""GoogLeNet's auxiliary heads, which are of no use afterwards; torchvision's weights have them."""
NAME_MAP = {"linear.weight": "fc.weight", "linear.bias": "fc.bias"}
"""Names elsewhere → names here. The CIFAR networks of akamaster/pytorch_resnet_cifar10 and of kuangliu/pytorch-cifar
call the last layer ``linear``."""
MOST = 50_000
"""Tensors that a file may hold; the deepest network here has about 7,000. 200,000 empty ones took 6 s to read."""
PICKLED = (".pth", ".pt", ".th")
PATIENCE = 300.0
"""Seconds that the process that unpickles may take, the start of torch included."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in a file into a model of the same shapes.

    Reads safetensors, and PyTorch's .pth, .pt and .th as far as they hold tensors and nothing that would have to be
    executed; those go through a process of their own with little memory and time (`unpickle`). `num_batches_tracked`
    may be missing, as in files from before PyTorch 0.4.1.

    Raises:
        ResNetLabError: The file cannot be read, is unsafe, holds values that are not finite, or does not fit; the
            message lists what is missing, what is left over and which shapes differ. The model is unchanged.
    """
    path = Path(path)
    load_state(model, _read(path), str(path))


def load_state(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy a state dict into a model of the same shapes; ``where`` is what an error names.

    Raises:
        ResNetLabError: As `load_weights`.
    """
    target = model.state_dict()
    renamed = _rename(weights, target, where)
    _check_names(renamed, target, where)
    model.load_state_dict({name: _convert(name, renamed.get(name, old), old, where) for name, old in target.items()})


def _read(path: Path) -> dict[str, Tensor]:
    """Return the state dict that a file holds; no code in it is run."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *PICKLED):
        raise ResNetLabError(f"{path}: weights are read from .safetensors, .pth, .pt and .th files.")
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ResNetLabError(f"{path}: there is no such file.") from error
    except OSError as error:
        raise ResNetLabError(f"{path} cannot be read: {error.strerror}.") from error
    if empty:
        raise ResNetLabError(f"{path} is empty (0 bytes); perhaps a download was interrupted.")
    if suffix in PICKLED:
        return _read_pickled(path)
    try:
        with safe_open(path, framework="pt") as opened:
            count = len(opened.keys())
        weights: dict[str, Tensor] = load_file(path) if count <= MOST else {}
    except Exception as error:  # a damaged file can break the reader in any way
        raise ResNetLabError(f"{path} cannot be read as weights; it is damaged or of another format.") from error
    if count > MOST:
        raise ResNetLabError(f"{path} was refused: it names {count:,} tensors; no network here has so many.")
    if not weights:
        raise ResNetLabError(f"{path} holds no state dict (names and their tensors).")
    return weights


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Have a file converted to safetensors in another process, and read those; this process unpickles nothing."""
    with tempfile.TemporaryDirectory(prefix="resnetlab-") as folder:
        target = Path(folder, "weights.safetensors")
        answer = _convert_apart(path, target)
        if "refused" in answer:
            raise ResNetLabError(f"{path} was refused: {answer['refused']}.")
        if target.is_file():
            return {name: tensor.clone() for name, tensor in load_file(target).items()}  # the file goes
    raise ResNetLabError(f"{path} was refused: reading it broke the process that did, or took all it may use.")


def _convert_apart(path: Path, target: Path) -> dict[str, str]:
    """Run `unpickle` on a file and return its answer; a process that broke or was stopped has none."""
    command = [sys.executable, "-P", unpickle.__file__, str(path.absolute()), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {"refused": f"it could not be read within {PATIENCE:.0f} s"}
    except OSError as error:
        return {"refused": f"the process that would read it cannot be started ({error.strerror})"}
    lines = done.stdout.decode(errors="replace").splitlines()
    answer: dict[str, str] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    if done.returncode:
        target.unlink(missing_ok=True)  # half a file, perhaps
    return answer


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
    left_over = [name for name in weights if name not in target and not name.startswith(TRAINING_ONLY)]
    differ = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in target.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = {"Missing": missing, "Left over": left_over, "Other shapes": differ}
    lines = [f"  {kind} ({len(names)}): {some(names)}" for kind, names in kinds.items() if names]
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
