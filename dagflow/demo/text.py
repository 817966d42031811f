"""Text as tokens: where a machine has some, which of it is held out, how it becomes numbers.

Files come in an order that looks random and is the same on every machine, so that a limit in bytes
cuts no folder off.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dagflow.errors import SettingsInvalid

TokenIds = NDArray[np.uint8] | NDArray[np.uint16]

TEXT_SUFFIXES = frozenset({".md", ".py", ".rst", ".txt"})
# What was installed beside Python's library isn't the library; its tests are odd code on purpose,
# and more than half of the bytes; its encodings are tables.
NOT_THE_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
)
HELD_OUT_FRACTION = 0.05


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int

    def encode(self, text: bytes) -> TokenIds:
        """Token ids, ``(N,)``."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text, with a mark where the ids form none."""
        ...


class ByteTokenizer:
    """One token a byte: nothing to train, nothing unknown."""

    vocab_size = 256

    def encode(self, text: bytes) -> TokenIds:
        """Token ids, ``(N,)`` uint8, a view of the text."""
        return np.frombuffer(text, np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """Text, with a mark where the bytes are no UTF-8."""
        return bytes(ids).decode("utf-8", errors="replace")


class BytePairTokenizer:
    """Frequent runs of bytes as one token, learnt from files; needs the `tokenizers` package.

    References
    ----------
    Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units"
    (2016), section 3.2; on bytes as GPT-2 does.
    """

    def __init__(self, files: Sequence[Path], vocab_size: int = 4096) -> None:
        if importlib.util.find_spec("tokenizers") is None:
            raise SettingsInvalid("byte pairs need tokenizers: pip install 'dagflow[hf]'")
        if not 256 <= vocab_size <= 2**16:
            raise SettingsInvalid(f"byte pairs need a vocab_size of 256 to 65536, got {vocab_size}")
        from tokenizers import ByteLevelBPETokenizer

        # Bytes that are no UTF-8 are lost to this library: it takes text.
        texts = (path.read_text("utf-8", errors="replace") for path in files)
        self._bpe: Any = ByteLevelBPETokenizer()
        self._bpe.train_from_iterator(texts, vocab_size, show_progress=False)
        self.vocab_size = int(self._bpe.get_vocab_size())

    def encode(self, text: bytes) -> TokenIds:
        """Token ids, ``(N,)`` uint16."""
        ids = self._bpe.encode(text.decode("utf-8", errors="replace")).ids
        return np.asarray(ids, np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Text, with a mark where the ids form none."""
        return str(self._bpe.decode(list(ids)))


def python_library() -> list[Path]:
    """List the sources and documentation of the Python that runs this: about 11 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    return find_files([str(root)], excluded=NOT_THE_LIBRARY)


def find_files(patterns: Iterable[str], excluded: frozenset[str] = frozenset()) -> list[Path]:
    """List files by name, by glob, or by the folder that holds them.

    Parameters
    ----------
    patterns
        Of a folder, the files that `TEXT_SUFFIXES` calls text are taken; else what is named.
    excluded
        Names of folders that aren't entered.

    Raises
    ------
    SettingsInvalid
        If a pattern fits no file.
    """
    found: dict[Path, str] = {}
    for pattern in patterns:
        matches = dict(_matches(pattern, excluded))
        if not matches:
            raise SettingsInvalid(f"no text files at {pattern!r}: give a file, a folder or a glob")
        found.update(matches)
    return sorted(found, key=lambda path: hashlib.sha256(found[path].encode()).digest())


def _matches(pattern: str, excluded: frozenset[str]) -> Iterator[tuple[Path, str]]:
    """Yield files with the names they are ordered by, which don't say where the folder is."""
    named = Path(pattern).expanduser()
    roots = [named] if named.exists() else map(Path, glob.iglob(str(named), recursive=True))
    for root in roots:
        if root.is_file():
            yield root, root.name
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in excluded]
            for path in (Path(folder, name) for name in names):
                if path.suffix in TEXT_SUFFIXES:
                    yield path, path.relative_to(root).as_posix()


def tokens_of(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    *,
    held_out: bool = False,
    limit_bytes: int | None = None,
) -> Iterator[TokenIds]:
    """Yield the tokens of one file after the other, and hold no more than one.

    Parameters
    ----------
    held_out
        The last twentieth of each file, which the default leaves out: of one file, too, there is
        something to train on and something to test on.
    limit_bytes
        Stop after that many bytes of text.
    """
    remaining = limit_bytes
    for path in files:
        text = path.read_bytes()
        end_of_training = len(text) - int(len(text) * HELD_OUT_FRACTION)
        part = text[end_of_training:] if held_out else text[:end_of_training]
        if remaining is not None:
            part = part[:remaining]
            remaining -= len(part)
        if part:
            yield tokenizer.encode(part)
        if remaining == 0:
            return
