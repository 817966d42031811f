"""zarr's way to a store, with the store's retries, limits and errors."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from dagflow_storage._backends import LARGEST_READ_BYTES
from dagflow_storage._translation import reading, writing
from dagflow_storage.retries import Retries

T = TypeVar("T")


class RetryingZarrStore(WrapperStore[ZarrStore]):
    """Each chunk is read and written with retries of its own; the others don't wait for it.

    Parameters
    ----------
    store
        What reads and writes.
    retries
        When to try again.
    shown
        What errors call the store.
    has_limits
        Whether a single operation may be stopped that takes too long.
    """

    def __init__(self, store: ZarrStore, retries: Retries, shown: str, has_limits: bool) -> None:
        super().__init__(store)
        self._retries = retries
        self._shown = shown
        self._has_limits = has_limits

    def _with_store(self, store: ZarrStore) -> "RetryingZarrStore":
        return RetryingZarrStore(store, self._retries, self._shown, self._has_limits)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return await self._read(key, lambda: self._store.get(key, prototype, byte_range))

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        ranges = list(key_ranges)
        return list(
            await asyncio.gather(*[self.get(key, prototype, wanted) for key, wanted in ranges])
        )

    async def exists(self, key: str) -> bool:
        return await self._read(key, lambda: self._store.exists(key))

    async def set(self, key: str, value: Buffer) -> None:
        await self._write(key, len(value), lambda: self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await self._write(key, len(value), lambda: self._store.set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        await self._write(key, 0, lambda: self._store.delete(key))

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        await asyncio.gather(*[self.set(key, value) for key, value in values])

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def _read(self, key: str, operation: Callable[[], Awaitable[T]]) -> T:
        async def attempt() -> T:
            with reading(f"{self._shown}/{key}"):
                async with self._limit(LARGEST_READ_BYTES):
                    return await operation()

        return await self._retries.run_async(attempt)

    async def _write(self, key: str, num_bytes: int, operation: Callable[[], Awaitable[T]]) -> T:
        async def attempt() -> T:
            with writing(f"{self._shown}/{key}"):
                async with self._limit(num_bytes):
                    return await operation()

        return await self._retries.run_async(attempt)

    def _limit(self, num_bytes: int) -> asyncio.Timeout:
        seconds = self._retries.policy.deadline_seconds(num_bytes)
        return asyncio.timeout(seconds if self._has_limits else None)
