"""A long way off, on one machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence
from typing import Any


class Relay:
    """Hands bytes on, both ways, each so much later than it came; a long way off on one machine.

    Whoever calls a worker, the driver or the stage before, calls its relay, so each hop passes one once:
    driver to stage, stage to stage, and the last stage's answer, which comes back on the driver's call.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.port, self.behind = _free_ports(2)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *_: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _end(self) -> None:
        self._server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.behind)
        except OSError:
            writer.close()
            return
        try:
            with contextlib.suppress(asyncio.CancelledError):  # at the end
                await self._hand_on(((reader, back), (there, writer)))
        finally:
            back.close()
            writer.close()

    async def _hand_on(
        self, ways: Sequence[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    ) -> None:
        async with asyncio.TaskGroup() as group:
            for source, target in ways:
                pending: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
                group.create_task(self._take(source, pending))
                group.create_task(self._give(pending, target))

    async def _take(
        self, source: asyncio.StreamReader, pending: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                pending.put_nowait((self._loop.time() + self._seconds, data))
        pending.put_nowait((self._loop.time() + self._seconds, b""))

    async def _give(
        self, pending: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = await pending.get()
                await asyncio.sleep(due - self._loop.time())
                if not data:
                    break
                target.write(data)
                await target.drain()
        target.close()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
