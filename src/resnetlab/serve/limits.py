"""What one request, one client and all of them together may take."""

from dataclasses import dataclass

from resnetlab.sources.images import MAX_PIXELS


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the service; beyond them it refuses."""

    head_bytes: int = 32 << 10
    """Request line and headers (431)."""
    body_bytes: int = 20 << 20
    """Body of a request (413)."""
    bytes_in_flight: int = 128 << 20
    """Bodies of all requests together (503)."""
    images: int = 64
    """Images in a request (413). Not above ``batch``, so that a request is computed in one piece, as `predict` does."""
    pixels: int = MAX_PIXELS
    """Height × width of an image, read from its header (413). Never above what the decoder takes."""
    receive_s: float = 8
    """Seconds for a request to arrive (408), and for an answer to be taken. A client that sends a body is given longer
    in step with what it has sent, at ``receive_rate``."""
    receive_rate: int = 64 << 10
    """Bytes a second that a body must make."""
    answer_s: float = 30
    """Seconds to decode, compute and send the answer to a request that has arrived (504)."""
    requests: int = 512
    """Requests at a time (429)."""
    queue: int = 1024
    """Images that wait for the network (503)."""
    explanations: int = 8
    """Explanations that wait for the network (503)."""
    connections: int = 1000
    """Open connections; less where the system allows fewer files. At the limit the idlest is closed for a new one."""
    batch: int = 64
    """Images computed at a time; as many as `predict` takes."""
    batch_s: float = 0.5
    """Seconds that a batch of several requests may take; a batch of one request takes what it takes."""
    wait_s: float = 0.004
    """Longest wait for company in a batch, in seconds."""
    notice_s: float = 0.5
    """When told to stop, seconds in which /readyz says so and requests are still taken."""
    stop_s: float = 30
    """Seconds for the accepted requests to be answered before a stop is forced."""


class State:
    """What the connections, the gate and the routes know of each other."""

    def __init__(self) -> None:
        self.ready = False
        self.stopping = False
        self.active = 0
        """Requests that are being received or answered."""
        self.bytes = 0
        """Size of their bodies, as far as received."""
