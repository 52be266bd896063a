"""3×3 convolutions by Winograd's algorithm against PyTorch's own, and what happens where it cannot be compiled."""

import copy
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import resnetlab as rl
from resnetlab import models, runtime, tuning, winograd
from resnetlab.cli import training
from resnetlab.config import ModelConfig
from resnetlab.errors import UsageError
from resnetlab.models.fast import MirrorConv2d
from resnetlab.native import build, functions
from resnetlab.runtime import Precision, Runtime

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(winograd, "LEAST_TILES", 32)  # the batches here are small
    threads = torch.get_num_threads()
    yield
    winograd.use(True)
    torch.set_num_threads(threads)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with nothing in it, and a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    yield tmp_path / "resnetlab"
    build.library.cache_clear()


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    """Each precision that the algorithm is there for on this machine."""
    if not winograd.in_use(request.param):
        pytest.skip(f"{request.param}: {winograd.state(request.param)}")
    return Precision(request.param, CPU)


def both(conv: nn.Conv2d, x: Tensor, precision: Precision) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients (input, weights, bias), ours and those of the same layer in double precision."""
    found = []
    for layer, images in ((conv, x.to(precision.dtype, copy=True)), (copy.deepcopy(conv).double(), x.double())):
        winograd.adopt(layer)
        images.requires_grad_()
        with precision.autocast() if layer is conv else nullcontext():
            out = layer(images)
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found.append([out.detach(), *torch.autograd.grad(out, [images, *layer.parameters()], slope)])
    return found[0], found[1]


ERROR = {"fp32": 3e-5, "bf16": 3e-2}
"""Of all values together, relative to their norm."""


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("images", "channels", "filters", "height", "width"),
    [(2, 16, 16, 32, 32), (40, 24, 40, 3, 3), (9, 64, 192, 7, 5), (3, 40, 24, 13, 18), (33, 128, 64, 4, 4)],
)
def test_results_and_gradients_are_those_of_a_direct_convolution(
    threads: int, images: int, channels: int, filters: int, height: int, width: int, precision: Precision
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    conv, x = nn.Conv2d(channels, filters, 3, padding=1), torch.randn(images, channels, height, width)
    ours, exact = both(conv, x, precision)
    assert [a.dtype for a in ours] == [precision.dtype] * 2 + [torch.float32] * 2
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape and float((a - b).norm() / b.norm()) < ERROR[precision.name]


@pytest.mark.parametrize("side", [2, 8])
def test_a_convolution_of_tied_filters_is_computed_as_one_of_all_of_them(side: int, precision: Precision) -> None:
    torch.manual_seed(0)
    tied, x = MirrorConv2d(192, 192), torch.randn(128, 192, side, side)
    plain = nn.Conv2d(192, 192, 3, padding=1, bias=False)
    plain.weight.data = tied.filters().detach()
    (out, of_x, of_weight), exact = (both(conv, x, precision)[index] for index, conv in enumerate((tied, plain)))
    of_both = exact[2]
    first, second = of_both[96:].flip(3).chunk(2, dim=1)
    expected = (exact[0], exact[1], of_both[:96] + torch.cat([second, first], dim=1))
    for a, b in zip((out, of_x, of_weight), expected, strict=True):
        assert a.shape == b.shape and float((a - b).norm() / b.norm()) < ERROR[precision.name]


@pytest.mark.parametrize("bias", [True, False])
def test_images_of_two_by_two_pixels_are_multiplied_with_one_matrix(
    bias: bool, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    taken = Mock(wraps=winograd.two_by_two)
    monkeypatch.setattr(winograd, "two_by_two", taken)
    conv, x = nn.Conv2d(192, 200, 3, padding=1, bias=bias), torch.randn(128, 192, 2, 2)
    ours, exact = both(conv, x, precision)
    assert taken.call_count == 1
    assert [a.dtype for a in ours] == [precision.dtype] * 2 + [torch.float32] * (1 + bias)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape and float((a - b).norm() / b.norm()) < ERROR[precision.name] / 3
    both(conv, x[:100], precision)
    assert taken.call_count == 1  # too few images


WITHOUT_PYTORCH = """
import ctypes, sys
import numpy as np

images, side, channels, filters = 5, 12, 16, 24
library, size = ctypes.CDLL(sys.argv[1]), ctypes.c_long
library.winograd_scratch.restype = size
library.winograd_forward.argtypes = [ctypes.c_void_p] * 5 + [size] * 6
rng = np.random.default_rng(0)
x = rng.standard_normal((images, side, side, channels), "f")
w = rng.standard_normal((filters, 3, 3, channels), "f")
outputs = []
for threads in (1, 3):
    room = np.empty(library.winograd_scratch(size(channels), size(filters), size(threads)), "f")
    outputs.append(np.empty((images, side, side, filters), "f"))
    arrays = [a.ctypes.data for a in (x, w, outputs[-1])]
    library.winograd_forward(*arrays, None, room.ctypes.data, images, side, side, channels, filters, threads)
