"""Traces a model, and again if forward does more than compute: to see whether that matters.

A graph holds what one call computes. A call that changes attributes, closures or globals, or that draws
from Python's or NumPy's generators, may compute something else the next time.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.effects import Draws, RandomStates, Snapshot, watch_attributes, watch_generators
from dagflow.graph.leftovers import Left, LeftBehind, StandIns, carried_over
from dagflow.graph.outside import Outside
from dagflow.graph.trace import OWN_FILES, Trace
from dagflow_tasks.program.interpreter import RANDOM_LOCK

Traced = tuple[ExportedProgram, Trace]


def examined(
    wrapper: torch.nn.Module,
    export: Callable[[], Traced],
    batch: Sequence[torch.Tensor],
    refuse: Callable[[ExportedProgram, Trace], object],
) -> Traced:
    """Trace a wrapper around a model, which is left as it was.

    If the first call leaves a table or a flag behind that later ones only read, what is traced is a
    call after it.

    Parameters
    ----------
    export
        Traces the wrapper.
    batch
        What to call the wrapper with.
    refuse
        Raises for a graph that no program can be made of, before it takes more traces to see what
        random numbers do to it.

    Raises
    ------
    CaptureFailed
        If later calls compute something else than the first, because of what that leaves behind or
        of what it draws.
    """
    outside = Outside(wrapper)
    try:
        return _examined(wrapper, outside, export, refuse)
    except LeftBehind as error:
        refusal = CaptureFailed(str(error))
    with _left_as_it_was(wrapper, outside):
        if _settles(wrapper, batch):
            with suppress(CaptureFailed):
                return _examined(wrapper, Outside(wrapper), export, refuse)
    raise refusal


def _settles(wrapper: torch.nn.Module, batch: Sequence[torch.Tensor]) -> bool:
    """Call a model once, so that its tables and flags are there; its tensors are put back.

    Returns
    -------
    bool
        Whether a second call then computes the same to the bit as the first did, and neither makes
        parameters or writes into them.
    """
    parameters = [*wrapper.parameters()]
    if any(parameter.is_meta for parameter in parameters):
        return False
    try:
        with RANDOM_LOCK, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = _call(wrapper, batch), _call(wrapper, batch)
    except Exception:  # that it doesn't run is no news for who refuses it
        return False
    now = [*wrapper.parameters()]
    is_same = first is not None and second is not None and torch.equal(first, second)
    return is_same and list(map(id, now)) == list(map(id, parameters))


def _call(wrapper: torch.nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return a model's loss; None if it has written into its parameters."""
    parameters = [*wrapper.parameters()]
    kept = [(tensor, tensor.detach().clone()) for tensor in (*parameters, *wrapper.buffers())]
    tables = [(module, dict(module._buffers)) for module in wrapper.modules()]
    device = parameters[0].device if parameters else torch.device("cpu")
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            loss: torch.Tensor = wrapper(*(tensor.detach().clone().to(device) for tensor in batch))
        is_written = not all(torch.equal(t, before) for t, before in kept[: len(parameters)])
        return None if is_written else loss
    finally:
        for module, table in tables:
            module._buffers.update(table)
        for tensor, before in kept:
            if not torch.equal(tensor, before):
                tensor.data.copy_(before)


def _examined(
    wrapper: torch.nn.Module,
    outside: Outside,
    export: Callable[[], Traced],
    refuse: Callable[[ExportedProgram, Trace], object],
) -> Traced:
    with _left_as_it_was(wrapper, outside) as states:
        exported, trace = export()
        left, has_drawn = [*trace.left, *outside.left()], states.changed()
    if has_drawn and not left:
        refuse(exported, trace)
    if left or has_drawn:
        with _left_as_it_was(wrapper, outside):
            # Watching generators makes a trace several times slower: only where one may be used.
            may_draw = has_drawn or any(item.refusal for item in left)
            _Examination(wrapper, export, left, fingerprint(exported)).run(trace, may_draw)
    return exported, trace


