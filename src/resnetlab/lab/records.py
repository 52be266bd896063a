"""What an experiment is and what came of it, as frozen records. Nothing here reaches torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from resnetlab.config import Config

if TYPE_CHECKING:
    from resnetlab.seeds import Spread


class Rung(Config):
    """How much of the full experiment a budget leaves: a row of `budget.LADDER`."""

    size: float = Field(1.0, gt=0, le=1)
    """Height and width of the images, as a share of their own; never below 16 px, or their own."""
    width: float = Field(1.0, gt=0, le=1)
    """Channels of the residual and plain networks, as a share."""
    images: int | None = None
    """Training images, validation included; None: all."""
    test: int | None = None
    """Test images; None: all."""


class Scale(Config):
    """A rung, filled in for the data at hand, and how long to train."""

    size: int
    """Pixels a side that the networks see."""
    width: float
    images: int
    """Training images, validation included."""
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of them that is held back from training."""
    val: int = 0
    """Validation images that the data has of its own and that every epoch is scored on."""
    test: int
    batch: int = Field(gt=0)
    """Images in an iteration."""
    drop_last: bool = False
    """Whether an epoch leaves out the images that do not fill an iteration."""
    epochs: int = Field(gt=0)
    iterations: int
    """Of every network, the same."""
    short: bool = False
    """Whether its residual blocks start as the identity (`budget.SHORT_START`), as it is made to fit a time and
    ``model.zero_init`` is not set."""


class Arm(Config):
    """A network that an experiment trains, once for every seed."""

    name: str
    """As the report calls it."""
    model: str
    """A row of `models.ARCHITECTURES`."""
    settings: tuple[str, ...] = ()
    """What sets it apart from the other arms, as ``train`` takes it: ``model.shortcut=B``."""
    narrows: bool = True
    """Whether `Rung.width` can narrow it (residual and plain networks)."""
    paper: float | None = None
    """Test error in the paper, in percent; None: it gives none."""
    source: str = ""
    """Whose idea it is."""


class Run(Config):
    """One training run of an experiment, complete: ``resnetlab train DATA --model M --seed S SETTINGS``."""

    label: str
    """Its directory below ``runs``."""
    arm: str
    model: str
    seed: int
    settings: tuple[str, ...]
    seconds: float = 0.0
    """That it is expected to take."""


class Facts(Config):
    """What an experiment needs to know of the data."""

    name: str
    train: int
    """Training images."""
    test: int
    val: int = 0
    """Validation images that the data has beside those of training."""
    size: int
    """Pixels a side of the images as they are read without a budget."""
    classes: int
    channels: int
    mirrors: bool = False
    """Whether a mirrored image keeps its class."""


class Request(Config):
    """What was asked for. The same request on the same directory goes on where it was."""

    experiment: str
    data: str
    budget: str
    seeds: int = Field(ge=1, le=100)
    settings: tuple[str, ...] = ()
    """Of every run, over those of the experiment."""
    source: str | None = None
    """A directory of an earlier experiment whose trained networks are looked at."""


class Plan(Config):
    """What is done: written down once, before the first run, and read again when the lab goes on."""

    schema_number: int = 1
    request: Request
    facts: Facts | None = None
    """None: nothing is trained."""
    scale: Scale | None = None
    jobs: int = 1
    """Runs at a time that the times were worked out for."""
    runs: tuple[Run, ...] = ()
    seconds: float = 0.0
    """That all of it is expected to take."""
    words: tuple[str, ...] = ()
    """What was cut, and what that leaves out, in sentences."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one run measured. Errors are shares, 0 to 1."""

    seed: int
    label: str
    iterations: tuple[int, ...]
    """At the end of each epoch."""
    training: tuple[float, ...]
    """Training error over each epoch, as the weights moved, on the images as they were augmented."""
    held_out: tuple[float | None, ...]
    """Error on the images held back from training."""
    test: float | None
    """Of the last weights, on the test split (the validation split where there is none)."""
    n: int
    """Images behind ``test``."""
    seconds: float
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What an arm measured over its seeds."""

    arm: Arm
    traces: tuple[Trace, ...]
    parameters: int = 0
    macs: int = 0
    """Multiply-adds for one image of the size that was trained on."""
    training: "Spread | None" = None
    """Training error of the last epoch; None: no run finished."""
    test: "Spread | None" = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a part of the claim held here."""

    claim: str
    held: bool | None
    """None: this cannot be said from what was measured."""
    why: str
    """The figures behind it."""


