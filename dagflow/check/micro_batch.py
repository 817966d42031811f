"""Checks, before a run begins, that dagflow will compute what the model computes.

The captured graph is compared with the user's own module and loss, run eagerly, on the first batch and
on copies of the model, in fp32; the model is left as it was.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from dagflow.check.agreement import (
    NUM_NUDGES,
    TURN_OFF,
    awake,
    error_of,
    how_it_differs,
    no_bare_errors,
    parameters_of,
)
from dagflow.check.draws import Draw, RepeatDraws, has_draws
from dagflow.check.eager import Eager
from dagflow.check.locate import first_different_module
from dagflow.check.uncut import Outcome, Uncut
from dagflow.errors import BatchInvalid, ResultsDiffer
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.batch import flatten_batch, take_rows, without_columns
from dagflow.graph.capture import TRACING
from dagflow.graph.dag import OperatorDag, Symbol
from dagflow.graph.loss import LossFunction
from dagflow.graph.signature import match_batch
from dagflow_tasks.errors import TaskFailed
from dagflow_tasks.train.exchange import tensors_of

# Gradients are compared of all parameters, or of as many as take this much memory.
_GRADIENT_BYTES = 256 << 20
_MOST_NAMED = 4


@dataclass(frozen=True)
class CheckReport:
    """What the check before the first step has found.

    Attributes
    ----------
    seconds : float
    skipped : str
        Why the graph wasn't compared with the model; "" if it was.
    exact : bool
        Whether loss and gradients were the model's to the bit.
    num_gradients : int
        Parameters whose gradients were compared.
    one_row : bool
        Whether the graph is right for a single row, too.
    fixed : tuple of str
        Sizes that the graph is right for only as they were, as "'input_ids' dimension 1 = 128".
    microbatches : str
        Why the batch's loss wasn't compared with its micro-batches'; "" if it was.
    """

    seconds: float = 0.0
    skipped: str = ""
    exact: bool = False
    num_gradients: int = 0
    one_row: bool = False
    fixed: tuple[str, ...] = ()
    microbatches: str = ""


def check_capture(
    dag: OperatorDag,
    model: torch.nn.Module,
    batch: Any,
    loss: LossFunction | None = None,
    *,
    following: Any = None,
    memory_bytes: int | None = None,
) -> tuple[OperatorDag, CheckReport]:
    """Compare a captured graph with the model that it was captured from.

    Compared are loss, gradients and buffers after one micro-batch, and the loss of a second, which
    shows what the model remembers. Then other numbers of rows and other lengths: where the graph
    isn't right for them, the DAG that is returned refuses such batches.

    Parameters
    ----------
    dag
        What `capture(model, batch, loss=loss)` returned.
    batch, following
        Micro-batches; `batch` again by default.
    memory_bytes : int, optional
        What may be used; the check is skipped where that isn't enough.

    Raises
    ------
    ResultsDiffer
        Naming what differs, and by how much.
    """
    begin = time.perf_counter()
    reason = _reason_to_skip(dag, model, memory_bytes)
    if reason:
        return dag, CheckReport(skipped=reason)
    with TRACING, no_bare_errors():  # the model itself runs, and others may trace it
        return _Check(dag, model, batch, following, loss).run(begin)


Tensors = Mapping[str, torch.Tensor]
Script = list[tuple[Tensors, Collection[str] | None]]
"""Batches to run one after the other, each with the parameters whose gradients are wanted."""


@dataclass(frozen=True)
class _Difference:
    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        of = (
            ""
            if not self.name
            else f" of {self.name!r}"
            if self.kind == "gradient"
            else f" {self.name!r}"
        )
        return f"the {self.kind}{of} {self.text}"


class _Check:
    def __init__(
        self,
        dag: OperatorDag,
        model: torch.nn.Module,
        batch: Any,
        following: Any,
        loss: LossFunction | None,
    ) -> None:
        self.dag = dag
        batch = without_columns(batch, dag.dropped_columns)
        following = without_columns(following, dag.dropped_columns)
        self.tensors, self.constants = flatten_batch(batch)
        self.following = self.tensors if following is None else flatten_batch(following)[0]
        changed = awake(model)
        self.keep = _spread(dag)
        self.transient = {b.name for b in dag.buffers if not b.persistent}
        self.buffers = dict(model.named_buffers())
        self.parameters = parameters_of(model) | changed
        self.draws = has_draws(dag.nodes)
        self.eager = Eager(model, loss, batch, changed, self.draws)
        self.uncut = Uncut(dag, self.parameters, self.buffers)

    def run(self, begin: float) -> tuple[OperatorDag, CheckReport]:
        script: Script = [(self.tensors, self.keep), (self.following, None)]
        try:
            wanted = self._by_model(script)
        except Exception as error:
            self._refuse_if_nothing_runs(error)
            reason = f"the model doesn't run by itself here ({_short(error)})"
            return self.dag, CheckReport(time.perf_counter() - begin, reason)
        attributes, draws_in_python = self.eager.changed_attributes, self.eager.draws_in_python
        found = self._by_graph(script, wanted)
        exact = all(_equal(ours, theirs[0]) for ours, theirs in zip(found, wanted, strict=True))
        differences = self._differences(script, found, wanted)
        if differences:
            raise ResultsDiffer(self._message(differences, attributes, draws_in_python))
        if draws_in_python:
            self._try_other_numbers(script, found)
        fixed = self._fixed()
        one_row = self._holds_for_one_row()
        report = CheckReport(
            seconds=time.perf_counter() - begin,
            exact=exact,
            num_gradients=sum(kind == "gradient" for kind, _ in found[0]),
            one_row=one_row,
            fixed=tuple(f"{s.input[3:]!r} dimension {s.dim} = {s.hint}" for s in fixed),
        )
        return self._limited(fixed, one_row), report

    def _refuse_if_nothing_runs(self, error: Exception) -> None:
        """Refuse a batch on which model and graph fail alike, but for kernels that a worker may have.

        Raises
        ------
        BatchInvalid
        """
        text = str(error).lower()
        if isinstance(error, NotImplementedError) or "not implemented" in text or "memory" in text:
            return
        sizes = dict(match_batch(self.dag, self.tensors, self.constants, "the check"))
        try:
            self.uncut.run(tensors_of(self.tensors), sizes, None)
        except TaskFailed as failed:
            raise BatchInvalid(
                f"The model fails on the first batch without dagflow, too. {failed}. What to do: look at "
                "the batch's dtypes and values; see that one step of a plain loop over this data works."
            ) from error

    def _by_model(self, script: Script, **how: Any) -> list[tuple[Outcome, list[Draw]]]:
        return self.eager.outcomes([(list(t.values()), keep) for t, keep in script], **how)

    def _by_graph(
        self, script: Script, wanted: Sequence[tuple[Outcome, list[Draw]]]
    ) -> list[Outcome]:
        """Run the graph on the same batches with the same random numbers."""
        found = []
        for (tensors, keep), (_, draws) in zip(script, wanted, strict=True):
            sizes = dict(match_batch(self.dag, tensors, self.constants, "the check"))
            with RepeatDraws(draws) if self.draws else nullcontext():
                try:
                    found.append(self.uncut.run(tensors_of(tensors), sizes, keep))
                except Exception as error:  # an operator's, or autograd's
                    named = error if isinstance(error, TaskFailed) else _short(error)
                    raise ResultsDiffer(
                        f"The captured graph fails where the model doesn't: {named}. {TURN_OFF}"
                    ) from error
        return found

    def _differences(
        self,
        script: Script,
        found: Sequence[Outcome],
        wanted: Sequence[tuple[Outcome, list[Draw]]],
    ) -> list[tuple[int, _Difference]]:
        """Compare outcomes: tightly, and where that fails by what the model itself would change."""
        outcomes = [outcome for outcome, _ in wanted]
        if not self._compare(found, outcomes, None):
            return []
        noise: list[dict[tuple[str, str], float]] = [{} for _ in script]
        for nudge in range(NUM_NUDGES):
            others = self._by_model(script, nudge=nudge)
            for known, outcome, (other, _) in zip(noise, outcomes, others, strict=True):
                for key, tensor in outcome.items():
                    known[key] = max(known.get(key, 0.0), error_of(other.get(key), tensor))
        return self._compare(found, outcomes, noise)

    def _compare(
        self,
        found: Sequence[Outcome],
        wanted: Sequence[Outcome],
        noise: Sequence[Mapping[tuple[str, str], float]] | None,
    ) -> list[tuple[int, _Difference]]:
        differences = []
        for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            # Buffers and parameters that the forward leaves alone are what they were on both sides.
            untouched = {
                **{("buffer", name): tensor for name, tensor in self.buffers.items()},
                **{("parameter", name): tensor for name, tensor in self.parameters.items()},
            }
            ours = {**{key: t for key, t in untouched.items() if key in theirs}, **ours}
            for key in dict.fromkeys([*theirs, *ours]):
                if key[0] == "buffer" and (key[1] in self.transient or key[1] not in self.buffers):
                    continue  # shows in the second loss, if it matters
                allowed = noise[number].get(key, 0.0) if noise is not None else 0.0
                text = how_it_differs(ours.get(key), theirs.get(key), allowed)
                if text:
                    differences.append((number, _Difference(*key, text)))
        return differences

    def _message(
        self,
        differences: Sequence[tuple[int, _Difference]],
        attributes: Sequence[str],
        draws_in_python: bool,
    ) -> str:
        first = [difference for number, difference in differences if not number]
        shown = first or [difference for _, difference in differences]
        # From the loss backwards: the nearest is the likeliest to be at fault.
        shown = sorted(shown, key=lambda d: d.kind != "loss") if first else shown
        shown = shown[:1] + shown[:0:-1] if shown[0].kind == "loss" else shown[::-1]
        listed = "; ".join(map(str, shown[:_MOST_NAMED]))
        if first and shown[0].kind == "loss":
            module = self._first_module()
            listed = f"{f'from module {module!r} on: ' if module else ''}{listed}"
        more = f"; and {len(shown) - _MOST_NAMED} more" if len(shown) > _MOST_NAMED else ""
        where = "On the first micro-batch" if first else "On the second micro-batch in turn"
        rows = next(t.shape[0] for t in self.tensors.values() if t.dim())
        return (
            "The captured graph doesn't compute what the model computes by itself. "
            f"{where} ({rows} rows) {listed}{more}. "
            f"What to do: {_advice(shown, bool(first), attributes, draws_in_python)} {TURN_OFF}"
        )

    def _first_module(self) -> str | None:
        """Return the module at which the graph leaves the model, if that can be told."""
        results, draws = self.eager.watched(list(self.tensors.values()))
        self.uncut.begin()
        sizes = dict(match_batch(self.dag, self.tensors, self.constants, "the check"))
        with RepeatDraws(draws) if self.draws else nullcontext():
            values = self.uncut.values(tensors_of(self.tensors), sizes)
        return first_different_module(self.dag, values, results)

    def _try_other_numbers(self, script: Script, found: Sequence[Outcome]) -> None:
        """See whether what the model draws from Python's generators matters."""
        losses = [_only_loss(outcome) for outcome in found]
        for seed in range(1, 3):
            ran = self._by_model(script, python_seed=seed)
            others = [_only_loss(outcome) for outcome, _ in ran]
            if self._compare(losses, others, None):
                raise ResultsDiffer(
                    "The model's forward draws from Python's random or NumPy, and its loss depends on "
                    "it; a graph would hold one number for ever. What to do: draw with torch "
                    f"(torch.rand(1) < p as a mask). {TURN_OFF}"
                )

    # Other sizes

    def _fixed(self) -> list[Symbol]:
        """Return the sizes that the graph is right for only as they are, as far as the model says."""
        groups = _same_sizes(self.dag, self.tensors)
        if len(groups) > 1 and self._holds_for_others(self.dag.symbols):
            return []
        return [
            s for symbols in groups if self._holds_for_others(symbols) is False for s in symbols
        ]

    def _holds_for_others(self, symbols: Sequence[Symbol]) -> bool | None:
        for tensors in _resized(self.dag, symbols, self.tensors):
            agrees = self._agrees(tensors, None)
            if agrees is not None:
                return agrees
        return None

    def _holds_for_one_row(self) -> bool:
        if not any(symbol.dim == 0 for symbol in self.dag.symbols):
            return all(spec.shape[0] == 1 for spec in self.dag.inputs if spec.shape)
        dag = self.dag
        self.dag = replace(dag, symbols=tuple(_for_one_row(symbol) for symbol in dag.symbols))
        try:
            num_rows = max(t.shape[0] for t in self.tensors.values() if t.dim())
            for row in range(min(num_rows, 4)):
                agrees = self._agrees(take_rows(self.tensors, row, row + 1), self.keep)
                if agrees is not None:
                    return agrees
            return False
        finally:
            self.dag = dag

    def _agrees(self, tensors: Tensors, keep: Collection[str] | None) -> bool | None:
        """Compare on another batch; None if nothing can be said: the model doesn't take it."""
        script: Script = [(tensors, keep)]
        self.uncut.begin()
        try:
            match_batch(self.dag, tensors, self.constants, "the check")
            wanted = self._by_model(script)
        except Exception:
            return None
        if not bool(torch.isfinite(wanted[0][0]["loss", ""])):
            return None
        try:
            found = self._by_graph(script, wanted)
        except ResultsDiffer:
            return False
        if keep is None:
            found = [_only_loss(outcome) for outcome in found]
            wanted = [(_only_loss(outcome), draws) for outcome, draws in wanted]
        return not self._differences(script, found, wanted)

    def _limited(self, fixed: Sequence[Symbol], one_row: bool) -> OperatorDag:
        """Return the DAG with the sizes that it is right for."""
        symbols = []
        for symbol in self.dag.symbols:
            if symbol in fixed:
                symbol = replace(symbol, minimum=symbol.hint, maximum=symbol.hint)
            elif one_row:
                symbol = _for_one_row(symbol)
            symbols.append(symbol)
        return replace(self.dag, symbols=tuple(symbols))


