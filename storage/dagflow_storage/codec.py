"""blosc2 as a zarr v3 codec; zarr ships only its predecessor.

Importing this module registers the codec. Lossless: it belongs to the transport, and nobody
above the store notices it.
"""

import asyncio
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

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
_HEADER_BYTES = 32

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
        raw = np.empty(_checked_raw_size(packed), dtype=np.uint8)
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
        num_raw_bytes = _checked_raw_size(packed)
        if num_raw_bytes != raw.nbytes:
            raise ValueError(f"it holds {num_raw_bytes} bytes, not {raw.nbytes}")
        if num_raw_bytes:
            blosc2.decompress2(packed, dst=raw, nthreads=NUM_THREADS)


def _checked_raw_size(packed: Bytes) -> int:
    if packed.nbytes < _HEADER_BYTES:
        raise ValueError(f"{packed.nbytes} bytes are too few for a blosc2 chunk")
    num_raw_bytes, num_packed_bytes, _ = blosc2.get_cbuffer_sizes(packed)
    # blosc2 itself would read past the end of a truncated chunk's buffer.
    if num_packed_bytes != packed.nbytes:
        raise ValueError(
            f"a blosc2 chunk says it has {num_packed_bytes} bytes and has {packed.nbytes}"
        )
    return int(num_raw_bytes)


register_codec(CODEC_NAME, Blosc2Codec)
