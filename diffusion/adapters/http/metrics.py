"""Numbers for Prometheus: what was asked, what the engine did, how long both took."""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from diffusion.adapters.http.account import Account
from diffusion.serving.engine import Engine
from diffusion.store.refs import ModelRef

__all__ = ["CONTENT_TYPE", "Metrics"]
_LATENCY_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_TICK_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Of one application and its engine, whose ticks it hears from now on.  Every series has the label `replica`, if there
    is one: several replicas answer at one address, each for itself."""

    def __init__(self, engine: Engine, model: ModelRef, replica: str = "") -> None:
        self.engine, self.replica, self._registry = engine, replica, CollectorRegistry()
        kept = {"registry": self._registry, "namespace": "diffusion"}
        self._requests = Counter("requests", "Requests that are over", ["route", "status"], **kept)
        self._rejected = Counter("rejected", "Requests that got no pictures, by why", ["reason"], **kept)
        self._cancelled = Counter("cancelled", "Requests whose client left", **kept)
        self._pictures = Counter("pictures", "Pictures given, by task and name of the key", ["task", "key"], **kept)
        whole = "Seconds from a request to the end of its answer, where there were pictures"
        self._seconds = Histogram("request_seconds", whole, ["task"], buckets=_LATENCY_S, **kept)
        waited = "Seconds until a request's first picture had a slot"
        self._waited = Histogram("wait_seconds", waited, buckets=(0.001, 0.01, *_LATENCY_S), **kept)
        self._rows = Histogram("tick_rows", "Rows asked of the network in a tick", buckets=_ROWS, **kept)
        self._ticks = Histogram("tick_seconds", "Seconds of a tick, one step of all", buckets=_TICK_S, **kept)
        self._load = {
            "slots": Gauge("slots", "Pictures that can be drawn at once", **kept),
            "drawing": Gauge("drawing", "Pictures being drawn", **kept),
            "waiting": Gauge("queue", "Pictures that wait for a slot", **kept),
        }
        Gauge("up", "Whether the engine is alive", **kept).set_function(lambda: float(engine.alive()))
        served = Gauge("model", "1 of the model that is served", ["model", "version", "bundle_digest"], **kept)
        served.labels(model.name, model.version, model.digest).set(1)
        engine.on_tick = self.ticked

    def ticked(self, rows: int, seconds: float) -> None:
        """What the engine tells of a tick."""
        self._rows.observe(rows)
        self._ticks.observe(seconds)

    def ended(self, account: Account) -> None:
        """A request is over."""
        outcome = account.outcome
        self._requests.labels(account.route, account.status or 499).inc()
        if outcome == "cancelled":
            self._cancelled.inc()
        elif outcome != "done":
            self._rejected.labels(outcome).inc()
        elif account.task is not None:
            self._pictures.labels(account.task, account.key or "").inc(account.n)
            self._seconds.labels(account.task).observe(account.seconds)
        if account.ticket is not None:
            self._waited.observe(account.ticket.waited_s)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        for key, number in self.engine.load().items():  # all of one moment
            self._load[key].set(number)
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """For Prometheus' client: without the times at which series began, and with the replica's name."""
        for metric in self._registry.collect():
            kept = (sample for sample in metric.samples if not sample.name.endswith("_created"))
            if self.replica:
                kept = (sample._replace(labels={**sample.labels, "replica": self.replica}) for sample in kept)
            metric.samples = list(kept)
            yield metric
