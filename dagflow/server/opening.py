"""From what people type to a model in the store."""

from __future__ import annotations

from pathlib import Path

from dagflow.errors import NotFound, SettingsInvalid
from dagflow.models.loading import load
from dagflow.models.model import Model
from dagflow_storage import Store


def open_model(model: str, store: str, weights: str | None = None, check: bool = True) -> Model:
    """Return a model of a Hugging Face folder, brought into the store, or one that the store has.

    Parameters
    ----------
    weights : {"fp32", "bf16", "int8", "int4"}, optional
        fp32 by default; a model that is in the store keeps what it has.
    check : bool
        Whether a folder's model is compared with transformers.

    Raises
    ------
    SettingsInvalid
        If there is no such model.
    """
    if Path(model).is_dir():
        return load(model, store=store, weights=weights or "fp32", check=check)
    place = Store(store)
    try:
        found = Model.open(place, model)
    except NotFound as error:
        known = ", ".join(sorted(place.list("models"))) or "none"
        raise SettingsInvalid(
            f"There is no folder {model!r}, and {place} has no model of this name; it has: {known}."
        ) from error
    stored = found.description["weights"]
    if weights not in (None, stored):
        raise SettingsInvalid(
            f"{model} is stored as {stored}; for {weights}, name the folder it was loaded from."
        )
    return found


def public_name(model: str) -> str:
    """Return what clients call a model.

    >>> public_name("models/SmolLM2-135M/")
    'SmolLM2-135M'
    """
    return Path(model).resolve().name
