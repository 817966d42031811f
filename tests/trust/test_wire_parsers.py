"""Frames from another process: what they say of themselves is checked before memory is taken."""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from distributed.protocol import deserialize, serialize

from dagflow.errors import GarbageReceived
from dagflow.swarm import wire
from dagflow_storage.arrays.codec import Blosc2Codec, check_packed
from dagflow_tasks.limits import RECEIVING
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.results import BackwardResult, ForwardResult

wire.register()
DECLARED_BYTES = 1900 * 2**20


@contextmanager
def little_memory(num_bytes: int = 256 * 2**20) -> Iterator[None]:
    """Let this process's address space grow by so much: what takes more fails with MemoryError."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def zeros_frame(num_bytes: int, special: int = 0x10) -> bytes:
    """32 bytes that say they are zeros (0x10) or nothing in particular (0x40), in blosc2's words."""
    filters = bytes([0, 0, 0, 0, 0, 1])
    head = (
        5,
        1,
        0x95,
        4,
        num_bytes,
        min(num_bytes, 2**20),
        32,
        filters,
        5,
        0,
        bytes(6),
        0,
        special,
    )
    return struct.pack("<4B3i6s2B6s2B", *head)


def message(tensor: torch.Tensor, **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    """A message of one tensor, its header changed."""
    header, frames = sent(TensorDict(x=tensor))
    header["tensors"][0] |= changes
    return header, frames


def sent(value: Any) -> tuple[dict[str, Any], list[Any]]:
    """What dagflow sends through dask of a value: a header and frames."""
    header, frames = serialize(value, serializers=["dask"])
    return header["sub-header"], [bytearray(memoryview(frame).cast("B")) for frame in frames]


def received(header: dict[str, Any], frames: list[Any], like: Any = None) -> Any:
    """What dask makes of it in another process, which knows what it is."""
    outer, _ = serialize(TensorDict() if like is None else like, serializers=["dask"])
    return deserialize({**outer, "sub-header": header}, frames)


def test_a_frame_of_32_bytes_that_declares_1900_megabytes_is_refused() -> None:
    header, _ = message(torch.ones(4), blosc2=True)
    with little_memory(), pytest.raises(GarbageReceived, match="not 16"):
        received(header, [zeros_frame(DECLARED_BYTES)])


@pytest.mark.parametrize("dtype", ["uint8", "float32", "complex128"])
def test_a_header_that_agrees_with_it_is_refused_beyond_the_workers_memory(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RECEIVING, "num_bytes", 2**30)
    sizes = [DECLARED_BYTES // wire.dtype_of(dtype).itemsize]
    header, _ = message(torch.ones(4), blosc2=True, shape=sizes, dtype=dtype)
    with little_memory(), pytest.raises(GarbageReceived, match="half of this process's memory"):
        received(header, [zeros_frame(DECLARED_BYTES)])


def test_many_frames_together_are_held_to_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RECEIVING, "num_bytes", 2**20)
    header, _ = message(torch.ones(4), blosc2=True, shape=[2**16])
    one = header["tensors"][0]
    header["tensors"] = [{**one, "name": f"x{n}"} for n in range(8)]
    with pytest.raises(GarbageReceived, match="half of this process's memory"):
        received(header, [zeros_frame(2**18)] * 8)


def test_zeros_travel_in_32_bytes_as_before() -> None:
    header, _ = message(torch.ones(4), blosc2=True, shape=[2, 2])
    assert torch.equal(received(header, [zeros_frame(16)])["x"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        (31, 0x40, "ours"),  # "uninitialised": the reader's own memory would be the content
        (31, 0x18, "ours"),  # lies in a file
        (2, 0xD5, "ours"),  # a compressor that blosc2 would look for a plugin for
        (16, 0x20, "ours"),  # a filter of the user's own
        (30, 1, "ours"),
        (3, 0, "ours"),  # elements of no bytes
        (12, 64, "has 32"),  # says that it is longer than it is
        (7, 0x80, "not 16"),  # a negative size
    ],
)
def test_chunks_that_no_compressor_of_ours_writes_are_refused(
    place: int, value: int, why: str
) -> None:
    frame = bytearray(zeros_frame(16))
    frame[place] = value
    header, _ = message(torch.ones(4), blosc2=True)
    with pytest.raises(GarbageReceived, match=why):
        received(header, [bytes(frame)])


@pytest.mark.parametrize("cname", ["zstd", "lz4", "blosclz", "zlib"])
@pytest.mark.parametrize("num_bytes", [0, 1, 31, 4096, 100_001])
def test_chunks_of_ours_pass_whatever_they_hold(cname: str, num_bytes: int) -> None:
    rng = np.random.default_rng(0)
    for raw in (
        np.zeros(num_bytes, np.uint8),
        np.full(num_bytes, 7, np.uint8),
        rng.integers(0, 256, num_bytes, dtype=np.uint8),
    ):
        codec = Blosc2Codec(cname, typesize=4)
        packed = np.frombuffer(codec.compressed(raw), np.uint8)
        check_packed(packed, num_bytes)
        found = np.ones(num_bytes, np.uint8)
        codec.decompress(packed, found)
        assert np.array_equal(found, raw)


@pytest.mark.parametrize(
    "shape",
    [[-1, -4], [-2, -2], [-4], [4, -1], [2**62, 4], [2**40, 2**40], [0, 2**63], [4.0], [True, 4]],
)
@pytest.mark.parametrize("packed", [False, True])
def test_shapes_that_no_tensor_has_are_refused(shape: list[Any], packed: bool) -> None:
    header, frames = message(torch.ones(4), shape=shape, blosc2=packed)
    frames = [blosc2.compress2(bytes(frames[0]))] if packed else frames
    with pytest.raises(GarbageReceived):
        received(header, frames)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [3]},
        {"shape": [5]},
        {"shape": [1] * 65},
        {"shape": 4},
        {"shape": "4"},
        {"dtype": "object"},
        {"dtype": "float64"},
        {"dtype": ["float32"]},
        {"dtype": None},
        {"name": 7},
        {"blosc2": "no"},
        {"layout": 3},
        {"layout": {}},
    ],
    ids=str,
)
def test_headers_that_dont_fit_their_frame_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(GarbageReceived):
        received(*message(torch.ones(4), **changes))


