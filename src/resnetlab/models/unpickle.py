"""Tensors out of PyTorch's pickled files, in a process of its own: ``python unpickle.py FILE OUT``.

Run by `weights`, which never unpickles anything itself. torch's ``weights_only`` reader runs no code of the file by
design, but it has had holes (CVE-2025-32434, CVE-2026-24747) and takes any memory that a file asks for. So this process
first gives up the right to more memory, time and disk than an honest file of that size needs, reads, and leaves nothing
behind but plain tensors in safetensors. It imports nothing of the package: it starts as fast as torch does.
"""

import json
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTAINERS = ("state_dict", "model")
"""Keys under which a checkpoint may hold its state dict."""
SHOWN = 8
"""An error lists this many names of a kind, then says how many more there are."""
MEMORY, SPARE = 3, 200 << 20
"""Bytes of address space for each byte of the file (as read, as written, and a margin), and on top of that."""
SECONDS = 60
"""Of processor time; a file of 100 MB takes 0.2 s (measured on one core of a Xeon)."""


class Refused(Exception):
    """Why a file is not taken, in words for its user."""


def main(arguments: list[str]) -> None:
    """Convert FILE to safetensors in OUT, and print a JSON object: empty, or with the reason why not as "refused"."""
    source, target = map(Path, arguments)
    import safetensors.torch  # noqa: F401  # before memory is limited: programs take address space too
    import torch  # noqa: F401

    limit(source.stat().st_size)
    try:
        convert(source, target)
    except Refused as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"refused": "reading it takes far more memory than a file of its size should need"}
    else:
        answer = {}
    print(json.dumps(answer))  # noqa: T201  # the answer goes through a pipe


def limit(size: int) -> None:
    """Bound this process's memory, processor time and written bytes by what a file of ``size`` bytes may need."""
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit remains
        return

    def bound(kind: int, most: int) -> None:
        _, hard = resource.getrlimit(kind)  # which this process may not raise
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))

    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else open(os.devnull) as file:
        pages = int((file.read() or "0").split()[0])
    if pages:
        memory = pages * resource.getpagesize() + MEMORY * size + SPARE
        bound(resource.RLIMIT_AS, memory)
    bound(resource.RLIMIT_CPU, SECONDS)
    bound(resource.RLIMIT_FSIZE, 2 * size + SPARE)
    bound(resource.RLIMIT_CORE, 0)


def convert(source: Path, target: Path) -> None:
    """Write the state dict in ``source`` to ``target`` as safetensors.

    Raises:
        Refused: It is damaged, holds anything that would have to be run, or no state dict; it is larger than its file.
    """
    from safetensors.torch import save_file

    size = source.stat().st_size
    weights = unwrap(_load(source))
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if claimed > 2 * size + (1 << 20):  # shared tensors may be counted twice
        raise Refused(f"its tensors claim {claimed:,} bytes, which do not fit in a file of {size:,}")
    try:
        save_file(_separate(weights), target)
    except OSError:
        raise
    except Exception as error:  # a kind of tensor that there is no room for in the format
        raise Refused(f"its tensors cannot be kept as safetensors ({error})") from error


def _separate(weights: dict[str, Any]) -> dict[str, Any]:
    """Return contiguous tensors of which no two share memory; those that did are copied."""
    seen: set[int] = set()
    apart = {}
    for name, given in weights.items():
        tensor = given.detach().resolve_neg()  # a view that negates is a flag, which files do not keep
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        apart[name] = apart[name].contiguous()
        seen.add(place)
    return apart


def _load(source: Path) -> object:
    """Return what a file holds, by torch's reader for tensors alone. There is no other way in."""
    import pickle

    import torch

    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as zipped:
                packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in zipped.infolist())
            if packed:
                raise Refused("its records are compressed, which PyTorch never does: it may be a bomb")
        return torch.load(source, weights_only=True, map_location="cpu")
    except (Refused, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise Refused(
            "it is damaged, or it holds more than tensors, and loading that could run a stranger's code. Convert it to "
            "safetensors where you trust it"
        ) from error
    except Exception as error:  # a damaged file can break the reader in any way
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise MemoryError from error
        raise Refused("it cannot be read as weights; it is damaged or of another format") from error


def unwrap(content: object) -> dict[str, Any]:
    """Return the state dict, out of its container if it is in one.

    Raises:
        Refused: There is none, or it holds other things than dense tensors under names.
    """
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise Refused("it holds no state dict (names and their tensors)")
    odd = [str(name) for name, tensor in content.items() if not (isinstance(name, str) and _is_plain(tensor))]
    if odd:
        raise Refused(f"these entries are not named dense tensors: {some(odd)}")
    return dict(content)


def _is_plain(value: Any) -> bool:
    import torch

    if not isinstance(value, torch.Tensor) or value.is_quantized or value.is_meta:
        return False
    return value.layout == torch.strided


def some(names: list[str]) -> str:
    """List the first names and say how many more there are."""
    more = len(names) - SHOWN
    shown = ("".join(sign if sign.isprintable() else "?" for sign in name[:100]) for name in names[:SHOWN])
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


if __name__ == "__main__":
    main(sys.argv[1:])
