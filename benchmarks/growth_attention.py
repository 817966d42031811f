"""What a long prompt costs with grouped queries, against transformers on the same model.

Prefill in the passes that sessions send, and transformers' own in one, in turns and in one process:
machines differ from minute to minute, ratios don't.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from dagflow.graph.decoder import capture_decoder
from dagflow.plan.decoder_cuts import cut_at_layers
from dagflow_tasks.decode.decoder_stage import LAST, DecoderStage, Part
from dagflow_tasks.kernels.attention import attend, attending
from dagflow_tasks.kernels.session_cache import SessionCache, Span
from dagflow_tasks.tensors import TensorDict

# As the engine sends them.
PASS_TOKENS = 256
HEADS, KEY_HEADS, HEAD_WIDTH = 32, 8, 32


def gqa_prefill(lengths: tuple[int, ...] = (1024, 8192), rounds: int = 3) -> dict[str, Any]:
    """Return CPU seconds of prefill, their ratio to transformers', and what a pass takes besides.

    Returns
    -------
    dict
        By length: ``ratio`` of the medians, ``dagflow_seconds``, ``transformers_seconds``; and
        ``temporary_ratio``, the most memory that attention takes while a pass of 512 tokens is looked
        up, divided by 512 tokens x length x 4 bytes.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=HEADS * HEAD_WIDTH,
        intermediate_size=HEADS * HEAD_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=2 * max(lengths),
    )
    model = transformers.LlamaForCausalLM(config).eval()
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    weights |= dict(model.named_buffers()) | dict(model.state_dict())
    (program,) = cut_at_layers(capture_decoder(model), 1).programs
    stage = DecoderStage(program, torch.device("cpu"), weights)
    found: dict[str, Any] = {}
    for length in lengths:
        tokens = torch.randint(0, config.vocab_size, (length,))

        def ours(tokens: torch.Tensor = tokens) -> torch.Tensor:
            return _in_passes(stage, tokens)

        def theirs(tokens: torch.Tensor = tokens) -> torch.Tensor:
            with torch.inference_mode():
                return model(tokens[None], logits_to_keep=1).logits[0]

        torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)
        seconds: dict[str, list[float]] = {"dagflow": [], "transformers": []}
        for _ in range(rounds):
            seconds["dagflow"].append(_cpu_seconds(ours))
            seconds["transformers"].append(_cpu_seconds(theirs))
        mine, other = (sorted(values)[rounds // 2] for values in seconds.values())
        found[str(length)] = {
            "ratio": round(mine / other, 3),
            "dagflow_seconds": round(mine, 3),
            "transformers_seconds": round(other, 3),
            "temporary_ratio": round(_temporary_bytes(length) / (512 * length * 4), 2),
        }
    return found


def _in_passes(stage: DecoderStage, tokens: torch.Tensor) -> torch.Tensor:
    session = f"session of {len(tokens)}"
    for start in range(0, len(tokens), PASS_TOKENS):
        given = tokens[start : start + PASS_TOKENS]
        last = start + len(given) == len(tokens)
        part = Part(session, 0, start, len(given), start, LAST if last else "nothing")
        _, values = stage.run([part], TensorDict({"in.tokens": given}))
    stage.sessions.pop(session)
    stage._epochs.pop(session)
    return values["logits"]


def _cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _temporary_bytes(length: int) -> int:
    """Return by how much this process grows while 512 tokens look back at others (Linux)."""
    count = 512
    query = torch.randn(1, HEADS, count, HEAD_WIDTH)
    keys = torch.randn(1, KEY_HEADS, length, HEAD_WIDTH)
    cache = SessionCache()
    cache.put(0, 0, keys[0], keys[0])
    cache.length = length
    new = keys[:, :, -count:]
    with torch.inference_mode(), attending([Span(cache, 0, 32)]):  # what a first call takes
        attend(query[:, :, :32], keys[:, :, :32], keys[:, :, :32], 0, 1.0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = _status("VmRSS")
    with torch.inference_mode(), attending([Span(cache, length - count, count)]):
        attend(query, new, new, 0, 1.0)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"gqa_prefill": gqa_prefill(tuple(options.lengths), options.rounds)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
