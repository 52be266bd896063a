"""Pictures: nothing cut off or on top of each other, whatever the run, and no state left behind."""

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from resnetlab import report
from resnetlab.errors import ResNetLabError
from resnetlab.metrics import EpochRecord, Predictions, RunData, Scorecard, score
from resnetlab.report import text


def card(classes: Sequence[str], n: int = 500, absent: int | None = None) -> Scorecard:
    rng, k = np.random.default_rng(0), len(classes)
    labels = rng.integers(0, k, n)
    if absent is not None:
        labels[labels == absent] = (absent + 1) % k
    logits = (rng.normal(size=(n, k)) + 3 * np.eye(k)[labels]).astype(np.float32)
    return score(Predictions(logits=logits, classes=tuple(classes), names=("",) * n, labels=labels))


def epochs(n: int, val: bool = True) -> tuple[EpochRecord, ...]:
    return tuple(
        EpochRecord(
            epoch=e,
            step=10 * e,
            lr=0.1,
            train_loss=2 / e,
            train_top1=1 - 0.9 / e,
            val_loss=2.2 / e if val else None,
            val_top1=0.9 - 0.8 / e if val else None,
        )
        for e in range(1, n + 1)
    )


def run(n: int = 5, classes: Sequence[str] = ("cat", "dog"), title: str = "resnet20 on cifar10") -> RunData:
    return RunData(
        name="r", title=title, classes=tuple(classes), epochs=epochs(n), score=card(classes), score_split="test"
    )


def drawn(figure: Figure) -> list[Text]:
    """Draw a figure, check that every text of it lies within, and return the texts."""
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.canvas.draw()
    texts = [child for child in figure.get_children() if isinstance(child, Text)]  # its title
    for axes in figure.axes:
        legend = axes.get_legend()
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend else ())]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            texts += [label for place, label in ticks if low <= place <= high and axes.axison]
    texts = [t for t in texts if t.get_text()]
    frame = figure.bbox
    for t in texts:
        box = t.get_window_extent()
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= frame.x1 and box.y1 <= frame.y1
        assert inside, f"{t.get_text()!r} is cut off: {box} in {frame}"
    return texts


def overlap(texts: Sequence[Text]) -> list[str]:
    """Return the pairs of upright texts whose boxes share more than a pixel."""
    upright = [t for t in texts if t.get_rotation() in (0, 90)]
    boxes = np.array([t.get_window_extent().extents for t in upright])  # (N, 4): x0, y0, x1, y1
    shared = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    pairs = np.argwhere(np.triu((shared > 1).all(axis=2), 1))
    return [f"{upright[a].get_text()!r} and {upright[b].get_text()!r}" for a, b in pairs]


def png(figure: Figure, path: Path) -> NDArray[np.uint8]:
    report.save(figure, path)
    return np.asarray(Image.open(path).convert("RGB"))


# ---- curves


