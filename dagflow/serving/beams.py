"""Beam search: the most likely answers, of several that are followed at once.

Each beam is a session. A step sends one token of every beam through the stages in one pass; a beam
that goes on from another one's tokens takes these over on the way, where the tokens are.

References
----------
The rules, ties of rounding included, are those of transformers' `generate` with ``num_beams`` and
``do_sample=False``: scores are sums of log-probabilities, divided by the length to the power of the
length penalty when an answer ends (a simple form of arXiv 1609.08144, section 7).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dagflow.errors import SettingsInvalid
from dagflow.serving.answers import Request
from dagflow.serving.engine import Engine
from dagflow.serving.live import Live, Step
from dagflow.serving.sampling import Sampling
from dagflow_tasks.kernels.session_cache import whole_blocks

MAX_BEAMS = 64
# What chooses among tokens has no meaning where all of the most likely are followed.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclass(frozen=True)
class Beams:
    """How beams are followed.

    Attributes
    ----------
    num_beams : int
        2 to 64.
    length_penalty : float
        Above 0 favours long answers, below 0 short ones: scores are divided by
        ``length ** length_penalty``.
    early_stopping : bool or "never"
        True ends when there are as many answers as beams; False when the best beam, were it to end
        now, is worse than the worst answer; "never" when it can't become better any more.
    num_return_sequences : int
        How many answers a prompt gets, the best first.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if not 2 <= self.num_beams <= MAX_BEAMS:
            raise SettingsInvalid(f"num_beams is 1 to {MAX_BEAMS}; found {self.num_beams}.")
        if self.early_stopping not in (True, False, "never"):
            raise SettingsInvalid(
                f"early_stopping is True, False or 'never'; found {self.early_stopping!r}."
            )
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise SettingsInvalid(
                f"num_return_sequences is 1 to num_beams, {self.num_beams}; found "
                f"{self.num_return_sequences}."
            )

    def num_candidates(self, num_ends: int) -> int:
        """How many of the best continuations are looked at: enough go on if all others end."""
        return max(2, 1 + num_ends) * self.num_beams

    def check(self, request: Request, vocabulary: int) -> None:
        """Refuse what makes no sense with beams.

        Raises
        ------
        SettingsInvalid
        """
        plain = Sampling()
        for name in _OF_SAMPLING:
            if getattr(request.sampling, name) != getattr(plain, name):
                raise SettingsInvalid(
                    f"{name} chooses among tokens, and beam search follows the most likely ones: "
                    f"leave {name} out, or num_beams."
                )
        if request.stop:
            raise SettingsInvalid(
                "stop strings can't be combined with num_beams: a beam ends with an end token."
            )
        if self.num_candidates(len(request.ends)) > vocabulary:
            raise SettingsInvalid(
                f"num_beams={self.num_beams} looks at {self.num_candidates(len(request.ends))} "
                f"continuations, and the vocabulary has {vocabulary} tokens: take fewer beams."
            )


@dataclass(frozen=True)
class Hypothesis:
    """An answer that has ended.

    Attributes
    ----------
    tokens : tuple of int
        Without the prompt.
    score : float
        The sum of its tokens' log-probabilities, after penalties, by the length penalty.
    finish_reason : str
        "stop" after an end token, or "length".
    """

    tokens: tuple[int, ...]
    score: float
    finish_reason: str


@dataclass(frozen=True)
class Move:
    """A beam's next token, and which beam of the step before it goes on from."""

    parent: int
    token: int


