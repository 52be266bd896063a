"""Durable files: written beside, synced, moved into place. A reader sees the old file or the new one, whole."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from resnetlab.errors import ResNetLabError, UsageError

STRAY_AFTER = 86_400
"""Seconds after which what is still being written has lost its process."""


def write_atomic(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Replace ``path`` by ``content`` in one step.

    ``content`` is the bytes or text, or a function that writes a file at the path it is given. The temporary file
    lies in the same directory (a rename across file systems is a copy) and is synced before the rename; the
    directory is synced after it.

    Raises:
        ResNetLabError: The disk is full or the directory cannot be written; the old file is as it was.
    """
    try:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # by the user's umask; mkstemp's 0600 would hide a run from the user's group
        try:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            temporary.chmod(mode)  # a writer may have put a file of its own in that place
            sync_file(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the file ``path``, which is made, for this process; the lock ends with the process, however it ends.

    Where there are no locks (Windows, some network disks), two processes in one place are the user's care.

    Args:
        path: The file. It stays, empty.
        wait: Until another process lets go of it.

    Raises:
        BlockingIOError: Another process holds it, and this one is not to wait.
        OSError: The file cannot be made.
    """
    with open(path, "a+") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            pass
        yield


def cannot_write(path: Path, error: OSError) -> ResNetLabError:
    """Explain why ``path`` could not be written, with the free space where that is the reason."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(existing_parent(path)).free / 2**20
        return ResNetLabError(
            f"No space left on the disk while writing {path} ({free:.0f} MiB free). What was there before is "
            "untouched. Free some space, or name another place with --out DIR."
        )
    if error.errno == errno.ENOENT and not path.parent.exists():
        return ResNetLabError(f"Cannot write {path}: there is no folder {path.parent}. Make it, or name another.")
    return ResNetLabError(f"Cannot write {path}: {error.strerror or error}. Check the permissions, or use --out DIR.")


def as_os_error(error: Exception) -> OSError:
    """Recover the errno that a library reports only as text (``os error 28``), so that a full disk is named as one."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else str(error))


def cache() -> Path:
    """Return our own folder in the user's cache: what is downloaded, unpacked or measured once.

    Raises:
        UsageError: There is none, as for a user without a home directory.
    """
    base, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if os.path.isabs(base):
        return Path(base) / "resnetlab"
    if home == "~":
        raise UsageError("This user has no home directory, and so no cache. Set HOME, or XDG_CACHE_HOME to a folder.")
    return Path(home) / ".cache" / "resnetlab"


def existing_parent(path: Path) -> Path:
    """Return the nearest directory at or above ``path`` that exists."""
    return next(p for p in [path, *path.absolute().parents] if p.is_dir())


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, where the system allows it (Windows does not)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