@pytest.mark.parametrize("n", [0, 1, 2, 30, 200])
def test_curves_are_readable_at_any_length(n: int) -> None:
    figure = report.curves(run(n))
    texts = drawn(figure)
    assert not overlap(texts)
    loss, accuracy = figure.axes
    for axes in (loss, accuracy):
        assert axes.get_xlabel() == "epoch"
        ticks = [t for t in axes.get_xticks() if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
        assert all(t == int(t) and 1 <= t <= n for t in ticks)
        assert len(ticks) >= min(n, 2)
        lines = {str(line.get_label()).split()[0]: line for line in axes.get_lines()}
        assert set(lines) == ({"training", "validation", "final"} if n else {"final"})
        if n:
            assert list(np.asarray(lines["training"].get_xdata())) == list(range(1, n + 1))
            assert (lines["training"].get_marker() == "o") == (n <= 30)
    assert loss.get_ylabel() == "loss (nats per image)"
    assert accuracy.get_ylabel() == "top-1 accuracy (%)"
    assert accuracy.get_ylim()[0] >= -2
    assert accuracy.get_ylim()[1] <= 102
    assert any(t.get_text() == "resnet20 on cifar10" for t in texts)


def test_curves_show_what_was_measured_in_percent_one_colour_a_split() -> None:
    loss, accuracy = report.curves(run(3)).axes
    train, val, final = accuracy.get_lines()
    assert np.asarray(train.get_ydata()) == pytest.approx([10, 55, 70])
    assert np.asarray(val.get_ydata()) == pytest.approx([10, 50, 90 - 80 / 3])
    scored = run(3).score
    assert scored is not None
    assert np.asarray(final.get_ydata()) == pytest.approx([100 * scored.top1] * 2)
    assert final.get_label() == f"final test {100 * scored.top1:.1f} %"
    assert val.get_label() == "validation 63.3 %"
    colors = [line.get_color() for line in accuracy.get_lines()]
    assert len(set(colors)) == 3
    assert [line.get_color() for line in loss.get_lines()] == colors


def test_curves_leave_out_what_is_missing_or_not_finite() -> None:
    rows = list(epochs(6))
    rows[2] = EpochRecord(epoch=3, step=30, lr=0.1, train_loss=float("nan"), train_top1=0.5, val_loss=float("inf"))
    data = RunData(name="r", title="t", classes=("a", "b"), epochs=tuple(rows))
    figure = report.curves(data)
    drawn(figure)
    train, val = figure.axes[0].get_lines()
    assert list(np.asarray(train.get_xdata())) == list(np.asarray(val.get_xdata())) == [1, 2, 4, 5, 6]
    assert len(np.asarray(figure.axes[1].get_lines()[0].get_xdata())) == 6
    for nothing in (epochs(4, val=False), tuple(rows[2:3])):
        drawn(report.curves(RunData(name="r", title="t", classes=("a", "b"), epochs=nothing)))


def test_curves_of_a_validated_run_fit_their_legend() -> None:
    data = RunData(
        name="r", title="long " * 80, classes=("a", "b"), epochs=epochs(30), score=card(("a", "b")), score_split="val"
    )
    figure = report.curves(data)
    assert not overlap(drawn(figure))
    final, val = (figure.axes[1].get_lines()[i] for i in (2, 1))
    assert final.get_color() == val.get_color()
    widths = [axes.get_position().width for axes in figure.axes]
    assert min(widths) > 0.38, "the legend pushed the panels together"


# ---- confusion


@pytest.mark.parametrize(
    ("k", "n", "long"),
    [
        (1, 20, False),
        (2, 300, False),
        (2, 300, True),
        (10, 10_000, False),
        (10, 10_000, True),
        (20, 400_000, True),
        (21, 500, False),
        (100, 3_000, True),
        (1000, 5_000, False),
    ],
)
def test_confusion_fits_any_number_of_classes(k: int, n: int, long: bool) -> None:
    names = [f"the {i}th class of a long list of classes" if long else f"c{i}" for i in range(k)]
    data = RunData(name="r", title="x on y", classes=tuple(names), epochs=(), score=card(names, n), score_split="test")
    figure = report.confusion(data)
    texts = drawn(figure)
    assert not overlap(texts)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert len(axes.texts) == (k * k if k <= 20 else 0)
    if k <= 100:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [label.get_text() for label in axes.get_xticklabels()]
        assert len(labels) == k
        assert all(label == name or label.endswith("…") for label, name in zip(labels, names, strict=True))
    assert 6 <= figure.get_figwidth() <= 16
    assert 4 <= figure.get_figheight() <= 16
    box = axes.get_window_extent()
    assert box.width > 0.5 * min(figure.bbox.width, figure.bbox.height)


def test_confusion_has_the_truth_in_rows_counts_in_cells_and_shares_as_colours() -> None:
    labels, called = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1])
    predictions = Predictions(
        logits=np.eye(3, dtype=np.float32)[called], classes=("a", "b", "c"), names=("",) * 5, labels=labels
    )
    data = RunData(name="r", title="t", classes=("a", "b", "c"), epochs=(), score=score(predictions))
    axes = report.confusion(data).axes[0]
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert [[cells[row, column] for column in range(3)] for row in range(3)] == [
        ["3", "1", "0"],
        ["0", "1", "0"],
        ["0", "0", "0"],
    ]
    shares = axes.images[0].get_array()
    assert isinstance(shares, np.ma.MaskedArray)
    assert shares[:2].tolist() == [[0.75, 0.25, 0], [0, 1, 0]]
    assert np.ma.getmaskarray(shares)[2].all(), "a class without images has no shares"
    title = axes.get_figure(root=True)
    assert isinstance(title, Figure)
    assert title.get_suptitle().startswith("t\nvalidation, n = 5, top-1 80.0 % (95 % interval ")


