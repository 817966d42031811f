"""Traces a model, and again if forward does more than compute: to see whether that matters.

A graph holds what one call computes. A call that changes attributes, closures or globals, or that draws
from Python's or NumPy's generators, may compute something else the next time.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.effects import Draws, RandomStates, Snapshot, watch_attributes, watch_generators
from dagflow.graph.leftovers import Left, StandIns, carried_over
from dagflow.graph.outside import Outside
from dagflow.graph.trace import OWN_FILES, Trace

Traced = tuple[ExportedProgram, Trace]


def examined(wrapper: torch.nn.Module, export: Callable[[], Traced]) -> Traced:
    """Trace a wrapper around a model, which is left as it was.

    Raises
    ------
    CaptureFailed
        If later calls compute something else than the first, because of what that leaves behind or
        of what it draws.
    """
    outside = Outside(wrapper)
    with _left_as_it_was(wrapper, outside) as states:
        exported, trace = export()
        left, has_drawn = [*trace.left, *outside.left()], states.changed()
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
            graph, left_again = self._second_call()
        drawn = [line for line in draws.lines if line.rpartition(":")[0] not in OWN_FILES]
        if drawn:
            trace.drawn = ", ".join(dict.fromkeys(drawn))
            self._try_other_draws(trace.drawn, graph, set(draws.untried) & set(drawn))
        changing = list(dict.fromkeys(left.name for left in left_again))
        for left in left_again:
            if left.refusal:
                raise CaptureFailed(left.refusal)
        if graph != self._graph:
            names = [left.name for left in self._left] or changing
            raise CaptureFailed(carried_over(", ".join(dict.fromkeys(names))))
        if changing:
            scratch |= self._try_stand_ins(left_again)
        trace.unused = [name for name in changing if name not in scratch]

    def _second_call(self) -> tuple[str, list[Left]]:
        """Trace a call after the first; return its graph, and what it changes in its turn.

        What the first left is there again, but for tensors, which belong to its trace.
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
            return fingerprint(exported), [*trace.left, *outside.left()]

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
                raise CaptureFailed(_says(stand_ins, left_again))
            if not stand_ins.num_compared:
                break
        return stand_ins.scratch

    def _traced(self, stand_ins: StandIns, left: Sequence[Left]) -> Traced:
        try:
            return self._export()
        except (BatchInvalid, CaptureFailed) as error:
            if isinstance(error, CaptureFailed) and error.__cause__ is None:
                raise  # said by whoever noticed
            raise CaptureFailed(_says(stand_ins, left)) from error

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
        return str(torch.fx.map_arg(argument, lambda node: _Named(known[node])))

    digest = hashlib.blake2b()
    places = (f"argument {number}" for number in itertools.count())
    names = (f"%{number}" for number in itertools.count())
    for node in _living(module.graph):
        if node.op == "placeholder":
            known[node] = given[node.name] if node.name in given else next(places)
            continue
        if node.op == "get_attr":
            held = getattr(module, str(node.target), None)
            is_graph = isinstance(held, torch.fx.GraphModule)
            known[node] = _of_graph(held, {}) if is_graph else _of_tensor(held)
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


def _living(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Return the nodes, in order, of which something comes: a result, a write, a random draw."""
    needed: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node in needed or node.is_impure():
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def _of_tensor(value: Any) -> str:
    if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
        return str(type(value))
    data = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    digest = hashlib.blake2b(data.view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"{value.dtype} {list(value.shape)} {digest}"
