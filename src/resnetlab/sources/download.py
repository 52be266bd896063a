"""Where data sets lie on this machine, and the download of one that does not: resumed, and checked before use."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from resnetlab.errors import ResNetLabError
from resnetlab.files import cache as cache
from resnetlab.files import locked
from resnetlab.sources.dataset import Progress
from resnetlab.sources.images import printable

ATTEMPTS = 3
"""How often a connection that breaks off is taken up again."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""


def roots() -> list[Path]:
    """Return the folders where data sets usually lie, the user's own choice first."""
    chosen = os.environ.get("RESNETLAB_DATA")
    home = Path(os.path.expanduser("~"))  # Path.home() raises where there is none
    torch = Path(os.environ.get("TORCH_HOME") or home / ".cache" / "torch")
    usual = [Path("data"), home / "data", torch, torch / "datasets", cache()]
    return [Path(os.path.expanduser(chosen)), *usual] if chosen else usual


def cannot_get(name: str, looked: Iterable[Path], tried: str, reason: object) -> ResNetLabError:
    """Build the error for a named data set that is neither here nor to be had."""
    places = "\n".join(f"  {printable(path)}" for path in dict.fromkeys(looked))
    return ResNetLabError(
        f'The data set "{name}" is not on this machine and could not be downloaded.\n'
        f"Looked in:\n{places}\nTried: {tried}: {reason}\n"
        "Ways out: give the folder or archive that holds it as DATA; set RESNETLAB_DATA to the folder it lies in; or "
        "try things out without a download: resnetlab train digits."
    )


def download(url: str, path: Path, md5: str, progress: Progress | None = None) -> None:
    """Fetch ``url`` to ``path``. What arrives is kept in ``path``.part and continued the next time.

    Of several processes one fetches it, and the others wait for that.

    Args:
        url: http or https.
        path: Where the file appears, whole, once its sum is right.
        md5: The MD5 that its publisher states, in hexadecimal.
        progress: Is told the bytes that are there and the bytes in all.

    Raises:
        ResNetLabError: What arrived has another sum; it is removed.
        OSError: There is no connection, it broke off too often, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        if not (path.is_file() and _md5(path) == md5):
            _fetch_whole(url, path, md5, progress)


def _fetch_whole(url: str, path: Path, md5: str, progress: Progress | None) -> None:
    """Fetch it while no other process does, a connection that breaks up to `ATTEMPTS` times."""
    part = path.with_name(f"{path.name}.part")
    for attempt in range(ATTEMPTS):
        try:
            _fetch(url, part, progress)
            break
        except ValueError as error:
            raise OSError(f"that is no address: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS - 1 or isinstance(error, urllib.error.HTTPError):
                raise error if isinstance(error, OSError) else OSError(str(error) or "the connection broke") from error
    if (found := _md5(part)) != md5:
        part.unlink()
        raise ResNetLabError(
            f"What {url} sent is not the file it should be: its MD5 is {found}, not {md5}. It was removed. Try again, "
            "or fetch the file another way and give it as DATA."
        )
    os.replace(part, path)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _fetch(url: str, part: Path, progress: Progress | None) -> None:
    """Append to ``part`` what is missing; start over when the server cannot continue."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing after what we have
            raise
        error.close()
        return
    with answer, open(part, "ab" if answer.status == 206 else "wb") as file:
        done = file.tell()
        total = done + int(answer.headers.get("Content-Length") or 0)
        while block := answer.read(1 << 20):
            file.write(block)
            done += len(block)
            if progress:
                progress(done, max(total, done))
    if done < total:
        raise OSError(f"the connection broke off after {done:,} of {total:,} bytes")
