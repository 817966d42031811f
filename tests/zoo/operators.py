"""Which operators captures use: what the list of allowed ones is made from."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dagflow.graph.capture import capture
from dagflow.graph.decoder import capture_decoder

from .case import Case
from .record import Record, short


def record_operators(case: Case, record: Record) -> None:
    """Note the operators of a case's graphs, for training and for serving."""
    used: set[str] = set()
    for what, captured in (("training", _training), ("serving", _serving)):
        if what == "serving" and not case.serves:
            continue
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                used |= captured(case)
        except Exception as error:
            record.note(
                **{what: "refused", f"{what}_cause": f"{type(error).__name__}: {short(error)}"}
            )
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


def counted(records: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Return of how many models' graphs each operator is part."""
    return Counter(op for record in records for op in record.get("operators", ()))
