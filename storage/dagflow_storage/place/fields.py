"""What a document must hold: each value of the right type and in range, or a ValueError that names it.

Whoever parses a document turns that into the error for documents of its kind.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MOST_INTEGER = 2**63 - 1
# NumPy's limit, and more than any kernel of torch takes.
MOST_DIMENSIONS = 64
_MOST_SHOWN = 80
# Half a surrogate pair can't be encoded; the backslash separates folders on Windows.
_NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f\\/\ud800-\udfff]")


def integer(value: Any, what: str, least: int = 0, most: int = MOST_INTEGER) -> int:
    """A whole number; True isn't one."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, not an integer from {least} to {most}")
    return value


def number(value: Any, what: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A number; NaN only where nothing is asked of it."""
    if type(value) not in (int, float):
        raise ValueError(f"{what} is {shown(value)}, not a number")
    if (least, most) != (-math.inf, math.inf) and not least <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, not a number from {least:g} to {most:g}")
    return float(value)


def flag(value: Any, what: str) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise ValueError(f"{what} is {shown(value)}, neither true nor false")
    return value


def text(value: Any, what: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, not a string")
    return value


def path(value: Any, what: str) -> str:
    """A path below a store's root, as dagflow writes it: nothing in it leads elsewhere."""
    parts = text(value, what).split("/")
    if not all(_is_name(part) for part in parts):
        raise ValueError(f"{what} is {shown(value)}, not a path inside the store")
    return "/".join(parts)


def name(value: Any, what: str) -> str:
    """One part of a path."""
    if not _is_name(text(value, what)):
        raise ValueError(f"{what} is {shown(value)}, not a name that a file can have")
    return str(value)


def items(value: Any, what: str) -> Sequence[Any]:
    """A list."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{what} is {shown(value)}, not a list")
    return value


def members(value: Any, what: str, *wanted: str) -> Mapping[str, Any]:
    """An object of names and values, with the wanted names among them."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} is {shown(value)}, not an object")
    missing = [key for key in wanted if key not in value]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    return value


def shape(value: Any, what: str, itemsize: int = 1) -> tuple[int, ...]:
    """Sizes, whose product in bytes an address can hold."""
    sizes = items(value, what)
    if len(sizes) > MOST_DIMENSIONS:
        raise ValueError(f"{what} has {len(sizes)} dimensions, more than {MOST_DIMENSIONS}")
    num_bytes = itemsize
    for size in sizes:
        if type(size) is not int or size < 0:
            integer(size, f"a size in {what}")
        num_bytes *= size or 1
    if num_bytes > MOST_INTEGER:
        raise ValueError(f"{what} is {shown(value)}, too large for any memory")
    return tuple(sizes)


def shown(value: Any) -> str:
    """A value for a message, however long it is."""
    if isinstance(value, int) and abs(value) > 10**_MOST_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    said = repr(value) if not isinstance(value, (list, dict)) or len(value) < 20 else None
    said = said if said is not None else f"{type(value).__name__} of {len(value)}"
    return said if len(said) <= _MOST_SHOWN else f"{said[:_MOST_SHOWN]}..."


def _is_name(part: str) -> bool:
    return 0 < len(part) <= 255 and part not in (".", "..") and not _NOT_IN_NAMES.search(part)
