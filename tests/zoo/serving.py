"""Is a causal language model served as transformers generates? Prefill, then token by token."""

from __future__ import annotations

import time
import uuid
import warnings
from typing import Any

import torch

import dagflow
from dagflow.models.model import read_stage
from dagflow.plan.decoder_cuts import cut_at_layers
from dagflow_tasks.decode.decoder_stage import LAST, Part
from dagflow_tasks.tensors import TensorDict

from .record import Record, short
from .shrink import VOCABULARY

PROMPT_TOKENS, NEW_TOKENS, STAGES = 24, 12, 2
# Of the logits' standard deviation: what rounding makes of fp32 logits.
ROUNDING = 1e-3


def judge_serving(model: Any, record: Record) -> None:
    """Fill a record's columns of serving."""
    model.eval()
    prompt = torch.randint(7, VOCABULARY - 1, (1, PROMPT_TOKENS), generator=_generator())
    try:
        tokens, wanted = _generate(model, prompt)
    except Exception as error:
        record.note(generates=False, serving="not run", serving_cause=f"eager: {short(error)}")
        return
    record.note(generates=True)
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = dagflow.load(model, store=f"memory://zoo-{uuid.uuid4().hex}")
        record.note(load_seconds=round(time.process_time() - began, 2))
        found = _decode(loaded, prompt[0].tolist(), tokens)
    except Exception as error:
        record.failed("serving", error)
        return
    _compare(found, wanted, tokens, record)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@torch.no_grad()
def _generate(model: Any, prompt: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Return transformers' greedy tokens, and the logits (N, V) that they were chosen from."""
    found = model.generate(
        prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat([row[:1].float() for row in found.logits])
    if not torch.isfinite(logits).all():
        raise ValueError("its logits aren't finite")
    tokens: list[int] = found.sequences[0, prompt.shape[1] :].tolist()
    return tokens, logits


def _decode(loaded: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Prefill the prompt, feed transformers' tokens one by one, and return the logits (N, V)."""
    programs = cut_at_layers(loaded.dag, STAGES).programs
    stages = [read_stage(loaded.ref, program, torch.device("cpu")) for program in programs]
    rows = []
    start = 0
    for row in [prompt, *([token] for token in tokens[:-1])]:
        parts = [Part("a", 0, start, len(row), start, LAST)]
        values = TensorDict({"in.tokens": torch.tensor(row)})
        for stage in stages:
            parts, values = stage.run(parts, values)
        rows.append(values["logits"])
        start += len(row)
    return torch.cat(rows)


def _compare(found: torch.Tensor, wanted: torch.Tensor, tokens: list[int], record: Record) -> None:
    wanted = wanted[:, : found.shape[1]]
    errors = (found - wanted).abs().amax(-1) / wanted.std().clamp_min(1e-30)
    amount = float(errors.nan_to_num(nan=float("inf")).max())
    same = sum(int(row.argmax()) == token for row, token in zip(found, tokens, strict=True))
    record.note(served=f"{same}/{len(tokens)}", serving_difference=amount)
    # Feeding transformers' own tokens, all the same from there on means the same greedy answer.
    if amount <= ROUNDING or (same == len(tokens) and amount <= 10 * ROUNDING):
        record.note(serving="right")
        return
    where = "from the prefill on" if float(errors[0]) > ROUNDING else "token by token only"
    record.note(serving="wrong", serving_cause=f"wrong {where}: logits off by {amount:.1e}")
