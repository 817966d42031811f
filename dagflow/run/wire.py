"""How tensors travel between processes: dask serializers for the results of tasks.

A tensor's memory is sent as it is, without a copy and without NumPy, so bfloat16 and float16 travel,
too. It is compressed with blosc2, losslessly, where measurements say that this is faster: when the
link to the receiver, as dask's own transfer log has measured it, is slower than what compression
saves a second on tensors of that dtype on this machine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import blosc2  # type: ignore[import-untyped]
import torch
from dask.sizeof import sizeof
from distributed.protocol import dask_deserialize, dask_serialize

from dagflow_storage import ALIGNMENT_BYTES
from dagflow_tasks.layout import pack, unpack
from dagflow_tasks.operators import dtype_of
from dagflow_tasks.results import BackwardResult, ForwardResult, TensorDict

# Tensors smaller than this are not worth a look.
_MIN_COMPRESSED_BYTES = 64 * 1024
_SAMPLE_BYTES = 1 << 20

Header = dict[str, Any]


@dataclass
class CompressionPolicy:
    """Decides whether compressing tensors of one dtype pays on a link.

    Attributes
    ----------
    bandwidth : callable
        Measured bytes a second to a host, or None where nothing was sent yet.
    break_even : dict
        By dtype the bandwidth in bytes a second below which compression pays; measured on the
        first tensor of each dtype.
    """

    bandwidth: Callable[[str], float | None]
    break_even: dict[torch.dtype, float]

    def pays(self, tensor: torch.Tensor, host: str) -> bool:
        """Tell whether to compress this tensor for that host."""
        if tensor.numel() * tensor.element_size() < _MIN_COMPRESSED_BYTES:
            return False
        measured = self.bandwidth(host)
        if measured is None:
            return False
        if tensor.dtype not in self.break_even:
            self.break_even[tensor.dtype] = measure_break_even(tensor)
        return measured < self.break_even[tensor.dtype]


def measure_break_even(tensor: torch.Tensor) -> float:
    """Return the bandwidth (bytes a second) below which compressing such tensors saves time.

    Sending n bytes raw takes n / b; compressed to n / r it takes t + n / (r b) with t seconds of
    encoding and decoding. The two are equal at b = n (1 - 1 / r) / t.
    """
    sample = memory_of(tensor)[:_SAMPLE_BYTES]
    begin = perf_counter()
    packed = compress(sample, tensor.element_size())
    blosc2.decompress2(packed)
    seconds = perf_counter() - begin
    return max(0, len(sample) - len(packed)) / seconds


def compress(data: memoryview, element_bytes: int) -> bytes:
    """Compress a tensor's bytes: zstd 1 over shuffled bytes, the best of what was measured."""
    packed: bytes = blosc2.compress2(
        data,
        typesize=element_bytes,
        clevel=1,
        codec=blosc2.Codec.ZSTD,
        filters=[blosc2.Filter.SHUFFLE],
        nthreads=1,
    )
    return packed


POLICY = CompressionPolicy(bandwidth=lambda host: None, break_even={})
"""This process's policy; workers point `bandwidth` at their transfer log."""


def bandwidth_from_log(log: Any) -> Callable[[str], float | None]:
    """Return a function that finds a host's bandwidth in a worker's log of outgoing transfers."""

    def bandwidth(host: str) -> float | None:
        for entry in reversed(log):
            big = entry["total"] >= _MIN_COMPRESSED_BYTES
            if big and urlsplit(str(entry["who"])).hostname == host:
                return float(entry["bandwidth"])
        return None

    return bandwidth


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's memory, which stays alive as long as the view does."""
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes == 0:
        return memoryview(b"")
    array = (ctypes.c_char * num_bytes).from_address(tensor.data_ptr())
    array._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def pack_tensors(
    tensors: Mapping[str, torch.Tensor], context: Any
) -> tuple[list[Header], list[Any]]:
    """Return headers and buffers for named tensors."""
    recipient = ((context or {}).get("recipient") or {}).get("address") or ""
    host = urlsplit(recipient).hostname or ""
    headers, frames = [], []
    for name, tensor in tensors.items():
        tensor, layout = pack(tensor)
        tensor = tensor.cpu()
        frame: Any = memory_of(tensor)
        packed = POLICY.pays(tensor, host)
        if packed:
            frame = compress(frame, tensor.element_size())
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = list(tensor.shape)
        headers.append(
            {"name": name, "dtype": dtype, "shape": shape, "layout": layout, "blosc2": packed}
        )
        frames.append(frame)
    return headers, frames


