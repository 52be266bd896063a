"""What the page of a run is made from: frozen records, complete before the first line of HTML is written."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resnetlab.analysis import McNemar
from resnetlab.metrics import Predictions, RunData


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small image, encoded for a page."""

    data: bytes = field(repr=False)
    """WebP."""
    width: int
    """Pixels."""
    height: int

    @property
    def uri(self) -> str:
        """Return it as a ``data:`` address, so that a page needs no second file."""
        return f"data:image/webp;base64,{b64encode(self.data).decode()}"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a run came about."""

    model: str = ""
    data: str = ""
    recipe: str = ""
    splits: Mapping[str, int] = field(default_factory=dict)
    """Split → images."""
    size: int = 0
    """Pixels a side that the network reads."""
    epochs: int = 0
    """That the recipe asks for."""
    epoch: int = 0
    """Whose weights were kept."""
    chosen: bool = False
    """Whether that epoch was the best on validation; otherwise it was the last."""
    seed: int = 0
    machine: str = ""
    precision: str = ""
    command: str = ""
    """That does it again; empty where nobody knows."""
    versions: Mapping[str, str] = field(default_factory=dict)
    parameters: int = 0
    macs: int = 0
    """Multiply-adds for one image."""
    layers: int = 0
    """Weighted, one after the other."""
    members: tuple[str, ...] = ()
    """The runs that this one was joined of; empty: it was trained."""
    combine: str = ""
    """How they were joined, a row of `ensemble.RULES`."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """The whole recipe, by dotted key."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An image whose label is perhaps wrong."""

    index: int
    """Position in the scored split."""
    suggested: int
    """The class that the network gives it."""
    confidence: float
    """Probability of the label as it stands."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """An image and where the network saw its evidence for the class that it called."""

    index: int
    """Position in the scored split."""
    image: Picture
    overlay: Picture
    method: str
    stage: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the network."""

    name: str
    kind: str
    """What it is: its class's name, and how many blocks it has."""
    shape: tuple[int, ...]
    """Of its output for one image: (C, H, W) or (classes,)."""
    parameters: int
    macs: int
    share: float
    """Of the time that all parts take in a forward pass."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Two images that are the same, or nearly."""

    first: str
    """Split and name."""
    second: str
    first_class: str
    second_class: str
    exact: bool
    difference: float
    """Root mean square of the difference in grey levels, 0 to 255, of both at 16 × 16 pixels."""
    first_picture: Picture
    second_picture: Picture


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What a search for doubled images found."""

    compared: Mapping[str, int]
    """Split → images that were looked at."""
    left_out: int
    """Images that were not, to bound the work."""
    exact: int
    """Pairs of one training and one other image with the same pixels."""
    similar: int
    """Pairs of one training and one other image that look the same but are not."""
    shown: tuple[Copy, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportData:
    """All that the page of a run shows. A part that could not be had is empty, and ``notes`` says why."""

    run: RunData
    origin: Origin
    predictions: Predictions | None = None
    """Of the scored split, with labels."""
    validation: Predictions | None = None
    """With labels."""
    pictures: Mapping[int, Picture] = field(default_factory=dict)
    """Position in the scored split → its thumbnail. Not every image has one: a page must stay small."""
    suspects: tuple[Suspect, ...] = ()
    suspects_note: str = ""
    explanations: tuple[Explanation, ...] = ()
    explanations_note: str = ""
    stages: tuple[Stage, ...] = ()
    balance: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Split → images of each class."""
    sheet: tuple[tuple[int, Picture], ...] = ()
    """Training images with their classes."""
    copies: Copies | None = None
    notes: tuple[str, ...] = ()
    """What the reader must know, at the top of the page."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """One run of a comparison."""

    name: str
    """What it is called beside the others."""
    run: RunData
    """Its score is that of the split that all share."""
    origin: Origin
    predictions: Predictions
    """Of that split."""

    @property
    def seconds(self) -> float:
        """How long it trained, validation included; 0: not recorded."""
        return float(sum(t.train_seconds + t.val_seconds for t in self.run.timing))


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Two runs on the same images."""

    first: int
    """Position among the runs."""
    second: int
    test: McNemar
    p: float
    """Corrected for the number of pairs (Holm 1979)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Several runs, side by side."""

    runs: tuple[Compared, ...]
    split: str
    """That all were scored on."""
    duels: tuple[Duel, ...]
    changed: Mapping[str, tuple[object, ...]]
    """Dotted key of the recipe → a value a run, where they differ."""

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-able values."""
        rows = []
        for one in self.runs:
            score = one.run.score
            assert score is not None
            rows.append(
                {
                    "name": one.name,
                    "model": one.origin.model,
                    "top1": score.top1,
                    "top1_interval": list(score.top1_interval),
                    "loss": score.loss,
                    "calibration_error": score.calibration_error,
                    "parameters": one.origin.parameters,
                    "macs": one.origin.macs,
                    "epochs": len(one.run.epochs),
                    "train_seconds": one.seconds,
                }
            )
        duels = [
            {
                "first": self.runs[duel.first].name,
                "second": self.runs[duel.second].name,
                "only_first_right": duel.test.only_first,
                "only_second_right": duel.test.only_second,
                "p": duel.test.p,
                "p_corrected": duel.p,
            }
            for duel in self.duels
        ]
        changed = {key: list(values) for key, values in self.changed.items()}
        n = len(self.runs[0].predictions.names)
        return {"split": self.split, "n": n, "runs": rows, "mcnemar": duels, "changed": changed}
