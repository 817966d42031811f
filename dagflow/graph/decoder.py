"""Captures a causal language model as a decoder: tokens and their positions in, logits out.

The model is captured once, on one row of tokens: no padding, no masks, no cache among its inputs.
Its attention becomes ``dagflow.attend`` (see `dagflow_tasks.attention`), which knows on the worker
whose tokens these are. Models of transformers whose attention goes through its registry of attention
functions are taken as they are; BLOOM, whose doesn't, with a patch while it is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from dagflow.errors import CaptureFailed
from dagflow.graph.capture import export_module
from dagflow.graph.dag import OperatorDag, buffer_value, input_value
from dagflow.graph.translate import translate
from dagflow_tasks.attention import attend
from dagflow_tasks.operators import argument_references, multiplies
from dagflow_tasks.program import ValueSpec

TOKENS, POSITIONS, ROWS = "tokens", "positions", "rows"
_IMPLEMENTATION = "dagflow"
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
        If it can't be captured, or looks at other tokens by anything but attention that
        transformers' registry knows.
    """
    training = model.training
    model.eval()
    row = torch.arange(_EXAMPLE_TOKENS)[None]
    tensors = {TOKENS: row, POSITIONS: row.clone(), ROWS: torch.tensor([1, 3, 4])}
    dims = {TOKENS: (1,), POSITIONS: (1,), ROWS: (0,)}
    try:
        with _attention(model) as num_layers:
            exported, _ = export_module(_LogitsModule(model), model, tensors, dims)
    finally:
        model.train(training)
    inputs = [ValueSpec(input_value(name), "int64", tuple(t.shape)) for name, t in tensors.items()]
    dag = translate(exported, model, inputs, {}, scalar=False)
    attending = sum(node.op == "dagflow.attend.default" for node in dag.nodes)
    if attending != num_layers:
        raise CaptureFailed(
            f"{type(model).__name__} has {num_layers} layers, and attention was found in {attending}. "
            "Its attention doesn't go through transformers' attention functions, and can't be given a "
            "cache; models that can: Llama, Qwen3, Gemma 3, Mistral, Mixtral, GPT-2, OPT, BLOOM and "
            "others like them."
        )
    return dag


def without_head(dag: OperatorDag) -> OperatorDag:
    """Return a decoder's operator DAG up to what its head reads.

    That are the hidden states (1, R, D) after the last norm. The head, its last product of matrices,
    and what only it needs is left out.
    """
    head = next(node for node in reversed(dag.nodes) if multiplies(node))
    (output,) = argument_references(head.args[0])
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
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=tokens, position_ids=positions, logits_to_keep=rows, use_cache=False
        ).logits
        return logits


@torch.library.custom_op("dagflow::attend", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scale: float,
    window: int = 0,
    slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    return attend(query, key, value, layer, scale, window, slopes, softcap)


@_attend.register_fake
def _attend_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@contextmanager
def _attention(model: torch.nn.Module) -> Iterator[int]:
    """Have a model's attention captured whole; yields its number of layers."""
    try:
        from transformers import PreTrainedModel
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise CaptureFailed(
            "A language model is captured with transformers: pip install transformers."
        ) from error
    if not isinstance(model, PreTrainedModel):
        raise CaptureFailed(
            f"A decoder is a causal language model of transformers; found {type(model).__name__}."
        )
    layers = _Layers()
    ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, layers.through_registry)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, lambda *_, **__: None)
    config = model.config.get_text_config(decoder=True)
    before = model.config._attn_implementation
    if model.config.model_type == "bloom":
        with _bloom():
            yield config.num_hidden_layers
        return
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield config.num_hidden_layers
    finally:
        model.set_attn_implementation(before)


class _Layers:
    """Numbers the layers, in models whose modules don't know theirs."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def through_registry(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        number = getattr(module, "layer_idx", None)
        if number is None:
            number = self._numbers.setdefault(id(module), len(self._numbers))
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        window = int(sliding_window or 0)
        cap = float(softcap or 0.0)
        return _attend(query, key, value, number, float(scale), window, None, cap), None


@contextmanager
def _bloom() -> Iterator[None]:
    from transformers.models.bloom import modeling_bloom

    slopes_of: Callable[..., torch.Tensor] = modeling_bloom._get_alibi_slopes

    def forward(
        self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        slopes = slopes_of(self.num_heads, hidden_states.device)
        scale = float(self.inv_norm_factor)
        looked = _attend(query, key, value, self.layer_idx, scale, 0, slopes, 0.0)
        output = self.dense(looked.reshape(*hidden_states.shape))
        return output + residual, None

    with patch.object(modeling_bloom.BloomAttention, "forward", forward):
        yield