HUES = 10
"""Colours of lines: the page's ``run0`` to ``run9``, and as many in the picture."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart."""

    name: str
    colour: int
    """0 to ``HUES - 1``; lines of one network share it."""
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    """The smallest over the seeds; empty: no band."""
    high: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one axis."""

    title: str
    unit: str
    """What the horizontal axis counts: iteration, layer."""
    label: str
    """What the vertical axis measures, with its unit."""
    x: tuple[int, ...]
    series: tuple[Series, ...]
    form: Literal["percent", "number"] = "percent"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table of figures. It is shown on the page, and written as ``NAME.csv``."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    """Values; the page writes them for people, the CSV as they are. None: not measured."""
    caption: str = ""
    text: int = 1
    """So many columns hold words."""
    forms: Mapping[str, str] = field(default_factory=dict)
    """Column → how the page writes it: percent, quantity, seconds, bytes, or a format such as ``.3f``."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an experiment measures beside error rates."""

    charts: tuple[Chart, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    words: tuple[str, ...] = ()
    """What to know about it."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not finish."""

    label: str
    reason: str


Judge = Callable[[Mapping[str, ArmResult]], Sequence[Verdict]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment, as data: what it claims, what it trains, what it looks at."""

    name: str
    title: str
    claim: str
    place: str
    """Where in the paper, or whose it is."""
    caution: str
    """What a small budget does not allow to conclude."""
    arms: tuple[Arm, ...] = ()
    panels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Charts of the picture: title, arms. Empty: one with all."""
    judge: Judge | None = None
    """Holds the claim against error rates."""
    measure: Literal["", "responses", "complexity"] = ""
    """What is measured after training: ``responses`` or ``complexity``; empty: nothing more."""
    recipe: str = "paper"
    settings: tuple[str, ...] = ()
    """Of every arm."""
    iterations: int = 64_000
    """Of the full experiment (the paper's, section 4.2)."""
    least: int = 1500
    """Iterations below which a network is rather made smaller than trained shorter."""
    needs: int = 0
    """Pixels a side that its networks need at least; smaller images are enlarged."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that the report shows."""

    experiment: Experiment
    plan: Plan
    path: str
    command: str
    """That does it again."""
    machine: str
    arms: tuple[ArmResult, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    finding: Finding = Finding()
    failures: tuple[Failure, ...] = ()
    missing: tuple[str, ...] = ()
    """Runs that were not reached."""
    seconds: float = 0.0
    """Of all runs, added up."""

    def to_dict(self) -> dict[str, object]:
        """Return the figures alone, JSON-able."""
        return {
            "experiment": self.experiment.name,
            "path": self.path,
            "complete": not (self.failures or self.missing),
            "verdicts": [{"claim": v.claim, "held": v.held, "why": v.why} for v in self.verdicts],
            "arms": [_figures(one) for one in self.arms],
            "tables": {s.name: [dict(zip(s.columns, row, strict=True)) for row in s.rows] for s in self.finding.sheets},
            "failures": [{"run": f.label, "reason": f.reason} for f in self.failures],
            "missing": list(self.missing),
            "cut": list(self.plan.words),
            "seconds": self.seconds,
        }


def _figures(one: ArmResult) -> dict[str, object]:
    def spread(s: "Spread | None") -> dict[str, object] | None:
        return None if s is None else {"mean": s.mean, "std": s.std, "interval": s.interval, "values": s.values}

    return {
        "name": one.arm.name,
        "parameters": one.parameters,
        "macs": one.macs,
        "training_error": spread(one.training),
        "test_error": spread(one.test),
        "paper_test_error_percent": one.arm.paper,
        "seeds": [trace.seed for trace in one.traces],
    }
