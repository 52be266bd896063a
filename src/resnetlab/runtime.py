"""The machine a run meets: device, precision, threads, seeds, the allocator, the process group.

Nothing here acts on import; `setup` is called once by whoever starts work.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from resnetlab import __version__, narrow, norms, tuning, winograd
from resnetlab.errors import ResNetLabError, UsageError, unknown
from resnetlab.threads import cores

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""The variable that cuBLAS reads: with a workspace of fixed size its results do not change from call to call."""


T = TypeVar("T")
NHWC = torch.channels_last
PLACING = threading.Lock()


class Precision:
    """The arithmetic of a run. The loop calls `autocast` and `step`, and never asks which precision it is.

    fp32 is the reference. bf16 and fp16 run convolutions and matrix products in 16 bits (torch.autocast) over fp32
    weights and statistics; fp16 also scales the loss.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        """Return the context for a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")

    def step(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        clip: float,
        inspect: Callable[[], object] = bool,
    ) -> None:
        """Backward pass, gradient clipping to norm ``clip`` (0: none), optimiser step, gradients cleared.

        ``inspect`` is called when the gradients are there and nothing has been done with them.
        """
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        inspect()
        if clip:
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how this process computes."""

    device: torch.device
    precision: Precision
    rank: int = 0
    world_size: int = 1
    batch: int = 250
    """Images at a time when a split is predicted; alters nothing but the speed, and logits by rounding."""
    note: str = ""
    """What was chosen by measuring, for people; empty where nothing was."""

    @property
    def convolutions(self) -> str:
        """How 3×3 convolutions are computed, for people and for the record: ``winograd``, or ``direct`` and why."""
        return winograd.state(self.precision.name) if self.device.type == "cpu" else "direct"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, its 4-D weights in channels-last order (NHWC), and return it.

        NHWC is what oneDNN, cuDNN's tensor cores and MPS compute in; NCHW costs a reordering at every convolution.
        On a CPU its convolutions may take another algorithm (`resnetlab.winograd`) or be kept from a fault
        (`resnetlab.narrow`), and its batch norms may be computed together with what follows them (`resnetlab.norms`).
        """
        if self.device.type == "cpu":
            winograd.adopt(model)
            norms.adopt(model)
            narrow.adopt(model)
        with PLACING:  # tensors must not be replaced while another thread computes with them
            tensors = [*model.parameters(), *model.buffers()]
            if all(t.device == self.device and (t.ndim != 4 or t.is_contiguous(memory_format=NHWC)) for t in tensors):
                return model
            return model.to(self.device).to(memory_format=NHWC)

    def share(self, thing: T, process: int = 0) -> T:
        """Give every process what one of them has, by default the main one."""
        if self.world_size == 1:
            return thing
        box = [thing]
        torch.distributed.broadcast_object_list(box, process)
        return box[0]

    def each(self, value: float) -> list[float]:
        """Return the number that every process has, by rank; in each the same."""
        values = torch.zeros(self.world_size, device=self.device)
        values[self.rank] = value
        found: list[float] = self.sum(values).tolist()
        return found

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main process's batch-norm statistics: each has gathered those of its own images.

        All of them must score with one network, the one that is saved.
        """
        if self.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over all processes; each gets the sum."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values


def setup(device: str = "auto", precision: str = "auto", *, deterministic: bool = False) -> Runtime:
    """Choose the device and the precision, and make the process ready for work.

    Under ``torchrun`` (WORLD_SIZE > 1 in the environment) the process joins the group: NCCL on CUDA, else Gloo.

    Raises:
        UsageError: The device does not exist here, or does not know the precision.
    """
    keep_freed_memory()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = choose_device(device)
    if world_size > 1:
        if chosen.type == "cuda":
            chosen = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            torch.cuda.set_device(chosen)
        if not torch.distributed.is_initialized():
            join_group("nccl" if chosen.type == "cuda" else "gloo")
    set_switches(deterministic=deterministic)
    fastest = tuning.recall(identity(chosen))
    if fastest and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, and so may the user
        torch.set_num_threads(fastest.threads)
    if fastest:
        winograd.use(fastest.convolution == "winograd")
    found = Runtime(
        device=chosen,
        precision=Precision(agreed(choose_precision(precision, chosen, fastest), world_size), chosen),
        rank=rank,
        world_size=world_size,
    )
    if fastest is None:
        return found
    return replace(found, batch=fastest.batch, note=f"`resnetlab bench` of {fastest.measured}")


def agreed(precision: str, world_size: int) -> str:
    """Return the weakest of what the processes have chosen, in each: their machines may differ, their losses must not.

    One that scales its loss (fp16) would add its gradients to those of others that do not.
    """
    if world_size == 1:
        return precision
    names = [""] * world_size
    torch.distributed.all_gather_object(names, precision)
    return next(name for name in ("fp32", "fp16", "bf16") if name in names)


def set_switches(*, deterministic: bool = False) -> None:
    """Make PyTorch compute as every run does: the fastest way, or one that repeats itself, and fp32 in fp32."""
    if deterministic:
        os.environ.setdefault(CUBLAS, ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # fp32 is the reference; who wants to be fast has 16 bits


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compute on our own terms, and put back afterwards all that `setup` and a run change of the process.

    Whoever calls us from Python may have chosen another dtype or device for new tensors, switched gradients off or
    autocast on. And a run is not to reach into the next, nor into the caller's random numbers and switches.
    """
    dtype, threads, workspace = torch.get_default_dtype(), torch.get_num_threads(), os.environ.get(CUBLAS)
    strict = _determinism()
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    wanted = winograd.wanted()
    seeded = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with contextlib.ExitStack() as terms:
        terms.enter_context(torch.random.fork_rng(devices=seeded))
        terms.enter_context(torch.inference_mode(False))
        terms.enter_context(torch.enable_grad())
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda", "xpu", "mps")):
            terms.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # the context slows every call of PyTorch's
            terms.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            if strict != _determinism():  # importing what that needs takes a second
                torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32
            winograd.use(wanted)
            if workspace is None:
                os.environ.pop(CUBLAS, None)


