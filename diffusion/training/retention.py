"""Which checkpoints of a run stay."""

from itertools import pairwise

from pydantic import Field, model_validator

from diffusion.recipe import Frozen, TrainRecipe, checkpoints_of


class Keep(Frozen):
    """What stays of a run's checkpoints beside its end.  No number depends on it, so it is no part of a recipe.

    The rules add up.  Two at least: where the newest is damaged, a run goes on from the one before.
    """

    last: int | None = Field(None, ge=2, description="The newest so many; none: all stay")
    images: int | None = Field(None, ge=1, description="The first at or beyond each multiple of so many images")
    moments: tuple[int, ...] = Field((), description="Those at so many images, which an evaluation is to read")

    @model_validator(mode="after")
    def _goes_with_last(self) -> "Keep":
        if self.images is not None and self.last is None:
            raise ValueError(f"images={self.images} without last: all checkpoints stay; say how many of the newest do")
        return self


def superseded(recipe: TrainRecipe, keep: Keep, images_seen: int) -> list[int]:
    """The moments of the run whose checkpoints need not stay once that of `images_seen` is published, ascending."""
    moments = [moment for moment in checkpoints_of(recipe) if moment <= images_seen]
    if keep.last is None:
        return []
    stay = {*moments[-keep.last :], *keep.moments}
    if keep.images:
        stay |= {now for before, now in pairwise((0, *moments)) if now // keep.images > before // keep.images}
    return [moment for moment in moments if moment not in stay]
