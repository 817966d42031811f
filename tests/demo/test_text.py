"""Text becomes tokens: which files, in which order, which part is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dagflow.demo.text import (
    BytePairTokenizer,
    ByteTokenizer,
    find_files,
    python_library,
    tokens_of,
)
from dagflow.errors import SettingsInvalid


def write(folder: Path, **sizes: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.py" for name in sizes]
    for path, size in zip(paths, sizes.values(), strict=True):
        path.write_bytes(path.stem.encode() * size)
    return paths


def text_of(files: list[Path], **options: object) -> bytes:
    pieces = tokens_of(files, ByteTokenizer(), **options)  # type: ignore[arg-type]
    return b"".join(piece.tobytes() for piece in pieces)


def test_every_machine_has_a_library_to_learn_from() -> None:
    files = python_library()
    folders = {part for path in files for part in path.parts}
    assert {"argparse.py", "json"} <= folders
    assert not folders & {"site-packages", "test"}
    assert sum(path.stat().st_size for path in files) > 5e6


def test_a_folder_is_searched_for_text(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "down", a=1)
    (tmp_path / "picture.png").write_bytes(b"\x89")
    (tmp_path / "notes.md").write_text("notes")
    assert {path.name for path in find_files([str(tmp_path)])} == {"a.py", "notes.md"}


def test_a_file_that_is_named_needs_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("text")
    assert find_files([str(tmp_path / "README")]) == [tmp_path / "README"]


def test_globs_find_each_file_once(tmp_path: Path) -> None:
    write(tmp_path, a=1, b=1)
    found = find_files([str(tmp_path / "*.py"), str(tmp_path / "a.py"), str(tmp_path)])
    assert sorted(path.name for path in found) == ["a.py", "b.py"]


def test_a_pattern_without_files_is_named(tmp_path: Path) -> None:
    write(tmp_path, a=1)
    with pytest.raises(SettingsInvalid, match=r"no text files at .*nothing\*"):
        find_files([str(tmp_path), str(tmp_path / "nothing*")])


def test_order_is_the_same_in_another_folder(tmp_path: Path) -> None:
    sizes = {f"f{number}": 1 for number in range(20)}
    for folder in ("one", "two"):
        write(tmp_path / folder, **sizes)
    first = [path.name for path in find_files([str(tmp_path / "one")])]
    assert first == [path.name for path in find_files([str(tmp_path / "two")])]
    assert first != sorted(first)


def test_the_end_of_each_file_is_held_out(tmp_path: Path) -> None:
    files = write(tmp_path, a=100, b=40)
    assert text_of(files) == b"a" * 95 + b"b" * 38
    assert text_of(files, held_out=True) == b"a" * 5 + b"b" * 2


def test_limit_stops_in_the_middle_of_a_file(tmp_path: Path) -> None:
    files = write(tmp_path, a=100, b=100, c=100)
    assert text_of(files, limit_bytes=100) == b"a" * 95 + b"b" * 5
    assert text_of(files, limit_bytes=95) == b"a" * 95


def test_files_are_read_one_at_a_time(tmp_path: Path) -> None:
    files = [*write(tmp_path, a=100), tmp_path / "missing.py"]
    pieces = tokens_of(files, ByteTokenizer())
    assert next(pieces).size == 95
    with pytest.raises(FileNotFoundError):
        next(pieces)


def test_bytes_there_and_back() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("zwölf".encode())
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids.tolist()) == "zwölf"
    assert tokenizer.decode([0xFF]) == "\N{REPLACEMENT CHARACTER}"


def test_byte_pairs_there_and_back_in_fewer_tokens(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "text.py"
    path.write_text("def function(self):\n    return self\n" * 50)
    tokenizer = BytePairTokenizer([path], vocab_size=300)
    text = "def function(größe):\n"
    ids = tokenizer.encode(text.encode())
    assert tokenizer.vocab_size <= 300
    assert ids.dtype == np.uint16
    assert len(ids) < len(text)
    assert tokenizer.decode(ids.tolist()) == text


def test_byte_pairs_must_fit_their_dtype() -> None:
    with pytest.raises(SettingsInvalid, match="256 to 65536, got 70000"):
        BytePairTokenizer([], vocab_size=70_000)
