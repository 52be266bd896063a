"""The page of a run: one file that opens offline, made of panels. To add one: a function and a row in `PANELS`."""

import json
from base64 import b64encode
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from resnetlab.files import write_atomic
from resnetlab.report import images, scores
from resnetlab.report.html import Html, Panel, esc, paragraph
from resnetlab.report.records import ReportData

PAGE = "report.html"
LARGEST = 3_000_000
"""Bytes of a page."""

PANELS: dict[str, Callable[[ReportData], Panel]] = {
    "summary": scores.summary,
    "curves": scores.curves,
    "confusion": scores.confusion,
    "classes": scores.classes,
    "calibration": scores.calibration,
    "mistakes": images.mistakes,
    "explanations": images.explanations,
    "network": images.network,
    "data": images.dataset,
}
"""In the order of the page; the key is the section's address (``report.html#curves``)."""


def render(data: ReportData) -> str:
    """Return the page of a run. Nothing in it asks for another file, and no script but its own may run."""
    panels = {key: panel(data) for key, panel in PANELS.items()}
    most = 24
    page = document(data.run.title, panels, {"classes": data.run.classes, "cells": scores.cells(data, most)})
    while len(page.encode()) > LARGEST and most:  # many classes with large thumbnails
        most //= 2
        page = document(data.run.title, panels, {"classes": data.run.classes, "cells": scores.cells(data, most)})
    return page


def write(data: ReportData, path: Path) -> Path:
    """Write the page of a run, whole or not at all.

    Raises:
        ResNetLabError: The disk is full or the directory cannot be written.
    """
    write_atomic(path, render(data))
    return path


def errors(page: Path) -> Path:
    """Return where the table of mistakes lies that goes with a page: ``errors.csv``, or ``NAME-errors.csv``."""
    return page.with_name("errors.csv" if page.name == PAGE else f"{page.stem}-errors.csv")


def document(title: str, panels: Mapping[str, Panel], data: Mapping[str, object]) -> str:
    """Assemble a page.

    Args:
        title: Its heading.
        panels: Section's address → panel, in order.
        data: What the script needs, JSON-able.
    """
    style, script = (files("resnetlab.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += "; base-uri 'none'; form-action 'none'"
    links = "".join(f'<a href="#{key}">{esc(panel.title)}</a>' for key, panel in panels.items())
    sections = "".join(section(key, panel) for key, panel in panels.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header><h1>{esc(title)}</h1><nav aria-label="Sections">{links}</nav></header>
<main id="main">{sections}</main>
<footer>Made by ResNetLab. This page is one file and asks for nothing from the network.</footer>
<div id="tip" role="status" aria-live="polite" hidden></div>
<script type="application/json" id="page-data">{_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def section(key: str, panel: Panel) -> Html:
    """Return a panel as a section of the page."""
    caption = paragraph(panel.caption, "caption") if panel.caption else ""
    return Html(
        f'<section id="{esc(key)}" aria-labelledby="{esc(key)}-title"><h2 id="{esc(key)}-title">{esc(panel.title)}</h2>'
        f"{caption}{panel.html}</section>\n"
    )


def _json(value: object) -> str:
    """Return JSON that can end no script element, whatever names it holds."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
