"""`--init`: the model that a training starts from, told by name once and by its digest from then on."""

import re
from pathlib import Path

from diffusion.recipe import TrainRecipe, digest_of
from diffusion.store.refs import DatasetRef
from flows.console import say
from flows.site import Site

_DIGEST = re.compile(r"[0-9a-f]{64}")


def resolved(init: str, site: Site) -> str:
    """The digest of the model that `init` means now; its bundle lies in the store.

    init: NAME, whose champion it is, NAME@ALIAS, NAME@VERSION, or a bundle's digest.  Raises ValueError naming what there
    is.
    """
    if _DIGEST.fullmatch(init):
        return init
    from diffusion.adapters import mlflow_registry as registry

    name, _, which = init.partition("@")
    model = registry.resolve(site.tracking(name), name, which or registry.CHAMPION, site.store)
    say(f"  train     starts from {model.name} version {model.version}: train.init={model.digest}")
    return model.digest


def started_from(recipe: TrainRecipe, init: str | None, dataset: DatasetRef, site: Site) -> TrainRecipe:
    """The recipe that starts from the model `init`, as in `resolved`; the same where that is None.

    A model that this very recipe made of this very dataset would learn nothing that it was not taught: the recipe is then
    its own, whose work is finished.  So a schedule that starts from the champion trains when pictures came, or the recipe
    changed, and else does nothing.  In the place of a student stands its teacher.  Raises ValueError where the
    networks differ in more than classes and conditions.
    """
    if init is None:
        return recipe
    if recipe.init is not None:
        raise ValueError(f"train.init={recipe.init[:12]} and --init {init}: give one of the two")
    from diffusion.store.bundle import verify_bundle
    from diffusion.training.warm_start import check_origin

    recipe = recipe.model_copy(update={"init": resolved(init, site)})
    spec, _ = verify_bundle(origin_of(recipe, site), recipe.init)
    if spec.lesson:
        say("  train     that model is a student: its teacher is what can learn more")
        recipe = recipe.model_copy(update={"init": spec.lesson.teacher})
        spec, _ = verify_bundle(origin_of(recipe, site), recipe.init)
    own = recipe.model_copy(update={"init": spec.init})
    if (spec.dataset_digest, spec.recipe_digest) == (dataset.digest, digest_of(own)):
        say("  train     that model was trained by this recipe on these pictures: there is nothing new to learn")
        return own
    check_origin(recipe, dataset.resolution, spec)
    return recipe


def origin_of(recipe: TrainRecipe, site: Site) -> Path | None:
    """The folder of the model that a recipe starts from, None where it starts from none.  Raises ValueError where the store
    does not have it."""
    from diffusion.store.bundle import bundle_path

    if recipe.init is None:
        return None
    folder = bundle_path(site.store, recipe.init)
    if not folder.is_dir():
        raise ValueError(
            f"train.init={recipe.init}: the store has no such model. `--init NAME` or `--init NAME@VERSION` takes a"
            f" registered one, and fetches it"
        )
    return folder
