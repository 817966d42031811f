"""The page to talk to a model, and what browsers are told of it."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from starlette.responses import HTMLResponse

_PAGE = Path(__file__).with_name("page.html")


def page() -> HTMLResponse:
    """Return the page; it runs its own script and nothing else, asks this server, and is in no frame."""
    text = _PAGE.read_text(encoding="utf-8")
    return HTMLResponse(text, headers=_headers(text))


def _headers(text: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(text, "script"),
        "style-src": _hashes(text, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
    }


def _hashes(text: str, element: str) -> str:
    """Return by which a browser knows a page's own scripts or styles."""
    found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digests = [b64encode(sha256(each.encode()).digest()).decode() for each in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
