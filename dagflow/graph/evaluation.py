"""Computes what in an operator DAG depends on nothing but the number of tokens: masks, biases, scales."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch

from dagflow.graph.dag import OperatorDag, buffer_value, input_value
from dagflow_tasks.kernels.attention import ATTEND
from dagflow_tasks.program.nodes import Node, argument_references, decode_literal, dtype_of
from dagflow_tasks.program.operators import mutated_arguments, resolve
from dagflow_tasks.program.sizes import evaluate_size

LEAST_TOKENS, MOST_TOKENS = 64, 4096
_MOST_NUMBERS = 1 << 26  # of scores at a time, all heads together: 0.27 GB
_COMPARING = frozenset(("sub", "rsub", "add", "gt", "ge", "lt", "le"))


class Evaluation:
    """Computes values of a DAG that depend on nothing but the number of tokens."""

    def __init__(self, dag: OperatorDag, model: torch.nn.Module) -> None:
        self._dag = dag
        self._nodes = {node.name: node for node in dag.nodes}
        self._known: dict[str, torch.Tensor] = {c.name: c.tensor() for c in dag.constants}
        for buffer in dag.buffers:
            value = model.get_buffer(buffer.name)
            if not value.is_meta:
                self._known[buffer_value(buffer.name)] = value.detach()
        self._forms = forms_of(dag)
        self.live = live_values(dag)
        self._writers: dict[str, list[str]] = {}
        for node in dag.nodes:
            for name in mutated_arguments(node):
                self._writers.setdefault(name, []).append(node.name)
        self.token_dependent = self._token_dependent()

    def _token_dependent(self) -> set[str]:
        found = {spec.name for spec in self._dag.inputs if spec.name != input_value("positions")}
        found |= {use for parameter in self._dag.parameters for use in parameter.uses}
        found |= {buffer_value(b.name) for b in self._dag.buffers} - set(self._known)
        for node in self._dag.nodes:
            depends = node.op == ATTEND or not found.isdisjoint(node.references())
            if depends and not _reads_shape_only(node):
                found.add(node.name)
        return found

    def tokens_to_look_at(self, source: str, product: str) -> int:
        """Return how many tokens show all that a mask does: more than any size in it."""
        sizes = [LEAST_TOKENS]
        for name in self._behind(source, product):
            if name in self._nodes:
                sizes += [2 * n for n in _integers(self._nodes[name].args) if n < MOST_TOKENS]
            elif name in self._known:
                sizes += [n for n in self._known[name].shape if n < MOST_TOKENS]
        most = next(s.maximum for s in self._dag.symbols if s.name == self._dag.inputs[0].shape[1])
        heads = math.prod(n for n in self._forms[product or source][1] if isinstance(n, int))
        room = math.isqrt(_MOST_NUMBERS // max(1, heads))
        return max(2, min(max(sizes), MOST_TOKENS, room, most or MOST_TOKENS))

    def largest_distance(self, source: str, product: str) -> int:
        """Return the largest number that positions may be compared with: a window, perhaps."""
        nodes = (self._nodes[n] for n in self._behind(source, product) if n in self._nodes)
        compared = (node for node in nodes if not _COMPARING.isdisjoint(node.op.split(".")))
        return max((n for node in compared for n in _integers(node.args) if n < 1 << 31), default=0)

    def signature(self, source: str, product: str) -> Hashable:
        """Return what a value follows from, the same for layers that are alike."""
        names: dict[str, Hashable] = {product: "product"} if product else {}

        def renamed(argument: Any) -> Hashable:
            if isinstance(argument, Mapping):
                known = names.get(argument["ref"]) if "ref" in argument else None
                return known if known is not None else json.dumps(argument)
            if isinstance(argument, (list, tuple)):
                return tuple(renamed(item) for item in argument)
            return (type(argument).__name__, argument)

        found: list[Hashable] = [self._forms[product or source]]
        for name in self._behind(source, product):
            if name in self._known:
                tensor = self._known[name].contiguous().reshape(-1).view(torch.uint8)
                names[name] = blake2b(tensor.numpy().data, digest_size=16).hexdigest()
        for node in self._order(source, dict.fromkeys([product, input_value("positions")])):
            names[node.name] = len(names)
            kwargs = tuple((key, renamed(value)) for key, value in sorted(node.kwargs.items()))
            found.append((node.op, renamed(node.args), kwargs))
        if product in self._nodes and "baddbmm" in self._nodes[product].op:
            found.append(product)  # it adds something of its own
        return tuple(found)

    def _behind(self, source: str, product: str) -> Iterator[str]:
        seen, waiting = {product}, [source]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name
            if name in self._nodes:
                waiting += self._nodes[name].references()

    def of(self, name: str, count: int, product: str = "", score: float = 0.0) -> torch.Tensor:
        """Return a value for so many tokens, with scores in place of a product's result."""
        sizes = dict(self._dag.hints)
        tokens = self._dag.inputs[0].shape[1]
        sizes[tokens] = count
        known = {input_value("positions"): torch.arange(count)[None]}
        if product:
            known[product] = self._scores(product, count, score, sizes)
        return self._compute(name, known, sizes)

    def _scores(
        self, product: str, count: int, score: float, sizes: Mapping[str, int]
    ) -> torch.Tensor:
        node = self._nodes[product]
        shape = [count if isinstance(n, str) else n for n in self._dag.info[product].outputs[0][1]]
        scores = torch.full((), score).expand(shape)
        if "baddbmm" not in node.op:
            return scores
        # What the product is added to, and by how much it is multiplied.
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        known = {input_value("positions"): torch.arange(count)[None]}
        added = self._compute(next(argument_references(node.args[0])), known, sizes)
        result: torch.Tensor = beta * added + alpha * scores
        return result

    def _compute(
        self, name: str, known: dict[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> torch.Tensor:
        for node in self._order(name, known):

            def value_of(reference: str) -> torch.Tensor:
                if reference in known:
                    return known[reference]
                if reference in self._known:
                    return self._known[reference]
                # Only its form is looked at.
                dtype, shape = self._forms[reference]
                form = [evaluate_size(size, sizes) for size in shape]
                return torch.zeros((), dtype=dtype_of(dtype)).expand(form)

            def decode(argument: Any) -> Any:
                if isinstance(argument, Mapping):
                    if "ref" in argument:
                        return value_of(argument["ref"])
                    return decode_literal(argument, sizes, torch.device("cpu"))
                if isinstance(argument, (list, tuple)):
                    return [decode(item) for item in argument]
                return argument

            args = [decode(argument) for argument in node.args]
            kwargs = {key: decode(value) for key, value in node.kwargs.items()}
            with torch.no_grad():
                known[node.name] = resolve(node.op)(*args, **kwargs)
        return known[name] if name in known else self._known[name]

    def _order(self, name: str, known: Mapping[str, Any]) -> list[Node]:
        """Return the nodes behind a value, in the DAG's order, those that write into it included."""
        needed: set[str] = set()
        waiting = [name]
        while waiting:
            one = waiting.pop()
            if one in needed or one in known or one in self._known:
                continue
            needed.add(one)
            if not _reads_shape_only(self._nodes[one]):
                waiting += self._nodes[one].references()
            waiting += self._writers.get(one, [])
        return [node for node in self._dag.nodes if node.name in needed]


# Operators that make a tensor of another's form and don't look at its numbers.
# fmt: off
_SHAPE_ONLY = frozenset((
    "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty",
))
# fmt: on


def _reads_shape_only(node: Node) -> bool:
    return node.op.startswith("aten.") and node.op.split(".")[1] in _SHAPE_ONLY


def _integers(argument: Any) -> Iterator[int]:
    if isinstance(argument, bool):
        return
    if isinstance(argument, int):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _integers(item)


def live_values(dag: OperatorDag) -> set[str]:
    """Return the values that a DAG's result follows from."""
    needed = {dag.loss}
    for node in reversed(dag.nodes):
        if node.name in needed:
            needed.update(node.references())
    return needed


def forms_of(dag: OperatorDag) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Return the dtype and the shape of every value that is one tensor, or of its first one."""
    found = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in dag.inputs}
    found |= {use: (p.dtype, p.shape) for p in dag.parameters for use in p.uses}
    found |= {buffer_value(b.name): (b.dtype, b.shape) for b in dag.buffers}
    found |= {constant.name: (constant.dtype, constant.shape) for constant in dag.constants}
    found |= {name: info.outputs[0] for name, info in dag.info.items() if info.outputs}
    return found
