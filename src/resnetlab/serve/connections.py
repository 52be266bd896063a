"""Connections that cannot be held open for nothing, and a server that stops without losing a request.

uvicorn gives a client for ever to send a request's head and to take its answer: 256 clients that do neither used up a
limit of 128 open files, and nobody else was served. Here a connection has a deadline in every phase, and when there are
as many as the system allows, the idlest makes way for a new one.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from resnetlab.serve.errors import Refusal, busy
from resnetlab.serve.limits import Limits, State

_SWEEP_S = 0.2
"""Seconds between two looks at all connections."""
_LINGER_S = 1.0
"""Seconds that a refused connection is left open, for the refusal to be read."""
_LAST_WORD_S = 2.0
"""Seconds that a connection without a request is left open when the server stops: one may be on its way."""
_ACCEPTED_AT_ONCE = 8
"""Connections that asyncio accepts before it looks at anything else; five rounds may be on their way at a time."""
_SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>
_WAITING_TO_CONNECT = 1024
"""Connections that the system holds until they are accepted."""


class Connection(H11Protocol):
    """A connection with deadlines: for the head of a request, for an answer to be taken, for the end."""

    def __init__(self, *, limits: Limits, state: State, most: int, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.limits, self.state, self.most = limits, state, most
        self.since = self.stuck = self.closing = time.monotonic()
        self.head_begun = self.is_stuck = self.is_closing = False
        self.refused = False

    @property
    def idle(self) -> bool:
        """Whether no request is being answered (a head that is arriving is no request yet)."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def receiving(self) -> bool:
        """Whether the client still owes the rest of a request, or a request at all."""
        return self.idle or self.cycle.more_body

    @property
    def patience(self) -> float:
        """How long the client may take over the head of a request, in seconds."""
        last = self.state.stopping and not self.head_begun
        return min(_LAST_WORD_S, self.limits.receive_s) if last else self.limits.receive_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection, if need be in place of the one that has kept the server waiting longest."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            others = [c for c in cast("set[Connection]", self.connections) if c is not self and c.receiving]
            others = [c for c in others if not c.transport.is_closing()]
            if others:
                min(others, key=lambda c: (not c.idle, c.since)).transport.abort()
            elif len(self.connections) > self.most + _ACCEPTED_AT_ONCE:
                self.refuse(busy("as many connections as it can hold"))

    def data_received(self, data: bytes) -> None:
        """Read; the head's deadline runs from its first byte, not from its last."""
        if self.refused:
            return
        if self.idle and not self.head_begun:
            self.head_begun, self.since = True, time.monotonic()
        super().data_received(data)
        if not self.idle:
            self.head_begun = False
            if self.state.stopping:
                self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self.head_begun, self.since = False, time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP request, in JSON. Called while h11's error is being handled."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            refusal = Refusal(431, "head_too_large", f"The request's head is over {self.limits.head_bytes:,} bytes.")
        else:
            refusal = Refusal(400, "bad_request", "This is not an HTTP request that can be understood.")
        self.refuse(refusal)

    def refuse(self, refusal: Refusal) -> None:
        """Write a refusal, unless an answer has begun, and close when it was read."""
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if self.refused or self.transport.is_closing():
            return
        if self.cycle is not None:  # its answer, if there is one to come, has nowhere to go
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if begun:
            self.transport.abort()
            return
        self.refused, self.since = True, time.monotonic()
        self.flow.resume_reading()  # what still comes is thrown away
        self.transport.write(refusal.raw)
        self.transport.write_eof()

    def pause_writing(self) -> None:
        """Note since when the client has not taken its answer."""
        self.is_stuck, self.stuck = True, time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that it takes it."""
        self.is_stuck = False
        super().resume_writing()

    def shutdown(self) -> None:
        """Take one more request if it is on its way, and close after it. `sweep` ends the wait."""
        if self.idle:
            self.since = time.monotonic()
        else:
            self.cycle.keep_alive = False

    def sweep(self, now: float) -> None:
        """Close what is past its deadline."""
        if self.transport.is_closing():  # with an answer that is not taken
            if not self.is_closing:
                self.is_closing, self.closing = True, now
            elif now - self.closing > self.limits.receive_s:
                self.transport.abort()
        elif self.refused:
            if now - self.since > _LINGER_S:
                self.transport.abort()
        elif self.is_stuck and now - self.stuck > self.limits.receive_s:
            self.transport.abort()
        elif self.idle and now - self.since > self.patience:
            if self.head_begun:
                self.refuse(Refusal(408, "too_slow", "The request did not arrive in time."))
            else:
                self.transport.close()


class Server(uvicorn.Server):
    """uvicorn with the deadlines of `Connection`, and a stop that loses nothing.

    On SIGTERM or Ctrl-C /readyz says no, requests are still taken for a moment, then no more connections are; what was
    accepted is answered. A second signal ends at once.
    """

    def __init__(
        self, config: uvicorn.Config, limits: Limits, state: State, opened: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self.limits, self.state, self.opened = limits, state, opened
        self._told: float | None = None
        config.http = partial(Connection, limits=limits, state=state, most=most_connections(limits))  # type: ignore[assignment]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(_WAITING_TO_CONNECT)  # asyncio set it to how many it accepts at once
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep())
        self.opened()

    async def on_tick(self, counter: int) -> bool:
        """Stop when the notice has been given. Called every 0.1 s."""
        if self._told is not None and time.monotonic() - self._told >= self.limits.notice_s:
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; at the second signal, just stop."""
        if self.state.stopping:
            self.force_exit = self.should_exit = True
        self.state.ready, self.state.stopping = False, True
        self._told = time.monotonic()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take the connections that stand at the door, shut it, and answer everyone inside."""
        self.state.ready, self.state.stopping = False, True
        loop = asyncio.get_running_loop()
        for listening in sockets or []:
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.remove_reader(listening)
        await asyncio.sleep(0)  # whom asyncio has just let in is attached to its server, which must not be closed yet
        last = [client for listening in sockets or [] for client in _accept_all(listening)]
        for server in self.servers:
            server.close()
        for client in last:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(self._connection, client)
        await super().shutdown(sockets)
        self._sweeping.cancel()

    def _connection(self) -> Connection:
        make = self.config.http_protocol_class
        made = make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]
        return cast(Connection, made)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for connection in cast("list[Connection]", list(self.server_state.connections)):
                connection.sweep(now)


def _accept_all(listening: socket.socket) -> list[socket.socket]:
    """Accept everyone whom the system has connected, and see to it that it connects nobody else meanwhile.

    A connection between the last accept and the end of listening would be cut without an answer. Linux can be told to
    drop what comes to the socket (a filter of one instruction, "return 0"); a client's next try is refused plainly.
    """
    if sys.platform == "linux":
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K
        with contextlib.suppress(OSError):
            program = struct.pack("HL", 1, ctypes.addressof(instruction))
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    accepted = []
    with contextlib.suppress(OSError):
        while True:
            client, _ = listening.accept()
            client.setblocking(False)
            accepted.append(client)
    return accepted


def most_connections(limits: Limits) -> int:
    """Return how many connections may be open, so that the process never runs out of file descriptors."""
    try:
        import resource

        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 48
    except ImportError:  # Windows
        return min(limits.connections, 400)
    return max(8, min(limits.connections, files - used - 5 * _ACCEPTED_AT_ONCE - 12))


def bind(host: str, port: int) -> socket.socket:
    """Open the socket and listen on it: until then another process may take the port too. Clients wait for the start.

    Raises:
        OSError: It cannot be.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_WAITING_TO_CONNECT)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


def settings(app: Any, limits: Limits) -> uvicorn.Config:
    """Return uvicorn's settings."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs what is wrong with every form
    return uvicorn.Config(
        app,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=round(limits.stop_s),
        h11_max_incomplete_event_size=limits.head_bytes,
    )
