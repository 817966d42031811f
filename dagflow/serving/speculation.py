"""Guesses of tokens to come: where they are from, how often they are right, how many pay.

References
----------
Speculative decoding: Leviathan, Kalman, Matias, arXiv 2211.17192. Here a guess is right if it is the
token that is chosen anyway, from logits, seed and position: answers don't depend on guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from copy import copy
from dataclasses import dataclass

from dagflow.serving.draft import DraftSession
from dagflow.serving.guess import DRAFT, LOOK_UP, Guess, Kind
from dagflow.serving.pace import Pace

_LONGEST_NGRAM, _SHORTEST_NGRAM = 4, 2
_LONGEST_MATCH = 32
# So many verified guesses of a kind weigh as much as what was thought before, and so many last.
_PRIOR_WEIGHT = 4.0
_MEMORY = 32
# How often a draft model is right, until it is known.
_DRAFT_PRIOR = 0.7


class Acceptance:
    """How often guesses of each kind have been right, lately."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[float, float]] = {}

    def chance(self, kind: Hashable, prior: float) -> float:
        """Return how likely a guess is right, by what was seen and, while that is little, the prior."""
        right, of = self._found.get(kind, (0.0, 0.0))
        return (right + _PRIOR_WEIGHT * prior) / (of + _PRIOR_WEIGHT)

    def add(self, kind: Hashable, is_right: bool) -> None:
        right, of = self._found.get(kind, (0.0, 0.0))
        kept = 1 - 1 / _MEMORY
        self._found[kind] = (kept * right + is_right, kept * of + 1)


@dataclass(frozen=True)
class _Match:
    """Where a text was as it is now: `place` follows the `length` tokens that are the same."""

    place: int
    length: int


_NO_MATCH = _Match(0, -1)


class PromptLookup:
    """Guesses that a text goes on as it did where it was the same before (prompt look-up decoding).

    A place that was found is followed while it is right. One wrong token behind some that were right is
    taken as replaced, and the place is followed behind it; until the latest tokens are found in another
    place, and more of them.

    References
    ----------
    Yang et al., arXiv 2304.04487; Saxena, "Prompt lookup decoding", 2023.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_learned = 0

    def learn(self, tokens: Sequence[int], end: int) -> None:
        """Know the first tokens of a text."""
        for at in range(max(self._num_learned + 1, _SHORTEST_NGRAM), end + 1):
            for length in range(_SHORTEST_NGRAM, min(_LONGEST_NGRAM, at) + 1):
                self._ends[tuple(tokens[at - length : at])] = at
        self._num_learned = max(self._num_learned, end)

    def find(self, tokens: Sequence[int]) -> _Match:
        """Return where the end of a text was before."""
        for length in range(min(_LONGEST_NGRAM, len(tokens)), _SHORTEST_NGRAM - 1, -1):
            place = self._ends.get(tuple(tokens[-length:]))
            if place is not None and place < len(tokens):
                return _Match(place, _common(tokens, place, length))
        return _NO_MATCH

    def follow(self, match: _Match, tokens: Sequence[int]) -> _Match:
        """Return the match after one more token, the last of `tokens`."""
        if match.length >= 0:
            if tokens[match.place] == tokens[-1]:
                match = _Match(match.place + 1, match.length + 1)
            elif match.length >= _LONGEST_NGRAM:
                match = _Match(match.place + 1, 0)
            else:
                match = _NO_MATCH
        if match.length >= _LONGEST_NGRAM:
            return match
        found = self.find(tokens)
        return found if found.length > match.length else match


def _common(tokens: Sequence[int], place: int, length: int) -> int:
    """Return how many tokens before a place are those at the end."""
    most = min(place, _LONGEST_MATCH)
    while length < most and tokens[place - length - 1] == tokens[-length - 1]:
        length += 1
    return length


class GuessedText:
    """A text, and guesses behind it.

    The look-up is asked at every token, whether its guess is sent or not: how often it is right is known
    without a token sent for that.

    Attributes
    ----------
    tokens : list of int
        Those known, then those guessed.
    guesses : list of Guess
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.guesses: list[Guess] = []
        self.acceptance = Acceptance()
        self._lookup = PromptLookup()
        self._lookup.learn(tokens, len(tokens) - 1)
        # After the tokens known, and after those guessed.
        self._known = self._lookup.find(tokens)
        self._ahead = [self._known]
        self._lookup.learn(tokens, len(tokens))

    @property
    def num_known(self) -> int:
        return len(self.tokens) - len(self.guesses)

    def look_up(self) -> Guess | None:
        """Return what may follow the text and its guesses."""
        return self._guess_at(self._ahead[-1])

    def chance(self, guess: Guess) -> float:
        """Return how likely a guess is right, by how often its kind was."""
        return self.acceptance.chance(guess.kind, guess.prior)

    def append(self, guess: Guess) -> None:
        self.guesses.append(guess)
        self.tokens.append(guess.token)
        self._ahead.append(self._lookup.follow(self._ahead[-1], self.tokens))

    def forget(self, count: int) -> None:
        """Drop the last guesses."""
        if count:
            del self.guesses[-count:], self.tokens[-count:], self._ahead[-count:]

    def confirm(self, token: int) -> bool:
        """Hear which token follows those known; False if another was guessed, and guesses are dropped."""
        looked_up = self._guess_at(self._ahead[0])
        if looked_up is not None:
            self.acceptance.add(looked_up.kind, looked_up.token == token)
        guess = self.guesses[0] if self.guesses else None
        is_right = guess is not None and guess.token == token
        if guess is not None and guess.kind.source == DRAFT:
            self.acceptance.add(guess.kind, is_right)
            self.acceptance.add(DRAFT, is_right)
        if is_right:
            del self.guesses[0], self._ahead[0]
        else:
            self.forget(len(self.guesses))
            self.tokens.append(token)
            self._ahead = [self._lookup.follow(self._ahead[0], self.tokens)]
        self._lookup.learn(self.tokens, self.num_known)
        return is_right or guess is None

    def _guess_at(self, match: _Match) -> Guess | None:
        if match.length < 0:
            return None
        # The more tokens in a row were the same, the likelier. Rather too low: it is learnt at no cost.
        prior = (match.length + 0.5) / (match.length + 2.5)
        kind = Kind(LOOK_UP, min(match.length.bit_length(), 5))
        return Guess(self.tokens[match.place], kind, prior)


