"""What forward writes besides its result: buffers, parameters, tensors that are neither.

A buffer that forward assigns (``self.mean = 0.9 * self.mean + ...``) becomes one that is written in
place. Writes into parameters are done to a stage's weights once a step, and must be computable there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from dagflow.errors import CaptureFailed
from dagflow.graph.dag import OperatorDag, OperatorInfo
from dagflow_tasks.program.nodes import Argument, Node, argument_references, mentions_size
from dagflow_tasks.program.operators import draws_random_numbers, mutated_arguments, storages
from dagflow_tasks.program.writes import parameter_writes

_COPY = "aten.copy_.default"


@contextmanager
def written_in_place(model: torch.nn.Module) -> Iterator[None]:
    """While a model is traced: at the end, copy what was assigned to buffers into these.

    Raises
    ------
    CaptureFailed
        If a buffer is given another shape or dtype, or none: a stage's state has a fixed form.
    """
    before = [
        (path, module, name, buffer)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
        for path, module, name, buffer in before:
            assigned = module._buffers.get(name)
            if assigned is buffer:
                continue
            if not _fits(assigned, buffer):
                raise CaptureFailed(_says(path, name, buffer, assigned))
            with torch.no_grad():
                buffer.copy_(assigned)
    finally:
        for _, module, name, buffer in before:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer


def _fits(assigned: torch.Tensor | None, buffer: torch.Tensor) -> bool:
    return (
        assigned is not None
        and assigned.dtype == buffer.dtype
        and assigned.dim() == buffer.dim()
        and all(
            isinstance(new, int) and new == old
            for new, old in zip(assigned.shape, buffer.shape, strict=True)
        )
    )


def _says(path: str, name: str, buffer: torch.Tensor, assigned: torch.Tensor | None) -> str:
    found = f"{assigned.dtype}{list(assigned.shape)}" if assigned is not None else "None"
    return (
        f"Module {path or 'the model itself'!r} assigns its buffer {name!r} in forward, and what was "
        f"{buffer.dtype}{list(buffer.shape)} becomes {found}. Buffers are a stage's state and keep "
        "their form. What to do: give the buffer its final shape and dtype in __init__, or call the "
        "model once on a batch before, if it is a table that the first call makes."
    )


def early(nodes: Sequence[Node]) -> list[Node]:
    """Move the copies into buffers forward, to where their values are known.

    They are traced last, and a buffer's readers and writers are never cut apart.
    """
    root = storages(nodes)
    read = {name for node in nodes for name in node.references()}
    ordered: list[Node] = []
    for node in nodes:
        place = len(ordered)
        if node.op == _COPY and node.name not in read and _buffer(node):
            place = 1 + max(
                (i for i, other in enumerate(ordered) if _comes_before(other, node, root)),
                default=-1,
            )
        ordered.insert(place, node)
    return ordered


def _buffer(node: Node) -> bool:
    return _target(node).startswith("b.")


def _target(node: Node) -> str:
    return next(iter(argument_references(node.args[0])), "")


def read_from_copies(
    nodes: Sequence[Node], trained: Collection[str]
) -> tuple[list[Node], dict[str, str]]:
    """Let all but the assignment use a copy of a buffer that forward assigns, if gradients need it.

    Autograd keeps what it will need of the buffer, and refuses the backward if it has been written
    meanwhile; in torch an assignment leaves the former tensor as it was.

    Parameters
    ----------
    trained
        Uses of the parameters that are trained.

    Returns
    -------
    nodes, copies
        The buffer's value by the name of the node that copies it.
    """
    root = storages(nodes)
    differentiable = set(trained)
    kept: set[str] = set()
    writers: dict[str, list[Node]] = {}
    last: dict[str, Node] = {}
    for node in nodes:
        references = set(node.references())
        if node.grad and not node.op.startswith("aten.detach") and references & differentiable:
            differentiable.add(node.name)
            kept |= {root.get(name, name) for name in references}
        for value in {root.get(name, name) for name in references}:
            last[value] = node
        for name in mutated_arguments(node):
            writers.setdefault(root.get(name, name), []).append(node)
    copies = {
        value: f"copy_of_{value}".replace(".", "_")
        for value, (*_, writer) in writers.items()
        if value in kept and writer is last[value]
        if writer.op == _COPY and _target(writer) == value and value.startswith("b.")
    }
    clones = [Node(name, "aten.clone.default", ({"ref": v},)) for v, name in copies.items()]
    changed = [
        replace(
            node,
            args=tuple(
                argument if node is last.get(_ref(argument)) else _renamed(argument, copies)
                for argument in node.args
            ),
            kwargs={key: _renamed(argument, copies) for key, argument in node.kwargs.items()},
        )
        for node in nodes
    ]
    return [*clones, *changed], {name: value for value, name in copies.items()}


def _ref(argument: Argument) -> str:
    return str(argument.get("ref", "")) if isinstance(argument, Mapping) else ""


def _renamed(argument: Argument, names: Mapping[str, str]) -> Argument:
    if isinstance(argument, Mapping):
        return {"ref": names[_ref(argument)]} if _ref(argument) in names else argument
    return [_renamed(a, names) for a in argument] if isinstance(argument, list) else argument


def _comes_before(other: Node, copy: Node, root: dict[str, str]) -> bool:
    """Tell whether a copy must stay behind another node.

    One that makes or writes what is copied, or reads or writes the memory it is copied to.
    """
    target, source = (root.get(name, name) for name in list(copy.references())[:2])
    touched = {root.get(name, name) for name in (other.name, *other.references())}
    written = {root.get(name, name) for name in mutated_arguments(other)}
    return target in touched or source in written or other.name in copy.references()


def check_writes(dag: OperatorDag) -> None:
    """Refuse writes in place that no stage could keep.

    Raises
    ------
    CaptureFailed
        If a tensor that is neither parameter nor buffer is written, or a parameter with what only
        a forward knows: the batch, random numbers.
    """
    root = storages(dag.nodes)
    fresh = {
        name for n in dag.nodes if n.op.startswith("aten.lift_fresh") for name in n.references()
    }
    for node in dag.nodes:
        for name in mutated_arguments(node):
            storage = root.get(name, name)
            if storage.startswith("c.") and storage not in fresh:
                raise CaptureFailed(
                    "Forward writes into a tensor that is neither parameter nor buffer, so that no "
                    f"stage would keep it. {_place(node, dag.info)} What to do: make it a buffer "
                    "(register_buffer), or clone() it before."
                )
    first = {use: p.uses[0] for p in dag.parameters for use in p.uses}
    written = {b for n in dag.nodes for b in mutated_arguments(n) if b.startswith("b.")}
    for node in parameter_writes(dag.nodes, first):
        unknown = [
            name
            for name in node.references()
            if name.startswith("in.") or name in written or root.get(name, name) in written
        ]
        arguments = [*node.args, *node.kwargs.values()]
        if unknown or draws_random_numbers(node.op) or mentions_size(arguments):
            raise CaptureFailed(
                "Forward writes into a parameter in place what depends on the batch, on random "
                f"numbers or on a buffer that changes ({', '.join(unknown) or node.op}). "
                f"{_place(node, dag.info)} Workers write into parameters once a step, between the "
                "gradients and the update, when nobody has the batch. What to do: apply it to a "
                "copy in forward (functional form), or leave it to the optimizer; nn.Embedding and "
                "nn.EmbeddingBag have max_norm=None."
            )


def check_frozen(dag: OperatorDag) -> None:
    """Refuse writes into parameters that aren't trained: nobody updates them, or sends them.

    Raises
    ------
    CaptureFailed
    """
    frozen = {use: p.name for p in dag.parameters if not p.trainable for use in p.uses}
    root = storages(dag.nodes)
    for node in dag.nodes:
        for name in mutated_arguments(node):
            parameter = frozen.get(root.get(name, name))
            if parameter is not None:
                raise CaptureFailed(
                    f"Forward writes into the parameter {parameter!r}, which isn't trained "
                    f"(requires_grad=False), so that no step keeps it. {_place(node, dag.info)} "
                    "What to do: make it a buffer (register_buffer), as a teacher that follows a "
                    "student is one, or train it."
                )


def written(dag: OperatorDag) -> set[str]:
    """Return the names of the parameters and buffers that forward writes."""
    root = storages(dag.nodes)
    values = {root.get(name, name) for node in dag.nodes for name in mutated_arguments(node)}
    parameters = {p.name for p in dag.parameters if values & set(p.uses)}
    return parameters | {b.name for b in dag.buffers if b.mutated}


def _place(node: Node, info: Mapping[str, OperatorInfo]) -> str:
    module = node.module or "the model itself"
    return (
        f"Module: {module!r}. Source: {info[node.name].source or 'unknown'}. Operator: {node.op}."
    )
