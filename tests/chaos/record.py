"""What a row of the scoreboard is, what it is given to work with, and what it answers."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Size = Literal["ci", "full"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a row: how often the damage was done, and how often all was well afterwards."""

    tried: int
    survived: int
    notes: tuple[str, ...] = ()
    """What a reader should know: counts by kind, and the first few failures."""


@dataclass(frozen=True)
class Bench:
    """What a row works with."""

    size: Size
    folder: Path
    """An empty directory of the row's own; removed afterwards."""
    tell: Callable[[str], None] = lambda line: None
    """Shows how far the row has come, in a line that replaces the one before."""

    def pick(self, ci: int, full: int) -> int:
        """Return the number of tries for the size that is run."""
        return full if self.size == "full" else ci

    def chance(self, *key: object) -> random.Random:
        """Return a random generator that depends on ``key`` alone, so that a failure can be had again."""
        return random.Random(repr(key))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kind of damage and how it is done. Rows of one id are parts of one fault and stand together."""

    id: str
    """Of the catalogue: R1 to R25, and N1 and on for the numbers that must not lie."""
    part: str
    """A word that tells it from others of its id, for example ``stream``."""
    fault: str
    """What is done, as the scoreboard says it."""
    check: str
    """What must hold afterwards, as the scoreboard says it."""
    run: Callable[[Bench], Result]
    short: bool = True
    """Whether there is a CI size of it; a row that cannot be short has the full size only."""

    @property
    def key(self) -> str:
        """Return the name that results are kept under."""
        return f"{self.id}.{self.part}"


@dataclass
class Tally:
    """Counts tries while a row works. A try that fails is noted, and the row goes on."""

    bench: Bench
    of: int = 0
    """Tries there will be; 0: not known."""
    tried: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, what: str, wrong: str | None = None) -> None:
        """Count a try: ``what`` was done, and ``wrong`` says what was not as it must be (None: all was)."""
        self.tried += 1
        if wrong:
            self.failures.append(f"{what}: {wrong}")
        total = f"/{self.of}" if self.of else ""
        self.bench.tell(f"{self.tried}{total}, {len(self.failures)} not survived ({what})")

    def result(self, *notes: str) -> Result:
        """Return the row's answer: the counts, ``notes``, and at most five failures."""
        kept = tuple(" ".join(f"FAILED {line}".split())[:300] for line in self.failures[:5])
        return Result(tried=self.tried, survived=self.tried - len(self.failures), notes=(*notes, *kept))