class Outlook:
    """How many tokens are to be expected of what is on its way, and when: what decides about more.

    One more guess pays if it raises the tokens a second that are expected. arXiv 2211.17192 (section 3.5)
    finds the best number of guesses so, for one rate of acceptance; here each guess has its own.

    Parameters
    ----------
    seconds : float
        What a traversal of the stages takes.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.expected = 1.0
        self.chance = 1.0

    def pays(self, expected: float, seconds: float) -> bool:
        """Tell whether so many more tokens are worth so many more seconds."""
        return expected * self.seconds > seconds * self.expected

    def add(self, chance: float, seconds: float) -> None:
        """Count a guess that is right with this chance, if all before it are."""
        self.chance *= chance
        self.expected += self.chance
        self.seconds += seconds


class Guesser:
    """Guesses behind a text, from its own words or a draft model, and which of them pay.

    Parameters
    ----------
    prompt : sequence of int
    ends : collection of int
        Tokens that nothing follows: guessed, but not sent.
    pace : Pace
    draft : DraftSession, optional
    """

    def __init__(
        self, prompt: Sequence[int], ends: Collection[int], pace: Pace, draft: DraftSession | None
    ) -> None:
        self.text = GuessedText(prompt)
        self._ends = ends
        self._pace = pace
        self._draft = draft

    def confirm(self, token: int) -> bool:
        """Hear which token follows those known; False if another was guessed, and guesses are dropped."""
        is_right = self.text.confirm(token)
        if self._draft is not None and not is_right:
            self._draft.rewind(self.text.num_known - 1)
        return is_right

    async def behind(self, most: int, busy: int) -> list[int]:
        """Return guesses to be sent along with a token that is known."""
        if not self._has_any():
            return []
        outlook = self._outlook(0, busy)
        return await self._extend(outlook, most, busy, lambda: True)

    async def ahead(
        self, num_passes: int, most: int, busy: int, go_on: Callable[[], bool]
    ) -> list[int]:
        """Return guesses that pay as a pass of their own, behind those under way; or none.

        Parameters
        ----------
        num_passes : int
            How many are under way.
        most : int
        busy : int
            How many sessions wait for the stages: what holds them up holds up all.
        go_on : callable
            Asked while a draft model thinks; False ends it.
        """
        if not self._has_any():
            return []
        before = self._outlook(num_passes, busy)
        cost = self._pace.pass_seconds * busy
        if not before.pays(before.chance * most, cost):
            return []
        outlook = copy(before)
        found = await self._extend(outlook, most, busy, go_on)
        cost += outlook.seconds - before.seconds
        if not before.pays(outlook.expected - before.expected, cost):
            self.text.forget(len(found))
            if self._draft is not None:
                self._draft.rewind(len(self.text.tokens))
            return []
        return found

    def _has_any(self) -> bool:
        return self._draft is not None or self.text.look_up() is not None

    def _outlook(self, num_passes: int, busy: int) -> Outlook:
        outlook = Outlook(self._pace.traversal_seconds)
        for guess in self.text.guesses:
            outlook.add(self.text.chance(guess), self._pace.guess_seconds * busy)
        outlook.seconds += max(0, num_passes - 1) * self._pace.pass_seconds * busy
        return outlook

    async def _extend(
        self, outlook: Outlook, most: int, busy: int, go_on: Callable[[], bool]
    ) -> list[int]:
        found: list[int] = []
        while len(found) < most and go_on():
            cost = self._pace.guess_seconds * busy
            guess = self.text.look_up()
            draft = self._draft_instead_of(guess)
            if draft is not None:
                cost += draft.seconds * busy
                if not outlook.pays(outlook.chance * self._draft_chance, cost):
                    break
                guess = await draft.guess(self.text.tokens)
            if guess is None or guess.token in self._ends:
                break
            chance = self.text.chance(guess)
            if not outlook.pays(outlook.chance * chance, cost):
                break
            self.text.append(guess)
            outlook.add(chance, cost)
            found.append(guess.token)
        return found

    @property
    def _draft_chance(self) -> float:
        return self.text.acceptance.chance(DRAFT, _DRAFT_PRIOR)

    def _draft_instead_of(self, guess: Guess | None) -> DraftSession | None:
        """Return the draft model, if it is likelier to be right than the look-up."""
        draft = self._draft
        if draft is None or not draft.is_ready:
            return None
        return draft if guess is None or self.text.chance(guess) < self._draft_chance else None