@contextmanager
def _left_as_it_was(wrapper: torch.nn.Module, outside: Outside) -> Iterator[RandomStates]:
    states, snapshot = RandomStates(), Snapshot(wrapper)
    try:
        yield states
    finally:
        snapshot.restore()
        outside.restore()
        states.restore()


class _Examination:
    def __init__(
        self,
        wrapper: torch.nn.Module,
        export: Callable[[], Traced],
        left: Sequence[Left],
        graph: str,
    ) -> None:
        self._wrapper, self._export = wrapper, export
        self._left, self._graph = left, graph

    def run(self, trace: Trace, may_draw: bool) -> None:
        """Trace as many further calls as it takes.

        Parameters
        ----------
        may_draw
            Whether random numbers of Python's or NumPy's may have been drawn.

        Raises
        ------
        CaptureFailed
        """
        names = {left.name for left in self._left}
        with (
            watch_attributes(self._wrapper, names) as scratch,
            watch_generators("largest") if may_draw else nullcontext(Draws()) as draws,
        ):
            graph, left_again, proven = self._second_call(scratch)
        drawn = [line for line in draws.lines if line.rpartition(":")[0] not in OWN_FILES]
        if drawn:
            trace.drawn = ", ".join(dict.fromkeys(drawn))
            self._try_other_draws(trace.drawn, graph, set(draws.untried) & set(drawn))
        changing = list(dict.fromkeys(left.name for left in left_again))
        for left in left_again:
            if left.refusal:
                raise LeftBehind(left.refusal)
        if graph != self._graph:
            named = [left.name for left in self._left] or changing
            if not named:
                raise LeftBehind(_DIFFERENT)
            raise LeftBehind(carried_over(", ".join(dict.fromkeys(named))))
        if not proven.issuperset(changing):
            scratch.update(self._try_stand_ins(left_again))
        trace.unused = [name for name in changing if name not in scratch]

    def _second_call(self, scratch: set[str]) -> tuple[str, list[Left], set[str]]:
        """Trace a call after the first, whose tensors alone are replaced: they belong to its trace.

        Adds to `scratch` the names of containers that are each call's own.

        Returns
        -------
        graph, left_again
            What this call computes, and what it changes in its turn.
        proven
            Names of what stand-ins stood for, if none of them was compared.
        """
        stand_ins = StandIns(answer=True)
        with _left_as_it_was(self._wrapper, Outside(self._wrapper)):
            for left in self._left:
                if left.holds_tensors:
                    stand_ins.put([left])
                else:
                    left.put_again()
            outside = Outside(self._wrapper)
            exported, trace = self._traced(stand_ins, self._left)
            proven = {left.name for left in self._left if left.holds_tensors}
            proven -= {left.name for left in self._left if not left.holds_tensors}
            if stand_ins.num_compared:
                proven = set()
            scratch.update(stand_ins.scratch)
            return fingerprint(exported), [*trace.left, *outside.left()], proven

    def _try_stand_ins(self, left_again: Sequence[Left]) -> set[str]:
        """Trace calls to which it must not matter what earlier ones have left.

        Returns
        -------
        set of str
            Names of containers that are each call's own.

        Raises
        ------
        CaptureFailed
        """
        names = {left.name for left in left_again}
        known = {left.name for left in self._left}
        for answer in (True, False):
            stand_ins = StandIns(answer)
            with _left_as_it_was(self._wrapper, Outside(self._wrapper)):
                for left in self._left:
                    if left.holds_tensors or left.name in names:
                        stand_ins.put([left])
                    else:
                        left.put_again()
                stand_ins.put(left for left in left_again if left.name not in known)
                exported, _ = self._traced(stand_ins, left_again)
            if fingerprint(exported) != self._graph:
                raise LeftBehind(_says(stand_ins, left_again))
            if not stand_ins.num_compared:
                break
        return stand_ins.scratch

    def _traced(self, stand_ins: StandIns, left: Sequence[Left]) -> Traced:
        try:
            return self._export()
        except (BatchInvalid, CaptureFailed) as error:
            if isinstance(error, CaptureFailed) and error.__cause__ is None:
                raise  # said by whoever noticed
            raise LeftBehind(_says(stand_ins, left)) from error

    def _try_other_draws(self, lines: str, graph: str, untried: set[str]) -> None:
        """See whether other random numbers of Python's or NumPy's give another graph.

        Raises
        ------
        CaptureFailed
        """
        graphs = {self._graph, graph}
        for kind in ("smallest", "between"):
            with (
                watch_generators(kind, lines=False),
                _left_as_it_was(self._wrapper, Outside(self._wrapper)),
            ):
                graphs.add(fingerprint(self._export()[0]))
        if len(graphs) > 1:
            raise CaptureFailed(
                f"Forward draws from Python's or NumPy's random numbers ({lines}), and what it "
                "computes depends on them. A graph would hold the first draw for ever. What to do: "
                "draw with torch (torch.rand), which is drawn anew in every step, or augment in "
                "the data loader."
            )
        if untried:
            raise CaptureFailed(
                "Forward draws from Python's or NumPy's random numbers "
                f"({', '.join(sorted(untried))}), and nothing shows that what it computes never "
                "depends on them. A graph would hold the first draw for ever. What to do: draw with "
                "torch (torch.rand), which is drawn anew in every step, or draw in the data loader."
            )


