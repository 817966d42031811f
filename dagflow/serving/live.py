"""A session as the driver knows it: its tokens, and the logits that somebody waits for."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from dagflow.serving.pool import Holder, common
from dagflow_tasks.decode.decoder_stage import ALL, LAST, Part


@dataclass
class Wanted:
    """Logits that somebody waits for: of the tokens from `start` to `end`, or of the last.

    Stages that have computed all that was waited for before have the tokens up to `start`.

    Attributes
    ----------
    alone_since : float or None
        When they were sent, unless the session had other tokens on their way.
    """

    epoch: int
    start: int
    end: int
    want: str
    future: asyncio.Future[torch.Tensor]
    alone_since: float | None

    @property
    def first_row(self) -> int:
        return self.end - 1 if self.want == LAST else self.start


@dataclass(eq=False)
class Live(Holder):
    """A session as the driver knows it.

    Attributes
    ----------
    name : str
        By which the stages know it.
    epoch : int
        Counts rewinds.
    num_shared : int
        Tokens that another session had computed.
    is_away : bool
        Whether the stages have had to forget it, for want of room. The tokens are here.
    error : Exception or None
        Why it can't go on.
    sharing : Task or None
        Tells the stages whose tokens it begins with.
    is_lead : bool
        Whether it was admitted with room for others, too, that come and go with it.
    num_unmoved : int
        How often somebody has looked since tokens of it that are waited for came anywhere.
    """

    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    epoch: int = 0
    wanted: list[Wanted] = field(default_factory=list)
    num_shared: int = 0
    is_away: bool = False
    error: Exception | None = None
    sharing: asyncio.Task[None] | None = None
    is_lead: bool = False
    num_unmoved: int = 0

    def add(self, tokens: list[int], want: str) -> Part:
        """Append tokens, and return the part of a pass that they are."""
        start = len(self.tokens)
        self.tokens += tokens
        self.most_tokens = max(self.most_tokens, len(self.tokens))
        return Part(self.name, self.epoch, start, len(tokens), start, want)

    def want(
        self, part: Part, start: int, since: float | None = None
    ) -> asyncio.Future[torch.Tensor]:
        """Note that somebody waits for a part's logits, and from where on stages may lack tokens."""
        future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_heard)
        if not self.wanted:
            self.num_unmoved = 0
        self.wanted.append(Wanted(part.epoch, start, part.end, part.want, future, since))
        return future

    def hear(self, part: Part, first: int, rows: torch.Tensor) -> list[Wanted]:
        """Take in logits of a part's tokens from position `first` on; return what was waited for."""
        self.num_unmoved = 0
        found = [
            wanted
            for wanted in self.wanted
            if wanted.epoch == part.epoch and first <= wanted.first_row and wanted.end <= part.end
        ]
        for wanted in found:
            self.wanted.remove(wanted)
            self.num_computed = max(self.num_computed, wanted.end)
            if not wanted.future.done():
                wanted.future.set_result(rows[wanted.first_row - first : wanted.end - first])
        return found

    def rewind(self, position: int) -> None:
        """Forget the tokens from a position on."""
        del self.tokens[position:]
        self.num_computed = min(self.num_computed, position)
        self.epoch += 1
        for wanted in self.wanted:
            wanted.future.cancel()
        self.wanted.clear()

    def give_up(self, error: Exception) -> None:
        """Let whoever waits hear why nothing comes."""
        self.error = error
        for wanted in self.wanted:
            if not wanted.future.done():
                wanted.future.set_exception(error)
        self.wanted.clear()

    def still_wanted(self) -> tuple[int, str]:
        """Return from which token on the stages behind must be given its tokens, and why.

        Tokens that are fed from now on may get to the stage that sends again before it is told to:
        what they are wanted for isn't known yet, so it is all.
        """
        if not self.wanted:
            return len(self.tokens), ALL
        first = min(wanted.start for wanted in self.wanted)
        one = len(self.wanted) == 1 and self.wanted[0].want == LAST
        return first, LAST if one and self.wanted[0].end == len(self.tokens) else ALL


@dataclass(frozen=True)
class Step:
    """One token that follows a session's, or those of another, which it takes over first."""

    live: Live
    token: int
    origin: Live | None = None

    def part(self) -> Part:
        """Return the part of a pass that it is; its session has the origin's tokens from then on."""
        live, origin = self.live, self.origin
        if origin is None:
            return Part(live.name, live.epoch, len(live.tokens), 1, len(live.tokens), LAST)
        shared, start = common(live.tokens, origin.tokens), len(origin.tokens)
        live.tokens = list(origin.tokens)
        live.num_computed = min(live.num_computed, shared)
        live.epoch += 1
        return Part(live.name, live.epoch, start, 1, start, LAST, origin.name, origin.epoch, shared)


def to_send_again(lives: Iterable[Live], names: Iterable[str] | None) -> list[Live]:
    """Return the sessions that are sent again, of all or of some; those first that somebody waits for.

    Not those that stages have had to forget: they are put off until there is room for them.
    """
    chosen = None if names is None else set(names)
    found = [
        live
        for live in lives
        if live.tokens and not live.is_away and (chosen is None or live.name in chosen)
    ]
    return sorted(found, key=lambda live: not live.wanted)


def _heard(future: asyncio.Future[torch.Tensor]) -> None:
    """Nobody need wait for guesses behind a wrong one: their errors aren't lost but known."""
    if not future.cancelled():
        future.exception()
