"""A store that is away while a stage has to be read again: the swarm waits for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from families import greedy, stored
from local import local_client, wait_until

import dagflow
from dagflow.models.model import ModelRef
from dagflow_storage import RetryPolicy, Store
from dagflow_storage.faults import Fault, FaultKind, num_attempts, with_faults

PROMPT, NUM_NEW = [5, 17, 3, 42, 8, 23], 8
FAILURES = 3


def test_a_stage_is_read_again_once_the_store_is_back(tmp_path: Path) -> None:
    local, model = stored("llama", tmp_path / "store")
    reads: list[int] = []

    def answer(fault: Fault, counters: Path, lose: bool) -> list[int]:
        """Answer with two workers; one of them may leave before."""
        counters.mkdir()
        patient = Store(str(tmp_path / "store"), retry=RetryPolicy(total_seconds=0.0))
        away = replace(model, ref=ModelRef(with_faults(patient, [fault], counters), model.ref.name))
        with (
            local_client(2, processes=False) as client,
            dagflow.Deployment(away, client, num_stages=2) as deployment,
        ):
            reads.append(num_attempts(counters, 0))
            if lose:
                gone = deployment.engine.placement.addresses[0]
                client.retire_workers([gone], close_workers=False, remove=True)
                wait_until(lambda: deployment.engine.placement.addresses[0] != gone, "it has left")
            found = dagflow.generate(deployment, [PROMPT], max_new_tokens=NUM_NEW, ignore_end=True)
            reads.append(num_attempts(counters, 0))
            return found.tokens[0].tolist()

    never = Fault(FaultKind.UNAVAILABLE, "get", first=10**6)
    wanted = greedy(local, PROMPT, NUM_NEW)
    assert answer(never, tmp_path / "undisturbed", lose=False) == wanted
    fault = Fault(FaultKind.UNAVAILABLE, "get", first=reads[0] + 1, count=FAILURES)
    assert answer(fault, tmp_path / "disturbed", lose=True) == wanted
    assert reads[3] > reads[2] + FAILURES  # it was away, and was read when it was back