def test_numbers_can_be_read_on_their_cells() -> None:
    figure = report.confusion(run(classes=[f"c{i}" for i in range(10)]))
    axes = figure.axes[0]
    picture = axes.images[0]
    for t in axes.texts:
        column, row = (round(v) for v in t.get_position())
        share = picture.get_array()[row, column]  # type: ignore[index]
        ink = matplotlib.colors.to_rgb(t.get_color())
        paper = picture.cmap(picture.norm(share))[:3]
        contrast = abs(np.dot(np.subtract(ink, paper), (0.2126, 0.7152, 0.0722)))
        assert contrast > (0.2 if t.get_text() == "0" else 0.45), (t.get_text(), share)


def test_a_run_without_a_score_has_no_confusion() -> None:
    with pytest.raises(ValueError, match="no score"):
        report.confusion(RunData(name="r", title="t", classes=("a",), epochs=()))


NAMES = [
    "猫",
    "狗和猫",
    "bird 鸟",
    "ねこ",
    "고양이",
    "😀",
    "كلب",
    "कुत्ता",
    "a\tb\nc",
    "$x^2$ and $y$",
    "a_b^c\\d{",
    "",
    " ",
    "ñandú",
]


@pytest.mark.parametrize("name", report.PLOTS)
def test_names_in_any_script_are_drawn_without_a_warning(name: str, tmp_path: Path) -> None:
    data = run(classes=NAMES, title="猫狗 $10 to $20\n数据集")
    texts = [t.get_text() for t in drawn(report.PLOTS[name](data))]
    assert png(report.PLOTS[name](data), tmp_path / "a.png").size
    if name == "confusion":
        assert "$x^2$ and $y$" in texts
        assert "a b c" in texts
        assert "ñandú" in texts


# ---- contact sheet


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("n", [1, 2, 10, 11, 25])
@pytest.mark.parametrize("columns", [1, 4, 10])
def test_a_sheet_shows_every_image_and_caption(n: int, columns: int) -> None:
    captions = [f"automobile → truck {i} %" for i in range(n)]
    texts = drawn(report.contact_sheet([photo(32, 32)] * n, captions, "Mistakes", columns=columns))
    assert not overlap(texts)
    assert [t.get_text().replace("\n", " ").replace("\xa0", " ") for t in texts] == ["Mistakes", *captions]


def test_captions_never_run_into_each_other() -> None:
    captions = ["W" * 60, "M " * 40, "a sentence that is far too long for the room there is", "", "ordinary", "é" * 40]
    texts = drawn(report.contact_sheet([photo(32, 32)] * 6, captions, "T " * 200, columns=3))
    assert not overlap(texts)
    assert len(texts) == 6


@pytest.mark.parametrize(("side", "factor"), [(8, 16), (28, 4), (32, 4), (64, 2), (96, 1), (128, 1)])
def test_small_images_are_enlarged_by_a_whole_factor(side: int, factor: int, tmp_path: Path) -> None:
    image = photo(side, side)
    picture = png(report.contact_sheet([image], ["x"], "t"), tmp_path / "a.png")
    assert _contains(picture, image.repeat(factor, 0).repeat(factor, 1))


def test_photographs_are_shrunk_and_grey_images_are_grey(tmp_path: Path) -> None:
    wide = np.full((300, 600, 3), (200, 30, 40), np.uint8)
    assert _contains(png(report.contact_sheet([wide], [""], ""), tmp_path / "a.png"), wide[:64, :128])
    grey = photo(32, 32, 1)
    large = grey.repeat(4, 0).repeat(4, 1).repeat(3, 2)
    assert _contains(png(report.contact_sheet([grey], [""], ""), tmp_path / "b.png"), large)
    assert _contains(png(report.contact_sheet([grey[:, :, 0]], [""], ""), tmp_path / "c.png"), large)
    thin = np.zeros((1, 5000, 3), np.uint8)
    assert (png(report.contact_sheet([thin], [""], ""), tmp_path / "d.png") == 0).all(2).sum() == 128


