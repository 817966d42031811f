"""What of a store's address and options is shown to people: no name, key or token of who may use it.

Errors, logs and representations say where something is by what is made here, and by nothing else.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import parse_qsl, quote, quote_plus, unquote

HIDDEN = "***"
# Options, parts of a query and headers whose values are nobody's business. File systems have names of
# their own for what they are given: key, secret and token (S3), account_key and sas_token (Azure),
# username and password (FTP, WebDAV), Authorization (HTTP).
_SECRET_NAMES = re.compile(
    r"key|secret|token|pass|pwd|credential|sas|sig|auth|cookie|connection_string|user|login", re.I
)
# Of S3, which finds them by itself.
_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# What is so long, and has no blank, is no setting that people set by hand.
_LONG_CHARACTERS = 20
# What is shorter is part of too many words.
_SHORTEST_CHARACTERS = 4
_PLAIN_NAMES = {
    "endpoint_url",
    "region_name",
    "profile",
    "project",
    "account_name",
    "fo",
    "protocol",
}
_SIGNED_URL = re.compile(r"([a-zA-Z][\w+.-]*://[^\s?'\"<>]+)\?[^\s'\"<>)\]]+")


# They write each request with all its headers, the token among them, and S3's also what it is signed with.
_TALKATIVE = ("botocore", "aiobotocore", "s3fs", "fsspec", "aiohttp", "urllib3", "azure", "gcsfs")


def keep_requests_out_of_logs() -> None:
    """Have client libraries log nothing below INFO, unless somebody has said otherwise of them."""
    for name in _TALKATIVE:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def shown_url(url: str) -> str:
    """Return a URL without user, password, query and fragment; a path as it is.

    >>> shown_url("https://me:p@host/data?sig=1"), shown_url("s3://bucket/run"), shown_url("/a?b")
    ('https://***@host/data?***', 's3://bucket/run', '/a?b')
    >>> shown_url("simplecache::ftp://me:a/b@host/x")
    'simplecache::ftp://***@host/x'
    """
    return "::".join(_shown_part(part) for part in url.split("::"))


def _shown_part(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    rest = re.sub(r"[?#].*", f"?{HIDDEN}", rest, flags=re.S)
    user, rest = _divided(rest)
    return f"{scheme}://{HIDDEN}@{rest}" if user else f"{scheme}://{rest}"


def _divided(rest: str) -> tuple[str, str]:
    """Divide what follows on a scheme into user with password, and the rest.

    A password may hold a slash, which should have been written %2F; a path may hold an @.
    """
    authority, _, _ = rest.partition("/")
    if "@" in authority:
        user, _, _ = authority.rpartition("@")
    elif re.match(r"[^/:]+:(?!\d+(/|$))", rest) and "@" in rest:
        user, _, _ = rest.rpartition("@")
    else:
        return "", rest
    return user, rest[len(user) + 1 :]


def hidden(text: str, url: str, options: Mapping[str, object]) -> str:
    """Return a text about a store, from whatever library, without what is in its address and options."""
    text = text.replace(url, shown_url(url))
    for secret in sorted(_secrets(url, options), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _SIGNED_URL.sub(rf"\1?{HIDDEN}", text)


def _secrets(url: str, options: Mapping[str, object]) -> set[str]:
    found = {*_of_url(url), *_of_options(options)}
    found |= {os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    ways = (str, quote, quote_plus, unquote, lambda secret: quote(secret, safe=""))
    every = {way(secret) for secret in found for way in ways}
    return {secret for secret in every if len(secret) >= _SHORTEST_CHARACTERS}


def _of_url(url: str) -> Iterator[str]:
    for part in url.split("::"):
        _, mark, rest = part.partition("://")
        if not mark:
            continue
        user, _ = _divided(rest)
        # Whole, and in the pieces in which somebody quotes it who has taken it apart wrongly.
        yield from (user, *user.split(":", 1), *re.split(r"[:/@]", user))
        yield from (value for _, value in parse_qsl(re.split(r"[?#]", part, maxsplit=1)[-1]))


def _of_options(options: Mapping[str, object], is_secret: bool = False) -> Iterator[str]:
    for name, value in options.items():
        name = str(name)
        secret = is_secret or (name not in _PLAIN_NAMES and bool(_SECRET_NAMES.search(name)))
        values = value if isinstance(value, (list, tuple)) else [value]
        for one in values:
            if isinstance(one, Mapping):
                yield from _of_options(one, secret)
            elif isinstance(one, (str, bytes)):
                said = one if isinstance(one, str) else one.decode(errors="replace")
                is_long = len(said) >= _LONG_CHARACTERS and " " not in said
                if secret or (is_long and name not in _PLAIN_NAMES and "://" not in said):
                    yield said
