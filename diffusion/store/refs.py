"""References: what one stage hands to the next.  Small frozen values with a URI, a digest and a few facts for people."""

from pydantic import Field

from diffusion.recipe import Frozen, Setting, unset


class DatasetRef(Frozen):
    """A published dataset: shards, indexes and a manifest.  `digest` is the manifest's, the identity of the data."""

    uri: str
    digest: str
    resolution: int
    classes: tuple[str, ...]
    images: int
    holdout: int
    rejected: int
    # (height, width) of the training pictures, from the highest to the widest, where they are in aspect buckets
    sizes: tuple[tuple[int, int], ...] = Field((), exclude_if=unset)


class RunRef(Frozen):
    """A finished training run.  `uri` is its final checkpoint, `digest` that checkpoint's manifest."""

    uri: str
    digest: str
    recipe_digest: str
    dataset: DatasetRef
    images_seen: int
    mlflow_run_id: str | None = None


class SweepRef(Frozen):
    """The ways of drawing that were tried on a run.  `uri` is a folder with sweep.json, sweep.md, pareto.png and
    timing.json; `digest` is of sweep.json; `chosen` is what to evaluate and serve the run with.
    """

    uri: str
    digest: str
    run: RunRef
    chosen: Setting
    metrics: dict[str, float]


class EvaluationRef(Frozen):
    """A report on a bundle.  `uri` is a folder with report.json, report.md and grid.png; `digest` is of report.json."""

    uri: str
    digest: str
    bundle_uri: str
    bundle_digest: str
    run: RunRef
    metrics: dict[str, float]


class ReportRef(Frozen):
    """A report on a model by pictures that need not be its own.  `uri` is a folder as an evaluation's; `digest` is of
    report.json."""

    uri: str
    digest: str


class ModelRef(Frozen):
    """A registered model version.  `uri` and `digest` are its bundle's; `reasons` are the gate's, for people."""

    uri: str
    digest: str
    name: str
    version: str
    aliases: tuple[str, ...]
    run_digest: str
    dataset_digest: str
    reasons: tuple[str, ...] = ()