def join_group(backend: str) -> None:
    """Join the process group that torchrun has described in the environment.

    torchrun keeps one store through all its restarts, so a process that it has started again would read the addresses
    of those that are gone, and wait for them (pytorch/pytorch#135712): each start gets names of its own in the store.
    With several nodes the count of restarts is each node's own, and cannot name them.

    Raises:
        ResNetLabError: The processes do not find each other in time.
        UsageError: The environment does not say where they are.
    """
    timeout = group_timeout()
    from torch.distributed.rendezvous import rendezvous

    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store = torch.distributed.distributed_c10d.PrefixStore(f"start-{start}", store)
        torch.distributed.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    except ValueError as error:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, so this would be one of several processes, but it cannot join "
            f"the others ({error}). Start them with torchrun, or unset WORLD_SIZE."
        ) from error
    except RuntimeError as error:
        raise ResNetLabError(
            f"The processes of this run did not find each other in {timeout.total_seconds():.0f} s. Start all again; "
            "RESNETLAB_GROUP_SECONDS=... makes them wait longer."
        ) from error


def group_timeout() -> timedelta:
    """Return how long a process waits for the others: ``RESNETLAB_GROUP_SECONDS``, by default ten minutes.

    The longest that they may be apart is the main process's drawing and saving; one that hangs is given up then.
    """
    text = os.environ.get("RESNETLAB_GROUP_SECONDS", "600")
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f'RESNETLAB_GROUP_SECONDS is "{text}", but must be a whole number of seconds.')
    return timedelta(seconds=int(text))


def lost_group(error: BaseException) -> bool:
    """Whether an error means that another process of the group is gone, or does not answer in time.

    What is raised differs from call to call: some have a class of their own, most are a ``RuntimeError`` with a
    message of gloo's or NCCL's, which does not always name them.
    """
    signs = ("gloo", "nccl", "pair closure", "by peer", "broken pipe", "timed out waiting", "wait timeout")
    known = isinstance(error, getattr(torch.distributed, "DistError", ()))
    said = isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and (known or said)


