"""Models whose attention is more than causal are served as transformers generates, or refused by name."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import ATTENDING, attending_model, greedy, logits_of

from dagflow.errors import CaptureFailed
from dagflow.graph.attention_capture import Mask, MaskRead, _read_mask, _Registry
from dagflow.graph.capture import export_module
from dagflow.graph.dag import input_value
from dagflow.graph.decoder import capture_decoder
from dagflow.graph.tokenwise import check_tokenwise, take_positions
from dagflow.graph.translate import translate
from dagflow.plan.decoder_cuts import cut_at_layers
from dagflow_tasks.decode.decoder_stage import ALL, DecoderStage, Part
from dagflow_tasks.kernels.attention import ATTEND
from dagflow_tasks.program.stage_program import ValueSpec
from dagflow_tasks.tensors import TensorDict

PROMPT = [(7 * n * n + 3 * n + 5) % 90 + 4 for n in range(21)]
NUM_NEW = 24
CPU = torch.device("cpu")
QUICK = ("granite_swa", "llama4", "gptj", "mpt", "bart")


class _Served:
    """A model's stages in this process, fed by hand."""

    def __init__(self, model: Any) -> None:
        self.dag = capture_decoder(model)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors |= dict(model.state_dict(keep_vars=True))
        weights = {name: tensor.detach() for name, tensor in tensors.items()}
        programs = cut_at_layers(self.dag, 2).programs
        self.stages = [DecoderStage(program, CPU, weights) for program in programs]

    def logits(
        self, tokens: list[int], start: int, session: str = "a", epoch: int = 0
    ) -> torch.Tensor:
        parts = [Part(session, epoch, start, len(tokens), start, ALL)]
        values = TensorDict({"in.tokens": torch.tensor(tokens)})
        for stage in self.stages:
            parts, values = stage.run(parts, values)
        return values["logits"]

    def next(self, tokens: list[int], start: int, session: str = "a", epoch: int = 0) -> int:
        """Give tokens, and return the one that follows."""
        return int(self.logits(tokens, start, session, epoch)[-1].argmax())


@cache
def _served(family: str) -> _Served:
    return _Served(attending_model(family))


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ATTENDING],
)
def test_answers_equal_those_of_transformers_with_forks_and_rewinds(family: str) -> None:
    model, served = attending_model(family), _served(family)
    wanted = greedy(model, PROMPT, NUM_NEW)
    pieces = [served.logits(PROMPT[a:b], a) for a, b in [(0, 7), (7, 8), (8, 17), (17, 21)]]
    torch.testing.assert_close(torch.cat(pieces), logits_of(model, PROMPT), atol=1e-4, rtol=1e-4)
    answer = [int(pieces[-1][-1].argmax())]
    while len(answer) < NUM_NEW:
        answer.append(served.next(answer[-1:], len(PROMPT) + len(answer) - 1))
    assert answer == wanted
    length = len(PROMPT) + NUM_NEW - 1
    assert all(stage.fork("a", "b", length - 3) for stage in served.stages)
    assert served.next(wanted[-4:-2], length - 3, "b") == wanted[-2]
    assert served.next(wanted[10:14], length - 13, epoch=1) == wanted[14]


def test_positions_that_a_model_counts_by_itself_are_those_of_the_session() -> None:
    dag = _served("bart").dag
    readers = [node.op for node in dag.nodes if "in.positions" in node.references()]
    assert readers == ["aten.select.int"]


def test_a_bias_that_a_model_builds_becomes_slopes() -> None:
    dag = _served("mpt").dag
    slopes = [node.args[6] for node in dag.nodes if node.op == ATTEND]
    constants = {constant.name: constant.tensor() for constant in dag.constants}
    for slope in slopes:
        torch.testing.assert_close(
            constants[slope["ref"]], torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])
        )


# What can't be served is refused, by name


