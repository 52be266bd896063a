"""What the API answers when it refuses: a status, a code for programs, a sentence for people."""

import json
from http import HTTPStatus
from typing import Any


class Refusal(Exception):
    """A request that is not served, and why.

    Args:
        status: HTTP status, 4xx for what the client can mend, 503 and 504 for what time can.
        code: A word for programs; never changes.
        message: A sentence for people.
        more: Further JSON-able facts.
    """

    def __init__(self, status: int, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more

    @property
    def body(self) -> bytes:
        """The JSON document ``{"error": {"code": …, "message": …}}``."""
        error = {"code": self.code, "message": self.message, **self.more}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "backslashreplace")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer; where trying again helps it says when, in seconds."""
        again = {"retry-after": "1"} if self.status in (429, 503) else {}
        return {"content-type": "application/json", "content-length": str(len(self.body)), **again}

    @property
    def raw(self) -> bytes:
        """The whole HTTP answer, for a connection on which no request could be understood."""
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in {**self.headers, "x-content-type-options": "nosniff"}.items()]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


def busy(what: str) -> Refusal:
    """Return the refusal for a server that has its hands full."""
    return Refusal(503, "busy", f"The server has {what}. Try again in a moment.")
