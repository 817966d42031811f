import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow_storage import ArraySpec, Blosc2Codec, NotFound, Store, write_arrays, write_tokens
from dagflow_storage.arrays.flat import FlatArray

CODECS = pytest.mark.parametrize("codec", [None, Blosc2Codec()], ids=["plain", "blosc2"])


@given(
    dtype=st.sampled_from(["uint8", "float16", "float32", "float64", "complex128"]),
    shuffle=st.sampled_from(["noshuffle", "shuffle", "bitshuffle"]),
    cname=st.sampled_from(["zstd", "lz4"]),
    num_elements=st.integers(1, 5000),
    chunk=st.integers(1, 5000),
)
@settings(max_examples=30, deadline=None)
def test_arrays_come_back_bit_for_bit(
    dtype: str, shuffle: str, cname: str, num_elements: int, chunk: int
) -> None:
    data = np.random.default_rng(0).bytes(num_elements * np.dtype(dtype).itemsize)
    expected = np.frombuffer(data, dtype)
    codec = Blosc2Codec(cname=cname, shuffle=shuffle)
    array = zarr.create_array(
        {}, shape=expected.shape, chunks=(chunk,), dtype=dtype, compressors=[codec]
    )
    array[:] = expected
    assert array[:].tobytes() == data


def test_element_size_comes_from_the_array() -> None:
    array = zarr.create_array(
        {}, shape=(4,), chunks=(4,), dtype="float64", compressors=[Blosc2Codec()]
    )
    assert array.metadata.to_dict()["codecs"][-1]["configuration"] == {
        "cname": "zstd",
        "clevel": 1,
        "shuffle": "shuffle",
        "typesize": 8,
    }


def test_shuffled_weights_shrink() -> None:
    weights = np.random.default_rng(0).standard_normal(2**18).astype("float32")
    found: dict[str, zarr.abc.store.Store] = {}
    array = zarr.create_array(
        found,
        shape=weights.shape,
        chunks=weights.shape,
        dtype="float32",
        compressors=[Blosc2Codec()],
    )
    array[:] = weights
    assert array.nbytes_stored() < weights.nbytes / 1.15


def test_plain_zarr_reads_our_arrays(folder: Store) -> None:
    data = np.arange(10, dtype=np.float32)
    specs = [ArraySpec("w", "parameter", "float32", (10,))]
    write_arrays(folder, "set", specs, lambda _: data)
    np.testing.assert_array_equal(zarr.open(f"{folder.url}/set/float32", mode="r")[:], data)


def test_a_process_that_never_heard_of_dagflow_reads_our_arrays(folder: Store) -> None:
    specs = [ArraySpec("w", "parameter", "float32", (10,))]
    write_arrays(folder, "plain", specs, lambda _: np.arange(10, dtype=np.float32))
    write_tokens(folder.child("packed"), np.arange(10))
    code = (
        "import sys, zarr\n"
        "for path in sys.argv[1:]:\n"
        "    assert not any(name.startswith('dagflow') for name in sys.modules)\n"
        "    print(zarr.open(path, mode='r')[:].astype(int).tolist())\n"
    )
    paths = [f"{folder.url}/plain/float32", f"{folder.url}/packed"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code, *paths],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines() == [str(list(range(10)))] * 2


def test_arrays_written_by_plain_zarr_calls_are_read_past_zarr(folder: Store) -> None:
    data = np.arange(10, dtype=np.float32)
    array = zarr.create_array(
        f"{folder.url}/set", shape=(10,), chunks=(4,), dtype="float32",
        compressors=[zarr.codecs.Crc32cCodec()], filters=None,
    )  # fmt: skip
    array[:] = data
    found = FlatArray.open(folder, "set")
    for start, stop in [(0, 10), (3, 9), (8, 10), (5, 5)]:
        np.testing.assert_array_equal(found.read(start, stop), data[start:stop])


@CODECS
@pytest.mark.parametrize("dtype", ["uint8", "bool", "int16", "float64", "complex64"])
def test_what_is_written_past_zarr_is_what_zarr_reads(
    folder: Store, dtype: str, codec: Blosc2Codec | None
) -> None:
    data = np.random.default_rng(0).integers(0, 2, 10).astype(dtype)
    FlatArray.create(folder, "set", dtype, 10, 4, codec=codec).write(0, data)
    np.testing.assert_array_equal(zarr.open(f"{folder.url}/set", mode="r")[:], data)


@CODECS
def test_what_zarr_writes_is_read(folder: Store, codec: Blosc2Codec | None) -> None:
    FlatArray.create(folder, "set", "float32", 10, 4, codec=codec)
    data = np.arange(10, dtype=np.float32)
    zarr.open(f"{folder.url}/set", mode="r+")[:] = data
    np.testing.assert_array_equal(FlatArray.open(folder, "set").read(0, 10), data)


@pytest.mark.parametrize(
    "chain",
    [
        {"compressors": None},
        {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]},
        {"compressors": [zarr.codecs.Crc32cCodec()], "shards": (8,)},
        {
            "compressors": [zarr.codecs.Crc32cCodec()],
            "serializer": zarr.codecs.BytesCodec(endian="big"),
        },
        {"compressors": [zarr.codecs.Crc32cCodec()], "shape": (8, 1), "chunks": (4, 1)},
    ],
)
def test_arrays_of_strangers_are_not_read(folder: Store, chain: dict[str, Any]) -> None:
    form = {"shape": (8,), "chunks": (4,), "dtype": "float32", "filters": None, **chain}
    zarr.create_array(f"{folder.url}/set", **form)
    with pytest.raises(NotFound, match="dagflow didn't write"):
        FlatArray.open(folder, "set")


@pytest.mark.parametrize(
    "configuration",
    [{"cname": "snake"}, {"shuffle": "riffle"}, {"clevel": 10}, {"typesize": 256}],
)
def test_bad_settings_are_refused(configuration: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(configuration))):
        Blosc2Codec(**configuration)  # type: ignore[arg-type]


def test_to_dict_and_back_is_the_same() -> None:
    codec = Blosc2Codec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2)
    assert Blosc2Codec.from_dict(codec.to_dict()) == codec
