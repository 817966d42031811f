"""What divides the parts of a loss, read off the operator DAG.

From the loss backwards, through operators that are linear, this finds what divides it: rows, targets
that count, their classes' weights, a mask's sum, or nothing. It also finds losses that are no sum
over rows, whatever they are divided by: of those a first batch may say nothing (a hinge of a mean
that is active, a mask that is full, classes that are balanced), and a later one be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import buffer_value
from dagflow.graph.flops import is_view
from dagflow.microbatches.loss_parts import (
    FIXED,
    ROWS,
    Factor,
    Part,
    Size,
    Targets,
    Term,
    Whole,
    times,
)
from dagflow_tasks.program.nodes import Node, dtype_of
from dagflow_tasks.program.operators import WHOLE, draws_random_numbers, schema_of

_MEAN, _SUM = 1, 2
# Where operators of a loss function come from that is no module.
_WRAPPER = "dagflow/graph/loss.py"
_IGNORE_INDEX = -100

_CROSS_ENTROPIES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"})
# fmt: off
# What hands a loss on, but for a constant factor.
_PASSED_ON = frozenset([
    "to", "_to_copy", "clone", "alias", "detach", "neg", "view", "reshape", "squeeze", "unsqueeze",
    "contiguous", "flatten", "stack", "cat", "nan_to_num", "getitem",
])
# Linear in each tensor: where one of them holds what rows have been summed to, so does the result.
_LINEAR_IN_EACH = frozenset([
    "where", "masked_fill", "index", "index_select", "gather", "repeat", "roll", "flip", "diag",
    "diagonal", "trace", "tril", "triu", "cumsum", "linear", "matmul", "mm", "mv", "dot", "vdot",
    "inner", "bmm", "einsum", "addmm", "lerp", "split", "chunk", "unbind",
])
# Of rows, these are neither sums nor means.
_NO_SUMS = frozenset([
    "nanmean", "max", "min", "amax", "amin", "aminmax", "prod", "logsumexp", "median", "nanmedian",
    "quantile", "nanquantile", "kthvalue", "mode", "std", "var", "std_mean", "var_mean", "norm",
    "linalg_vector_norm", "linalg_matrix_norm", "linalg_norm",
])
# Whole numbers that are places in a tensor, and so never an index that is ignored.
_PLACES = frozenset(["argmax", "argmin", "argsort", "topk", "sort", "max", "min"])
# fmt: on
_CONTRACTIONS = frozenset({"dot", "vdot", "einsum", "matmul", "inner", "mv", "mm"})
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
_SCALING = frozenset({"neg", "to", "_to_copy", "clone", "contiguous"})


class LossReader:
    """Walks from the loss backwards, and finds what divides it.

    Attributes
    ----------
    obstacle : str
        After `loss`: why the loss isn't a sum of its micro-batches' losses, as a sentence, or "".
    """

    def __init__(self, analysis: DagAnalysis) -> None:
        self.analysis = analysis
        self.dag = analysis.dag
        self.obstacle = ""
        self._found: dict[str, tuple[Term, ...]] = {}
        self._parts: dict[str, list[Part]] = {}
        self.by_name = {node.name: node for node in self.dag.nodes}
        self.given = {spec.name for spec in self.dag.inputs} | {c.name for c in self.dag.constants}
        self.given |= {buffer_value(b.name) for b in self.dag.buffers if not b.mutated}
        self.rows = {symbol.name for symbol in self.dag.symbols if symbol.dim == 0}
        self.of_batch = {node.name for node in self.dag.nodes if node.op == WHOLE}
        inputs = {spec.name for spec in self.dag.inputs}
        made = {node.name for node in self.dag.nodes if self.rows and self._has_rows(node.name)}
        self.from_batch = analysis.depending_on(inputs | made)
        self.from_rows = analysis.depending_on({n for n in inputs if self._has_rows(n)} | made)

    @cached_property
    def drawn(self) -> set[str]:
        """Values that depend on random numbers: each worker draws its own."""
        draws = {node.name for node in self.dag.nodes if draws_random_numbers(node.op)}
        return self.analysis.depending_on(draws)

    def loss(self) -> tuple[Term, ...]:
        """Return the terms of the loss."""
        terms = self.terms(self.dag.loss)
        self._refuse_uneven_rows()
        return (ROWS,) if self.obstacle else terms

    def terms(self, name: str) -> tuple[Term, ...]:
        """Return what divides the parts of the loss in a value."""
        if name not in self._found:
            # What is divided in place by its own sum is asked for again on the way.
            self._found[name] = (ROWS,)
            found = [
                times(term, part.term)
                for part in self.parts(name)
                for term in ([()] if part.of is None else self.terms(part.of))
            ]
            self._found[name] = tuple(dict.fromkeys(found))
        return self._found[name]

    def parts(self, name: str) -> list[Part]:
        """Return the parts of the loss in a value."""
        if name not in self.from_batch:
            return [Part(name, None, FIXED)]
        if name not in self._parts:
            self._parts[name] = self._read(name) or [Part(name, None, ROWS)]
        return self._parts[name]

    def _read(self, name: str) -> list[Part] | None:
        writers = self.analysis.companions(name)
        if writers:
            return self._written(self.analysis.storage.get(name, name), writers)
        node = self.by_name.get(name)
        return None if node is None else self._made(node)

    def _written(self, root: str, writers: list[Node]) -> list[Part] | None:
        """Return the parts in memory that is written in place: ``loss += more``."""
        node = self.by_name.get(root)
        if node is None:
            return None
        found: list[Part] | None = []
        if short_name(node.op) not in _ZEROS:
            found = self._made(node)
        for writer in writers:
            op = short_name(writer.op)
            other = writer.args[1] if len(writer.args) > 1 else None
            if found is None or op not in ("add_", "sub_", "mul_", "div_"):
                return None
            if op in ("mul_", "div_"):
                found = self._divided(writer, found, other, 1 if op == "div_" else -1)
            elif isinstance(other, Mapping) and "ref" in other:
                found = [*found, Part(writer.name, other["ref"])]
        return found

    def _made(self, node: Node) -> list[Part] | None:
        """Return the parts in what an operator makes; None where nothing is known of them."""
        op, tensors = short_name(node.op), list(node.references())
        reduction = _argument(node, "reduction")
        if op in _CROSS_ENTROPIES:
            return self._cross_entropy(node)
        if reduction in (_MEAN, _SUM):
            self._refuse_statistics(node, tensors)
            return None if reduction == _MEAN else [Part(node.name, None)]
        if op in ("sum", "mean", "nansum"):
            return self._reduction(node, op, tensors[0])
        if op in _PASSED_ON or (
            (op == "select" or is_view(node.op)) and not self._has_rows(tensors[0])
        ):
            return [Part(node.name, tensor) for tensor in tensors]
        if op in ("add", "sub", "rsub"):
            return [Part(node.name, tensor) for tensor in tensors]
        if op in ("mul", "div"):
            return self._product(node, -1 if op == "mul" else 1)
        return self._other(node, op, tensors)

    def _reduction(self, node: Node, op: str, over: str) -> list[Part]:
        if not self._has_rows(over):
            return [Part(node.name, over)]
        if self._has_rows(node.name):
            return [Part(node.name, None, ROWS)]
        scaled = self._scaled(over)
        return [Part(node.name, None, times(ROWS, scaled) if op == "mean" else scaled)]

    def _scaled(self, name: str) -> Term:
        """Return the factors by which rows are scaled before they are added up.

        Such as ``(e * (mask / mask.sum())).sum()``.
        """
        node = self.by_name.get(name)
        if node is None or self.analysis.companions(name):
            return ()
        op, tensors = short_name(node.op), list(node.references())
        if op in _SCALING or is_view(node.op):
            return self._scaled(tensors[0])
        if op not in ("mul", "div"):
            return ()
        found: Term = ()
        for place, argument in enumerate(node.args[:2]):
            tensor = argument.get("ref") if isinstance(argument, Mapping) else None
            if tensor is None:
                continue
            power = 1 if place and op == "div" else -1
            if tensor in self.of_batch and not self._shape(tensor):
                found += ((Whole(tensor), power),)
            elif self.is_statistic(tensor):
                self.refuse(node, "scales rows by what the batch has been summed up to")
                return ()
            elif power < 0:
                found += self._scaled(tensor)
        return found

    def adds_up(self, name: str) -> bool:
        """Tell whether the batch's value is known to be the sum of its micro-batches'."""
        node = self.by_name.get(name)
        while node is not None and short_name(node.op) in _SCALING - {"neg"}:
            node = self.by_name.get(next(iter(node.references())))
        if node is None or short_name(node.op) not in ("sum", "count_nonzero"):
            return False
        return self._has_rows(next(iter(node.references())))

    def _other(self, node: Node, op: str, tensors: list[str]) -> list[Part] | None:
        """Return the parts in what an operator makes that isn't one of those that hand a loss on."""
        held = [t for t in tensors if self.is_statistic(t) and not self.is_known(t)]
        moving = [t for t in tensors if t in self.from_rows]
        if held and op in _LINEAR_IN_EACH and len(moving) == 1:
            return [Part(node.name, held[0])]
        if held:
            self.refuse(node, "isn't linear in what has been summed or averaged over rows")
        elif op in _NO_SUMS and any(self._holds_loss({"ref": t}) for t in tensors):
            self.refuse(node, "is neither a sum nor a mean over rows")
        elif op in _CONTRACTIONS and len(moving) == len(tensors) == 2 and self.rows:
            return None if self._has_rows(node.name) else [Part(node.name, None)]
        return None

    def _cross_entropy(self, node: Node) -> list[Part] | None:
        target, weight = _argument(node, "target"), _argument(node, "weight")
        reduction = _argument(node, "reduction", _MEAN)
        self._refuse_statistics(node, list(node.references()))
        if reduction == _SUM:
            return [Part(node.name, None)]
        if reduction != _MEAN or self._dtype(target["ref"]).is_floating_point:
            return None
        ignored = _argument(node, "ignore_index", _IGNORE_INDEX)
        if isinstance(ignored, Mapping):
            ignored = _hashable(ignored["size"])
        if (
            weight is None
            and isinstance(ignored, int)
            and ignored < 0
            and self._are_places(target["ref"])
        ):
            return None
        names = [target["ref"], *([weight["ref"]] if weight is not None else [])]
        for name in names:
            if not self.is_known(name):
                what = "targets" if name == names[0] else "class weights"
                self.refuse(node, f"divides by {what} that {self._how(name)}", name)
        if not all(map(self.is_known, names)):
            return None
        targets = Targets(names[0], ignored, names[1] if len(names) > 1 else None)
        return [Part(node.name, None, ((targets, 1),))]

    def _are_places(self, name: str) -> bool:
        """Tell whether targets are such as argmax makes, of which all count."""
        node = self.by_name.get(name)
        if node is None:
            return False
        op = short_name(node.op)
        if op in _PLACES:
            return True
        handed_on = op in _SCALING - {"neg"} or op in ("detach", "getitem") or is_view(node.op)
        return handed_on and self._are_places(next(iter(node.references())))

    def _product(self, node: Node, power: int) -> list[Part] | None:
        """Return the parts in a quotient by, or a product with, what isn't part of the loss."""
        first, second = node.args[0], node.args[1]
        if power < 0 and not self._holds_loss(first):
            first, second = second, first  # a * b is b * a
        if not self._holds_loss(first):
            if self._holds_loss(second):
                self._divided(node, [], second, power)
            return None
        return self._divided(node, [Part(node.name, first["ref"])], second, power)

    def _divided(self, node: Node, parts: list[Part], second: Any, power: int) -> list[Part] | None:
        """Return parts that are divided by an operator's second argument, or multiplied with it."""
        if "rounding_mode" in node.kwargs:
            return None
        if self._holds_loss(second):
            if self.is_statistic(second["ref"]):
                doing = "multiplies by" if power < 0 else "divides by"
                self.refuse(node, f"{doing} numbers that {self._how(second['ref'])}", second["ref"])
            return None
        if not isinstance(second, Mapping):
            return parts
        factor: Factor
        if "size" in second:
            factor = Size(_hashable(second["size"]))
        elif second.get("ref") in self.of_batch and not self._shape(second["ref"]):
            factor = Whole(second["ref"])
        elif self._is_constant(second["ref"]):
            return parts
        else:
            if self.is_statistic(second["ref"]):
                self.refuse(node, "uses different statistics of the batch for parts of the loss")
            return None
        return [replace(part, term=times(part.term, ((factor, power),))) for part in parts]

    def _refuse_statistics(self, node: Node, tensors: list[str]) -> None:
        if any(map(self.is_statistic, tensors)):
            self.refuse(node, "is given what has been summed or averaged over rows")

    def _is_constant(self, name: str) -> bool:
        """Tell whether all micro-batches have the same: no batch is in it, or what has no rows of it."""
        return name not in self.from_batch or (self.is_known(name) and name not in self.from_rows)

    def _refuse_uneven_rows(self) -> None:
        """Refuse rows that are given more numbers than `batch_numbers` takes: means by position, say."""
        for name in self.analysis.needed_for([self.dag.loss]):
            node = self.by_name[name]
            if not (self.is_known(name) and self._has_rows(name)):
                continue
            if any(map(self.is_statistic, node.references())):
                self.refuse(
                    node,
                    "gives rows what the whole batch has been summed up to",
                    remedy="take such numbers from the whole data set",
                )

    def _how(self, name: str) -> str:
        return "the model draws at random" if self._is_only_drawn(name) else "the model computes"

    def _is_only_drawn(self, name: str) -> bool:
        return name in self.drawn and name in self.analysis.free_of_parameters

    def refuse(self, node: Node, what: str, cause: str = "", remedy: str = "") -> None:
        """Note why no weights are right, if nothing else has been noted."""
        source = self.dag.info[node.name].source or "source unknown"
        where = "in the loss function" if _WRAPPER in source else source
        if self._is_only_drawn(cause):
            remedy = "draw masks and targets where the data is made"
        remedy = remedy or "make the loss a sum or a mean over rows or targets"
        self.obstacle = self.obstacle or (
            f"The batch's loss isn't the sum of its micro-batches' losses: {short_name(node.op)} "
            f"({where}) {what}. Training would follow another loss than the model's. What to do: "
            f"train with num_microbatches=1, or {remedy}."
        )

    def is_statistic(self, name: str) -> bool:
        """Tell whether a value is made of rows, and has none."""
        return name in self.from_rows and not self._has_rows(name)

    def _holds_loss(self, argument: Any) -> bool:
        """Tell whether an argument depends on the batch and on parameters or draws."""
        name = argument.get("ref") if isinstance(argument, Mapping) else None
        return name in self.from_batch and name in self.by_name and not self.is_known(name)

    def is_known(self, name: str) -> bool:
        """Tell whether a value can be computed from the batch alone."""
        free = name in self.analysis.free_of_parameters or name in self.given
        return free and name not in self.drawn

    def _dtype(self, name: str) -> torch.dtype:
        if name in self.by_name:
            return dtype_of(self.dag.info[name].outputs[0][0])
        return next((dtype_of(s.dtype) for s in self.dag.inputs if s.name == name), torch.int64)

    def _shape(self, name: str) -> tuple[Any, ...]:
        if name in self.by_name:
            outputs = self.dag.info[name].outputs
            return outputs[0][1] if outputs else ()
        return next((spec.shape for spec in self.dag.inputs if spec.name == name), ())

    def _has_rows(self, name: str) -> bool:
        """Tell whether a value grows with the batch; a scalar doesn't."""
        shape = self._shape(name)
        return bool(shape) and (not self.rows or any(_mentions(size, self.rows) for size in shape))


def short_name(op: str) -> str:
    """Return an operator's name without its namespace and overload."""
    return op.split(".")[1] if "." in op else op


def _hashable(expression: Any) -> Any:
    return tuple(map(_hashable, expression)) if isinstance(expression, list) else expression


def _mentions(size: Any, symbols: set[str]) -> bool:
    if isinstance(size, (list, tuple)):
        return any(_mentions(part, symbols) for part in size[1:])
    return size in symbols


def _argument(node: Node, name: str, default: Any = None) -> Any:
    """Return an operator's argument by its formal name."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = schema_of(node.op)
    for position, formal in enumerate(schema.arguments if schema is not None else ()):
        if formal.name == name:
            return node.args[position] if position < len(node.args) else formal.default_value
    return default
