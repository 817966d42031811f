"""Makes sure that a decoder's operators look at each token by itself, all but attention.

A worker computes tokens of many sessions in one row. An operator that sums, sorts, shifts or convolves
over that row mixes sessions, and so does a position that is counted from the row's beginning. The
first is refused by name; the second is put right: positions are an input of every decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dagflow.errors import CaptureFailed
from dagflow.graph.attention_capture import REMEDY
from dagflow.graph.dag import OperatorDag, OperatorInfo, input_value
from dagflow.graph.data_sizes import is_of_data
from dagflow.graph.evaluation import forms_of, live_values
from dagflow_tasks.kernels.attention import ATTEND
from dagflow_tasks.program.nodes import Node, argument_references

_POSITIONS = input_value("positions")
# Over which dimensions they compute is their second argument; without it over all.
# fmt: off
_REDUCTIONS = frozenset((
    "sum", "mean", "prod", "amax", "amin", "max", "min", "var", "std", "logsumexp", "norm",
    "linalg_vector_norm", "any", "all", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp",
    "softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "sort", "argsort", "topk",
    "argmax", "argmin", "median", "flip", "roll", "diff",
))
_OVER_ROWS = frozenset((
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "lstm", "gru", "rnn_tanh",
    "rnn_relu", "group_norm", "instance_norm", "fft_fft", "fft_rfft", "fft_irfft",
    "constant_pad_nd", "pad", "scaled_dot_product_attention", "unfold", "avg_pool1d", "max_pool1d",
))
_PICKS = frozenset(("select", "slice", "narrow", "index_select"))
_ARITHMETIC = frozenset((
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "pow", "remainder", "fmod",
    "clamp", "clamp_min", "clamp_max", "gt", "ge", "lt", "le", "eq", "ne", "scalar_tensor",
))
_PRODUCTS = frozenset(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"))
# fmt: on


_Forms = Mapping[str, tuple[str, tuple[Any, ...]]]


def check_tokenwise(dag: OperatorDag) -> None:
    """Refuse a decoder that looks at other tokens by anything but attention.

    Raises
    ------
    CaptureFailed
        Names the module, the operator and the line.
    """
    tokens = dag.inputs[0].shape[1]
    if not isinstance(tokens, str):
        raise CaptureFailed(
            f"The model fixes the number of tokens to {tokens}: it goes through them one by one, or "
            f"makes a tensor of that size. What to do: {REMEDY}"
        )
    least = next(s.minimum for s in dag.symbols if s.name == tokens)
    if least > 2:
        raise CaptureFailed(
            f"The model was captured for {least} tokens and more; a decoder computes one at a time. "
            f"What to do: {REMEDY}"
        )
    live, forms = live_values(dag), forms_of(dag)
    for node in dag.nodes:
        if node.name in live and node.op != ATTEND:
            reason = _mixes(dag, forms, node, tokens)
            if reason:
                raise _refusal(dag, node, reason)
    missing = [name for name in ("tokens", "rows") if input_value(name) not in live]
    if missing:
        raise CaptureFailed(
            f"The model doesn't read {' and '.join(missing)}: its answer can't depend on what it is "
            f"asked. What to do: {REMEDY}"
        )


def _refusal(dag: OperatorDag, node: Node, reason: str) -> CaptureFailed:
    return CaptureFailed(
        f"Module {node.module or 'the model itself'!r} {reason}, and a decoder looks at each token by "
        f"itself, all but its attention. Operator: {node.op}. Source: {dag.info[node.name].source}. "
        f"What to do: {REMEDY}"
    )


def _mixes(dag: OperatorDag, forms: _Forms, node: Node, tokens: str) -> str:
    """Return in what way an operator looks at several tokens; "" if it doesn't."""
    outputs = dag.info[node.name].outputs
    for _, shape in outputs:
        over = [size for size in shape if _mentions(size, tokens)]
        if len(over) > 1:
            return "compares tokens with tokens outside of attention that could be given a cache"
        if over and not _is_multiple(over[0], tokens) and not is_of_data(over[0]):
            return f"shifts, pads or cuts the row of tokens (to {over[0]})"
    name = node.op.split(".")[1] if node.op.startswith("aten.") else node.op
    if name in _ARITHMETIC and any(_is_size(argument, tokens) for argument in node.args):
        return "computes with the number of tokens of a pass, of whatever sessions they are"
    given = _first_shape(forms, node)
    if node.op.endswith(".other"):
        return ""  # of two tensors, element by element
    if given is None or name not in _REDUCTIONS | _OVER_ROWS | _PICKS | _PRODUCTS:
        return ""
    dtype, shape = given
    dims = [dim for dim, size in enumerate(shape) if _mentions(size, tokens)]
    if not dims:
        return ""
    if name in _PRODUCTS:
        return "sums over tokens in a product" if dims[-1] == len(shape) - 1 else ""
    if name in _OVER_ROWS:
        return (
            f"computes {name} over the row of tokens" if dims[-1] >= min(2, len(shape) - 1) else ""
        )
    if name in _PICKS:
        where = int(node.args[1]) % len(shape) if len(node.args) > 1 else 0
        index = {*argument_references(node.args[2])} if len(node.args) > 2 else set()
        kept = bool(outputs) and any(_mentions(size, tokens) for size in outputs[0][1])
        fine = where not in dims or kept or index
        return "" if fine else "takes single tokens out of the row"
    if "int" in dtype or dtype == "bool":
        return ""
    return f"computes {name} over tokens" if set(_reduced(node, len(shape))) & set(dims) else ""


_PRODUCTS = frozenset(["linear", "matmul", "mm", "bmm", "addmm", "baddbmm"])


