"""Has a model's attention captured whole, as ``dagflow.attend``, while a decoder is traced.

Models of transformers look their attention up in a registry, and their masks in another. Here both
give ours: the mask says what it hides (`Mask`), the attention reads that. Whatever else either is
asked for is an error that names the module, because an argument that is thrown away is a model
that answers wrongly without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from dagflow.errors import CaptureFailed
from dagflow_tasks.kernels.attention import attend

_IMPLEMENTATION = "dagflow"
REMEDY = (
    "Serve another model, or rewrite the module so that it calls transformers' attention functions "
    "with queries, keys, values, a causal mask (whole, sliding or in chunks), scaling, softcap and "
    "sinks. Training captures such models as they are."
)


_attend = torch.library.custom_op("dagflow::attend", attend, mutates_args=())


@_attend.register_fake
def _attend_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@dataclass(frozen=True, eq=False)
class Mask:
    """Stands for a causal mask while a model is traced; modules may hand it on, and nothing else.

    Attributes
    ----------
    window : int
        How many tokens back a token sees, itself included; 0 for all.
    chunk : int
        Tokens see those of their own chunk of so many tokens only; 0 for no chunks.
    """

    window: int = 0
    chunk: int = 0

    def __getitem__(self, index: Any) -> Mask:
        """Return the mask itself for what cuts off nothing but unused columns."""
        items = index if isinstance(index, tuple) else (index,)
        if all(item is Ellipsis or _is_from_start(item) for item in items):
            return self
        raise _computed_with("takes a part of it")

    def to(self, *_: Any, **__: Any) -> Mask:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _computed_with(f"reads its {name!r}")

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise _computed_with(f"calls {getattr(function, '__name__', function)} on it")

    def _refuse(self, *_: Any) -> Any:
        raise _computed_with("computes with it")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __invert__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse


def _is_from_start(item: Any) -> bool:
    return isinstance(item, slice) and item.start in (None, 0) and item.step in (None, 1)


class MaskRead(CaptureFailed):
    """A model computes with its masks, instead of handing them on to transformers' attention."""


def _computed_with(what: str) -> MaskRead:
    return MaskRead(
        f"A module of class {_module_on_stack()} doesn't hand its attention mask on, but {what}. "
        "A decoder is captured without masks: attention itself knows which tokens a token sees. "
        f"What to do: {REMEDY}"
    )


def _module_on_stack() -> str:
    """Return the class of the innermost module that is being traced, for an error's text."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            return type(owner).__name__
    return "(unknown)"


@contextmanager
def captured_attention(model: torch.nn.Module) -> Iterator[None]:
    """Have a model's attention captured whole, as far as it goes through transformers' registry.

    Raises
    ------
    CaptureFailed
        Without transformers, or if the model isn't one of its models.
    """
    try:
        from transformers import PreTrainedModel, masking_utils
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise CaptureFailed(
            "A language model is captured with transformers: pip install transformers."
        ) from error
    if not isinstance(model, PreTrainedModel):
        raise CaptureFailed(
            f"A decoder is a causal language model of transformers; found {type(model).__name__}."
        )
    before = model.config._attn_implementation
    registry = _Registry(model, before)
    if model.config.model_type == "bloom":
        with _bloom():
            yield
        return
    attentions = ALL_ATTENTION_FUNCTIONS._global_mapping
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    with (
        patch.dict(attentions, {_IMPLEMENTATION: registry.attention}),
        patch.dict(masks, {_IMPLEMENTATION: registry.mask}),
        own_attention(model),
        _biases_by_distance(model),
        registry.numbering(model),
    ):
        model.set_attn_implementation(_IMPLEMENTATION)
        try:
            yield
        finally:
            model.set_attn_implementation(before)


@contextmanager
def own_attention(model: torch.nn.Module) -> Iterator[None]:
    """Have a model's own attention captured, operator by operator."""
    from transformers import masking_utils

    # Which tokens belong together is the workers' business: positions say nothing of it.
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None):
        yield


