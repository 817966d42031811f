"""Does a model train right? Captured, at two shapes, uncut against eager and cut against uncut."""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from inline import InlineRun
from torch.nn.parameter import UninitializedParameter

from dagflow.errors import DagflowError, PlanInvalid
from dagflow.graph.batch import call_model, flatten_batch, split_target
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.graph.signature import match_batch
from dagflow.plan.partition import partition, partition_by_operator
from dagflow_tasks.program import interpreter
from dagflow_tasks.program.operators import draws_random_numbers
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.gradient_sums import total_gradients
from dagflow_tasks.train.optimizer import Optimizer

from .case import IDIOMS, Case, Subject, scalar_of
from .differences import differing, worst
from .microbatches import judge_microbatches
from .record import Record, short

_LEARNING_RATE = 1e-3
# For those that leave finite numbers at the other, eagerly as well: there is nothing to compare.
_CAREFUL_RATE = 1e-7
# Relative. Kernels differ between tracing and running, and round differently; nothing else does.
ROUNDING, LATER_ROUNDING = 1e-4, 2e-3


@dataclass
class Trace:
    """What some steps of training leave behind; gradients by parameter (eager, uncut) or use."""

    losses: list[torch.Tensor] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def judge_training(case: Case, subject: Subject, record: Record) -> None:
    """Fill a record's columns of training."""
    torch.manual_seed(1)
    batches = [subject.batch(*case.shapes[0]), subject.batch(*case.shapes[1])]
    try:
        wanted = eager(case, subject, [batches[0]] * 3)
        if not all(tensor.isfinite().all() for tensor in wanted.state.values()):
            record.note(learning_rate=_CAREFUL_RATE)
            wanted = eager(case, subject, [batches[0]], _CAREFUL_RATE)
    except Exception as error:
        record.note(eager=False, training="not run", cause=f"eager: {short(error)}")
        return
    if not all(torch.isfinite(loss) for loss in wanted.losses):
        record.note(cause="eager: the loss isn't finite")
    record.note(eager=True)
    dag = _capture(subject, batches[0], record)
    if dag is None:
        return
    dag = _checked(case, subject, dag, batches[0], record)
    batches = [batches[0], _second(case, subject, dag, batches[1], record), batches[0]]
    if record.get("check") != "refuses":
        judge_microbatches(_same_again(case, subject), dag, batches[1], record)
    _compare_with_eager(case, subject, dag, batches, record)
    if record.get("uncut") not in (None, "crash"):
        _compare_cuts(case, subject, dag, batches, record)
    record.conclude_training()


def _rate(record: Record) -> float:
    return float(record.get("learning_rate", _LEARNING_RATE))


def eager(
    case: Case, subject: Subject, batches: Sequence[Any], rate: float = _LEARNING_RATE
) -> Trace:
    """Train a copy of the model with torch alone."""
    subject = _same_again(case, subject)
    trainable = [p for p in subject.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=rate)
    trace = Trace()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        seed(step)
        loss = _eager_loss(subject, batch)
        loss.backward()
        named = subject.model.named_parameters()
        trace.losses.append(loss.detach().clone())
        trace.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        optimizer.step()
    trace.state = state_of(subject.model)
    return trace


def _same_again(case: Case, subject: Subject) -> Subject:
    """Return the same model with the same weights, with its hooks if it is an idiom."""
    if case.group != IDIOMS:
        return copy.deepcopy(subject)  # some leave what is in memory in their weights
    torch.manual_seed(0)
    return case.make()


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def _eager_loss(subject: Subject, batch: Any) -> torch.Tensor:
    batch = copy.deepcopy(batch)  # models may write into their inputs
    if subject.loss is None:
        return scalar_of(call_model(subject.model, batch))
    inputs, target = split_target(batch)
    return scalar_of(subject.loss(call_model(subject.model, inputs), target))


def seed(step: int) -> None:
    """Seed all that models draw from, so that eager and captured ones draw the same."""
    torch.manual_seed(100 + step)
    random.seed(100 + step)
    np.random.seed(100 + step)


