"""A zarr array's metadata, looked at before zarr and memory are given to it.

zarr believes what a zarr.json says: a chunk of no elements, a length beyond all memory, elements that
are Python objects, codecs that it then searches for among all installed packages.
"""

from typing import Any

from dagflow_storage.place import fields
from dagflow_storage.place.bounded_json import parse_json

# Of the arrays that dagflow writes. torch has no others that NumPy knows.
DATA_TYPES = {
    "bool": 1,
    **{f"{kind}{8 * size}": size for kind in ("int", "uint") for size in (1, 2, 4, 8)},
    **{f"float{8 * size}": size for size in (2, 4, 8)},
    **{f"complex{8 * size}": size for size in (8, 16)},
}
_CODECS = frozenset({"bytes", "crc32c", "dagflow.blosc2"})
# Ours have eight MiB, and those of tokens as much at most.
MOST_CHUNK_BYTES = 2**26


class NotOurs(Exception):
    """An array that may be as it should, and isn't of the kind that dagflow writes."""


def check_metadata(data: bytes) -> None:
    """Return if zarr can open a zarr.json without surprises.

    Raises
    ------
    NotOurs
        If it describes an array that dagflow doesn't write.
    ValueError
        If it describes none.
    """
    given = fields.members(
        parse_json(data, finite=False),
        "it",
        *("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "codecs"),
    )
    if fields.integer(given["zarr_format"], "zarr_format") != 3:
        raise ValueError(f"zarr_format is {given['zarr_format']}, not 3")
    if fields.text(given["node_type"], "node_type") != "array":
        raise NotOurs(f"it is no array but a {given['node_type']:.80}")
    itemsize = _itemsize(given["data_type"])
    shape = fields.shape(given["shape"], "shape", itemsize)
    chunk = _chunk_shape(given["chunk_grid"], itemsize)
    if len(chunk) != len(shape):
        raise ValueError(f"it has {len(shape)} dimensions, and its chunks {len(chunk)}")
    if len(shape) != 1:
        raise NotOurs(f"its shape is {list(shape)}")
    for codec in fields.items(given["codecs"], "codecs"):
        name = fields.text(_named(codec, "a codec"), "a codec's name")
        if name not in _CODECS:
            raise NotOurs(f"it has the codec {name[:80]!r}")
    if given.get("storage_transformers"):
        raise NotOurs("it has storage transformers")
    fields.members(given.get("attributes", {}), "attributes")


def _itemsize(data_type: Any) -> int:
    name = _named(data_type, "data_type")
    if name not in DATA_TYPES:
        raise NotOurs(f"its elements are {name[:80]!r}")
    return DATA_TYPES[name]


def _chunk_shape(grid: Any, itemsize: int) -> tuple[int, ...]:
    given = fields.members(grid, "chunk_grid", "name", "configuration")
    if fields.text(given["name"], "chunk_grid") != "regular":
        raise NotOurs("its chunks aren't regular")
    configuration = fields.members(given["configuration"], "chunk_grid", "chunk_shape")
    shape = fields.shape(configuration["chunk_shape"], "chunk_shape", itemsize)
    num_bytes = itemsize
    for size in shape:
        num_bytes *= fields.integer(size, "chunk_shape", least=1)
    if num_bytes > MOST_CHUNK_BYTES:
        raise ValueError(f"its chunks have {num_bytes} bytes, more than {MOST_CHUNK_BYTES}")
    return shape


def _named(value: Any, what: str) -> str:
    """The name in what zarr writes as a name, or as an object with one."""
    found = value.get("name") if isinstance(value, dict) else value
    return fields.text(found, what)
