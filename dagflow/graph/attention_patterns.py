"""Finds attention that a model computes by itself, and puts ``dagflow.attend`` in its place.

Many models don't use transformers' attention functions: they multiply queries and keys, scale, mask,
take a softmax and multiply with the values. In the operator DAG that is a pattern. What happens to the
scores in between is found out by computing it: the operators between the product and the softmax
depend on nothing but positions, so they are run on scores that are known, and what comes out says the
scale, which tokens each token sees, and how a bias grows (ALiBi, arXiv 2108.12409). Whatever is none
of these is refused.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dagflow.errors import CaptureFailed
from dagflow.graph.attention_capture import REMEDY
from dagflow.graph.dag import OperatorDag, OperatorInfo
from dagflow.graph.evaluation import LEAST_TOKENS, Evaluation, forms_of
from dagflow_tasks.kernels.attention import ATTEND
from dagflow_tasks.program.nodes import Node, argument_references
from dagflow_tasks.program.stage_program import Constant

_SOFTMAX = ("aten.softmax.int", "aten._softmax.default", "aten._safe_softmax.default")
_PRODUCTS = ("aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default")
_FUSED = "aten.scaled_dot_product_attention.default"
# What hands on a tensor's numbers as they are, in evaluation mode.
# fmt: off
_SAME_NUMBERS = frozenset((
    "dropout", "to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "view",
    "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "float",
))
# fmt: on
# Masks are numbers like -1e4 or the least of a dtype; biases of so few tokens stay far above.
_HIDDEN = -9e3


def capture_patterns(dag: OperatorDag, model: torch.nn.Module) -> OperatorDag:
    """Return a DAG in which attention that was written out is ``dagflow.attend``.

    Raises
    ------
    CaptureFailed
        If what is done to the scores is more than scaling, causal masks, windows and ALiBi.
    """
    rewriting = _Rewriting(dag, model)
    for node in dag.nodes:
        if node.op == _FUSED and rewriting.is_among_tokens(node):
            rewriting.fused(node)
        elif node.op in _SOFTMAX and rewriting.is_over_tokens(node):
            rewriting.written_out(node)
    return rewriting.result()


@dataclass(frozen=True)
class _Scores:
    """What is done to scores before the softmax."""

    scale: float
    window: int
    slopes: torch.Tensor | None


class _Rewriting:
    def __init__(self, dag: OperatorDag, model: torch.nn.Module) -> None:
        self._dag = dag
        self._model = model
        self._nodes = {node.name: node for node in dag.nodes}
        self._users: dict[str, list[Node]] = {}
        for node in dag.nodes:
            for name in dict.fromkeys(node.references()):
                self._users.setdefault(name, []).append(node)
        self._evaluation = Evaluation(dag, model)
        self._tokens = dag.inputs[0].shape[1]
        self._instead: dict[str, list[Node]] = {}
        self._read_already: dict[Hashable, _Scores] = {}
        self._info = dict(dag.info)
        self._forms = forms_of(dag)
        self._constants = list(dag.constants)
        self._number = sum(node.op == ATTEND for node in dag.nodes)

    def result(self) -> OperatorDag:
        if not self._instead:
            return self._dag
        nodes: list[Node] = []
        for node in self._dag.nodes:
            nodes += self._instead.get(node.name, [node])
        return replace(
            self._dag, nodes=tuple(nodes), info=self._info, constants=tuple(self._constants)
        )

    def is_among_tokens(self, fused: Node) -> bool:
        """Tell whether fused attention's sequence is that of tokens, and not one that each has."""
        return bool(self._shape(_name(fused.args[0]))[-2] == self._tokens)

    def is_over_tokens(self, softmax: Node) -> bool:
        shape = self._dag.info[softmax.name].outputs[0][1]
        return shape[-1] == self._tokens and softmax.args[1] in (-1, len(shape) - 1)

    def written_out(self, softmax: Node) -> None:
        product = self._product_before(softmax)
        output = self._product_after(softmax)
        first, second = product.args[1:3] if "baddbmm" in product.op else product.args[0:2]
        self._check_computed(output, first, second, output.args[1])
        (source,) = argument_references(softmax.args[0])
        scores = self._read(softmax, product.name, source)
        new = _Building(self._info, output, self._tokens)
        query = new.heads_first(_name(first))
        key = new.heads_first(new.add("aten.transpose.int", _name(second), -2, -1))
        value = new.heads_first(_name(output.args[1]))
        self._put(new, query, key, value, scores, output)

    def fused(self, node: Node) -> None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        options = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
        options |= {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if options["dropout_p"]:
            raise _unknown(node, "it has dropout")
        width = self._shape(_name(options["query"]))[-1]
        if options["attn_mask"] is not None:
            name = _name(options["attn_mask"])
            scores = self._read(node, "", name)
        elif options["is_causal"]:
            scores = _Scores(1.0, 0, None)
        else:
            raise _unknown(node, "its tokens see those after them")
        given = options["scale"]
        scale = float(given if given is not None else width**-0.5)
        new = _Building(self._info, node, self._tokens)
        self._check_computed(node, *(options[name] for name in names[:3]))
        query, key, value = (new.heads_first(_name(options[name])) for name in names[:3])
        self._put(new, query, key, value, replace(scores, scale=scale), node)

    def _check_computed(self, node: Node, *operands: Any) -> None:
        if not all(_name(operand) in self._nodes for operand in operands):
            raise _unknown(node, "its queries, keys or values aren't computed from tokens")

    def _put(
        self, new: _Building, query: str, key: str, value: str, scores: _Scores, output: Node
    ) -> None:
        for name in (query, key, value):
            if new.shape(name)[2] != self._tokens:
                raise _unknown(output, "it looks at other tokens than its own (cross attention)")
        slopes = None
        if scores.slopes is not None:
            slopes = {"ref": f"c.{len(self._constants)}"}
            self._constants.append(Constant.of(slopes["ref"], scores.slopes))
        looked = new.attend(query, key, value, self._number, scores, slopes)
        self._number += 1
        new.finish(looked)
        self._instead[output.name] = new.nodes
        self._info = new.info

    def _shape(self, name: str) -> tuple[Any, ...]:
        return self._forms[name][1]

    def _product_before(self, softmax: Node) -> Node:
        """Return the product of queries and keys whose scores the softmax is taken of."""
        found = softmax
        while True:
            token_wise = [
                name for name in found.references() if name in self._evaluation.token_dependent
            ]
            if len(token_wise) != 1 or token_wise[0] not in self._nodes:
                raise _unknown(softmax, "its scores are more than products of queries and keys")
            found = self._nodes[token_wise[0]]
            if found.op in _PRODUCTS and self._shape(found.name)[-2:] == (self._tokens,) * 2:
                return found

    def _product_after(self, softmax: Node) -> Node:
        found = softmax
        while True:
            users = [u for u in self._users.get(found.name, ()) if u.name in self._evaluation.live]
            if len(users) != 1:
                raise _unknown(softmax, "its weights are used for more than a product with values")
            user = users[0]
            if user.op in _PRODUCTS[:2] and _name(user.args[0]) == found.name:
                return user
            if user.op.split(".")[1] not in _SAME_NUMBERS or _name(user.args[0]) != found.name:
                raise _unknown(softmax, f"its weights go through {user.op}")
            found = user

    def _read(self, node: Node, product: str, source: str) -> _Scores:
        """Find out by computing what is done to scores; `product` is "" for a mask alone."""
        if not product and source in self._evaluation.token_dependent:
            raise _unknown(node, "its mask depends on what the tokens are")
        signature = self._evaluation.signature(source, product)
        if signature not in self._read_already:
            self._read_already[signature] = self._read_anew(node, product, source)
        return self._read_already[signature]

    def _read_anew(self, node: Node, product: str, source: str) -> _Scores:
        most = self._evaluation.tokens_to_look_at(source, product)
        self._read_at(node, product, source, min(LEAST_TOKENS // 2 + 1, most))
        found = None
        while found is None:
            try:
                found = self._read_at(node, product, source, most)
            except RuntimeError:  # the model has no mask for so many tokens
                if most <= LEAST_TOKENS // 2:
                    raise
                most //= 2
        distance = self._evaluation.largest_distance(source, product)
        if not found.window and distance >= most:
            raise _unknown(
                node, f"its mask compares positions with {distance}, and was looked at up to {most}"
            )
        return found

    def _read_at(self, node: Node, product: str, source: str, count: int) -> _Scores:
        if not product:
            mask = self._evaluation.of(source, count)
            if mask.dtype == torch.bool:
                mask = torch.zeros(()).masked_fill(~mask, -math.inf)
            return _read_scores(node, mask.float(), mask.float() + 1.0)
        zero = self._evaluation.of(source, count, product, 0.0).float()
        one = self._evaluation.of(source, count, product, 1.0).float()
        ten = self._evaluation.of(source, count, product, 10.0).float()
        found = _read_scores(node, zero, one)
        seen = zero > _HIDDEN
        if not torch.allclose(ten[seen], zero[seen] + 10.0 * found.scale, rtol=1e-2, atol=1e-2):
            raise _unknown(node, "its scores aren't only scaled and masked")
        return found


def _read_scores(node: Node, zero: torch.Tensor, one: torch.Tensor) -> _Scores:
    """Return what was done to scores of 0 and of 1, (..., T, T) each."""
    zero = zero.reshape(-1, *zero.shape[-2:])
    one = one.reshape(-1, *one.shape[-2:])
    seen = zero > _HIDDEN
    if not torch.equal(seen, one > _HIDDEN) or not bool((seen == seen[:1]).all()):
        raise _unknown(node, "its mask depends on the scores, or on the head")
    window = _window_of(seen[0])
    if window is None:
        raise _unknown(node, "its mask is neither causal nor a sliding window")
    scales = (one - zero)[seen]
    if not bool(torch.isclose(scales, scales[0], rtol=1e-3).all()) or scales[0] <= 0:
        raise _unknown(node, "it scales scores of some tokens differently")
    return _Scores(float(scales.median()), window, _slopes_of(node, zero, seen[0]))


def _window_of(seen: torch.Tensor) -> int | None:
    """Return the window of a causal mask (T, T), 0 if it has none; None if it is something else."""
    count = seen.shape[0]
    at, of = torch.arange(count)[:, None], torch.arange(count)[None, :]
    if seen.shape[0] != seen.shape[1]:
        return None
    window = int(seen[-1].sum())
    if torch.equal(seen, (of <= at) & (of > at - window)):
        return 0 if window == count else window
    return None


def _slopes_of(node: Node, bias: torch.Tensor, seen: torch.Tensor) -> torch.Tensor | None:
    """Return how a bias (H, T, T) grows with the key's position, by head; None if there is none."""
    last = bias[:, -1, seen[-1]]
    if last.shape[1] < 2:
        return None
    slopes = (last[:, -1] - last[:, 0]) / (last.shape[1] - 1)
    rest = bias - slopes[:, None, None] * torch.arange(bias.shape[2])
    highest = rest.masked_fill(~seen, -math.inf).amax(2)
    lowest = rest.masked_fill(~seen, math.inf).amin(2)
    # Models build it in half precision, some of them.
    if bool(((highest - lowest) > 0.02 * (1.0 + bias[:, seen].abs().amax())).any()):
        raise _unknown(node, "it adds a bias that doesn't grow evenly with the position")
    return slopes if bool(slopes.abs().amax() > 1e-6) else None


def _unknown(node: Node, what: str) -> CaptureFailed:
    return CaptureFailed(
        f"The attention of {node.module or 'the model itself'!r} can't be given a cache: {what}. "
        f"Operator: {node.op}. What to do: {REMEDY}"
    )


def _name(argument: Any) -> str:
    return next(iter(argument_references(argument)), "")


class _Building:
    """Makes the nodes that stand in place of one."""

    def __init__(self, info: Mapping[str, OperatorInfo], output: Node, tokens: Any) -> None:
        self.nodes: list[Node] = []
        self.info = dict(info)
        self._output = output
        self._tokens = tokens

    def shape(self, name: str) -> tuple[Any, ...]:
        return self.info[name].outputs[0][1]

    def add(self, op: str, source: str, *more: Any, name: str = "") -> str:
        """Add a view of a value."""
        dtype, shape = self.info[source].outputs[0]
        sizes = list(shape)
        if op == "aten.transpose.int":
            sizes[more[0]], sizes[more[1]] = sizes[more[1]], sizes[more[0]]
        elif op == "aten.unsqueeze.default":
            sizes.insert(more[0], 1)
        elif op == "aten.squeeze.dim":
            sizes.pop(more[0])
        return self._put(op, ({"ref": source}, *more), dtype, tuple(sizes), 0, name)

    def heads_first(self, name: str) -> str:
        """Return queries, keys or values as (1, H, T, D)."""
        shape = self.shape(name)
        if len(shape) == 3:
            return self.add("aten.unsqueeze.default", name, 0)
        return name

    def attend(
        self, query: str, key: str, value: str, number: int, scores: _Scores, slopes: Any
    ) -> str:
        dtype = self.info[query].outputs[0][0]
        heads, width = self.shape(query)[1], self.shape(value)[3]
        operands = ({"ref": query}, {"ref": key}, {"ref": value})
        arguments = (*operands, number, scores.scale, scores.window, slopes, 0.0)
        flops = self.info[self._output.name].flops * 2
        return self._put(ATTEND, arguments, dtype, (1, self._tokens, heads, width), flops, "")

    def finish(self, looked: str) -> None:
        """Bring what attention found (1, T, H, D) into the form that the model goes on with."""
        wanted = len(self.shape(self._output.name))
        name = self._output.name
        if wanted == 3:
            looked = self.add("aten.transpose.int", looked, 1, 2)
            self.add("aten.squeeze.dim", looked, 0, name=name)
        else:
            self.add("aten.transpose.int", looked, 1, 2, name=name)

    def _put(
        self, op: str, arguments: tuple[Any, ...], dtype: str, shape: Any, flops: int, name: str
    ) -> str:
        name = name or f"{self._output.name}__{len(self.nodes)}"
        self.nodes.append(Node(name, op, arguments, {}, False, True, self._output.module))
        source = self.info[self._output.name].source
        self.info[name] = OperatorInfo(((dtype, tuple(shape)),), flops, 0, source)
        return name
