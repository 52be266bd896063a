"""A bundle comes back as it was saved, or an error says what is wrong with it. Never a different network."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from resnetlab import bundle, models
from resnetlab.bundle import CARD, WEIGHTS, Card
from resnetlab.config import ModelConfig, Recipe
from resnetlab.errors import ResNetLabError
from resnetlab.preprocess import Preprocess

CLASSES = ("grün", "red", "blue")
TINY = ModelConfig(name="linear", num_classes=3, image_size=4)
SMALL = ModelConfig(name="resnet20", num_classes=3, image_size=32)


def card(config: ModelConfig = TINY, **fields: Any) -> Card:
    """Return what the weights of a network mean; ``fields`` are not checked, as in a file that a stranger wrote."""
    size = config.image_size or 32
    made = Card(
        model=models.resolve(config),
        classes=CLASSES,
        preprocess=Preprocess(size=size, resize=size, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        recipe=Recipe(name="fast", model=config, epochs=3),
        data={"name": "colours", "train": 60},
        metrics={"val": {"top1": 0.1 + 0.2}},
        epoch=2,
    )
    return made.model_copy(update=fields)


def network(config: ModelConfig = TINY, seed: int = 0) -> nn.Module:
    """Return a network whose statistics have moved too."""
    torch.manual_seed(seed)
    model = models.build(config).train()
    with torch.no_grad():
        model(torch.randn(2, config.in_channels, config.image_size or 32, config.image_size or 32))
    return model


def forge(path: Path, tensors: dict[str, Tensor], fields: dict[str, Any] | str) -> Path:
    """Write a bundle with valid checksums by hand, as anyone could who has read how it is done."""
    text = fields
    if not isinstance(text, str):
        text = json.dumps({**text, "tensors_sha256": bundle.digest(tensors), "card_sha256": ""}, ensure_ascii=False)
        seal = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        text = text.replace('"card_sha256": ""', f'"card_sha256": "{seal}"')
    path.write_bytes(save(tensors, metadata={"resnetlab": text.encode("utf-8", "replace").decode()}))
    return path


def written(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a bundle's tensors and description, without our reader."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    fields: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["resnetlab"])
    return load(content), fields


@contextlib.contextmanager
def little_memory(mib: int = 300) -> Iterator[None]:
    """Let the process take only so much more memory."""
    resource = pytest.importorskip("resource")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("only Linux says how much memory a process has mapped")
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (mib << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def little_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes; the system then fails the write, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The file of a saved tiny network."""
    return bundle.save(tmp_path, network().state_dict(), card())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a saved ResNet-20, 1.1 MB."""
    return bundle.save(tmp_path_factory.mktemp("run"), network(SMALL).state_dict(), card(SMALL))


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        SMALL,
        ModelConfig(name="plain20", num_classes=3, image_size=16, init="torch"),
        ModelConfig(name="resnet32", num_classes=3, image_size=8, shortcut="C", zero_init=True),
    ],
    ids=lambda config: config.name,
)
def test_what_is_saved_comes_back(tmp_path: Path, config: ModelConfig) -> None:
    model, meaning = network(config), card(config)
    bundle.save(tmp_path, model.state_dict(), meaning)
    loaded = bundle.load(tmp_path)
    images = torch.randn(2, 3, config.image_size or 0, config.image_size or 0)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), model.eval()(images))
    assert same(loaded.model.state_dict(), model.state_dict())
    assert not any(module.training for module in loaded.model.modules())
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    digests = {"tensors_sha256": bundle.digest(model.state_dict()), "card_sha256": loaded.card.card_sha256}
    assert loaded.card == meaning.model_copy(update=digests)
    assert loaded.path == tmp_path / WEIGHTS
    assert sorted(os.listdir(tmp_path)) == [CARD, WEIGHTS]


def test_the_weights_file_is_enough_anywhere_and_under_any_name(saved: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "ein Ordner" / "cats & dögs.safetensors"
    elsewhere.parent.mkdir()
    saved.rename(elsewhere)
    assert bundle.load(elsewhere).card.classes == CLASSES
    assert bundle.load(str(elsewhere)).path == elsewhere


def test_the_description_is_json_that_people_and_programs_read(saved: Path) -> None:
    text = saved.with_name(CARD).read_text(encoding="utf-8")
    record = json.loads(text)
    assert record.pop("file") == WEIGHTS
    assert record.pop("file_sha256") == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert record == written(saved)[1]
    assert record["schema_number"] == 1
    assert record["metrics"]["val"]["top1"] == 0.1 + 0.2
    assert "grün" in text, "names are for people"


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    path = bundle.save(tmp_path, network().state_dict(), card(metrics={"test": {"loss": math.nan, "worst": math.inf}}))
    record = json.loads(path.with_name(CARD).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["metrics"] == {"test": {"loss": None, "worst": None}}
    assert bundle.load(path).card.metrics == record["metrics"]


def test_a_data_path_that_is_not_text_does_not_lose_the_run(tmp_path: Path) -> None:
    bundle.save(tmp_path, network().state_dict(), card(data={"source": os.fsdecode(b"/data/caf\xe9")}))
    assert bundle.load(tmp_path).card.data == {"source": "/data/caf?"}


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = set()
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        contents.add(bundle.save(tmp_path / name, network().state_dict(), card()).read_bytes())
    assert len(contents) == 1


def test_the_digest_sees_names_types_shapes_and_values_but_not_order() -> None:
    a, b = torch.arange(4.0), torch.zeros(0, 3, dtype=torch.bfloat16)
    seen = [
        {"a": a, "b": b},
        {"a": a, "c": b},
        {"a": b, "b": a},
        {"a": a.reshape(2, 2), "b": b},
        {"a": a, "b": b.reshape(3, 0)},
        {"a": a.view(torch.int32), "b": b},
        {"a": -a, "b": b},
        {"a": a},
        {"a": torch.tensor(True), "b": b},
    ]
    assert len({bundle.digest(tensors) for tensors in seen}) == len(seen)
    assert bundle.digest({"b": b, "a": a}) == bundle.digest({"a": a, "b": b})
    assert bundle.digest({"a": torch.stack([a, a], 1)[:, 0], "b": b}) == bundle.digest(seen[0])


def half(size: int) -> dict[str, Any]:
    return {"size": size, "resize": size, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["a", "b", "c", "d"]}, "the network has 3 classes, but 4 class names are listed"),
        ({"classes": []}, "classes: .*at least 1 item"),
        ({"classes": [1, 2, 3]}, "classes: .*valid string"),
        (
            {"classes": ["a", "b"], "model": {"name": "linear", "num_classes": 2, "image_size": 4}},
            r"fc.weight \(3, 48\)",
        ),
        ({"model": {"name": "linear", "num_classes": 3, "in_channels": 1, "image_size": 4}}, "1 channels.* makes 3"),
        ({"model": {"name": "linear", "num_classes": 3, "image_size": 8}}, "images of 8 px, the preprocessing makes 4"),
        ({"model": {"name": "linear", "num_classes": 3}}, 'cannot be built: The model "linear" needs image_size'),
        ({"model": {"name": "resnet19", "num_classes": 3}}, 'cannot be built: Unknown model "resnet19"'),
        ({"model": {"name": "resnet20", "num_classes": 3}}, "which do not fit in a file of"),
        ({"model": {"name": "linear", "num_classes": 3, "image_size": 4, "depth": 3}}, "model.depth: Extra inputs"),
        ({"schema_number": 2}, "schema number 2; this ResNetLab reads 1"),
        ({"schema_number": "1"}, "schema number 1; this"),
        ({"schema_number": None}, "schema number None"),
        ({"preprocess": {**half(4), "mean": [0.5]}}, "preprocess: .*must have 3 values"),
        ({"preprocess": {**half(4), "std": [0.5, 0.5, 0.0]}}, "preprocess.std: .*greater than 0"),
        ({"preprocess": {**half(4), "std": [0.5, 0.5, math.nan]}}, "preprocess.std: "),
        ({"preprocess": {**half(4), "mean": [0.5, 0.5, math.inf]}}, "preprocess.mean: "),
        ({"preprocess": {**half(4), "size": -4}}, "preprocess.size: .*greater than or equal to 1"),
        ({"preprocess": {**half(4), "resize": 3}}, "must not be below size"),
        ({"preprocess": {**half(4), "resize": 10**9}}, "10+ px; the limit is 8192"),
        ({"preprocess": {**half(4), "channels": 2}}, "preprocess.channels"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_by_name(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tensors, fields = written(saved)
    path = forge(tmp_path / "b.safetensors", tensors, {**fields, **changes})
    with pytest.raises(ResNetLabError, match=message) as caught:
        bundle.load(path)
    assert str(path) in str(caught.value)


def test_a_forged_bundle_is_otherwise_good(saved: Path, tmp_path: Path) -> None:
    path = forge(tmp_path / "b.safetensors", *written(saved))
    assert bundle.load(path).card == bundle.load(saved).card


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["layer2.0.bn1.running_mean"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["layer4.0.conv1.weight"] = torch.zeros(2)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["conv1.weight"] = tensors["conv1.weight"].reshape(16, 27)


def make_whole(tensors: dict[str, Tensor]) -> None:
    tensors["fc.bias"] = tensors["fc.bias"].long()


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["bn1.weight"][3] = math.nan


def overflow(tensors: dict[str, Tensor]) -> None:
    tensors["bn1.running_var"][3] = math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"Missing \(1\): layer2.0.bn1.running_mean"),
        (add, r"Left over \(1\): layer4.0.conv1.weight"),
        (reshape, r"Other shapes \(1\): conv1.weight \(16, 27\) instead of \(16, 3, 3, 3\)"),
        (make_whole, "fc.bias is torch.int64"),
        (poison, "bn1.weight holds values that are not finite"),
        (overflow, "bn1.running_var holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    small: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors, fields = written(small)
    change(tensors)
    with pytest.raises(ResNetLabError, match=message):
        bundle.load(forge(tmp_path / "b.safetensors", tensors, fields))


def test_the_weights_of_another_network_under_the_description_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["resnetlab"]
    forge(saved, network(seed=1).state_dict(), text)
    with pytest.raises(ResNetLabError, match="weights do not match the checksum"):
        bundle.load(saved)


@pytest.mark.parametrize(("old", "new"), [("red", "rad"), ("0.1,", "0.2,"), ('"epoch": 2', '"epoch": 3')])
def test_a_description_that_was_altered_is_refused(saved: Path, old: str, new: str) -> None:
    tensors, fields = written(saved)
    forge(saved, tensors, json.dumps(fields, ensure_ascii=False).replace(old, new, 1))
    with pytest.raises(ResNetLabError, match="description does not match the checksum"):
        bundle.load(saved)


def assert_refused(path: Path, content: bytes | bytearray, what: object) -> None:
    path.write_bytes(content)
    try:
        bundle.load(path)
    except ResNetLabError as error:
        assert str(path) in str(error), what
    else:
        pytest.fail(f"loaded in spite of {what}")


def test_every_flipped_bit_is_noticed(saved: Path, small: Path, tmp_path: Path) -> None:
    chance, path = random.Random(0), tmp_path / "b.safetensors"
    for source, count in ((saved, 300), (small, 40)):
        content = source.read_bytes()
        for bit in chance.sample(range(8 * len(content)), count):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            assert_refused(path, damaged, f"bit {bit} of {source}")


def test_every_missing_end_is_noticed(saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "b.safetensors"
    lengths = [*range(20), *range(20, len(content), 37), *range(len(content) - 20, len(content))]
    for length in lengths:
        assert_refused(path, content[:length], f"length {length}")
    for tail in (b"\0", b"\0" * 4096, content):
        assert_refused(path, content + tail, "a longer file")


@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
def test_every_lost_page_is_noticed(small: Path, tmp_path: Path, filler: bytes) -> None:
    content, path = small.read_bytes(), tmp_path / "b.safetensors"
    for start in (0, 4096, 8192, 100 * 4096, len(content) // 4096 * 4096):
        page = content[start : start + 4096]
        assert_refused(path, content[:start] + filler * len(page) + content[start + 4096 :], f"page at {start}")


def test_bare_weights_are_told_apart(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        path = tmp_path / "w.safetensors"
        path.write_bytes(save(network().state_dict(), metadata=metadata))
        with pytest.raises(ResNetLabError, match=r"not their meaning.* resnetlab\.load_weights"):
            bundle.load(path)


class Attack:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.canary,)


def test_a_pickle_under_our_name_is_not_run(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / WEIGHTS
    path.write_bytes(pickle.dumps(Attack(canary)))
    with pytest.raises(ResNetLabError, match="cannot be read as safetensors"):
        bundle.load(tmp_path)
    torch.save({"fc.weight": torch.zeros(1), "x": Attack(canary)}, path)
    with pytest.raises(ResNetLabError, match="cannot be read as safetensors"):
        bundle.load(tmp_path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Attack(canary)))
    assert canary.exists(), "the attack is a real one"


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\0" * 8, b"\xff" * 8, b"<html>404</html>" * 9, b"version https://git-lfs"]
)
def test_what_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ResNetLabError, match="cannot be read as safetensors") as caught:
        bundle.load(tmp_path)
    assert ("(it is empty)" in str(caught.value)) == (content == b"")


@pytest.mark.parametrize("closed", [WEIGHTS, "."])
def test_a_file_or_folder_that_may_not_be_read_is_not_called_missing(
    tmp_path: Path, saved: Path, not_root: Callable[[], None], closed: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(saved, run)
    (run / closed).chmod(0)
    not_root()
    with pytest.raises(ResNetLabError, match=r"cannot be read: permission denied\."):
        bundle.load("run")


def test_what_is_no_run_is_refused_with_a_way_on(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "begun" / "checkpoint").mkdir(parents=True)
    (tmp_path / "model.pth").write_bytes(b"x")
    for run, message in (
        ("folder.safetensors", "is not a run: there is no model.safetensors"),
        ("begun", r"not finished an epoch yet.* resnetlab train --resume .*begun"),
        ("model.pth", "is not a bundle. RUN is a run directory or"),
        ("x" * 300, "There is no run"),
        ("model.pth/x", "There is no run"),
    ):
        with pytest.raises(ResNetLabError, match=message):
            bundle.load(tmp_path / run)


def test_a_missing_run_is_answered_with_its_neighbours(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResNetLabError, match=r"^There is no run nothing\.$"):
        bundle.find("nothing")
    names = ["aa", "bb", "cc", "dd", "ee", "resnet18-cifar10"]
    for name in names:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / WEIGHTS).write_bytes(saved.read_bytes())
    for wanted in ("runs/resnet18-cifar100", "resnet18-cifar-10"):
        with pytest.raises(
            ResNetLabError, match="Runs there: runs/resnet18-cifar10, runs/aa, runs/bb, runs/cc, runs/dd"
        ):
            bundle.find(wanted)


def test_a_network_too_large_for_its_file_takes_no_memory(saved: Path, tmp_path: Path) -> None:
    tensors, fields = written(saved)
    path, side = tmp_path / "b.safetensors", 8000
    asks: list[dict[str, Any]] = [
        {"model": {"name": "linear", "num_classes": 10**9, "image_size": 4}},
        {"model": {"name": "linear", "num_classes": 10**40, "image_size": 4}},
        {"model": {"name": "linear", "num_classes": 3, "in_channels": 10**9, "image_size": 4}},
        {"model": {"name": "linear", "num_classes": 3, "image_size": 10**9}, "preprocess": half(10**9)},
        {"model": {"name": "linear", "num_classes": 3, "image_size": 10**40}, "preprocess": half(10**40)},
        {"model": {"name": "linear", "num_classes": 3, "image_size": side}, "preprocess": half(side)},
        {"model": {"name": "resnet152", "num_classes": 3, "image_size": 4}},
        {"model": {"name": "resnet1202", "num_classes": 3, "image_size": 4}},
        {"model": {"name": "linear", "num_classes": 10**5, "image_size": 4}, "classes": ["x"] * 10**5},
    ]
    bundle.load(saved)  # what is imported on first use is not what is measured
    for ask in asks:
        forge(path, tensors, {**fields, **ask})
        begun = time.perf_counter()
        with (
            little_memory(),
            pytest.raises(ResNetLabError, match=r"disagrees with itself|the limit is|cannot be built") as caught,
        ):
            bundle.load(path)
        assert "allocate memory" not in str(caught.value), "it tried"
        assert time.perf_counter() - begun < 5


def header(values: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        header({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
        header({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}, b"0000"),
        header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F32", "shape": [0, 10**18], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000"),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"),
        header({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        header({"__metadata__": {"resnetlab": 3}}),
        header({"__metadata__": {"resnetlab": "[" * 100_000}}),
        header({"__metadata__": {"resnetlab": '{"data":' * 50_000}}),
        header({"__metadata__": {"resnetlab": '{"schema_number":1,"data":' + '{"a":' * 900 + "1" + "}" * 901}}),
        header({"__metadata__": {"resnetlab": '{"schema_number":' + "1" * 5_000 + "}"}}),
        header({"__metadata__": {"resnetlab": "1"}}),
        header({"__metadata__": {"resnetlab": "null"}}),
        header({"__metadata__": {"resnetlab": '{"schema_number":1}'}}),
        header(b"[" * 100_000),
        header(b'{"a":' * 100_000),
        header(b"{}", length=2**63),
        header(b"{}", length=2**32),
        header(b"\xff\xfe"),
    ],
    ids=range(20),
)
def test_lies_in_the_header_cost_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    begun = time.perf_counter()
    with little_memory(), pytest.raises(ResNetLabError):
        bundle.load(tmp_path)
    assert time.perf_counter() - begun < 2


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A place to write damaged bundles to, and the content of a good one."""
    folder = tmp_path_factory.mktemp("fuzz")
    content = bundle.save(folder, network().state_dict(), card()).read_bytes()
    return folder / "fuzz.safetensors", content


