"""`--init`: the model that a training starts from, told by name once and by its digest from then on."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.recipe import Recipe, TrainRecipe, digest_of
from diffusion.store.refs import DatasetRef
from flows.console import say
from flows.site import Site

if TYPE_CHECKING:
    from diffusion.store.bundle_spec import BundleSpec

NOTHING_NEW = "that model was trained by this recipe on these pictures: there is nothing new to learn"
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
    networks differ in more than classes and conditions, and as `learned` does.
    """
    if init is None:
        return recipe
    _check_one(recipe, init)
    from diffusion.store.bundle import verify_bundle
    from diffusion.training.warm_start import check_origin

    recipe = recipe.model_copy(update={"init": resolved(init, site)})
    spec, _ = verify_bundle(origin_of(recipe, site), recipe.init)
    if spec.lesson:
        say("  train     that model is a student: its teacher is what can learn more")
        recipe = recipe.model_copy(update={"init": spec.lesson.teacher})
        spec, _ = verify_bundle(origin_of(recipe, site), recipe.init)
    check_origin(recipe, dataset.resolution, spec)
    if own := learned(recipe, spec, dataset, site):
        say(f"  train     {NOTHING_NEW}")
    return own or recipe


def warm_start(recipe: Recipe, init: str | None, site: Site) -> str | None:
    """The model that a line which goes on from its own champion starts from: none where there is no champion yet.

    init: the model that was named to start from.  Raises ValueError where one was.
    """
    if init is not None or recipe.train.init is not None:
        raise ValueError(
            f"--warm starts from the champion of {recipe.name}: leave out --init and train.init, or --warm"
        )
    from diffusion.adapters.mlflow_gate import champion_version

    if champion_version(site.tracking(recipe.name), recipe.name) is None:
        say(f"  train     {recipe.name} has no champion yet: it starts from random weights")
        return None
    return recipe.name


def look(recipe: TrainRecipe, init: str | None, resolution: int, site: Site) -> tuple[TrainRecipe, "BundleSpec | None"]:
    """The recipe as `started_from` makes it of pictures of this resolution, as far as their digest does not matter, and the
    facts of the model that it starts from, None where it starts from none.  Nothing is made and nothing fetched.

    Ask before there are shards.  Raises ValueError as `started_from` does.
    """
    if init is None and recipe.init is None:
        return recipe, None
    _check_one(recipe, init)
    from diffusion.adapters import mlflow_registry as registry
    from diffusion.store.bundle_spec import read_spec
    from diffusion.training.warm_start import check_origin

    name, _, which = (init or recipe.init).partition("@")
    if _DIGEST.fullmatch(name):
        recipe = recipe.model_copy(update={"init": name})
        spec, _ = read_spec(origin_of(recipe, site), name)
    else:
        digest, spec = registry.look_up(site.tracking(name), name, which or registry.CHAMPION, site.store)
        recipe = recipe.model_copy(update={"init": digest})
    if init is not None and spec.lesson:
        recipe = recipe.model_copy(update={"init": spec.lesson.teacher})
        spec, _ = read_spec(origin_of(recipe, site), recipe.init)
    check_origin(recipe, resolution, spec)
    return recipe, spec


def check_news(recipe: TrainRecipe, init: str | None, dataset: DatasetRef, site: Site) -> None:
    """Raises ValueError as `started_from` would, before anything is started or fetched."""
    recipe, spec = look(recipe, init, dataset.resolution, site)
    if init and spec:
        learned(recipe, spec, dataset, site)


def learned(recipe: TrainRecipe, spec: "BundleSpec", dataset: DatasetRef, site: Site) -> TrainRecipe | None:
    """The recipe that made a model of this dataset, where but for its beginning that is `recipe`; None where it is not.

    Raises ValueError where it is, and the finished run is nowhere in reach: all of it would be trained again.
    """
    from flows.finished import in_reach

    own = recipe.model_copy(update={"init": spec.init})
    if (spec.dataset_digest, spec.recipe_digest) != (dataset.digest, digest_of(own)):
        return None
    if not in_reach(own, dataset, site):
        again = f", with --set train.init={spec.init}," if spec.init else ""
        raise ValueError(
            f"the model {recipe.init[:16]} was trained by this recipe on these pictures, so there is nothing new to learn,"
            f" and its run is not in {site.home}: all of it would be trained again. Change the recipe or add pictures;"
            f" `diffusion deploy` serves that model as it is; without --init{again} it is made once more"
        )
    return own


def origin_of(recipe: TrainRecipe, site: Site) -> Path | None:
    """The folder of the model that a recipe starts from, None where it starts from none.  Raises ValueError where the store
    does not have it."""
    from diffusion.store.bundle_spec import bundle_path

    if recipe.init is None:
        return None
    folder = bundle_path(site.store, recipe.init)
    if not folder.is_dir():
        raise ValueError(
            f"train.init={recipe.init}: the store has no such model. `--init NAME` or `--init NAME@VERSION` takes a"
            f" registered one, and fetches it"
        )
    return folder


def _check_one(recipe: TrainRecipe, init: str | None) -> None:
    if None not in (recipe.init, init):
        raise ValueError(f"train.init={recipe.init[:12]} and --init {init}: give one of the two")
