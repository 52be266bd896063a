"""The laboratory: the paper's experiments as named functions, run within a time, with one report each.

`resnetlab.lab("degradation", "cifar10", budget="30m")` runs one. This package is that verb, too.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnetlab.lab.records import Outcome

__all__ = ["lab"]


def lab(
    name: str,
    data: str | Path | None = None,
    *,
    budget: str | None = None,
    out: str | Path | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    settings: Sequence[str] = (),
    runs: str | Path | None = None,
    quiet: bool = False,
) -> "Outcome":
    """Run an experiment of the paper, or go on with it, and write its report.

    Args:
        name: A row of `experiments.EXPERIMENTS`: degradation, depth, shortcuts, responses, complexity, compare, blocks.
        data: As `train` takes it; None: the packaged digits. The paper's is ``cifar10``.
        budget: The time there is, ``30m`` or ``2h``, or ``full`` for all of the paper's iterations;
            None: ``30m``.
        out: The directory; None: ``lab/NAME``.
        seeds: How often each network is trained; None: twice.
        jobs: Runs at a time; None: as many as the machine has room for.
        settings: ``key=value`` of every run, over the experiment's own.
        runs: For ``responses``: an earlier experiment whose trained networks are looked at.
        quiet: Show nothing while it runs.

    Returns:
        What was measured, and whether the claim held.

    Raises:
        UsageError: A name, a setting or the budget is wrong.
        ResNetLabError: The directory holds something else or is in use, or the data cannot be used.
        Interrupted: It was stopped; the same call goes on.
    """
    from resnetlab.lab.board import Bars, Silent
    from resnetlab.lab.conduct import conduct

    options: dict[str, Any] = {"budget": budget, "out": out, "seeds": seeds, "jobs": jobs, "settings": settings}
    if quiet:
        return conduct(name, data, **options, runs=runs, board=Silent())
    with Bars() as bars:
        return conduct(name, data, **options, runs=runs, board=bars)


class _Verb(ModuleType):
    """A package that can be called: `resnetlab.lab` is the verb, whether or not the package was imported before."""

    def __call__(self, *args: Any, **options: Any) -> "Outcome":
        return lab(*args, **options)


sys.modules[__name__].__class__ = _Verb
