"""The page of a run, from records written by hand: complete in itself, well-formed, safe, with the right numbers."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from resnetlab import analysis
from resnetlab.metrics import EpochRecord, Predictions, RunData, TimingRecord, calibration_error, cross_entropy, score
from resnetlab.report import page, scores, svg, table
from resnetlab.report.html import percent
from resnetlab.report.records import Copies, Copy, Explanation, Origin, ReportData, Stage, Suspect
from resnetlab.study import pictures

HOSTILE = "<script>alert(1)</script>\"'&]]>\n--><img src=http://evil.example/x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checked(HTMLParser):
    """Reads a page and fails on what is not nested well; collects what matters."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def predicted(classes: int, n: int, *, seed: int = 0, name: str = "file") -> Predictions:
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    logits = generator.normal(0, 1, (n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += 2
    return Predictions(
        logits=logits,
        classes=tuple(f"class {i}" for i in range(classes)),
        names=tuple(f"{name}/{i}.png" for i in range(n)),
        labels=labels,
    )


def records(epochs: int, *, val: bool = True) -> tuple[tuple[EpochRecord, ...], tuple[TimingRecord, ...]]:
    rows = tuple(
        EpochRecord(
            epoch=e,
            step=10 * e,
            lr=0.1 / e,
            train_loss=2 / e,
            train_top1=1 - 0.9 / e,
            val_loss=2.2 / e if val else None,
            val_top1=1 - 0.95 / e if val else None,
        )
        for e in range(1, epochs + 1)
    )
    return rows, tuple(
        TimingRecord(epoch=e, train_seconds=2, val_seconds=0.5, images_per_second=100) for e in range(1, epochs + 1)
    )


def made(classes: int = 10, n: int = 60, epochs: int = 3, *, split: str = "test", val: bool = True) -> ReportData:
    p = predicted(classes, n)
    rows, timing = records(epochs, val=val)
    pixels = np.random.default_rng(1).integers(0, 255, (n, 12, 12, 3), dtype=np.uint8)
    pictured = {i: pictures.thumbnail(pixels[i]) for i in range(n)}
    run = RunData(
        name="run",
        title="net on toys",
        classes=p.classes,
        epochs=rows,
        timing=timing,
        score=score(p),
        score_split=split,
    )
    origin = Origin(
        model="net", data="toys", recipe="default", splits={"train": 100, "val": 20, "test": n}, size=12, epochs=epochs,
        epoch=epochs, chosen=val, machine="a machine", precision="fp32", command="resnetlab train toys --seed 0",
        versions={"torch": "2"}, parameters=1234, macs=5_000_000, layers=20, settings={"optim.lr": 0.1, "epochs": 3},
    )  # fmt: skip
    return ReportData(
        run=run,
        origin=origin,
        predictions=p,
        validation=predicted(classes, 40, seed=5) if val else None,
        pictures=pictured,
        suspects=(Suspect(index=3, suggested=0, confidence=0.01),),
        explanations=(Explanation(index=2, image=pictured[0], overlay=pictured[1], method="grad-cam", stage="layer3"),),
        stages=(Stage(name="conv1", kind="convolution", shape=(16, 8, 8), parameters=432, macs=1000, share=1.0),),
        balance={"train": (10,) * classes, "test": (n // classes,) * classes},
        sheet=((0, pictured[0]),),
        copies=Copies(
            compared={"train": 100, "test": n}, left_out=0, exact=1, similar=0,
            shown=(Copy(first="train: a", second="test: b", first_class="class 0", second_class="class 1", exact=True,
                        difference=0.0, first_picture=pictured[0], second_picture=pictured[1]),),
        ),
    )  # fmt: skip


def bare(data: ReportData) -> ReportData:
    """What is left when neither the data nor a score could be had."""
    return ReportData(run=replace(data.run, score=None, epochs=(), timing=()), origin=Origin(), notes=("Gone.",))


CASES = {
    "2 classes": made(2),
    "10 classes": made(10),
    "100 classes": made(100, 400),
    "130 classes": made(130, 400),
    "no test split": made(split="val"),
    "no validation": made(val=False),
    "one epoch": made(epochs=1),
    "many epochs": made(epochs=300),
    "nothing": bare(made()),
}


@pytest.mark.parametrize("data", CASES.values(), ids=CASES.keys())
def test_the_page_is_one_whole_file_with_every_panel(data: ReportData) -> None:
    text = page.render(data)
    found = Checked(text)
    assert len(text.encode()) < page.LARGEST
    assert [a["id"] for t, a in found.tags if t == "section"] == list(page.PANELS)
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for key in ("src", "href"):
            address = attributes.get(key)
            assert address is None or address.startswith(("data:", "#")), f"<{tag}> asks for {address}"
        if tag == "img":
            assert attributes.get("alt") and attributes.get("width") and attributes.get("height")
        assert tag not in ("iframe", "object", "link", "base", "form")
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {str(a["href"])[1:] for t, a in found.tags if t == "a"}
    assert links <= set(ids)


def test_the_numbers_are_those_of_the_metrics() -> None:
    data = made(10)
    text = Checked(page.render(data)).text
    assert data.run.score and data.predictions and data.validation
    result = data.run.score
    assert percent(result.top1) in text.replace(" %", "\N{NO-BREAK SPACE}%")
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    assert f"95 % interval {100 * result.top1_interval[0]:.1f} to {100 * result.top1_interval[1]:.1f} %" in plain
    t = analysis.fit_temperature(data.validation)
    after = calibration_error(analysis.at_temperature(data.predictions, t))
    assert f"from {100 * calibration_error(data.predictions):.2f} % to {100 * after:.2f} %" in plain
    for row in result.per_class:
        assert f"{100 * row.precision:.1f} %" in plain and f"{row.f1:.3f}" in plain
    wrong = result.n - round(result.top1 * result.n)
    assert f"{wrong} of {result.n} test images are called wrongly" in plain
    assert "resnetlab train toys --seed 0" in plain
    assert "3 epochs took 7.5 s on a machine in fp32" in plain
    assert "epoch 3, the best on validation" in plain


def test_the_cells_hold_their_images_and_the_matrix_its_counts() -> None:
    data = made(10)
    text = page.render(data)
    found = Checked(text)
    assert data.predictions and data.run.score and data.predictions.labels is not None
    held = json.loads(re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.S)[0])
    assert held["classes"] == list(data.run.classes)
    called = analysis.called(data.predictions)
    losses = cross_entropy(data.predictions.logits, data.predictions.labels)
    for key, rows in held["cells"].items():
        r, c = map(int, key.split(","))
        assert len(rows) == data.run.score.confusion[r, c]  # all have thumbnails here
        shown = [data.predictions.names.index(name) for name, *_ in rows]
        assert all((data.predictions.labels[i], called[i]) == (r, c) for i in shown)
        assert [losses[i] for i in shown] == sorted((losses[i] for i in shown), reverse=True)
    buttons = {str(a["data-cell"]): str(a["title"]) for t, a in found.tags if t == "button" and "title" in a}
    counts = {f"{r},{c}": int(n) for (r, c), n in np.ndenumerate(data.run.score.confusion) if n}
    assert {key: int(title.split(": ")[-1]) for key, title in buttons.items()} == counts


def test_29_of_100_are_29() -> None:
    data = made(10)
    assert data.run.score
    run = replace(data.run, score=replace(data.run.score, n=100, top1=0.29))
    assert "They call 29 of 100 test images rightly" in scores.summary(replace(data, run=run)).html


def test_a_cell_is_as_strong_as_the_root_of_its_share_of_the_row() -> None:
    data = made(3)
    assert data.run.score
    counts = np.array([[8, 2, 0], [0, 40, 0], [0, 0, 100]])
    run = replace(data.run, score=replace(data.run.score, confusion=counts))
    assert '--s:0.45" data-cell="0,1"' in scores.confusion(replace(data, run=run)).html  # 2 of 10


def test_of_many_classes_those_are_drawn_that_are_confused_most() -> None:
    panel = scores.confusion(made(130, n=1300))
    assert f"Only the {scores.NAMED} classes that are confused most are drawn; 70 more are not." in panel.caption
    assert panel.html.count("scope=row") == scores.NAMED


def test_the_weakest_class_is_first() -> None:
    data = made(10)
    assert data.run.score
    weakest = sorted(data.run.score.per_class, key=lambda row: row.f1)
    assert re.findall(r"class \d", scores.classes(data).html) == [row.name for row in weakest] != list(data.run.classes)


@pytest.mark.parametrize(("scale", "words"), [(4.0, "too sure"), (0.25, "too modest")])
def test_calibration_is_shown_and_told_with_the_temperature_of_the_validation_images(scale: float, words: str) -> None:
    data = made(10)
    assert data.predictions and data.validation
    fitted = replace(data.validation, logits=data.validation.logits * scale)
    t = analysis.fit_temperature(fitted)
    after = analysis.at_temperature(data.predictions, t)
    lines = [
        ("as it is", "val", analysis.reliability(data.predictions)),
        (f"temperature {t:.2f}", "train", analysis.reliability(after)),
    ]
    html = scores.calibration(replace(data, validation=fitted)).html
    assert svg.reliability_chart(lines) in html
    assert f"says that it is {words};" in html


def test_hostile_names_stay_text() -> None:
    data = made(3)
    assert data.predictions
    p = replace(data.predictions, classes=(HOSTILE, "b", "c"), names=(HOSTILE,) * 60)
    run = replace(data.run, classes=p.classes, title=HOSTILE, score=score(p))
    origin = replace(data.origin, data=HOSTILE, command=HOSTILE, machine=HOSTILE, settings={"x": HOSTILE})
    text = page.render(replace(data, run=run, predictions=p, origin=origin, notes=(HOSTILE,)))
    found = Checked(text)
    assert [t for t, _ in found.tags].count("script") == 2  # the data and our own
    assert "<script>alert" not in text and "<img src=http" not in text
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), tag
    assert "alert(1)" in found.text  # shown, as text
    held = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.S)[0]
    assert json.loads(held)["classes"][0] == HOSTILE


def test_only_our_own_script_may_run() -> None:
    from base64 import b64encode
    from hashlib import sha256

    text = page.render(made(2))
    script = text.rsplit("<script>", 1)[1].split("</script>")[0]
    policy = next(str(a["content"]) for t, a in Checked(text).tags if a.get("http-equiv"))
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe-inline'; script" in policy
    assert "unsafe-eval" not in policy


def test_a_page_full_of_incompressible_thumbnails_stays_under_its_limit() -> None:
    data = made(100, 2000)
    noise = pictures.thumbnail(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8))
    assert len(noise.data) > 2000
    text = page.render(replace(data, pictures=dict.fromkeys(range(2000), noise)))
    assert len(text.encode()) < page.LARGEST
    Checked(text)


