"""Checks, before a run begins, that dagflow will compute what the model computes.

The captured graph is compared with the user's own module and loss, run eagerly; and the batch's loss
with its micro-batches' losses, as the run will add them up. Both on the first batch, on copies of the
model, in fp32, without leaving a trace on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from dagflow.errors import BatchInvalid, ResultsDiffer
from dagflow.graph.batch import flatten_batch, take_rows, without_columns
from dagflow.graph.dag import OperatorDag, Symbol
from dagflow.graph.loss import LossFunction
from dagflow.graph.signature import match_batch
from dagflow.plan.analysis import DagAnalysis
from dagflow.plan.draws import Draw, ExpectedDraws, RepeatDraws, has_draws
from dagflow.plan.eager import Eager, nudged
from dagflow.plan.locate import first_different_module
from dagflow.plan.uncut import Outcome, Sizes, Uncut
from dagflow_tasks.errors import TaskFailed
from dagflow_tasks.tasks import tensors_of

# Other kernels or another order of sums differ by some units in the last place of each operator.
_ROUNDING = 1e-5
# Where that isn't enough: so many times what the model's own results change when its parameters
# change by a unit in the last place. Gradients that are zero but for rounding change by all of it.
_TIMES_OWN_NOISE = 16
_NUM_NUDGES = 2
# Gradients are compared of all parameters, or of as many as take this much memory.
_GRADIENT_BYTES = 256 << 20
# Parameters that are all alike (zeros, ones) are changed by up to this: behind a layer of zeros
# nothing could be seen.
_WAKE = 0.02
_MOST_NAMED = 4
_TURN_OFF = "Config(check=False) trains without this check."


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
    return _Check(dag, model, batch, following, loss).run(begin)


def check_microbatches(
    dag: OperatorDag,
    model: torch.nn.Module,
    batch: Any,
    parts: Sequence[tuple[Mapping[str, torch.Tensor], Sizes]],
    weights: Sequence[float],
    loss: LossFunction | None = None,
) -> tuple[float, float]:
    """Compare a batch's loss with the weighted sum of its micro-batches' losses.

    Dropout and other random numbers are off, and batch normalisation takes its running statistics:
    what is compared is the loss. The statistics of micro-batches are their own in any case, as
    wherever gradients are accumulated.

    Parameters
    ----------
    batch
        The whole batch, as the user's data yields it.
    parts
        Tensors by value name, and sizes, of the micro-batches.
    weights
        With which the micro-batches' losses will count.

    Returns
    -------
    batch_loss, sum_of_losses

    Raises
    ------
    ResultsDiffer
    """
    uncut = Uncut(dag, _parameters(model) | _awake(model), dict(model.named_buffers()))
    counted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    try:
        losses = [_calm_loss(uncut, dag, *part) for part, _ in counted]
        batch_loss = _batch_loss(dag, model, loss, batch, None)
    except TaskFailed as error:
        raise ResultsDiffer(f"The captured graph fails on the first batch: {error}") from error
    added = math.fsum(w * x for (_, w), x in zip(counted, losses, strict=True))
    sizes = [abs(w * x) for (_, w), x in zip(counted, losses, strict=True)]
    size = max(abs(batch_loss), math.fsum(sizes))
    off = abs(batch_loss - added)
    if not off > _ROUNDING * size:
        return batch_loss, added
    nudges = [_batch_loss(dag, model, loss, batch, nudge) for nudge in range(_NUM_NUDGES)]
    noise = max(abs(other - batch_loss) for other in nudges)
    if off <= _TIMES_OWN_NOISE * noise + _ROUNDING * size:
        return batch_loss, added
    raise ResultsDiffer(
        f"The loss of the first batch is {batch_loss:.6g}, but its {len(parts)} micro-batches' losses "
        f"add up to {added:.6g}, {_percent(off, abs(batch_loss))} off: training would follow another "
        "loss than the model's. Does the loss compare rows with each other (contrastive losses, "
        "triplets, correlations over the batch), or divide by a number of its own? What to do: train "
        "with num_microbatches=1, or make the loss a sum or a mean over rows or targets. "
        f"{_TURN_OFF}"
    )


def _batch_loss(
    dag: OperatorDag,
    model: torch.nn.Module,
    loss: LossFunction | None,
    batch: Any,
    nudge: int | None,
) -> float:
    """Return a whole batch's loss, by the graph or, if that takes fewer rows only, by the model."""
    batch = without_columns(batch, dag.dropped_columns)
    tensors, constants = flatten_batch(batch)
    awake = _awake(model)
    try:
        sizes = dict(match_batch(dag, tensors, constants, "the check"))
    except BatchInvalid:
        eager = Eager(model, loss, batch, awake, draws=False)
        eager.begin(nudge=nudge)
        with _calm(dag):
            return float(eager.run(list(tensors.values()), grad=False)[0]["loss", ""])
    parameters = _parameters(model) | awake
    if nudge is not None:
        parameters = _nudged(parameters, nudge)
    uncut = Uncut(dag, parameters, dict(model.named_buffers()))
    return _calm_loss(uncut, dag, tensors_of(tensors), sizes)


def _calm_loss(
    uncut: Uncut, dag: OperatorDag, tensors: Mapping[str, torch.Tensor], sizes: Sizes
) -> float:
    uncut.begin()
    with _calm(dag):
        return uncut.loss(tensors, sizes)


