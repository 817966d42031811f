"""The demo: a GPT learns Python from its library's sources, on a process a core, in two minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from distributed import Client

import dagflow
from dagflow.demo.gpt import GPT, sample
from dagflow.demo.text import ByteTokenizer, find_files, python_library, tokens_of
from dagflow.errors import NotFound, SettingsInvalid
from dagflow_storage import RunDirectory, Store, TokenArray, write_tokens

FOLDER = "runs/demo"
PROMPT = b"    def "
SAMPLE_BYTES = 400
# What the demo puts into its folder, in the order in which it is safe to delete: a run without
# snapshots starts from nothing, and a folder without a run is an empty one.
_CONTENT = ("sample.txt", "snapshots", "metrics", "programs", "run.json", "tokens")


@dataclass(frozen=True)
class DemoSettings:
    """Sizes found to fall from 5.55 nats a byte furthest in two minutes of two cores."""

    num_layers: int = 4
    width: int = 192
    num_heads: int = 4
    context: int = 128
    batch_size: int = 16
    num_microbatches: int = 4
    num_steps: int = 440
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
    tokens = _tokens(store, files)
    print(_introduction(settings, len(tokens)), flush=True)
    result = _train(store, settings, client, progress)
    if result.step < settings.num_steps:
        print(f"Go on from step {result.step}: dagflow demo{_option(folder)}")
        return
    model = settings.model()
    model.load_state_dict(result.state_dict())
    report = f"{_written(model)}\n\n{_outcome(model, result.losses, tokens)}"
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
        snapshot_every=100,
        client=client,
        progress=progress,
    )


def _tokens(store: Store, files: Sequence[str]) -> TokenArray:
    """Open the folder's tokens, written before they are opened for the first time."""
    wanted = {"text": list(files) or "the library of this Python"}
    tokens = TokenArray(store.child("tokens"))
    try:
        found = tokens.attributes
    except NotFound:
        paths = find_files(files) if files else python_library()
        pieces = tokens_of(paths, ByteTokenizer())
        write_tokens(store.child("tokens"), pieces, dtype="uint8", attributes=wanted)
        held_out = tokens_of(paths, ByteTokenizer(), held_out=True)
        return tokens
    if found != wanted:
        raise SettingsInvalid(
            f"{store.url} has tokens of {found.get('text')}, you ask for {wanted['text']}: "
            "use another folder, or --fresh to replace them"
        )
    return tokens
