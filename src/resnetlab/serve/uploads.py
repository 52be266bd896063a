"""The images in a request: a multipart form with files, or the bytes of one image."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from resnetlab.serve.errors import Refusal
from resnetlab.sources.images import FORMATS

FIELDS = ("images", "image", "files", "file")
"""Names that a form's files may go by."""
_LONGEST_HEADER = 4096
_RAW = "Send the image itself with its type (Content-Type: image/jpeg), or a form with files (multipart/form-data)."


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An image as it was sent."""

    name: str
    data: bytes


def read(content_type: str, body: bytes, most: int) -> list[Upload]:
    """Return the images of a request.

    Args:
        content_type: The header, "" where there is none.
        body: All of it.
        most: Most images that are taken.

    Raises:
        Refusal: It is malformed (400), of another type (415), empty or has other fields (422), or too many (413).
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _form(content_type, body, most)
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise Refusal(415, "unsupported_type", f"The content type {kind[:80]} is not read. {_RAW}")
    if not body:
        raise Refusal(422, "no_image", f"The request holds no image. {_RAW}")
    return [Upload(name="image", data=body)]


def check_format(upload: Upload) -> None:
    """Refuse what does not begin as an image in a format that is read.

    Raises:
        Refusal: 415.
    """
    if upload.data and not any(re.match(magic, upload.data[:512], re.DOTALL) for magic, _ in FORMATS.values()):
        formats = ", ".join(name.replace("WEBP", "WebP") for name in FORMATS)
        message = f"{upload.name}: not an image in a format that is read ({formats})."
        raise Refusal(415, "not_an_image", message, file=upload.name)


@dataclass
class _Reader:
    """Collects what the parser of python-multipart finds."""

    most: int
    uploads: list[Upload] = field(default_factory=list)
    ended: bool = False
    _headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    _name: bytes = b""
    _value: bytes = b""
    _data: list[bytes] = field(default_factory=list)

    def part_begin(self) -> None:
        if len(self.uploads) >= self.most:
            raise Refusal(413, "too_many_images", f"A request may hold {self.most} images; this one holds more.")
        self._headers, self._name, self._value, self._data = [], b"", b"", []

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._name = self._bounded(self._name + data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value = self._bounded(self._value + data[start:end])

    def header_end(self) -> None:
        self._headers.append((self._name.lower(), self._value))
        self._name = self._value = b""
        if len(self._headers) > 16:
            raise _malformed("a part has more than 16 headers")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def part_end(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(dict(self._headers).get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name not in FIELDS:
            message = f'The form has a field "{name[:80]}"; images are sent in fields called {", ".join(FIELDS)}.'
            raise Refusal(422, "unknown_field", message)
        called = options.get(b"filename", b"").decode("utf-8", "replace")[:255] or f"image {len(self.uploads) + 1}"
        self.uploads.append(Upload(name=called, data=b"".join(self._data)))

    def end(self) -> None:
        self.ended = True

    def callbacks(self) -> Mapping[str, object]:
        names = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end", "end")
        return {f"on_{name}": getattr(self, name) for name in names}

    @staticmethod
    def _bounded(text: bytes) -> bytes:
        if len(text) > _LONGEST_HEADER:
            raise _malformed(f"a header of a part is longer than {_LONGEST_HEADER} bytes")
        return text


def _form(content_type: str, body: bytes, most: int) -> list[Upload]:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    _, options = parse_options_header(content_type.encode("latin-1", "replace"))
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise _malformed("its Content-Type names no boundary of 1 to 70 characters")
    reader = _Reader(most)
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _malformed(str(error)[:200]) from error
    if not reader.ended:
        raise _malformed("it is cut off, its last boundary is missing")
    if not reader.uploads:
        raise Refusal(422, "no_image", f"The form holds no image. {_RAW}")
    return reader.uploads


def _malformed(why: str) -> Refusal:
    return Refusal(400, "malformed_form", f"The multipart form cannot be read: {why}.")
