"""How tensors travel between processes: dask serializers for the results of tasks.

A tensor's memory is sent as it is, without a copy and without NumPy, so bfloat16 and float16 travel,
too. It is compressed with blosc2, losslessly, where measurements say that this is faster: when the
link to the receiver, as dask's own transfer log has measured it, is slower than what compression
saves a second on this machine, on what the same task sent before under the same name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import blosc2  # type: ignore[import-untyped]
import torch
from dask.sizeof import sizeof
from distributed.protocol import dask_deserialize, dask_serialize

from dagflow_storage import ALIGNMENT_BYTES
from dagflow_storage.arrays.codec import check_packed
from dagflow_storage.place import fields
from dagflow_tasks.errors import GarbageReceived, ProgramInvalid
from dagflow_tasks.layout import Layout, checked_layout, pack, unpack
from dagflow_tasks.limits import RECEIVING
from dagflow_tasks.program.nodes import dtype_of
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.results import BackwardResult, ForwardResult

# Tensors smaller than this are not worth a look.
_MIN_COMPRESSED_BYTES = 64 * 1024
_SAMPLE_BYTES = 1 << 20
# Measuring takes a few milliseconds; what compresses well at the first step may not later on.
_MEASURED_EVERY = 256
_MOST_MEASURED = 4096

Header = dict[str, Any]
_HEADER = frozenset({"name", "dtype", "shape", "layout", "blosc2"})


@dataclass
class CompressionPolicy:
    """Decides whether compressing a tensor pays on a link.

    Attributes
    ----------
    bandwidth : callable
        Measured bytes a second to a host, or None where nothing was sent yet.
    measure : callable
        Returns the bandwidth in bytes a second below which compressing a tensor pays; asked now and
        then for each kind of tensor.
    """

    bandwidth: Callable[[str], float | None]
    measure: Callable[[torch.Tensor], float]
    _known: dict[tuple[str, torch.dtype], tuple[float, int]] = field(default_factory=dict)

    def pays(self, kind: str, tensor: torch.Tensor, host: str) -> bool:
        """Tell whether to compress this tensor for that host.

        Parameters
        ----------
        kind
            What compresses about alike: a role, and the value's name.
        """
        if tensor.numel() * tensor.element_size() < _MIN_COMPRESSED_BYTES:
            return False
        measured = self.bandwidth(host)
        if measured is None:
            return False
        break_even, num_left = self._known.get((kind, tensor.dtype), (0.0, 0))
        if not num_left:
            break_even, num_left = self.measure(tensor), _MEASURED_EVERY
            if len(self._known) >= _MOST_MEASURED:
                self._known.clear()  # of plans that are long over
        self._known[kind, tensor.dtype] = (break_even, num_left - 1)
        return measured < break_even


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


POLICY = CompressionPolicy(bandwidth=lambda host: None, measure=measure_break_even)
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
    tensors: Mapping[str, torch.Tensor], context: Any, role: str = ""
) -> tuple[list[Header], list[Any]]:
    """Return headers and buffers for named tensors.

    Parameters
    ----------
    role
        Tells values from their gradients, which have the same names.
    """
    recipient = ((context or {}).get("recipient") or {}).get("address") or ""
    host = urlsplit(recipient).hostname or ""
    headers, frames = [], []
    for name, tensor in tensors.items():
        tensor, layout = pack(tensor)
        tensor = tensor.cpu()
        frame: Any = memory_of(tensor)
        packed = POLICY.pays(f"{role}{name}", tensor, host)
        if packed:
            frame = compress(frame, tensor.element_size())
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = list(tensor.shape)
        headers.append(
            {"name": name, "dtype": dtype, "shape": shape, "layout": layout, "blosc2": packed}
        )
        frames.append(frame)
    return headers, frames


def unpack_tensors(headers: Any, frames: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the tensors that `pack_tensors` was given, on the CPU.

    Raises
    ------
    GarbageReceived
        If headers and frames don't fit together, or would take too much memory. Nothing is allocated
        before all of them have been looked at.
    """
    with _refusing_garbage("tensors"):
        forms = [_form(header) for header in fields.items(headers, "the headers")]
        if len(forms) != len(frames):
            raise ValueError(f"there are {len(forms)} headers for {len(frames)} frames")
        if len({form.name for form in forms}) < len(forms):
            raise ValueError("two tensors have the same name")
        views = [memoryview(frame).cast("B") for frame in frames]
        for form, view in zip(forms, views, strict=True):
            _check_frame(form, view)
        RECEIVING.admit(sum(form.num_bytes for form in forms if form.is_packed), "a message")
        return {
            form.name: unpack(_tensor(form, view), form.layout)
            for form, view in zip(forms, views, strict=True)
        }


@contextmanager
def _refusing_garbage(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OverflowError, ProgramInvalid) as error:
        raise GarbageReceived(
            f"Another process sent {what} that can't be right: {error}."
        ) from error


