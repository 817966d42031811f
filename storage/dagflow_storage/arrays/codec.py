"""blosc2 as a zarr v3 codec; zarr ships only its predecessor.

Importing this module registers the codec. Lossless: it belongs to the transport, and nobody
above the store notices it.
"""

import asyncio
import os
import struct
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import blosc2  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.registry import register_codec

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer

Bytes = NDArray[np.uint8]
CODEC_NAME = "dagflow.blosc2"
# blosc2 holds the GIL while it works, so zarr's threads can't overlap; its own threads can:
# 0.64 GB/s with one, 1.1 GB/s with two. More than four starve the training beside it.
NUM_THREADS = min(4, os.cpu_count() or 1)
_MAX_CHUNK_BYTES: int = blosc2.MAX_BUFFERSIZE
# https://github.com/Blosc/c-blosc2/blob/main/README_CHUNK_FORMAT.rst: version, version of the
# compressor, flags, typesize; bytes, bytes a block, bytes compressed; six filters, compressor's code
# and setting, six filters' settings, two more bytes of flags.
_HEADER = struct.Struct("<4B3i6s2B6s2B")
_EXTENDED, _COPIED, _COMPRESSOR_SHIFT = 0b101, 0b10, 5
# blosclz, lz4, zlib, zstd. For codes that it doesn't know blosc2 looks for plugins, and runs Python.
_COMPRESSOR_FORMATS = frozenset({0, 1, 3, 4})
_FILTERS = frozenset({0, 1, 2})
# In the last byte: nothing, or zeros, NaNs or one value throughout. Left out are chunks that say
# nothing of their content (whoever reads them gets his own memory), and those that lie in a file.
_ZEROS = 0x10
_SPECIAL = frozenset({0x00, _ZEROS, 0x20, 0x30})

_COMPRESSORS = {codec.name.lower(): codec for codec in blosc2.Codec if codec.name.isupper()}
_SHUFFLES = {
    "noshuffle": blosc2.Filter.NOFILTER,
    "shuffle": blosc2.Filter.SHUFFLE,
    "bitshuffle": blosc2.Filter.BITSHUFFLE,
}


