"""Compares a captured decoder with the model that it was captured from, as transformers runs it.

Two things are compared: the logits of a prefill, and those of tokens that follow one by one. A mask
that isn't causal shows in the first; positions that aren't taken, or a state that isn't kept from token
to token, in the second alone.

Capture is judged here, and not precision: whatever the weights are stored in, both sides compute in
float32, where a wrong mask stands out from rounding even in a model that hasn't learnt anything. What
rounding is, the model says itself: how much its own logits differ between a prefill and tokens one by
one.
"""

from __future__ import annotations

import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import psutil
import torch

from dagflow.errors import CaptureFailed, ResultsDiffer
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import Buffer, OperatorDag, Parameter
from dagflow.graph.decoder import capture_decoder
from dagflow.graph.recurrent import as_they_are
from dagflow.models.shrinking import shrunk, windows
from dagflow.models.source import Source, quiet_transformers
from dagflow.plan.assemble import assemble
from dagflow.swarm.dask_internals import MEMORY_LIMIT
from dagflow_tasks.decode.decoder_stage import ALL, TOKENS, DecoderStage, Part
from dagflow_tasks.program.nodes import dtype_of
from dagflow_tasks.program.stage_program import Constant

# The second token is the first that needs what another left behind.
_PREFILL, _STEPS = 24, 2
# A prompt that reaches beyond a window or chunk shows whether it is kept to; more tokens would take
# more than the check may.
_LONGEST_PREFILL = 128
_BEYOND_WINDOW = 8
# Products of other shapes and another order of sums: some times what they make in the model itself,
# and a few roundings of float32 (6e-8) a layer where that happens to be nothing.
_TIMES_NOISE = 20
_LEAST_SHARE, _MOST_SHARE = 1e-5, 1e-3
# Values of a tensor, at three places of it.
_LOOKED_AT = 4096
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Logits:
    """What one side computes.

    Attributes
    ----------
    prefill : Tensor (P, V)
    steps : Tensor (K, V)
        Of tokens that follow on the prefill one by one.
    """

    prefill: torch.Tensor
    steps: torch.Tensor


def check_capture(
    source: Source,
    captured: OperatorDag,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    room_bytes: int | None = None,
) -> dict[str, Any]:
    """Compare a captured decoder with its model, and return what was compared, and how long it took.

    On the model's own weights if memory holds them, in float32; otherwise on random weights in a
    model of the same configuration with two layers of each kind.

    Parameters
    ----------
    captured
        Before quantisation.
    read : callable
        Returns the values of a parameter or buffer as the model has them.
    dtype
        What the DAG computes in.
    room_bytes : int, optional
        What the comparison may take; by default half of the memory that is free.

    Raises
    ------
    ResultsDiffer
    CaptureFailed
        If one of the two can't compute at all.
    """
    begin = time.perf_counter()
    room = (
        min(psutil.virtual_memory().available, MEMORY_LIMIT) // 2
        if room_bytes is None
        else room_bytes
    )
    if _float32_bytes(source.model) <= room:
        against = "its own weights"
        with quiet_transformers():
            eager = source.eager()
        worst = _check_own(eager, captured, read, dtype)
    else:
        eager = shrunk(source.model, room)
        if eager is None:
            warnings.warn(
                f"{type(source.model).__name__} wasn't compared with transformers: memory doesn't hold "
                "even two layers of each kind in float32. Load it once on a machine with more.",
                stacklevel=4,
            )
            return {"seconds": time.perf_counter() - begin, "against": None}
        against = f"random weights in {eager.config.get_text_config(decoder=True).num_hidden_layers} layers"
        worst = _check(eager, capture_decoder(eager), _tensors_of(eager))
    return {
        "seconds": round(time.perf_counter() - begin, 3),
        "against": against,
        "largest_difference": worst,
    }


def _float32_bytes(model: torch.nn.Module) -> int:
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def _check_own(
    eager: Any,
    captured: OperatorDag,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
) -> float:
    exact = dtype == torch.float32
    dag = captured if exact else _in_float32(captured)
    theirs = _tensors_of(eager)
    # Buffers that are computed when the model is built are rounded where it is built in half precision.
    computed = {b.name for b in dag.buffers if not (exact or b.persistent)} & theirs.keys()
    weights = {}
    specs: list[Parameter | Buffer] = [*dag.parameters, *dag.buffers]
    for name, kind in ((spec.name, dtype_of(spec.dtype)) for spec in specs):
        ours = (theirs[name] if name in computed else read(name)).detach()
        # Memory holds one of two that are the same.
        is_same = name in theirs and _looks_same(ours, theirs[name])
        weights[name] = theirs[name] if is_same else ours.to(kind)
    try:
        return _check(eager, dag, weights)
    except ResultsDiffer:
        if exact:
            raise
    # The model may compute something in half precision whatever its weights are in, which was taken
    # for a consequence of these: then only a capture in float32 can tell.
    return _check(eager, capture_decoder(eager), _tensors_of(eager))