assert "torch" not in sys.modules and np.abs(outputs[0]).sum() > 0
assert np.array_equal(*outputs)
"""


@needs_compiler
def test_threads_of_its_own_compute_the_same_where_pytorch_has_none_to_lend() -> None:
    assert build.library("fp32")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTORCH, str(build.place("fp32"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 13), (7, 5), (6, 4)])
def test_outputs_that_are_pooled_on_their_way_are_those_of_a_max_pool(
    threads: int, height: int, width: int, precision: Precision
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    conv, x = nn.Conv2d(24, 40, 3, padding=1), torch.randn(20, 24, height, width, dtype=precision.dtype)
    x.requires_grad_()
    winograd.adopt(conv)
    with precision.autocast():
        two_steps, pooled = F.max_pool2d(conv(x), 2), winograd.conv_max_pool(conv, x)
    assert torch.equal(pooled, two_steps) and pooled.is_contiguous(memory_format=torch.channels_last)
    slope = torch.randn(pooled.shape).to(pooled)
    found, expected = (torch.autograd.grad(out, [x, *conv.parameters()], slope) for out in (pooled, two_steps))
    for a, b in zip(found, expected, strict=True):
        # Sums in another order; two that differ in fp32, so that one is the larger, may be the same in bf16.
        assert float((a - b).norm() / b.norm()) < (1e-5 if precision.name == "fp32" else 0.1)


def test_a_pool_takes_the_first_of_equals_and_not_a_number_before_all(precision: Precision) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.zeros(9, 16, 8, 8, dtype=precision.dtype)
    winograd.adopt(conv)
    x[3, 2, 4, 4] = torch.nan
    with precision.autocast():
        two_steps, pooled = F.max_pool2d(conv(x), 2), winograd.conv_max_pool(conv, x)
    assert pooled.isnan().any() and torch.equal(pooled.isnan(), two_steps.isnan())
    slope = torch.randn(pooled.shape).to(pooled)
    for a, b in zip(
        *(torch.autograd.grad(out, [*conv.parameters()], slope) for out in (pooled, two_steps)), strict=True
    ):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_pool_is_pytorchs_where_the_algorithm_does_not_suit_or_a_hook_waits() -> None:
    torch.manual_seed(0)
    conv, x, seen = nn.Conv2d(16, 16, 3, padding=1), torch.randn(8, 16, 8, 8), []
    winograd.adopt(conv)
    with functions.plain():
        expected = F.max_pool2d(conv(x), 2)
        assert torch.equal(winograd.conv_max_pool(conv, x), expected)
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(winograd.conv_max_pool(conv, x), expected, rtol=1e-4, atol=1e-4)
    assert seen == [(8, 16, 8, 8)]
    everywhere = nn.modules.module.register_module_forward_hook(lambda *called: seen.append(called[2].shape))
    try:
        winograd.conv_max_pool(copy.deepcopy(conv), x)
    finally:
        everywhere.remove()
    assert seen[1:] == [(8, 16, 8, 8)] * 2


@needs_compiler
@pytest.mark.parametrize("name", ["resnet20", "mirror-small"])
def test_an_exported_network_takes_any_number_of_images(name: str) -> None:
    cpu = torch.device("cpu")
    network = Runtime(device=cpu, precision=Precision("fp32", cpu)).place(models.create_model(name)).eval()
    x = torch.randn(4, 3, 32, 32)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("images")},)).module()
    more = torch.randn(9, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported(more), network(more), rtol=1e-3, atol=1e-3)


@needs_compiler
def test_filters_that_lie_elsewhere_are_pytorchs_to_refuse() -> None:
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(8, 16, 8, 8)
    winograd.adopt(conv)
    assert isinstance(conv, winograd.WinogradConv2d) and conv.suits(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not conv.suits(mode.from_tensor(x))
    conv.to("meta")
    assert not conv.suits(x)


@needs_compiler
def test_the_result_is_fp32_whatever_new_tensors_are_by_default() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(8, 16, 8, 8)
    winograd.adopt(conv)
    expected = conv(x)
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(conv(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_tensors_may_lie_at_any_address(precision: Precision) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)
    winograd.adopt(conv)
    room = torch.empty(1 + 8 * 8 * 8 * 16, dtype=precision.dtype)
    x = room[1:].view(8, 8, 8, 16).permute(0, 3, 1, 2).copy_(torch.randn(8, 16, 8, 8))
    assert x.data_ptr() % 32 and x.is_contiguous(memory_format=torch.channels_last)
    with precision.autocast():
        assert torch.equal(conv(x), conv(x.clone(memory_format=torch.channels_last)))


def test_the_same_bits_each_time_whatever_the_layout_of_the_images(precision: Precision) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    conv, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(5, 16, 12, 12)
    first, _ = both(conv, x, precision)
    for again in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, both(conv, again, precision)[0], strict=True))


def test_images_that_need_no_gradient_get_none_and_what_is_not_finite_stays_so(precision: Precision) -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    winograd.adopt(conv)
    x = torch.randn(4, 16, 12, 12)
    x[1, 3, 5, 5] = torch.nan
    x[2, 3, 5, 5] = torch.inf
    with precision.autocast():
        out = conv(x)
    assert out.dtype is precision.dtype
    assert out.grad_fn is not None
    assert not out[1, :, 4:7, 4:7].isfinite().any() and not out[2, :, 4:7, 4:7].isfinite().any()
    assert out[[0, 3]].isfinite().all()
    out.nan_to_num(0.0, 0.0, 0.0).sum().backward()
    assert x.grad is None and conv.weight.grad is not None and not conv.weight.grad.isfinite().all()


@needs_compiler
def test_only_layers_and_calls_that_suit_are_changed() -> None:
    torch.manual_seed(0)
    suiting = nn.Conv2d(16, 16, 3, padding=1)
    other = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 20, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 1),
    ]
    model = nn.ModuleList([suiting, *other])
    before = copy.deepcopy(model.state_dict())
    winograd.adopt(model)
    assert [type(m) for m in model] == [winograd.WinogradConv2d, *[nn.Conv2d] * len(other)]
    assert list(model.state_dict()) == list(before)
    assert type(copy.deepcopy(model)[0]) is winograd.WinogradConv2d

    x = torch.randn(8, 16, 8, 8)
    direct = F.conv2d(x, suiting.weight, suiting.bias, padding=1)
    assert not torch.equal(suiting(x), direct)
    torch.testing.assert_close(suiting(x), direct)
    few = torch.randn(7, 16, 8, 8)  # 28 tiles
    assert torch.equal(suiting(few), F.conv2d(few, suiting.weight, suiting.bias, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert suiting(x).dtype is torch.bfloat16
    with functions.plain():
        assert torch.equal(suiting(x), direct)
    assert winograd.wanted()
    with pytest.raises(RuntimeError, match="channels"):
        suiting(torch.randn(8, 17, 8, 8))


def test_a_network_that_is_placed_on_a_cpu_trains_alike(precision: Precision) -> None:
    """The loss trace beside fp32 without it; rounding grows from step to step, so the first are close and no more."""
    traces = []
    for wanted, arithmetic in ((True, precision), (False, Precision("fp32", CPU))):
        winograd.use(wanted)
        torch.manual_seed(0)
        model = models.build(ModelConfig(name="fast-small", num_classes=10, image_size=32))
        Runtime(device=CPU, precision=arithmetic).place(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
        images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
        trace = []
        for _ in range(6):
            with arithmetic.autocast():
                loss = F.cross_entropy(model(images), labels)
            arithmetic.step(loss, optimizer, clip=0.0)
            trace.append(loss.item())
        traces.append(trace)
    ours, reference = traces
    assert ours != reference, "both took the same path"
    first, later = {"fp32": (1e-5, 2e-3), "bf16": (5e-3, 5e-2)}[precision.name]
    assert ours == pytest.approx(reference, rel=later) and ours[0] == pytest.approx(reference[0], rel=first)
    assert reference[-1] < reference[0]


@pytest.mark.slow
def test_a_run_ends_at_the_same_accuracy(tmp_path: Path, precision: Precision) -> None:
    """As one in fp32 without it."""
    scores = []
    for wanted, name in ((True, precision.name), (False, "fp32")):
        winograd.use(wanted)
        out = tmp_path / str(wanted)
        run = rl.train("digits", model="resnet20", recipe="default", epochs=8, device="cpu", precision=name, out=out)
        scores.append(run.evaluate("digits").top1)
        assert winograd.wanted() is wanted
    assert min(scores) > 0.95 and abs(scores[0] - scores[1]) < 0.02


@needs_compiler
def test_compiled_once_and_kept(own_cache: Path) -> None:
    assert winograd.in_use() and winograd.state() == "winograd"
    kept = build.place("fp32")
    assert kept.parent == own_cache and [path.name for path in own_cache.iterdir()] == [kept.name]
    written = kept.stat().st_mtime_ns
    build.library.cache_clear()
    assert winograd.in_use() and kept.stat().st_mtime_ns == written


@needs_compiler
def test_compiled_beside_what_comes_next(own_cache: Path) -> None:
    build.begin("fp16")  # there is no such library
    assert not compiling()
    build.begin("fp32")
    (thread,) = compiling()
    assert not build.place("fp32").exists()
    assert winograd.in_use(), "waited for"
    thread.join()
    build.place("fp32").unlink()
    build.library.cache_clear()
    build.begin("fp32")
    compiling()[0].join()
    assert build.library.cache_info().currsize == 0, "loaded before it is asked for"
    assert list(own_cache.iterdir()) == [build.place("fp32")]
    build.begin("fp32")
    assert not compiling()


def compiling() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == build.COMPILING]


@pytest.mark.parametrize(
    ("words", "begun"),
    [
        ([], ["bf16"]),
        (["device=cpu", "precision=fp32"], ["fp32"]),
        (["precision=auto"], ["bf16"]),
        (["device=cuda"], []),
    ],
)
def test_train_begins_with_the_compiler(words: list[str], begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the precision that is named, or that this processor is likely to compute in."""
    monkeypatch.setattr(build, "likely_precision", lambda: "bf16")
    monkeypatch.setattr(build, "begin", begin := Mock())
    with pytest.raises(UsageError, match="no data"):
        training.train("there-is-no-such-data", *words)
    assert [names.args[0] for names in begin.call_args_list] == begun


