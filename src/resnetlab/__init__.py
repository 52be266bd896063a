"""Train, evaluate and use the residual networks of He, Zhang, Ren and Sun (2015).

    import resnetlab as rl
    run = rl.train("digits", epochs=20)
    run.evaluate().top1
    run.predict("seven.png").top(1)  # [[("7", 0.98)]]

Names are resolved when they are first used, so that importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnetlab.api import Run, combine, compare, load, replay, resume, train
    from resnetlab.errors import ResNetLabError, UsageError
    from resnetlab.lab import lab
    from resnetlab.models import create_model, load_weights
    from resnetlab.seeds import train_seeds

__version__ = "0.1.0"
__all__ = [
    "ResNetLabError",
    "Run",
    "UsageError",
    "__version__",
    "combine",
    "compare",
    "create_model",
    "lab",
    "load",
    "load_weights",
    "replay",
    "resume",
    "train",
    "train_seeds",
]

_HOME = {
    "ResNetLabError": "errors",
    "Run": "api",
    "UsageError": "errors",
    "combine": "api",
    "compare": "api",
    "create_model": "models",
    "lab": "lab",
    "load": "api",
    "load_weights": "models",
    "replay": "api",
    "resume": "api",
    "train": "api",
    "train_seeds": "seeds",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'resnetlab' has no attribute {name!r}")
    value = getattr(import_module(f"resnetlab.{_HOME[name]}"), name)
    globals()[name] = value  # `resnetlab.train` is the verb, also after the module of that name was imported
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