def _calm(dag: OperatorDag) -> AbstractContextManager[Any]:
    """Switch off what makes a row's result depend on other rows; costs more than small operators."""
    if has_draws(dag.nodes) or any("batch_norm" in node.op for node in dag.nodes):
        return ExpectedDraws()  # type: ignore[no-untyped-call]
    return nullcontext()


def _nudged(tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    return {
        name: nudged(tensor.detach(), seed) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


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
        awake = _awake(model)
        self.keep = _spread(dag)
        self.transient = {b.name for b in dag.buffers if not b.persistent}
        self.buffers = dict(model.named_buffers())
        self.parameters = _parameters(model) | awake
        self.draws = has_draws(dag.nodes)
        self.eager = Eager(model, loss, batch, awake, self.draws)
        self.uncut = Uncut(dag, self.parameters, self.buffers)

    def run(self, begin: float) -> tuple[OperatorDag, CheckReport]:
        script: Script = [(self.tensors, self.keep), (self.following, None)]
        try:
            wanted = self._by_model(script)
        except Exception as error:
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

    def _by_model(self, script: Script) -> list[tuple[Outcome, list[Draw]]]:
        return [self.eager.run(list(tensors.values()), keep) for tensors, keep in script]

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
                except TaskFailed as error:
                    raise ResultsDiffer(
                        f"The captured graph fails where the model doesn't: {error} {_TURN_OFF}"
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
        for nudge in range(_NUM_NUDGES):
            self.eager.begin(nudge=nudge)
            for known, outcome, (other, _) in zip(
                noise, outcomes, self._by_model(script), strict=True
            ):
                for key, tensor in outcome.items():
                    known[key] = max(known.get(key, 0.0), _error(other.get(key), tensor))
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
                text = _differs(ours.get(key), theirs.get(key), allowed)
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
            f"What to do: {_advice(shown, bool(first), attributes, draws_in_python)} {_TURN_OFF}"
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
            self.eager.begin(python_seed=seed)
            others = [_only_loss(outcome) for outcome, _ in self._by_model(script)]
            if self._compare(losses, others, None):
                raise ResultsDiffer(
                    "The model's forward draws from Python's random or NumPy, and its loss depends on "
                    "it; a graph would hold one number for ever. What to do: draw with torch "
                    f"(torch.rand(1) < p as a mask). {_TURN_OFF}"
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
        for again in (False, True):
            if again:  # the first try went on from wherever model and graph were
                self.eager.begin()
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
                continue
            if keep is None:
                found = [_only_loss(outcome) for outcome in found]
                wanted = [(_only_loss(outcome), draws) for outcome, draws in wanted]
            if not (
                self._differences(script, found, wanted)
                if again
                else self._compare(found, [outcome for outcome, _ in wanted], None)
            ):
                return True
        return False

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
            for dim, symbol in enumerate(map(by_name.get, spec.shape)):
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


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _awake(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return other values for parameters whose numbers are all the same."""
    awake: dict[str, torch.Tensor] = {}
    for name, tensor in _parameters(model).items():
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        if bool((tensor == tensor.reshape(-1)[0]).all()):
            generator = torch.Generator().manual_seed(len(awake))
            noise = _WAKE * torch.rand(tensor.shape, generator=generator)
            awake[name] = tensor + noise.to(tensor.dtype)
    return awake


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


def _differs(ours: torch.Tensor | None, theirs: torch.Tensor | None, noise: float) -> str:
    """Say how a result differs from the model's; "" if it doesn't, but for rounding."""
    if ours is None or theirs is None:
        there = theirs if ours is None else ours
        if there is None or not bool((there != 0).any()):
            return ""
        return "is missing" if ours is None else "should be none at all"
    if ours.shape != theirs.shape:
        return f"has shape {list(ours.shape)} instead of {list(theirs.shape)}"
    error, size = _error(ours, theirs), float(_finite(theirs).norm())
    if error <= _ROUNDING * size + _TIMES_OWN_NOISE * noise:
        return ""
    if theirs.numel() == 1:
        return f"is {float(ours):.6g} instead of {float(theirs):.6g}"
    return f"is {_percent(error, size)} off"


def _error(ours: torch.Tensor | None, theirs: torch.Tensor) -> float:
    """Return the norm of the difference; infinite if one is finite where the other isn't."""
    if ours is None or ours.shape != theirs.shape:
        return math.inf
    if torch.equal(ours, theirs):
        return 0.0
    same = (ours == theirs) | ((ours != ours) & (theirs != theirs))
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    error = float(torch.where(same, 0.0, ours.to(wide) - theirs.to(wide)).norm())
    return error if math.isfinite(error) else math.inf


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return torch.where(torch.isfinite(wide), wide, 0.0)


def _only_loss(outcome: Outcome) -> Outcome:
    return {("loss", ""): outcome["loss", ""]}


def _equal(ours: Outcome, theirs: Outcome) -> bool:
    return all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items() if key in theirs)


def _percent(error: float, size: float) -> str:
    if not math.isfinite(error) or not size:
        return "entirely"
    return f"{100 * error / size:.3g} %" if error < 10 * size else f"{error / size:.0f} times"


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
