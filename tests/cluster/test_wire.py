"""Tensors travel as they are: every dtype, without copies, compressed where it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dask.sizeof import sizeof
from distributed import Client
from distributed.protocol import deserialize, serialize

from dagflow.swarm import wire
from dagflow.swarm.clusters import scheduler_info
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.results import BackwardResult, ForwardResult, GradientSums

wire.register()
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
CONTEXT = {"recipient": {"address": "tcp://10.0.0.7:1234"}}


def there_and_back(value: Any, context: Any = None) -> Any:
    header, frames = serialize(value, serializers=["dask"], context=context)
    assert header["serializer"] == "dask"
    return deserialize(header, [bytearray(memoryview(frame).cast("B")) for frame in frames])


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    if found.dtype.itemsize == 1:  # torch compares no float8
        found, wanted = found.float(), wanted.float()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_arrives(dtype: torch.dtype) -> None:
    base = (100 * torch.randn(6, 8)).to(dtype)
    values = TensorDict(
        {
            "matrix": base,
            "number": base[0, 0].clone(),
            "empty": base[:0],
            "no width": torch.empty(3, 0, 2, dtype=dtype),
            "transposed": base.T,
            "strided": base[::2, 1::3],
            "late": base.flatten()[3:],
            "expanded": base[:, None, :1].expand(-1, 5, 8),
        }
    )
    found = there_and_back(values)
    assert list(found) == list(values)
    for name, tensor in values.items():
        assert_same(found[name], tensor)
        if tensor.numel():
            assert found[name].stride() == tensor.stride()
            assert found[name].data_ptr() % 64 == tensor.data_ptr() % 64


def test_special_numbers_keep_their_bits() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    found = there_and_back(TensorDict(x=tensor))["x"]
    assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


def test_gradients_history_stays() -> None:
    leaf = torch.ones(3, requires_grad=True)
    found = there_and_back(TensorDict(leaf=leaf, result=leaf * 2))
    assert not found["leaf"].requires_grad
    assert found["result"].grad_fn is None
    assert_same(found["result"], torch.full((3,), 2.0))


def test_frames_are_the_tensors_own_memory() -> None:
    tensor = torch.arange(4096.0)
    _, frames = serialize(TensorDict(x=tensor), serializers=["dask"])
    tensor[7] = -1.0
    assert torch.frombuffer(frames[0], dtype=torch.float32)[7] == -1.0


def test_a_frame_keeps_its_tensors_memory_alive() -> None:
    frame = wire.memory_of(torch.full((1 << 16,), 3.0))
    torch.full((1 << 16,), 4.0)
    assert torch.frombuffer(frame, dtype=torch.float32).eq(3.0).all()


def test_aligned_writable_frames_are_not_copied() -> None:
    header, frames = serialize(TensorDict(x=torch.arange(4096.0)), serializers=["dask"])
    found = deserialize(header, frames)["x"]
    assert found.data_ptr() == torch.frombuffer(frames[0], dtype=torch.float32).data_ptr()


@pytest.mark.parametrize("offset", [1, 4, 32])
def test_misaligned_frames_become_aligned_tensors(offset: int) -> None:
    tensor = torch.arange(1000.0)
    header, frames = serialize(TensorDict(x=tensor), serializers=["dask"])
    buffer = bytearray(offset + 4000)
    buffer[offset:] = bytes(frames[0])
    found = deserialize(header, [memoryview(buffer)[offset:]])["x"]
    assert found.data_ptr() % 64 == 0
    assert_same(found, tensor)


def test_read_only_frames_become_writable_tensors() -> None:
    tensor = torch.arange(1000.0)
    header, frames = serialize(TensorDict(x=tensor), serializers=["dask"])
    found = deserialize(header, [bytes(frames[0])])["x"]
    found += 1
    assert_same(found, tensor + 1)


def test_what_stays_on_a_worker_does_not_travel() -> None:
    big = {"w": torch.ones(1 << 16)}
    boundary = {"h": torch.ones(4)}
    forward = ForwardResult(boundary, big, (3, 1))
    sums = GradientSums((3, 1), big)
    backward = BackwardResult(boundary, sums, (0, 2), (0.5, 2.0), (3, 1), big)
    for result in (forward, backward):
        _, frames = serialize(result, serializers=["dask"])
        assert sum(memoryview(frame).nbytes for frame in frames) == 16
    found = there_and_back(forward)
    assert (found.buffers, found.place) == (None, (3, 1))
    assert_same(found.values["h"], boundary["h"])
    returned = there_and_back(backward)
    assert (returned.sums, returned.buffers, returned.place) == (None, None, (3, 1))
    assert (returned.non_finite, returned.losses) == ((0, 2), (0.5, 2.0))
    assert_same(returned.gradients["h"], boundary["h"])


def test_dask_accounts_for_every_tensor() -> None:
    tensor = torch.ones(1 << 16)
    assert sizeof(TensorDict(a=tensor, b=tensor.bfloat16())) == pytest.approx(393_216, rel=0.01)
    assert sizeof(ForwardResult({"a": tensor}, {"b": tensor})) == pytest.approx(524_288, rel=0.01)
    sums = GradientSums((3, 1), {"b": tensor})
    assert sizeof(BackwardResult({}, sums)) == pytest.approx(262_144, rel=0.01)
    assert sizeof(BackwardResult({"a": tensor}, None)) == pytest.approx(262_144, rel=0.01)
    whole = BackwardResult({"a": tensor}, sums, buffers={"c": tensor})
    assert sizeof(whole) == pytest.approx(786_432, rel=0.01)


def policy(bandwidth: float | None, break_even: float) -> wire.CompressionPolicy:
    return wire.CompressionPolicy(
        lambda host: bandwidth if host == "10.0.0.7" else None, lambda tensor: break_even
    )


@pytest.mark.parametrize(
    ("bandwidth", "packed"), [(None, False), (2e8, False), (1e8, False), (9e7, True)]
)
def test_compression_is_for_links_slower_than_break_even(
    monkeypatch: pytest.MonkeyPatch, bandwidth: float | None, packed: bool
) -> None:
    monkeypatch.setattr(wire, "POLICY", policy(bandwidth, 1e8))
    tensor = torch.arange(1 << 16).to(torch.bfloat16)
    values = TensorDict(big=tensor, small=torch.zeros(64))
    header, frames = serialize(values, serializers=["dask"], context=CONTEXT)
    assert [h["blosc2"] for h in header["sub-header"]["tensors"]] == [packed, False]
    assert (memoryview(frames[0]).nbytes < 2 << 16) == packed
    assert_same(there_and_back(values, CONTEXT)["big"], tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compressed_tensors_keep_their_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(wire, "POLICY", policy(1.0, 1e8))
    tensor = (100 * torch.randn(1 << 17)).to(dtype).reshape(2, -1)
    found = there_and_back(TensorDict(x=tensor), CONTEXT)["x"]
    assert_same(found, tensor)
    found.zero_()  # its memory is writable


def test_break_even_is_higher_for_what_compresses_better() -> None:
    zeros = wire.measure_break_even(torch.zeros(1 << 18))
    noise = wire.measure_break_even(torch.randint(0, 256, (1 << 20,), dtype=torch.uint8))
    assert zeros > 1e6
    assert noise < zeros / 10


def test_break_even_is_that_of_the_same_kind_of_tensor_and_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[bool] = []

    def measure(tensor: torch.Tensor) -> float:
        measured.append(bool(tensor.any()))
        return 1e6 if tensor.any() else 1e9

    monkeypatch.setattr(wire, "_MEASURED_EVERY", 3)
    pays = wire.CompressionPolicy(lambda host: 1e8, measure).pays
    zeros, ones = torch.zeros(1 << 16), torch.ones(1 << 16)
    # Whichever came first doesn't decide for the other.
    assert [pays("mask", zeros, "a"), pays("gradient of mask", ones, "a")] == [True, False]
    assert [pays("mask", zeros, "a") for _ in range(2)] == [True, True]
    assert measured == [False, True]
    assert [pays("mask", ones, "a") for _ in range(2)] == [False, False]
    assert measured == [False, True, True]


def test_values_and_their_gradients_are_kinds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Asking(wire.CompressionPolicy):
        def pays(self, kind: str, tensor: torch.Tensor, host: str) -> bool:
            asked.append(kind)
            return False

    monkeypatch.setattr(wire, "POLICY", Asking(lambda host: 1.0, lambda tensor: 1.0))
    tensor = torch.zeros(4)
    for result in (BackwardResult({"x": tensor}), ForwardResult({"x": tensor})):
        there_and_back(result, CONTEXT)
    assert asked == ["gradient of x", "x"]


def test_bandwidth_is_that_of_the_last_large_transfer_to_the_host() -> None:
    log = [
        {"who": "tcp://10.0.0.7:1", "total": 1 << 20, "bandwidth": 5.0},
        {"who": "tcp://10.0.0.7:2", "total": 1 << 20, "bandwidth": 7.0},
        {"who": "tcp://10.0.0.7:1", "total": 100, "bandwidth": 1.0},
        {"who": "tcp://10.0.0.8:1", "total": 1 << 20, "bandwidth": 9.0},
    ]
    bandwidth = wire.bandwidth_from_log(log)
    assert [bandwidth(host) for host in ("10.0.0.7", "10.0.0.8", "10.0.0.9")] == [7.0, 9.0, None]


def test_half_precision_travels_between_two_processes(client: Client) -> None:
    client.run(wire.register)
    first, second = sorted(scheduler_info(client)["workers"])

    def make(dtype: torch.dtype) -> TensorDict:
        return TensorDict(x=torch.arange(10_000).to(dtype).reshape(100, 100).T)

    def look(values: TensorDict) -> tuple[str, bool, float, int]:
        x = values["x"]
        return str(x.dtype), x.stride() == (1, 100), float(x.double().sum()), x.data_ptr() % 64

    for dtype in (torch.bfloat16, torch.float16):
        made = client.submit(make, dtype, workers=[first], pure=False)
        found = client.submit(look, made, workers=[second], pure=False).result()
        wanted = make(dtype)["x"]
        assert found == (str(dtype), True, float(wanted.double().sum()), 0)
        assert_same(made.result()["x"], wanted)
