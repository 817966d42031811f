"""What is guessed, how often it is right, and when it pays: no cluster, no model."""

from __future__ import annotations

import asyncio

import pytest

from dagflow.serving.guess import LOOK_UP, Guess, Kind
from dagflow.serving.pace import Pace
from dagflow.serving.speculation import Acceptance, GuessedText, Guesser, Outlook

PERIOD = [5, 17, 3, 42, 8, 23]


def _guess_all(text: GuessedText, count: int) -> list[int]:
    found = []
    for _ in range(count):
        guess = text.look_up()
        assert guess is not None
        text.append(guess)
        found.append(guess.token)
    return found


def _pace(traversal: float, computing: float, more: float) -> Pace:
    pace = Pace()
    for count in (1, 8, 17):
        pace.add_traversal(count, traversal + more * (count - 1))
        pace.add_computing([(count, computing + more * (count - 1)), (count, computing / 2)])
    return pace


def test_a_text_that_repeats_is_guessed_to_go_on_repeating() -> None:
    text = GuessedText(PERIOD * 2)
    assert _guess_all(text, 15) == (PERIOD * 3)[:15]
    assert (text.tokens, text.num_known) == (PERIOD * 4 + PERIOD[:3], 12)


def test_right_guesses_are_confirmed_and_a_wrong_one_drops_those_behind_it() -> None:
    text = GuessedText(PERIOD * 2)
    _guess_all(text, 6)
    assert [text.confirm(token) for token in PERIOD[:2]] == [True, True]
    assert (text.num_known, len(text.guesses)) == (14, 4)
    assert not text.confirm(60)
    assert (text.tokens, text.guesses) == ([*PERIOD * 2, *PERIOD[:2], 60], [])


def test_behind_a_token_that_was_replaced_the_text_is_guessed_to_go_on() -> None:
    text = GuessedText([*range(20), 50, *range(5)])
    text.confirm(60)  # where a 5 was
    assert _guess_all(text, 3) == [6, 7, 8]
    text.forget(3)
    text.confirm(61)  # and another: the place is lost
    assert text.look_up() is None


def test_guesses_are_judged_whether_they_are_sent_or_not() -> None:
    def chance(continued: list[int]) -> float:
        text = GuessedText(PERIOD * 2)
        for token in continued:
            text.confirm(token)
        return text.chance(Guess(0, Kind(LOOK_UP, 3), 0.7))

    assert chance(PERIOD * 3) > 0.75
    assert chance([PERIOD[0], 90, PERIOD[0], 91, PERIOD[0], 92]) <= 0.7


def test_acceptance_follows_what_is_seen_lately() -> None:
    acceptance = Acceptance()
    assert acceptance.chance("kind", 0.5) == 0.5
    for _ in range(200):
        acceptance.add("kind", True)
    assert acceptance.chance("kind", 0.5) > 0.9
    for _ in range(64):
        acceptance.add("kind", False)
    assert acceptance.chance("kind", 0.5) < 0.2
    assert acceptance.chance("other", 0.5) == 0.5


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [0.01, 0.05, 0.2])
def test_as_many_guesses_pay_as_give_the_most_tokens_a_second(chance: float, cost: float) -> None:
    outlook, count = Outlook(1.0), 0
    while outlook.pays(outlook.chance * chance, cost):
        outlook.add(chance, cost)
        count += 1

    def rate(num_guesses: int) -> float:
        # arXiv 2211.17192, equation 1 over what the pass takes
        return (1 - chance ** (num_guesses + 1)) / (1 - chance) / (1 + num_guesses * cost)

    assert rate(count) == pytest.approx(max(rate(n) for n in range(200)))


def _passes(pace: Pace, most: int = 8) -> list[int]:
    """How many guesses are sent behind the next token, and then ahead, pass by pass."""

    async def send() -> list[int]:
        guesser = Guesser(PERIOD * 20, (), pace, None)
        found = [len(await guesser.behind(16, 1))]
        while len(found) < most:
            guesses = await guesser.ahead(len(found), 16, 1, lambda: True)
            if not guesses:
                break
            found.append(len(guesses))
        return found

    return asyncio.run(send())


def test_far_away_passes_of_guesses_are_sent_ahead_and_next_door_they_are_not() -> None:
    far, near = _pace(0.170, 0.008, 0.001), _pace(0.018, 0.016, 0.001)
    assert len(_passes(far)) >= 3
    assert far.most_passes(16) >= 5
    assert near.most_passes(16) == 1


def test_nothing_is_guessed_before_it_is_known_what_it_costs() -> None:
    assert _passes(Pace()) == [0]


def test_guesses_that_cost_as_much_as_traversals_are_not_sent() -> None:
    assert sum(_passes(_pace(0.02, 0.02, 0.02))) == 0


def test_what_holds_up_many_must_be_likelier() -> None:
    async def count(busy: int) -> int:
        guesser = Guesser([1, 2, 3, 1, 2], (), _pace(0.02, 0.01, 0.001), None)
        return len(await guesser.behind(16, busy))

    assert asyncio.run(count(1)) > asyncio.run(count(8)) > asyncio.run(count(32)) == 0


def test_nothing_is_sent_that_follows_an_end() -> None:
    async def guesses() -> list[int]:
        return await Guesser(PERIOD * 3, (PERIOD[3],), _pace(0.2, 0.01, 0.001), None).behind(16, 1)

    assert asyncio.run(guesses()) == PERIOD[:3]


def test_a_pace_is_forgotten_when_it_is_old() -> None:
    pace = _pace(0.02, 0.01, 0.005)
    assert pace.guess_seconds == pytest.approx(0.005)
    for _ in range(300):
        pace.add_traversal(1, 0.02)
        pace.add_computing([(1, 0.01)])
    assert pace.guess_seconds == pytest.approx(0.01 * 0.02)
    assert pace.most_passes(16) == 2