def test_the_likely_precision_is_what_will_be_chosen_on_this_machine() -> None:
    assert build.likely_precision() == runtime.choose_precision("auto", CPU)


def pretend(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a shell script the compiler that is asked."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return path


@pytest.mark.skipif(os.name != "posix", reason="a script as a compiler")
def test_a_process_that_ends_does_not_wait_for_the_compiler(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does at once that was given data that is not there; nothing is left in the cache, not even the reason."""
    compiler = pretend(tmp_path / "slow", ': > "$0.begun"\nsleep 100', monkeypatch)
    code = f"""
import pathlib, time
from resnetlab.native import build
build.begin("fp32")
while not pathlib.Path({str(compiler)!r} + ".begun").exists():
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert list(own_cache.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="a script as a compiler")
def test_a_compiler_that_is_interrupted_is_asked_again(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "interrupted"
    compiler.write_text("#!/bin/sh\nkill -KILL $$\n")  # Ctrl-C's may be ignored, as by what runs in the background
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    assert not winograd.in_use() and list(own_cache.iterdir()) == []


def test_without_a_compiler_a_convolution_is_pytorchs(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(own_cache))
    assert not winograd.in_use() and winograd.state() == "direct (a C++ compiler, such as g++, is missing)"
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(8, 16, 8, 8)
    direct = conv(x)
    winograd.adopt(conv)
    assert torch.equal(conv(x), direct)


@pytest.mark.skipif(os.name != "posix", reason="a script as a compiler")
def test_a_compiler_that_fails_is_asked_once(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'echo asked >> "$0.log"\necho "no such instruction" >&2\nexit 1'
    compiler = pretend(tmp_path / "broken", said, monkeypatch)
    for _ in range(2):
        build.library.cache_clear()
        assert not winograd.in_use() and str(build.failure("fp32")) in winograd.state()
    assert (tmp_path / "broken.log").read_text().split() == ["asked"]
    assert list(own_cache.iterdir()) == [build.failure("fp32")]
    kept = build.failure("fp32").read_text()
    assert str(compiler) in kept and "no such instruction" in kept


@pytest.mark.skipif(os.name != "posix", reason="a script as a compiler")
def test_a_compiler_that_had_no_room_is_asked_again(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = 'test "$LC_ALL" = C && echo "ld: final link failed: No space left on device" >&2\nexit 1'
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    pretend(tmp_path / "full", said, monkeypatch)
    assert not winograd.in_use() and not build.failure("fp32").exists()


def test_a_cache_that_may_not_be_looked_into_leaves_convolutions_to_pytorch(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, **_: object) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    build.begin("fp32")
    assert not winograd.in_use() and "cannot be kept in the cache" in winograd.state()


def test_a_damaged_library_and_the_variable_switch_it_off(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.place("fp32").parent.mkdir()
    build.place("fp32").write_bytes(b"not a library")
    assert not winograd.in_use() and f"see {build.place('fp32')}" in winograd.state()
    monkeypatch.setenv("RESNETLAB_NATIVE", "0")
    build.place("fp32").unlink()
    build.library.cache_clear()
    assert winograd.state() == "direct (RESNETLAB_NATIVE=0)" and list(own_cache.iterdir()) == []


def test_what_bench_found_slower_is_switched_off(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    choice = tuning.Choice(threads=1, precision="fp32", batch=16, convolution="direct", measured="2026-11-25")
    tuning.remember(runtime.identity(CPU), choice)
    with runtime.undisturbed():
        assert runtime.setup("cpu").convolutions == "direct (switched off)"
    assert winograd.wanted()
    tuning.remember(runtime.identity(CPU), choice.model_copy(update={"convolution": "winograd"}))
    winograd.use(False)
    runtime.setup("cpu")
    assert winograd.wanted()