def test_what_is_missing_is_said() -> None:
    no_val, no_test = (Checked(page.render(CASES[name])).text for name in ("no validation", "no test split"))
    assert "no validation images to fit a temperature" in no_val
    assert "There is no test score" in no_test and "for want of a test split" in no_test
    nothing = Checked(page.render(CASES["nothing"])).text
    assert "Gone." in nothing and "no final score yet" in nothing and "No epoch was recorded" in nothing


def test_errors_csv_lists_every_mistake_worst_first(tmp_path: Path) -> None:
    p = predicted(4, 50)
    p = replace(p, names=('a,"b".png', *p.names[1:]))
    text = table.write_errors(p, tmp_path / "errors.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    wrong = analysis.mistakes(p)
    assert tuple(rows[0]) == table.COLUMNS
    assert [row["file"] for row in rows] == [p.names[i] for i in wrong]
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert all(row["true"] != row["predicted"] for row in rows)
    i = int(wrong[0])
    assert float(rows[0]["probability"]) == pytest.approx(float(p.probabilities()[i].max()), abs=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.3, 2.31), (0.7, 0.7), (0, 0), (-3, 1e5), (1e-6, 3e-6)])
def test_ticks_are_few_even_and_enclose_the_values(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 10
    assert np.ptp(np.diff(found)) < 1e-9 * max(abs(high), 1)


def test_values_that_are_missing_or_not_finite_break_the_line() -> None:
    values = [1.0, None, float("nan"), 2.0, 3.0, float("inf")]
    text = svg.line_chart("x", [1, 2, 3, 4, 5, 6], [svg.Line("a", "train", values)], lambda v: f"{v:g}")
    assert text.count("<polyline") == 1 and "nan" not in text and "inf" not in text
    hover = json.loads(next(str(a["data-chart"]) for _, a in Checked(text).tags if "data-chart" in a))
    assert hover["lines"][0]["text"] == ["1", "", "", "2", "3", ""]


@pytest.mark.slow
def test_a_browser_reads_charts_and_opens_cells_by_keyboard_without_any_request(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = tmp_path / "report.html"
    page.write(made(10), path)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser: {error}")
        opened = browser.new_page(viewport={"width": 390, "height": 800})
        asked: list[str] = []
        problems: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.goto(path.as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing hangs out on a phone
        opened.locator(".plot").first.focus()
        opened.keyboard.press("ArrowLeft")
        assert opened.locator("#tip").inner_text().startswith("epoch 3\n")
        opened.keyboard.press("ArrowLeft")
        assert opened.locator("#tip").inner_text().startswith("epoch 2\n")
        cell = opened.locator(".confusion button.miss").first
        cell.focus()
        opened.keyboard.press("Enter")
        assert opened.locator("#cell img").count() == int(cell.inner_text())
        opened.keyboard.press("ArrowDown")
        assert opened.evaluate("document.activeElement.closest('td') !== null")
        opened.locator("button.link").first.click()
        assert opened.locator("#cell img").count() >= 1
        browser.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def _chromium() -> str | None:
    import shutil

    return shutil.which("chromium")
