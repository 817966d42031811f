"""Does a batch fit the captured signature? Says precisely why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dagflow.errors import BatchInvalid
from dagflow.graph.dag import Condition, FixedSize, OperatorDag, buffer_value
from dagflow.graph.data_sizes import are_of_data
from dagflow_tasks.program.nodes import Argument, Node, decode_literal, dtype_of
from dagflow_tasks.program.operators import ASSERTIONS, CHECKS, resolve
from dagflow_tasks.program.sizes import evaluate_size, size_text
from dagflow_tasks.program.stage_program import ValueSpec

_META = torch.device("meta")


def match_batch(
    dag: OperatorDag, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any], where: str
) -> tuple[tuple[str, int], ...]:
    """Check a micro-batch against the DAG's inputs and return its sizes by symbol.

    Parameters
    ----------
    dag : OperatorDag
    tensors, constants
        The flattened micro-batch; may hold the DAG's dropped columns, too.
    where : str
        What to call the batch in an error: "step 12".

    Raises
    ------
    BatchInvalid
        If names, dtypes or shapes differ from the captured ones, or the captured operators aren't
        the model's for these sizes.
    """
    wanted = {spec.name.removeprefix("in."): spec for spec in dag.inputs}
    given = {name for name in tensors if not _is_dropped(dag, name)}
    if set(wanted) != given:
        raise BatchInvalid(
            f"The batch of {where} has the tensors {sorted(given)}; the model was captured with "
            f"{sorted(wanted)}. Every batch needs the same names."
        )
    found = {name: value for name, value in constants.items() if not _is_dropped(dag, name)}
    if found != dict(dag.batch_constants):
        raise BatchInvalid(
            f"The batch of {where} has the constants {found}; the model was captured "
            f"with {dict(dag.batch_constants)}. Pass what changes as tensors."
        )
    for name, values in dag.fixed_values.items():
        _match_values(tensors[name], values, f"{name!r} of {where}")
    sizes: dict[str, int] = {}
    for name, spec in wanted.items():
        _match_tensor(sizes, tensors[name], spec, f"{name!r} of {where}", dag.fixed_sizes)
    for name, spec in wanted.items():
        _match_relations(sizes, tensors[name], spec, f"{name!r} of {where}")
    _match_conditions(dag, sizes, where)
    return tuple((symbol.name, sizes[symbol.name]) for symbol in dag.symbols)


def _is_dropped(dag: OperatorDag, name: str) -> bool:
    return name.split(".")[0] in dag.dropped_columns


def _match_values(tensor: torch.Tensor, wanted: Any, what: str) -> None:
    """Check the numbers by which the model's code has decided what the graph is."""
    found = tensor.tolist()
    if found != wanted:
        raise BatchInvalid(
            f"{what} holds {_shortened(found)}; the model was captured with {_shortened(wanted)}. Its code "
            "decides by these numbers, so the graph is right for them alone. What to do: bring all "
            "images to one size in the data loader (resize, or crop and pad), as many in every batch "
            "(drop_last=True). Where images of one batch differ, in the same way in every batch, "
            "num_microbatches=1 keeps them together."
        )


def _shortened(values: Any) -> str:
    text = str(values)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _match_tensor(
    sizes: dict[str, int],
    tensor: torch.Tensor,
    spec: ValueSpec,
    what: str,
    fixed_sizes: Sequence[FixedSize],
) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != spec.dtype or tensor.dim() != len(spec.shape):
        raise BatchInvalid(
            f"{what} is {dtype}{list(tensor.shape)}; the model was captured with "
            f"{spec.dtype} and {len(spec.shape)} dimensions."
        )
    for dim, (size, known) in enumerate(zip(tensor.shape, spec.shape, strict=True)):
        if isinstance(known, str):
            if sizes.setdefault(known, size) != size:
                raise BatchInvalid(
                    f"{what} has size {size} in dimension {dim}, and another tensor "
                    f"{sizes[known]}; the model needs them equal."
                )
        elif isinstance(known, int) and size != known:
            reasons = [f.reason for f in fixed_sizes if (f.input, f.dim) == (spec.name, dim)]
            why = f": {reasons[0]}" if reasons else ". Name the dimension in Config(dynamic=...)."
            raise BatchInvalid(
                f"{what} has size {size} in dimension {dim}; the model was captured with {known}, "
                f"and that size is fixed{why} Or pad or drop such batches "
                "(DataLoader(drop_last=True))."
            )


def _match_relations(
    sizes: Mapping[str, int], tensor: torch.Tensor, spec: ValueSpec, what: str
) -> None:
    for dim, (size, known) in enumerate(zip(tensor.shape, spec.shape, strict=True)):
        if isinstance(known, (int, str)):
            continue
        wanted = evaluate_size(known, sizes)
        if size != wanted:
            raise BatchInvalid(
                f"{what} has size {size} in dimension {dim}; with {_assignment(sizes)} of its other "
                f"sizes the model needs {size_text(known)} = {wanted}."
            )


