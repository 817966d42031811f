"""Tries one model of the zoo: built, trained, served."""

from __future__ import annotations

import torch

from dagflow.graph.capture import capture

from .case import Case
from .record import Record, short


def warm_up() -> None:
    """Have torch import what capturing takes, once for all processes that are forked later."""
    from . import serving, training  # noqa: F401

    capture(torch.nn.Linear(2, 2), (torch.randn(3, 2), torch.randn(3, 2)), loss=_square)


def _square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def judge(case: Case, record: Record) -> None:
    """Fill a record."""
    from .serving import judge_serving
    from .training import judge_training

    torch.manual_seed(0)
    try:
        subject = case.make()
    except Exception as error:
        record.note(built=False, training="not run", cause=f"build: {short(error)}")
        return
    record.note(built=True)
    judge_training(case, subject, record)
    if case.serves and record["eager"]:
        torch.manual_seed(0)
        judge_serving(case.make().model, record)
