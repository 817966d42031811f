"""Training language models on text files from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dagflow
from dagflow.demo.gpt import GPT
from dagflow.demo.run import run_demo
from dagflow.demo.text import ByteTokenizer, find_files, python_library, tokens_of
from dagflow.errors import SettingsInvalid
from dagflow.models.foreign_code import reason, refuse_kernels
from dagflow_storage import RunDirectory, Store, shown_url
from dagflow_storage.place import fields
from dagflow_storage.place.documents import sound


def train_language_model(
    files: Sequence[str],
    *,
    model: str | None,
    layers: int,
    width: int,
    steps: int,
    batch_size: int,
    sequence_length: int,
    lr: float,
    microbatches: int,
    stages: int | str,
    precision: str,
    seed: int,
    store: str,
    scheduler: str | None,
) -> None:
    """Train a byte-level GPT, or a Hugging Face model folder, and say where the result is."""
    paths = find_files(files) if files else python_library()
    origin = {
        "command": "train",
        "files": [str(path.resolve()) for path in paths] if files else [],
        "model": str(Path(model).resolve()) if model is not None else None,
        "layers": layers,
        "width": width,
        "steps": steps,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "lr": lr,
        "microbatches": microbatches,
        "stages": stages,
        "precision": precision,
        "seed": seed,
    }
    tokens_url = Store(store).child("tokens").url
    network, shifted = _network(model, layers, width, sequence_length, seed)
    _write_tokens(tokens_url, paths, model)
    data = dagflow.TokenDataset(
        tokens_url,
        batch_size=batch_size,
        sequence_length=sequence_length,
        seed=seed,
        shifted=shifted,
    )
    result = dagflow.train(
        network,
        data,
        optimizer=dagflow.Optimizer("AdamW", lr=lr),
        schedule=dagflow.Schedule("cosine", warmup_steps=min(20, steps // 10)),
        clip_grad_norm=1.0,
        steps=steps,
        num_stages=stages,
        num_microbatches=microbatches,
        precision=precision,
        seed=seed,
        store=store,
        client=scheduler,
        config=dagflow.Config(origin=origin),
    )
    if result.losses:
        print(f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f} in {result.step} steps")
    print(f"look at the run: dagflow inspect {shown_url(store)}")
    if model is not None:
        target = Path(model).name + "-trained"
        network.load_state_dict(result.state_dict())
        network.save_pretrained(target)  # type: ignore[operator]
        print(f"trained model: {target}")


def _check_origin(origin: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are what `train_language_model` has noted."""
    counts = ("layers", "width", "steps", "batch_size", "sequence_length", "microbatches")
    wanted = {"files", "model", "lr", "stages", "precision", "seed", *counts}
    if origin.keys() != wanted:
        raise ValueError(f"it says {sorted(origin)}, not {sorted(wanted)}")
    for file in fields.items(origin["files"], "files"):
        fields.text(file, "a file")
    for name in counts:
        fields.integer(origin[name], name)
    fields.integer(origin["seed"], "seed", least=-fields.MOST_INTEGER)
    fields.number(origin["lr"], "lr")
    fields.text(origin["precision"], "precision")
    if origin["model"] is not None:
        fields.text(origin["model"], "model")
    if not isinstance(origin["stages"], str):
        fields.integer(origin["stages"], "stages")


def resume_run(store: str, scheduler: str | None) -> None:
    """Go on with a run as the command that began it would.

    Raises
    ------
    SettingsInvalid
        If no command began it, or there is no run.
    DamagedData
        If what the run says of that command can't be right.
    """
    run = RunDirectory(Store(store))
    if not run.exists():
        raise SettingsInvalid(
            f"There is no run at {shown_url(store)}. `dagflow runs ls` lists runs."
        )
    with sound(f"run.json at {shown_url(store)} doesn't say how the run was begun"):
        origin = dict(fields.members(run.facts().get("origin") or {}, "origin"))
        command = origin.pop("command", None)
        if command == "train":
            _check_origin(origin)
    if command == "demo":
        run_demo(store, client=scheduler)
    elif command == "train":
        train_language_model(origin.pop("files"), store=store, scheduler=scheduler, **origin)
    else:
        raise SettingsInvalid(
            f"The run at {shown_url(store)} was begun by a Python program, and only that knows its "
            f"data: call dagflow.train there again with store={shown_url(store)!r}."
        )


def _network(
    model: str | None, layers: int, width: int, context: int, seed: int
) -> tuple[torch.nn.Module, bool]:
    """Return the model, and whether it wants its labels shifted already."""
    if model is None:
        torch.manual_seed(seed)
        vocabulary = ByteTokenizer.vocab_size
        heads = max(1, width // 64)
        gpt = GPT(vocabulary, width=width, num_layers=layers, num_heads=heads, context=context)
        return gpt, True
    return _of_folder("AutoModelForCausalLM", model, use_safetensors=True), False


def _of_folder(kind: str, folder: str, **options: Any) -> Any:
    """Return what transformers reads from a folder, without its code and without pickles."""
    transformers = _transformers()
    refuse_kernels(Path(folder))
    try:
        return getattr(transformers, kind).from_pretrained(
            folder, trust_remote_code=False, **options
        )
    except Exception as error:  # of all kinds
        raise SettingsInvalid(
            f"transformers can't load {folder}: {reason(Path(folder), error)}."
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise SettingsInvalid(
            "--model reads Hugging Face folders with transformers: pip install 'dagflow[hf]'."
        ) from error
    return transformers


def _write_tokens(url: str, paths: Sequence[Path], model: str | None) -> None:
    if Store(url).list():
        return
    if model is None:
        tokenizer: Any = ByteTokenizer()
        pieces = (np.asarray(piece, dtype="uint16") for piece in tokens_of(paths, tokenizer))
        dagflow.TokenDataset.write(url, pieces)
        return
    encode = _of_folder("AutoTokenizer", model)
    dagflow.TokenDataset.write(
        url,
        (
            np.array(encode(path.read_text(encoding="utf-8", errors="replace"))["input_ids"])
            for path in paths
        ),
        dtype="uint32",
    )
