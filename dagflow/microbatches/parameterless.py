"""Values of a DAG that need no parameters, as the driver computes them from a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import buffer_value
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.stage_program import (
    BufferUse,
    StageInput,
    StageOutput,
    StageProgram,
    ValueSpec,
)

Tensors = Mapping[str, torch.Tensor]
Sizes = Mapping[str, int]
ReadBuffer = Callable[[str], torch.Tensor | None]


class KnownValues:
    """Computes some values of a DAG.

    Parameters
    ----------
    names
        Values; inputs and constants are among the results anyway.
    read_buffer : callable
        Returns a buffer that the forward pass doesn't write by name, or None if there is no value.

    Attributes
    ----------
    complete : bool
        Whether all buffers that it takes have values; a model without weights has none.
    """

    def __init__(
        self, analysis: DagAnalysis, names: Sequence[str], read_buffer: ReadBuffer
    ) -> None:
        self.program = _program(analysis, names)
        buffers = {use.value: read_buffer(use.buffer) for use in self.program.buffers}
        self._buffers = {name: t for name, t in buffers.items() if t is not None}
        self.complete = len(self._buffers) == len(buffers)
        self._executable = Executable(self.program, torch.device("cpu"))

    @torch.no_grad()
    def __call__(
        self, tensors: Tensors, sizes: Sizes, numbers: Mapping[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return values by name, those that were given included."""
        known = {**tensors, **self._buffers, **self._executable.constants}
        taken = {*self.program.batch_inputs, *self._buffers}
        given: dict[str, Any] = {name: t for name, t in known.items() if name in taken}
        given |= {name: (numbers or {})[name] for name in self.program.numbers}
        return known | self._executable.run(given, sizes, RandomAddress(0, 0, 0))


def _program(analysis: DagAnalysis, names: Sequence[str]) -> StageProgram:
    """Return a program that computes values without parameters."""
    members = set(analysis.needed_for(names))
    dag = analysis.dag
    nodes = tuple(node for node in dag.nodes if node.name in members)
    references = {reference for node in nodes for reference in node.references()} | {*names}
    return StageProgram(
        stage=0,
        num_stages=1,
        symbols=tuple(symbol.name for symbol in dag.symbols),
        inputs=tuple(StageInput(spec) for spec in dag.inputs if spec.name in references),
        outputs=tuple(
            StageOutput(ValueSpec(name, "int64", ()), (), differentiable=False)
            for name in names
            if name in members
        ),
        parameters=(),
        buffers=tuple(
            BufferUse(buffer_value(b.name), b.name, b.dtype, b.shape, False, 0)
            for b in dag.buffers
            if buffer_value(b.name) in references
        ),
        constants=tuple(c for c in dag.constants if c.name in references),
        nodes=nodes,
        numbers=tuple(name for name in dag.numbers if name in references),
    )