def _capture(subject: Subject, batch: Any, record: Record) -> OperatorDag | None:
    before = _portrait(subject.model)
    seed(50)
    began = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            dag = capture(subject.model, copy.deepcopy(batch), loss=subject.loss)
            partition(dag, 1)
    except Exception as error:
        seconds = time.process_time() - began
        record.note(captured=False, capture_seconds=round(seconds, 2))
        record.failed("training", error)
        return None
    ours = [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    record.note(captured=True, capture_seconds=round(time.process_time() - began, 2))
    record.note(operators=len(dag.nodes), warned=short(ours[0]) if ours else "")
    changed = _changed(subject.model, before)
    if changed:
        record.note(left_as_it_was=False, cause=f"capture changed the model: {changed}")
    return dag


def _checked(
    case: Case, subject: Subject, dag: OperatorDag, batch: Any, record: Record
) -> OperatorDag:
    """Run the check that a run begins with; return the DAG with the sizes for which it is right.

    What it refuses is tried all the same, to know whether it was right to.
    """
    try:
        from dagflow.check.micro_batch import check_capture
    except ImportError:
        return dag
    subject = _same_again(case, subject)
    try:
        dag, report = check_capture(dag, subject.model, copy.deepcopy(batch), subject.loss)
    except DagflowError as error:
        record.note(check="refuses", check_cause=f"{type(error).__name__}: {short(error)}")
    except Exception as error:
        record.note(check="crash", check_cause=short(error))
    else:
        record.note(check=f"skipped: {report.skipped}" if report.skipped else "passes")
    return dag


def _second(case: Case, subject: Subject, dag: OperatorDag, batch: Any, record: Record) -> Any:
    """Return a batch of another shape if the captured signature takes one, else of the first."""
    first, second = case.shapes
    tried = [
        (second, "yes"),
        ((second[0], *first[1:]), "rows only"),
        ((first[0], *second[1:]), "length only"),
    ]
    for shape, answer in tried:
        torch.manual_seed(2)
        try:
            batch = subject.batch(*shape)
            match_batch(dag, *flatten_batch(batch), where="a second shape")
        except DagflowError as error:
            record.note(second_shape="no", second_cause=short(error))
            continue
        except Exception as error:  # the batch itself doesn't exist in this shape
            record.note(second_shape="no", second_cause=f"batch: {short(error)}")
            continue
        record.note(second_shape=answer)
        return batch
    torch.manual_seed(2)
    return subject.batch(*first)


def _compare_with_eager(
    case: Case, subject: Subject, dag: OperatorDag, batches: Sequence[Any], record: Record
) -> None:
    try:
        wanted = eager(case, subject, batches, _rate(record))
    except Exception as error:
        if record.get("left_as_it_was") is False:
            record.note(training="wrong", cause=f"{record['cause']}, and it fails: {short(error)}")
        else:
            record.note(uncut=None, cause=f"eager at another shape: {short(error)}")
        return
    try:
        with _drawing_like_torch(dag):
            found = _trained(case, subject, dag, 1, batches, _rate(record))
    except Exception as error:
        record.note(uncut="crash")
        record.failed("training", error)
        return
    record.note(uncut=_difference(found, wanted, record))


def _difference(found: Trace, wanted: Trace, record: Record) -> str:
    """Return "bits", "rounding" or the first difference that is more."""
    exact = True
    for step in range(len(wanted.losses)):
        limit = ROUNDING if step == 0 else LATER_ROUNDING
        pair = {"the loss": found.losses[step]}, {"the loss": wanted.losses[step]}
        for what, a, b in (
            ("", *pair),
            ("gradient of ", found.gradients[step], wanted.gradients[step]),
        ):
            name, amount = worst(a, b)
            exact = exact and amount == 0.0
            if amount > limit:
                record.note(
                    difference=amount, cause=f"step {step + 1}: {what}{name} is off by {amount:.1e}"
                )
                return f"off by {amount:.0e}"
    name, amount = worst({n: found.state[n] for n in wanted.state}, wanted.state)
    if amount > LATER_ROUNDING:
        record.note(
            difference=amount,
            cause=f"after {len(wanted.losses)} steps {name} is off by {amount:.1e}",
        )
        return f"off by {amount:.0e}"
    return "bits" if exact else "rounding"


def _compare_cuts(
    case: Case, subject: Subject, dag: OperatorDag, batches: Sequence[Any], record: Record
) -> None:
    try:
        whole = _trained(case, subject, dag, 1, batches, _rate(record), by_use=True)
    except Exception as error:
        record.note(cut="crash")
        record.failed("training", error)
        return
    done = []
    for cut in case.cuts:
        try:
            found = _trained(case, subject, dag, cut, batches, _rate(record), by_use=True)
        except PlanInvalid as error:
            if not done:
                record.note(cut="not cut", cut_cause=short(error))
            continue
        except Exception as error:
            record.note(cut="crash")
            record.failed("training", error)
            return
        done.append(cut)
        if not _same_bits(cut, found, whole, record):
            return
    if done:
        record.note(cut="bits")


def _same_bits(cut: int | None, found: Trace, whole: Trace, record: Record) -> bool:
    where = f"{cut} stages" if cut else "one operator a stage"
    for step in range(len(whole.losses)):
        pair = {"the loss": found.losses[step]}, {"the loss": whole.losses[step]}
        for what, a, b in (
            ("", *pair),
            ("gradient of ", found.gradients[step], whole.gradients[step]),
        ):
            names = differing(a, b)
            if names:
                name, amount = worst(a, b)
                record.note(
                    cut=f"off by {amount:.0e}",
                    cut_cause=f"{where}, step {step + 1}: {len(names)} differ, {what}{name} most",
                    cut_difference=amount,
                )
                return False
    names = differing(found.state, whole.state)
    if names:
        name, amount = worst(found.state, whole.state)
        record.note(
            cut=f"off by {amount:.0e}",
            cut_difference=amount,
            cut_cause=f"{where}: weights or buffers {names[:3]}",
        )
    return not names


def _trained(
    case: Case,
    subject: Subject,
    dag: OperatorDag,
    cut: int | None,
    batches: Sequence[Any],
    rate: float,
    by_use: bool = False,
) -> Trace:
    """Train through dagflow's tasks, as a cluster would."""
    CACHE.clear()
    subject = _same_again(case, subject)
    stages = partition_by_operator(dag) if cut is None else partition(dag, cut)
    if cut != 1 and len(stages) == 1:
        raise PlanInvalid("The model is one stage whatever is asked.")
    optimizer = Optimizer("SGD", lr=rate)
    run = InlineRun(subject, dag, stages, num_microbatches=1, optimizer=optimizer)
    trace = Trace()
    for step, batch in enumerate(batches):
        seed(step)
        run.step(step, [copy.deepcopy(batch)])
        trace.losses.append(torch.tensor(run.losses[-1]))
        gradients = run.gradients(step, 1)
        if not by_use:
            uses = [use for program in stages.programs for use in program.parameters]
            gradients = total_gradients(uses, [gradients])
        trace.gradients.append({name: g.clone() for name, g in gradients.items()})
    # What no stage holds stays as it is.
    trace.state = state_of(subject.model) | run.weights(len(batches))
    return trace


@contextmanager
def _drawing_like_torch(dag: OperatorDag) -> Iterator[None]:
    """Draw from torch's generator as it stands, in the order of the operators, as eager models do."""
    with ExitStack() as stack:
        if any(draws_random_numbers(node.op) for node in dag.nodes):
            for name in ("_seeded", "_restored_generator"):
                stack.enter_context(patch.object(interpreter, name, _Nothing))
        yield


class _Nothing:
    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_PLAIN = (bool, int, float, str, type(None))


def _portrait(model: torch.nn.Module) -> dict[str, Any]:
    """Return what can be compared of a model's attributes: plain values, tensors, other types."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = {**vars(module), **module._parameters, **module._buffers}
        for name, value in own.items():
            if isinstance(value, UninitializedParameter):
                found[f"{path}.{name}"] = type(value)
            elif isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = value.detach().clone()
            elif isinstance(value, _PLAIN):
                found[f"{path}.{name}"] = value
            else:
                found[f"{path}.{name}"] = type(value)
    return found


def _changed(model: torch.nn.Module, before: Mapping[str, Any]) -> str:
    """Name what tracing has left in a model, or changed of its tensors.

    Other plain values may change: transformers' models switch their own settings by the length of
    what they see, eagerly as well. Where such a value matters the numbers show it.
    """
    for name, value in _portrait(model).items():
        kind = value if isinstance(value, type) else type(value)
        if kind.__name__ in ("FakeTensor", "FunctionalTensor", "SymInt", "SymFloat", "SymBool"):
            return f"{name} is a {kind.__name__}"
        known = before.get(name)
        tensors = isinstance(value, torch.Tensor) and isinstance(known, torch.Tensor)
        if tensors and differing({"": known}, {"": value}):
            return name
    return ""
