"""What the service counts, for Prometheus."""

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Monitor:
    """Counters and gauges of one service.

    Args:
        paths: Those that are counted by name; all others are "other", so that no client can add to the names.
    """

    def __init__(self, paths: Collection[str]) -> None:
        self.paths = frozenset(paths)
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "resnetlab_requests", "Requests answered.", ("method", "path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "resnetlab_request_seconds", "Time to answer.", ("path",), buckets=_SECONDS, registry=self.registry
        )
        self.images = Counter("resnetlab_images", "Images computed.", registry=self.registry)
        self.batches = Histogram("resnetlab_batch_images", "Images a batch.", buckets=_IMAGES, registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a value that is read when it is asked for."""
        Gauge(f"resnetlab_{name}", text, registry=self.registry).set_function(value)

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        path = path if path in self.paths else "other"
        self.requests.labels(method if method in ("GET", "POST") else "other", path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def batch(self, size: int) -> None:
        """Count a batch."""
        self.images.inc(size)
        self.batches.observe(size)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)
