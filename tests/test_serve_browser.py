"""The page in a real browser (Debian's Chromium, driven by Playwright): what a person sees, what a browser sends."""

import csv
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnetlab import api, bundle, models
from resnetlab.bundle import Card
from resnetlab.config import ModelConfig
from resnetlab.metrics import answers
from resnetlab.preprocess import Preprocess
from resnetlab.recipes import RECIPES, Facts
from resnetlab.serve.app import create_app
from resnetlab.serve.connections import Server, bind, settings
from resnetlab.serve.limits import Limits, State

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
DROP = """async ([files]) => {
    const transfer = new DataTransfer();
    for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name));
    for (const kind of ["dragenter", "dragover", "drop"])
        document.querySelector("h1").dispatchEvent(
            new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""
PASTE = """async ([bytes]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" }));
    document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with random weights, and a report beside it."""
    torch.manual_seed(3)
    classes = ("ant", "bee", "cat", "dög")
    config = ModelConfig(name="resnet20", num_classes=len(classes), in_channels=3)
    preprocess = Preprocess(size=16, resize=18, mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))
    recipe = RECIPES["default"](Facts(images=100, size=16, mirrors=True))
    path = tmp_path_factory.mktemp("run")
    card = Card(model=config, classes=classes, preprocess=preprocess, recipe=recipe, data={"name": "made-up"})
    bundle.save(path, models.build(config).state_dict(), card)
    (path / "report.html").write_text(
        "<!doctype html><title>R</title><p id=p style='color:red'></p>"
        "<script>document.getElementById('p').textContent = 'the report'</script>"
    )
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    files = []
    for i in range(100):
        pixels = generator.integers(0, 255, (24 + i % 9, 32, 3), dtype=np.uint8)
        files.append(folder / f"{i:03}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    """The service on a free port, in a thread of this process."""
    listening = bind("127.0.0.1", 0)
    limits, state = Limits(notice_s=0), State()
    app = create_app(bundle.load(run), limits, state=state, report=run / "report.html", hosts=("127.0.0.1",))
    opened = threading.Event()
    server = Server(settings(app, limits), limits, state, opened.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert opened.wait(60)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield opened
        opened.close()


class Visit:
    """A page, and all that it asked for and complained about."""

    def __init__(self, browser: Any, url: str, **how: Any) -> None:
        self.context = browser.new_context(**how)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("body[data-ready]")
        self.url = url

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def wait(self, selector: str) -> None:
        self.page.wait_for_selector(f"{selector}:not([hidden])", timeout=20_000)

    def close(self, refusals: int = 0) -> None:
        """Check that nobody else was asked, and that nothing was blocked or went wrong."""
        self.context.close()
        assert all(asked.startswith((self.url, "blob:", "data:")) for asked in self.asked), self.asked
        bad = [text for text in self.complaints if "the server responded with a status of 4" not in text]
        assert not bad, bad
        assert len(self.complaints) <= refusals


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visit]:
    visit = Visit(browser, url)
    yield visit
    visit.context.close()


def told(run: Path, file: Path) -> dict[str, Any]:
    return answers(api.load(run).predict(file), [file.name], 5)[0]


def percent(p: float) -> str:
    return "> 99.9 %" if p > 0.999 else "< 0.1 %" if p < 0.001 else f"{p * 100:.1f} %"


def test_a_dropped_image_shows_its_class_and_where_the_network_looks(
    visit: Visit, run: Path, pictures: list[Path]
) -> None:
    right = told(run, pictures[0])
    visit.page.evaluate(DROP, [[["drop.png", list(pictures[0].read_bytes())]]])
    visit.wait("#single")
    assert visit.text("#verdict") == right["class"]
    assert visit.page.locator("#bars .name").all_inner_texts() == [t["class"] for t in right["top"]]
    assert visit.page.locator("#bars .value").all_inner_texts() == [percent(t["probability"]) for t in right["top"]]
    assert visit.text("#status") == f"drop.png: {right['class']}, {percent(right['probability'])}."
    visit.wait("#why")
    heat = visit.page.locator("#heat")
    assert heat.evaluate("e => e.style.opacity") == "0.55"
    visit.page.locator("#opacity").fill("20")
    assert heat.evaluate("e => e.style.opacity") == "0.2"
    assert visit.text("#opacityvalue") == "20 %"
    seen, whole = heat.bounding_box(), visit.page.locator("#picture").bounding_box()
    assert 0 < seen["width"] < whole["width"] and seen["y"] >= whole["y"]  # the centre of a wide picture
    visit.close()


def test_a_bad_file_is_explained_and_the_next_one_works(visit: Visit, pictures: list[Path], tmp_path: Path) -> None:
    for content, reason in (
        (b"not an image", "not an image"),
        (pictures[0].read_bytes()[:500], "cut off"),
        (b"", "is empty"),
    ):
        bad = tmp_path / "holiday: 1.jpg"
        bad.write_bytes(content)
        visit.page.set_input_files("#files", bad)
        visit.wait("#alert")
        visit.page.wait_for_function(
            "reason => document.getElementById('alert').textContent.toLowerCase().includes(reason)", arg=reason
        )
        assert "holiday: 1.jpg could not be read." in visit.text("#alert")
        assert not visit.page.is_visible("#single")
    visit.page.set_input_files("#files", pictures[1])
    visit.wait("#single")
    assert not visit.page.is_visible("#alert")
    visit.close(refusals=2)


def test_100_images_are_the_same_in_the_browser_and_from_predict(
    visit: Visit, run: Path, pictures: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "zz.png"
    bad.write_bytes(b"no")
    visit.page.set_input_files("#files", [*pictures, bad])
    visit.page.wait_for_function(
        "() => document.getElementById('status').textContent === '101 images done.'", timeout=60_000
    )
    assert visit.text("#alert") == "1 of 101 images could not be read; the table says why."
    assert "Not an image" in visit.text("#rows tr:last-child .why-not")
    with visit.page.expect_download() as download:
        visit.page.click("#csv")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    right = answers(api.load(run).predict(pictures), [p.name for p in pictures], 5)
    assert [(r["file"], r["class"]) for r in rows] == [(r["file"], r["class"]) for r in right]
    found = np.array([[float(r[k]) for k in ("probability", "probability_2", "probability_4")] for r in rows])
    expected = np.array([[r["top"][k]["probability"] for k in (0, 1, 3)] for r in right])
    assert np.abs(found - expected).max() < 1e-5
    visit.page.click("#rows tr:nth-child(7) button")
    visit.wait("#single")
    assert visit.text("#verdict") == right[6]["class"]
    visit.page.click("#clear")
    assert not visit.page.is_visible("#batch")
    visit.close()


def test_a_pasted_image_is_read(visit: Visit, run: Path, pictures: list[Path]) -> None:
    visit.page.evaluate(PASTE, [list(pictures[2].read_bytes())])
    visit.wait("#single")
    assert visit.text("#verdict") == told(run, pictures[2])["class"]
    visit.close()


def test_the_camera_takes_a_picture(browser: Any, url: str) -> None:
    visit = Visit(browser, url, permissions=["camera"])
    visit.page.click("#camera")
    visit.page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
    visit.page.click("#take")
    visit.wait("#single")
    assert visit.text("#caption") == "camera.png"
    visit.close()


def test_a_camera_that_is_asked_for_twice_is_let_go_of(browser: Any, url: str) -> None:
    visit = Visit(browser, url, permissions=["camera"])
    visit.page.evaluate("""() => {
        const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        window.tracks = [];
        navigator.mediaDevices.getUserMedia = async (how) => {
            await new Promise((done) => setTimeout(done, 300));
            const stream = await open(how);
            window.tracks.push(...stream.getTracks());
            return stream;
        };
    }""")
    visit.page.evaluate("() => { for (let i = 0; i < 2; i++) document.getElementById('camera').click(); }")
    visit.page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
    visit.page.keyboard.press("Escape")
    visit.page.wait_for_function("() => window.tracks.every((track) => track.readyState === 'ended')")
    assert visit.page.evaluate("window.tracks.length") == 1
    visit.close()


def test_a_file_that_cannot_be_read_spoils_no_other(visit: Visit, pictures: list[Path]) -> None:
    """A folder that was dropped, or a file that has been removed since it was chosen."""
    visit.page.evaluate(
        """([name, bytes]) => {
            const good = new File([Uint8Array.from(bytes)], name, { type: "image/png" });
            const gone = new File(["x"], "gone.png");
            gone.slice = () => ({ arrayBuffer: () => Promise.reject(new Error("NotFoundError")) });
            take([gone, good]);
        }""",
        [pictures[0].name, list(pictures[0].read_bytes())],
    )
    visit.page.wait_for_function("() => document.getElementById('status').textContent === '2 images done.'")
    assert "1 of 2 images could not be read" in visit.text("#alert")
    rows = visit.text("#rows")
    assert "It is a folder, or a file that was changed or removed" in rows and "cannot be reached" not in rows
    visit.close()


def test_the_keyboard_is_enough(visit: Visit, pictures: list[Path]) -> None:
    page = visit.page
    page.on("filechooser", lambda chooser: None)  # asked for now: a key pressed at once would overtake the asking
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "pick":
            break
    assert page.evaluate("document.activeElement.id") == "pick"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(pictures[3])
    visit.wait("#why")
    assert page.evaluate("document.activeElement.id") == "verdict"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "opacity"
    page.keyboard.press("ArrowRight")
    assert visit.text("#opacityvalue") == "60 %"
    visit.close()


def test_everything_has_a_name_for_a_screen_reader(visit: Visit, pictures: list[Path]) -> None:
    visit.page.set_input_files("#files", pictures[4])
    visit.wait("#why")
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll("button, input, a, img, section, progress")]
            .filter((e) => !(e.innerText || e.getAttribute("aria-label") || e.labels?.length || e.hasAttribute("alt")))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert visit.page.get_attribute("html", "lang") == "en"
    assert visit.page.get_attribute("#status", "aria-live") == "polite"
    assert visit.page.get_attribute("#alert", "role") == "alert"
    visit.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, url: str, pictures: list[Path], scheme: str) -> None:
    visit = Visit(
        browser, url, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme
    )
    for files in (pictures[5], pictures[:3]):
        visit.page.set_input_files("#files", files)
        visit.wait("#batch" if isinstance(files, list) else "#why")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert visit.page.locator("#pick").bounding_box()["height"] >= 44
    visit.close()


def test_report_and_documentation_are_one_click_away(visit: Visit) -> None:
    visit.page.click("#report")
    assert visit.text("#p") == "the report"
    visit.page.go_back()
    visit.page.click("text=API")
    visit.page.wait_for_selector("article")
    assert "/predict" in visit.text("#operations") and "curl" in visit.text("#operations")
    visit.close()