class Search:
    """The search for one prompt's answers: log-probabilities in, the next tokens out."""

    def __init__(self, beams: Beams, request: Request) -> None:
        self.answers: list[Hypothesis] = []
        self._beams = beams
        self._request = request
        self._running: list[tuple[int, ...]] = [()]
        self._scores = torch.zeros(1)
        self._length = 0

    def advance(self, logits: torch.Tensor) -> list[Move]:
        """Return how the beams go on, given their logits (N, V); nothing when the search is over."""
        found = torch.topk(
            self._continued(logits).flatten(), self._beams.num_candidates(len(self._request.ends))
        )
        vocabulary = logits.shape[1]
        moves = [Move(i // vocabulary, i % vocabulary) for i in found.indices.tolist()]
        self._length += 1
        is_last = self._length == self._request.max_new_tokens
        going_on: list[int] = []
        for place, move in enumerate(moves):
            if not is_last and move.token not in self._request.ends:
                going_on.append(place)
            elif place < self._beams.num_beams:  # the others are there to go on, not to end
                self._end(move, found.values[place])
        self._keep_best()
        going_on = going_on[: self._beams.num_beams]
        if not going_on:
            return []
        self._running = [self._with(moves[place]) for place in going_on]
        self._scores = found.values[going_on]
        return [moves[place] for place in going_on] if self._may_improve() else []

    def _continued(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores (N, V) of all continuations."""
        prompt, sampling = self._request.prompt, self._request.sampling
        rows = [
            sampling.adjusted(row, [*prompt, *tokens], len(prompt))
            for row, tokens in zip(
                torch.log_softmax(logits.float(), -1), self._running, strict=True
            )
        ]
        return torch.stack(rows) + self._scores[:, None]

    def _with(self, move: Move) -> tuple[int, ...]:
        return (*self._running[move.parent], move.token)

    def _end(self, move: Move, score: torch.Tensor) -> None:
        reason = "stop" if move.token in self._request.ends else "length"
        shared = float(score / self._length**self._beams.length_penalty)
        self.answers.append(Hypothesis(self._with(move), shared, reason))

    def _keep_best(self) -> None:
        self.answers.sort(key=lambda answer: -answer.score)
        del self.answers[self._beams.num_beams :]

    def _may_improve(self) -> bool:
        beams = self._beams
        if len(self.answers) < beams.num_beams:
            return True
        if beams.early_stopping is True:
            return False
        to_the_end = beams.early_stopping == "never" and beams.length_penalty > 0
        length = self._request.max_new_tokens if to_the_end else self._length
        best = float(self._scores[0] / length**beams.length_penalty)
        return best > self.answers[-1].score


async def search(engine: Engine, request: Request, beams: Beams) -> list[Hypothesis]:
    """Return the best answers to one prompt; runs on the client's loop.

    Raises
    ------
    TaskFailed, WorkersLost
        As `Engine.feed` does.
    RequestTooLarge, CacheFull
        As `Engine.admit` does: all beams come in at once.
    """
    found = Search(beams, request)
    num_tokens = whole_blocks(len(request.prompt) + request.max_new_tokens)
    lead = await engine.admit(
        beams.num_beams * num_tokens, request.prompt, beams.num_beams, request.owner
    )
    lead.is_lead = True
    sessions = [lead, *[await engine.open() for _ in range(beams.num_beams - 1)]]
    try:
        running = sessions[:1]
        logits = await engine.feed(lead, request.prompt[len(lead.tokens) :])
        while moves := await asyncio.to_thread(found.advance, logits):
            steps = _steps(moves, running, sessions)
            if lead.error is not None:
                raise lead.error
            logits = await engine.step(steps)
            running = [step.live for step in steps]
    finally:
        for live in sessions:
            await engine.end(live)
    return found.answers[: beams.num_return_sequences]


def _steps(moves: Sequence[Move], running: Sequence[Live], sessions: Sequence[Live]) -> list[Step]:
    """Give each beam a session: the first that goes on from another keeps its session.

    The rest take over tokens, in sessions that nobody goes on from.
    """
    kept = {running[move.parent].name for move in moves}
    free = [live for live in sessions if live.name not in kept]
    steps = []
    for move in moves:
        parent = running[move.parent]
        if parent.name in kept:
            kept.remove(parent.name)
            steps.append(Step(parent, move.token))
        else:
            steps.append(Step(free.pop(), move.token, parent))
    return steps
