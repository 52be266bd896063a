"""R23: readers fed with what hypothesis thinks of. The properties are tests; here they are run for longer."""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos.record import Bench, Result, Row, Tally
from chaos.supply import saved
from resnetlab import bundle, checkpoint, models
from resnetlab.config import Recipe, override, parse
from resnetlab.errors import ResNetLabError
from resnetlab.models import unpickle
from resnetlab.recipes import RECIPES, Facts
from resnetlab.serve.errors import Refusal
from resnetlab.sources.images import decode

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)
Act = Callable[[bytes], object]


def _readers(folder: Path) -> dict[str, tuple[bytes, Act]]:
    """Return each reader with a good file of its own."""
    import torch
    from PIL import Image

    good = (saved(folder) / "model.safetensors").read_bytes()
    torch.save({"weight": torch.zeros(2, 2)}, folder / "w.pt")
    Image.new("RGB", (9, 7), "red").save(folder / "x.png")
    Image.new("RGB", (9, 7), "red").save(folder / "x.webp")
    Image.new("RGB", (9, 7), "red").save(folder / "x.tif")
    target = folder / "fuzzed"
    target.mkdir()

    def file(name: str, act: Callable[[Path], object]) -> Act:
        def run(data: bytes) -> object:
            (target / name).write_bytes(data)
            return act(target / name)

        return run

    def newest(path: Path) -> object:
        return checkpoint.load_newest(path.parent.parent, lambda line: None)

    place = target / "step-000000001"
    kept = checkpoint.save(target, checkpoint.Checkpoint(step=1, tensors={"a": torch.zeros(3)}, state={"x": 1}))
    assert kept == place
    recipe = RECIPES["default"](Facts(images=100, size=16, mirrors=True))
    return {
        "bundle": (good, file("m.safetensors", bundle.load)),
        "weights .pt": ((folder / "w.pt").read_bytes(), file("w.pt", lambda p: unpickle.convert(p, target / "out"))),
        "weights .safetensors": (good, file("w.safetensors", lambda p: models.load_weights(torch.nn.Linear(1, 1), p))),
        **{
            f"checkpoint {n}": ((place / n).read_bytes(), file(f"{place.name}/{n}", newest))
            for n in (checkpoint.MANIFEST, checkpoint.STATE, checkpoint.TENSORS)
        },
        "configuration": (recipe.model_dump_json().encode(), lambda d: parse(Recipe, d.decode("latin-1"), "x")),
        "setting": (b"optim.lr=0.1", lambda d: override(recipe, [d.decode("latin-1")])),
        **{
            f"image {suffix}": ((folder / f"x.{suffix}").read_bytes(), lambda d: decode(d, channels=3))
            for suffix in ("png", "webp", "tif")
        },
    }


def _damaged(data: Any, good: bytes) -> bytes:
    """Draw any bytes, any JSON, or (mostly) a good file with some bytes changed, lost and added."""
    kind = data.draw(st.integers(0, 9))
    if kind == 0:
        return bytes(data.draw(st.binary(max_size=300)))
    if kind == 1:
        return json.dumps(data.draw(JSON)).encode()
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        most = min(len(content), data.draw(st.sampled_from((80, 10**7))))
        at = data.draw(st.integers(0, max(0, most - 1)))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    return bytes(content)


def _feed(tally: Tally, name: str, good: bytes, act: Act, each: int) -> None:
    """Feed one reader with ``each`` files."""

    @settings(max_examples=each, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def one(data: Any) -> None:
        content, wrong = _damaged(data, good), None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                act(content)
        except (ResNetLabError, unpickle.Refused):
            pass
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        tally.add(name, wrong)

    one()


def fuzz(bench: Bench) -> Result:
    """Feed each reader with damaged files of its own and with any bytes and JSON."""
    readers, each = _readers(bench.folder), bench.pick(40, 4000)
    tally = Tally(bench, of=len(readers) * each)
    for name, (good, act) in readers.items():
        _feed(tally, name, good, act, each)
    return tally.result(f"{len(readers)} readers, {each:,} files each: {', '.join(readers)}")


def forms(bench: Bench) -> Result:
    """Take mutated multipart forms apart."""
    import test_serve as serving
    from resnetlab.serve.uploads import read

    total, chance = bench.pick(300, 20_000), bench.chance("forms")
    tally = Tally(bench, of=total)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it remarks on every damaged form
    for i in range(total):
        data = bytearray(serving.PART + b"--b--\r\n")
        for _ in range(chance.randint(1, 8)):
            at = chance.randrange(len(data))
            data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        wrong = None
        try:
            read("multipart/form-data; boundary=b", bytes(data), 64)
        except Refusal:
            pass
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        tally.add(f"form {i}", wrong)
    return tally.result(f"{total:,} forms")


ROWS = (
    Row(
        id="R23",
        part="readers",
        fault="Fuzzed bundles, weights, checkpoints, configurations, settings and images (hypothesis)",
        check="read or refused in words; no other exception",
        run=fuzz,
    ),
    Row(id="R23", part="forms", fault="Mutated multipart forms", check="taken apart or refused", run=forms),
)
