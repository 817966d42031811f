"""What a recurrent operator remembers of a session, and how it goes back.

A state is a sum over all tokens so far: it can't be shortened as keys and values can. So earlier
states are marked now and then, and the inputs since are kept; going back is computing again from a
mark, in this operator alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

# A session can be rewound by so many tokens at least; further back, it is computed again from its
# first token. Guesses that are verified at once are fewer, mostly.
REACH_TOKENS = 32

Advance = Callable[
    [torch.Tensor | None, tuple[torch.Tensor, ...]], tuple[torch.Tensor, torch.Tensor]
]
"""From a state (None before the first token) and tokens' inputs to their outputs and the next state."""


@dataclass(frozen=True)
class Mark:
    """A state after the first `position` tokens; None for that before any."""

    position: int
    state: torch.Tensor | None


@dataclass
class RecurrentState:
    """What one operator remembers of one session. Tensors in it are never written again.

    A rewind goes back to the newest mark before its position, and on from there over the inputs that
    were kept. Marks are made at multiples of `REACH_TOKENS`; two of them and the newest state are
    kept, so that any of the last `REACH_TOKENS` tokens can be gone back to.

    Attributes
    ----------
    length : int
        Tokens that it has seen.
    marks : list of Mark
        The oldest first.
    pieces : list of (int, tuple of Tensor)
        Inputs of neighbouring tokens, tokens first, with their first one's position. None before the
        oldest mark is needed.
    """

    length: int = 0
    marks: list[Mark] = field(default_factory=lambda: [Mark(0, None)])
    pieces: list[tuple[int, tuple[torch.Tensor, ...]]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        states = sum(mark.state.nbytes for mark in self.marks if mark.state is not None)
        return states + sum(tensor.nbytes for _, piece in self.pieces for tensor in piece)

    def reaches(self, position: int) -> bool:
        """Tell whether tokens from a position on can be computed."""
        return position == 0 or (
            position <= self.length and any(mark.position <= position for mark in self.marks)
        )

    def upto(self, position: int) -> RecurrentState:
        """Return the state as it was after the first tokens; it must reach them."""
        if position == self.length:
            return RecurrentState(position, list(self.marks), list(self.pieces))
        marks = [mark for mark in self.marks if mark.position <= position]
        pieces = [
            (at, rows_of(piece, 0, position - at)) for at, piece in self.pieces if at < position
        ]
        return RecurrentState(position, marks or [Mark(0, None)], pieces if marks else [])

    def run(self, start: int, inputs: tuple[torch.Tensor, ...], advance: Advance) -> torch.Tensor:
        """Return the outputs of tokens from a position on, and remember them.

        Tokens that it has seen already change nothing.
        """
        end = start + inputs[0].shape[0]
        before = self.upto(start)
        base = before.marks[-1]
        replayed = start - base.position
        if replayed:
            inputs = _joined([*(p for _, p in before._pieces_from(base.position)), inputs])
        after, output = before._advanced(base, inputs, advance)
        if end > self.length:
            self.length, self.marks, self.pieces = after.length, after.marks, after.pieces
        return output[replayed:]

    def _advanced(
        self, base: Mark, inputs: tuple[torch.Tensor, ...], advance: Advance
    ) -> tuple[RecurrentState, torch.Tensor]:
        """Go on from a mark over inputs; those up to the length are known."""
        begin, end = base.position, base.position + inputs[0].shape[0]
        newest = end // REACH_TOKENS * REACH_TOKENS
        oldest = max(newest - REACH_TOKENS, 0)
        cuts = [at for at in (oldest, newest) if begin < at < end]
        marks, outputs, state = list(self.marks), [], base.state
        for at, to in zip([begin, *cuts], [*cuts, end], strict=True):
            output, state = advance(state, rows_of(inputs, at - begin, to - begin))
            outputs.append(output)
            marks.append(Mark(to, state))
        kept = [m for m in marks if m.position in (oldest, newest, end)]
        first = max(self.length, oldest)
        # A copy: a slice would keep the whole pass.
        own = tuple(tensor.clone() for tensor in rows_of(inputs, first - begin, end - begin))
        pieces = [(at, p) for at, p in self.pieces if at + p[0].shape[0] > oldest]
        return RecurrentState(end, kept, [*pieces, (first, own)]), cat_rows(outputs)

    def _pieces_from(self, position: int) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
        return [
            (max(at, position), rows_of(piece, max(position - at, 0), piece[0].shape[0]))
            for at, piece in self.pieces
            if at + piece[0].shape[0] > position
        ]


def most_bytes(state_bytes: int, row_bytes: int) -> int:
    """Return what a `RecurrentState` takes at most: three states, and two marks' distance of inputs."""
    return 3 * state_bytes + 2 * REACH_TOKENS * row_bytes


def rows_of(tensors: tuple[torch.Tensor, ...], begin: int, end: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor[begin:end] for tensor in tensors)


def _joined(pieces: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*pieces, strict=True))


def cat_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
