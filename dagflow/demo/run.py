"""The demo: a GPT learns Python from its library's sources, on a process a core, in two minutes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from distributed import Client

import dagflow
from dagflow.demo.gpt import GPT, mean_loss, sample
from dagflow.demo.text import ByteTokenizer, TokenIds, find_files, python_library, tokens_of
from dagflow.errors import NotFound, SettingsInvalid
from dagflow_storage import JSON, Store, TokenArray, shown_url, write_tokens

FOLDER = "runs/demo"
PROMPT = b"    def __init__(self"
SAMPLE_BYTES = 400
TEMPERATURE = 0.8
# What the demo puts into its folder, in the order in which it is safe to delete: a run without
# snapshots starts from nothing, and a folder without a run is an empty one.
_CONTENT = ("sample.txt", "snapshots", "metrics", "programs", "run.json", "tokens")


@dataclass(frozen=True)
class DemoSettings:
    """What learns most in two minutes of two cores: 1.5 million tokens, from 5.5 nats to about 1.9.

    A wider model sees fewer tokens in that time and ends higher (192 wide: 0.9 million, 2.05).
    """

    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    context: int = 128
    batch_size: int = 32
    num_microbatches: int = 8
    num_steps: int = 360
    learning_rate: float = 4e-3
    num_warmup_steps: int = 30

    def model(self, seed: int = 0) -> GPT:
        """Build the model, untrained."""
        torch.manual_seed(seed)
        return GPT(
            ByteTokenizer.vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            context=self.context,
        )


def run_demo(
    folder: str = FOLDER,
    *,
    files: Sequence[str] = (),
    fresh: bool = False,
    client: Client | str | None = None,
    progress: bool = True,
    settings: DemoSettings | None = None,
) -> None:
    """Train a GPT on bytes of text, print what it writes, and how to look at the run.

    Called again it goes on where it was stopped, or prints again what it wrote.

    Parameters
    ----------
    folder
        Tokens, run and sample are put there; any fsspec URL that the workers see, too.
    files
        Text files, folders or globs, instead of the library of this Python.
    fresh
        Forget what is in `folder`, and start at the first step.

    Raises
    ------
    SettingsInvalid
        If no file fits `files`, or `folder` holds a demo of other files.
    """
    settings = settings or DemoSettings()
    store = Store(folder)
    if fresh:
        _forget(store)
    elif store.exists("sample.txt"):
        print(store.read_bytes("sample.txt").decode())
        print(f"\nThis run is finished. Start afresh: dagflow demo{_option(folder)} --fresh")
        print(_how_to_look(folder))
        return
    corpus = _corpus(files)
    _write_tokens(store, corpus)
    print(_introduction(settings, corpus), flush=True)
    try:
        result = _train(store, settings, client, progress)
    except KeyboardInterrupt:
        print(f"Go on from here: dagflow demo{_option(folder)}")
        raise
    model = settings.model()
    model.load_state_dict(result.state_dict())
    report = f"{_written_by(model)}\n\n{_outcome(model, result.losses, corpus)}"
    # Last: with it the demo is finished.
    store.write_bytes("sample.txt", report.encode())
    print(f"\n{report}\n{_how_to_look(folder)}")


def _train(
    store: Store, settings: DemoSettings, client: Client | str | None, progress: bool
) -> dagflow.TrainResult:
    data = dagflow.TokenDataset(
        store.child("tokens").url,
        batch_size=settings.batch_size,
        sequence_length=settings.context,
    )
    return dagflow.train(
        settings.model(),
        data,
        optimizer=dagflow.Optimizer(
            "AdamW", lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        ),
        schedule=dagflow.Schedule("cosine", warmup_steps=settings.num_warmup_steps),
        clip_grad_norm=1.0,
        steps=settings.num_steps,
        num_microbatches=settings.num_microbatches,
        store=store.url,
        client=client,
        progress=progress,
        config=dagflow.Config(origin={"command": "demo"} if settings == DemoSettings() else None),
    )


@dataclass(frozen=True)
class _Corpus:
    """Text files, and what to call them."""

    name: str
    files: Sequence[Path]

    def tokens(self, held_out: bool = False) -> Iterator[TokenIds]:
        return tokens_of(self.files, ByteTokenizer(), held_out=held_out)

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def _corpus(files: Sequence[str]) -> _Corpus:
    if files:
        return _Corpus(", ".join(files), find_files(files))
    return _Corpus("the library of this Python", python_library())


def _write_tokens(store: Store, corpus: _Corpus) -> None:
    """Write the folder's tokens, unless a demo that was stopped left the same ones."""
    place = store.child("tokens")
    try:
        found = TokenArray(place).attributes.get("text")
    except NotFound:
        attributes: dict[str, JSON] = {"text": corpus.name}
        write_tokens(place, corpus.tokens(), dtype="uint8", attributes=attributes)
        return
    if found != corpus.name:
        raise SettingsInvalid(
            f"{store} is learning from {found}, you ask for {corpus.name}: use another folder, "
            "or --fresh to start afresh here"
        )


def _forget(store: Store) -> None:
    for name in _CONTENT:
        store.delete(name)


def _introduction(settings: DemoSettings, corpus: _Corpus) -> str:
    num_parameters = sum(parameter.numel() for parameter in settings.model().parameters())
    return (
        f"A GPT of {num_parameters / 1e6:.1f} M parameters learns from {corpus.name}: "
        f"{len(corpus.files)} files, {corpus.num_bytes() / 1e6:.1f} MB, a token a byte; "
        f"{settings.num_steps} steps of {settings.batch_size} x {settings.context} tokens."
    )


def _written_by(model: GPT) -> str:
    tokenizer = ByteTokenizer()
    prompt = torch.tensor(list(PROMPT))
    text = tokenizer.decode(sample(model, prompt, SAMPLE_BYTES, TEMPERATURE).tolist())
    return f"What it writes after {PROMPT.decode()!r}:\n\n{text}"


def _outcome(model: GPT, losses: Sequence[float], corpus: _Corpus) -> str:
    line = f"Loss: {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last"
    unseen = np.concatenate([*corpus.tokens(held_out=True), np.empty(0, np.uint8)])
    if len(unseen) <= model.context:
        return f"{line}."
    return f"{line}; {mean_loss(model, torch.from_numpy(unseen)):.2f} on text it never saw."


def _option(folder: str) -> str:
    return "" if folder == FOLDER else f" --folder {shown_url(folder)}"


def _how_to_look(folder: str) -> str:
    return f"Look at the run: dagflow inspect {shown_url(folder)}"
