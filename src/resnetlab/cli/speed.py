"""`bench`: how fast this machine is, and with which settings."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from resnetlab.cli.output import Json, line, print_json, table

if TYPE_CHECKING:
    from resnetlab.bench import Bench


def bench(
    *,
    device: str = "auto",
    compile: Annotated[bool, Parameter(negative="")] = False,
    forget: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Measure this machine in half a minute: its fastest settings, its ceilings, images/s of the usual networks.

    The fastest settings are remembered for this machine; runs use them where a recipe leaves them open, and say so.

    Parameters
    ----------
    device
        auto, or a device that PyTorch knows.
    compile
        Also try torch.compile in inference (a minute more).
    forget
        Remove what was remembered, and measure nothing.
    """
    from resnetlab import bench as benchmark
    from resnetlab import runtime, tuning
    from resnetlab.console import Terminal

    if forget:
        found = tuning.forget(runtime.identity(runtime.choose_device(device)))
        if json:
            print_json({"forgotten": bool(found)})
        else:
            line("Forgotten." if found else "There was nothing remembered for this machine.")
        return
    if json:
        measured = benchmark.measure(device, compiled=compile)
        benchmark.keep(measured, device)
        print_json(measured.to_dict())
        return
    with Terminal() as terminal:
        measured = benchmark.measure(device, compiled=compile, tell=lambda what: terminal.line(f"measuring {what}"))
    benchmark.keep(measured, device)
    _show(measured)
    line(f"kept  {tuning.place()} (resnetlab bench --forget removes it)")


def _show(found: "Bench") -> None:
    """Print what was measured."""
    chosen = found.choice
    picked = {("threads", str(chosen.threads)), ("precision", chosen.precision), ("batch", str(chosen.batch))}
    picked.add(("convolution", chosen.convolution))
    table(
        f"settings tried on {found.machine} (ResNet-20 at 32 px; batch: of inference, the others: training)",
        ("setting", "value", "images/s", "chosen"),
        [
            (t.setting, t.value, f"{t.images_per_second:,.0f}", "yes" if (t.setting, t.value) in picked else t.note)
            for t in found.trials
        ],
    )
    table(
        "ceilings of the machine",
        ("work", "precision", "rate"),
        [
            (c.work, c.precision, f"{c.rate / 1e9:,.1f} {'GB/s' if c.work == 'memory' else 'Gop/s'}")
            for c in found.ceilings
        ],
    )
    table(
        "networks with the chosen settings",
        ("network", "training images/s", "inference images/s", "training ÷ direct convolution ceiling"),
        [
            (f"{s.model} at {s.size} px", f"{s.training:,.1f}", f"{s.inference:,.1f}", f"{s.share:.0%}")
            for s in found.speeds
        ],
    )
    line(
        f"chosen {chosen.threads} thread{'' if chosen.threads == 1 else 's'}, {chosen.precision}, "
        f"{chosen.batch} images at a time in inference ({found.seconds:.0f} s of measuring)"
    )
