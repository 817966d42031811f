"""Places and the queue in front of them."""

from __future__ import annotations

import asyncio

import pytest

from dagflow.server.admission import Admission, QueueFull


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_those_who_wait_get_places_in_their_order() -> None:
    async def scenario() -> list[int]:
        admission, admitted = Admission(1, 2), []

        async def visit(number: int) -> None:
            await admission.enter()
            admitted.append(number)

        await admission.enter()
        tasks = [asyncio.create_task(visit(number)) for number in (1, 2)]
        await _settle()
        with pytest.raises(QueueFull):
            await admission.enter()
        for _ in tasks:
            admission.leave()
            await _settle()
        admission.leave()
        assert admission.num_running == admission.num_waiting == 0
        return admitted

    assert asyncio.run(scenario()) == [1, 2]


@pytest.mark.parametrize("turn_first", [True, False])
def test_who_leaves_the_queue_takes_no_place(turn_first: bool) -> None:
    async def scenario() -> None:
        admission = Admission(1, 2)
        await admission.enter()
        waiting = asyncio.create_task(admission.enter())
        await _settle()
        steps = [admission.leave, waiting.cancel]
        for step in steps if turn_first else reversed(steps):
            step()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert admission.num_running == admission.num_waiting == 0
        await admission.enter()

    asyncio.run(scenario())
