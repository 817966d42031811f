"""Copies of stages on workers that don't own them: rebuilt ahead, for spares and for stages that move."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence

from distributed import Future

from dagflow.training.dispatch import Dispatch, release
from dagflow.training.ledger import Ledger
from dagflow.training.recovery_protocol import Copied, Copy


class Copies:
    """The tasks that rebuild a stage beside its owner, by the numbers that recovery gave them.

    Parameters
    ----------
    dispatch
    owners
        The workers by stage, as they are.
    ledger
        Has the steps that a copy replays from the journal.
    turn : callable
        Returns a number that grows with every rebuilding of the run.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        owners: Sequence[str],
        ledger: Ledger,
        turn: Callable[[], tuple[int, int]],
    ) -> None:
        self._dispatch = dispatch
        self._owners = owners
        self._ledger = ledger
        self._turn = turn
        self._copies: dict[int, Future] = {}
        self._arriving: set[int] = set()  # not reported yet

    def begin(self, copy: Copy) -> None:
        graph = self._dispatch.graph.again(uuid.uuid4().hex[:8])
        records = () if copy.by_snapshot else self._ledger.before(copy.num_steps)
        dsk = graph.restore(copy.stage, copy.num_steps, records, self._turn())
        places = list(self._owners)
        places[copy.stage] = copy.address
        (self._copies[copy.number],) = self._dispatch.submit(dsk, addresses=places).values()
        self._arriving.add(copy.number)

    def arrived(self) -> Iterator[Copied]:
        """Report each copy once, when its task has ended."""
        for number in [n for n in self._arriving if self._copies[n].done()]:
            self._arriving.discard(number)
            yield Copied(number, self._copies[number].status == "finished")

    def release(self, number: int) -> None:
        """Give up a copy, or say that its task's result is no longer needed."""
        self._arriving.discard(number)
        self._copies.pop(number).release()

    def release_all(self) -> None:
        release(self._copies.values())
        self._copies.clear()
        self._arriving.clear()
