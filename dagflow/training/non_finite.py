"""What is said when numbers have left the finite range: where, and what usually helps."""

from __future__ import annotations

from dagflow_tasks.train.references import action
from dagflow_tasks.train.results import StepReport

NUMBERS_LEFT_RANGE = (
    "The weights of the last snapshot are good. Lower the learning rate, clip gradients "
    "(clip_grad_norm=1.0), or look at that step's data; then train again with the same store."
)


def where_numbers_left_range(report: StepReport) -> str:
    """Return which stage and micro-batches a loss that isn't finite comes from."""
    where = "the loss itself"
    if report.non_finite:
        stage = min(report.non_finite)
        where = ", ".join(action("F", stage, report.step, m) for m in report.non_finite[stage])
    return (
        f"The loss of step {report.step} is {report.loss}; the numbers first left the finite range in "
        f"{where}. {NUMBERS_LEFT_RANGE}"
    )
