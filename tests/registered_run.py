"""A finished run with a report on it, for the registry, and what an endpoint would draw with it."""

from functools import cache
from pathlib import Path

import numpy as np

from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.facts.distance import Frechet
from diffusion.evaluation.facts.held_out import HeldOutLoss
from diffusion.evaluation.gate.verdict import Check, Verdict
from diffusion.evaluation.identity import SampleIdentity
from diffusion.evaluation.report.report import Environment, Report, class_grid, publish_report
from diffusion.recipe import SamplingRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import receipt_of, stamp
from diffusion.serving.request import GenerateRequest
from diffusion.serving.request import resolve as resolve_request
from diffusion.store.bundle import export_bundle, load_bundle
from diffusion.store.refs import EvaluationRef, ModelRef, RunRef
from tests.jackknifed import left_out
from tests.made_run import CLASSES

FIRST = Verdict(
    checks=(
        Check(name="sane", passed=True, words="sane"),
        Check(name="champion", passed=True, words="there was no champion to compare it with"),
    )
)
EXTRACTOR = ExtractorIdentity(name="efficientnet-lite0", digest="9" * 64, resolution=32)


def evaluated(store: Path, run: RunRef, sampling: SamplingRecipe, frechet: float, samples: int = 64) -> EvaluationRef:
    """The bundle of a run and a report on it, with numbers of our choice."""
    uri, digest = export_bundle(run, 0.1, store, sampling)
    identity = SampleIdentity(
        metric="frechet/1",
        dataset_digest=run.dataset.digest,
        reference_pictures=48,
        extractor=EXTRACTOR,
        dimensions=1280,
        samples=samples,
        sampling=SamplingRecipe(),
        batch_size=8,
        seed=0,
    )
    report = Report(
        bundle_digest=digest,
        run_digest=run.digest,
        recipe_digest=run.recipe_digest,
        dataset_digest=run.dataset.digest,
        classes=CLASSES,
        images_seen=run.images_seen,
        ema=0.1,
        frechet=Frechet(
            identity=identity,
            value=frechet,
            standard_error=0.1,
            left_out=left_out(frechet, 0.1, 16, pattern=1 + round(100 * frechet) % 15),
            confidence=0.95,
            low=0.0,
            high=99.0,
        ),
        floor=None,
        held_out=(HeldOutLoss(sigma=1.0, loss=0.4, standard_error=0.01, zero=1.0, pictures=8),),
        seed=0,
        problems=(),
        environment=Environment(torch="2", device="cpu"),
    )
    grid = class_grid([[np.full((32, 32, 3), 40 * label, np.uint8)] for label in range(3)], CLASSES)
    return publish_report(report, store, run=run, bundle_uri=uri, pictures={"grid": grid, "real": grid})


def sampling(steps: int) -> SamplingRecipe:
    return SamplingRecipe(steps=steps)


@cache
def endpoint_engine(uri: str) -> Engine:
    return Engine(load_bundle(uri), slots=8)


def endpoint_png(model: ModelRef, request: GenerateRequest) -> bytes:
    """What the endpoint sends for the first picture of a request."""
    engine = endpoint_engine(model.uri)
    bundle = engine.bundle
    ((picture,),) = engine.generate([request])
    resolved = resolve_request(request, bundle.spec)
    identity = {"bundle_digest": bundle.digest, "model": model.name, "version": model.version, "device": engine.device}
    return stamp(picture, receipt_of(picture, 0, resolved, bundle.spec, **identity))
