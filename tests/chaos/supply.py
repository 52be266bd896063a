"""R24 and R25: what our own source may not contain, and that loading a run asks no network."""

import ast
import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import resnetlab
from chaos.record import Bench, Result, Row, Tally
from resnetlab import bundle, models
from resnetlab.bundle import Card
from resnetlab.config import ModelConfig
from resnetlab.preprocess import Preprocess
from resnetlab.recipes import RECIPES, Facts

SOURCE = Path(resnetlab.__file__).parent
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
         "pickle.load", "pickle.loads", "torch.hub.load", "torch.hub.load_state_dict_from_url", "marshal.loads",
         "shelve.open", "joblib.load", "dill.load", "dill.loads"}  # fmt: skip
"""Calls that run what a file or a text says."""
MODULES = {"yaml", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
PICKLE_ALLOWED = {"sources/cifar.py", "models/unpickle.py"}
"""Where pickle is imported: an unpickler that knows four names, and the name of an error."""


def offences(text: str, name: str) -> list[str]:
    """Return what a source file may not do and does, a line each."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            bad = {n.split(".")[0] for n in names} & (MODULES | (set() if name in PICKLE_ALLOWED else {"pickle"}))
            found += [f"{name}:{node.lineno} imports {module}" for module in bad]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in CALLS:
            found.append(f"{name}:{node.lineno} calls {called}")
        if given.get("shell") == "True":
            found.append(f"{name}:{node.lineno} starts a shell")
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{name}:{node.lineno} torch.load without weights_only=True")
        if called in ("np.load", "numpy.load") and given.get("allow_pickle") == "True":
            found.append(f"{name}:{node.lineno} np.load with pickles")
    return found


def source(bench: Bench) -> Result:
    """Look through every file of the package."""
    files = sorted(SOURCE.rglob("*.py"))
    tally = Tally(bench, of=len(files))
    for path in files:
        name = path.relative_to(SOURCE).as_posix()
        tally.add(name, "; ".join(offences(path.read_text(encoding="utf-8"), name)) or None)
    return tally.result(f"{len(files)} files of the package")


def saved(folder: Path) -> Path:
    """Write a bundle of a small network with random weights, and return its directory."""
    torch.manual_seed(0)
    config = ModelConfig(name="resnet20", num_classes=4, in_channels=3)
    preprocess = Preprocess(size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))
    recipe = RECIPES["default"](Facts(images=100, size=16, mirrors=True))
    card = Card(model=config, classes=("ant", "bee", "cat", "dög"), preprocess=preprocess, recipe=recipe)
    bundle.save(folder, models.build(config).state_dict(), card)
    return folder


def offline(bench: Bench) -> Result:
    """Build, save and load with every socket refused."""
    tally = Tally(bench, of=2)

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("the network was asked")

    with mock.patch.object(socket, "socket", refuse), mock.patch.object(socket, "create_connection", refuse):
        acts: dict[str, Callable[[], object]] = {
            "save and load a bundle": lambda: bundle.load(saved(bench.folder)),
            "build networks": lambda: [models.build(ModelConfig(name=n)) for n in ("resnet20", "resnet18")],
        }
        for what, act in acts.items():
            try:
                act()
                tally.add(what)
            except BaseException as error:
                tally.add(what, f"{type(error).__name__}: {error}")
    return tally.result()


def export(bench: Bench) -> Result:
    """Say that there is nothing to export with yet; rows for it belong here."""
    there = importlib.util.find_spec("resnetlab.export") is not None
    return Result(tried=int(there), survived=0, notes=("no row for export yet" if there else "no export yet",))


ROWS = (
    Row(id="R24", part="export", fault="Exported files that name others, or were altered", check="refused", run=export),
    Row(
        id="R25",
        part="source",
        fault="Our own source: eval, exec, pickle, yaml.load, shell=True, torch.load without weights_only",
        check="none in any file of the package, by its syntax tree",
        run=source,
    ),
    Row(
        id="R25",
        part="offline",
        fault="Loading a run with every socket refused",
        check="networks are built, a bundle is saved and loaded",
        run=offline,
    ),
)
