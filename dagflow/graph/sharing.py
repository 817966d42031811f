"""Tensors of a model that lie in the same memory, though they aren't the same tensor.

In torch an update of one is an update of the other. Stages hold parameters, buffers and constants
apart, on several machines: there the other would keep its old values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from dagflow.errors import CaptureFailed


@dataclass(frozen=True)
class _Held:
    """A tensor of the model: what it is, and the bytes of memory from its first to its last."""

    kind: str
    name: str
    tensor: torch.Tensor
    changes: bool
    memory: str
    begin: int
    end: int

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r}" if self.name else f"a {self.kind}"


def check_sharing(
    model: torch.nn.Module, written: Collection[str], constants: Mapping[str, torch.Tensor]
) -> None:
    """Refuse that what training changes shares its memory with another tensor of the graph.

    One tensor under several names (tied weights) is no such case.

    Parameters
    ----------
    written
        Names of the parameters and buffers that forward writes.
    constants
        The tensors that the graph uses and that are neither, by the names they have in the model,
        or "".

    Raises
    ------
    CaptureFailed
    """
    held = sorted(_all(model, written, constants), key=lambda item: (item.memory, item.begin))
    open_: list[_Held] = []
    for item in held:
        open_ = [o for o in open_ if o.memory == item.memory and o.end > item.begin]
        for other in open_:
            if (item.changes or other.changes) and _overlap(item, other):
                first, second = (other, item) if other.changes else (item, other)
                itself = _is_itself(first, second)
                raise CaptureFailed(
                    f"Training changes {first}, and {second} is another tensor that lies in the same "
                    f"memory{itself}, so that in torch it changes too. Stages hold each apart, and one of "
                    "them would keep its first values. What to do: use the same Parameter object "
                    "(self.b.weight = self.a.weight ties them; one that forward uses is read as an "
                    "attribute of its module, not from a closure, list or other object), or "
                    "clone() it."
                )
        open_.append(item)


def _is_itself(first: _Held, second: _Held) -> str:
    """Say that a tensor without a name may be a parameter that forward has from elsewhere."""
    one, other = first.tensor, second.tensor
    same = (one.shape, one.stride(), first.begin) == (other.shape, other.stride(), second.begin)
    return (
        " (or the same, from a closure, list, dict or partial)" if same and not second.name else ""
    )


def _all(
    model: torch.nn.Module, written: Collection[str], constants: Mapping[str, torch.Tensor]
) -> Iterator[_Held]:
    for name, parameter in model.named_parameters():
        changes = parameter.requires_grad or name in written
        yield from _held("parameter", name, parameter, changes)
    for name, buffer in model.named_buffers():
        yield from _held("buffer", name, buffer, name in written)
    for name, constant in constants.items():
        known = "" if name.startswith("lifted_tensor") else name  # which is torch.export's own
        yield from _held("tensor that is neither parameter nor buffer", known, constant, False)


def _held(kind: str, name: str, tensor: torch.Tensor, changes: bool) -> Iterator[_Held]:
    if tensor.layout != torch.strided or not tensor.numel():
        return
    length = 1 + sum(int((n - 1) * s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    if tensor.is_meta:  # which has no addresses
        memory = f"meta {tensor.untyped_storage()._cdata}"
        begin = int(tensor.storage_offset()) * size
    else:
        memory, begin = str(tensor.device), tensor.data_ptr()
    yield _Held(kind, name, tensor, changes, memory, begin, begin + length * size)


def _overlap(one: _Held, other: _Held) -> bool:
    """Tell whether two tensors have a byte in common: columns of one matrix may interleave."""
    begin, end = min(one.begin, other.begin), max(one.end, other.end)
    taken = torch.zeros(end - begin, dtype=torch.bool, device="cpu")
    _bytes(taken, one, begin).fill_(True)
    return bool(_bytes(taken, other, begin).any())


def _bytes(memory: torch.Tensor, held: _Held, begin: int) -> torch.Tensor:
    size = held.tensor.element_size()
    shape = [*held.tensor.shape, size]
    strides = [*(stride * size for stride in held.tensor.stride()), 1]
    return memory.as_strided(shape, strides, held.begin - begin)