def _looks_same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare two readings of a tensor by some of its values: another tensor differs in any.

    All of them would take as long as a pass through the model.
    """
    if ours.shape != theirs.shape:
        return False
    pair = ours.flatten(), theirs.flatten()
    middle = max(len(pair[0]) // 2 - _LOOKED_AT // 2, 0)
    return all(
        torch.equal(*(t[begin : begin + _LOOKED_AT].to(theirs.dtype) for t in pair))
        for begin in {0, middle, max(len(pair[0]) - _LOOKED_AT, 0)}
    )


def _in_float32(dag: OperatorDag) -> OperatorDag:
    """Return a DAG that was captured in bfloat16 as it is in float32."""
    constants = tuple(
        Constant.of(c.name, c.tensor().float()) if c.dtype == "bfloat16" else c
        for c in dag.constants
    )
    text = replace(dag, constants=constants).to_json()
    return OperatorDag.from_json(text.replace(json.dumps("bfloat16"), json.dumps("float32")))


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check(eager: Any, dag: OperatorDag, weights: dict[str, torch.Tensor]) -> float:
    """Return the largest difference as a share of the largest logit.

    Raises
    ------
    ResultsDiffer, CaptureFailed
    """
    name = type(eager).__name__
    tokens, num_prefill = _prompt(eager)
    with _evaluated(eager):
        wanted = _eager_logits(eager, tokens, num_prefill)
    found = _captured_logits(name, dag, weights, tokens, num_prefill)
    scale = float(torch.cat([wanted.prefill, wanted.steps]).nan_to_num(0, 0, 0).abs().max())
    pairs = (
        (f"a prefill of {num_prefill} tokens", 0, found.prefill, wanted.prefill),
        (f"decoding token by token after {num_prefill}", num_prefill, found.steps, wanted.steps),
    )
    differences = [(what, start, _difference(a, b).amax(-1)) for what, start, a, b in pairs]
    worst = max(float(by_position.max()) for *_, by_position in differences)
    allowed = _LEAST_SHARE * scale
    if worst > allowed:
        with _evaluated(eager):
            noise = _noise(eager, tokens, wanted)
        allowed = min(max(_TIMES_NOISE * noise, allowed), _MOST_SHARE * scale)
    for what, start, by_position in differences:
        wrong = (by_position > allowed).nonzero()
        if len(wrong):
            raise ResultsDiffer(
                _refusal(name, what, start, by_position, int(wrong[0]), scale, allowed)
            )
    return worst / scale if scale else 0.0


def _refusal(
    name: str,
    what: str,
    start: int,
    by_position: torch.Tensor,
    first: int,
    scale: float,
    allowed: float,
) -> str:
    return (
        f"{name} would answer otherwise here than by itself, so it isn't loaded: in {what}, logits "
        f"differ from transformers' from position {start + first} on, by up to "
        f"{float(by_position.max()):.2g} where they are up to {scale:.2g} and rounding explains "
        f"{allowed:.1g}. dagflow doesn't know something that {name} does between tokens (a mask, "
        "positions, a bias, a state). Serve it with transformers' generate, or another model here; "
        "check=False loads it all the same, for wrong answers."
    )


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return (ours - theirs).abs().nan_to_num(float("inf"), float("inf")).masked_fill(same, 0.0)


def _prompt(model: Any) -> tuple[torch.Tensor, int]:
    """Return tokens without meaning (P + K,), and how many of them, P, are the prefill."""
    config = model.config.get_text_config(decoder=True)
    beyond = [w + _BEYOND_WINDOW for w in windows(config)]
    num_prefill = max([_PREFILL, *(n for n in beyond if n <= _LONGEST_PREFILL)])
    longest = getattr(config, "max_position_embeddings", None) or num_prefill + _STEPS
    num_prefill = max(1, min(num_prefill, longest - _STEPS))
    special = _special_tokens(config)
    ordinary = [t for t in range(min(config.vocab_size, 2**16)) if t not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(ordinary), (num_prefill + _STEPS,), generator=generator)
    return torch.tensor(ordinary)[chosen], num_prefill


def _special_tokens(config: Any) -> set[int]:
    """Return tokens that a configuration gives a meaning (padding, an image, an end)."""
    said = [value for name, value in config.to_dict().items() if name.endswith("token_id")]
    return {t for v in said for t in (v if isinstance(v, list) else [v]) if isinstance(t, int)}


@contextmanager
def _evaluated(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), as_they_are(model):
            yield
    finally:
        for module in training:
            module.training = True


def _eager_logits(model: Any, tokens: torch.Tensor, num_prefill: int) -> _Logits:
    """Return a model's own logits, as it generates."""
    try:
        logits = _generated(model, tokens, num_prefill)
        if len(logits) == len(tokens):
            return _Logits(logits[:num_prefill], logits[num_prefill:])
    except Exception:  # it can't generate here; what it computes of a whole text stands for that
        pass
    try:
        logits = _of_whole_text(model, tokens)
    except Exception as error:
        raise CaptureFailed(
            f"{type(model).__name__} can't be compared with what was captured of it, because it doesn't "
            f"run by itself on this machine: {type(error).__name__}: {error}. check=False loads it "
            "without comparing."
        ) from error
    return _Logits(logits[:num_prefill], logits[num_prefill:])


