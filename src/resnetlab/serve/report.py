"""How the run's report is let into a browser."""

import base64
import hashlib
import re

_SCRIPT = re.compile(rb"<script(?:\s[^>]*)?>(.*?)</script\s*>", re.DOTALL | re.IGNORECASE)


def policy(page: bytes) -> str:
    """Return the content security policy of a self-contained page.

    Only the scripts that are in it now may run, by their digests, and in a sandbox: whatever the page holds, it cannot
    use this server in the reader's name. Its styles are written in its elements.
    """
    digests = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _SCRIPT.findall(page))
    scripts = " ".join(f"'sha256-{digest}'" for digest in dict.fromkeys(digests)) or "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; font-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "sandbox allow-scripts allow-downloads allow-modals"
    )