class _Registry:
    """The attention and the mask function that transformers' registries get."""

    def __init__(self, model: torch.nn.Module, implementation: str | None) -> None:
        self._paths = {module: path for path, module in model.named_modules()}
        self._implementation = implementation
        self._num_attending = 0

    @contextmanager
    def numbering(self, model: torch.nn.Module) -> Iterator[None]:
        """Number a model's attention from nought in each of its traces."""

        def begin(*_: Any) -> None:
            self._num_attending = 0

        handle = model.register_forward_pre_hook(begin)
        try:
            yield
        finally:
            handle.remove()

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        path = self._paths.get(module, type(module).__name__)
        distances = others.pop("position_bias") if _is_by_distance(module, others) else None
        _check_others(path, others)
        if query.shape[2] != key.shape[2]:
            raise CaptureFailed(
                f"The attention of {path!r} looks at keys of other tokens than its queries' (cross "
                "attention). A decoder's tokens look at those before them, and at nothing else. "
                f"What to do: {REMEDY}"
            )
        mask = self._mask_of(path, module, attention_mask, others.get("is_causal"))
        if s_aux is not None and sinks is not None:
            raise CaptureFailed(f"The attention of {path!r} is given sinks twice. {REMEDY}")
        sinks = s_aux if s_aux is not None else sinks
        scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
        number = self._num_attending
        self._num_attending += 1
        cap = float(softcap or 0.0)
        sinks = _checked(path, query, sinks)
        more = (mask.window, None, cap, sinks, mask.chunk, distances)
        looked = _attend(query, key, value, number, scale, *more)
        return looked, None

    def mask(self, *_: Any, **asked: Any) -> Mask:
        """Return what a mask function hides; see transformers' masking_utils for what it is given."""
        if asked.get("attention_mask") is not None:
            # One of ones, mostly; what it hides is found out from the numbers.
            raise _computed_with("adds a padding mask of its own")
        return _read_mask(asked["mask_function"])

    def _mask_of(self, path: str, module: Any, mask: Any, is_causal: bool | None) -> Mask:
        if isinstance(mask, Mask):
            return mask
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if mask is None and causal and self._implementation == "sdpa":
            return Mask()  # as transformers' sdpa_attention_forward does
        if isinstance(mask, torch.Tensor):
            raise MaskRead(
                f"The attention of {path!r} is given a mask that the model has made itself."
            )
        raise CaptureFailed(
            f"The attention of {path!r} is given {'no mask' if mask is None else 'an unknown mask'}. "
            f"A decoder's tokens look at those before them, and at nothing else. What to do: {REMEDY}"
        )


# What changes nothing: what flash attention would be told besides, what is reported, and what
# models hand on to all of their modules.
_NEUTRAL = frozenset(
    (
        "position_ids",
        "sliding_window",
        "is_causal",
        "output_attentions",
        "use_cache",
        "logits_to_keep",
    )
)


def _check_others(path: str, others: Mapping[str, Any]) -> None:
    """Refuse arguments that the captured attention doesn't know, unless they ask for nothing.

    A window comes twice, and transformers' own attention goes by the mask.
    """
    unknown = sorted(
        name
        for name, value in others.items()
        if name not in _NEUTRAL
        and not (value is None or value is False or (name == "dropout" and value == 0.0))
    )
    if unknown:
        raise CaptureFailed(
            f"The attention of {path!r} is given {', '.join(map(repr, unknown))}, which the captured "
            f"attention doesn't know and can't leave out. What to do: {REMEDY}"
        )


def _checked(path: str, query: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor | None:
    by_token = (*query.shape[:3], 1)
    if sinks is not None and sinks.dim() != 1 and tuple(sinks.shape) != by_token:
        raise CaptureFailed(
            f"The attention of {path!r} has sinks of shape {list(sinks.shape)}; what is known are "
            f"those of each head (H,), or of each head and token (1, H, N, 1). What to do: {REMEDY}"
        )
    return sinks


# Modules that return a bias for every pair of tokens, by how far apart they are.
_BY_DISTANCE = ("InklingRelativeLogits", "Inkling2RelativeLogits")


def _is_by_distance(module: torch.nn.Module, given: Mapping[str, Any]) -> bool:
    """Tell whether attention is given a bias that `_biases_by_distance` has made."""
    bias = given.get("position_bias")
    makers: list[Any] = [m for m in module.children() if type(m).__name__ in _BY_DISTANCE]
    return bias is not None and len(makers) == 1 and bias.shape[-1] == makers[0].rel_extent


@contextmanager
def _biases_by_distance(model: torch.nn.Module) -> Iterator[None]:
    """Have biases returned by distance (1, H, N, E), not by pairs of a row's tokens (1, H, N, N)."""

    def forward(self: Any, relative_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (relative_states @ self.proj).transpose(1, 2)
        return result

    classes = {type(module) for module in model.modules()}
    with ExitStack() as patches:
        for cls in classes:
            if cls.__name__ in _BY_DISTANCE:
                patches.enter_context(patch.object(cls, "forward", forward))
        yield


def _read_mask(function: Callable[..., Any]) -> Mask:
    """Return what one of transformers' mask functions hides, by what it is made of."""
    parts = dict(_parts_of(function))
    known = {"window", "chunk", "causal"}
    if "causal" in parts and known >= {*parts} and len(parts) == len(list(_parts_of(function))):
        return Mask(parts.get("window", 0), parts.get("chunk", 0))
    raise MaskRead(
        f"A module of class {_module_on_stack()} asks for a mask that is neither causal, nor sliding, "
        f"nor in chunks: {', '.join(parts)}. What to do: {REMEDY}"
    )


def _parts_of(function: Callable[..., Any]) -> Iterator[tuple[str, int]]:
    """Yield the conditions that a mask function joins by "and", by name, and their sizes."""
    name = getattr(function, "__qualname__", repr(function))
    closure = getattr(function, "__closure__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    inner = {variable: cell.cell_contents for variable, cell in zip(names, closure, strict=False)}
    if name == "and_masks.<locals>.and_mask":
        for part in inner["mask_functions"]:
            yield from _parts_of(part)
    elif name == "causal_mask_function":
        yield "causal", 0
    elif name == "sliding_window_overlay.<locals>.inner_mask":
        yield "window", int(inner["sliding_window"])
    elif name == "chunked_overlay.<locals>.inner_mask":
        yield "chunk", int(inner["chunk_size"])
    else:
        yield name, 0


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
