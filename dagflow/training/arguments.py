"""What `train` and its like are called with, looked at first: each mistake is one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from dagflow.arguments import check_client, is_whole, shown
from dagflow.errors import OptimizerInvalid, SettingsInvalid
from dagflow.training.settings import Config
from dagflow_tasks.train.optimizer import Optimizer, Schedule


def check_arguments(
    *,
    model: Any,
    loss: Any,
    optimizer: Any,
    schedule: Any,
    config: Any,
    client: Any,
    state_dict: Any,
    **numbers: Any,
) -> None:
    """Refuse arguments of another kind than `train` takes, and numbers that count nothing.

    Raises
    ------
    SettingsInvalid, OptimizerInvalid
        Saying what was wanted, what was found, and what to write.
    """
    _check_model(model)
    _check_loss(loss)
    _check_optimizer(optimizer)
    _check_schedule(schedule)
    _check_config(config)
    check_client(client)
    _check_state_dict(state_dict)
    _check_numbers(**numbers)


def journal_steps(journal: Any) -> int:
    """Return how many steps are written together; 0 for no journal.

    Raises
    ------
    SettingsInvalid
    """
    if not isinstance(journal, (bool, int)) or journal < 0:
        raise SettingsInvalid(
            f"journal is True, False, or a number of steps to write together; found {journal!r}."
        )
    return int(journal)


def observers(callbacks: Any) -> tuple[Any, ...]:
    """Return what is told of every step.

    Raises
    ------
    SettingsInvalid
    """
    if callable(callbacks) or hasattr(callbacks, "on_step") or hasattr(callbacks, "on_event"):
        raise SettingsInvalid(
            f"callbacks= is a list, even of one: [{getattr(callbacks, '__name__', 'callback')}]."
        )
    found = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for callback in found:
        if not callable(getattr(callback, "on_step", callback)):
            raise SettingsInvalid(
                "callbacks= holds functions of a step's event, or objects with on_step(event); found "
                f"{shown(callback)}."
            )
    return found


def _check_model(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise SettingsInvalid(
            f"The model is a torch.nn.Module; found the class {model.__name__}: pass an instance, "
            f"{model.__name__}(...)."
        )
    if not isinstance(model, torch.nn.Module):
        raise SettingsInvalid(f"The model is a torch.nn.Module; found {shown(model)}.")


def _check_loss(loss: Any) -> None:
    if isinstance(loss, type):
        raise SettingsInvalid(
            f"loss= is a function of (output, target); found the class {loss.__name__}: pass an "
            f"instance, {loss.__name__}()."
        )
    if loss is not None and not callable(loss):
        raise SettingsInvalid(
            "loss= is a function of (output, target), torch.nn.functional.cross_entropy for one; "
            f"found {shown(loss)}."
        )


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        name, options = "AdamW", "lr=1e-3"
        if isinstance(optimizer, torch.optim.Optimizer):
            name, options = type(optimizer).__name__, f"lr={optimizer.defaults.get('lr')!r}"
        elif isinstance(optimizer, type):
            name = optimizer.__name__
        elif isinstance(optimizer, str):
            name = optimizer
        raise OptimizerInvalid(
            "optimizer= is a name and options, of which each worker makes torch's own for its stages: "
            f"dagflow.Optimizer({name!r}, {options}); found {shown(optimizer)}."
        )


def _check_schedule(schedule: Any) -> None:
    if schedule is not None and not isinstance(schedule, Schedule):
        kind = schedule if isinstance(schedule, str) else "cosine"
        raise OptimizerInvalid(
            f"schedule= is a dagflow.Schedule, as dagflow.Schedule({kind!r}, warmup_steps=100); "
            f"found {shown(schedule)}."
        )


def _check_config(config: Any) -> None:
    if config is not None and not isinstance(config, Config):
        raise SettingsInvalid(
            f"config= is a dagflow.Config, as dagflow.Config(check=False); found {shown(config)}."
        )


def _check_numbers(
    *,
    epochs: Any,
    steps: Any,
    num_stages: Any,
    num_microbatches: Any,
    snapshot_every: Any,
    seed: Any,
    clip_grad_norm: Any,
) -> None:
    optional = {"steps": steps, "snapshot_every": snapshot_every}
    counts = {"epochs": epochs, "num_microbatches": num_microbatches, "seed": seed}
    for name, value in {**counts, **optional}.items():
        if not (is_whole(value) or (value is None and name in optional)):
            raise SettingsInvalid(f"{name}= is a whole number; found {shown(value)}.")
    if not (is_whole(num_stages) or isinstance(num_stages, str)):
        raise SettingsInvalid(
            f"num_stages= is a whole number or 'auto'; found {shown(num_stages)}."
        )
    if clip_grad_norm is not None and not isinstance(clip_grad_norm, Real):
        raise SettingsInvalid(f"clip_grad_norm= is a number; found {shown(clip_grad_norm)}.")
    if epochs < 1 or (steps is not None and steps < 0):
        raise SettingsInvalid(f"epochs and steps count up from 1; found {epochs} and {steps}.")
    if snapshot_every is not None and snapshot_every < 1:
        raise SettingsInvalid(
            f"snapshot_every is a number of steps, or None for one at the end; found {snapshot_every}."
        )


def _check_state_dict(state_dict: Any) -> None:
    if state_dict is not None and not isinstance(state_dict, (str, Path)):
        raise SettingsInvalid(
            "state_dict= is a safetensors file or a folder of some, for models that are built without "
            f"memory; found {shown(state_dict)}. With weights at hand call model.load_state_dict(...)."
        )