def _for_one_row(symbol: Symbol) -> Symbol:
    # torch takes sizes of 1 for another case and so leaves them out; that is all a minimum of 2 says.
    return replace(symbol, minimum=1) if symbol.dim == 0 and symbol.minimum == 2 else symbol


def _same_sizes(dag: OperatorDag, tensors: Mapping[str, torch.Tensor]) -> list[list[Symbol]]:
    """Group the sizes that vary together: all rows, and equal lengths in the same dimension."""
    groups: dict[tuple[int, int], list[Symbol]] = {}
    for symbol in dag.symbols:
        size = tensors[symbol.input.removeprefix("in.")].shape[symbol.dim]
        groups.setdefault((symbol.dim, size if symbol.dim else 0), []).append(symbol)
    return list(groups.values())


def _resized(
    dag: OperatorDag, symbols: Sequence[Symbol], tensors: Mapping[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches with other sizes: half of them, from either end, or one less."""
    by_name = {symbol.name: symbol for symbol in symbols}
    for smaller, from_end in ((_half, True), (_half, False), (_one_less, True)):
        resized = dict(tensors)
        for spec in dag.inputs:
            name = spec.name.removeprefix("in.")
            for dim, known in enumerate(spec.shape):
                symbol = by_name.get(known) if isinstance(known, str) else None
                if symbol is not None:
                    size = resized[name].shape[dim]
                    wanted = max(smaller(size), min(size, symbol.minimum))
                    begin = size - wanted if from_end else 0
                    resized[name] = resized[name].narrow(dim, begin, wanted).contiguous()
        if any(resized[name].shape != tensor.shape for name, tensor in tensors.items()):
            yield resized


def _half(size: int) -> int:
    return size // 2


def _one_less(size: int) -> int:
    return size - 1


def _reason_to_skip(dag: OperatorDag, model: torch.nn.Module, memory_bytes: int | None) -> str:
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return "the model has no weights here (meta device)"
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "the model isn't on the CPU"
    # A copy of the model, gradients, and what two backwards keep of their forwards.
    needed = dag.parameter_bytes + 2 * min(dag.parameter_bytes, _GRADIENT_BYTES)
    needed += 2 * sum(DagAnalysis(dag).saved_bytes)
    if memory_bytes is not None and needed > memory_bytes:
        return (
            f"it would take {needed / 1e9:.1f} GB of memory, and {memory_bytes / 1e9:.1f} are free"
        )
    return ""


def _spread(dag: OperatorDag) -> set[str]:
    """Choose parameters whose gradients are compared: the small ones, and others spread evenly."""
    trainable = [p for p in dag.parameters if p.trainable and p.uses]
    sizes = {p.name: dag.tensor_bytes(p.dtype, p.shape) for p in trainable}
    if sum(sizes.values()) <= _GRADIENT_BYTES:
        return set(sizes)
    chosen, left = {trainable[0].name, trainable[-1].name}, _GRADIENT_BYTES
    by_size = sorted(trainable, key=lambda p: sizes[p.name])
    spread = sorted(range(len(trainable)), key=lambda i: int(f"{i:016b}"[::-1], 2))
    for candidate in [*by_size[: len(by_size) // 2], *(trainable[i] for i in spread)]:
        if candidate.name not in chosen and sizes[candidate.name] <= left:
            chosen.add(candidate.name)
            left -= sizes[candidate.name]
    return chosen


def _only_loss(outcome: Outcome) -> Outcome:
    return {("loss", ""): outcome["loss", ""]}


def _equal(ours: Outcome, theirs: Outcome) -> bool:
    return all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items() if key in theirs)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _advice(
    differences: Sequence[_Difference],
    in_first: bool,
    attributes: Sequence[str],
    draws_in_python: bool,
) -> str:
    if draws_in_python:
        return (
            "forward draws from Python's random or NumPy, which a graph holds as one number; draw "
            "with torch."
        )
    if not in_first:
        named = f" ({', '.join(map(repr, attributes[:_MOST_NAMED]))})" if attributes else ""
        return (
            f"forward changes something that only Python knows{named}, and computes with it the next "
            "time; keep it in a buffer and change that in place."
        )
    kinds = {difference.kind for difference in differences}
    if any(d.text == "is missing" for d in differences):
        return (
            "something cuts the gradient that way: no_grad, detach, a reentrant checkpoint (take "
            "use_reentrant=False), or an autograd.Function."
        )
    if kinds <= {"buffer", "parameter"}:
        return "change buffers in place (self.x.copy_(...)), and parameters not in forward."
    return (
        "look at that module's forward for what isn't a torch operator on the batch: numbers taken "
        "out of tensors, hooks, an autograd.Function with a backward of its own, modules that change "
        "what autocast does."
    )