def _first_shape(forms: _Forms, node: Node) -> tuple[str, tuple[Any, ...]] | None:
    at = 1 if node.op.split(".")[1:2] in (["addmm"], ["baddbmm"]) else 0
    if len(node.args) <= at:
        return None
    return forms.get(next(argument_references(node.args[at]), ""))


def _reduced(node: Node, count: int) -> Iterator[int]:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    name = node.op.split(".")[1]
    if name in ("topk", "norm", "linalg_vector_norm", "roll"):
        given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
    if name in ("sort", "argsort") and not isinstance(given, int):
        given = -1
    dims = [given] if isinstance(given, int) else given
    if not dims or not all(isinstance(dim, int) for dim in dims):
        yield from range(count)
        return
    yield from (dim % count for dim in dims)


def _is_size(argument: Any, tokens: str) -> bool:
    return isinstance(argument, Mapping) and _mentions(argument.get("size"), tokens)


def _mentions(size: Any, tokens: str) -> bool:
    if isinstance(size, (list, tuple)):
        return any(_mentions(part, tokens) for part in size[1:])
    return bool(size == tokens)


def _is_multiple(size: Any, tokens: str) -> bool:
    return size == tokens or (
        isinstance(size, (list, tuple))
        and size[0] == "mul"
        and sum(part == tokens for part in size[1:]) == 1
        and all(part == tokens or isinstance(part, int) for part in size[1:])
    )


def take_positions(dag: OperatorDag) -> OperatorDag:
    """Return a DAG in which positions that are counted from the row's beginning are the input's.

    Raises
    ------
    CaptureFailed
        If it can't be told what is counted.
    """
    tokens = dag.inputs[0].shape[1]
    live, forms = live_values(dag), forms_of(dag)
    counted = [n for n in dag.nodes if n.name in live and _counts(dag, forms, n, tokens)]
    replaced = [node for node in counted if _is_position(dag, forms, node, tokens, live)]
    for node in replaced:
        if not _begins_at_zero(node, tokens):
            raise _refusal(dag, node, "counts tokens' positions by itself")
        dag = _replaced(dag, node, tokens)
    return dag


def _counts(dag: OperatorDag, forms: _Forms, node: Node, tokens: str) -> bool:
    """Tell whether an operator counts tokens, or takes a table's first rows for them."""
    shapes = [shape for _, shape in dag.info[node.name].outputs]
    if not any(_mentions(size, tokens) for shape in shapes for size in shape):
        return False
    if node.op.startswith(("aten.arange.", "aten.linspace.", "aten.logspace.")):
        return True
    given = _first_shape(forms, node)
    if node.op.startswith("aten.cumsum.") and given is not None and "int" in given[0]:
        dim = node.args[1] % len(given[1])
        return _mentions(given[1][dim], tokens)
    return (
        node.op == "aten.slice.Tensor"
        and given is not None
        and not any(_mentions(size, tokens) for size in given[1])
    )


def _begins_at_zero(node: Node, tokens: str) -> bool:
    if node.op == "aten.slice.Tensor":
        return node.args[2:3] in ((), (0,), (None,)) and node.args[4:5] in ((), (1,))
    numbers = [a for a in node.args if not (isinstance(a, Mapping) and a.get("size") == tokens)]
    return node.op.startswith("aten.arange.") and all(
        number == expected for number, expected in zip(numbers, (0, 1), strict=False)
    )


def _is_position(
    dag: OperatorDag, forms: _Forms, counted: Node, tokens: str, live: set[str]
) -> bool:
    """Tell whether what is counted says where a token is, rather than which of the row's it is.

    A position looks something up in a table, or is computed with; the other is an index into
    what was computed of the row's tokens, as mixtures of experts have it.
    """
    if counted.op == "aten.slice.Tensor":
        return True
    following = {counted.name}
    for node in dag.nodes:
        if node.name not in live or node.name == counted.name:
            continue
        names = list(node.references())
        if not following & set(names):
            continue
        op = node.op.split(".")[1] if node.op.startswith("aten.") else node.op
        if op in ("index", "index_select", "gather", "take_along_dim"):
            source = names[0]
            if source in following:
                following.add(node.name)
            elif not any(_mentions(size, tokens) for size in forms[source][1]):
                return True
        elif op in ("index_put", "index_put_", "index_add", "index_add_", "scatter", "scatter_add"):
            continue
        elif op == "embedding":
            return True
        else:
            following.add(node.name)
            dtype = dag.info[node.name].outputs[0][0] if dag.info[node.name].outputs else ""
            if "float" in dtype:
                return True
    return False


def _replaced(dag: OperatorDag, node: Node, tokens: str) -> OperatorDag:
    """Return the DAG with the tokens' positions in place of what counts them."""
    ((dtype, shape),) = dag.info[node.name].outputs
    row = f"{node.name}__positions"
    reads = Node(row, "aten.select.int", ({"ref": _POSITIONS}, 0, 0), {}, False, True, node.module)
    info = dict(dag.info)
    source = info[node.name].source
    info[row] = OperatorInfo((("int64", (tokens,)),), 0, 0, source)
    op: str = "aten.to.dtype"
    arguments: tuple[Any, ...] = ({"ref": row}, {"dtype": dtype})
    if node.op == "aten.slice.Tensor":
        dim = node.args[1] if len(node.args) > 1 else 0
        op, arguments = "aten.index_select.default", (node.args[0], dim, {"ref": row})
    instead = Node(node.name, op, arguments, {}, node.grad, node.autocast, node.module)
    info[node.name] = OperatorInfo(((dtype, shape),), 0, 0, source)
    nodes = [part for n in dag.nodes for part in ([reads, instead] if n is node else [n])]
    return replace(dag, nodes=tuple(nodes), info=info)
