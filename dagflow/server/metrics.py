"""What the server has done so far, in Prometheus' text format."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dagflow.server.bridge import Ending
from dagflow.sessions.pool import CacheState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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
        lines = ["# TYPE dagflow_responses_total counter"]
        for status, count in sorted(self.responses.items()):
            lines.append(f'dagflow_responses_total{{status="{status}"}} {count}')
        lines.append("# TYPE dagflow_requests_total counter")
        for how in Ending:
            lines.append(f'dagflow_requests_total{{ended="{how.value}"}} {self.requests[how]}')
        counters = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "prefix_hits": caches.num_hits,
            "prefix_hit_tokens": caches.hit_tokens,
        }
        for name, value in counters.items():
            lines += [f"# TYPE dagflow_{name}_total counter", f"dagflow_{name}_total {value}"]
        gauges = {
            "requests_running": running,
            "requests_waiting": waiting,
            "cache_capacity_tokens": caches.capacity_tokens,
            "cache_used_tokens": caches.used_tokens,
            "cache_kept_tokens": caches.kept_tokens,
            "cache_waiting_answers": caches.num_waiting,
        }
        for name, value in gauges.items():
            lines += [f"# TYPE dagflow_{name} gauge", f"dagflow_{name} {value}"]
        lines += [
            "# TYPE dagflow_request_seconds summary",
            f"dagflow_request_seconds_sum {self.request_seconds:.6f}",
            f"dagflow_request_seconds_count {self.requests.total()}",
        ]
        return "\n".join(lines) + "\n"


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
