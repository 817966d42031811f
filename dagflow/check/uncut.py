"""Runs an operator DAG whole in this process, on the kernels and in the order of a training stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import OperatorDag
from dagflow.plan.assemble import assemble
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.stage_program import StageOutput, ValueSpec
from dagflow_tasks.train.gradient_sums import total_gradients

Tensors = Mapping[str, torch.Tensor]
Sizes = Mapping[str, int]

Outcome = dict[tuple[str, str], torch.Tensor]
"""What a forward and a backward leave behind: ("loss", ""), ("gradient", name), ("buffer", name),
("parameter", name) for parameters that the forward writes."""


class Uncut:
    """A DAG as one program, with weights; its buffers move on from forward to forward.

    Parameters
    ----------
    parameters, buffers
        The model's, by their first names; neither is written.

    Attributes
    ----------
    numbers : dict
        Values that come with a micro-batch as numbers; to be set where the DAG reads any.
    """

    def __init__(self, dag: OperatorDag, parameters: Tensors, buffers: Tensors) -> None:
        (self.program,) = assemble(DagAnalysis(dag), [])
        self._executable = Executable(self.program, torch.device("cpu"))
        self._loss = str(self.program.loss)
        self._written = self._executable.written_parameters
        self.numbers: Mapping[str, Any] = {}
        self.buffers = buffers
        self._given = parameters, buffers
        self.begin()

    def values(self, tensors: Tensors, sizes: Sizes) -> dict[str, Any]:
        """Run a forward pass, and return what every operator has computed."""
        kept = tuple(StageOutput(ValueSpec(node.name, "", ()), ()) for node in self.program.nodes)
        executable = Executable(replace(self.program, outputs=kept), torch.device("cpu"))
        with torch.no_grad():
            given = self._inputs(tensors, self._leaves(trainable=False))
            return executable.run(given, sizes, RandomAddress(0, 0, 0))

    def begin(self) -> None:
        """Go back to the parameters and buffers that were given."""
        parameters, buffers = self._given
        self._parameters = {n: p.detach() for n, p in parameters.items()}
        self._parameters |= {n: self._parameters[n].clone() for n in self._written}
        self._buffers = {n: b.detach().clone() for n, b in buffers.items()}

    def loss(self, tensors: Tensors, sizes: Sizes) -> float:
        """Run a forward pass without gradients, and return its loss."""
        with torch.no_grad():
            return float(self._forward(tensors, sizes, self._leaves(trainable=False)))

    def run(self, tensors: Tensors, sizes: Sizes, keep: Collection[str] | None) -> Outcome:
        """Run a forward and a backward pass.

        Parameters
        ----------
        tensors, sizes
            A micro-batch by value name, and its sizes.
        keep
            Parameters whose gradients are wanted; None runs no backward.
        """
        with torch.enable_grad():
            leaves = self._leaves(trainable=True)
            loss = self._forward(tensors, sizes, leaves)
            found: Outcome = {("loss", ""): loss.detach()}
            if keep is not None and loss.requires_grad:
                found |= self._gradients(loss, leaves, keep)
        found |= {("buffer", name): buffer.clone() for name, buffer in self._buffers.items()}
        found |= {("parameter", name): self._parameters[name].clone() for name in self._written}
        return found

    def _leaves(self, *, trainable: bool) -> dict[str, torch.Tensor]:
        return {
            use.value: self._parameters[use.parameter]
            .detach()
            .requires_grad_(trainable and use.trainable)
            for use in self.program.parameters
        }

    def _forward(self, tensors: Tensors, sizes: Sizes, leaves: Tensors) -> torch.Tensor:
        given = self._inputs(tensors, leaves)
        loss: torch.Tensor = self._executable.run(given, sizes, RandomAddress(0, 0, 0))[self._loss]
        return loss

    def _inputs(self, tensors: Tensors, leaves: Tensors) -> dict[str, Any]:
        names = set(self.program.batch_inputs)
        buffers = {use.value: self._buffers[use.buffer] for use in self.program.buffers}
        batch = {n: t.detach() for n, t in tensors.items() if n in names}
        return {**batch, **leaves, **buffers, **self.numbers}

    def _gradients(self, loss: torch.Tensor, leaves: Tensors, keep: Collection[str]) -> Outcome:
        wanted = {
            use.value: leaves[use.value]
            for use in self.program.parameters
            if use.trainable and use.parameter in keep
        }
        if wanted:
            torch.autograd.backward(loss, inputs=list(wanted.values()))
        by_use = {n: leaf.grad.to_dense() for n, leaf in wanted.items() if leaf.grad is not None}
        totals = total_gradients(self.program.parameters, [by_use])
        return {("gradient", name): gradient for name, gradient in totals.items()}