def test_headers_must_be_as_many_as_frames_and_of_different_names() -> None:
    header, frames = message(torch.ones(4))
    one = header["tensors"][0]
    for headers in ([], [one, {**one, "name": "y"}], [one, one], None, one, [3], [{}]):
        with pytest.raises(GarbageReceived):
            wire.unpack_tensors(headers, frames)
    with pytest.raises(GarbageReceived):
        wire.unpack_tensors([one, one], frames * 2)


def laid(**changes: Any) -> tuple[dict[str, Any], list[Any]]:
    header, frames = message(torch.arange(6.0).reshape(2, 3).T)
    header["tensors"][0]["layout"] = {**header["tensors"][0]["layout"], **changes}
    return header, frames


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": [2**40, 1]},
        {"strides": [2**62, 2**62]},
        {"strides": [-1, 3]},
        {"strides": [1]},
        {"strides": [0, 0]},
        {"strides": [1.0, 3]},
        {"shape": [3, 2**40], "strides": [1, 0]},
        {"shape": [3, 3]},
        {"shape": [0, 2]},
        {"shape": [-3, -2]},
        {"offset": 2**40},
        {"offset": -1},
        {"conj": True},
        {"conj": 1},
        {"more": 1},
    ],
    ids=str,
)
def test_layouts_that_lead_out_of_the_tensor_or_into_much_memory_are_refused(
    changes: dict[str, Any],
) -> None:
    if "more" not in changes and changes.get("shape") != [3, 2**40]:
        assert torch.equal(received(*laid())["x"], torch.arange(6.0).reshape(2, 3).T)
    with little_memory(), pytest.raises(GarbageReceived):
        received(*laid(**changes))


def test_bytes_that_are_no_bool_are_refused() -> None:
    header, _ = message(torch.ones(4, dtype=torch.bool))
    with pytest.raises(GarbageReceived, match="neither 0 nor 1"):
        received(header, [bytearray([0, 1, 2, 255])])


@pytest.mark.parametrize(
    "changes",
    [
        {"place": None},
        {"place": [1]},
        {"place": [1, 2, 3]},
        {"place": ["a", 1]},
        {"place": [-9, 1]},
    ],
    ids=str,
)
def test_what_a_forward_says_of_itself_is_checked(changes: dict[str, Any]) -> None:
    result = ForwardResult({"h": torch.ones(2)}, None, (3, 1))
    header, frames = sent(result)
    assert received(header, frames, result).place == (3, 1)
    with pytest.raises(GarbageReceived):
        received({**header, **changes}, frames, result)


@pytest.mark.parametrize(
    "changes",
    [
        {"non_finite": [-1]},
        {"non_finite": 4},
        {"losses": [[]]},
        {"tensors": None},
        {"losses": ["x"]},
        {"place": None},
        {"tensors": []},
    ],
    ids=str,
)
def test_what_a_backward_says_of_itself_is_checked(changes: dict[str, Any]) -> None:
    result = BackwardResult({"g": torch.ones(3)}, None, (0,), (0.5,), (3, 1))
    header, frames = sent(result)
    assert received(header, frames, result).losses == (0.5,)
    with pytest.raises(GarbageReceived):
        received({**header, **changes}, frames, result)
