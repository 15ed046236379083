"""The champion measured again, as the challenger was: where the pictures are not those of its own report any more, since new
ones came, or the recipe of evaluation has changed."""

from diffusion.evaluation.gate.limits import may_differ
from diffusion.evaluation.identity import differences
from diffusion.evaluation.report.report import Report
from diffusion.recipe import EvaluateRecipe
from diffusion.store.bundle_spec import BundleSpec

_OF_A_MODEL = ("classes", "resolution", "sizes", "text", "codec")  # no other measurement makes them equal


def unlike(challenger: Report, champion: Report) -> tuple[str, ...]:
    """What keeps the two from being compared, in words: of what the champion's report was measured by, and the challenger's
    was not.  Empty too where one of them has no distance, and for two reports on one bundle."""
    if None in (challenger.frechet, champion.frechet) or challenger.bundle_digest == champion.bundle_digest:
        return ()
    here, there = challenger.frechet.identity, champion.frechet.identity
    return differences(here, there, ignored=may_differ(challenger, champion), whose="its own")


def of_one_kind(challenger: BundleSpec, champion: BundleSpec) -> bool:
    """Whether the champion can be measured by the challenger's pictures: both are asked for the same."""
    return all(getattr(challenger, name) == getattr(champion, name) for name in _OF_A_MODEL)


def recipe_for(champion: Report, spec: BundleSpec, challenger: Report, recipe: EvaluateRecipe) -> EvaluateRecipe | None:
    """How to measure it: by the challenger's recipe; a model that draws otherwise by right, see `may_differ`, as it is
    served.  None where it cannot draw so."""
    as_served = may_differ(challenger, champion) or spec.lesson
    sampling = spec.sampling if as_served else recipe.sampling
    if sampling.guidance_kind not in spec.guidance_kinds:
        return None
    facts = {  # which average of which checkpoint it is: its bundle has it, nothing is made of them
        "ema": spec.ema,
        "images": None,
        "guide_images": spec.guide and spec.guide.checkpoint.images_seen,
        "guide_ema": spec.guide and spec.guide.ema,
    }
    return recipe.model_copy(update={**facts, "sampling": sampling, "chosen_by": champion.chosen_by})
