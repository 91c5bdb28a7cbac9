"""What /metrics shows: requests of this app, and what the copies of the model last said of themselves."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COUNTERS = {
    "rows": "Forward passes.",
    "shared_rows": "Forward passes that several requests shared.",
    "tokens": "Tokens that ran through the model.",
    "groups": "Prompts with their titles that were scored.",
    "cache_hits": "Prompts whose keys and values were kept.",
    "cache_misses": "Prompts that had to run.",
}
GAUGES = {"waiting": "Prompts with their titles under way.", "cache_bytes": "Bytes of kept keys and values."}


class Metrics:
    """The metrics of one app.

    Args:
        states: copy of the model -> its ``RankingService.state``, looked at when the metrics are read.
    """

    def __init__(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        self._registry = CollectorRegistry()
        labels = ("endpoint", "status")
        self.requests = Counter(
            "dmpo_requests", "Answered requests by endpoint and status.", labels, registry=self._registry
        )
        self.seconds = Histogram(
            "dmpo_request_seconds", "From the whole request to the answer.", ("endpoint",), buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.under_way = Gauge("dmpo_requests_under_way", "Requests without an answer yet.", registry=self._registry)
        self._registry.register(_Copies(states))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Copies(Collector):
    def __init__(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        self._states = states

    def collect(self) -> Iterable[Metric]:
        for names, family in ((COUNTERS, CounterMetricFamily), (GAUGES, GaugeMetricFamily)):
            for name, text in names.items():
                metric = family(f"dmpo_engine_{name}", text, labels=["copy"])
                for copy, state in list(self._states.items()):
                    metric.add_metric([copy], state["engine"][name])
                yield metric
        titles = GaugeMetricFamily("dmpo_catalogue_titles", "Titles of the catalogue in use.", labels=["copy"])
        stale = GaugeMetricFamily("dmpo_catalogue_broken", "1 where the catalogue's file is broken.", labels=["copy"])
        for copy, state in list(self._states.items()):
            titles.add_metric([copy], (state["catalogue"] or {"titles": 0})["titles"])
            stale.add_metric([copy], state["catalogue_problem"] is not None)
        yield titles
        yield stale
