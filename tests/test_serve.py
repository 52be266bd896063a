"""The service: the same answers as `predict`, limits that hold, and nothing lost, shown on real connections."""

import asyncio
import contextlib
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from resnetlab import api, bundle, models, serve
from resnetlab.bundle import Bundle, Card
from resnetlab.cli import main
from resnetlab.config import ModelConfig
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.metrics import answers
from resnetlab.preprocess import Preprocess
from resnetlab.recipes import RECIPES, Facts
from resnetlab.serve.app import create_app
from resnetlab.serve.batching import Batcher, Full
from resnetlab.serve.errors import Refusal
from resnetlab.serve.limits import Limits, State
from resnetlab.serve.network import BundlePredictor, seen
from resnetlab.serve.report import policy
from resnetlab.serve.uploads import read
from resnetlab.sources.images import decode

CLASSES = ("ant", "bee", "cat", "dög")
PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small network with random weights: its answers differ from image to image, which is all we need."""
    torch.manual_seed(0)
    config = ModelConfig(name="resnet20", num_classes=len(CLASSES), in_channels=3)
    preprocess = Preprocess(size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))
    recipe = RECIPES["default"](Facts(images=100, size=16, mirrors=True))
    card = Card(model=config, classes=CLASSES, preprocess=preprocess, recipe=recipe, data={"name": "made-up"})
    path = tmp_path_factory.mktemp("run")
    bundle.save(path, models.build(config).state_dict(), card)
    return path


@pytest.fixture(scope="module")
def loaded(run: Path) -> Bundle:
    return bundle.load(run)


def test_of_a_network_without_feature_maps_no_method_is_offered_that_needs_them() -> None:
    config = ModelConfig(name="linear", num_classes=2, in_channels=3, image_size=8)
    preprocess = Preprocess(size=8, resize=8, mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))
    recipe = RECIPES["default"](Facts(images=100, size=8, mirrors=True, model="linear"))
    card = Card(model=config, classes=("a", "b"), preprocess=preprocess, recipe=recipe, data={})
    methods = BundlePredictor(Bundle(model=models.build(config), card=card, path=Path())).methods
    assert not any(name.endswith("-cam") for name in methods)


def picture(seed: int, size: tuple[int, int] = (16, 16), format: str = "PNG") -> bytes:
    """Return an encoded image that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int = 20_000) -> bytes:
    """Return a PNG of some hundred bytes that says it has ``side`` × ``side`` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def expected(run: Path, images: Sequence[bytes], top: int = 5) -> list[dict[str, Any]]:
    """Return what `resnetlab predict` says of images, each predicted alone."""
    opened = api.load(run)
    rows = []
    for data in images:
        pixels = decode(data, channels=3)
        rows += answers(opened.predict(pixels), ["image"], top)
    return rows


def near(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two answers are the same up to the rounding of another batch size."""
    same = [t["class"] for t in one["top"]] == [t["class"] for t in two["top"]]
    return same and all(
        abs(a["probability"] - b["probability"]) < 1e-5 for a, b in zip(one["top"], two["top"], strict=True)
    )


