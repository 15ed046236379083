"""What a measured number depends on beside the model.  Numbers are compared where that is equal, and nowhere else."""

import re
from typing import Literal

from pydantic import Field

from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.gathered import Gathered
from diffusion.recipe import Frozen, SamplingRecipe, unset

Metric = Literal[
    "frechet/1",
    "frechet-limit/1",
    "frechet-limit/2",
    "kernel/1",
    "neighbours/1",
    "memorization/1",
    "classes/1",
    "agreement/1",
]


class SampleIdentity(Frozen):
    """What must be equal for two numbers of drawn beside real pictures to be compared: everything but the model."""

    metric: Metric
    dataset_digest: str
    reference_split: Literal["train"] = "train"
    reference_pictures: int
    extractor: ExtractorIdentity
    dimensions: int  # numbers per picture
    samples: int
    labels: Literal["in the frequencies of the data"] = "in the frequencies of the data"
    captions: Literal["of training pictures of the class"] | None = Field(
        None, exclude_if=unset
    )  # None: read by nothing
    sampling: SamplingRecipe
    batch_size: int
    seed: int


def sample_identity(gathered: Gathered, metric: Metric, *, samples: int, reference_pictures: int) -> SampleIdentity:
    """Of a number by `samples` of the drawn and `reference_pictures` of the real pictures."""
    recipe = gathered.recipe
    return SampleIdentity(
        metric=metric,
        dataset_digest=gathered.manifest.digest,
        reference_pictures=reference_pictures,
        extractor=gathered.setup.extractor,
        dimensions=gathered.real.shape[1],
        samples=samples,
        captions="of training pictures of the class" if gathered.spec.text is not None else None,
        sampling=recipe.sampling,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )


def differences(
    here: Frozen, there: Frozen, *, ignored: str | tuple[str, ...] | None = None, whose: str = "the other's"
) -> tuple[str, ...]:
    """What keeps numbers of these identities from being compared, one line for each differing field.  ignored: how the names
    of those begin that may differ.  whose: report the second one is from."""
    a, b = flat(here.model_dump()), flat(there.model_dump())
    return tuple(
        f"{name} is {_short(a.get(name))} here and {_short(b.get(name))} in {whose} report"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not (ignored and name.startswith(ignored))
    )


def _short(value: object) -> object:
    """Of a digest what tells it from others."""
    return f"{value[:16]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def check_alike(here: Frozen, there: Frozen, *, ignored: str | None = None) -> None:
    """Raises ValueError where numbers of these identities cannot be compared: it names each differing field."""
    if unlike := differences(here, there, ignored=ignored):
        raise ValueError(
            f"numbers of unlike identity are not compared: {'; '.join(unlike)}. Evaluate both with one recipe"
        )


def flat(value: dict, prefix: str = "") -> dict[str, object]:
    """Nested dicts as one, with dotted names."""
    found: dict[str, object] = {}
    for name, inner in value.items():
        found |= flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
    return found
