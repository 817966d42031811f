"""Workers a long way off: what dask's scheduler tells them comes before what the driver does."""

from __future__ import annotations

from pathlib import Path

from families import greedy, stored
from local import local_client
from relay import Relay

import dagflow

PROMPT = [5, 17, 3, 41]
DELAY_SECONDS = 0.1


def test_a_far_away_worker_opens_stages_once_it_knows_its_driver(tmp_path: Path) -> None:
    model, loaded = stored("llama", tmp_path)
    with (
        Relay(DELAY_SECONDS) as relay,
        local_client(
            1, worker_port=relay.behind, contact_address=f"tcp://127.0.0.1:{relay.port}"
        ) as client,
        dagflow.Deployment(loaded, client, num_stages=2) as deployment,
    ):
        (found,) = dagflow.generate(deployment, [PROMPT], max_new_tokens=6, ignore_end=True).tokens
    assert found.tolist() == greedy(model, PROMPT, 6)
