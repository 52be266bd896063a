"""A web page and an HTTP API over a trained network.

`run` opens a port and serves until it is told to stop. `app.create_app` is the application without the server, for
other servers and for tests.
"""

import contextlib
import errno
import importlib
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from resnetlab.errors import ResNetLabError, UsageError

if TYPE_CHECKING:
    from resnetlab.bundle import Bundle
    from resnetlab.serve.limits import Limits
    from resnetlab.serve.network import Predictor

HOST, PORT = "127.0.0.1", 8000
_NEEDED = ("fastapi", "uvicorn", "h11", "python_multipart", "prometheus_client")


def run(
    network: "Bundle | Predictor",
    *,
    host: str = HOST,
    port: int = PORT,
    report: Path | None = None,
    limits: "Limits | None" = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was accepted, and return.

    Args:
        network: What answers.
        host: Address to listen on; the default can be reached from this machine only.
        port: 0: any that is free.
        report: The run's ``report.html``, if it has one.
        limits: What is taken on; None: the defaults.
        tell: Told what a person should know, a line at a time.

    Raises:
        UsageError: The address is none, or not this machine's.
        ResNetLabError: The port is taken, or the extra "serve" is not installed.
    """
    check()
    from resnetlab.serve import connections
    from resnetlab.serve.app import create_app
    from resnetlab.serve.limits import Limits, State

    bounds, state = limits or Limits(), State()
    listening = _listen(host, port)
    with contextlib.closing(listening):
        near = is_loopback(listening)
        name = f"[{host}]" if ":" in host else host
        hosts = ("localhost", "127.0.0.1", "[::1]", name.lower()) if near else None
        app = create_app(network, bounds, state=state, report=report, hosts=hosts)

        def opened() -> None:
            tell(f"open  http://{name}:{listening.getsockname()[1]}   (Ctrl-C stops)")
            if not near:
                tell("note  everyone who can reach this machine over the network can use it; there is no password")

        server = connections.Server(connections.settings(app, bounds), bounds, state, opened)
        server.run(sockets=[listening])
    tell("stopped; every accepted request was answered" if not server.force_exit else "stopped at once")


def check() -> None:
    """Make sure that what serving needs is installed.

    Raises:
        ResNetLabError: It is not; says what installs it.
    """
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ResNetLabError(f'Serving needs {name}. Install it with: pip install "resnetlab[serve]"') from error


def is_loopback(listening: socket.socket) -> bool:
    """Whether a socket can be reached from this machine only."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def _listen(host: str, port: int) -> socket.socket:
    from resnetlab.serve.connections import bind

    if not 0 <= port <= 65535:
        raise UsageError(f"There is no port {port}. Ports are 1 to 65535, or 0 for any that is free.")
    try:
        return bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ResNetLabError(f"Port {port} is taken. Give another, for example --port {port + 1}.") from error
        if error.errno == errno.EACCES:
            raise ResNetLabError(f"Port {port} may not be opened here. Give one above 1023, as --port 8000.") from error
        why = error.strerror or error
        raise UsageError(f"Cannot listen on {host}: {why}. --host is an address of this machine.") from error
    except (UnicodeError, ValueError) as error:
        raise UsageError(f"{host[:80]!r} is no address. --host is an address of this machine.") from error
