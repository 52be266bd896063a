"""Device, precision and seeds: what is chosen on which machine, and what is said when it cannot be had."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from resnetlab import api, runtime
from resnetlab.console import Quiet
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.runtime import Precision, choose_device, choose_precision, keyed_generator

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> "Machine":
    return Machine(monkeypatch)


class Machine:
    """A computer with the accelerators that a test gives it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.has()

    def has(self, *, cuda: int = 0, xpu: bool = False, mps: bool = False, capability: tuple[int, int] = (8, 0)) -> None:
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        self.monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
        self.monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    def cpu(self, *, amx: bool, avx512_bf16: bool) -> None:
        self.monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        self.monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)


def test_auto_takes_the_best_device(machine: Machine) -> None:
    assert choose_device() == CPU
    machine.has(mps=True)
    assert choose_device() == torch.device("mps")
    machine.has(mps=True, xpu=True)
    assert choose_device("auto") == torch.device("xpu")
    machine.has(mps=True, xpu=True, cuda=1)
    assert choose_device() == torch.device("cuda")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "mps", "xpu", "meta", "gpu", "", "CPU:x"])
def test_a_device_that_is_not_here_is_refused_with_what_is(machine: Machine, wanted: str) -> None:
    with pytest.raises(UsageError, match=rf'no device "{wanted}" here\. This machine has: cpu\.'):
        choose_device(wanted)


def test_the_number_of_a_gpu_is_checked(machine: Machine) -> None:
    machine.has(cuda=2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match=r'no device "cuda:2" here\. This machine has: cuda, cpu\.'):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "expected"), [(True, True, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_a_cpu_takes_bf16_only_with_instructions_for_it(
    machine: Machine, amx: bool, avx512_bf16: bool, expected: str
) -> None:
    machine.cpu(amx=amx, avx512_bf16=avx512_bf16)
    assert choose_precision("auto", CPU) == expected
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"


def test_a_torch_without_the_probes_is_taken_for_a_cpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert choose_precision("auto", CPU) == "fp32"


def test_precision_of_accelerators(machine: Machine) -> None:
    machine.has(cuda=1, capability=(8, 0))
    assert choose_precision("auto", torch.device("cuda")) == "bf16"
    machine.has(cuda=1, capability=(7, 5))  # a Tesla T4
    assert choose_precision("auto", torch.device("cuda")) == "fp16"
    assert choose_precision("auto", torch.device("xpu")) == "bf16"
    machine.cpu(amx=True, avx512_bf16=True)
    assert choose_precision("auto", torch.device("mps")) == "fp32"


def test_precisions_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UsageError, match=r"CPU cannot train in fp16.*precision=bf16"):
        choose_precision("fp16", CPU)
    with pytest.raises(UsageError, match='Unknown precision "fp8"'):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_policy_decides_what_convolutions_compute_in(name: str, dtype: torch.dtype) -> None:
    precision = Precision(name, CPU)
    convolution = nn.Conv2d(3, 4, 3)
    with precision.autocast():
        assert convolution(torch.zeros(1, 3, 8, 8)).dtype == dtype
    assert convolution.weight.dtype == torch.float32


@pytest.mark.parametrize("clip", [0.0, 1.0, 1000.0])
def test_a_step_clips_descends_and_clears(clip: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    Precision("fp32", CPU).step((weight * torch.tensor([3.0, 4.0])).sum(), optimizer, clip)
    factor = 1 / 5 if clip == 1 else 1  # the gradient's norm is 5
    assert weight.tolist() == pytest.approx([1 - 0.3 * factor, 2 - 0.4 * factor], rel=1e-5)
    assert weight.grad is None


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run outside any process group, and put torch's switches back afterwards."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("deterministic", [True, False])
def test_setup_on_a_cpu(deterministic: bool) -> None:
    made = runtime.setup("cpu", "fp32", deterministic=deterministic)
    assert (made.device, made.precision.name, made.rank, made.world_size) == (CPU, "fp32", 0, 1)
    assert made.is_main
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert made.sum(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    model = made.place(nn.Conv2d(3, 4, 3))
    assert isinstance(model, nn.Conv2d)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("alone")
def test_a_deterministic_run_does_not_make_the_next_one_deterministic(tmp_path: Path) -> None:
    def states() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark

    before = states()
    during: list[bool] = []

    class Watch(Quiet):
        def line(self, text: str) -> None:
            during.append(torch.are_deterministic_algorithms_enabled())

    settings = ("epochs=1", "batch_size=512", "deterministic=true")
    api.train("digits", model="linear", out=tmp_path / "one", display=Watch(), settings=settings)
    assert during and all(during)
    assert states() == before
    torch.use_deterministic_algorithms(True, warn_only=True)  # the caller's own choice stays
    with pytest.raises(UsageError):
        api.train("digits", out=tmp_path / "two", display=Quiet(), deterministic=False, epochs=-1)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    threads = torch.get_num_threads()
    with runtime.undisturbed():
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads + 1)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_num_threads() == threads


KEY = (0, 3, "order")
DRAWN = f"from resnetlab.runtime import keyed_generator as g; print(g(*{KEY!r}).initial_seed())"


def test_a_keyed_generator_is_the_same_in_every_process() -> None:
    here = keyed_generator(*KEY)
    assert here.initial_seed() == 6162504763147103109  # a change here changes every run that was ever made
    assert torch.randperm(8, generator=here).tolist() == [6, 0, 3, 7, 1, 4, 5, 2]
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "1"}
    there = subprocess.run(
        [sys.executable, "-c", DRAWN], env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert int(there.stdout) == here.initial_seed()


def test_keyed_generators_differ_by_key_and_ignore_the_global_one() -> None:
    keys: list[tuple[object, ...]] = [
        (seed, epoch, what) for seed in range(10) for epoch in range(10) for what in ("order", "augment")
    ]
    keys += [(), (1,), ("1",), (1, 1), (11,), (1, "1"), ("1, 1",)]
    assert len({keyed_generator(*key).initial_seed() for key in keys}) == len(keys)
    torch.manual_seed(1)
    first = torch.rand(4, generator=keyed_generator(7))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(4, generator=keyed_generator(7)))


def test_the_machine_is_described(machine: Machine) -> None:
    assert runtime.cpu_name()
    assert runtime.cpu_name() in runtime.machine(CPU)
    assert runtime.total_memory() > 2**28
    assert {"resnetlab", "python", "torch", "numpy"} <= runtime.versions().keys()


def test_a_placed_model_keeps_its_tensors_so_that_threads_can_share_it() -> None:
    machine = runtime.setup("cpu", "fp32")
    model = machine.place(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4))
    )
    assert model.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    before = [t.data_ptr() for t in model.state_dict().values()]
    assert [t.data_ptr() for t in machine.place(model).state_dict().values()] == before


@pytest.mark.parametrize(
    "message",
    [
        "Application timeout caused pair closure",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:31933",
        "NCCL error: unhandled system error",
        "wait timeout after 30000ms, keys: /cpu//cpu/1/0",
    ],
)
def test_a_process_that_is_gone_is_said_without_a_traceback(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def gone(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("resnetlab.session.plan", gone)
    with pytest.raises(RuntimeError, match=message.partition(" ")[0].replace("[", r"\[")):
        api.train("digits", display=Quiet())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResNetLabError, match="Another process of this run has ended"):
        api.train("digits", display=Quiet())