def _attend(**given: Any) -> Any:
    module = torch.nn.Identity()
    registry = _Registry(
        torch.nn.ModuleDict({"attention": module}), given.pop("implementation", "eager")
    )
    row = torch.randn(1, 2, 3, 4)
    given = {"attention_mask": Mask(), **given}
    return registry.attention(module, row, row, row, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"position_bias": torch.zeros(1, 2, 3, 3)},
        {"head_mask": torch.ones(2)},
        {"dropout": 0.1},
        {"block_indices": torch.zeros(3)},
        {"sinks": torch.zeros(1, 2, 1, 1)},
    ],
)
def test_arguments_that_are_not_known_are_errors(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(CaptureFailed, match=f"'attention'.*{name[:5]}.*What to do"):
        _attend(**given)


def test_arguments_that_ask_for_nothing_are_taken() -> None:
    taken = {
        "position_bias": None,
        "output_attentions": False,
        "dropout": 0.0,
        "cu_seq_lens_q": None,
    }
    found, weights = _attend(**taken)
    assert found.shape == (1, 3, 2, 4)
    assert weights is None


@pytest.mark.parametrize(("mask", "implementation"), [(None, "eager"), ("all", "sdpa")])
def test_masks_that_are_not_causal_are_errors(mask: Any, implementation: str) -> None:
    with pytest.raises(CaptureFailed, match=r"'attention' is given .* mask"):
        _attend(attention_mask=mask, implementation=implementation)


def test_what_masks_hide_is_read_from_what_they_are_made_of() -> None:
    from transformers import masking_utils as masks

    def read(function: Any) -> tuple[int, int]:
        found = _read_mask(function)
        return found.window, found.chunk

    assert read(masks.causal_mask_function) == (0, 0)
    assert read(masks.sliding_window_causal_mask_function(7)) == (7, 0)
    assert read(masks.chunked_causal_mask_function(5, torch.zeros(1))) == (0, 5)
    both = masks.and_masks(
        masks.sliding_window_causal_mask_function(7), masks.sliding_window_overlay(3)
    )
    for other in (
        masks.bidirectional_mask_function,
        masks.sliding_window_overlay(7),
        masks.or_masks(masks.causal_mask_function, masks.bidirectional_mask_function),
        both,
    ):
        with pytest.raises(MaskRead, match="neither causal"):
            read(other)


def test_masks_are_handed_on_or_it_is_said_that_they_are_not() -> None:
    mask = Mask(4)
    assert mask[:, :, :, :9] is mask
    assert mask.to(torch.float32) is mask
    for use in (
        lambda: mask[:, -1:],
        lambda: mask + 1.0,
        lambda: mask.shape,
        lambda: torch.where(mask, 1.0, 0.0),
    ):
        with pytest.raises(MaskRead, match="What to do"):
            use()


class _Tiny(torch.nn.Module):
    """Embeds tokens, does something to them, and returns rows."""

    def __init__(self, does: Callable[[_Tiny, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embed, self.places = torch.nn.Embedding(20, 4), torch.nn.Embedding(64, 4)
        self.register_buffer("table", torch.randn(64, 4))
        self.does = does

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        return torch.relu(self.does(self, self.embed(tokens))[:, rows])


class _Wrapper(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.model(*tensors)


def _captured(does: Callable[[_Tiny, torch.Tensor], torch.Tensor]) -> Any:
    model = _Tiny(does)
    row = torch.arange(5)[None]
    tensors = {"tokens": row, "positions": row.clone(), "rows": torch.tensor([1, 3, 4])}
    dims = {"tokens": (1,), "positions": (1,), "rows": (0,)}
    exported, _ = export_module(_Wrapper(model), model, tensors, dims)
    inputs = [ValueSpec(input_value(n), "int64", tuple(t.shape)) for n, t in tensors.items()]
    return translate(exported, model, inputs, {}, scalar=False)


MIXING: dict[str, tuple[Callable[[_Tiny, torch.Tensor], torch.Tensor], str]] = {
    "a mean": (lambda _, x: x - x.mean(1, keepdim=True), "computes mean over tokens"),
    "a shift": (lambda _, x: F.pad(x[:, :-1], (0, 0, 1, 0)), "shifts, pads or cuts"),
    "a roll": (lambda _, x: x.roll(1, 1), "computes roll over tokens"),
    "a running sum": (lambda _, x: x.cumsum(1), "computes cumsum over tokens"),
    "the last token": (lambda _, x: x + x[:, -1], "takes single tokens"),
    "a convolution": (
        lambda _, x: F.conv1d(x.mT, torch.ones(4, 4, 3), padding=1).mT,
        "computes conv1d over",
    ),
    "products of tokens": (lambda _, x: x @ (x.mT @ x), "sums over tokens in a product"),
    "pairs of tokens": (lambda _, x: torch.tanh(x @ x.mT) @ x, "compares tokens with tokens"),
    "their number": (lambda _, x: x / x.shape[1], "computes with the number of tokens"),
}


@pytest.mark.parametrize("kind", MIXING)
def test_what_looks_at_other_tokens_is_refused_with_its_module_and_line(kind: str) -> None:
    does, reason = MIXING[kind]
    with pytest.raises(CaptureFailed, match=rf"{reason}.*test_attending.py:\d+.*What to do"):
        check_tokenwise(_captured(does))


def test_what_looks_at_each_token_by_itself_is_taken() -> None:
    check_tokenwise(_captured(lambda _, x: F.layer_norm(x, (4,)).softmax(-1) @ torch.ones(4, 4)))
    # Rows that routing has sorted, as mixtures of experts have them.
    check_tokenwise(_captured(lambda _, x: x[:, x[0, :, 0].long().argsort()]))


@pytest.mark.parametrize(
    "counts",
    [
        lambda m, x: x + m.places(torch.arange(x.shape[1])),
        lambda m, x: x + m.places(torch.arange(0, x.shape[1])[None] + 2),
        lambda m, x: x + m.table[: x.shape[1]],
        lambda m, x: x + torch.arange(x.shape[1], dtype=torch.float32)[:, None].sin(),
    ],
)
def test_positions_that_are_counted_are_the_sessions(counts: Any) -> None:
    dag = take_positions(_captured(counts))
    assert any("in.positions" in node.references() for node in dag.nodes)
    check_tokenwise(dag)


def test_positions_that_are_counted_in_another_way_are_refused() -> None:
    def counts(model: _Tiny, x: torch.Tensor) -> torch.Tensor:
        return x + model.places(torch.ones_like(x[..., 0], dtype=torch.int64).cumsum(1) - 1)

    with pytest.raises(CaptureFailed, match="counts tokens' positions by itself"):
        take_positions(_captured(counts))


def test_a_cache_that_forgets_what_attention_sees_is_refused() -> None:
    config = SimpleNamespace(sliding_window=8, max_position_embeddings=64)
    config.get_text_config = lambda decoder: config
    from dagflow.graph.decoder import _check_windows

    dag = _served("gptj").dag
    with pytest.raises(CaptureFailed, match=r"transformer.h.0.*sliding_window of 8.*What to do"):
        _check_windows(dag, config)
    config.max_position_embeddings = 8
    _check_windows(dag, config)


def test_transformers_registries_are_left_as_they_were() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = set(ALL_ATTENTION_FUNCTIONS)
    _served("llama4")
    assert set(ALL_ATTENTION_FUNCTIONS) == before
    assert "dagflow" not in before


@pytest.mark.parametrize("family", ["granite_swa", pytest.param("gptj", marks=pytest.mark.slow)])
def test_whoever_draws_in_another_thread_meanwhile_changes_no_graph(family: str) -> None:
    """dask's event loop draws now and then, which a capture takes for the model's own draw at first."""
    model, quiet = attending_model(family), _served(family).dag
    done = threading.Event()

    def draw() -> None:
        while not done.wait(0.001):
            random.random()

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        assert capture_decoder(model).to_json() == quiet.to_json()
    finally:
        done.set()
        drawing.join()