def unpack_tensors(headers: list[Header], frames: list[Any]) -> dict[str, torch.Tensor]:
    """Return the tensors that `pack_tensors` was given, on the CPU."""
    return {
        header["name"]: unpack(_tensor(header, frame), header["layout"])
        for header, frame in zip(headers, frames, strict=True)
    }


def _tensor(header: Header, frame: Any) -> torch.Tensor:
    dtype = dtype_of(header["dtype"])
    if header["blosc2"]:
        frame = bytearray(blosc2.decompress2(bytes(frame)))
    view = memoryview(frame)
    if view.nbytes == 0:
        return torch.empty(header["shape"], dtype=dtype)
    if view.readonly:
        view = memoryview(bytearray(view))
    tensor = torch.frombuffer(view, dtype=dtype).reshape(header["shape"])
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


def register() -> None:
    """Teach this process's dask to send and receive tasks' results. Safe to call again."""
    dask_serialize.register(TensorDict)(_dump_tensors)
    dask_deserialize.register(TensorDict)(lambda h, f: TensorDict(unpack_tensors(h["tensors"], f)))
    dask_serialize.register(ForwardResult)(_dump_forward)
    dask_deserialize.register(ForwardResult)(_load_forward)
    dask_serialize.register(BackwardResult)(_dump_backward)
    dask_deserialize.register(BackwardResult)(_load_backward)
    for result_type in (TensorDict, ForwardResult, BackwardResult):
        sizeof.register(result_type)(_size_of)


def _dump_tensors(value: TensorDict, context: Any = None) -> tuple[Header, list[Any]]:
    headers, frames = pack_tensors(value, context)
    return {"tensors": headers}, frames


def _dump_forward(result: ForwardResult, context: Any = None) -> tuple[Header, list[Any]]:
    # Mutated buffers stay: only the stage's own tasks, on this worker, read them.
    headers, frames = pack_tensors(result.values, context)
    header = {"tensors": headers, "finite": result.finite, "place": list(result.place)}
    header["weights"] = _chained(result.weights) if result.weights is not None else None
    return header, frames


def _load_forward(header: Header, frames: list[Any]) -> ForwardResult:
    values = unpack_tensors(header["tensors"], frames)
    weights = BackwardResult({}, **_unchained(header["weights"])) if header["weights"] else None
    return ForwardResult(values, None, header["finite"], tuple(header["place"]), weights)


# What a backward's result says of the micro-batches so far.
_CHAINED = ("non_finite", "losses", "place")


def _chained(result: BackwardResult) -> Header:
    return {name: list(getattr(result, name)) for name in _CHAINED}


def _unchained(header: Header) -> dict[str, Any]:
    return {name: tuple(header[name]) for name in _CHAINED}


def _dump_backward(result: BackwardResult, context: Any = None) -> tuple[Header, list[Any]]:
    # Gradient sums stay, too: they are as large as the weights.
    headers, frames = pack_tensors(result.gradients, context)
    header = _chained(result) | {"tensors": headers, "forward": None}
    if result.forward is not None:
        header["forward"], more = _dump_forward(result.forward, context)
        frames = [*frames, *more]
    return header, frames


def _load_backward(header: Header, frames: list[Any]) -> BackwardResult:
    count = len(header["tensors"])
    gradients = unpack_tensors(header["tensors"], frames[:count])
    there = _load_forward(header["forward"], frames[count:]) if header["forward"] else None
    return BackwardResult(gradients, None, **_unchained(header), forward=there)


def _size_of(value: Any) -> int:
    """Bytes of a result's tensors, for dask's accounts."""
    tensors = [tensor for part in _parts(value) if part for tensor in part.values()]
    return 200 + sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, ForwardResult):
        return [value.values, value.buffers, *_parts(value.weights)]
    if isinstance(value, BackwardResult):
        sums = value.sums.tensors if value.sums else None
        return [value.gradients, sums, *_parts(value.forward)]
    return [value]
