"""The gate in front of the routes (ASGI middleware): it holds every request to the `Limits`.

A request is received whole, within its size and time, before anything is done for it; it is given a time to be answered
in; and work stops when the client has gone. Every answer leaves with headers that keep a browser from doing more with
it than was meant.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from resnetlab.serve.errors import Refusal, busy
from resnetlab.serve.limits import Limits, State

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = dict[bytes, list[bytes]]

SECURITY = {
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(self), geolocation=(), microphone=()",
    b"cache-control": b"no-store",
}
"""Headers of every answer that does not bring its own."""
ALWAYS_OPEN = ("/healthz", "/readyz", "/metrics")
"""Answered however many requests there are."""
_LINGER_S = 1.0
"""Seconds in which the rest of a refused body is read and thrown away: closing on unread data would reset the
connection, and the client might never see why."""


class Gate:
    """Middleware: nothing gets past it that is too large, too slow, too many, or that could be read in two ways.

    Args:
        app: What is behind it.
        limits: The bounds.
        state: Counts, shared with the connections and the routes.
        hosts: Names that the Host header may give; None: any. A server on the loopback address answers to its own names
            only, so that a web page elsewhere cannot reach it by pointing its own name here (DNS rebinding).
        tell: Called with method, path, status and seconds of every request that was answered.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        state: State,
        hosts: Iterable[str] | None = None,
        tell: Callable[[str, str, int, float], None] = lambda *request: None,
    ) -> None:
        self.app, self.limits, self.state, self.tell = app, limits, state, tell
        self.hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        request = _Request(receive, self.limits, self.state)
        answer = _Answer(send, self.state)
        self.state.active += 1
        try:
            self._check(scope)
            await self._run(scope, await request.body(), receive, answer)
        except Refusal as refusal:
            if not answer.started:
                await answer.refuse(refusal, request)
        except _Gone:
            pass
        except Exception:
            answer.status = answer.status or 500  # the answer to it is given outside
            raise
        finally:
            self.state.active -= 1
            self.state.bytes -= request.size
            if answer.status:
                self.tell(scope["method"], scope["path"], answer.status, time.monotonic() - start)

    def _check(self, scope: Message) -> None:
        """Judge a request by its head."""
        headers: Headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        line = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if line + sum(len(name) + len(value) for name, value in scope["headers"]) > self.limits.head_bytes:
            raise Refusal(431, "head_too_large", f"The request's head is over {self.limits.head_bytes:,} bytes.")
        self._check_origin(scope["method"], headers)
        if _one(headers, b"content-encoding").lower() not in (b"", b"identity"):
            raise Refusal(415, "compressed", "Compressed requests are not read. Images are compressed already.")
        if b"transfer-encoding" in headers and b"content-length" in headers:
            raise Refusal(400, "bad_request", "The request has both a Content-Length and a Transfer-Encoding.")
        _one(headers, b"content-type")
        length = _one(headers, b"content-length") or b"0"
        if not length.isdigit() or len(length) > 20:
            raise Refusal(400, "bad_request", "The Content-Length is not a number.")
        if int(length) > self.limits.body_bytes:
            raise _too_large(self.limits)
        if self.state.active > self.limits.requests and scope["path"] not in ALWAYS_OPEN:
            raise Refusal(429, "too_many_requests", f"More than {self.limits.requests} requests at a time.")

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Refuse what another site makes a browser send."""
        host = _one(headers, b"host").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        if self.hosts is not None and name not in self.hosts:
            raise Refusal(421, "wrong_host", f'This server does not answer to the name "{name[:80]}".')
        if method != "GET" and _one(headers, b"sec-fetch-site") == b"cross-site":
            raise Refusal(403, "cross_site", "Another site's page may not use this server.")

    async def _run(self, scope: Message, body: bytes, receive: Receive, answer: "_Answer") -> None:
        """Have a request answered in time, for as long as somebody waits for the answer."""
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if parts:
                return parts.pop()
            await asyncio.Event().wait()  # the gate watches the connection, and cancels
            raise AssertionError

        work = asyncio.ensure_future(self.app(scope, replay, answer))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, timeout=self.limits.answer_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or answer.complete:
                await work
            elif not gone.done():
                raise Refusal(504, "too_slow", f"No answer within {self.limits.answer_s:g} s.")
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


class _Gone(Exception):
    """The client has closed the connection."""


class _Request:
    """The body of a request on its way here."""

    def __init__(self, receive: Receive, limits: Limits, state: State) -> None:
        self.receive, self.limits, self.state = receive, limits, state
        self.size = 0
        self.whole = False

    async def body(self) -> bytes:
        """Receive all of it, within size and time."""
        loop = asyncio.get_running_loop()
        start, chunks = loop.time(), []
        while not self.whole:
            until = start + self.limits.receive_s + self.size / self.limits.receive_rate
            try:
                async with asyncio.timeout_at(until):
                    chunk = await self._next()
            except TimeoutError:
                raise Refusal(408, "too_slow", "The request did not arrive in time.") from None
            self.size += len(chunk)
            self.state.bytes += len(chunk)
            if self.size > self.limits.body_bytes:
                raise _too_large(self.limits)
            if self.state.bytes > self.limits.bytes_in_flight:
                raise busy("as many bytes of images in its memory as it takes")
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def discard(self) -> None:
        """Read what is left and throw it away, as much again as a request may hold at most."""
        read = 0
        with contextlib.suppress(TimeoutError, _Gone):
            async with asyncio.timeout(_LINGER_S):
                while not self.whole and read < self.limits.body_bytes:
                    read += len(await self._next())

    async def _next(self) -> bytes:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        self.whole = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk


class _Answer:
    """ASGI's `send`, which adds the headers and remembers how far the answer has come."""

    def __init__(self, send: Send, state: State) -> None:
        self.send, self.state = send, state
        self.started = self.complete = False
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            own = list(message.get("headers", []))
            there = {name.lower() for name, _ in own}
            extra = [item for item in SECURITY.items() if item[0] not in there]
            if self.state.stopping:
                extra.append((b"connection", b"close"))
            message = {**message, "headers": own + extra}
        elif not message.get("more_body", False):
            self.complete = True
        await self.send(message)

    async def refuse(self, refusal: Refusal, request: _Request) -> None:
        headers = [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
        if not request.whole and not self.state.stopping:
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self({"type": "http.response.body", "body": refusal.body, "more_body": True})
        if refusal.status != 408:
            await request.discard()
        await self({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _one(headers: Headers, name: bytes) -> bytes:
    """Return the value of a header that may be there once, b"" where it is not."""
    values = headers.get(name, [b""])
    if len(set(values)) > 1:
        raise Refusal(400, "bad_request", f"The header {name.decode()} is there more than once.")
    return values[0].strip()


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, "too_large", f"The request is over {limits.body_bytes / 2**20:g} MiB.")
