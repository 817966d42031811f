"""The baselines: the same training in plain torch, and in torch's own pipelines over gloo."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
)
from torch.nn import functional
from workload import Timing, Workload

from dagflow.demo.gpt import GPT

NUM_RANKS = 2


def train_plain(workload: Workload) -> Timing:
    """Train in one process, the batch accumulated over the same micro-batches."""
    model = workload.model().to(workload.device)
    optimizer = torch.optim.AdamW(model.parameters(), **workload.optimizer_options())
    losses, ends = [], []
    for batch in list(workload.batches()):
        total = torch.zeros((), device=workload.device)
        for ids, labels in zip(
            batch["input_ids"].to(workload.device).chunk(workload.num_microbatches),
            batch["labels"].to(workload.device).chunk(workload.num_microbatches),
            strict=True,
        ):
            with workload.autocast():
                loss = model(ids, labels) / workload.num_microbatches
            loss.backward()
            total += loss.detach().float()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        ends.append(time.perf_counter())
    return Timing.from_ends(workload, losses, ends)


def train_1f1b(workload: Workload) -> Timing:
    """Train on two ranks of one thread each: 1F1B, interleaved if a rank has several stages."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (workload, folder), nprocs=NUM_RANKS)
        return Timing.load(Path(folder, "timing.json"))


class GPTStage(nn.Module):
    """An equal share of a GPT's blocks; the first stage embeds, the last has the head."""

    def __init__(self, model: GPT, index: int, workload: Workload) -> None:
        super().__init__()
        share = workload.num_layers // workload.num_stages
        self.workload = workload
        self.blocks = model.blocks[index * share : (index + 1) * share]
        self.embedding = model.embedding if index == 0 else None
        self.positions = model.positions if index == 0 else None
        is_last = index == workload.num_stages - 1
        self.head = nn.Sequential(model.norm, model.head) if is_last else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Token ids ``(B, T)`` or hidden states ``(B, T, D)`` to the latter or logits."""
        with self.workload.autocast():
            if self.embedding is not None and self.positions is not None:
                hidden = self.embedding(hidden) + self.positions[: hidden.shape[1]]
            for block in self.blocks:
                hidden = block(hidden)
            return hidden if self.head is None else self.head(hidden)


def _rank(rank: int, workload: Workload, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS
    )
    timing = _train_rank(rank, workload)
    dist.destroy_process_group()
    if rank == NUM_RANKS - 1:
        timing.save(Path(folder, "timing.json"))


def _train_rank(rank: int, workload: Workload) -> Timing:
    indices = range(rank, workload.num_stages, NUM_RANKS)
    model = workload.model()
    stages = [GPTStage(model, index, workload) for index in indices]
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    optimizer = torch.optim.AdamW(parameters, **workload.optimizer_options())
    schedule = _schedule(stages, list(indices), workload)
    losses, ends = [], []
    for batch in list(workload.batches()):
        of_microbatches: list[Tensor] = []
        inputs = (batch["input_ids"],) if rank == 0 else ()
        target = {"target": batch["labels"]} if rank == NUM_RANKS - 1 else {}
        schedule.step(*inputs, **target, losses=of_microbatches, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
        if of_microbatches:
            losses.append(torch.stack(of_microbatches).float().mean().item())
    return Timing.from_ends(workload, losses, ends)


def _schedule(
    modules: list[GPTStage], indices: list[int], workload: Workload
) -> Schedule1F1B | ScheduleInterleaved1F1B:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        with workload.autocast():
            return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    stages = [
        PipelineStage(module, index, workload.num_stages, torch.device("cpu"))
        for module, index in zip(modules, indices, strict=True)
    ]
    if workload.num_stages == NUM_RANKS:
        return Schedule1F1B(stages[0], workload.num_microbatches, loss)
    return ScheduleInterleaved1F1B([*stages], workload.num_microbatches, loss)