class _Form(NamedTuple):
    """What a header says of its frame."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    layout: Layout | None
    is_packed: bool


def _form(header: Any) -> _Form:
    if not isinstance(header, dict) or not header.keys() >= _HEADER:
        raise ValueError(f"a header is {fields.shown(header)}, and lacks what a header has")
    name = fields.text(header["name"], "a name")
    dtype = dtype_of(fields.text(header["dtype"], "a dtype"))
    shape = fields.shape(header["shape"], "a shape", dtype.itemsize)
    layout = checked_layout(header["layout"], shape, dtype)
    is_packed = fields.flag(header["blosc2"], "blosc2")
    return _Form(name, dtype, shape, prod(shape) * dtype.itemsize, layout, is_packed)


def _check_frame(form: _Form, frame: memoryview) -> None:
    if form.is_packed:
        check_packed(frame, form.num_bytes)
    elif frame.nbytes != form.num_bytes:
        raise ValueError(
            f"{form.name!r} of shape {list(form.shape)} is {form.num_bytes} bytes, and {frame.nbytes} came"
        )


def _tensor(form: _Form, frame: memoryview) -> torch.Tensor:
    if not form.num_bytes:
        return torch.empty(form.shape, dtype=form.dtype)
    if form.is_packed:
        tensor = torch.empty(form.shape, dtype=form.dtype)
        blosc2.decompress2(frame, dst=memory_of(tensor), nthreads=1)
    else:
        own = memoryview(bytearray(frame)) if frame.readonly else frame
        tensor = torch.frombuffer(own, dtype=form.dtype).reshape(form.shape)
    # Kernels count on 0 and 1: with others they may write past the end.
    if form.dtype == torch.bool and memory_of(tensor).tobytes().translate(None, b"\0\1"):
        raise ValueError(f"{form.name!r} is bool, and has bytes that are neither 0 nor 1")
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


def register() -> None:
    """Teach this process's dask to send and receive tasks' results. Safe to call again."""
    dask_serialize.register(TensorDict)(_dump_tensors)
    dask_deserialize.register(TensorDict)(_load_tensors)
    dask_serialize.register(ForwardResult)(_dump_forward)
    dask_deserialize.register(ForwardResult)(_load_forward)
    dask_serialize.register(BackwardResult)(_dump_backward)
    dask_deserialize.register(BackwardResult)(_load_backward)
    for result_type in (TensorDict, ForwardResult, BackwardResult):
        sizeof.register(result_type)(_size_of)


def _dump_tensors(value: TensorDict, context: Any = None) -> tuple[Header, list[Any]]:
    headers, frames = pack_tensors(value, context)
    return {"tensors": headers}, frames


def _load_tensors(header: Any, frames: list[Any]) -> TensorDict:
    with _refusing_garbage("tensors"):
        headers = fields.members(header, "a header", "tensors")["tensors"]
    return TensorDict(unpack_tensors(headers, frames))


def _dump_forward(result: ForwardResult, context: Any = None) -> tuple[Header, list[Any]]:
    # Mutated buffers stay: only the stage's own tasks, on this worker, read them.
    headers, frames = pack_tensors(result.values, context)
    return {"tensors": headers, "place": list(result.place)}, frames


def _load_forward(header: Any, frames: list[Any]) -> ForwardResult:
    values = _load_tensors(header, frames)
    with _refusing_garbage("a result"):
        return ForwardResult(values, None, _place(header.get("place")))


def _dump_backward(result: BackwardResult, context: Any = None) -> tuple[Header, list[Any]]:
    # Gradient sums stay, too: they are as large as the weights.
    headers, frames = pack_tensors(result.gradients, context, "gradient of ")
    facts = {name: list(getattr(result, name)) for name in ("non_finite", "losses", "place")}
    return facts | {"tensors": headers}, frames


def _load_backward(header: Any, frames: list[Any]) -> BackwardResult:
    gradients = _load_tensors(header, frames)
    with _refusing_garbage("a result"):
        non_finite = fields.items(header.get("non_finite"), "non_finite")
        losses = fields.items(header.get("losses"), "losses")
        return BackwardResult(
            gradients,
            None,
            tuple(fields.integer(index, "a micro-batch") for index in non_finite),
            tuple(fields.number(loss, "a loss") for loss in losses),
            _place(header.get("place")),
        )


def _place(given: Any) -> tuple[int, int]:
    step, index = fields.items(given, "a place")
    return fields.integer(step, "a step", -1), fields.integer(index, "a micro-batch", -1)


def _size_of(value: Any) -> int:
    """Bytes of a result's tensors, for dask's accounts."""
    tensors = [tensor for part in _parts(value) if part for tensor in part.values()]
    return 200 + sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, ForwardResult):
        return [value.values, value.buffers]
    if isinstance(value, BackwardResult):
        return [value.gradients, value.sums.tensors if value.sums else None, value.buffers]
    return [value]
