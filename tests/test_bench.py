"""`resnetlab bench`: what it measures, what it remembers, and what that changes in a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resnetlab import bench, ceilings, runtime, tuning, winograd
from resnetlab.bench import Bench
from resnetlab.errors import ResNetLabError
from resnetlab.tuning import Choice

CPU = torch.device("cpu")
CHOICE = Choice(threads=1, precision="fp32", batch=16, measured="2026-11-24")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(winograd, "_wanted", True)  # put back afterwards: what is measured here may say otherwise
    return tmp_path / "resnetlab" / "bench.json"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure next to nothing."""
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "SHAPES", ((4, 4),))
    monkeypatch.setattr(bench, "TRIAL", ("linear", 4))
    monkeypatch.setattr(bench, "NETWORKS", (("linear", 4, 2, 2),))
    monkeypatch.setattr(bench, "BATCHES", (4, 2))


def cudnn() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32


def test_measures_everything_and_leaves_threads_and_chance_alone(short: None) -> None:
    torch.manual_seed(5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    told: list[str] = []
    switches: list[tuple[bool, bool]] = [cudnn()]

    def tell(what: str) -> None:
        told.append(what)
        switches.append(cudnn())

    found = bench.measure("cpu", tell=tell)
    # What is measured on a GPU is what runs get there: cuDNN's fastest algorithm, and fp32 that is no TF32.
    assert set(switches[1:]) == {(True, False)} and cudnn() == switches[0]
    assert torch.equal(torch.random.get_rng_state(), before) and torch.get_num_threads() == threads
    both = {"convolution"} if winograd.in_use(found.choice.precision) else set()
    assert {t.setting for t in found.trials} == {"threads", "precision", "layout", "batch", *both}
    assert {c.work for c in found.ceilings} == {*ceilings.CEILINGS, "memory"}
    assert all(c.rate > 0 for c in found.ceilings) and all(t.images_per_second > 0 for t in found.trials)
    assert found.speeds[0].model == "linear" and found.speeds[0].share > 0
    assert told[-1] == "linear at 4 px"
    assert json.loads(json.dumps(found.to_dict()))["choice"]["precision"] == found.choice.precision


def test_only_a_clearly_faster_setting_replaces_the_default(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {4: 100.0, 2: 104.0}
    monkeypatch.setattr(bench, "inference_rate", lambda on, name, size, images: rates[images])
    assert bench.choose(CPU)[0].batch == 4
    rates[2] = 106.0
    assert bench.choose(CPU)[0].batch == 2


@pytest.mark.skipif(
    not winograd.in_use(runtime.choose_precision("auto", CPU)), reason="Winograd's algorithm is not in use here"
)
def test_the_algorithm_of_convolutions_is_measured_and_put_back(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {True: 100.0, False: 106.0}
    monkeypatch.setattr(bench, "training_rate", lambda *given, **layout: speed[winograd.wanted()])
    assert bench.measure("cpu").choice.convolution == "direct" and winograd.wanted()
    speed[False] = 104.0
    assert bench.measure("cpu").choice.convolution == "winograd" and winograd.wanted()


def test_a_run_takes_what_was_remembered_for_this_machine_and_says_so() -> None:
    assert runtime.setup("cpu").note == ""
    tuning.remember(runtime.identity(CPU), CHOICE)
    tuning.remember("another machine", CHOICE.model_copy(update={"batch": 99}))
    threads = torch.get_num_threads()
    try:
        found = runtime.setup("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert found.batch == 16 and found.note == "`resnetlab bench` of 2026-11-24"


def test_a_precision_or_thread_count_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.remember(runtime.identity(CPU), CHOICE.model_copy(update={"precision": "bf16", "threads": 4096}))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads = torch.get_num_threads()
    assert runtime.setup("cpu", "fp32").precision.name == "fp32"
    assert runtime.setup("cpu").precision.name == "bf16"
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "\udcff"])
def test_a_damaged_file_counts_as_none(own_cache: Path, content: str) -> None:
    own_cache.parent.mkdir()
    own_cache.write_bytes(content.encode(errors="surrogateescape"))
    assert tuning.recall("x") is None
    tuning.remember("x", CHOICE)
    assert tuning.recall("x") == CHOICE
    assert tuning.forget("x") and not tuning.forget("x") and tuning.recall("x") is None


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(own_cache: Path) -> None:
    own_cache.parent.write_text("in the way")
    with pytest.raises(ResNetLabError, match=r"bench\.json"):
        tuning.remember("x", CHOICE)


def test_the_command_shows_remembers_and_forgets(
    short: None, own_cache: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, _ = command("bench", "--device", "cpu")
    assert status == 0 and "convolution" in out and "linear at 4 px" in out and "chosen" in out
    assert tuning.recall(runtime.identity(CPU)) is not None
    status, out, _ = command("bench", "--device", "cpu", "--json")
    assert status == 0 and set(json.loads(out)) == set(Bench.__dataclass_fields__)
    assert command("bench", "--device", "cpu", "--forget")[1] == "Forgotten.\n"
    assert "nothing" in command("bench", "--device", "cpu", "--forget")[1]
    assert command("bench", "--device", "nowhere")[0] == 2


def test_a_network_that_does_not_fit_is_measured_with_fewer_images(
    short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(on: runtime.Runtime, name: str, size: int, images: int) -> float:
        if images > 3:
            raise RuntimeError("CUDA out of memory.")
        return 100.0 * images

    monkeypatch.setattr(bench, "training_rate", rate)
    monkeypatch.setattr(bench, "inference_rate", lambda on, name, size, images: 1.0)
    on = bench.on(CPU, "fp32", 1)
    peaks = [ceilings.Ceiling(work="convolution", precision="fp32", rate=1e9)]
    assert bench.speed("linear", 4, 8, on, peaks).training == 200
    monkeypatch.setattr(bench, "inference_rate", lambda on, name, size, images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.speed("linear", 4, 2, on, peaks)
