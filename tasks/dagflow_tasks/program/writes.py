"""Which operators write parameters in place, and what these operators need.

A model may clamp or renormalise a weight under ``no_grad`` before it is used. A stage's forward does
so on copies, and so can be run again; `dagflow_tasks.train.update.update` does it once a step to the weights
themselves, just before the optimizer's update, as one forward and one update would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.operators import mutated_arguments, storages


def parameter_writes(nodes: Sequence[Node], uses: Iterable[str]) -> list[Node]:
    """Return the nodes that write parameters in place, with all that they read, in order.

    Parameters
    ----------
    uses
        Names of the parameters' uses.

    >>> x = {"ref": "p.w"}
    >>> nodes = [Node("c", "aten.clamp_.default", (x, 0.0)), Node("n", "aten.neg.default", (x,))]
    >>> [node.name for node in parameter_writes(nodes, ["p.w"])]
    ['c']
    """
    parameters = set(uses)
    root = storages(nodes)
    by_name = {node.name: node for node in nodes}
    writers: dict[str, list[str]] = {}
    for node in nodes:
        for name in mutated_arguments(node):
            writers.setdefault(root.get(name, name), []).append(node.name)
    wanted = [name for storage in parameters & writers.keys() for name in writers[storage]]
    needed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in needed or name not in by_name:
            continue
        needed.add(name)
        for reference in by_name[name].references():
            wanted += [reference, *writers.get(root.get(reference, reference), ())]
    return [node for node in nodes if node.name in needed]
