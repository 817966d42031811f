"""What a cut must know of an operator DAG: aliases, gradients, cheap values, where not to cut."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

from dagflow.graph.dag import OperatorDag
from dagflow.graph.data_sizes import are_of_data
from dagflow_tasks.program.nodes import Node, dtype_of
from dagflow_tasks.program.operators import has_gradients, mutated_arguments, storages

# Roughly one volunteer's CPU core; only ratios between operators matter.
NOMINAL_FLOPS_PER_SECOND = 50e9
NOMINAL_MEMORY_BYTES_PER_SECOND = 10e9

# Operators whose results have no gradient in torch, whatever they are made from. A value that
# claimed one in the next stage would have other kernels run there: attention's, for a mask.
_WITHOUT_GRADIENT = re.compile(
    r"aten\.(detach\w*|\w+_like|new_\w+|histc|special_(airy_ai|\w*bessel\w*|\w+_polynomial_\w+))\."
)


class DagAnalysis:
    """Facts about a DAG's values, each computed when first asked for."""

    def __init__(self, dag: OperatorDag) -> None:
        self.dag = dag
        self.position = {node.name: i for i, node in enumerate(dag.nodes)}
        self.parameter_uses = {use: p for p in dag.parameters for use in p.uses}

    @cached_property
    def storage(self) -> dict[str, str]:
        """For every value the first value whose memory it may share; one for a parameter's uses."""
        first = {use: parameter.uses[0] for use, parameter in self.parameter_uses.items()}
        root = storages(self.dag.nodes)
        return first | {name: first.get(value, value) for name, value in root.items()}

    @cached_property
    def writers(self) -> dict[str, list[Node]]:
        """Nodes that write in place, by the storage they write."""
        found: dict[str, list[Node]] = {}
        for node in self.dag.nodes:
            for name in mutated_arguments(node):
                found.setdefault(self.storage.get(name, name), []).append(node)
        return found

    def companions(self, value: str) -> list[Node]:
        """Nodes without which the value isn't what its readers see: those that write its memory."""
        return self.writers.get(self.storage.get(value, value), [])

    @cached_property
    def free_of_parameters(self) -> set[str]:
        """Values that any stage can compute from the batch alone: masks, positions, rotary tables.

        They are recomputed where they are needed instead of shipped.
        """
        mutated = {f"b.{buffer.name}" for buffer in self.dag.buffers if buffer.mutated}
        tainted = self.depending_on(set(self.parameter_uses) | mutated)
        return {node.name for node in self.dag.nodes} - tainted

    def depending_on(self, values: set[str]) -> set[str]:
        """Return values and all that depends on them, through memory written in place too."""
        tainted = set(values)
        while True:
            before = len(tainted)
            for node in self.dag.nodes:
                if any(name in tainted for name in node.references()):
                    tainted.add(node.name)
            for storage, writers in self.writers.items():
                if storage not in tainted and any(node.name in tainted for node in writers):
                    tainted.add(storage)
            for node in self.dag.nodes:
                if self.storage[node.name] in tainted:
                    tainted.add(node.name)
            if len(tainted) == before:
                return tainted

    def needed_for(self, values: Iterable[str]) -> list[str]:
        """Return the nodes that values are computed by, in order."""
        members: set[str] = set()
        wanted = list(values)
        while wanted:
            value = wanted.pop()
            if value in members or value not in self.position:
                continue
            members.add(value)
            wanted += self.dag.nodes[self.position[value]].references()
            wanted += [node.name for node in self.companions(value)]
        return sorted(members, key=self.position.__getitem__)

    @cached_property
    def differentiable(self) -> set[str]:
        """Values through which a gradient may flow to a trainable parameter."""
        found = {use for use, parameter in self.parameter_uses.items() if parameter.trainable}
        while True:
            before = len(found)
            for node in self.dag.nodes:
                if self._carries_gradients(node, found):
                    found.add(node.name)
            # What is written into memory shows in all its views.
            written = {
                storage
                for storage, writers in self.writers.items()
                if any(node.name in found and node.grad for node in writers)
            }
            found |= {
                node.name
                for node in self.dag.nodes
                if self.storage[node.name] in written and self._has_gradients(node)
            }
            if len(found) == before:
                return found

    def _carries_gradients(self, node: Node, found: set[str]) -> bool:
        if _WITHOUT_GRADIENT.match(node.op) or not self._has_gradients(node):
            return False
        if not node.grad:
            # What is written in place under no_grad, a parameter above all, is still itself.
            return any(name in found for name in mutated_arguments(node))
        return any(name in found for name in node.references())

    def _has_gradients(self, node: Node) -> bool:
        return any(has_gradients(dtype_of(d)) for d, _ in self.dag.info[node.name].outputs)

    @cached_property
    def last_reader(self) -> dict[str, int]:
        """Position of the last node that reads each value."""
        last: dict[str, int] = {}
        for position, node in enumerate(self.dag.nodes):
            for name in node.references():
                last[name] = position
        return last

    @cached_property
    def forbidden_cuts(self) -> set[int]:
        """Positions c such that nodes c-1 and c must stay in one stage.

        A tuple and the operators that take it apart; memory and the operators that write it;
        a buffer, parameter or input that is written and everything that reads it; a value whose size
        data decides, and what reads it.
        """
        spans = [
            (self.position[name], self.last_reader[name])
            for name, info in self.dag.info.items()
            if name in self.last_reader
            and name not in self.free_of_parameters
            and are_of_data(info.outputs)
        ]
        for node in self.dag.nodes:
            if node.op == "getitem":
                (source,) = node.references()
                spans.append((self.position[source], self.position[node.name]))
        for storage, writers in self.writers.items():
            touching = [self.position[node.name] for node in writers]
            if storage in self.position:
                touching.append(self.position[storage])
            elif not self._is_rewritten_anywhere(storage, writers):
                touching += self._touching(storage)
            spans.append((min(touching), max(touching)))
        return {cut for first, last in spans for cut in range(first + 1, last + 1)}

    def _is_rewritten_anywhere(self, storage: str, writers: list[Node]) -> bool:
        """Tell whether each stage can do the writes itself: to its own copy of the batch."""
        return storage.startswith(("in.", "c.")) and all(
            node.name in self.free_of_parameters for node in writers
        )

    def _touching(self, storage: str) -> list[int]:
        return [
            position
            for position, node in enumerate(self.dag.nodes)
            if any(self.storage.get(name, name) == storage for name in node.references())
        ]

    @cached_property
    def crossing_bytes(self) -> list[int]:
        """Bytes of the values that cross each cut, for cuts 0 to the number of nodes."""
        change = [0] * (len(self.dag.nodes) + 2)
        for node in self.dag.nodes:
            start, end = self.position[node.name], self.last_reader.get(node.name, -1)
            if end > start and node.name not in self.free_of_parameters:
                size = self.dag.output_bytes(node.name)
                change[start + 1] += size
                change[end + 1] -= size
        total, crossing = 0, []
        for difference in change[:-1]:
            total += difference
            crossing.append(total)
        return crossing

    @cached_property
    def node_seconds(self) -> list[float]:
        """Nominal seconds of each operator, forward and backward: the larger of FLOPs and bytes.

        The roofline model; backward counts twice the forward, as in FusionLLM's estimator
        (arXiv 2410.12707, section 4).
        """
        return [
            3
            * max(
                self.dag.info[node.name].flops / NOMINAL_FLOPS_PER_SECOND,
                self.dag.info[node.name].bytes / NOMINAL_MEMORY_BYTES_PER_SECOND,
            )
            if node.name not in self.free_of_parameters
            else 0.0
            for node in self.dag.nodes
        ]

    @cached_property
    def saved_bytes(self) -> list[int]:
        """Bytes that each operator leaves behind for the backward pass, about."""
        return [
            self.dag.output_bytes(node.name)
            if node.name in self.differentiable and self.storage[node.name] == node.name
            else 0
            for node in self.dag.nodes
        ]
