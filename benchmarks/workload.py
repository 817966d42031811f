"""What every contestant of the throughput benchmark trains: the same weights, on the same bytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dagflow.demo.gpt import GPT
from dagflow.demo.text import ByteTokenizer, python_library, tokens_of

TEXT_BYTES = 2_000_000


@dataclass(frozen=True)
class Workload:
    """A GPT on bytes, cut into stages, with AdamW."""

    num_layers: int = 8
    width: int = 512
    num_heads: int = 8
    context: int = 256
    vocab_size: int = 256
    num_stages: int = 2
    num_microbatches: int = 8
    rows_per_microbatch: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    learning_rate: float = 3e-4
    fused_optimizer: bool = True
    num_warmup_steps: int = 3
    num_timed_steps: int = 8
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return self.num_warmup_steps + self.num_timed_steps

    @property
    def rows(self) -> int:
        """Sequences a step."""
        return self.num_microbatches * self.rows_per_microbatch

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context

    def model(self) -> GPT:
        """Build the model: the same weights in every process."""
        torch.manual_seed(self.seed)
        return GPT(
            self.vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            context=self.context,
        )

    def optimizer_options(self) -> dict[str, Any]:
        """Options of AdamW, for torch and for dagflow alike."""
        return {"lr": self.learning_rate, "fused": self.fused_optimizer}

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield one batch a step: ``input_ids`` and the bytes that follow them, ``(B, T)``."""
        pieces = tokens_of(python_library(), ByteTokenizer(), limit_bytes=TEXT_BYTES)
        tokens = torch.from_numpy(np.concatenate(list(pieces)).astype(np.int64))
        if self.vocab_size < 256:
            tokens %= self.vocab_size
        random = np.random.default_rng(self.seed)
        for _ in range(self.num_steps):
            offsets = random.integers(0, len(tokens) - self.context, self.rows)
            windows = torch.stack([tokens[o : o + self.context + 1] for o in offsets])
            yield {"input_ids": windows[:, :-1], "labels": windows[:, 1:].contiguous()}

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as torch's users switch it on: around the forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Timing:
    """One process' run: a loss a step, and the seconds of the steps after the warm-up."""

    losses: list[float]
    seconds: list[float]

    @classmethod
    def from_ends(cls, workload: Workload, losses: list[float], ends: list[float]) -> Timing:
        """Take a step to last from the end of the one before to its own, as no barrier parts them.

        Parameters
        ----------
        ends
            The clock in seconds at the end of each step.
        """
        seconds = [end - begin for begin, end in itertools.pairwise(ends)]
        return cls(losses, seconds[workload.num_warmup_steps - 1 :])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Timing:
        return cls(**json.loads(path.read_text()))
