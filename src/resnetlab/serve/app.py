"""The web application: one function a route. `create_app` puts the gate in front of them.

To add a route: a function in `_routes` and, if it is to be counted by name, its path in `PATHS`.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from resnetlab import __version__
from resnetlab.bundle import Bundle
from resnetlab.errors import did_you_mean
from resnetlab.metrics import Heatmap
from resnetlab.serve import pictures, schemas
from resnetlab.serve.errors import Refusal
from resnetlab.serve.gate import SECURITY, Gate
from resnetlab.serve.limits import Limits, State
from resnetlab.serve.monitor import Monitor
from resnetlab.serve.network import Box, BundlePredictor, Predictor
from resnetlab.serve.report import policy
from resnetlab.serve.service import Service

PATHS = ("/", "/predict", "/explain", "/info", "/report", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics")
PAGES = {
    "/": ("index.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/docs.js": ("docs.js", "text/javascript"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path → file below ``page`` and its type. Nothing else is ever read for a path."""
DEFAULT = Limits()


def create_app(
    network: Bundle | Predictor,
    limits: Limits = DEFAULT,
    *,
    state: State | None = None,
    report: Path | None = None,
    hosts: tuple[str, ...] | None = None,
) -> FastAPI:
    """Return the application that serves a network.

    Args:
        network: A bundle, or anything that is a `Predictor`.
        limits: What it takes on.
        state: Shared with a server that wants to say when it stops.
        report: The run's ``report.html``, if it has one.
        hosts: Names that it answers to; None: any.
    """
    state, monitor = state or State(), Monitor(PATHS)
    predictor = BundlePredictor(network) if isinstance(network, Bundle) else network
    service = Service(predictor, limits, state, monitor)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title=f"ResNetLab: {predictor.name}",
        version=__version__,
        description="Classify images. Every error is a JSON object: error.code for programs, error.message for people.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    _errors(app)
    _routes(app, service)
    _pages(app, service, monitor, report)
    app.add_middleware(Gate, limits=limits, state=state, hosts=hosts, tell=monitor.request)
    return app


def _routes(app: FastAPI, service: Service) -> None:
    """Add what computes."""

    @app.post("/predict", openapi_extra=schemas.BODY, responses=schemas.answers(schemas.ANSWER), response_model=None)
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, description="How many classes to name for each image.")] = 5,
        skip_broken: Annotated[
            bool, Query(description="Answer for the readable images although others are not.")
        ] = False,
    ) -> Response:
        """Say what is in one image (the request's body) or in several (a form's files).

        The answers are those of `resnetlab predict --format json --top 5` for the same files.
        """
        _only(request, "top", "skip_broken")
        uploads = await service.uploads(request.headers.get("content-type", ""), await request.body())
        rows, broken = await service.predict(uploads, top, skip_broken)
        return _json({"model": service.predictor.name, "images": rows, "broken": broken})

    png: dict[str, Any] = {"image/png": {"type": "string", "format": "binary"}}

    @app.post(
        "/explain",
        openapi_extra=schemas.BODY,
        responses=schemas.answers(schemas.EXPLANATION, **png),
        response_model=None,
    )
    async def explain(
        request: Request,
        method: Annotated[str, Query(description="One of /info's methods; by default its first.")] = "",
        stage: Annotated[str | None, Query(description="A stage of the network; by default its last.")] = None,
        target: Annotated[str | None, Query(description="The class; by default the most probable.")] = None,
        format: Annotated[
            Literal["json", "overlay", "heat", "values"],
            Query(description="json, or one PNG: heat over image, heat alone, or its values as grey."),
        ] = "json",
    ) -> Response:
        """Show where in an image the network sees its evidence for a class."""
        _only(request, "method", "stage", "target", "format")
        uploads = await service.uploads(request.headers.get("content-type", ""), await request.body())
        if len(uploads) != 1:
            raise Refusal(422, "one_image", f"One image is explained at a time; the form holds {len(uploads)}.")
        found, box = await service.explain(uploads[0], method, stage, target)
        if format != "json":
            return Response(pictures.FORMATS[format](found), media_type="image/png")
        return _json(_explanation(uploads[0].name, found, box))


def _pages(app: FastAPI, service: Service, monitor: Monitor, report: Path | None) -> None:
    """Add what is only read."""
    state, limits, predictor = service.state, service.limits, service.predictor

    @app.get("/info", response_model=None)
    async def info() -> Response:
        """Say what is served, and within which limits."""
        there = report is not None and report.is_file()
        bounds = {name: getattr(limits, name) for name in ("images", "body_bytes", "pixels")}
        return _json(
            {
                "model": predictor.name,
                "classes": predictor.classes,
                "limits": bounds,
                "report": there,
                "methods": predictor.methods,
            }
        )

    @app.get("/healthz", response_model=None)
    async def healthz() -> Response:
        """Say that the process is alive."""
        return _json({"status": "alive"})

    @app.get("/readyz", response_model=None)
    async def readyz() -> Response:
        """Say whether requests should be sent here: not before the network is loaded, and not once it is to stop."""
        if not state.ready:
            raise Refusal(503, "not_ready", "Stopping." if state.stopping else "Starting.")
        return _json({"status": "ready"})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(monitor.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/report", response_model=None, include_in_schema=False)
    def run_report() -> Response:
        if report is None or not report.is_file():
            raise Refusal(404, "no_report", "This run has no report. `resnetlab report RUN` writes one.")
        page = report.read_bytes()
        return Response(page, media_type="text/html", headers={"content-security-policy": policy(page)})

    for path, (name, kind) in PAGES.items():
        content = (files("resnetlab.serve") / "page" / name).read_bytes()

        app.add_api_route(path, _constant(content, kind), response_model=None, include_in_schema=False)


def _constant(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind)

    return page


def _explanation(name: str, found: Heatmap, box: Box) -> dict[str, Any]:
    height, width = found.values.shape
    return {
        "file": name,
        "class": found.target,
        "probability": found.probability,
        "method": found.method,
        "stage": found.stage,
        "width": width,
        "height": height,
        "box": box,
        "anywhere": bool(found.values.any()),
        "heat_png": pictures.data_url(pictures.heat(found)),
        "overlay_png": pictures.data_url(pictures.overlay(found)),
    }


def _errors(app: FastAPI) -> None:
    """Answer every error in JSON."""

    def answer(refusal: Refusal) -> Response:
        return Response(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        codes = {404: ("not_found", "There is nothing here."), 405: ("method_not_allowed", "Not with this method.")}
        code, message = codes.get(error.status_code, ("bad_request", str(error.detail)))
        response = answer(Refusal(error.status_code, code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return answer(Refusal(422, "invalid_parameter", f"{where}: {first['msg']}"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        response = answer(Refusal(500, "internal", "The server failed on this request; its log says how."))
        response.headers.update({name.decode(): value.decode() for name, value in SECURITY.items()})
        return response


def _only(request: Request, *names: str) -> None:
    """Refuse a parameter that does not exist: a misspelt one would otherwise do nothing, silently."""
    for name in request.query_params:
        if name not in names:
            hint = did_you_mean(name[:40], names) or f" There are: {', '.join(names)}."
            raise Refusal(422, "unknown_parameter", f'There is no parameter "{name[:40]}".{hint}')


def _json(value: Any) -> Response:
    content = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(content, media_type="application/json")
