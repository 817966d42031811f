"""What happens in a run is told as data: to callbacks, to the run's directory, under dask's topic."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from local import local_cluster, wait_until
from torch import nn
from torch.nn.functional import mse_loss

import dagflow
from dagflow.swarm import events
from dagflow.swarm.events import EVENTS, Event, EventStream, SnapshotCommitted, WorkerLeft
from dagflow.training.event_log import EventLog
from dagflow.training.events import ProgressLine, StepEvent, notify
from dagflow_storage import RunDirectory, Store

KINDS = [
    kind
    for kind in vars(events).values()
    if is_dataclass(kind) and issubclass(kind, Event) and kind not in (Event, events.WorkerEvent)
]
EXAMPLES: dict[str, Any] = {
    "str": "a",
    "int": 3,
    "float": 0.5,
    "bool": True,
    "int | None": None,
    "tuple[int, ...]": (0, 2),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_event_is_json(kind: Any) -> None:
    event = kind(**{field.name: EXAMPLES[field.type] for field in fields(kind)})
    found = json.loads(json.dumps(event.to_json()))
    assert found.pop("event") == event.kind
    assert "-" in event.kind or event.kind == "noted"
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} == vars(event)


def test_only_some_events_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    stream = EventStream(ProgressLine(True).show)
    stream.note("Writing to a folder.")
    stream.tell(WorkerLeft("tcp://10.0.0.1:4711", "attic", (0, 2)))
    stream.tell(WorkerLeft("tcp://10.0.0.1:4711", "attic", (0, 2), "went away"))
    said = capsys.readouterr().err.splitlines()
    wanted = "The worker tcp://10.0.0.1:4711 went away, with stage 0, 2."
    assert said == ["Writing to a folder.", wanted]


def test_callbacks_hear_of_steps_and_those_who_ask_of_the_rest() -> None:
    heard: list[Event] = []

    class Both:
        on_step = on_event = heard.append

    step = StepEvent(1, 0.5, 0.1, 8, "samples", 1.0)
    snapshot = SnapshotCommitted(1, 0.1, 80)
    for event in (step, snapshot):
        notify([Both(), heard.append], event)
    assert heard == [step, step, snapshot]


def test_events_are_numbered_through_all_attempts(tmp_path: Path) -> None:
    run = RunDirectory(Store(str(tmp_path)))
    for attempt in range(3):
        log = EventLog(run)
        with log.writing():
            for number in range(50):
                log(SnapshotCommitted(100 * attempt + number, 0.1, 80))
    found = run.events.read()
    assert [row["number"] for row in found] == list(range(150))
    assert [row["step"] for row in found] == [100 * a + n for a in range(3) for n in range(50)]


def test_a_killed_worker_is_told_of_with_names_seconds_and_bytes(tmp_path: Path) -> None:
    heard: list[Event] = []

    class Watcher:
        def on_step(self, event: StepEvent) -> None:
            if event.step == 3:
                victim = owners()[1]
                os.kill(int(client.run(os.getpid, workers=[victim])[victim]), signal.SIGKILL)

        def on_event(self, event: Event) -> None:
            heard.append(event)

    def owners() -> dict[int, str]:
        placed = [event for event in heard if isinstance(event, events.StagePlaced)]
        return {event.stage: event.worker for event in placed}

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    data = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(8)]
    with local_cluster(2) as cluster, Client(cluster, set_as_default=False) as client:
        told: list[dict[str, Any]] = []
        client.subscribe_topic(EVENTS, lambda event: told.append(event[1]))
        names = {a: str(w["name"]) for a, w in client.scheduler_info()["workers"].items()}
        result = dagflow.train(
            model,
            data,
            loss=mse_loss,
            store=str(tmp_path / "run"),
            client=client,
            num_stages=2,
            num_microbatches=2,
            snapshot_every=2,
            callbacks=[Watcher()],
            progress=False,
        )
        wait_until(lambda: bool(told) and told[-1].get("step") == 8, "the last event has come")
    assert result.step == 8
    (left,) = [event for event in heard if isinstance(event, WorkerLeft) and event.stages]
    assert left.stages == (1,)
    assert left.name == names[left.worker]
    restored = [event for event in heard if isinstance(event, events.StageRestored)]
    assert {event.stage for event in restored[:2]} == {0, 1}
    again = next(event for event in restored[2:] if event.stage == 1)
    assert again.step >= 3
    assert again.replayed > 0
    assert 0 < again.seconds < 60
    assert again.num_bytes >= 4 * (8 + 1)
    assert again.worker != left.worker
    snapshots = [event for event in heard if isinstance(event, SnapshotCommitted)]
    assert [event.step for event in snapshots] == sorted({event.step for event in snapshots})
    assert all(event.num_bytes > 0 for event in snapshots)
    kept = RunDirectory(Store(str(tmp_path / "run"))).events.read()
    assert [row["event"] for row in kept if row["event"] != "noted"] == [
        event.kind for event in heard if event.kind != "noted"
    ]
    assert {row["run"] for row in told} == {RunDirectory(Store(str(tmp_path / "run"))).run_id}
    kinds = [row["event"] for row in told]
    assert kinds.count("step") == 8
    assert {"worker-left", "stage-restored", "snapshot-committed"} <= set(kinds)