def _contains(picture: NDArray[np.uint8], part: NDArray[np.uint8]) -> bool:
    height, width = part.shape[:2]
    return any(
        np.array_equal(picture[y : y + height, x : x + width], part)
        for y in range(picture.shape[0] - height + 1)
        for x in range(8, min(picture.shape[1] - width, 40))
        if np.array_equal(picture[y, x : x + 4], part[0, :4])
    )


def test_a_sheet_of_nothing_or_of_too_few_captions() -> None:
    assert [t.get_text() for t in drawn(report.contact_sheet([], [], "nothing"))] == ["nothing"]
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        report.contact_sheet([photo(4, 4)] * 2, ["a"], "t")


# ---- text


@given(st.text(max_size=80), st.integers(4, 40), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_wrapped_text_keeps_to_its_room(line: str, columns: int, lines: int) -> None:
    line = text.drawable([line])[0][0]
    rows = text.wrap(line, columns, lines=lines).split("\n")
    assert len(rows) <= lines
    assert all(text.columns_of(row) <= columns for row in rows)
    if not any("…" in row for row in rows):
        assert "".join("".join(rows).split()) == "".join(line.split())


@pytest.mark.parametrize(
    ("line", "columns", "lines", "expected"),
    [
        ("short", 10, 2, "short"),
        ("one two three", 8, 2, "one two\nthree"),
        ("one two three four five", 8, 2, "one two\nthree…"),
        ("cat and dog 95 %", 14, 2, "cat and dog\n95\xa0%"),
        ("unbreakable", 6, 2, "unbr…"),
        ("", 5, 2, ""),
    ],
)
def test_wrapping(line: str, columns: int, lines: int, expected: str) -> None:
    assert text.wrap(line, columns, lines=lines) == expected


def test_a_character_that_no_font_has_becomes_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_other_fonts", lambda: ())
    assert text.drawable(["猫", "bird 鸟", "ok", ""]) == (["class 0", "bird □", "ok", ""], ["DejaVu Sans"])
    assert text.drawable(["猫 run"]) == (["□ run"], ["DejaVu Sans"])
    assert text.drawable(["猫"]) == (["□"], ["DejaVu Sans"])


def test_another_installed_font_is_taken_where_it_has_the_character(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = {"A": frozenset("x"), "B": frozenset("猫"), "C": frozenset("猫鸟"), "D": frozenset("鸟")}
    base = text._characters(matplotlib.font_manager.findfont("DejaVu Sans"))
    monkeypatch.setattr(text, "_other_fonts", lambda: [(name, name) for name in fonts])
    monkeypatch.setattr(text, "_characters", lambda path: fonts.get(path, base))
    assert text.drawable(["猫", "鸟", "a"]) == (["猫", "鸟", "a"], ["DejaVu Sans", "B", "C"])


def test_a_font_file_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    assert text._characters(str(tmp_path / "broken.ttf")) == frozenset()
    assert text._characters(str(tmp_path / "none.ttf")) == frozenset()


# ---- files and state


def test_saving_replaces_a_picture_whole(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    report.save(report.curves(run()), path)
    first = path.read_bytes()
    report.save(report.curves(run()), path)
    assert path.read_bytes() == first, "the same run gives the same bytes"
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    assert Image.open(io.BytesIO(first)).size == (1650, 720)
    with pytest.raises(ResNetLabError, match="Cannot write"):
        report.save(report.curves(run()), tmp_path / "no" / "a.png")


def test_the_table_draws_every_panel(tmp_path: Path) -> None:
    assert list(report.PLOTS) == ["curves", "confusion"]
    before = dict(matplotlib.rcParams)
    for name, plot in report.PLOTS.items():
        assert plot.__doc__
        assert png(plot(run()), tmp_path / f"{name}.png").std() > 0
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("module", ["report", "metrics", "recipes", "config"])
def test_pictures_numbers_and_configuration_never_load_torch(module: str) -> None:
    code = f"import sys, resnetlab.{module}; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_caption_that_cannot_be_drawn_is_the_same_under_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_other_fonts", lambda: ())
    texts = drawn(report.contact_sheet([photo(8, 8)] * 4, ["cat", "猫", "猫", "cat"], "t"))
    assert [t.get_text() for t in texts] == ["t", "cat", "class 1", "class 1", "cat"]
