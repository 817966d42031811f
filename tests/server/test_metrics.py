"""What Prometheus reads of a server: names and kinds that dashboards rely on."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from dagflow.server.bridge import Ending
from dagflow.server.metrics import Metrics
from dagflow.serving.pool import CacheState

COUNTERS = "responses requests prompt_tokens completion_tokens prefix_hits prefix_hit_tokens"
GAUGES = (
    "requests_running requests_waiting cache_capacity_tokens cache_used_tokens cache_kept_tokens "
    "cache_waiting_answers"
)
KINDS = {"counter": COUNTERS, "gauge": GAUGES, "summary": "request_seconds"}


def test_metrics_have_the_names_and_kinds_that_dashboards_rely_on() -> None:
    metrics = Metrics(prompt_tokens=11)
    metrics.responses[200] += 3
    metrics.add_request(Ending.FAILED, num_tokens=5, seconds=1.5)
    text = metrics.to_text(1, 2, CacheState(64, 32, 16, 4, 8, 128))
    found = {family.name: family for family in text_string_to_metric_families(text)}
    wanted = {f"dagflow_{name}": kind for kind, names in KINDS.items() for name in names.split()}
    assert {name: family.type for name, family in found.items()} == wanted
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in found.values()
        for sample in family.samples
    }
    assert samples["dagflow_responses_total", "200"] == 3
    assert samples["dagflow_requests_total", "failed"] == 1
    assert samples["dagflow_requests_total", "made"] == 0
    assert samples["dagflow_prompt_tokens_total",] == 11
    assert samples["dagflow_completion_tokens_total",] == 5
    assert samples["dagflow_prefix_hits_total",] == 8
    assert samples["dagflow_prefix_hit_tokens_total",] == 128
    assert samples["dagflow_requests_running",] == 1
    assert samples["dagflow_requests_waiting",] == 2
    assert samples["dagflow_cache_capacity_tokens",] == 64
    assert samples["dagflow_cache_used_tokens",] == 32
    assert samples["dagflow_cache_kept_tokens",] == 16
    assert samples["dagflow_cache_waiting_answers",] == 4
    assert samples["dagflow_request_seconds_sum",] == 1.5
    assert samples["dagflow_request_seconds_count",] == 1