def _match_conditions(dag: OperatorDag, sizes: Mapping[str, int], where: str) -> None:
    key = tuple(sizes[symbol.name] for symbol in dag.symbols)
    if key not in dag.checked_sizes:
        dag.checked_sizes[key] = _wrong_with(dag, sizes)
    if dag.checked_sizes[key]:
        raise BatchInvalid(f"The sizes of {where} don't fit: {dag.checked_sizes[key]}")


def _wrong_with(dag: OperatorDag, sizes: Mapping[str, int]) -> str:
    """Say why the captured operators aren't the model's for these sizes; "" if they are."""
    unmet = [c for c in dag.conditions if not _holds(c, sizes)]
    for condition in unmet:
        if condition.source:
            return (
                f"the model was captured where {size_text(condition.expression)} "
                f"({', '.join(f'{s.name} = {s.hint}' for s in dag.symbols)}), which "
                f"{condition.source} decides by; now {_assignment(sizes)}. A graph holds one branch: "
                "pad or crop batches so that the line decides alike, or write it with operations "
                "on tensors (a mask), or without int() of a float (T * 4 // 5 for int(T * 0.8))."
            )
    for symbol in dag.symbols:
        size = sizes[symbol.name]
        if size < symbol.minimum or (symbol.maximum is not None and size > symbol.maximum):
            upper = "any size" if symbol.maximum is None else str(symbol.maximum)
            return (
                f"{symbol.input.removeprefix('in.')!r} has size {size} in dimension {symbol.dim}; "
                f"the captured operators are right for {symbol.minimum} to {upper}."
            )
    return _other_shape(dag, sizes) if unmet else ""


def _holds(condition: Condition, sizes: Mapping[str, int]) -> bool:
    try:
        return bool(evaluate_size(condition.expression, sizes))
    except ArithmeticError:  # a size that another one is divided by is 0
        return False


def _assignment(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def _other_shape(dag: OperatorDag, sizes: Mapping[str, int]) -> str:
    """Run the operators on tensors without data; name the first whose result has another shape."""
    values: dict[str, Any] = {}
    for spec in dag.inputs:
        values[spec.name] = _empty(spec.dtype, spec.shape, sizes)
    for parameter in dag.parameters:
        values |= {use: _empty(parameter.dtype, parameter.shape, sizes) for use in parameter.uses}
    for buffer in dag.buffers:
        values[buffer_value(buffer.name)] = _empty(buffer.dtype, buffer.shape, sizes)
    values |= {c.name: _empty(c.dtype, c.shape, sizes) for c in dag.constants}
    for node in dag.nodes:
        if node.op in ASSERTIONS | CHECKS:
            continue
        outputs = dag.info[node.name].outputs
        if are_of_data(outputs) or any(
            are_of_data(dag.info[name].outputs) for name in node.references() if name in dag.info
        ):
            # How many rows there are isn't known, and puts no limits to other sizes.
            found = [_empty(dtype, shape, sizes) for dtype, shape in outputs]
            values[node.name] = found[0] if len(found) == 1 else found
            continue
        wrong = ""
        try:
            values[node.name] = _call(node, values, sizes)
        except Exception as error:
            wrong = f"can't be computed ({type(error).__name__}: {error})"
        else:
            shapes = _shapes(values[node.name])
            wanted = [tuple(evaluate_size(size, sizes) for size in shape) for _, shape in outputs]
            if shapes != wanted:
                wrong = f"has shape {shapes}, and was taken to have {wanted}"
        if wrong:
            return (
                f"for {_assignment(sizes)} the result of {node.op} in module "
                f"{node.module or 'the model itself'!r} ({dag.info[node.name].source}) {wrong}. "
                "Pad or drop such batches."
            )
    return ""


@torch.no_grad()
def _call(node: Node, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    def filled(argument: Argument) -> Any:
        if isinstance(argument, Mapping):
            if "ref" in argument:
                return values[argument["ref"]]
            return decode_literal(argument, sizes, _META)
        if isinstance(argument, (list, tuple)):
            return [filled(item) for item in argument]
        return argument

    keywords = {name: filled(argument) for name, argument in node.kwargs.items()}
    return resolve(node.op)(*(filled(argument) for argument in node.args), **keywords)


def _empty(dtype: str, shape: tuple[Any, ...], sizes: Mapping[str, int]) -> torch.Tensor:
    concrete = [evaluate_size(size, sizes) for size in shape]
    return torch.empty(concrete, dtype=dtype_of(dtype), device=_META)


def _shapes(value: Any) -> list[tuple[int, ...]]:
    values = [value] if isinstance(value, torch.Tensor) else list(value or ())
    return [tuple(tensor.shape) for tensor in values if isinstance(tensor, torch.Tensor)]
