"""Builds stage programs from an operator DAG and the positions of its cuts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import OperatorDag, buffer_value
from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.operators import CHECKS
from dagflow_tasks.program.stage_program import (
    BufferUse,
    ParameterUse,
    StageInput,
    StageOutput,
    StageProgram,
    ValueSpec,
)


def assemble(analysis: DagAnalysis, cuts: Sequence[int]) -> tuple[StageProgram, ...]:
    """Return one program for each segment of the node list between cuts.

    Parameters
    ----------
    analysis : DagAnalysis
    cuts : ascending positions; stage s holds the nodes from cut s-1 up to cut s.
    """
    return _Assembler(analysis, cuts).programs()


class _Assembler:
    def __init__(self, analysis: DagAnalysis, cuts: Sequence[int]) -> None:
        self.analysis = analysis
        self.dag: OperatorDag = analysis.dag
        self.cuts = list(cuts)
        self.num_stages = len(self.cuts) + 1
        self.specs = {spec.name: spec for spec in self.dag.inputs}
        self.readers: dict[str, set[int]] = {}
        self.checks = [node.name for node in self.dag.nodes if node.op in CHECKS]

    def stage_of(self, name: str) -> int:
        return bisect_right(self.cuts, self.analysis.position[name])

    def programs(self) -> tuple[StageProgram, ...]:
        # From the last stage to the first: what a stage must put out is what later ones read.
        members = {stage: self._members(stage) for stage in reversed(range(self.num_stages))}
        owners = self._owners(members)
        return tuple(
            self._program(stage, members[stage], owners) for stage in range(self.num_stages)
        )

    def _members(self, stage: int) -> set[str]:
        """Collect the nodes a stage runs: its own that something needs, and cheap ones before.

        Checks of values are needed by nobody, and run.
        """
        wanted = [name for name in self.readers if self.stage_of(name) == stage]
        if self.stage_of(self.dag.loss) == stage:
            wanted.append(self.dag.loss)
        for storage, writers in self.analysis.writers.items():
            if storage.startswith("b."):
                wanted += [node.name for node in writers if self.stage_of(node.name) == stage]
        wanted += [name for name in self.checks if self.stage_of(name) == stage]
        members: set[str] = set()
        seen: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name in members:
                continue
            if name not in self.analysis.position:
                if name not in seen:  # a batch's tensor, a parameter: whoever reads it sees writes
                    seen.add(name)
                    wanted.extend(self._writers(name, stage))
                continue
            if self.stage_of(name) != stage and name not in self.analysis.free_of_parameters:
                self.readers.setdefault(name, set()).add(stage)
                continue
            members.add(name)
            wanted.extend(self._node(name).references())
            wanted.extend(self._writers(name, stage))
        return members

    def _writers(self, value: str, stage: int) -> list[str]:
        """Name the nodes that write a value's memory before or in a stage."""
        writers = self.analysis.companions(value)
        return [node.name for node in writers if self.stage_of(node.name) <= stage]

    def _node(self, name: str) -> Node:
        return self.dag.nodes[self.analysis.position[name]]

    def _owners(self, members: dict[int, set[str]]) -> dict[str, int]:
        """Give every parameter, by name, and buffer, by value, to the first stage that uses it."""
        owners: dict[str, int] = {}
        for stage in range(self.num_stages):
            for name in members[stage]:
                for reference in self._node(name).references():
                    parameter = self.analysis.parameter_uses.get(reference)
                    owners.setdefault(parameter.name if parameter else reference, stage)
        return owners

    def _program(self, stage: int, members: set[str], owners: dict[str, int]) -> StageProgram:
        nodes = [node for node in self.dag.nodes if node.name in members]
        references = list(dict.fromkeys(name for node in nodes for name in node.references()))
        inputs = [StageInput(self.specs[name]) for name in references if name in self.specs]
        inputs += [
            self._boundary_input(name, stage)
            for name in references
            if name in self.analysis.position and name not in members
        ]
        return StageProgram(
            stage=stage,
            num_stages=self.num_stages,
            symbols=tuple(symbol.name for symbol in self.dag.symbols),
            inputs=tuple(inputs),
            outputs=self._outputs(stage),
            parameters=self._parameter_uses(references, owners),
            buffers=self._buffer_uses(references, owners),
            constants=tuple(c for c in self.dag.constants if c.name in references),
            nodes=tuple(nodes),
            loss=self.dag.loss if self.stage_of(self.dag.loss) == stage else None,
            numbers=tuple(name for name in self.dag.numbers if name in references),
        )

    def _value(self, name: str) -> ValueSpec:
        ((dtype, shape),) = self.dag.info[name].outputs
        return ValueSpec(name, dtype, shape)

    def _boundary_input(self, name: str, stage: int) -> StageInput:
        later = [reader for reader in sorted(self.readers[name]) if reader > stage]
        differentiable = name in self.analysis.differentiable
        return StageInput(
            self._value(name),
            source=self.stage_of(name),
            gradient_from=later[0] if later and differentiable else None,
            differentiable=differentiable,
        )

    def _outputs(self, stage: int) -> tuple[StageOutput, ...]:
        names = [name for name in self.readers if self.stage_of(name) == stage]
        return tuple(
            StageOutput(
                self._value(name),
                tuple(sorted(self.readers[name])),
                differentiable=name in self.analysis.differentiable,
            )
            for name in sorted(names, key=self.analysis.position.__getitem__)
        )

    def _parameter_uses(
        self, references: Sequence[str], owners: dict[str, int]
    ) -> tuple[ParameterUse, ...]:
        uses = []
        for name in references:
            parameter = self.analysis.parameter_uses.get(name)
            if parameter is not None:
                uses.append(
                    ParameterUse(
                        name,
                        parameter.name,
                        parameter.dtype,
                        parameter.shape,
                        parameter.trainable,
                        owners[parameter.name],
                        parameter.strides,
                    )
                )
        return tuple(uses)

    def _buffer_uses(
        self, references: Sequence[str], owners: dict[str, int]
    ) -> tuple[BufferUse, ...]:
        by_value = {buffer_value(buffer.name): buffer for buffer in self.dag.buffers}
        return tuple(
            BufferUse(name, b.name, b.dtype, b.shape, b.mutated, owners[name], b.strides)
            for name in references
            if (b := by_value.get(name)) is not None
        )
