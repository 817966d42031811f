"""How far apart named tensors are: by their bits, and by how much."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def differing(found: Tensors, wanted: Tensors) -> list[str]:
    """Return the names whose bits differ, or that only one side has; NaN equals NaN."""
    names = set(found) ^ set(wanted)
    names |= {n for n in set(found) & set(wanted) if not _equal(found[n], wanted[n])}
    return sorted(names)


def worst(found: Tensors, wanted: Tensors) -> tuple[str, float]:
    """Return the name that is furthest off, and by how much, as a share of its norm.

    Of tensors that are much smaller than the largest one rounding is no small share; norms count as
    a thousandth of the largest at least. What only one side has counts as zeros on the other.
    """
    both = {**wanted, **found}
    if not both:
        return "", 0.0
    scale = max(_norm(tensor) for tensor in {**found, **wanted}.values())
    errors = {name: _error(found.get(name), wanted.get(name), scale) for name in both}
    name = max(errors, key=lambda n: errors[n])
    return name, errors[name]


def _error(a: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> float:
    if a is None or b is None:
        there = b if a is None else a
        assert there is not None
        return _norm(there) / max(_norm(there), 1e-3 * scale, 1e-30)
    if a.shape != b.shape:
        return float("inf")
    if _equal(a, b):
        return 0.0
    a, b = _plain(a), _plain(b)
    if bool((torch.isnan(a) != torch.isnan(b)).any()):
        return float("inf")
    return _norm(a - b) / max(_norm(b), 1e-3 * scale, 1e-30)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.to_dense() if t.is_sparse else t for t in (a, b))
    if a.dtype.itemsize == 1 and a.is_floating_point():
        a, b = a.float(), b.float()  # float8 has no operators of its own
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.double()


def _norm(tensor: torch.Tensor) -> float:
    return float(_plain(tensor).nan_to_num(posinf=0.0, neginf=0.0).norm())