class Client:
    """Talks to an application in this process."""

    def __init__(self, app: Any) -> None:
        self.runner = asyncio.Runner()
        self.lifespan = app.router.lifespan_context(app)
        self.runner.run(self.lifespan.__aenter__())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    def __call__(self, method: str, path: str, **how: Any) -> httpx.Response:
        return self.runner.run(self.http.request(method, path, **how))

    def all(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[httpx.Response]:
        """Post several requests at the same time."""

        async def gather() -> list[httpx.Response]:
            return await asyncio.gather(*(self.http.post(path, **how) for path, how in calls))

        return self.runner.run(gather())

    def close(self) -> None:
        self.runner.run(self.http.aclose())
        self.runner.run(self.lifespan.__aexit__(None, None, None))
        self.runner.close()


@pytest.fixture(scope="module")
def client(loaded: Bundle) -> Iterator[Client]:
    opened = Client(create_app(loaded))
    yield opened
    opened.close()


@contextlib.contextmanager
def limited(loaded: Bundle, **limits: Any) -> Iterator[Client]:
    opened = Client(create_app(loaded, Limits(**limits)))
    try:
        yield opened
    finally:
        opened.close()


def error(response: httpx.Response) -> tuple[int, str]:
    """Return status and code of an error, and check its form."""
    found = response.json()["error"]
    assert found["message"] and len(found["message"]) < 600
    assert response.headers["content-type"] == "application/json"
    return response.status_code, found["code"]


# Answers


def test_a_lone_request_is_answered_exactly_as_predict_does(client: Client, run: Path) -> None:
    images = [picture(i, (16 + i, 20)) for i in range(3)]
    for data, row in zip(images, expected(run, images), strict=True):
        reply = client("POST", "/predict", content=data, headers=PNG).json()
        assert reply == {"model": "resnet20 on made-up", "images": [row], "broken": []}


def test_a_form_is_answered_exactly_as_predict_does_for_these_files(client: Client, run: Path, tmp_path: Path) -> None:
    files = []
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(picture(i, (30, 17)))
        files.append(("images", (f"{i}.png", picture(i, (30, 17)))))
    opened = api.load(run)
    rows = answers(opened.predict(sorted(tmp_path.iterdir())), [f"{i}.png" for i in range(9)], 2)
    assert client("POST", "/predict?top=2", files=files).json()["images"] == rows


def test_requests_computed_together_get_their_own_answers(client: Client, run: Path) -> None:
    images = [picture(i) for i in range(100)]
    replies = client.all([("/predict", {"content": data, "headers": PNG}) for data in images])
    rows = expected(run, images)
    assert all(near(reply.json()["images"][0], row) for reply, row in zip(replies, rows, strict=True))
    counted = client("GET", "/metrics").text
    assert 'resnetlab_requests_total{method="POST",path="/predict",status="200"}' in counted
    assert "resnetlab_queue_images 0.0" in counted


def test_the_unreadable_are_named_and_can_be_left_out(client: Client) -> None:
    files = [("images", ("good.png", picture(1))), ("images", ("bad.png", picture(2)[:200]))]
    response = client("POST", "/predict", files=files)
    assert error(response) == (422, "broken_image")
    assert response.json()["error"]["file"] == "bad.png"
    reply = client("POST", "/predict?skip_broken=true", files=files).json()
    assert [r["file"] for r in reply["images"]] == ["good.png"]
    assert reply["broken"][0]["file"] == "bad.png"
    assert "cut off" in reply["broken"][0]["message"]


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read_whatever_it_is_called(client: Client, run: Path, format: str) -> None:
    data = picture(5, format=format)
    reply = client("POST", "/predict", content=data, headers=PNG)
    assert reply.json()["images"] == expected(run, [data])


BAD_IMAGES: dict[str, tuple[bytes, int, str]] = {
    "text": (b"hello there, this is not an image", 415, "not_an_image"),
    "html": (b"<html><body>no</body></html>", 415, "not_an_image"),
    "pdf": (b"%PDF-1.7 ...", 415, "not_an_image"),
    "empty": (b"", 422, "no_image"),
    "magic only": (b"\x89PNG\r\n\x1a\n", 422, "broken_image"),
    "cut off": (picture(1)[:300], 422, "broken_image"),
    "jpeg cut off": (picture(1, (64, 64), "JPEG")[:900], 422, "broken_image"),
    "bomb": (bomb(), 413, "image_too_large"),
    "zeros": (bytes(1000), 415, "not_an_image"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_with_a_reason(client: Client, name: str) -> None:
    data, status, code = BAD_IMAGES[name]
    for path in ("/predict", "/explain"):
        assert error(client("POST", path, content=data, headers=PNG)) == (status, code)
        if data:
            assert error(client("POST", path, files={"image": ("x.png", data)})) == (status, code)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("top=0", "invalid_parameter"),
        ("top=-1", "invalid_parameter"),
        ("top=many", "invalid_parameter"),
        ("top=1e3", "invalid_parameter"),
        ("top=", "invalid_parameter"),
        ("tpo=3", "unknown_parameter"),
        ("skip_broken=perhaps", "invalid_parameter"),
    ],
)
def test_wrong_parameters_are_refused(client: Client, query: str, code: str) -> None:
    assert error(client("POST", f"/predict?{query}", content=picture(1), headers=PNG)) == (422, code)


def test_more_places_than_classes_are_all_classes(client: Client) -> None:
    reply = client("POST", "/predict?top=99999999999999999999", content=picture(1), headers=PNG).json()
    assert {t["class"] for t in reply["images"][0]["top"]} == set(CLASSES)


# Explanations


def test_explain_returns_a_map_and_pictures(client: Client, run: Path) -> None:
    data = picture(3, (40, 20))
    reply = client("POST", "/explain", content=data, headers=PNG).json()
    top = expected(run, [data])[0]
    assert reply["class"] == top["class"]
    assert reply["probability"] == pytest.approx(top["probability"], abs=1e-5)
    assert reply["method"] == "grad-cam"
    assert reply["box"] == [0.0, 0.25, 1.0, 0.75]
    for name in ("heat_png", "overlay_png"):
        assert reply[name].startswith("data:image/png;base64,")
    values = client("POST", "/explain?format=values&target=bee&method=eigen-cam", content=data, headers=PNG)
    assert Image.open(io.BytesIO(values.content)).size == (16, 16)


@pytest.mark.parametrize(
    "query", ["method=nonsense", "stage=nowhere", "target=unicorn", "format=pdf", "metod=grad-cam"]
)
def test_what_cannot_be_explained_is_refused(client: Client, query: str) -> None:
    assert client("POST", f"/explain?{query}", content=picture(3), headers=PNG).status_code == 422


def test_the_seen_part_of_an_image() -> None:
    squash = Preprocess(size=8, resize=16, fit="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert seen(squash, 10, 30) == (0.25, 0.25, 0.75, 0.75)
    pad = squash.model_copy(update={"fit": "pad", "size": 16})
    assert seen(pad, 10, 20) == (0.0, -0.5, 1.0, 1.5)


# Pages


def test_pages_come_with_a_strict_policy(client: Client) -> None:
    for path in (
        "/",
        "/docs",
        "/page/app.js",
        "/page/style.css",
        "/page/docs.js",
        "/page/icon.svg",
        "/predict",
        "/nope",
    ):
        response = client("GET", path)
        rules = response.headers["content-security-policy"]
        assert "default-src 'none'" in rules and "unsafe" not in rules and "frame-ancestors 'none'" in rules
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"


def test_pages_ask_nobody_else() -> None:
    folder = Path(serve.__file__).parent / "page"
    for page in folder.iterdir():
        text = page.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
        assert "<script>" not in text and " onclick" not in text and " style=" not in text


def test_openapi_describes_the_routes(client: Client) -> None:
    described = client("GET", "/openapi.json").json()
    assert set(described["paths"]) == {"/predict", "/explain", "/info", "/healthz", "/readyz", "/metrics"}
    body = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(body) == {"image/*", "application/octet-stream", "multipart/form-data"}
    assert "413" in described["paths"]["/predict"]["post"]["responses"]


def test_the_report_may_run_its_own_scripts_only(loaded: Bundle, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    opened = Client(create_app(loaded, report=report))
    assert error(opened("GET", "/report")) == (404, "no_report")
    report.write_text("<p style='color:red'>Hi</p><script>let a = 1;</script>")
    response = opened("GET", "/report")
    opened.close()
    assert response.text == report.read_text()
    rules = response.headers["content-security-policy"]
    assert "script-src 'sha256-" in rules and "sandbox" in rules
    assert "'unsafe-inline'" not in rules.split("style-src")[0]
    assert policy(b"<p>") != rules


@pytest.mark.parametrize(
    "path",
    ["/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/..%2f..%2fetc/passwd", "/page/app.js/", "/%00"],
)
def test_no_path_leads_to_a_file(client: Client, path: str) -> None:
    assert error(client("GET", path))[0] in (404, 405)


# Limits


def test_bytes_images_and_queue_are_bounded(loaded: Bundle) -> None:
    with limited(loaded, body_bytes=3000, images=2, queue=2, explanations=0) as client:
        assert error(client("POST", "/predict", content=bytes(3001), headers=PNG)) == (413, "too_large")
        files = [("images", ("x.png", picture(i, (4, 4)))) for i in range(3)]
        assert error(client("POST", "/predict", files=files)) == (413, "too_many_images")
        assert client("POST", "/predict", files=files[:2]).status_code == 200
        replies = client.all([("/predict", {"files": files[:2]})] * 20)
        full = [r for r in replies if r.status_code != 200]
        assert full and all(error(r) == (503, "busy") and r.headers["retry-after"] == "1" for r in full)
        assert any(r.status_code == 200 for r in replies)
        assert client("POST", "/explain", content=picture(1), headers=PNG).status_code == 503
        assert client("POST", "/predict", files=files[:2]).status_code == 200


def test_requests_at_a_time_are_bounded_but_health_is_told(loaded: Bundle) -> None:
    with limited(loaded, requests=0) as client:
        response = client("POST", "/predict", content=picture(1), headers=PNG)
        assert error(response) == (429, "too_many_requests")
        assert response.headers["retry-after"] == "1"
        assert client("GET", "/healthz").status_code == client("GET", "/readyz").status_code == 200


def test_memory_for_bodies_is_bounded(loaded: Bundle) -> None:
    with limited(loaded, bytes_in_flight=100) as client:
        assert error(client("POST", "/predict", content=picture(1), headers=PNG)) == (503, "busy")


def test_pixels_are_bounded(loaded: Bundle) -> None:
    with limited(loaded, pixels=100) as client:
        assert error(client("POST", "/predict", content=picture(1), headers=PNG)) == (413, "image_too_large")


def test_an_answer_that_takes_too_long_is_given_up_and_the_next_request_is_answered() -> None:
    free = threading.Event()
    free.set()

    class Stuck(Fake):
        def logits(self, prepared: list[Any]) -> Any:
            free.wait(20)
            return super().logits(prepared)

    def ask() -> httpx.Response:
        return opened("POST", "/predict", content=picture(1), headers=PNG)

    opened = Client(create_app(Stuck(), Limits(answer_s=0.2)))
    free.clear()
    assert error(ask()) == (504, "too_slow")
    free.set()
    until = time.monotonic() + 10
    while (status := ask().status_code) == 504 and time.monotonic() < until:  # a busy machine is slow
        pass
    opened.close()
    assert status == 200


@pytest.mark.parametrize(("rate", "status"), [(10, 200), (10**6, 408)])
def test_a_body_is_given_time_in_step_with_what_came_of_it(loaded: Bundle, rate: int, status: int) -> None:
    async def halves() -> AsyncIterator[bytes]:
        yield IMAGE[:500]
        await asyncio.sleep(0.2)
        yield IMAGE[500:]

    with limited(loaded, receive_s=0.05, receive_rate=rate) as client:
        assert client("POST", "/predict", content=halves(), headers=PNG).status_code == status


@pytest.mark.parametrize(
    "headers", [{"content-length": "9" * 5000}, {"content-length": "5", "transfer-encoding": "chunked"}]
)
def test_a_length_that_cannot_be_is_refused(client: Client, headers: dict[str, str]) -> None:
    response = client("POST", "/predict", content=IMAGE, headers={**PNG, **headers})
    assert error(response) == (400, "bad_request")


def test_a_failing_network_is_a_500_in_json_and_the_next_request_is_answered() -> None:
    class Broken(Fake):
        def logits(self, prepared: list[Any]) -> Any:
            if self.slow:
                raise RuntimeError("secret path /root/x")
            return super().logits(prepared)

    network = Broken()
    opened = Client(create_app(network))
    network.slow = True
    response = opened("POST", "/predict", content=picture(1), headers=PNG)
    assert error(response) == (500, "internal") and "secret" not in response.text
    counted = opened("GET", "/metrics").text
    assert 'resnetlab_requests_total{method="POST",path="/predict",status="500"} 1.0' in counted
    network.slow = False
    assert opened("POST", "/predict", content=picture(1), headers=PNG).status_code == 200
    opened.close()


class Fake:
    """A network that says how bright an image is, to show that anything with these members can be served."""

    name, classes, channels, methods = "fake", ("dark", "bright"), 3, ()
    slow = False

    def prepare(self, image: Any) -> float:
        return float(image.mean())

    def logits(self, prepared: list[Any]) -> Any:
        return np.array([[0, value - 128] for value in prepared], np.float32)

    def explain(self, image: Any, method: str, stage: str | None, target: str | None) -> Any:
        raise AssertionError


def test_anything_that_predicts_can_be_served() -> None:
    opened = Client(create_app(Fake()))
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "white").save(file, "PNG")
    assert opened("POST", "/predict", content=file.getvalue(), headers=PNG).json()["images"][0]["class"] == "bright"
    assert error(opened("POST", "/explain", content=file.getvalue(), headers=PNG)) == (501, "no_explanations")
    opened.close()


def test_another_name_or_another_site_is_refused(loaded: Bundle) -> None:
    opened = Client(create_app(loaded, hosts=("127.0.0.1", "[::1]")))
    assert error(opened("GET", "/info", headers={"host": "evil.example"})) == (421, "wrong_host")
    assert error(opened("GET", "/info", headers={"host": "127.0.0.1.evil.example:80"})) == (421, "wrong_host")
    assert opened("GET", "/info", headers={"host": "[::1]:8000"}).status_code == 200
    assert opened("GET", "/info", headers={"host": "127.0.0.1:9"}).status_code == 200
    cross = {**PNG, "sec-fetch-site": "cross-site"}
    assert error(opened("POST", "/predict", content=picture(1), headers=cross)) == (403, "cross_site")
    opened.close()


def test_readiness_follows_the_state(loaded: Bundle) -> None:
    state = State()
    opened = Client(create_app(loaded, state=state))
    assert opened("GET", "/readyz").status_code == 200
    state.ready, state.stopping = False, True
    assert error(opened("GET", "/readyz")) == (503, "not_ready")
    response = opened("POST", "/predict", content=picture(1), headers=PNG)
    assert response.status_code == 200 and response.headers["connection"] == "close"
    opened.close()


# The queue


def batcher(compute: Callable[[list[int]], Sequence[int]], **more: Any) -> "Batcher[int, int]":
    return Batcher(compute, **{"size": 8, "wait_s": 0.02, "capacity": 100, **more})


def test_items_of_a_moment_become_one_batch_and_each_gets_its_own() -> None:
    batches: list[list[int]] = []

    def double(items: list[int]) -> list[int]:
        batches.append(items)
        return [2 * i for i in items]

    async def work() -> list[list[int]]:
        queue = batcher(double)
        found = await asyncio.gather(*(queue.submit([i, i + 1]) for i in range(10)))
        await queue.close()
        return found

    assert asyncio.run(work()) == [[2 * i, 2 * i + 2] for i in range(10)]
    assert [len(b) for b in batches] == [8, 8, 4]


def test_nobody_waits_for_company_that_does_not_come() -> None:
    async def work() -> float:
        queue = batcher(lambda items: items, wait_s=5, coming=lambda: 0)
        start = time.monotonic()
        await queue.submit([1])
        await queue.close()
        return time.monotonic() - start

    assert asyncio.run(work()) < 1


def test_slow_networks_get_small_batches() -> None:
    sizes: list[int] = []

    async def work() -> list[list[int]]:
        queue = batcher(lambda items: time.sleep(0.02 * len(items)) or items, longest_s=0.05, tell=sizes.append)  # type: ignore[func-returns-value]
        await queue.submit([0])
        found = await asyncio.gather(*(queue.submit([i]) for i in range(8)))
        await queue.close()
        return found

    assert asyncio.run(work()) == [[i] for i in range(8)]
    assert max(sizes) <= 2


def test_a_full_queue_refuses_and_recovers() -> None:
    async def work() -> None:
        queue = batcher(lambda items: items, capacity=3)
        waiting = asyncio.create_task(queue.submit([1, 2]))
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await queue.submit([3, 4])
        assert await queue.submit([3]) == [3]
        assert await waiting == [1, 2]
        assert queue.waiting == 0
        await queue.close()
        with pytest.raises(Full):
            await queue.submit([1])

    asyncio.run(work())


def test_what_nobody_waits_for_is_not_computed() -> None:
    computed: list[int] = []

    async def work() -> None:
        queue = batcher(lambda items: computed.extend(items) or items)  # type: ignore[func-returns-value]
        tasks = [asyncio.create_task(queue.submit([i])) for i in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        assert [t for t in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(t, list)] == [
            [0],
            [2],
            [3],
        ]
        assert queue.waiting == 0
        await queue.close()

    asyncio.run(work())
    assert computed == [0, 2, 3]


def test_one_that_fails_does_not_spoil_the_batch() -> None:
    def picky(items: list[int]) -> list[int]:
        if 2 in items:
            raise ValueError("not two")
        return items

    async def work() -> list[Any]:
        queue = batcher(picky)
        found = await asyncio.gather(*(queue.submit([i]) for i in range(5)), return_exceptions=True)
        await queue.close()
        return found

    found = asyncio.run(work())
    assert isinstance(found[2], ValueError)
    assert [f for f in found if isinstance(f, list)] == [[0], [1], [3], [4]]


def test_closing_answers_what_was_accepted() -> None:
    async def work() -> list[list[int]]:
        queue = batcher(lambda items: time.sleep(0.01) or items, size=1)  # type: ignore[func-returns-value]
        tasks = [asyncio.create_task(queue.submit([i])) for i in range(10)]
        await asyncio.sleep(0)
        await queue.close()
        return await asyncio.gather(*tasks)

    assert asyncio.run(work()) == [[i] for i in range(10)]


# Forms


def form(parts: bytes, boundary: str = "b") -> tuple[str, bytes]:
    return f"multipart/form-data; boundary={boundary}", parts


PART = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\nDATA\r\n'


def bounded(boundary: str) -> tuple[str, bytes]:
    return form((PART + b"--b--\r\n").replace(b"--b", f"--{boundary}".encode()), boundary)


def test_forms_are_taken_apart() -> None:
    uploads = read(*form(PART + PART.replace(b'; filename="a.png"', b"") + b"--b--\r\n"), 5)
    assert [(u.name, u.data) for u in uploads] == [("a.png", b"DATA"), ("image 2", b"DATA")]
    assert [u.data for u in read(*bounded("b" * 70), 5)] == [b"DATA"]


def test_a_long_name_is_cut() -> None:
    [upload] = read(*form(PART.replace(b"a.png", b"a" * 256) + b"--b--\r\n"), 5)
    assert upload.name == "a" * 255


@pytest.mark.parametrize("kind", ["", "image/x", "application/octet-stream", "Application/Octet-Stream; x=y"])
def test_a_body_of_bytes_or_of_any_image_type_is_one_image(kind: str) -> None:
    assert [u.data for u in read(kind, b"DATA", 1)] == [b"DATA"]


BAD_FORMS: dict[str, tuple[str, bytes, int]] = {
    "no boundary": ("multipart/form-data", PART + b"--b--", 400),
    "empty boundary": ("multipart/form-data; boundary=", PART + b"--b--", 400),
    "long boundary": (*bounded("b" * 71), 400),
    "other boundary": ("multipart/form-data; boundary=c", PART + b"--b--", 400),
    "cut off in the data": (*form(PART[:-4]), 400),
    "cut off in a header": (*form(PART[:20]), 400),
    "no last boundary": (*form(PART), 400),
    "empty": (*form(b""), 400),
    "nothing in it": (*form(b"--b--\r\n"), 422),
    "noise": (*form(bytes(range(256)) * 4), 400),
    "other field": (*form(PART.replace(b"images", b"picture") + b"--b--"), 422),
    "no name": (*form(PART.replace(b'; name="images"', b"") + b"--b--"), 422),
    "no disposition": (*form(b"--b\r\nX: y\r\n\r\nDATA\r\n--b--"), 422),
    "bad header": (*form(b"--b\r\n\x00\x01: y\r\n\r\nDATA\r\n--b--"), 400),
    "long header": (*form(b"--b\r\nX: " + b"y" * 9000 + b"\r\n\r\nDATA\r\n--b--"), 400),
    "many headers": (*form(b"--b\r\n" + b"X: y\r\n" * 99 + b"\r\nDATA\r\n--b--"), 400),
    "many parts": (*form(PART * 100_000 + b"--b--"), 413),
    "form of a page": ("application/x-www-form-urlencoded", b"a=b", 415),
    "json": ("application/json", b"{}", 415),
    "text": ("text/plain", b"hello", 415),
    "multipart of another kind": ("multipart/mixed; boundary=b", PART + b"--b--", 415),
    "no body": ("image/png", b"", 422),
}


@pytest.mark.parametrize("name", BAD_FORMS)
def test_bad_forms_are_refused(name: str) -> None:
    kind, body, status = BAD_FORMS[name]
    with pytest.raises(Refusal) as found:
        read(kind, body, 64)
    assert found.value.status == status


def test_mutated_forms_are_answered_or_refused_but_nothing_else(client: Client) -> None:
    generator = random.Random(0)
    content = (
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    content += picture(1) + b"\r\n--b--\r\n"
    seen_statuses: dict[int, int] = {}
    for _ in range(300):
        data = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(min(len(data), generator.choice([140, len(data)])))
            match generator.randrange(4):
                case 0:
                    data[at] = generator.randrange(256)
                case 1:
                    del data[at : at + generator.randint(1, 30)]
                case 2:
                    data[at:at] = bytes(generator.randrange(256) for _ in range(generator.randint(1, 9)))
                case _:
                    data = data[:at] or bytearray(b"x")
        response = client(
            "POST", "/predict", content=bytes(data), headers={"content-type": "multipart/form-data; boundary=b"}
        )
        seen_statuses[response.status_code] = seen_statuses.get(response.status_code, 0) + 1
        if response.status_code != 200:
            assert error(response)[0] in (400, 413, 415, 422)
    assert set(seen_statuses) <= {200, 400, 413, 415, 422} and seen_statuses[400] > 50


# The command


def test_a_taken_port_and_a_wrong_address_are_explained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as done:
            main(["serve", str(run), "--port", str(port)])
    assert done.value.code == 1
    assert f"Port {port} is taken" in capsys.readouterr().err
    opening = serve._listen("127.0.0.1", 0)  # another server, which does not answer yet
    with opening, pytest.raises(ResNetLabError, match="is taken"):
        serve._listen("127.0.0.1", opening.getsockname()[1])
    for host, port in (
        ("256.0.0.1", 0),
        ("no such host", 0),
        ("192.0.2.1", 0),
        ("127.0.0.1", 70_000),
        ("127.0.0.1", -1),
    ):
        with pytest.raises(UsageError):
            api.load(run).serve(host=host, port=port)


def test_what_is_missing_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ResNetLabError, match=r'pip install "resnetlab\[serve\]"'):
        serve.check()


# On real connections

SCRIPT = """
import sys, json
if int(sys.argv[3]):
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]),) * 2)
from resnetlab import api
from resnetlab.console import Terminal
from resnetlab.serve.limits import Limits
api.load(sys.argv[1]).serve(port=0, limits=Limits(**json.loads(sys.argv[2])), display=Terminal())
"""


class Server:
    """A server in a process of its own."""

    def __init__(self, run: Path, *, files: int = 0, **limits: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(run), json.dumps(limits), str(files)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://127.0.0.1:" in line, self.process.communicate()
        self.port = int(line.split("127.0.0.1:")[1].split()[0])
        self.url = f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def raw(self, data: bytes, timeout: float = 20) -> bytes:
        """Send bytes as they are, and return all that comes back until the server closes."""
        with self.connect(timeout) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            return self.read(connection)

    @staticmethod
    def read(connection: socket.socket) -> bytes:
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
        return received

    def memory(self) -> float:
        """Return the resident memory, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def stop(self, sign: int = signal.SIGTERM) -> tuple[int, str, str]:
        if self.process.poll() is None:
            self.process.send_signal(sign)
        try:
            out, err = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out, err


@contextlib.contextmanager
def serving(run: Path, **how: Any) -> Iterator[Server]:
    server = Server(run, **how)
    try:
        yield server
        code, out, err = server.stop()
        assert (code, err) == (0, ""), err
        assert "every accepted request was answered" in out
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with serving(run, receive_s=2.5) as opened:
        yield opened


def request(body: bytes = b"", headers: str = "Content-Type: image/png", line: str = "POST /predict HTTP/1.1") -> bytes:
    head = [line, "Host: 127.0.0.1", "Connection: close", headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(h for i, h in enumerate(head) if h or i > 4).encode("latin-1") + body


IMAGE = picture(0)
OK = "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
MALFORMED: dict[str, bytes] = {
    "noise": bytes(range(1, 256)),
    "zeros": bytes(600),
    "tls": bytes.fromhex("160301020001000001fc0303") + bytes(200),
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http/0.9": b"GET /\r\n\r\n",
    "no version": b"POST /predict\r\nHost: a\r\n\r\n",
    "version 9": b"GET /info HTTP/9.9\r\nHost: a\r\n\r\n",
    "no host": b"GET /info HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /info HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "other host": b"GET /info HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "host with a path": b"GET /info HTTP/1.1\r\nHost: 127.0.0.1/x\r\n\r\n",
    "negative length": f"{OK}Content-Length: -5\r\n\r\n".encode() + IMAGE,
    "length in words": f"{OK}Content-Length: five\r\n\r\n".encode() + IMAGE,
    "length with a plus": f"{OK}Content-Length: +5\r\n\r\n".encode() + IMAGE,
    "length with an underscore": f"{OK}Content-Length: 1_0\r\n\r\n".encode() + IMAGE,
    "two lengths": f"{OK}Content-Length: 5\r\nContent-Length: 6\r\n\r\n".encode() + IMAGE,
    "huge length": f"{OK}Content-Length: {'9' * 30}\r\n\r\n".encode() + IMAGE,
    "length and chunks": f"{OK}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
    "other encoding": f"{OK}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n".encode(),
    "encoding in a disguise": f"{OK}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n".encode(),
    "bad chunk length": f"{OK}Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n".encode(),
    "negative chunk": f"{OK}Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n".encode(),
    "endless chunk length": f"{OK}Transfer-Encoding: chunked\r\n\r\n{'1' * 70_000}".encode(),
    "chunk without an end": f"{OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX5\r\n".encode(),
    "short body": f"{OK}Content-Type: image/png\r\nContent-Length: 5000\r\n\r\n".encode() + IMAGE[:100],
    "half a head": b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nX-",
    "space in a name": f"{OK}Bad Name: x\r\n\r\n".encode(),
    "space before the colon": f"{OK}Content-Length : 5\r\n\r\nhello".encode(),
    "folded header": f"{OK}X: a\r\n b\r\nContent-Type: text/html\r\n\r\n".encode(),
    "zero in a header": f"{OK}X: a\0b\r\n\r\n".encode(),
    "bare newline in a name": f"{OK}X\ny: 1\r\n\r\n".encode(),
    "1 MB header": f"{OK}X: {'a' * 2**20}\r\n\r\n".encode(),
    "many headers": f"{OK}{''.join(f'X{i}: y{chr(13)}{chr(10)}' for i in range(9000))}\r\n".encode(),
    "long address": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "address not ascii": "GET /é HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode(),
    "address with a zero": b"GET /\0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "path up": request(line="GET /../../etc/passwd HTTP/1.1"),
    "path up, encoded": request(line="GET /page/%2e%2e/%2e%2e/etc/passwd HTTP/1.1"),
    "path up, backslash": request(line="GET /page/..\\..\\x HTTP/1.1"),
    "whole address of another": request(line="GET http://evil.example/ HTTP/1.1"),
    "unknown method": request(line="BREW /predict HTTP/1.1"),
    "wrong method": request(line="DELETE /predict HTTP/1.1"),
    "connect": request(line="CONNECT evil.example:443 HTTP/1.1"),
    "trace": request(line="TRACE / HTTP/1.1"),
    "upgrade": request(headers="Upgrade: websocket\r\nConnection: upgrade", line="GET /ws HTTP/1.1"),
    "gzip": request(IMAGE, "Content-Encoding: gzip"),
    "identity and gzip": request(IMAGE, "Content-Encoding: identity\r\nContent-Encoding: gzip"),
    "two content types": request(IMAGE, "Content-Type: image/png\r\nContent-Type: text/html"),
    "text": request(b"hello"),
    "empty image": request(b""),
    "cut off image": request(IMAGE[:-300]),
    "bomb": request(bomb()),
    "deep json": request(b"[" * 100_000, "Content-Type: application/json"),
    "form without boundary": request(b"--x--", "Content-Type: multipart/form-data"),
    "form cut off": request(PART, "Content-Type: multipart/form-data; boundary=b"),
    "form of noise": request(bytes(1000), "Content-Type: multipart/form-data; boundary=b"),
    "100,000 parts": request(PART * 100_000 + b"--b--", "Content-Type: multipart/form-data; boundary=b"),
    "wrong number": request(IMAGE, line="POST /predict?top=NaN HTTP/1.1"),
    "wrong parameter": request(IMAGE, line="POST /predict?__proto__=1 HTTP/1.1"),
}


def test_every_malformed_request_is_a_4xx_in_json_and_the_server_stays_right(server: Server, run: Path) -> None:
    assert len(MALFORMED) >= 40
    right = expected(run, [IMAGE])
    for name, data in MALFORMED.items():
        head, _, body = server.raw(data).partition(b"\r\n\r\n")
        status = int(head.split()[1]) if head else 0
        assert 400 <= status < 500, (name, head[:200])
        assert json.loads(body)["error"]["code"], name
        reply = httpx.post(f"{server.url}/predict", content=IMAGE, headers=PNG, timeout=20)
        assert reply.json()["images"] == right, name


def test_a_pipeline_of_requests_is_answered_in_order(server: Server) -> None:
    one = request(IMAGE).replace(b"Connection: close", b"Connection: keep-alive")
    received = server.raw(one * 3 + request(IMAGE))
    assert received.count(b"HTTP/1.1 200") == 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_what_is_too_large_is_refused_early_and_takes_no_memory(server: Server) -> None:
    block = bytes(1 << 20)
    before = server.memory()
    heads = {
        "by length": f"{OK}Content-Type: image/png\r\nContent-Length: {1 << 30}\r\n\r\n",
        "in chunks": f"{OK}Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n",
    }
    for name, head in heads.items():
        sent = 0
        with server.connect() as connection:
            connection.sendall(head.encode())
            with contextlib.suppress(OSError):
                while sent < 1 << 30:
                    connection.sendall(b"100000\r\n%b\r\n" % block if name == "in chunks" else block)
                    sent += len(block)
            received = server.read(connection)
        assert b" 413 " in received.split(b"\r\n")[0] or not received, name
        assert sent < 60 << 20, name  # the limit is 20 MiB; it is read up to twice, and the rest lies in socket buffers
    for _ in range(20):
        assert b" 413 " in server.raw(request(bomb()))
    assert server.memory() - before < 100


def test_a_client_that_waits_for_permission_is_refused_before_it_sends(server: Server) -> None:
    head = f"{OK}Content-Type: image/png\r\nContent-Length: {1 << 30}\r\nExpect: 100-continue\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    small = request(IMAGE).replace(b"Connection: close", b"Connection: close\r\nExpect: 100-continue")
    assert b"HTTP/1.1 200" in server.raw(small)


def test_400_requests_at_a_time_each_get_their_own_answer(server: Server, run: Path) -> None:
    images = [picture(i, (16 + i % 7, 16)) for i in range(400)]
    rows = expected(run, images)

    async def one(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request(data))
        received = await reader.read()
        writer.close()
        return received

    async def ask() -> list[bytes]:
        return await asyncio.gather(*(one(data) for data in images))

    replies = [received.partition(b"\r\n\r\n") for received in asyncio.run(ask())]
    assert {head[:12] for head, _, _ in replies} == {b"HTTP/1.1 200"}
    assert all(near(json.loads(body)["images"][0], row) for (_, _, body), row in zip(replies, rows, strict=True))


def test_abandoned_requests_leave_nothing_behind(server: Server, run: Path) -> None:
    for i in range(100):
        with server.connect() as connection:
            data = request(picture(i))
            connection.sendall(data if i % 2 else data[: len(data) // 2])
    until = time.monotonic() + 10
    idle = {"resnetlab_requests_active 1.0", "resnetlab_queue_images 0.0", "resnetlab_body_bytes 0.0"}  # this one asks
    while (left := idle - set(httpx.get(f"{server.url}/metrics").text.splitlines())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left
    reply = httpx.post(f"{server.url}/predict", content=IMAGE, headers=PNG)
    assert reply.json()["images"] == expected(run, [IMAGE])


@pytest.mark.slow
def test_slow_clients_twice_as_many_as_open_files_refuse_nobody(run: Path) -> None:
    with serving(run, files=128, receive_s=3) as server:
        heads = (b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", request(IMAGE)[:-500], b"")
        slow: list[socket.socket] = []
        stop = threading.Event()
        closed: list[float] = []

        def trickle() -> None:
            """Open 256 connections, and send a byte on each every 0.3 s; note when the server closes them."""
            began: dict[socket.socket, float] = {}
            for i in range(256):
                with contextlib.suppress(OSError):
                    connection = server.connect()
                    connection.sendall(heads[i % 3])
                    slow.append(connection)
                    began[connection] = time.monotonic()
            while not stop.wait(0.3):
                for connection in list(began):
                    try:
                        connection.setblocking(False)
                        connection.send(b"a")
                        if connection.recv(4096) == b"":
                            raise ConnectionError
                    except BlockingIOError:
                        continue
                    except OSError:
                        closed.append(time.monotonic() - began.pop(connection))

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            times = []
            until = time.monotonic() + 8
            while time.monotonic() < until:
                start = time.monotonic()
                reply = httpx.post(f"{server.url}/predict", content=IMAGE, headers=PNG, timeout=10)
                assert reply.status_code == 200
                times.append(time.monotonic() - start)
                time.sleep(0.02)
        finally:
            stop.set()
            thread.join()
            for connection in slow:
                connection.close()
        assert len(times) > 50
        assert np.quantile(times, 0.99) < 1, f"p99 {np.quantile(times, 0.99):.2f} s"
        assert len(closed) >= 250 and max(closed) < 10


@pytest.mark.slow
def test_a_client_that_does_not_take_its_answer_is_closed(run: Path, tmp_path: Path) -> None:
    with serving(run, receive_s=1) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.settimeout(10)
        one = request(line="GET /page/app.js HTTP/1.1").replace(b"Connection: close", b"Connection: keep-alive")
        with contextlib.suppress(OSError):  # answers pile up: it is asked for more than all buffers hold
            connection.settimeout(3)
            for _ in range(3000):
                connection.sendall(one)
        time.sleep(3)
        assert "resnetlab_requests_active 1.0" in httpx.get(f"{server.url}/metrics").text


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_loses_nothing(run: Path, sign: int) -> None:
    with serving(run) as server:
        results: list[str] = []
        ready: list[int] = []
        lock = threading.Lock()

        def ask() -> None:
            """Ask until the door is shut, each time on a new connection."""
            while True:
                try:
                    connection = server.connect()
                except ConnectionRefusedError:
                    return
                with connection:
                    try:
                        connection.sendall(request(IMAGE))
                        said = server.read(connection)
                    except OSError as problem:
                        said = repr(problem).encode()
                with lock:
                    results.append(said[:12].decode("latin-1"))

        def watch() -> None:
            with contextlib.suppress(httpx.HTTPError):
                while True:
                    ready.append(httpx.get(f"{server.url}/readyz").status_code)

        threads = [threading.Thread(target=ask) for _ in range(16)] + [threading.Thread(target=watch)]
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        while time.monotonic() < begun + (1 if len(results) > 100 and ready else 60):  # a busy machine is slow
            time.sleep(0.05)
        code, out, err = server.stop(sign)
        for thread in threads:
            thread.join()
        assert (code, err) == (0, "")
        assert "every accepted request was answered" in out
        assert len(results) > 100
        assert set(results) == {"HTTP/1.1 200"}
        assert ready[0] == 200 and ready[-1] == 503


def test_the_command_says_where_it_is(run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "resnetlab", "serve", str(run), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert "resnet20, 4 classes" in lines[0] and "http://127.0.0.1:" in lines[1] and "stopped" in rest
    assert process.returncode == 0
