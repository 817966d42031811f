"""What the server has done so far, in Prometheus' text format."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from prometheus_client import Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dagflow.server.bridge import Ending
from dagflow.serving.pool import CacheState


@dataclass
class Metrics:
    """Counts of one server.

    Attributes
    ----------
    responses : Counter
        By status.
    requests : Counter
        Those that had their turn, by how they ended.
    request_seconds : float
        How long they took, without the time in the queue.
    """

    responses: Counter[int] = field(default_factory=Counter)
    requests: Counter[Ending] = field(default_factory=Counter)
    request_seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add_request(self, how: Ending, num_tokens: int, seconds: float) -> None:
        self.requests[how] += 1
        self.completion_tokens += num_tokens
        self.request_seconds += seconds

    @property
    def retry_seconds(self) -> int:
        """In how many seconds a place may be free."""
        return max(1, math.ceil(self.request_seconds / max(1, self.requests.total())))

    def to_text(self, running: int, waiting: int, caches: CacheState) -> str:
        """Return the exposition, with what is going on now.

        Parameters
        ----------
        running, waiting
            Requests that are being answered, and that wait for it.
        caches
            Of the workers.
        """
        responses = CounterMetricFamily("dagflow_responses", "By status.", labels=["status"])
        for status, count in sorted(self.responses.items()):
            responses.add_metric([str(status)], count)
        requests = CounterMetricFamily("dagflow_requests", "By how they ended.", labels=["ended"])
        for how in Ending:
            requests.add_metric([how.value], self.requests[how])
        num_requests, seconds = self.requests.total(), self.request_seconds
        now: list[Metric] = [
            responses,
            requests,
            _counter("prompt_tokens", "Tokens of prompts.", self.prompt_tokens),
            _counter("completion_tokens", "Tokens of answers.", self.completion_tokens),
            _counter("prefix_hits", "Answers that went on from others' tokens.", caches.num_hits),
            _counter("prefix_hit_tokens", "How many tokens these were.", caches.hit_tokens),
            _gauge("requests_running", "Requests that are being answered.", running),
            _gauge("requests_waiting", "Requests that wait for their turn.", waiting),
            _gauge("cache_capacity_tokens", "Tokens that caches hold.", caches.capacity_tokens),
            _gauge("cache_used_tokens", "Tokens reserved for answers.", caches.used_tokens),
            _gauge("cache_kept_tokens", "Tokens kept for prompts to come.", caches.kept_tokens),
            _gauge("cache_waiting_answers", "Answers that wait for room.", caches.num_waiting),
            SummaryMetricFamily(
                "dagflow_request_seconds", "Without the queue.", num_requests, seconds
            ),
        ]
        return generate_latest(_Now(now)).decode()


class _Now(Collector):
    """What there is at one moment."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"dagflow_{name}", what, value)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"dagflow_{name}", what, value)


class Counting:
    """An application whose responses are counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)
