"""A plan's values: a stage, the whole, prices, and what the whole waits for most."""

from pydantic import Field

from diffusion.planning.rates import Rates
from diffusion.planning.requests import Requests
from diffusion.recipe import Frozen

_GIB = 2**30
_MOVES = {
    "starting programs": "a Prefect server and a Ray cluster that stay up (DIFFUSION_RAY) save the starts; a larger run is"
    " not held up by them",
    "decoding": "more processors: sharding divides over all of a cluster's; smaller files, or pictures of the right size",
    "fetching": "machines with more network, or local copies that hold all shards (DIFFUSION_SHARD_COPIES_MIB)",
    "writing": "a faster disk",
    "the network": "more or faster workers, train.precision=bf16, a smaller train.unet, or fewer train.images",
    "reading": "more workers, each of which decodes its share; shard.encoding=jpeg from 256 pixels up, or latents",
    "drawing": "fewer evaluate.samples or sampling.steps (`diffusion sweep` chooses them), or more workers",
    "extracting": "a smaller evaluate.extractor_resolution, or more workers; real pictures are extracted once",
    "comparing": "fewer evaluate.samples: it grows with their square",
    "proving": "fewer serve.slots: each size of call is tried before it is used",
}


class Prices(Frozen):
    """Of a currency of your own; all 0: nothing is priced."""

    gpu_hour: float = Field(0.0, ge=0, description="Of one GPU")
    gb_month: float = Field(0.0, ge=0, description="Of 10^9 bytes that stay for a month")
    per_1000: float = Field(0.0, ge=0, description="Of a thousand PUT, POST and LIST requests")
    per_1000_reads: float | None = Field(None, ge=0, description="Of a thousand GET and HEAD; none: as the others")

    def of(self, *, gpu_s: float, stored: float, requests: Requests) -> float:
        """What a stage costs: its GPUs while it runs, a month of what it writes, its requests."""
        reads = self.per_1000 if self.per_1000_reads is None else self.per_1000_reads
        return gpu_s / 3_600 * self.gpu_hour + stored / 1e9 * self.gb_month + requests.price(self.per_1000, reads)


class Stage(Frozen):
    """One stage.  Seconds; `low` and `high` are what may come instead.  working: without what it takes to start."""

    name: str
    seconds: float
    low: float
    high: float
    working: float
    waits_for: str
    written: float = 0.0  # bytes that stay
    requests: Requests = Requests()
    memory: float = 0.0  # bytes, of each worker
    cost: float = 0.0

    def plus(self, other: "Stage") -> "Stage":
        """Both, one after the other."""
        longer = max(self, other, key=lambda stage: stage.working)
        return Stage(
            name=self.name,
            waits_for=longer.waits_for,
            requests=self.requests + other.requests,
            memory=max(self.memory, other.memory),
            **{
                name: getattr(self, name) + getattr(other, name)
                for name in ("seconds", "low", "high", "working", "written", "cost")
            },
        )


class Bottleneck(Frozen):
    """What the line waits for most."""

    stage: str
    waits_for: str
    share: float = Field(description="Of all seconds that the stage takes")
    moved_by: str


class Failures(Frozen):
    """What failing workers cost the training: seconds between failures, between checkpoints as the recipe has them and as
    they lose least, and the share of time that goes with each."""

    mtbf_s: float
    own_s: float
    best_s: float
    own_lost: float
    best_lost: float


class Foretold(Frozen):
    """A plan."""

    stages: tuple[Stage, ...]
    bottleneck: Bottleneck
    how: str
    rates: Rates
    notes: tuple[str, ...] = ()
    failures: Failures | None = None

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def cost(self) -> float:
        return sum(stage.cost for stage in self.stages)

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def bottleneck_of(stages: tuple[Stage, ...]) -> Bottleneck:
    """Where all starts together take longer than any one stage's work, these are it."""
    total = sum(stage.seconds for stage in stages)
    starting = sum(stage.seconds - stage.working for stage in stages)
    longest = max(stages, key=lambda stage: stage.working)
    if starting > longest.working:
        return Bottleneck(
            stage="all", waits_for="starting programs", share=starting / total, moved_by=_MOVES["starting programs"]
        )
    return Bottleneck(
        stage=longest.name,
        waits_for=longest.waits_for,
        share=longest.working / total,
        moved_by=_MOVES[longest.waits_for],
    )


class Compared(Frozen):
    """A stage that has ended, against its plan.  ratio: taken over planned."""

    stage: str
    planned_s: float
    taken_s: float

    @property
    def ratio(self) -> float:
        return self.taken_s / self.planned_s


def compared(plan: Foretold, taken: dict[str, float]) -> list[Compared]:
    """The stages that were planned and did work, and `all` of these together.  taken: seconds by stage."""
    rows = [
        Compared(stage=stage.name, planned_s=stage.seconds, taken_s=taken[stage.name])
        for stage in plan.stages
        if taken.get(stage.name) and stage.seconds
    ]
    if rows:
        both = sum(row.planned_s for row in rows), sum(row.taken_s for row in rows)
        rows.append(Compared(stage="all", planned_s=both[0], taken_s=both[1]))
    return rows
