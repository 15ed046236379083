"""Numbers for Prometheus: what was asked, what the engine did, how long both took."""

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from diffusion.adapters.http.account import Account
from diffusion.serving.shelf import Shelf
from diffusion.store.refs import ModelRef

__all__ = ["CONTENT_TYPE", "Metrics"]
_LATENCY_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_TICK_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_GONE_S = 3600.0  # of a version, until its series go: by then each scrape has its last numbers


class Metrics:
    """Of one application and its models, whose ticks it hears from now on.  Every series has the label `replica`, if there
    is one: several replicas answer at one address, each for itself."""

    def __init__(self, shelf: Shelf, replica: str = "") -> None:
        self.shelf, self.replica, self._registry = shelf, replica, CollectorRegistry()
        by_model = ["model", "version"]
        kept = {"registry": self._registry, "namespace": "diffusion"}
        self._requests = Counter("requests", "Requests that are over", ["route", "status"], **kept)
        self._rejected = Counter("rejected", "Requests that got no pictures, by why", ["reason"], **kept)
        self._cancelled = Counter("cancelled", "Requests whose client left", **kept)
        given = "Pictures given, by task and name of the key"
        self._pictures = Counter("pictures", given, ["task", "key", *by_model], **kept)
        whole = "Seconds from a request to the end of its answer, where there were pictures"
        self._seconds = Histogram("request_seconds", whole, ["task", *by_model], buckets=_LATENCY_S, **kept)
        waited = "Seconds until a request's first picture had a slot"
        self._waited = Histogram("wait_seconds", waited, by_model, buckets=(0.001, 0.01, *_LATENCY_S), **kept)
        self._rows = Histogram("tick_rows", "Rows asked of the network in a tick", by_model, buckets=_ROWS, **kept)
        self._ticks = Histogram("tick_seconds", "Seconds of a tick, one step of all", by_model, buckets=_TICK_S, **kept)
        self._load = {
            "slots": Gauge("slots", "Pictures that can be drawn at once", by_model, **kept),
            "drawing": Gauge("drawing", "Pictures being drawn", by_model, **kept),
            "waiting": Gauge("queue", "Pictures that wait for a slot", by_model, **kept),
        }
        Gauge("up", "Whether the engines are alive", **kept).set_function(lambda: float(shelf.alive()))
        loaded = "1 of the model that is meant where none is named, 0 of others that are loaded"
        self._models = Gauge("model", loaded, [*by_model, "bundle_digest"], **kept)
        self._weights = Gauge("weights_bytes", "Bytes of the weights that are loaded", by_model, **kept)
        self._of_models = (self._pictures, self._seconds, self._waited, self._rows, self._ticks)
        self._seen: dict[tuple[str, str], float] = {}  # (model, version) -> when there last was something of it
        shelf.on_tick = self.ticked

    def ticked(self, model: ModelRef, rows: int, seconds: float) -> None:
        """What an engine tells of a tick."""
        self._seen[model.name, model.version] = time.monotonic()
        self._rows.labels(model.name, model.version).observe(rows)
        self._ticks.labels(model.name, model.version).observe(seconds)

    def ended(self, account: Account) -> None:
        """A request is over."""
        outcome = account.outcome
        model = (account.model.name, account.model.version) if account.model else ("", "")
        self._seen[model] = time.monotonic()
        self._requests.labels(account.route, account.status or 499).inc()
        if outcome == "cancelled":
            self._cancelled.inc()
        elif outcome != "done":
            self._rejected.labels(outcome).inc()
        elif account.task is not None:
            self._pictures.labels(account.task, account.key or "", *model).inc(account.n)
            self._seconds.labels(account.task, *model).observe(account.seconds)
        if account.ticket is not None:
            self._waited.labels(*model).observe(account.ticket.waited_s)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        gauges = (*self._load.values(), self._models, self._weights)
        for gauge in gauges:
            gauge.clear()  # of those that have been put away
        for number, held in enumerate(self.shelf.held()):
            model = (held.model.name, held.model.version)
            self._models.labels(*model, held.model.digest).set(number == 0)
            self._weights.labels(*model).set(held.size)
            self._seen[model] = time.monotonic()
            for key, pictures in held.engine.load().items():  # all of one moment
                self._load[key].labels(*model).set(pictures)
        self._forget()
        return generate_latest(self)

    def _forget(self) -> None:
        """Versions come and go, and each would leave its series for ever."""
        now = time.monotonic()
        for (name, version), at in list(self._seen.items()):  # other threads write to it
            if now - at > _GONE_S:
                del self._seen[name, version]
                for metric in self._of_models:
                    metric.remove_by_labels({"model": name, "version": version})

    def collect(self) -> Iterator[Metric]:
        """For Prometheus' client: without the times at which series began, and with the replica's name."""
        for metric in self._registry.collect():
            kept = (sample for sample in metric.samples if not sample.name.endswith("_created"))
            if self.replica:
                kept = (sample._replace(labels={**sample.labels, "replica": self.replica}) for sample in kept)
            metric.samples = list(kept)
            yield metric
