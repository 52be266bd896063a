"""Text in pictures: names in any script, cut to the room there is."""

import contextlib
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager

BASE = "DejaVu Sans"
"""Comes with matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic, Armenian, Georgian and the signs of mathematics."""

MISSING, KEPT = "□", "\N{NO-BREAK SPACE}"


def drawable(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Make texts that can be drawn without a missing glyph.

    Returns:
        The texts, in which a character that no installed font has is a box, and the font families that draw them. Of
        several texts, one that would be boxes alone becomes ``class 7``, after its position.
    """
    lines = ["".join(c if c.isprintable() or c in KEPT else " " for c in text) for text in texts]
    missing = set().union(*lines) - _characters(font_manager.findfont(BASE))
    families = [BASE]
    for family, path in _other_fonts() if missing else ():
        if covered := missing & _characters(path):
            families.append(family)
            missing -= covered
        if not missing:
            break
    boxes = [line.translate({ord(c): MISSING for c in missing}) for line in lines]
    if len(boxes) > 1:
        boxes = [f"class {i}" if box.strip() and not box.strip(MISSING + " ") else box for i, box in enumerate(boxes)]
    return boxes, families


@cache
def _other_fonts() -> Sequence[tuple[str, str]]:
    """Return (family, file) of this machine's upright regular fonts, Noto and sans serif first, 400 at most."""
    bundled = Path(matplotlib.get_data_path())
    regular = {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and str(font.weight) in ("400", "normal", "regular")
        if not Path(font.fname).is_relative_to(bundled)
    }
    return sorted(regular.items(), key=lambda item: ("Noto" not in item[0], "Sans" not in item[0], item[0]))[:400]


@cache
def _characters(path: str) -> frozenset[str]:
    """Return the characters that a font file can draw; none if it cannot be read."""
    with contextlib.suppress(OSError, RuntimeError):
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    return frozenset()


def columns_of(text: str) -> float:
    """Return about how wide a text is, in columns of 0.6 em, a little more than a small letter takes."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> float:
    if unicodedata.combining(character):
        return 0
    if character in "mwMW@%→…" + MISSING or unicodedata.east_asian_width(character) in ("W", "F"):
        return 1.7  # a whole em
    return 1.2 if character.isupper() else 1


def shorten(text: str, columns: float) -> str:
    """Cut a text to so many columns; an ellipsis says that something is missing."""
    if columns_of(text) <= columns:
        return text
    while columns_of(text) > columns - 1.7:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, columns: float, *, lines: int) -> str:
    """Break a text at spaces into at most so many lines, each cut to so many columns."""
    rows = [""]
    for word in text.replace(" %", "\N{NO-BREAK SPACE}%").split(" "):
        longer = f"{rows[-1]} {word}".lstrip(" ")
        if rows[-1] and columns_of(longer) > columns and len(rows) < lines:
            rows.append(word)
        else:
            rows[-1] = longer
    return "\n".join(shorten(row, columns) for row in rows)
