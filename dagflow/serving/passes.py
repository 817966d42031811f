"""Tokens on their way to the first stage: which share a pass, and how they are sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch

from dagflow.serving.live import Live
from dagflow.serving.placement import Placement
from dagflow.serving.queueing import MOST_TOKENS
from dagflow_tasks.decode.decoder_stage import TOKENS, Part
from dagflow_tasks.tensors import TensorDict


class Passes:
    """Sends tokens to the first stage.

    Parameters
    ----------
    placement : Placement
    lives : mapping
        Sessions by name.
    spawn : callable
        Begins a coroutine whose errors somebody hears of.
    """

    def __init__(
        self,
        placement: Placement,
        lives: Mapping[str, Live],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._placement = placement
        self._lives = lives
        self._spawn = spawn
        self._posted: list[tuple[Part, Sequence[int]]] = []

    @property
    def num_waiting(self) -> int:
        """How many sessions have tokens on their way."""
        return sum(bool(live.wanted) for live in self._lives.values())

    @property
    def _most_sessions(self) -> int:
        """How many sessions may share a pass: so many that every worker has one to compute.

        With all of them in one pass, the workers would take turns.
        """
        return math.ceil(self.num_waiting / self._placement.num_placed_on)

    def post(self, part: Part, tokens: Sequence[int]) -> None:
        """Send tokens, along with those that other sessions send at the same time."""
        self._posted.append((part, tokens))
        if len(self._posted) == 1:
            self._spawn(self._send_posted())

    async def _send_posted(self) -> None:
        posted, self._posted = self._posted, []
        for group in groups(posted, self._most_sessions):
            tokens = [token for _, some in group for token in some]
            await self.send([part for part, _ in group], tokens)

    async def send(
        self, parts: Sequence[Part], tokens: Sequence[int], rebuilt: Sequence[int] = ()
    ) -> None:
        """Send a pass; `rebuilt` are stages that lack what came before, see `mending.Resend`."""
        message = {
            "kind": "pass",
            "parts": [astuple(part) for part in parts],
            "rebuilt": list(rebuilt),
            "most_sessions": self._most_sessions,
        }
        await self._placement.tell(0, message, TensorDict({TOKENS: torch.tensor(tokens)}))


def groups(
    posted: Sequence[tuple[Part, Sequence[int]]], most_sessions: int
) -> list[list[tuple[Part, Sequence[int]]]]:
    """Divide parts into passes: so many sessions in each that every worker has one to compute.

    >>> posted = [(Part(name, 0, 0, 1, 0, "last"), [7]) for name in "abcbd"]
    >>> [[part.session for part, _ in group] for group in groups(posted, 4)]
    [['a', 'b', 'c'], ['b', 'd']]
    >>> [len(group) for group in groups(posted, 2)]
    [2, 2, 1]
    """
    found: list[list[tuple[Part, Sequence[int]]]] = []
    sessions: set[str] = set()
    room = 0
    for part, tokens in posted:
        room -= part.count
        if not found or part.session in sessions or len(sessions) >= most_sessions or room < 0:
            found.append([])
            sessions, room = set(), MOST_TOKENS - part.count
        found[-1].append((part, tokens))
        sessions.add(part.session)
    return found
