"""Captures a causal language model as a decoder: tokens and their positions in, logits out.

The model is captured once, on one row of tokens: no padding, no masks, no cache among its inputs.
Its attention becomes ``dagflow.attend`` (see `dagflow_tasks.kernels.attention`), which knows on the worker
whose tokens these are. That is so for models of transformers whose attention goes through its registry
of attention functions (`dagflow.graph.attention_capture`), and for those that compute it by themselves
(`dagflow.graph.attention_patterns`). All else must look at each token by itself
(`dagflow.graph.tokenwise`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dagflow.errors import CaptureFailed
from dagflow.graph.attention_capture import MaskRead, captured_attention, own_attention
from dagflow.graph.attention_patterns import capture_patterns
from dagflow.graph.capture import TRACING, export_module
from dagflow.graph.dag import OperatorDag, buffer_value, input_value
from dagflow.graph.recurrent import recurrent_layers
from dagflow.graph.tokenwise import check_tokenwise, take_positions
from dagflow.graph.translate import translate
from dagflow_tasks.kernels.attention import ATTEND, reach_of
from dagflow_tasks.program.nodes import argument_references
from dagflow_tasks.program.operators import multiplies
from dagflow_tasks.program.stage_program import ValueSpec

TOKENS, POSITIONS, ROWS = "tokens", "positions", "rows"
_EXAMPLE_TOKENS = 5


def capture_decoder(model: torch.nn.Module) -> OperatorDag:
    """Return a causal language model's operator DAG, from tokens to logits.

    Its inputs are ``tokens`` and ``positions`` (1, N), and ``rows`` (R,), which of the tokens' logits
    (1, R, V) are wanted.

    Parameters
    ----------
    model
        A causal language model of transformers; its parameters may be on the meta device. It is
        captured in evaluation mode, and left as it was.

    Raises
    ------
    CaptureFailed
        If it can't be captured, or looks at other tokens by anything but causal attention; names
        the module.
    """
    training = model.training
    model.eval()
    try:
        try:
            traced = _trace(model, captured_attention(model))
        except MaskRead:
            # Its own attention, with masks of numbers: what these hide is found out afterwards.
            traced = _trace(model, own_attention(model))
    finally:
        model.train(training)
    dag = take_positions(capture_patterns(traced, model))
    check_tokenwise(dag)
    _check_windows(dag, model.config)
    return dag if dag is traced else _up_to(dag, dag.loss)


def _check_windows(dag: OperatorDag, config: Any) -> None:
    """Refuse a model whose cache forgets tokens that its attention sees.

    Transformers' caches keep a window of all layers where a configuration names one, and no kinds of
    layers: what such a model generates depends on how its prompt is divided.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    longest = getattr(text, "max_position_embeddings", None)
    if not window or getattr(text, "layer_types", None) or (longest and longest <= window):
        return
    for node in dag.nodes:
        if node.op == ATTEND and reach_of(node.args) is None:
            raise CaptureFailed(
                f"The attention of {node.module!r} sees all tokens, and the configuration's "
                f"sliding_window of {window} has transformers' cache forget all but the last ones: the "
                "model's answers depend on how tokens are divided into passes. What to do: set "
                "config.sliding_window to None (or to the longest sequence) and load it again."
            )


def _trace(model: torch.nn.Module, attention: AbstractContextManager[None]) -> OperatorDag:
    row = torch.arange(_EXAMPLE_TOKENS)[None]
    tensors = {TOKENS: row, POSITIONS: row.clone(), ROWS: torch.tensor([1, 3, 4])}
    dims = {TOKENS: (1,), POSITIONS: (1,), ROWS: (0,)}
    with TRACING, attention, recurrent_layers(model):
        exported, _ = export_module(_LogitsModule(model), model, tensors, dims)
    inputs = [ValueSpec(input_value(name), "int64", tuple(t.shape)) for name, t in tensors.items()]
    return translate(exported, model, inputs, {}, scalar=False)


def without_head(dag: OperatorDag) -> OperatorDag:
    """Return a decoder's operator DAG up to what its head reads.

    That are the hidden states (1, R, D) after the last norm. The head, its last product of matrices,
    and what only it needs is left out.
    """
    head = next(node for node in reversed(dag.nodes) if multiplies(node))
    (output,) = argument_references(head.args[0])
    return _up_to(dag, output)


def _up_to(dag: OperatorDag, output: str) -> OperatorDag:
    """Return what of a DAG one of its values follows from."""
    needed = {output}
    for node in reversed(dag.nodes):
        if node.name in needed:
            needed.update(node.references())
    uses = {p.name: tuple(use for use in p.uses if use in needed) for p in dag.parameters}
    nodes = tuple(node for node in dag.nodes if node.name in needed)
    return replace(
        dag,
        parameters=tuple(replace(p, uses=uses[p.name]) for p in dag.parameters if uses[p.name]),
        buffers=tuple(b for b in dag.buffers if buffer_value(b.name) in needed),
        constants=tuple(c for c in dag.constants if c.name in needed),
        nodes=nodes,
        info={node.name: dag.info[node.name] for node in nodes},
        loss=output,
    )


class _LogitsModule(torch.nn.Module):
    """A language model as a function of tokens, their positions, and the rows that are wanted."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        formals = inspect.signature(model.forward).parameters
        self._known = set(formals)
        if any(formal.kind is inspect.Parameter.VAR_KEYWORD for formal in formals.values()):
            self._known |= {"position_ids", "use_cache"}  # handed on to the layers

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        options = {"position_ids": positions, "logits_to_keep": rows, "use_cache": False}
        given = {name: value for name, value in options.items() if name in self._known}
        with nullcontext() if "logits_to_keep" in given else self._only(rows), _Numbers():
            logits: torch.Tensor = self.model(input_ids=tokens, **given).logits
        return logits

    @contextmanager
    def _only(self, rows: torch.Tensor) -> Iterator[None]:
        """Have the head compute the rows that are wanted, in models that don't know how to."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise CaptureFailed(
                f"{type(self.model).__name__} has no head that computes logits from hidden states "
                "(get_output_embeddings() is None). Load a causal language model."
            )
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, rows], *given[1:]))
        try:
            yield
        finally:
            hook.remove()


class _Numbers(TorchFunctionMode):
    """Keeps numbers that a forward makes tensors of, in models on the meta device.

    ``torch.tensor(number, device="meta")`` has none, nor has a list that a tensor there is indexed
    with; an operator that fills a tensor names them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        makes = func is torch.tensor and args and _is_numbers(args[0])
        if makes and torch.device(given.get("device") or "cpu").type == "meta":
            given.pop("requires_grad", None)
            return _filled(args[0], **given)
        if func is torch.Tensor.__getitem__ and args[0].device.type == "meta":
            items = args[1] if isinstance(args[1], tuple) else (args[1],)
            meant = [_filled(i, device="meta") if isinstance(i, list) else i for i in items]
            return func(args[0], tuple(meant))
        return func(*args, **given)


def _is_numbers(data: Any) -> bool:
    if isinstance(data, (list, tuple)):
        return bool(data) and all(_is_numbers(item) for item in data)
    return isinstance(data, (bool, int, float))


def _filled(data: Any, **options: Any) -> torch.Tensor:
    """Return a tensor of numbers, or of lists of them, that operators have filled."""
    if isinstance(data, (list, tuple)):
        return torch.stack([_filled(item, **options) for item in data])
    return torch.full((), data, **options)
