"""A tensor that was packed lies in memory as before: strides, gaps, alignment, flags."""

from __future__ import annotations

import pytest
import torch

from dagflow_storage import ALIGNMENT_BYTES
from dagflow_tasks.layout import copied, moved, odd_strides, pack, unpack, with_strides

BASE = torch.arange(2.0 * 6 * 8 * 5).reshape(2, 6, 8, 5)
COMPLEX = torch.randn(4, 6, dtype=torch.complex64)
ODD = {
    "transposed": BASE.transpose(1, 3),
    "channels last": BASE.contiguous(memory_format=torch.channels_last),
    "one channel, channels last": BASE[:, :1].contiguous(memory_format=torch.channels_last),
    "a dimension of size one": torch.empty_strided((1, 4, 3), (7, 3, 1)).copy_(BASE[:1, :4, 0, :3]),
    "slice": BASE[..., 1:3],
    "every second row": BASE[:, ::2].transpose(0, 1),
    "expanded": BASE[:, :1, :1].expand(-1, 6, 8, -1),
    "number, expanded": torch.tensor(3.0).expand(5, 7),
    "expanded within a slice": BASE[:, None, 1:3, 2:3].expand(-1, 4, -1, -1, -1),
    "windows": BASE.flatten().unfold(0, 9, 2),
    "unaligned": BASE.flatten()[3:],
    "unaligned and transposed": BASE[1, 1].T[1:],
    "unaligned and expanded": BASE[1, 3, 3, 3].expand(4),
    "conjugate": COMPLEX.conj(),
    "conjugate, transposed": COMPLEX.mH[1:],
    "imaginary part of a conjugate": COMPLEX.conj().imag,
    "float8": BASE.to(torch.float8_e5m2).transpose(0, 1)[1:],
    "bool": (BASE > 3).mT,
}
PLAIN = {"matrix": BASE[0, 0], "number": BASE[0, 0, 0, 0], "empty": BASE[:, :0].mT}


def assert_lies_as(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.stride() == wanted.stride()
    assert found.data_ptr() % ALIGNMENT_BYTES == wanted.data_ptr() % ALIGNMENT_BYTES
    assert (found.is_conj(), found.is_neg()) == (wanted.is_conj(), wanted.is_neg())
    assert found.dtype == wanted.dtype
    if wanted.dtype == torch.float8_e5m2:
        found, wanted = found.float(), wanted.float()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ODD)
def test_what_is_unpacked_lies_as_before(name: str) -> None:
    tensor = ODD[name]
    packed, layout = pack(tensor)
    assert layout is not None
    assert packed.is_contiguous()
    assert packed.numel() <= tensor.numel()
    assert_lies_as(unpack(packed.clone(), layout), tensor)


@pytest.mark.parametrize("name", ODD | PLAIN)
def test_a_copy_lies_as_the_tensor_and_has_memory_of_its_own(name: str) -> None:
    tensor = (ODD | PLAIN)[name]
    copy = copied(tensor)
    if tensor.numel():
        assert_lies_as(copy, tensor)
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_contiguous_needs_no_layout(name: str) -> None:
    packed, layout = pack(PLAIN[name])
    assert layout is None
    assert torch.equal(packed, PLAIN[name])
    assert unpack(packed, None) is packed


def test_nothing_is_copied_that_lies_densely() -> None:
    for name in ("transposed", "channels last", "conjugate"):
        packed, layout = pack(ODD[name])
        assert packed.data_ptr() == ODD[name].data_ptr()
        assert unpack(packed, layout).data_ptr() == ODD[name].data_ptr()
    assert moved(BASE, torch.device("cpu")) is BASE


def test_what_is_expanded_is_packed_once() -> None:
    assert pack(ODD["expanded"])[0].numel() == 10
    assert pack(ODD["number, expanded"])[0].numel() == 1


def test_strides_are_given_back_to_what_the_store_holds_without() -> None:
    for tensor in ODD.values():
        if not (tensor.is_conj() or tensor.is_neg() or tensor.dtype == torch.float8_e5m2):
            found = with_strides(tensor.contiguous(), odd_strides(tensor))
            assert found.stride() == tensor.stride()
            assert torch.equal(found, tensor)
    assert with_strides(BASE, odd_strides(BASE)) is BASE
