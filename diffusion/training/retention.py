"""Which checkpoints of a run stay."""

from itertools import pairwise

from pydantic import Field, model_validator

from diffusion.recipe import Frozen, TrainRecipe, checkpoints_of
from diffusion.training.journal import Judged


class Keep(Frozen):
    """What stays of a run's checkpoints beside its end.  No number depends on it, so it is no part of a recipe.

    The rules add up.  Two at least: where the newest is damaged, a run goes on from the one before.
    """

    last: int | None = Field(None, ge=2, description="The newest so many; none: all stay")
    images: int | None = Field(None, ge=1, description="The first at or beyond each multiple of so many images")
    best: int | None = Field(None, ge=1, description="So many of those that validation has judged best")
    moments: tuple[int, ...] = Field((), description="Those at so many images, which an evaluation is to read")

    @model_validator(mode="after")
    def _goes_with_last(self) -> "Keep":
        for name in ("images", "best"):
            value = getattr(self, name)
            if value is not None and self.last is None:
                raise ValueError(f"{name}={value} without last: all checkpoints stay; say how many of the newest do")
        return self


def superseded(recipe: TrainRecipe, keep: Keep, images_seen: int, judged: Judged = Judged()) -> list[int]:
    """The moments of the run whose checkpoints need not stay once that of `images_seen` is published, ascending.

    judged: of the checkpoints that are there.  With keep.best, one that is being judged stays until it is.  The others are
    not waited for: one that no rule keeps before its turn goes without having been judged.
    """
    moments = [moment for moment in checkpoints_of(recipe) if moment <= images_seen]
    if keep.last is None:
        return []
    stay = {*moments[-keep.last :], *keep.moments}
    if keep.images:
        stay |= {now for before, now in pairwise((0, *moments)) if now // keep.images > before // keep.images}
    if keep.best:
        stay |= {*judged.best(keep.best), judged.under_way}
    return [moment for moment in moments if moment not in stay]
