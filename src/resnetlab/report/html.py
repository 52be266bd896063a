"""Small pieces of HTML. Whatever is not `Html` already is escaped, so that no name can become markup."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from resnetlab.report.records import Picture

_KEPT = "\N{NO-BREAK SPACE}\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


class Html(str):
    """Text that is markup already."""


@dataclass(frozen=True)
class Panel:
    """One section of a page."""

    title: str
    html: Html
    caption: str = ""
    """A sentence or two under the title: what is shown, and how to read it."""


def apart(name: str) -> Html:
    """Make a name safe, and keep its direction to itself: one in Hebrew would turn an arrow beside it round."""
    return Html(f"<bdi>{esc(name)}</bdi>")


def esc(text: object) -> Html:
    """Make text safe inside an element or a quoted attribute; characters that HTML has no place for become �."""
    if isinstance(text, Html):
        return text
    plain = "".join(c if c.isprintable() or c in _KEPT else " " if c.isspace() else "�" for c in str(text))
    return Html(html.escape(plain, quote=True))


def join(parts: Sequence[str]) -> Html:
    """Put pieces of markup behind each other."""
    return Html("".join(parts))


def paragraph(text: object, kind: str = "") -> Html:
    """Return a paragraph."""
    attribute = f' class="{kind}"' if kind else ""
    return Html(f"<p{attribute}>{esc(text)}</p>")


def heading(text: object) -> Html:
    """Return a heading inside a panel."""
    return Html(f"<h3>{esc(text)}</h3>")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, label: str, text: int = 1) -> Html:
    """Return a table that scrolls by itself where it is wider than the page.

    Args:
        columns: Their headings.
        rows: Cells; those that are not `Html` are escaped. The first of each row is its heading.
        label: What the table holds, for who cannot see it.
        text: So many columns hold words and stand to the left; the others are figures and stand to the right.
    """
    head = "".join(
        f'<th scope="col"{"" if i < text else " class=n"}>{esc(column)}</th>' for i, column in enumerate(columns)
    )
    body = "".join(
        f'<tr><th scope="row">{esc(first)}</th>'
        + "".join(f"<td{'' if i < text else ' class=n'}>{esc(cell)}</td>" for i, cell in enumerate(rest, start=1))
        + "</tr>"
        for first, *rest in rows
    )
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}"><table class="data">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bar(share: float, text: str, kind: str = "train") -> Html:
    """Return a figure with a bar as long as ``share`` (0 to 1) behind it."""
    width = 100 * min(max(share, 0.0), 1.0)
    return Html(f'<span class="bar {kind}" style="--w:{width:.1f}%"><i></i><b>{esc(text)}</b></span>')


def image(picture: Picture, alt: str, *, large: bool = False) -> Html:
    """Return an image with its text; small ones are enlarged with their pixels as squares."""
    kind = "thumb large" if large else "thumb"
    kind += " tiny" if max(picture.width, picture.height) <= 48 else ""
    return Html(
        f'<img class="{kind}" src="{picture.uri}" width="{picture.width}" height="{picture.height}" alt="{esc(alt)}">'
    )


def figure(content: str, caption: str) -> Html:
    """Return content with a caption; both are markup."""
    return Html(f"<figure>{content}<figcaption>{caption}</figcaption></figure>")


def details(summary: str, content: str) -> Html:
    """Return content that opens on demand."""
    return Html(f"<details><summary>{esc(summary)}</summary>{content}</details>")


def percent(share: float, digits: int = 1) -> str:
    """Write a share for people: ``82.2 %``, the space not breaking."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def interval(low_high: tuple[float, float]) -> str:
    """Write a 95 % interval of a share: ``78.3 to 86.1 %``."""
    return f"{100 * low_high[0]:.1f} to {percent(low_high[1])}"


def quantity(value: float) -> str:
    """Write a large number for people: ``272,474``, ``1.41 M``, ``4.09 G``."""
    for size, sign in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f}\N{NO-BREAK SPACE}{sign}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Write a time for people: ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.3g}\N{NO-BREAK SPACE}s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}\N{NO-BREAK SPACE}min"
    return f"{seconds / 3600:.1f}\N{NO-BREAK SPACE}h"
