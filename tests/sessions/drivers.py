"""A driver in a process of its own, for tests that kill it: says a line for everything it has done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

import dagflow
from dagflow.sessions.keeping import keeping
from dagflow_storage import Store

PATIENCE_SECONDS, BEAT_SECONDS = 0.8, 0.1


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def answer(deployment: dagflow.Deployment, options: Mapping[str, Any]) -> None:
    for token in deployment.stream([deployment.request(**options)]):
        say(token.token)


def generate(deployment: dagflow.Deployment, options: Mapping[str, Any]) -> None:
    for token in dagflow.generate(deployment, stream=True, **options):
        say(token.token)


def feed(deployment: dagflow.Deployment, options: Mapping[str, Any]) -> None:
    session = dagflow.Session(deployment, name=options["name"])
    session.prefill(options["tokens"])
    session.rewind(options["position"])
    for token in options["more"]:
        session.decode(token)
        say(session.position)


def keep_with_little_patience(deployment: dagflow.Deployment, options: Mapping[str, Any]) -> None:
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


def main(address: str, models: str, model: str, store: str, what: str, options: str) -> None:
    torch.set_num_threads(1)
    doing: Callable[..., None] = globals()[what]
    loaded = dagflow.Model.open(Store(models), model)
    with dagflow.Deployment(loaded, address, num_stages=2, store=store or None) as deployment:
        doing(deployment, json.loads(options))
        say("done")
        sys.stdin.read()  # until it is killed


if __name__ == "__main__":
    main(*sys.argv[1:])
