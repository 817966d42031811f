"""Puts a stage's weights into the order that its processor reads fastest."""

from __future__ import annotations

from dataclasses import replace

import torch

from dagflow_tasks.onednn import LINEAR_PACKED, pack, packs
from dagflow_tasks.operators import Node
from dagflow_tasks.program import StageProgram

_LINEAR = "aten.linear.default"


def pack_linears(program: StageProgram, weights: dict[str, torch.Tensor]) -> StageProgram:
    """Pack the weights that only linear operators read; return the program that reads them so.

    Parameters
    ----------
    program : StageProgram
        For inference: packed weights have no gradients.
    weights : dict
        By parameter; changed in place, one by one, so that two forms of one weight are in memory at
        a time, and not of all.
    """
    uses = {use.value: use.parameter for use in program.parameters}
    readers: dict[str, list[bool]] = {name: [] for name in uses.values()}
    for node in program.nodes:
        for value in node.references():
            if value in uses:
                readers[uses[value]].append(_is_linear_of(node, value))
    chosen = {n for n, linear in readers.items() if all(linear) and linear and packs(weights[n])}
    for name in chosen:
        weights[name] = pack(weights[name])
    linears = {value for value, name in uses.items() if name in chosen}
    nodes = [
        replace(node, op=LINEAR_PACKED)
        if node.op == _LINEAR and node.args[1].get("ref") in linears
        else node
        for node in program.nodes
    ]
    return replace(program, nodes=tuple(nodes))


def _is_linear_of(node: Node, weight: str) -> bool:
    x, bias = node.args[0], node.args[2:]
    is_weight = node.op == _LINEAR and node.args[1] == {"ref": weight}
    return is_weight and {"ref": weight} not in (x, *bias)
