"""What plans leave in the home: the last plan of each line, for its run; and how long stages here took to start."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pydantic import ValidationError

from diffusion.planning.stages import Compared, Foretold
from diffusion.recipe import Recipe, canonical_json, digest_of
from diffusion.store.publish import write_atomic
from flows.site import Site

_STARTS = "starts.json"
_RUNS = 9  # of which the starts are remembered


def _place(recipe: Recipe, source: str, site: Site) -> Path:
    facts = {"recipe": recipe.model_dump(mode="json"), "source": source, "workers": site.most_workers}
    key = digest_of(facts | {"gpu": site.use_gpu})
    return site.home / "plans" / f"{key[:16]}.json"


def note(plan: Foretold, recipe: Recipe, source: str, site: Site) -> None:
    """For the run that follows, which is held against it."""
    path = _place(recipe, source, site)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, canonical_json(plan))


def noted(recipe: Recipe, source: str, site: Site) -> Foretold | None:
    """The plan that was made last of this recipe and source on so many workers; None where there is none."""
    try:
        return Foretold.model_validate_json(_place(recipe, source, site).read_bytes())
    except (FileNotFoundError, ValidationError):  # the second: of another version of the program
        return None


def starts_of(site: Site) -> dict[str, float]:
    """How long stages took to start in the last runs here, the median, in units of `Rates.start_s`."""
    return {stage: median(units) for stage, units in _remembered(site).items()}


def learn(plan: Foretold, rows: Sequence[Compared], site: Site) -> None:
    """Remember what stages took beside the work that a probe foretold."""
    if plan.how != "measured":
        return
    known = _remembered(site)
    for row in rows:
        if (stage := plan.stage(row.stage)) is not None:
            units = max(0.0, row.taken_s - stage.working) / plan.rates.start_s
            known[row.stage] = [*known.get(row.stage, []), round(units, 3)][-_RUNS:]
    write_atomic(site.home / "plans" / _STARTS, canonical_json(known))


def _remembered(site: Site) -> dict[str, list[float]]:
    try:
        return json.loads((site.home / "plans" / _STARTS).read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):  # what is damaged is learnt again
        return {}