def load_or_refuse(path: Path) -> bundle.Bundle | None:
    try:
        return bundle.load(path)
    except ResNetLabError as error:
        assert str(path) in str(error)
        return None


@given(st.one_of(st.binary(max_size=200), st.builds(header, st.binary(max_size=200), st.binary(max_size=20))))
@settings(deadline=None, max_examples=100)
def test_fuzz_files_of_any_bytes(victim: tuple[Path, bytes], content: bytes) -> None:
    assert_refused(victim[0], content, content)


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_fuzz_damaged_files(victim: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = victim
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 64, len(content))))
        content = content[:start] + data.draw(st.binary(max_size=64)) + content[end:]
    if content != victim[1]:
        assert_refused(path, content, content)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**30, "F8_E4M3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def replace_somewhere(data: st.DataObject, tree: Any) -> Any:
    """Return a JSON tree with one of its values, or a new one, drawn anew."""
    if isinstance(tree, dict) and tree and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(tree)))
        return {**tree, key: replace_somewhere(data, tree[key])}
    if isinstance(tree, dict) and data.draw(st.booleans()):
        return {**tree, data.draw(st.text(max_size=8)): data.draw(JSON)}
    return data.draw(JSON)


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_fuzz_descriptions_with_valid_checksums(victim: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = victim
    path.write_bytes(content)
    tensors, fields = written(path)
    changed = replace_somewhere(data, fields)
    if isinstance(changed, dict):
        forge(path, tensors, changed)
    else:
        forge(path, tensors, json.dumps(changed))
    loaded = load_or_refuse(path)
    if loaded:
        assert same(loaded.model.state_dict(), tensors)
        assert loaded.model(
            torch.zeros(1, loaded.card.preprocess.channels, *[loaded.card.preprocess.size] * 2)
        ).shape == (
            1,
            len(loaded.card.classes),
        )


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_fuzz_safetensors_headers(victim: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = victim
    length = int.from_bytes(content[:8], "little")
    before = json.loads(content[8 : 8 + length])
    changed = replace_somewhere(data, before)
    path.write_bytes(header(changed, content[8 + length :]))
    loaded = load_or_refuse(path)
    if loaded:
        assert same(loaded.model.state_dict(), load(content))


DTYPES = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64"]
DTYPES += ["F64", "I64", "U64", "F4", "F6_E2M3", "F6_E3M2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_any_type_load_or_are_refused(victim: tuple[Path, bytes], dtype: str) -> None:
    path, content = victim
    length = int.from_bytes(content[:8], "little")
    values = json.loads(content[8 : 8 + length])
    for name in ("fc.weight", "fc.bias"):
        values[name]["dtype"] = dtype
    path.write_bytes(header(values, content[8 + length :]))
    assert (load_or_refuse(path) is not None) == (dtype == "F32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_load(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in network(SMALL).state_dict().items()}
    bundle.save(tmp_path, weights, card(SMALL))
    loaded = bundle.load(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[k], v.to(loaded[k].dtype)) for k, v in weights.items())


def test_a_full_disk_leaves_the_old_bundle(small: Path, tmp_path: Path) -> None:
    path = bundle.save(tmp_path, network(SMALL).state_dict(), card(SMALL))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for limit in (0, 5_000, 500_000, len(before[WEIGHTS]) - 1):
        with little_disk(limit), pytest.raises(ResNetLabError, match=f"Cannot write {path}: File too large"):
            bundle.save(tmp_path, network(SMALL, seed=1).state_dict(), card(SMALL))
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def fail_once(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the disk be full at one of the calls of the system, counted from 0."""
    left = itertools.count(-call)

    def failing(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if next(left) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    for name in ("fsync", "replace", "open", "chmod"):
        monkeypatch.setattr(os, name, partial(failing, getattr(os, name)))


@pytest.mark.parametrize("call", range(10))
def test_no_space_at_any_step_leaves_a_whole_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Fails the n-th of all calls that write; the description is the second file of the two."""
    old, new = network().state_dict(), network(seed=1).state_dict()
    bundle.save(tmp_path, old, card())
    fail_once(monkeypatch, call)
    with pytest.raises(ResNetLabError, match=r"No space left on the disk while writing .*model\."):
        bundle.save(tmp_path, new, card())
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [CARD, WEIGHTS]
    assert any(same(bundle.load(tmp_path).model.state_dict(), weights) for weights in (old, new))
    assert json.loads((tmp_path / CARD).read_text())["schema_number"] == 1
    bundle.save(tmp_path, new, card())
    assert same(bundle.load(tmp_path).model.state_dict(), new)


def test_a_reader_meanwhile_sees_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    networks = [network(seed=seed).state_dict() for seed in range(2)]
    bundle.save(tmp_path, networks[0], card(epoch=0))
    done = threading.Event()

    def write() -> None:
        epoch = 0
        while not done.is_set():
            epoch = 1 - epoch
            bundle.save(tmp_path, networks[epoch], card(epoch=epoch))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            loaded = bundle.load(tmp_path)
            assert same(loaded.model.state_dict(), networks[loaded.card.epoch])
    finally:
        done.set()
        writer.join()


def test_other_programs_read_the_weights(saved: Path) -> None:
    assert same(load_file(saved), network().state_dict())
