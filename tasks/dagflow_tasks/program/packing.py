"""Puts a stage's weights into the order that its processor reads fastest."""

from __future__ import annotations

from dataclasses import replace

import torch

from dagflow_tasks.kernels.onednn import LINEAR_PACKED, pack, packs
from dagflow_tasks.program.operators import linear_weights
from dagflow_tasks.program.stage_program import StageProgram


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
    linear = linear_weights(program.nodes)
    plain = {
        use.parameter
        for use in program.parameters
        if use.value not in linear or not packs(weights[use.parameter])
    }
    for name in {use.parameter for use in program.parameters} - plain:
        weights[name] = pack(weights[name])
    packed = {use.value for use in program.parameters if use.parameter not in plain}
    nodes = [
        replace(node, op=LINEAR_PACKED) if packed.intersection(node.references()) else node
        for node in program.nodes
    ]
    return replace(program, nodes=tuple(nodes))