_DIFFERENT = (
    "Forward and loss, called twice, compute something else, though nothing is seen to change in "
    "between: they may ask something outside of Python's objects (a file, the environment, a library). "
    "What to do: hand what changes to forward as part of the batch."
)


def _says(stand_ins: StandIns, left: Sequence[Left]) -> str:
    for name, line in stand_ins.read.items():
        return carried_over(name, line)
    return carried_over(", ".join(dict.fromkeys(item.name for item in left)))


def fingerprint(exported: ExportedProgram) -> str:
    """Return a digest of what a graph computes, whatever its nodes are called.

    What computes nothing that is returned or written leaves no trace in it.
    """
    given = {}
    for spec in exported.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        is_constant = spec.kind == InputKind.CONSTANT_TENSOR and spec.target in exported.constants
        given[name] = (
            _of_tensor(exported.constants[spec.target])
            if is_constant
            else f"{spec.kind.name} {spec.target or name}"
        )
    return _of_graph(exported.graph_module, given)


def _of_graph(module: torch.fx.GraphModule, given: dict[str, str]) -> str:
    known: dict[torch.fx.Node, str] = {}

    def of(argument: Any) -> str:
        def named(node: torch.fx.Node) -> Any:
            return _Named(known[node])

        return str(torch.fx.map_arg(argument, named))

    digest = hashlib.blake2b()
    places = (f"argument {number}" for number in itertools.count())
    names = (f"%{number}" for number in itertools.count())
    for node in _living(module):
        if node.op == "placeholder":
            known[node] = given[node.name] if node.name in given else next(places)
            continue
        if node.op == "get_attr":
            held = getattr(module, str(node.target), None)
            if isinstance(held, torch.fx.GraphModule):
                known[node] = _of_graph(held, {})
            else:
                known[node] = _of_tensor(held)
            continue
        known[node] = next(names)
        digest.update(
            f"{known[node]} {node.op} {node.target} {of(node.args)} {of(node.kwargs)}\n".encode()
        )
    return digest.hexdigest()


class _Named:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _living(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Return the nodes, in order, of which something comes: a result, a write."""
    needed: set[torch.fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node.op in ("output", "placeholder") or node in needed or _writes(node, module):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in module.graph.nodes if node in needed]


def _writes(node: torch.fx.Node, module: torch.fx.GraphModule) -> bool:
    """Tell whether a node, or one in a region that it runs, does something beside its result."""
    regions = [
        getattr(module, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"
    ]
    return node.is_impure() or any(
        _writes(inner, region)
        for region in regions
        if isinstance(region, torch.fx.GraphModule)
        for inner in region.graph.nodes
        if inner.op == "call_function"
    )


def _of_tensor(value: Any) -> str:
    if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
        return str(type(value))
    data = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    digest = hashlib.blake2b(data.view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"{value.dtype} {list(value.shape)} {digest}"
