"""A folder that can be out of reach: the file system ``away://``, for a store that is away a while."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

FLAG = "out-of-reach"


class AwayFileSystem(LocalFileSystem):
    """The local file system, but nothing answers while a file named `FLAG` lies beside the store."""

    protocol = "away"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("away://")))

    def _ask(self, path: str) -> str:
        place = self._strip_protocol(path)
        if any((parent / FLAG).exists() for parent in Path(place).parents):
            raise ConnectionError(f"nobody answers for {place}")
        return place

    def info(self, path: Any, **options: Any) -> Any:
        known = isinstance(path, os.DirEntry)  # while a folder is listed
        return super().info(path if known else self._ask(path), **options)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        return super().ls(self._ask(path), detail=detail, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        return super().cat_file(self._ask(path), *arguments, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Put whole objects only, as a server does."""
        place = Path(self._ask(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        if mode == "create" and place.exists():
            raise FileExistsError(str(place))
        part = place.with_name(f".{place.name}.{id(value):x}.part")
        part.write_bytes(value)
        part.rename(place)

    def rm(self, path: str, *arguments: Any, **options: Any) -> None:
        super().rm(self._ask(path), *arguments, **options)


fsspec.register_implementation("away", AwayFileSystem, clobber=True)
