"""What went wrong, as a message and an exit status: 1 a failure that is explained, 2 wrong usage, 130 interrupted."""

import sys
from collections.abc import Callable

from cyclopts import CycloptsError, UnknownOptionError

from resnetlab.errors import ResNetLabError, visible


def guarded(work: Callable[[], object], debug: bool) -> int:
    """Run a command; turn what goes wrong into a message and an exit status. ``--debug`` shows tracebacks."""
    try:
        work()
    except CycloptsError as error:
        return fail(_explained(error), 2)
    except ResNetLabError as error:
        if debug:
            raise
        return fail(str(error), error.exit_status)
    except KeyboardInterrupt as error:
        return fail("Interrupted.", getattr(error, "exit_status", 130))
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:  # a file or folder that became unreadable under our hands
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}.", 1)
    except MemoryError:
        return fail("Out of memory. Try a smaller batch_size or data.size, or data.memory=stream.", 1)
    return 0


def _explained(error: CycloptsError) -> str:
    """Return the message, with how settings are written where an unknown option of `train` is one: ``--epoch 3``."""
    if not isinstance(error, UnknownOptionError) or tuple(error.command_chain or ()) != ("train",):
        return str(error)
    from resnetlab.config import Recipe, fields, nearest

    option = error.token.keyword or error.token.value
    word = option.lstrip("-").partition("=")[0].replace("-", "_")
    leaves = {key.rpartition(".")[2] for key, _ in fields(Recipe)}
    if "Did you mean" in str(error) and word not in leaves:
        return str(error)
    return f"Unknown option: {option}.{nearest(word)} Settings are written without dashes, such as epochs=40."


def fail(message: str, status: int) -> int:
    """Say what went wrong on standard error, and return the exit status."""
    print(f"resnetlab: {visible(message)}", file=sys.stderr)  # noqa: T201
    return status
