"""Runs made by hand: what `train` leaves in a store, without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from dagflow.cli import main
from dagflow.runs.export import model_facts
from dagflow_storage import RunDirectory, Snapshot, Store, commit_snapshot
from dagflow_tasks.train.state import BUFFER, OPTIMIZER, PARAMETER, write_tensors


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def tensors(model: torch.nn.Module, step: int) -> dict[tuple[str, str], torch.Tensor]:
    found = {(PARAMETER, name): tensor + step for name, tensor in model.named_parameters()}
    found |= {(OPTIMIZER, f"{name}:m"): tensor * 0 for name, tensor in model.named_parameters()}
    return found | {(BUFFER, name): tensor for name, tensor in model.named_buffers()}


def make_run(
    folder: Path | str, model: torch.nn.Module, steps: tuple[int, ...] = (0, 4, 8), **options: Any
) -> Store:
    """A run whose parameters are the model's plus the step."""
    store = Store(folder)
    run = RunDirectory(store)
    run.create(settings(model), options.get("facts", facts(model)))
    run.write_programs("plan", ["{}"])
    for step in steps:
        take(store, model, step)
    run.append_metrics([row(step) for step in range(1, steps[-1] + 1)])
    return store


def take(store: Store, model: torch.nn.Module, step: int, **meta: Any) -> None:
    records = [write_tensors(store, step, "stage-0", tensors(model, step))]
    content = {"loss": 1 / (step + 1), "decision": None, **meta}
    assert commit_snapshot(store, step, records, content)
    assert Snapshot.open(store, step)


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / (step + 1), "seconds": 0.1, "amount": 8, "unit": "samples"}


def settings(model: torch.nn.Module) -> dict[str, Any]:
    shapes = {
        name: f"{str(p.dtype).removeprefix('torch.')}{list(p.shape)}"
        for name, p in model.named_parameters()
    }
    return {
        "model": {"parameters": shapes, "num_trainable": 1, "num_operators": 1},
        "optimizer": {"name": "AdamW", "options": {"lr": 0.1}},
        "schedule": {"kind": "constant"},
        "num_microbatches": 1,
        "precision": "fp32",
        "seed": 0,
    }


def facts(model: torch.nn.Module) -> Mapping[str, Any]:
    first = {id(p): name for name, p in model.named_parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    tied = {name: first[id(p)] for name, p in everywhere if first[id(p)] != name}
    return model_facts(list(model.state_dict()), tied)


class Tied(torch.nn.Module):
    """Tied weights, odd sizes, several dtypes, a buffer in the state_dict and one that isn't."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, width)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.low = torch.nn.Parameter(torch.randn(3).bfloat16())
        self.head = torch.nn.Linear(width, 5, bias=False)
        self.head.weight = self.table.weight
        self.norm = torch.nn.BatchNorm1d(width)
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("mask", torch.ones(7), persistent=False)
