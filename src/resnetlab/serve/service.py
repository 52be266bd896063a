"""From uploaded bytes to answers: decode in threads, compute in batches."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from resnetlab.errors import ResNetLabError, UsageError, unknown
from resnetlab.metrics import Floats, Heatmap, Predictions, answers
from resnetlab.serve.batching import Batcher, Full
from resnetlab.serve.errors import Refusal, busy
from resnetlab.serve.limits import Limits, State
from resnetlab.serve.monitor import Monitor
from resnetlab.serve.network import Box, Predictor
from resnetlab.serve.uploads import Upload, check_format
from resnetlab.serve.uploads import read as read_uploads
from resnetlab.sources.dataset import Pixels
from resnetlab.sources.images import BrokenImage, decode, read_header

Value = TypeVar("Value")
_DECODERS = 2
"""Threads that decode. More would take more memory at a time: 50 million pixels take some 0.5 GB while decoded."""
_SMALL = 64 << 10
"""Bytes of a request that is taken apart where it is; a larger one would keep the others waiting."""
_TINY_BYTES, _TINY_PIXELS = 16 << 10, 64 * 64


class Service:
    """A network that answers requests.

    Args:
        predictor: The network.
        limits: What is taken on.
        state: Whether it is ready; shared with the connections.
        monitor: Where it counts.
    """

    def __init__(self, predictor: Predictor, limits: Limits, state: State, monitor: Monitor) -> None:
        self.predictor, self.limits, self.state = predictor, limits, state
        self.coming = 0
        """Images that are being decoded."""
        self.explaining = 0
        """Explanations that were asked for and not given yet."""
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        self._explainer = ThreadPoolExecutor(1, "explain")
        self.batcher: Batcher[Any, Floats] = Batcher(
            lambda prepared: list(predictor.logits(prepared)),
            size=limits.batch,
            wait_s=limits.wait_s,
            longest_s=limits.batch_s,
            capacity=limits.queue,
            coming=lambda: self.coming,
            tell=monitor.batch,
        )
        monitor.gauge("requests_active", "Requests being received or answered.", lambda: state.active)
        monitor.gauge("queue_images", "Images that wait for the network.", lambda: self.batcher.waiting)
        monitor.gauge("body_bytes", "Bytes of requests in memory.", lambda: state.bytes)

    async def start(self) -> None:
        """Compute once, so that the first client does not wait for what is set up at the first use; then be ready."""
        blank = np.zeros((32, 32, self.predictor.channels), np.uint8)
        await self.batcher.submit([self.predictor.prepare(blank)])
        self.state.ready = True

    async def stop(self) -> None:
        """Answer what was accepted, then stop."""
        await self.batcher.close()
        for pool in (self._decoders, self._explainer):
            pool.shutdown(wait=False, cancel_futures=True)

    async def uploads(self, content_type: str, body: bytes) -> list[Upload]:
        """Return the images of a request; see `uploads.read`."""
        if len(body) < _SMALL:
            return read_uploads(content_type, body, self.limits.images)
        return await self._in_thread(lambda: read_uploads(content_type, body, self.limits.images))

    async def predict(self, uploads: Sequence[Upload], top: int, skip_broken: bool) -> tuple[list[Any], list[Any]]:
        """Predict images.

        Returns:
            Rows as `resnetlab predict --format json` prints them, and with ``skip_broken`` an error for each image that
            cannot be read.

        Raises:
            Refusal: An image cannot be read (without ``skip_broken``), or there is no room or no time.
        """
        if self.batcher.waiting + self.coming + len(uploads) > self.limits.queue:
            raise _no_room()
        self.coming += len(uploads)
        left = len(uploads)
        names, prepared, broken = [], [], []
        try:
            for upload in uploads:
                try:
                    prepared.append(await self._prepare(upload))
                    names.append(upload.name)
                except Refusal as refusal:
                    if not skip_broken or refusal.status == 504:
                        raise
                    broken.append({"file": upload.name, "code": refusal.code, "message": refusal.message})
                self.coming, left = self.coming - 1, left - 1
        finally:
            self.coming -= left
        return (await self._rows(prepared, names, top) if prepared else []), broken

    async def explain(self, upload: Upload, method: str, stage: str | None, target: str | None) -> tuple[Heatmap, Box]:
        """Explain an image, and say which part of it the network read.

        Raises:
            Refusal: The image cannot be read, there is no such method, stage or class (422), or no room.
        """
        if not self.predictor.methods:
            raise Refusal(501, "no_explanations", "This network cannot be explained here.")
        method = method or self.predictor.methods[0]
        if method not in self.predictor.methods:
            raise Refusal(422, "invalid_parameter", str(unknown("method", method[:40], self.predictor.methods)))
        if self.explaining >= self.limits.explanations:
            raise busy("as many explanations waiting as it takes")
        self.explaining += 1
        try:
            image = await self._in_thread(lambda: self.decode(upload))
            return await asyncio.get_running_loop().run_in_executor(
                self._explainer, lambda: self.predictor.explain(image, method, stage, target)
            )
        except UsageError as error:
            raise Refusal(422, "invalid_parameter", str(error)) from error
        except ResNetLabError as error:
            raise Refusal(501, "not_installed", str(error)) from error
        finally:
            self.explaining -= 1

    async def _prepare(self, upload: Upload) -> Any:
        """Decode an image and make it ready, in a thread unless that takes longer than the work itself."""
        if _is_tiny(upload):
            return self.predictor.prepare(self.decode(upload))
        return await self._in_thread(lambda: self.predictor.prepare(self.decode(upload)))

    async def _rows(self, prepared: list[Any], names: list[str], top: int) -> list[dict[str, Any]]:
        try:
            logits = await self.batcher.submit(prepared)
        except Full:
            raise _no_room() from None
        predictions = Predictions(logits=np.stack(logits), classes=self.predictor.classes, names=tuple(names))
        return answers(predictions, names, top)

    def decode(self, upload: Upload) -> Pixels:
        """Decode an image: (H, W, C) uint8.

        Raises:
            Refusal: It cannot be read.
        """
        check_format(upload)
        try:
            header = read_header(upload.data, upload.name)
            if header.height * header.width > self.limits.pixels:
                size = f"{header.width:,} × {header.height:,} pixels"
                limit = f"{self.limits.pixels / 1e6:g} million"
                raise BrokenImage(upload.name, f"the image is too large: {size}, the limit is {limit} in all")
            return decode(upload.data, channels=self.predictor.channels, name=upload.name)
        except BrokenImage as error:
            too_large = error.reason.startswith("the image is too large")
            status, code = (413, "image_too_large") if too_large else (422, "broken_image")
            raise Refusal(status, code, str(error), file=upload.name) from error
        except MemoryError as error:
            raise busy("no memory left for this image") from error

    async def _in_thread(self, function: Callable[[], Value]) -> Value:
        """Run a function in a decoding thread; given up, it does not start any more."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function)


def _is_tiny(upload: Upload) -> bool:
    """Whether an image is decoded in well under a millisecond; other formats may unpack more than their pixels."""
    try:
        header = read_header(upload.data) if len(upload.data) <= _TINY_BYTES else None
    except BrokenImage:
        return False
    return header is not None and header.format in ("JPEG", "PNG") and header.height * header.width <= _TINY_PIXELS


def _no_room() -> Refusal:
    return busy("as many images waiting as it takes")
