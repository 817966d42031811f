import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow_storage import ArraySpec, Blosc2Codec, Store, write_arrays


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