def _noise(model: Any, tokens: torch.Tensor, generated: _Logits) -> float:
    """Return how much a model's own logits differ between a whole text and tokens one by one."""
    try:
        whole = _of_whole_text(model, tokens)
    except Exception:
        return 0.0
    num_prefill = len(generated.prefill)
    last = _difference(generated.prefill[-1], whole[num_prefill - 1]).max()
    return float(torch.maximum(last, _difference(generated.steps, whole[num_prefill:]).max()))


def _of_whole_text(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(**_whole_text(model, tokens)).logits[0].float()
    return logits


def _whole_text(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Return what a model is given of a whole text (T,): positions, too, as `generate` gives them.

    RoBERTa and its like count from another number by themselves than `generate` has them.
    """
    options = {"position_ids": torch.arange(len(tokens))[None], "use_cache": False}
    taken = inspect.signature(model.forward).parameters
    return {"input_ids": tokens[None], **{n: v for n, v in options.items() if n in taken}}


def _generated(model: Any, tokens: torch.Tensor, num_prefill: int) -> torch.Tensor:
    """Return the logits (P + K, V) of `generate`, made to choose the tokens that are given."""
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    class Given(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            at = min(input_ids.shape[1], len(tokens) - 1)
            return torch.full_like(scores, -torch.inf).index_fill(1, tokens[at], 0.0)

    found: list[torch.Tensor] = []

    def ask_for_all(_: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {name: value for name, value in given.items() if name != "logits_to_keep"}

    with ExitStack() as stack:
        hooks = (
            model.register_forward_pre_hook(ask_for_all, with_kwargs=True),
            model.register_forward_hook(lambda _, args, out: found.append(out.logits[0])),
        )
        for hook in hooks:
            stack.callback(hook.remove)
        stack.enter_context(quiet_transformers())
        plain = GenerationConfig()  # type: ignore[no-untyped-call]
        stack.enter_context(patch.object(model, "generation_config", plain))
        model.generate(
            tokens[None, :num_prefill],
            attention_mask=torch.ones(1, num_prefill, dtype=torch.int64),
            max_new_tokens=len(tokens) - num_prefill + 1,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([Given()]),
        )
    return torch.cat(found).float()


def _captured_logits(
    name: str,
    dag: OperatorDag,
    weights: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    num_prefill: int,
) -> _Logits:
    end = num_prefill
    try:
        stage = DecoderStage(assemble(DagAnalysis(dag), [])[0], _CPU, weights)
        found = [_fed(stage, tokens, 0, num_prefill)]
        for end in range(num_prefill + 1, len(tokens) + 1):
            found.append(_fed(stage, tokens, end - 1, end))
    except Exception as error:
        what = f"a prefill of {end} tokens" if end == num_prefill else f"token {end - 1} by itself"
        raise CaptureFailed(
            f"{name} was captured, and what was captured fails on {what}: {type(error).__name__}: "
            f"{error}. dagflow can't serve it; use transformers' generate, or another model."
        ) from error
    return _Logits(found[0], torch.cat(found[1:]))


def _fed(stage: DecoderStage, tokens: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    part = Part("check", 0, begin, end - begin, begin, ALL)
    return stage.run([part], {TOKENS: tokens[begin:end]})[1]["logits"]
