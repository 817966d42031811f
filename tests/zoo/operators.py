"""Which operators captures use: what the list of allowed ones is kept up to date with."""

from __future__ import annotations

import copy
import re
import textwrap
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dagflow.graph.capture import capture
from dagflow.graph.decoder import capture_decoder
from dagflow_tasks.program import operators
from dagflow_tasks.program.allow_list import FUNCTIONAL, allowed, name_in_programs, unlike

from .case import Case
from .record import Record, short


def record_operators(case: Case, record: Record) -> None:
    """Note the operators of a case's graphs, for training and for serving, whatever is allowed."""
    used: set[str] = set()
    for what, captured in (("training", _training), ("serving", _serving)):
        if what == "serving" and not case.serves:
            continue
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings(), _all_allowed():
                warnings.simplefilter("ignore")
                used |= captured(case)
        except Exception as error:
            cause = f"{type(error).__name__}: {short(error)}"
            record.note(**{what: "refused", f"{what}_cause": cause})
        else:
            record.note(**{what: "captured"})
        record.note(operators=sorted(used))


def _training(case: Case) -> set[str]:
    subject = case.make()
    batch = subject.batch(*case.shapes[0])
    dag = capture(subject.model, copy.deepcopy(batch), loss=subject.loss)
    return {node.op for node in dag.nodes}


def _serving(case: Case) -> set[str]:
    dag = capture_decoder(case.make().model.eval())
    return {node.op for node in dag.nodes}


class _Everything(dict[str, str]):
    def get(self, op: str, default: Any = None) -> Any:
        return super().get(op, FUNCTIONAL)

    def __missing__(self, op: str) -> str:
        return FUNCTIONAL


@contextmanager
def _all_allowed() -> Iterator[None]:
    everything = _Everything(allowed())
    operators.resolve.cache_clear()
    with (
        patch.object(operators, "allowed", lambda: everything),
        patch.object(operators, "unlike", lambda *_: ""),
    ):
        yield
    operators.resolve.cache_clear()


def update(file: Path, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Add to a list what the records' models use and is plainly functional; return what isn't.

    What is in the list and nobody used stays: users' models aren't the zoo's.
    """
    text = file.read_text("utf-8")
    body = tomllib.loads(text)
    listed = {name_in_programs(n) for n in body[FUNCTIONAL]["operators"]}
    known = listed | {name_in_programs(n) for section in body.values() for n in section}
    used = Counter(op for record in records for op in record.get("operators", ()))
    new, left = set(), []
    for op, count in sorted(used.items()):
        if op in known or op in operators.own_operators():
            continue
        packet, overload = op.split(".")[1:]
        why = unlike(FUNCTIONAL, getattr(getattr(torch.ops.aten, packet), overload))
        if why:
            left.append(f"{op}, of {count} models, needs a section and a reason: {why}")
        else:
            new.add(op)
    names = sorted(op.removeprefix("aten.").removesuffix(".default") for op in listed | new)
    block = textwrap.wrap(" ".join(f'"{name}",' for name in names), 96)
    rows = "\n".join(f"    {row}" for row in block)
    file.write_text(re.sub(r"operators = \[.*?\n\]", f"operators = [\n{rows}\n]", text, flags=re.S))
    return left