def leave_group() -> None:
    """Leave the process group, if this process is in one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device called ``wanted``, or the best one here: cuda, xpu, mps, cpu.

    Raises:
        UsageError: There is no such device on this machine.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, here in present.items() if here))
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    beyond = device is not None and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if device is None or beyond or not present.get(device.type, False):
        here = ", ".join(name for name, there in present.items() if there)
        raise UsageError(f'There is no device "{wanted}" here. This machine has: {here}.')
    return device


def choose_precision(wanted: str, device: torch.device, fastest: tuning.Choice | None = None) -> str:
    """Return ``wanted``, or for ``auto`` the fastest precision that keeps training sound on this device.

    What was measured to be the fastest here is taken, if it is given.

    On a CPU that means bf16 only where there are instructions for it (AMX or AVX512-BF16): elsewhere it is emulated
    and slower than fp32 (pytorch/pytorch#118499).
    """
    if wanted != "auto":
        if wanted not in ("fp32", "bf16", "fp16"):
            raise unknown("precision", wanted, ["auto", "fp32", "bf16", "fp16"])
        if wanted == "fp16" and device.type == "cpu":
            raise UsageError("A CPU cannot train in fp16. Use precision=bf16 or precision=fp32.")
        return wanted
    if fastest is not None:
        return fastest.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "xpu":
        return "bf16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 matrix products (AMX or AVX512-BF16)."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def keep_freed_memory() -> None:
    """Let glibc keep freed activations for the next step instead of returning their pages to the kernel.

    Otherwise every step faults them in again, which takes a good part of it (figures: `docs/log.md`). The
    process's resident memory stays at its peak in exchange, so that a process whose address space is limited
    (``ulimit -v``) returns them: oneDNN needs room beside them. Does nothing outside Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    import resource

    unlimited = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    _tell_allocator(*((0, 2**31 - 1, 64 << 20) if unlimited else RETURNING))


def return_freed_memory() -> None:
    """Give memory that is free, but kept for the next step, back to the system (and to the device)."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        _tell_allocator(*RETURNING)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


RETURNING = (65536, 128 << 10, 128 << 10)
"""What glibc does when nothing is said, with thresholds that stay: blocks above 128 KiB go back when they are freed."""


def _tell_allocator(mmap_max: int, trim_threshold: int, top_pad: int) -> None:
    """Set glibc's M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD (numbers in <malloc.h>)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-4, mmap_max), (-1, trim_threshold), (-2, top_pad)):
            libc.mallopt(parameter, value)


def keyed_generator(*key: object) -> torch.Generator:
    """Return a CPU random generator that depends on ``key`` alone, for example ``(seed, epoch, "order")``.

    What is drawn for an epoch is then the same after a resume, and whatever else was drawn before.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, for the record kept with it."""
    from importlib.metadata import version

    names = ("torch", "torchvision", "numpy", "pillow", "safetensors")
    own = {"resnetlab": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in names}


def machine(device: torch.device | None = None) -> str:
    """Describe the device in a line, for people."""
    device = device or choose_device()
    if device.type != "cpu":
        return processor(device) + (f" ({device})" if device.type == "cuda" else "")
    count = torch.get_num_threads()
    return f"{processor(device)}, {count} thread" + ("" if count == 1 else "s")


def processor(device: torch.device) -> str:
    """Name what computes, however many threads or devices of it there are; `machine` begins with that."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


def identity(device: torch.device) -> str:
    """Name all that a measured choice depends on: device, cores this process may use, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {cpu_name()}"
    return f"{name}, {cores()} cores, torch {torch.__version__}, resnetlab {__version__}"


def cpu_name() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process, or on CUDA its GPU, has held so far; 0 where Python cannot ask."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int:
    """Return what is free of the memory of a GPU that has its own, in bytes; of any other device 0."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def total_memory() -> int:
    """Return the memory that this process may use, in bytes: the machine's, or its control group's if that is less."""
    total: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        total = min(total, int(file.read()))
    return total