@dataclass(frozen=True)
class Blosc2Codec(BytesBytesCodec):
    """blosc2 with one filter.

    Parameters
    ----------
    cname
        Compressor, such as ``"zstd"`` or ``"lz4"``.
    clevel
        Level, 0 to 9. Above 1 zstd costs time and gains nothing on weights.
    shuffle
        ``"noshuffle"``, ``"shuffle"`` or ``"bitshuffle"``.
    typesize
        Bytes an element; 0 takes it from the array.
    """

    is_fixed_size: ClassVar[bool] = False  # type: ignore[misc]

    cname: str = "zstd"
    clevel: int = 1
    shuffle: str = "shuffle"
    typesize: int = 0

    def __post_init__(self) -> None:
        if self.cname not in _COMPRESSORS:
            raise ValueError(f"cname is {self.cname!r}, must be one of {sorted(_COMPRESSORS)}")
        if self.shuffle not in _SHUFFLES:
            raise ValueError(f"shuffle is {self.shuffle!r}, must be one of {list(_SHUFFLES)}")
        if not 0 <= self.clevel <= 9:
            raise ValueError(f"clevel is {self.clevel}, must be 0 to 9")
        if not 0 <= self.typesize <= 255:
            raise ValueError(f"typesize is {self.typesize} bytes, must be 0 to 255")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The codec that a zarr.json names."""
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        """What goes into the zarr.json."""
        configuration = {
            "cname": self.cname,
            "clevel": self.clevel,
            "shuffle": self.shuffle,
            "typesize": self.typesize,
        }
        return {"name": CODEC_NAME, "configuration": configuration}

    def evolve_from_array_spec(self, array_spec: "ArraySpec") -> Self:
        """Fill in the element size, without which shuffling does nothing."""
        if self.typesize:
            return self
        itemsize = array_spec.dtype.to_native_dtype().itemsize
        return replace(self, typesize=itemsize if itemsize <= 255 else 1)

    def compute_encoded_size(self, _input_byte_length: int, _chunk_spec: "ArraySpec") -> int:
        """Not known before compressing."""
        raise NotImplementedError

    async def _encode_single(
        self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec"
    ) -> "Buffer | None":
        return await asyncio.to_thread(self._encode_sync, chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer":
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer":
        raw = np.asarray(chunk_bytes.as_array_like()).view(np.uint8)
        return chunk_spec.prototype.buffer.from_bytes(self.compressed(raw))

    def _decode_sync(self, chunk_bytes: "Buffer", chunk_spec: "ArraySpec") -> "Buffer":
        packed = np.asarray(chunk_bytes.as_array_like())
        itemsize = chunk_spec.dtype.to_native_dtype().itemsize
        check_packed(packed, prod(chunk_spec.shape) * itemsize)
        raw = np.empty(prod(chunk_spec.shape) * itemsize, dtype=np.uint8)
        self.decompress(packed, raw)
        return chunk_spec.prototype.buffer.from_array_like(raw)

    def compressed(self, raw: Bytes) -> bytes:
        """A chunk's bytes, compressed.

        Raises
        ------
        ValueError
            If there are more than blosc2 takes.
        """
        if raw.nbytes > _MAX_CHUNK_BYTES:
            raise ValueError(
                f"a chunk has {raw.nbytes} bytes, blosc2 takes at most {_MAX_CHUNK_BYTES}: "
                "choose smaller chunks"
            )
        packed: bytes = blosc2.compress2(
            raw,
            codec=_COMPRESSORS[self.cname],
            clevel=self.clevel,
            typesize=self.typesize or 1,
            filters=[blosc2.Filter.NOFILTER] * 5 + [_SHUFFLES[self.shuffle]],
            nthreads=NUM_THREADS,
        )
        return packed

    def decompress(self, packed: Bytes, raw: Bytes) -> None:
        """Fill `raw` with what was compressed.

        Raises
        ------
        ValueError
            If that has another size, or `packed` isn't what `compressed` returned.
        """
        check_packed(packed, raw.nbytes)
        if raw.nbytes:
            blosc2.decompress2(packed, dst=raw, nthreads=NUM_THREADS)


def check_packed(packed: "Bytes | bytes | memoryview", num_bytes: int) -> None:
    """Refuse what isn't `num_bytes` bytes as blosc2 compresses them for us; looks at the header only.

    blosc2 takes a header's word: 32 bytes say that they are two gigabytes of zeros, and a chunk that
    was truncated is read past its end.

    Raises
    ------
    ValueError
    """
    view = memoryview(cast(bytes, packed))
    if view.nbytes < _HEADER.size:
        raise ValueError(f"{view.nbytes} bytes are too few for a blosc2 chunk")
    _, _, flags, typesize, raw, block, size, filters, _, setting, settings, *more = (
        _HEADER.unpack_from(view)
    )
    if size != view.nbytes:
        raise ValueError(f"a blosc2 chunk says it has {size} bytes and has {view.nbytes}")
    if raw != num_bytes:
        raise ValueError(f"it holds {raw} bytes, not {num_bytes}")
    known = (
        flags & _EXTENDED == _EXTENDED
        and flags >> _COMPRESSOR_SHIFT in _COMPRESSOR_FORMATS
        and _FILTERS.issuperset(filters)
        and not (setting or any(settings) or more[0])
        and more[1] in _SPECIAL
        and (more[1] != _ZEROS or size == _HEADER.size)
    )
    fits = typesize > 0 and (not raw or 0 < block <= raw)
    copied = not flags & _COPIED or not raw or size == raw + _HEADER.size
    if not (known and fits and copied):
        raise ValueError(f"its header is of no blosc2 chunk of ours: {view[: _HEADER.size].hex()}")


register_codec(CODEC_NAME, Blosc2Codec)
