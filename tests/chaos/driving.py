"""The driver's process: trains, and tells the harness of every step before it goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import dagflow
import dagflow.training.train  # imported before the process is copied
from chaos.faults import Extent
from dagflow.demo.gpt import GPT
from dagflow.training.events import ProgressLine

VOCABULARY, CONTEXT, ROWS = 64, 16, 8
GO_ON = "go on"


@dataclass(frozen=True)
class Size:
    """The size of the model and of its batches."""

    width: int = 32
    num_layers: int = 4
    num_heads: int = 2
    context: int = CONTEXT
    rows: int = ROWS


@dataclass(frozen=True)
class Recipe:
    """What is trained: a tiny GPT with dropout, on random tokens.

    Attributes
    ----------
    extent : Extent
    size : Size
    tokens : str
        URL of the tokens, if workers read them; else the driver hands batches out.
    clip_grad_norm : float or None
    options : dict
        More for `dagflow.train`.
    """

    extent: Extent = field(default_factory=Extent)
    size: Size = field(default_factory=Size)
    tokens: str = ""
    clip_grad_norm: float | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"snapshot_every": 10})

    def model(self) -> GPT:
        torch.manual_seed(0)
        return GPT(
            VOCABULARY,
            width=self.size.width,
            num_layers=self.size.num_layers,
            num_heads=self.size.num_heads,
            context=self.size.context,
            dropout=0.1,
        )

    def data(self) -> Any:
        if self.tokens:
            return dagflow.TokenDataset(self.tokens, self.size.rows, self.size.context, seed=5)
        generator = torch.Generator().manual_seed(7)
        shape = (self.extent.num_steps, self.size.rows, self.size.context + 1)
        tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
        batches = [{"input_ids": t[:, :-1], "labels": t[:, 1:].contiguous()} for t in tokens]
        # The generator's state is the data's own: whoever goes back must set it back, too.
        return DataLoader(batches, batch_size=None, shuffle=True, generator=generator)  # type: ignore[arg-type]

    def train(self, store: str, **more: Any) -> dagflow.TrainResult:
        return dagflow.train(
            self.model(),
            self.data(),
            optimizer=dagflow.Optimizer("AdamW", lr=1e-3),
            clip_grad_norm=self.clip_grad_norm,
            steps=self.extent.num_steps,
            num_stages=self.extent.num_stages,
            num_microbatches=self.extent.num_microbatches,
            store=store,
            **{**self.options, **more},
        )


def drive(
    recipe: Recipe, address: str, store: str, final: Path, told: Connection, wait_seconds: float
) -> None:
    """Train to the end, and leave losses and weights in a file."""

    def on_step(event: dagflow.StepEvent) -> None:
        told.send((event.step, event.loss))
        assert told.recv() == GO_ON

    def note(self: ProgressLine, text: str) -> None:
        print(f"[{time.monotonic():.3f}] {text}")

    ProgressLine.note = note  # type: ignore[method-assign]
    torch.set_num_threads(1)
    cluster = dagflow.ClusterSettings(wait_seconds=wait_seconds)
    config = dagflow.Config(cluster=cluster)
    result = recipe.train(store, client=address, callbacks=[on_step], config=config, progress=True)
    save(result, final)


def undisturbed(recipe: Recipe, final: Path) -> None:
    """Train with one worker inside this process, to which nothing can happen."""
    torch.set_num_threads(1)
    config = dagflow.Config(cluster=dagflow.ClusterSettings(num_workers=1, num_torch_threads=1))
    options = {"snapshot_every": None, "journal": False, "progress": False}
    save(recipe.train(f"memory://{final.stem}", config=config, **options), final)


def save(result: dagflow.TrainResult, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save({"losses": result.losses, "weights": result.state_dict()}, part)
    part.rename(path)
