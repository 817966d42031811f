"""A driver in a process of its own, for tests that kill it: says of everything it does what it has done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

import dagflow
from dagflow.models.model import ModelRef
from dagflow.serving.keeping import keeping

PATIENCE_SECONDS, BEAT_SECONDS = 0.8, 0.1


Say = Callable[[object], None]


def answer(deployment: dagflow.Deployment, options: Mapping[str, Any], say: Say) -> None:
    for token in deployment.stream([deployment.request(**options)]):
        say(token.token)


def generate(deployment: dagflow.Deployment, options: Mapping[str, Any], say: Say) -> None:
    for token in dagflow.generate(deployment, stream=True, **options):
        say(token.token)


def feed(deployment: dagflow.Deployment, options: Mapping[str, Any], say: Say) -> None:
    session = dagflow.Session(deployment, name=options["name"])
    session.prefill(options["tokens"])
    session.rewind(options["position"])
    for token in options["more"]:
        session.decode(token)
        say(session.position)


def keep_with_little_patience(
    deployment: dagflow.Deployment, options: Mapping[str, Any], say: Say
) -> None:
    """Answer under a lease that is soon lost; say what the stream ends with."""
    options = dict(options)
    store = options.pop("store")
    request = replace(deployment.request(**options), name="frozen")
    with keeping(store, patience_seconds=PATIENCE_SECONDS, beat_seconds=BEAT_SECONDS) as keeper:
        try:
            for token in deployment.stream([request], keeper=keeper):
                say(token.token)
        except dagflow.DagflowError as error:
            say(type(error).__name__)


def drive(
    told: Connection, address: str, model: ModelRef, store: str, what: str, options: Any
) -> None:
    """Do `what`, and wait to be killed; `store` is the deployment's, empty for none."""
    torch.set_num_threads(1)
    doing: Callable[..., None] = globals()[what]
    loaded = dagflow.Model.open(model.store, model.name)
    with dagflow.Deployment(loaded, address, num_stages=2, store=store or None) as deployment:
        doing(deployment, options, told.send)
        told.send("done")
        threading.Event().wait()
