"""The table of rows. To add one: a function in a module of `chaos`, a `Row` in its ``ROWS``, its name here."""

from importlib import import_module

from chaos.record import Row

MODULES: tuple[str, ...] = (
    "kills",
    "disk",
    "numbers",
    "stops",
    "places",
    "pickles",
    "archives",
    "images",
    "served",
    "fuzzed",
    "supply",
    "mutation",
)
"""Modules of this package that hold rows in a tuple ``ROWS``."""


def rows() -> tuple[Row, ...]:
    """Return all rows in the order of their ids; modules are imported only here."""
    found = [row for name in MODULES for row in import_module(f"chaos.{name}").ROWS]
    keys = [row.key for row in found]
    assert len(set(keys)) == len(keys), "two rows have the same id and part"
    return tuple(sorted(found, key=lambda row: (row.id[0] != "R", int(row.id[1:]))))


def choose(only: str | None) -> tuple[Row, ...]:
    """Return the rows that ``R1,R4.sweep`` names, or all.

    Raises:
        ValueError: A name is none.
    """
    table = rows()
    if only is None:
        return table
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    if strange := [w for w in wanted if w not in {name for row in table for name in (row.id, row.key)}]:
        raise ValueError(f"There is no row {', '.join(strange)}. There are: {', '.join(row.key for row in table)}.")
    return tuple(row for row in table if row.id in wanted or row.key in wanted)
