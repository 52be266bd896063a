"""The errors that a user is meant to read, and the "did you mean" behind them."""

import difflib
import re
from collections.abc import Iterable


class ResNetLabError(Exception):
    """A failure that is explained: what is wrong, where, and what to do. Ends the command with status 1."""

    exit_status = 1


class UsageError(ResNetLabError):
    """The command was called wrongly: an unknown name or key, a value of the wrong kind. Exit status 2."""

    exit_status = 2


def visible(text: str) -> str:
    """Write control characters out: a name in a stranger's data or bundle is not to command the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return ``' Did you mean "x"?'`` for the nearest option, or an empty string when none is near."""
    near = difflib.get_close_matches(word.lower(), {o.lower(): o for o in options}, n=1, cutoff=0.6)
    names = {o.lower(): o for o in options}
    return f' Did you mean "{names[near[0]]}"?' if near else ""


def unknown(kind: str, word: str, options: Iterable[str]) -> UsageError:
    """Build the error for a name that is not in a table: a suggestion, then all there is."""
    options = list(options)
    return UsageError(f'Unknown {kind} "{word}".{did_you_mean(word, options)} There are: {", ".join(options)}.')
