"""A token that may follow."""

from __future__ import annotations

from typing import NamedTuple

LOOK_UP, DRAFT = "look-up", "draft"


class Kind(NamedTuple):
    """Guesses of a kind are right about equally often: those of a source that is so sure of them."""

    source: str
    sureness: int


class Guess(NamedTuple):
    """A token that may follow, and how likely that is before anything is known about its kind."""

    token: int
    kind: Kind
    prior: float
